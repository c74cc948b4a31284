"""What images' cameras say, as columns of STAC items: view and perspective-imagery extensions.

https://github.com/stac-extensions/view and https://github.com/stac-extensions/perspective-imagery
"""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from archive_pipeline.geo.pose import CameraPose
from archive_pipeline.store._columns import NUMBERS, SMALL_NUMBERS, TEXTS, WHOLE_NUMBERS, lists
from archive_pipeline.store.index_rows import CAMERA, SIDES, as_text, poses_of, words_of

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

# What `geo.camera` gives of camera frames: its axes are metres east and north.
LOCAL_CRS = re.compile(r"EPSG:(32[67](?:0[1-9]|[1-5][0-9]|60)|504[12])")
WGS84 = 4326
TILTED = 0.1  # degrees off nadir, from which on a camera looks to one side
NORTHWARD = 1e-5  # degrees, far enough to see where north is
INTERIOR = pa.struct(
    [
        ("camera_manufacturer", pa.string()),
        ("camera_model", pa.string()),
        ("sensor_array_dimensions", WHOLE_NUMBERS),
        ("pixel_spacing", NUMBERS),
        ("focal_length", pa.float64()),
        ("principal_point_offset", NUMBERS),
        ("field_of_view", pa.float64()),
    ]
)
CAMERA_COLUMNS = {
    "platform": pa.string(),
    "instruments": TEXTS,
    "view:off_nadir": pa.float64(),
    "view:azimuth": pa.float64(),
    "pers:interior_orientation": INTERIOR,
    "pers:perspective_center": NUMBERS,
    "pers:crs": pa.int64(),
    "pers:rotation_matrix": SMALL_NUMBERS,  # finer than any camera knows its direction
}


def camera_columns(rows: pa.Table) -> dict[str, pa.Array]:
    """`CAMERA_COLUMNS` of rows of the index, null where nothing is known."""
    from archive_pipeline.geo.camera import rotations  # loads rasterio, which reading does without

    cameras, which = cameras_of(rows)
    known = np.array([camera is not None for camera in cameras])[which]
    in_body = np.array([camera is not None and camera.mount == "body" for camera in cameras])[which]
    numbers = poses_of(rows)
    yaw, pitch, roll = numbers[:, 4:].T
    aimed = known & np.isfinite(yaw) & np.isfinite(pitch)
    with np.errstate(invalid="ignore"):
        axes = rotations(yaw, pitch, np.nan_to_num(roll), in_body)
        off_nadir = np.degrees(np.arccos(np.clip(-axes[:, 2, 2], -1.0, 1.0)))
        azimuth = np.degrees(np.arctan2(axes[:, 2, 0], axes[:, 2, 1])) % 360.0
        downward = aimed & (off_nadir <= 90.0)
        sideways = downward & (off_nadir >= TILTED)
    return {
        **_instruments(cameras, which),
        "view:off_nadir": pa.array(off_nadir, mask=~downward),
        "view:azimuth": pa.array(azimuth, mask=~sideways),
        "pers:interior_orientation": _interiors(rows, cameras, which),
        **_exteriors(rows, numbers[:, :3], axes, known, aimed),
    }


def cameras_of(rows: pa.Table) -> tuple[list[CameraPose | None], list[int]]:
    """Different cameras of images, without where they were, and the number of each image's."""
    words, which = words_of(rows[CAMERA])
    return [_camera(word) for word in words], which


def _camera(word: str | None) -> CameraPose | None:
    """What images' cameras have in common; None of what is no camera."""
    try:
        camera = None if word is None else CameraPose.from_brief(json.loads(word))
        return camera and replace(camera, make=as_text(camera.make), model=as_text(camera.model))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None


def platform_of(camera: CameraPose) -> str | None:
    """What carried a camera, where its tags are those of drones' makers."""
    return "uav" if camera.dialect else None


def instrument_of(camera: CameraPose) -> str | None:
    """A camera's name."""
    return " ".join(filter(None, (camera.make, camera.model))) or None


def _instruments(cameras: list[CameraPose | None], which: list[int]) -> dict[str, pa.Array]:
    platforms = [None if camera is None else platform_of(camera) for camera in cameras]
    names = [None if camera is None else instrument_of(camera) for camera in cameras]
    instruments = [[name] if name else None for name in names]
    return {
        "platform": pa.array(platforms, pa.string()).take(pa.array(which)),
        "instruments": pa.array(instruments, TEXTS).take(pa.array(which)),
    }


def _interiors(rows: pa.Table, cameras: list[CameraPose | None], which: list[int]) -> pa.Array:
    """Interior orientations: images of the same camera and size share one."""
    sides = (rows[name].to_numpy() for name in SIDES)
    kinds, kind = np.unique(np.column_stack([which, *sides]), axis=0, return_inverse=True)
    found = []
    for n, width, height in kinds.tolist():
        camera = cameras[n]
        found.append(None if camera is None else _interior(camera, width, height))
    return pa.array(found, INTERIOR).take(pa.array(kind))


def _interior(camera: CameraPose, width: int, height: int) -> dict[str, Any]:
    """Interior orientation by what `geo.camera` places frames with; lengths in mm."""
    from archive_pipeline.geo.camera import field_of_view_pitch, principal_point

    lens: dict[str, Any] = {}
    with suppress(ZeroDivisionError, OverflowError):  # of a forged camera
        tangent = field_of_view_pitch(camera, width, height) or 0.0
        if tangent > 0.0:
            lens["field_of_view"] = math.degrees(2 * math.atan(tangent * width / 2))
        if tangent > 0.0 and camera.focal_mm is not None and camera.focal_mm > 0.0:
            side = tangent * camera.focal_mm
            x, y = principal_point(camera, width, height)
            lens["focal_length"] = camera.focal_mm
            lens["pixel_spacing"] = [side, side]
            # of image coordinates x to the right, y to the top
            lens["principal_point_offset"] = [side * (x - width / 2), side * (height / 2 - y)]
    if not np.isfinite(np.hstack([0.0, *lens.values()])).all():
        lens = {}
    return {
        "camera_manufacturer": camera.make or None,
        "camera_model": camera.model or None,
        "sensor_array_dimensions": [width, height],
        **lens,
    }


def _exteriors(
    rows: pa.Table, places: Array, axes: Array, known: Flags, aimed: Flags
) -> dict[str, pa.Array]:
    """Perspective centres, their CRS and rotations from that to the image.

    In the image's own CRS where that is a local one, else in degrees and without a rotation.

    Args:
        places: float64 (n, 3), longitude, latitude, altitude.
        axes: float64 (n, 3, 3), rows of each: right, down and forward in true east, north, up.
    """
    placed = known & (np.abs(places[:, 0]) <= 360.0) & (np.abs(places[:, 1]) <= 90.0)
    centres, crs, turns = places.copy(), np.full(len(rows), WGS84), np.full((len(rows), 9), np.nan)
    codes, code = words_of(rows["proj:code"])
    of_code = np.array(code)
    for n in np.unique(of_code[placed & aimed]).tolist():
        local = LOCAL_CRS.fullmatch(codes[n] or "")
        if local is None:
            continue
        at = np.flatnonzero(placed & (of_code == n))
        x, y, east, north = _grid(places[at, 0], places[at, 1], local[0])
        inside = np.isfinite(x) & np.isfinite(y) & np.isfinite(east) & np.isfinite(north)
        at = at[inside]
        x, y, east, north = (values[inside] for values in (x, y, east, north))
        centres[at, 0], centres[at, 1], crs[at] = x, y, int(local[1])
        # rows of the image's own axes: right, up, backward
        across, along, up = (axes[at] * np.array([1.0, -1.0, -1.0])[:, None]).transpose(2, 0, 1)
        grid = np.stack(
            [
                across * north[:, None] + along * east[:, None],
                along * north[:, None] - across * east[:, None],
                up,
            ]
        )
        turns[at] = grid.transpose(1, 2, 0).reshape(-1, 9)
    high = np.isfinite(places[:, 2])
    length = np.where(placed, 2 + high, 0)
    turned = placed & aimed & high & np.isfinite(turns).all(axis=1)
    return {
        "pers:perspective_center": lists(centres[np.arange(3) < length[:, None]], length),
        "pers:crs": pa.array(crs, mask=~placed),
        "pers:rotation_matrix": lists(turns[turned].ravel().astype(np.float32), 9 * turned),
    }


def _grid(lon: Array, lat: Array, crs: str) -> tuple[Array, Array, Array, Array]:
    """Places in a local CRS, and its directions (x, y) of true north."""
    from pyproj import Transformer

    project = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform
    # towards the equator: nothing lies beyond a pole
    side = np.where(lat > 0, -NORTHWARD, NORTHWARD)
    x, y = project(lon, lat)
    other_x, other_y = project(lon, lat + side)
    with np.errstate(invalid="ignore"):
        east, north = (other_x - x) * np.sign(side), (other_y - y) * np.sign(side)
        length = np.hypot(east, north)
        return x, y, east / length, north / length
