"""Georeference of a camera frame from its pose.

The model is a pinhole over flat ground, with the position, the direction and the field of view
that the pose gives.  Expect metres, not centimetres: two to four at 40 to 60 m above ground.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from pyproj import Geod, Transformer

from archive_pipeline.geo import globe
from archive_pipeline.geo.georef import Gcp, Georef
from archive_pipeline.geo.mapping import apply_homography, homography, with_footprint
from archive_pipeline.geo.pose import CameraPose
from archive_pipeline.geo.terrain import Terrain

Array = npt.NDArray[np.float64]

# Tilts up to this many degrees are within what tags and flat ground are worth: one affine. Of a
# camera that photogrammetry placed, an affine may be this many pixels off.
NADIR_TILT_DEG = 5.0
AFFINE_PX = 2.0
# Points a side by which a lens is made straight.
BENT_SIDE = 13
# Rays flatter than this end somewhere in the next county; no footprint is better than that one.
LOWEST_RAY_DEG = 3.0
# Digital zoom makes the equivalent focal length differ from the lens by more than rounding does.
FOCAL_AGREEMENT = 0.1
# A calibrated principal point farther off, as a share of the image's side, is of another image.
NEAR_CENTRE = 0.1

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


def camera_georef(
    camera: CameraPose, width: int, height: int, ground_elevation: float | None = None
) -> Georef:
    """Georeference a frame's stored pixels; see `locate`, whose first result this is."""
    return locate(camera, width, height, ground_elevation)[0]


def locate(
    camera: CameraPose,
    width: int,
    height: int,
    ground_elevation: float | None = None,
    terrain: Terrain | None = None,
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
        terrain: the ground; flat without one.

    Returns:
        The georeference in the local UTM zone (polar stereographic beyond 84 degrees) and one
        sentence for each assumption.  A frame that looks down gets a transform, an oblique one, and
        one that photogrammetry found to be tilted, GCPs; without height, field of view, or with the
        horizon in view, the camera's place is all (``"point"``), and without position the method is
        ``"none"``.
    """
    if camera.lon is None or camera.lat is None:
        return Georef(), ("no GPS position",)
    warnings: list[str] = []
    placed = _place(camera, width, height, ground_elevation, terrain, warnings)
    if placed is not None:
        return placed, tuple(warnings)
    spot = ((camera.lon, camera.lat),) * 4
    return Georef(footprint=spot, method="point"), tuple(warnings)


def _place(
    camera: CameraPose,
    width: int,
    height: int,
    ground_elevation: float | None,
    terrain: Terrain | None,
    warnings: list[str],
) -> Georef | None:
    """Where a frame's pixels lie; ``None`` where that is not known, the last warning says why."""
    assert camera.lon is not None
    assert camera.lat is not None
    above_ground, reason = _above_ground(camera, ground_elevation, terrain)
    if above_ground is None:
        warnings.append(reason)
        return None
    pitch = field_of_view_pitch(camera, width, height)
    if pitch is None:
        warnings.append("no field of view: neither focal length nor known sensor")
        return None
    if camera.yaw_deg is None:
        warnings.append("no yaw: the image's top is taken for north")
    if camera.pitch_deg is None:
        warnings.append("no pitch: the camera is taken to look straight down")

    # GDAL needs more than the four corners to see that the map is not affine.
    cols, rows = _lattice(width, height, 4)
    rays = _rays(camera, width, height, pitch, cols, rows)
    # how much a ray comes nearer to the ground
    fall = rays[:, :2] @ camera.ground_slope - rays[:, 2]
    if np.degrees(np.arctan2(fall, np.hypot(rays[:, 0], rays[:, 1]))).min() < LOWEST_RAY_DEG:
        warnings.append("the horizon is in view: the frame has no footprint")
        return None
    east, north = rays[:, :2].T * (above_ground / fall)
    lon, lat = _geodesic_ends(camera, east, north)
    z = np.zeros_like(lon)
    if terrain is not None and not terrain.reaches(camera):
        warnings.append("the heights of --dem do not reach below it: projected to a plane")
    elif terrain is not None:
        flat = lon, lat
        lon, lat, z = terrain.meet(camera, above_ground, rays)
        moved = WGS84.inv(*flat, lon, lat)[2]
        corners = moved[[0, 3, 15, 12]]
        warnings.append(f"terrain moved corners by {corners.min():.1f} to {corners.max():.1f} m")
    crs = _local_crs(camera.lon, camera.lat)
    x, y = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, lat)
    if tilt_deg(camera) <= NADIR_TILT_DEG:
        design, ground = np.column_stack([cols, rows, np.ones_like(cols)]), np.column_stack([x, y])
        affine = np.linalg.lstsq(design, ground, rcond=None)[0]
        off = float(np.abs(design @ affine - ground).max())
        if not camera.found or off <= AFFINE_PX * above_ground * pitch:
            (a, d), (b, e), (c, f) = affine.tolist()
            georef = Georef(crs, (a, b, c, d, e, f), method="camera")
            return with_footprint(georef, width, height)
    gcps: tuple[Gcp, ...] = tuple(
        (float(r), float(q), float(gx), float(gy), float(gz), str(i + 1), "")
        for i, (r, q, gx, gy, gz) in enumerate(zip(rows, cols, x, y, z, strict=True))
    )
    corners = [0, 3, 15, 12]
    footprint = globe.ring(lon[corners], lat[corners])
    return Georef(crs, gcps=gcps, footprint=footprint, method="camera")


def _lattice(width: int, height: int, side: int) -> tuple[Array, Array]:
    """Columns and rows of points all over an image, row by row, with those of its edges."""
    steps = np.linspace(0.0, 1.0, side)
    return np.tile(steps * width, side), np.repeat(steps * height, side)


def _rays(
    camera: CameraPose, width: int, height: int, pitch: float, cols: Array, rows: Array
) -> Array:
    """Where pixels look to, east, north and up, float64 (n, 3).

    Of a lens that bends, as the pinhole has it that is next to it all over the image.
    """
    cx, cy = principal_point(camera, width, height)

    def seen(cols: Array, rows: Array) -> tuple[Array, Array]:
        return (cols - cx) * pitch, (rows - cy) * pitch

    x, y = seen(cols, rows)
    if camera.distortion is not None:
        points = _lattice(width, height, BENT_SIDE)
        straight = camera.distortion.straightened(*seen(*points))
        pinhole = homography(np.column_stack(points), np.column_stack(straight))
        x, y = apply_homography(pinhole, cols, rows)
    return np.stack([x, y, np.ones_like(x)], axis=1) @ rotation(camera)


def _above_ground(
    camera: CameraPose, ground_elevation: float | None, terrain: Terrain | None
) -> tuple[float | None, str]:
    """Height above the ground below the camera, or why it is not known."""
    above = camera.altitude_relative_m
    if terrain is not None and (above is None or terrain.trusts(camera)):
        found = terrain.above_ground(camera)
        above = found if found is not None else above
    if above is None and camera.altitude_gps_m is not None and ground_elevation is not None:
        above = camera.altitude_gps_m - ground_elevation
    if above is None:
        return None, "no height above ground: no relative altitude, no ground elevation"
    return (above, "") if above > 0.0 else (None, f"height above ground is {above:g} m")


def _geodesic_ends(camera: CameraPose, east: Array, north: Array) -> tuple[Array, Array]:
    """Where metres east and north of the camera end.

    Geodesics carry azimuths against true north; projecting their ends takes care of the
    projection's meridian convergence and scale.
    """
    size = len(east)
    lon, lat, _ = WGS84.fwd(
        np.full(size, camera.lon),
        np.full(size, camera.lat),
        np.degrees(np.arctan2(east, north)),
        np.hypot(east, north),
    )
    return lon, lat


def tilt_deg(camera: CameraPose) -> float:
    """Angle between the optical axis and straight down, degrees; 0 where pitch is unknown."""
    return math.degrees(math.acos(max(-1.0, min(1.0, -float(rotation(camera)[2, 2])))))


def field_of_view_pitch(camera: CameraPose, width: int, height: int) -> float | None:
    """Return the tangent of the angle between two neighbouring pixels at the image centre.

    Multiplied by the height above ground it is the ground sampling distance of a nadir frame.
    ``None`` without a usable focal length.  The calibrated focal length holds, else the lens with
    its sensor, as long as these agree with the 35 mm equivalent: where they do not, that one holds,
    since it is of the image as it was taken, digital zoom included (CIPA DC-008).  Where all that
    is known of a zoomed image agrees without the zoom, the zoom comes on top.
    """
    sides = max(width, height), min(width, height)
    lens, equivalent = _lens_pitch(camera, width, sides), None
    if camera.focal_35mm is not None:
        # The equivalent is by the full sensor's diagonal; nearly all are 4:3, the rest 3:2.
        ratio = 1.5 if abs(sides[0] / sides[1] - 1.5) < 0.03 else 4 / 3
        short = DIAGONAL_35MM / math.hypot(ratio, 1.0)
        equivalent = _crop_pitch((ratio * short, short), sides) / camera.focal_35mm
    if lens is None or equivalent is None:
        return equivalent if lens is None else lens / (camera.digital_zoom or 1.0)
    if abs(lens / equivalent - 1.0) >= FOCAL_AGREEMENT:
        return equivalent
    return lens / (camera.digital_zoom or 1.0)


def principal_point(camera: CameraPose, width: int, height: int) -> tuple[float, float]:
    """Where the optical axis meets the image: calibrated, or its centre."""
    x, y = camera.centre_px or (0.0, 0.0)
    near = abs(x / width - 0.5) < NEAR_CENTRE and abs(y / height - 0.5) < NEAR_CENTRE
    return (x, y) if near else (width / 2, height / 2)


def _lens_pitch(camera: CameraPose, width: int, sides: tuple[int, int]) -> float | None:
    """The same by the calibrated focal length, or by the lens and the size of its pixels."""
    if camera.focal_px is not None:
        return 1.0 / camera.focal_px
    if camera.focal_mm is None:
        return None
    if camera.model in SENSORS_MM:
        return _crop_pitch(SENSORS_MM[camera.model], sides) / camera.focal_mm
    if camera.pixel_mm is not None:
        # a copy of another size shows the same field
        return camera.pixel_mm * (camera.pixels_wide or width) / width / camera.focal_mm
    return None


def _crop_pitch(sensor_mm: tuple[float, float], sides_px: tuple[int, int]) -> float:
    return min(sensor_mm[0] / sides_px[0], sensor_mm[1] / sides_px[1])


def rotation(camera: CameraPose) -> Array:
    """Rows: the image's right, its down and the optical axis, in east, north, up.

    Yaw, pitch and roll turn about north, east and down, in this order: a gimbal's camera looks
    along the first axis, one in a body along the third, its top being the first.
    """
    pitch = -90.0 if camera.pitch_deg is None else camera.pitch_deg
    body = camera.mount == "body"
    yaw, pitch, roll = (
        math.radians(angle)
        for angle in (camera.yaw_deg or 0.0, pitch + 90.0 * body, camera.roll_deg or 0.0)
    )
    cy, sy, cp, sp, cr, sr = (
        f(angle) for angle in (yaw, pitch, roll) for f in (math.cos, math.sin)
    )
    axes = np.array(_turned_axes(cy, sy, cp, sp, cr, sr))
    forward, right, down = (np.array([axis[1], axis[0], -axis[2]]) for axis in axes.T)
    return np.stack([right, -forward, down] if body else [right, down, forward])


def rotations(yaw: Array, pitch: Array, roll: Array, body: npt.NDArray[np.bool_]) -> Array:
    """`rotation` of many cameras, float64 (n, 3, 3).

    Args:
        yaw, pitch, roll: float64 (n,), degrees.
        body: bool (n,), whether the camera is mounted in a body.
    """
    angles = (np.radians(yaw), np.radians(pitch + 90.0 * body), np.radians(roll))
    axes = np.array(_turned_axes(*(f(angle) for angle in angles for f in (np.cos, np.sin))))
    forward, right, down = (
        np.stack([axis[1], axis[0], -axis[2]]) for axis in axes.transpose(1, 0, 2)
    )
    in_body, in_gimbal = np.stack([right, -forward, down]), np.stack([right, down, forward])
    return np.asarray(np.where(body, in_body, in_gimbal).transpose(2, 0, 1))


def _turned_axes(cy: Any, sy: Any, cp: Any, sp: Any, cr: Any, sr: Any) -> list[list[Any]]:
    """Columns: where the turned axes point, in north, east, down; by cosines and sines."""
    return [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]


def _local_crs(lon: float, lat: float) -> str:
    if lat > 84.0:
        return "EPSG:5041"
    if lat < -80.0:
        return "EPSG:5042"
    zone = min(int((lon + 180.0) // 6.0) + 1, 60)
    return f"EPSG:{(32600 if lat >= 0 else 32700) + zone}"
