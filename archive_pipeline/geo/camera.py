"""Georeference of a camera frame from what the camera wrote into it (EXIF and DJI's XMP).

The model is a pinhole over flat ground, with the position, the direction and the field of view
that the tags give.  Expect metres, not centimetres: two to four at 40 to 60 m above ground.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pyproj import Geod, Transformer

from archive_pipeline.geo import globe
from archive_pipeline.geo.georef import Gcp, Georef
from archive_pipeline.geo.mapping import with_footprint
from archive_pipeline.geo.pose import CameraPose

# Tilts up to this many degrees are within what tags and flat ground are worth: one affine.
NADIR_TILT_DEG = 5.0
# Rays flatter than this end somewhere in the next county; no footprint is better than that one.
LOWEST_RAY_DEG = 3.0
# Digital zoom makes the equivalent focal length differ from the lens by more than rounding does.
FOCAL_AGREEMENT = 0.1

# Diagonal of a 36 x 24 mm frame, which "35 mm equivalent" refers to.
DIAGONAL_35MM = math.hypot(36.0, 24.0)
# Full sensor, long side x short side in mm, by the EXIF model of fixed or known sensors.
SENSORS_MM: dict[str, tuple[float, float]] = {
    "FC220": (6.17, 4.63),  # Mavic Pro
    "FC300C": (6.17, 4.63),  # Phantom 3 Standard
    "FC300S": (6.17, 4.63),  # Phantom 3 Advanced
    "FC300X": (6.17, 4.63),  # Phantom 3 Professional
    "FC330": (6.17, 4.63),  # Phantom 4
    "FC350": (6.17, 4.63),  # Zenmuse X3
    "FC550": (17.3, 13.0),  # Zenmuse X5
    "FC6310": (13.2, 8.8),  # Phantom 4 Pro
    "FC6310R": (13.2, 8.8),  # Phantom 4 RTK
    "FC6310S": (13.2, 8.8),  # Phantom 4 Pro V2
    "FC6520": (17.3, 13.0),  # Zenmuse X5S
    "FC6540": (23.5, 15.7),  # Zenmuse X7
    "FC3411": (13.2, 8.8),  # Air 2S
    "L1D-20c": (13.2, 8.8),  # Mavic 2 Pro
    "L2D-20c": (17.3, 13.0),  # Mavic 3
    "M3E": (17.3, 13.0),  # Mavic 3 Enterprise
    "ZenmuseP1": (35.9, 24.0),
}

WGS84 = Geod(ellps="WGS84")
EXIF_IFD, GPS_IFD = 0x8769, 0x8825
MAKE, MODEL = 0x010F, 0x0110
FOCAL_MM, FOCAL_35MM = 0x920A, 0xA405
DATE_ORIGINAL, OFFSET_ORIGINAL, SUBSEC_ORIGINAL = 0x9003, 0x9011, 0x9291
LAT_REF, LAT, LON_REF, LON, ALTITUDE_REF, ALTITUDE, DIRECTION_REF, DIRECTION = (
    1, 2, 3, 4, 5, 6, 16, 17,
)  # fmt: skip


def read_pose(exif: bytes, xmp: bytes) -> tuple[CameraPose | None, str | None]:
    """Read a camera's pose and time of capture from its metadata blocks.

    Broken blocks count as absent; nothing in them can raise.

    Args:
        exif: a TIFF structure, with or without the leading ``Exif\\0\\0``; may be empty.
        xmp: an XMP packet; may be empty.

    Returns:
        The pose, ``None`` where neither block says anything of a camera, and the time of capture
        in ISO 8601, with fraction and UTC offset where they are given, or ``None``.
    """
    main, detail, gps = _read_exif(exif)
    fields = _read_xmp(xmp)
    warnings: list[str] = []

    lon = _dms(gps.get(LON), gps.get(LON_REF), "W", 180.0)
    lat = _dms(gps.get(LAT), gps.get(LAT_REF), "S", 90.0)
    # Cameras without a fix write zeros, and no drone has mapped that spot of the Atlantic.
    if lon is None or lat is None or (lon == 0.0 and lat == 0.0):
        lon = lat = None
    altitude = _number(gps.get(ALTITUDE))
    if altitude is not None and gps.get(ALTITUDE_REF) in (1, b"\x01"):
        altitude = -altitude

    yaw = _first(fields, "GimbalYawDegree", "FlightYawDegree")
    if yaw is None:
        yaw = _number(gps.get(DIRECTION))
        if yaw is not None and gps.get(DIRECTION_REF) == "M":
            warnings.append("yaw is against magnetic north; declination is not corrected")
    pose = CameraPose(
        lon=lon,
        lat=lat,
        altitude_gps_m=altitude,
        altitude_relative_m=_first(fields, "RelativeAltitude"),
        yaw_deg=yaw,
        pitch_deg=_first(fields, "GimbalPitchDegree"),
        roll_deg=_first(fields, "GimbalRollDegree"),
        focal_35mm=_positive(detail.get(FOCAL_35MM)),
        focal_mm=_positive(detail.get(FOCAL_MM)),
        make=_text(main.get(MAKE)),
        model=_text(main.get(MODEL)),
        warnings=tuple(warnings),
    )
    captured = _exif_time(detail) or _xmp_time(xmp)
    known = (pose.lon, pose.altitude_relative_m, pose.focal_35mm, pose.focal_mm, pose.pitch_deg)
    silent = all(value is None for value in known) and not (pose.make or pose.model)
    return None if silent else pose, captured


def camera_georef(
    camera: CameraPose, width: int, height: int, ground_elevation: float | None = None
) -> Georef:
    """Georeference a frame's stored pixels; see `locate`, whose first result this is."""
    return locate(camera, width, height, ground_elevation)[0]


def locate(
    camera: CameraPose, width: int, height: int, ground_elevation: float | None = None
) -> tuple[Georef, tuple[str, ...]]:
    """Georeference a frame's stored pixels and say what had to be assumed.

    EXIF orientation plays no part: a pose describes the sensor, whose rows and columns are what is
    stored.

    Args:
        camera: the pose.
        width: frame width in pixels.
        height: frame height in pixels.
        ground_elevation: height of the ground, metres, in the datum of the camera's GPS altitude;
            used where the camera gives no height above take-off.

    Returns:
        The georeference in the local UTM zone (polar stereographic beyond 84 degrees) and one
        sentence for each assumption.  A frame that looks down gets a transform, an oblique one
        GCPs on a flat ground; without position, height, field of view, or with the horizon in
        view, the method is ``"none"``.
    """
    warnings: list[str] = []
    if camera.lon is None or camera.lat is None:
        return Georef(), ("no GPS position",)
    above_ground = camera.altitude_relative_m
    if above_ground is None and camera.altitude_gps_m is not None and ground_elevation is not None:
        above_ground = camera.altitude_gps_m - ground_elevation
    if above_ground is None:
        return Georef(), ("no height above ground: no relative altitude, no ground elevation",)
    if above_ground <= 0.0:
        return Georef(), (f"height above ground is {above_ground:g} m",)
    pitch = field_of_view_pitch(camera, width, height)
    if pitch is None:
        return Georef(), ("no field of view: neither focal length nor known sensor",)
    if camera.yaw_deg is None:
        warnings.append("no yaw: the image's top is taken for north")
    if camera.pitch_deg is None:
        warnings.append("no pitch: the camera is taken to look straight down")

    # GDAL needs more than the four corners to see that the map is not affine.
    steps = np.linspace(-0.5, 0.5, 4)
    u, v = np.tile(steps * width, 4), np.repeat(steps * height, 4)
    rays = np.stack([u * pitch, v * pitch, np.ones_like(u)], axis=1) @ _rotation(camera)
    if np.degrees(np.arctan2(-rays[:, 2], np.hypot(rays[:, 0], rays[:, 1]))).min() < LOWEST_RAY_DEG:
        return Georef(), ("the horizon is in view: the frame has no footprint",)
    east, north = (rays[:, :2] * (above_ground / -rays[:, 2:])).T

    # Geodesics carry azimuths against true north; projecting their ends takes care of the
    # projection's meridian convergence and scale.
    size = len(u)
    lon, lat, _ = WGS84.fwd(
        np.full(size, camera.lon),
        np.full(size, camera.lat),
        np.degrees(np.arctan2(east, north)),
        np.hypot(east, north),
    )
    crs = _local_crs(camera.lon, camera.lat)
    x, y = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, lat)
    cols, rows = u + width / 2, v + height / 2
    if tilt_deg(camera) <= NADIR_TILT_DEG:
        design = np.column_stack([u, v, np.ones_like(u)])
        (a, d), (b, e), (c, f) = np.linalg.lstsq(design, np.column_stack([x, y]), rcond=None)[0]
        c, f = c - a * width / 2 - b * height / 2, f - d * width / 2 - e * height / 2
        transform = (float(a), float(b), float(c), float(d), float(e), float(f))
        georef = Georef(crs, transform, method="camera")
        return with_footprint(georef, width, height), tuple(warnings)
    gcps: tuple[Gcp, ...] = tuple(
        (float(r), float(q), float(gx), float(gy), 0.0, str(i + 1), "")
        for i, (r, q, gx, gy) in enumerate(zip(rows, cols, x, y, strict=True))
    )
    corners = [0, 3, 15, 12]
    footprint = globe.ring(lon[corners], lat[corners])
    return Georef(crs, gcps=gcps, footprint=footprint, method="camera"), tuple(warnings)


def tilt_deg(camera: CameraPose) -> float:
    """Angle between the optical axis and straight down, degrees; 0 where pitch is unknown."""
    return abs(-90.0 - _pitch(camera))


def field_of_view_pitch(camera: CameraPose, width: int, height: int) -> float | None:
    """Return the tangent of the angle between two neighbouring pixels at the image centre.

    Multiplied by the height above ground it is the ground sampling distance of a nadir frame.
    ``None`` without a usable focal length.  A frame of another aspect than its sensor's is taken
    for the largest crop of the full sensor, which is what drones do.
    """
    sides = max(width, height), min(width, height)
    lens = None
    if camera.focal_mm is not None and camera.model in SENSORS_MM:
        lens = _crop_pitch(SENSORS_MM[camera.model], sides) / camera.focal_mm
    equivalent = None
    if camera.focal_35mm is not None:
        # The equivalent is by the full sensor's diagonal; nearly all are 4:3, the rest 3:2.
        ratio = 1.5 if abs(sides[0] / sides[1] - 1.5) < 0.03 else 4 / 3
        short = DIAGONAL_35MM / math.hypot(ratio, 1.0)
        equivalent = _crop_pitch((ratio * short, short), sides) / camera.focal_35mm
    if lens is not None and equivalent is not None:
        return lens if abs(lens / equivalent - 1.0) < FOCAL_AGREEMENT else equivalent
    return equivalent if lens is None else lens


def _crop_pitch(sensor_mm: tuple[float, float], sides_px: tuple[int, int]) -> float:
    return min(sensor_mm[0] / sides_px[0], sensor_mm[1] / sides_px[1])


def _pitch(camera: CameraPose) -> float:
    return -90.0 if camera.pitch_deg is None else camera.pitch_deg


def _rotation(camera: CameraPose) -> npt.NDArray[np.float64]:
    """Rows: the image's right, its down and the optical axis, in east, north, up."""
    yaw, pitch = math.radians(camera.yaw_deg or 0.0), math.radians(_pitch(camera))
    roll = math.radians(camera.roll_deg or 0.0)
    axis = np.array(
        [math.sin(yaw) * math.cos(pitch), math.cos(yaw) * math.cos(pitch), math.sin(pitch)]
    )
    level = np.array([math.cos(yaw), -math.sin(yaw), 0.0])
    down = np.cross(axis, level)
    return np.stack(
        [
            level * math.cos(roll) + down * math.sin(roll),
            down * math.cos(roll) - level * math.sin(roll),
            axis,
        ]
    )


def _local_crs(lon: float, lat: float) -> str:
    if lat > 84.0:
        return "EPSG:5041"
    if lat < -80.0:
        return "EPSG:5042"
    zone = min(int((lon + 180.0) // 6.0) + 1, 60)
    return f"EPSG:{(32600 if lat >= 0 else 32700) + zone}"


def _read_exif(block: bytes) -> tuple[dict[int, Any], dict[int, Any], dict[int, Any]]:
    exif = Image.Exif()
    parts: list[dict[int, Any]] = [{}, {}, {}]
    # Pillow raises many types on broken blocks, all of which mean the same here.
    try:
        exif.load(block)
        parts[0] = dict(exif)
    except Exception:
        return parts[0], parts[1], parts[2]
    for index, ifd in ((1, EXIF_IFD), (2, GPS_IFD)):
        try:
            parts[index] = dict(exif.get_ifd(ifd))
        except Exception:
            continue
    return parts[0], parts[1], parts[2]


def _read_xmp(packet: bytes) -> dict[str, float]:
    """Find DJI's numbers, written as attributes or as elements; no XML parser, so no XML bombs."""
    found = {}
    pattern = rb"drone-dji:(\w{1,64})\s*(?:=\s*[\"']|>)\s*([+-]?\d{1,9}(?:\.\d{1,15})?)\s*[\"'<]"
    for match in re.finditer(pattern, packet):
        found[match[1].decode("ascii", "replace")] = float(match[2])
    return found


def _first(fields: dict[str, float], *names: str) -> float | None:
    return next((fields[name] for name in names if name in fields), None)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _positive(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and number > 0.0 else None


def _text(value: Any) -> str:
    return value.split("\0", 1)[0].strip() if isinstance(value, str) else ""


def _dms(value: Any, ref: Any, negative: str, limit: float) -> float | None:
    if not isinstance(value, Sequence) or len(value) != 3:
        return None
    parts = [_number(part) for part in value]
    if parts[0] is None:
        return None
    degrees = sum((part or 0.0) / scale for part, scale in zip(parts, (1, 60, 3600), strict=True))
    if not 0.0 <= degrees <= limit:
        return None
    return -degrees if isinstance(ref, str) and ref[:1].upper() == negative else degrees


def _exif_time(detail: dict[int, Any]) -> str | None:
    text = _text(detail.get(DATE_ORIGINAL))
    match = re.fullmatch(r"(\d{4}):(\d\d):(\d\d) (\d\d:\d\d:\d\d)", text)
    if match is None or match[1] == "0000":
        return None
    time = f"{match[1]}-{match[2]}-{match[3]}T{match[4]}"
    fraction = _text(detail.get(SUBSEC_ORIGINAL))
    if fraction.isdigit():
        time += f".{fraction}"
    offset = _text(detail.get(OFFSET_ORIGINAL))
    return time + (offset if re.fullmatch(r"[+-]\d\d:\d\d", offset) else "")


def _xmp_time(packet: bytes) -> str | None:
    match = re.search(
        rb"(?:xmp:CreateDate|exif:DateTimeOriginal|photoshop:DateCreated)\s*(?:=\s*[\"']|>)\s*"
        rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d)?)",
        packet,
    )
    return match[1].decode("ascii") if match else None
