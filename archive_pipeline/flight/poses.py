"""Positions and directions that photogrammetry found, which beat a camera's own tags.

Rotations are from OpenSfM's documentation of its reconstruction file and OpenDroneMap's
opendm/shots.py (world to camera, whose axes are the image's right, its down and the optical axis),
and from Metashape's manual (camera to chunk, and the chunk to geocentric coordinates). `colmap`
reads COLMAP's.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError

from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.flight.colmap import read_model
from archive_pipeline.flight.opensfm_lenses import (
    is_cameras,
    odm_cameras,
    odm_lens,
    opensfm_lens,
)
from archive_pipeline.flight.pix4d import from_angles, grid_axes, read_external
from archive_pipeline.geo.camera import rotation as rotation_of
from archive_pipeline.geo.georef import names_files
from archive_pipeline.geo.ground_plane import GroundPlane, ground_below
from archive_pipeline.geo.lens import Lens, bent
from archive_pipeline.geo.pose import CameraPose

Array = npt.NDArray[np.float64]

COLMAP = re.compile(r"images\.(txt|bin)", re.IGNORECASE)
UNNAMED_ANGLES = (
    "angles are not read: no comment in it names them (yaw pitch roll, omega phi kappa)"
)
_ANGLES = re.compile(
    r"(?P<ypr>yaw\W+(\(\w+\)\W+)?pitch\W+(\(\w+\)\W+)?roll)|(?P<opk>omega\W+phi\W+kappa)",
    re.IGNORECASE,
)
MOST_POINTS = 50_000  # each frame looks at all of them
EARTH_M = 6.3e6, 6.5e6  # from the Earth's middle to where drones fly
SOURCES = ("COLMAP", "ODM", "OpenSfM", "Metashape", "PIX4Dmapper", "geo.txt")
_DAMAGE = (ValueError, KeyError, TypeError, IndexError, AttributeError)


class PosesError(ArchivePipelineError):
    """A file of poses that cannot be used; one line that names it."""


@dataclass(frozen=True)
class FoundPose:
    """Where one image was taken.

    Attributes:
        lon, lat: degrees, WGS 84.
        altitude_m: in the vertical datum of the file.
        rotation: rows are the image's right, its down and the optical axis, in east, north, up.
        lens: its lens.
        ground: that of what was reconstructed in its view.
        note: what is odd about it.
    """

    lon: float
    lat: float
    altitude_m: float | None = None
    rotation: Array | None = None
    lens: Lens | None = None
    ground: GroundPlane | None = None
    note: str = ""


@dataclass(frozen=True)
class Poses:
    """What a file says of images, by their names.

    Attributes:
        name: the file's own name.
        source: what wrote it.
        found: poses by the names of images, in small letters; some formats leave suffixes out.
    """

    name: str
    source: str
    found: dict[str, FoundPose]

    def find(self, id: str) -> FoundPose | None:
        """The pose of an image; of one whose name repeats in its flight, only by its path."""
        name = id.casefold()
        for known in (name, str(PurePosixPath(name).with_suffix(""))):
            if known in self.found:
                return self.found[known]
        return None

    def placed(
        self, id: str, camera: CameraPose | None, size: tuple[int, int], ground_given: bool
    ) -> CameraPose | None:
        """An image's pose as this file has it.

        Args:
            camera: what its tags say.
            size: width and height, pixels.
            ground_given: the user says where the ground is, which heights then refer to.

        Returns:
            None where the file has none.
        """
        pose = self.find(id)
        if pose is None:
            return None
        own = camera or CameraPose()
        above, slope = None if ground_given else own.altitude_relative_m, (0.0, 0.0)
        if pose.ground is not None and not ground_given:
            above, slope = pose.ground.below_m, pose.ground.slope
        longer = max(size)
        notes = [pose.note, pose.lens.note if pose.lens else ""]
        made = replace(
            own,
            lon=pose.lon,
            lat=pose.lat,
            altitude_gps_m=own.altitude_gps_m if pose.altitude_m is None else pose.altitude_m,
            altitude_relative_m=above,
            ground_slope=slope,
            dialect=self.source,
            warnings=tuple(f"{self.name}: {note}" for note in notes if note),
        )
        if pose.rotation is not None:
            yaw, pitch, roll = _angles(pose.rotation)
            made = replace(made, mount="body", yaw_deg=yaw, pitch_deg=pitch, roll_deg=roll)
            made = replace(made, found=True)
        if pose.lens is not None:
            x, y = (n / 2 + longer * c for n, c in zip(size, pose.lens.centre, strict=True))
            made = replace(made, focal_px=pose.lens.focal * longer, centre_px=(x, y))
            # what was found is of the image as it is, whatever the tags say of lens and zoom
            made = replace(made, focal_35mm=None, focal_mm=None, digital_zoom=None)
            made = replace(made, distortion=pose.lens.distortion)
        return made


def placed_by(camera: CameraPose) -> str:
    """What told where a camera was: a program of photogrammetry, or a maker's tags."""
    if camera.dialect in SOURCES:
        return camera.dialect
    return f"{camera.dialect or 'EXIF'} tags"


def read_poses(path: str) -> Poses:
    """Read a file of poses.

    ODM's shots.geojson (with its cameras.json) or geo.txt, OpenSfM's reconstruction.json,
    Metashape's cameras.xml, PIX4Dmapper's calibrated_external_camera_parameters.txt or _wgs84.txt,
    or COLMAP's images.txt or images.bin, aligned to geocentric coordinates.

    Raises:
        PosesError: it cannot be read, is of none of these, or says nothing of any image.
    """
    try:
        found = Path(path).stat()
        return _read(path, found.st_mtime_ns, found.st_size)
    except OSError as error:
        raise PosesError(f"{path}: {error.strerror or error}") from error
    except PosesError:
        raise
    except (*_DAMAGE, CRSError, struct.error) as error:
        line = " ".join(str(error).split())
        raise PosesError(f"{path}: no poses that are understood: {line}") from error


@lru_cache(maxsize=4)
def _read(path: str, version: int, size: int) -> Poses:
    """`read_poses`, once for each state of the file."""
    if COLMAP.fullmatch(Path(path).name):
        return _named(path, "COLMAP", _colmap(Path(path)))
    text = Path(path).read_text("utf-8-sig")
    start = text.lstrip()[:1]
    if start in ("{", "["):
        document = json.loads(text)
        if is_cameras(document):
            raise PosesError(f"{path}: holds lenses, no poses; those are in ODM's shots.geojson")
        is_shots = isinstance(document, dict) and document.get("type") == "FeatureCollection"
        shots = _shots(Path(path), document) if is_shots else _opensfm(document)
        source, poses = "ODM" if is_shots else "OpenSfM", shots
    elif start == "<":
        try:
            source, poses = "Metashape", _metashape(ElementTree.fromstring(text))
        except ElementTree.ParseError as error:
            raise ValueError(str(error)) from error
    elif text.lstrip().casefold().startswith("imagename"):
        source, poses = "PIX4Dmapper", _pix4d(Path(path), text)
    else:
        source, poses = "geo.txt", _geo_txt(text)
    return _named(path, source, poses)


def _named(path: str, source: str, poses: Iterator[tuple[str, FoundPose]]) -> Poses:
    """Poses by names: with their folders, and without where that is no other's."""
    found = {name.replace("\\", "/").casefold(): pose for name, pose in poses}
    short = Counter(name.rpartition("/")[2] for name in found)
    for name, pose in list(found.items()):
        if short[name.rpartition("/")[2]] == 1:
            found[name.rpartition("/")[2]] = pose
    for name, pose in found.items():
        numbers = [pose.lon, pose.lat, *np.ravel(pose.rotation if pose.rotation is not None else 0)]
        if not np.isfinite(numbers).all() or abs(pose.lat) > 90.0 or abs(pose.lon) > 360.0:
            raise ValueError(f"{name}: its position or direction is none")
        if pose.lens is not None and not pose.lens.is_one:
            raise ValueError(f"{name}: its lens is none")
    if not found:
        raise PosesError(f"{path}: says nothing of any image")
    return Poses(Path(path).name, source, found)


def _shots(path: Path, document: dict[str, Any]) -> Iterator[tuple[str, FoundPose]]:
    """ODM's shots.geojson: rotations against the grid north of the UTM zone."""
    cameras = odm_cameras(path)
    for feature in document["features"]:
        said = feature["properties"]
        lon, lat, altitude = (float(v) for v in feature["geometry"]["coordinates"][:3])
        rotation = _rotation(said["rotation"]) @ grid_axes(lon, lat, None)
        lens = odm_lens(said, cameras)
        yield str(said["filename"]), FoundPose(lon, lat, altitude, rotation, lens)


def _opensfm(document: list[dict[str, Any]]) -> Iterator[tuple[str, FoundPose]]:
    """OpenSfM's reconstruction.json: metres east, north and up of a reference."""
    for part in document:
        reference = part["reference_lla"]
        lon, lat, height = (float(reference[k]) for k in ("longitude", "latitude", "altitude"))
        if lon == 0.0 and lat == 0.0:
            raise ValueError("its reference_lla is no place")
        to_degrees = Transformer.from_pipeline(
            f"+proj=pipeline +step +inv +proj=topocentric +ellps=WGS84 +lon_0={lon!r} "
            f"+lat_0={lat!r} +h_0={height!r} +step +inv +proj=cart +ellps=WGS84 "
            "+step +proj=unitconvert +xy_in=rad +xy_out=deg"
        )
        points = np.array([p["coordinates"] for p in part.get("points", {}).values()], float)
        points = _some(points.reshape(-1, 3))
        for name, shot in part["shots"].items():
            rotation = _rotation(shot["rotation"])
            place = -rotation.T @ np.array(shot["translation"], float)
            x, y, z = (float(v) for v in to_degrees.transform(*place))
            lens = opensfm_lens(part["cameras"][shot["camera"]])
            turn = _east_north_up(lon, lat) @ _east_north_up(x, y).T
            local = rotation @ turn
            ground = ground_below((points - place) @ turn, local, lens.focal if lens else None)
            yield str(name), FoundPose(x, y, z, local, lens, ground)


def _metashape(root: ElementTree.Element) -> Iterator[tuple[str, FoundPose]]:
    """Metashape's cameras.xml."""
    to_degrees = Transformer.from_crs("EPSG:4978", "EPSG:4979", always_xy=True)
    for chunk in root.iter("chunk"):
        placed = chunk.find("transform")
        if placed is None or placed.find("rotation") is None:
            raise ValueError("its chunk is not georeferenced")
        turn = _numbers(placed, "rotation", 9).reshape(3, 3)
        scale, move = _numbers(placed, "scale", 1)[0], _numbers(placed, "translation", 3)
        lenses = {s.get("id"): _metashape_lens(s) for s in chunk.iter("sensor")}
        for camera in chunk.iter("camera"):
            if camera.find("transform") is None:
                continue  # it was not aligned
            matrix = _numbers(camera, "transform", 16).reshape(4, 4)
            x, y, z = to_degrees.transform(*(scale * turn @ matrix[:3, 3] + move))
            rotation = (turn @ matrix[:3, :3]).T @ _east_north_up(x, y).T
            lens = lenses.get(camera.get("sensor_id"))
            pose = FoundPose(float(x), float(y), float(z), rotation, lens)
            yield str(camera.attrib["label"]), pose


def _metashape_lens(sensor: ElementTree.Element) -> Lens | None:
    """A sensor's lens, as it was adjusted if it was."""
    found = sensor.findall("calibration")
    adjusted = [one for one in found if one.get("class") == "adjusted"]
    size = sensor.find("resolution")
    for one in adjusted or found:
        if one.find("f") is not None and size is not None:
            longer = max(float(size.attrib["width"]), float(size.attrib["height"]))
            cx, cy = (float(one.findtext(name, "0")) / longer for name in ("cx", "cy"))
            radial = [float(one.findtext(f"k{n}", "0")) for n in range(1, 5)]
            fisheye = "fisheye" in sensor.get("type", "")
            return Lens(float(one.findtext("f", "")) / longer, (cx, cy), bent(radial, fisheye))
    return None


def _colmap(path: Path) -> Iterator[tuple[str, FoundPose]]:
    """A model of COLMAP's that its model_aligner brought to geocentric coordinates."""
    to_degrees = Transformer.from_crs("EPSG:4978", "EPSG:4979", always_xy=True)
    shots, points = read_model(path)
    points = _some(points)
    for shot in shots:
        if not EARTH_M[0] < np.linalg.norm(shot.place) < EARTH_M[1]:
            raise ValueError("its coordinates are not geocentric (colmap model_aligner makes them)")
        x, y, z = (float(v) for v in to_degrees.transform(*shot.place))
        turn = _east_north_up(x, y).T
        rotation = shot.rotation @ turn
        ground = ground_below((points - shot.place) @ turn, rotation, shot.lens.focal)
        yield shot.name, FoundPose(x, y, z, rotation, shot.lens, ground)


def _some(points: Array) -> Array:
    """As many of a reconstruction's points, from all over it, as tell where the ground is."""
    if not np.isfinite(points).all():
        raise ValueError("the place of a point is none")
    return points[:: max(1, len(points) // MOST_POINTS)]


def _pix4d(path: Path, text: str) -> Iterator[tuple[str, FoundPose]]:
    """PIX4Dmapper's calibrated cameras."""
    for shot in read_external(path, text):
        yield shot.name, FoundPose(shot.lon, shot.lat, shot.altitude, shot.rotation, shot.lens)


def _geo_txt(text: str) -> Iterator[tuple[str, FoundPose]]:
    """ODM's geo.txt.

    Three angles may follow the position, which earlier releases of ODM took for omega, phi and
    kappa (opendm/geo.py), and later ones for yaw, pitch (0 looks down, 90 ahead) and roll. They are
    read where a comment above names them, else left out.
    """
    head, *lines = (line.strip() for line in text.strip().splitlines())
    crs = CRS.from_user_input(_crs_of(head))
    transformer = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    kind = None
    for line in lines:
        if not line or line.startswith("#"):
            named = _ANGLES.search(line)
            kind = named.lastgroup if named else kind
            continue
        name, *numbers = line.split()
        if len(numbers) < 2:
            raise ValueError(f"{line!r} is no name with a position")
        lon, lat = transformer.transform(float(numbers[0]), float(numbers[1]))
        altitude = float(numbers[2]) if len(numbers) > 2 else None
        pose = FoundPose(lon, lat, altitude)
        if len(numbers) >= 6:
            pose = _turned(pose, kind, tuple(map(float, numbers[3:6])), crs)
        yield name, pose


def _turned(pose: FoundPose, kind: str | None, angles: tuple[float, ...], crs: CRS) -> FoundPose:
    """A pose with the direction that geo.txt has, if it is said what its angles are."""
    if kind is None:
        return replace(pose, note=UNNAMED_ANGLES)
    first, second, third = angles
    if kind == "opk":
        grid = grid_axes(pose.lon, pose.lat, crs) if crs.is_projected else np.eye(3)
        return replace(pose, rotation=from_angles(*angles) @ grid)
    body = CameraPose(mount="body", yaw_deg=first, pitch_deg=second - 90.0, roll_deg=third)
    return replace(pose, rotation=rotation_of(body))


def _crs_of(head: str) -> str:
    """The CRS of a header: a code, a PROJ string, or "WGS84 UTM 32N"."""
    words = head.upper().split()
    if len(words) == 3 and words[:2] == ["WGS84", "UTM"] and words[2][-1:] in ("N", "S"):
        return f"EPSG:{(32600 if words[2][-1] == 'N' else 32700) + int(words[2][:-1])}"
    if names_files(head):
        raise ValueError("its coordinate reference system names files elsewhere")
    return head


def _numbers(element: ElementTree.Element, name: str, count: int) -> Array:
    numbers = np.array((element.findtext(name) or ("1" if name == "scale" else "")).split(), float)
    if len(numbers) != count:
        raise ValueError(f"{name} has {len(numbers)} numbers, not {count}")
    return numbers


def _rotation(axis_angle: Any) -> Array:
    """The matrix of an axis times its angle (radians)."""
    vector = np.array(axis_angle, np.float64)
    if vector.shape != (3,):
        raise ValueError(f"rotation {axis_angle!r} is not three numbers")
    import cv2  # of the extra `ingest`; reading images does without

    return np.asarray(cv2.Rodrigues(vector)[0], np.float64)


def _east_north_up(lon: float, lat: float) -> Array:
    """Rows: east, north and up at a place, in geocentric coordinates."""
    east, north = math.radians(lon), math.radians(lat)
    ce, se, cn, sn = math.cos(east), math.sin(east), math.cos(north), math.sin(north)
    return np.array([[-se, ce, 0.0], [-sn * ce, -sn * se, cn], [cn * ce, cn * se, sn]])


def _angles(rotation: Array) -> tuple[float, float, float]:
    """Yaw, pitch and roll of a camera in a body, as `CameraPose` counts them."""
    right, down, axis = rotation
    # the body's axes in north, east, down: its forward is the image's top, its down what is seen
    (fn, fe, fd), (_, _, rd), (_, _, dd) = ((v[1], v[0], -v[2]) for v in (-down, right, axis))
    yaw = math.degrees(math.atan2(fe, fn)) % 360.0
    pitch = math.degrees(math.asin(max(-1.0, min(1.0, -fd))))
    return yaw, pitch - 90.0, math.degrees(math.atan2(rd, dd))
