"""How makers write a camera's direction, height and position into XMP: one table.

Angles are rotations by yaw, pitch and roll, in this order, about axes north, east, down. They
differ in names, in the pitch of a camera that looks straight down, in the sign of roll, and in what
is turned: a gimbal's camera looks along its first axis and rolls about the direction it looks in; a
camera in a body looks along the body's down axis and rolls about the body's forward axis, the
image's top (Pix4D, "Yaw, Pitch, Roll and Omega, Phi, Kappa angles").
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from archive_pipeline.flight.xmp import Xmp


@dataclass(frozen=True)
class Dialect:
    """One maker's properties, names in order of preference.

    Attributes:
        name: the maker, or whose convention it is.
        namespace: what its namespace has in it, lower case.
        source: where the row is from.
        yaw, pitch, roll: degrees.
        nadir: pitch of a camera that looks straight down.
        roll_sign: -1 where a roll to the left is positive.
        mount: ``"gimbal"`` or ``"body"``, see above.
        height: metres above take-off, or above ground.
        lat, lon: signed degrees, WGS 84.
        focal_px, centre_px: focal length, and x and y of the principal point, pixels.
        focal_mm: focal length, mm.
        survey: accuracy and datum, kept as they are written.
        make: what EXIF's make has in it, lower case, where that decides.
    """

    name: str
    namespace: str
    source: str
    yaw: tuple[str, ...]
    pitch: tuple[str, ...]
    roll: tuple[str, ...]
    nadir: float = -90.0
    roll_sign: float = 1.0
    mount: str = "gimbal"
    height: tuple[str, ...] = ()
    lat: tuple[str, ...] = ()
    lon: tuple[str, ...] = ()
    focal_px: tuple[str, ...] = ()
    centre_px: tuple[str, str] | None = None
    focal_mm: tuple[str, ...] = ()
    survey: tuple[str, ...] = ()
    make: str = ""

    def matches(self, namespace: str) -> bool:
        """Whether a namespace is this one's, whatever its version."""
        return re.search(self.namespace, namespace.lower()) is not None


_DJI = Dialect(
    "DJI",
    r"dji\.com/drone-dji|^drone-dji$",
    "exiftool's DJI.pm; pitch from OpenDroneMap's opendm/photo.py",
    yaw=("GimbalYawDegree", "FlightYawDegree"),
    pitch=("GimbalPitchDegree",),
    roll=("GimbalRollDegree",),
    height=("RelativeAltitude",),
    lat=("GpsLatitude", "Latitude"),
    lon=("GpsLongitude", "GpsLongtitude", "Longitude"),  # misspelt by some firmwares
    focal_px=("CalibratedFocalLength",),
    centre_px=("CalibratedOpticalCenterX", "CalibratedOpticalCenterY"),
    survey=("RtkFlag", "RtkStdLon", "RtkStdLat", "RtkStdHgt", "AltitudeType", "GpsStatus"),
)
# AgEagle, MicaSense, Sequoia, Sentera, Wingtra, Sony payloads geotagged by makers' software.
_PIX4D = Dialect(
    "Pix4D",
    r"pix4d\.com/camera|sensefly\.com/camera|^camera$",
    "Pix4D's specification of XMP Camera tags; exiftool's config_files/pix4d.config",
    yaw=("Yaw",),
    pitch=("Pitch",),
    roll=("Roll",),
    nadir=0.0,
    mount="body",
    height=("AboveGroundAltitude",),
    focal_mm=("PerspectiveFocalLength",),
    survey=("GPSXYAccuracy", "GPSZAccuracy", "HorizCS", "VertCS"),
)

DIALECTS: tuple[Dialect, ...] = (
    _DJI,
    replace(
        _DJI,
        name="Autel",
        namespace=r"autel|(^|/)drone(/1\.0)?$",
        source="OpenAthena's parseImage.py, handleAUTEL: DJI's names in a namespace `drone`",
    ),
    Dialect(
        "Yuneec",
        r"yuneec\.com/drone-yuneec|^drone-yuneec$",
        "frames of an E90 and a C23 in tests of two readers of EXIF: pitch -89.96 at nadir",
        yaw=("GimbalYaw", "DroneYaw"),
        pitch=("GimbalPitch",),
        roll=("GimbalRoll",),
        height=("AboveHomeAltitude",),
    ),
    Dialect(
        "Parrot",
        r"parrot\.com/drone-parrot|^drone-parrot$",
        "developer.parrot.com, photo metadata; OpenAthena's handlePARROT",
        yaw=("CameraYawDegree", "DroneYawDegree"),
        pitch=("CameraPitchDegree",),
        roll=("CameraRollDegree",),
    ),
    Dialect(
        "Skydio",
        r"skydio\.com/drone-skydio|^drone-skydio$",
        "Skydio's camera and metadata overview; OpenAthena's handleSKYDIO",
        yaw=("CameraOrientationNED/Yaw",),
        pitch=("CameraOrientationNED/Pitch",),
        roll=("CameraOrientationNED/Roll",),
        height=("RelativeAltitude",),
        lat=("Latitude",),
        lon=("Longitude",),
        focal_px=("CalibratedFocalLength/X",),
        centre_px=("CalibratedOpticalCenter/X", "CalibratedOpticalCenter/Y"),
        survey=("GpsHorizontalAccuracy", "GpsVerticalAccuracy"),
    ),
    replace(
        _PIX4D,
        name="senseFly",
        source="OpenDroneMap's opendm/photo.py: roll of senseFly's cameras has the other sign",
        roll_sign=-1.0,
        make="sensefly",
    ),
    _PIX4D,
)
# Angles that are not the camera's: light sensors, and panoramas.
_OTHERS = re.compile(r"dls|irradiance|sunsensor|gpano|photos/1\.0/panorama", re.IGNORECASE)
_ANGLES = re.compile(r"(^|/)[A-Za-z]*(Yaw|Heading)[A-Za-z]*$")


def spoken(xmp: Xmp, make: str) -> tuple[Dialect, ...]:
    """The dialects that a file's XMP is written in, those that say where the camera looks first."""
    found = [
        dialect
        for dialect in DIALECTS
        if dialect.make in make.lower() and any(dialect.matches(ns) for ns, _ in xmp.values)
    ]
    return tuple(sorted(found, key=lambda dialect: number(xmp, dialect, dialect.pitch) is None))


def unknown_angles(xmp: Xmp) -> str | None:
    """A namespace that has a yaw or heading and is in no row of the table."""
    for namespace, name in xmp.values:
        if _OTHERS.search(f"{namespace} {name}") or not _ANGLES.search(name):
            continue
        if not any(dialect.matches(namespace) for dialect in DIALECTS):
            return namespace
    return None


def text(xmp: Xmp, dialect: Dialect, name: str) -> str | None:
    """The text of one of a dialect's properties."""
    for (namespace, found), texts in xmp.values.items():
        if found == name and dialect.matches(namespace):
            return texts[0]
    return None


def number(xmp: Xmp, dialect: Dialect, names: tuple[str, ...]) -> float | None:
    """The number of the first of a dialect's properties that has one; fractions count."""
    for name in names:
        found = parse(text(xmp, dialect, name))
        if found is not None:
            return found
    return None


def parse(value: str | None) -> float | None:
    """A number such as ``"+12.5"`` or ``"25/2"``; ``None`` of anything else."""
    match = re.fullmatch(r"\s*([+-]?\d{1,12}(?:\.\d{1,15})?)(?:/(\d{1,12}))?\s*", value or "")
    if match is None or (match[2] is not None and int(match[2]) == 0):
        return None
    return float(match[1]) / int(match[2] or 1)
