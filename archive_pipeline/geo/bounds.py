"""Which of very many images a bounding box can meet at all, told by their bounds in degrees.

A quick look before `mapping.bbox_to_window`, which decides. In doubt an image may meet the box.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from pyproj import CRS
from pyproj.exceptions import ProjError

from archive_pipeline.geo.georef import Bbox, Georef
from archive_pipeline.geo.mapping import (
    EDGE_POINTS,
    Array,
    crs_transformer,
    longitude_period,
    outline,
)

DEGREES = "EPSG:4326"
WGS84 = "World Geodetic System 1984"
# Beyond these, degrees bound a shape badly: images that wide, that far north, or at +-180.
MAX_EXTENT, MAX_LATITUDE, MAX_LONGITUDE = 9.0, 85.0, 179.0
# Other releases of PROJ, other grids: ways from one datum to another end so many degrees apart.
DATUM_MARGIN = 0.02
EXTENT_MARGIN = 0.05  # of a box's extent, for edges that are curved in degrees
ROUNDING = 1e-9  # degrees


def reach(georef: Georef, width: int, height: int, bounds: Bbox) -> float | None:
    """Return how far an image may reach beyond bounds around its corners, in degrees.

    Args:
        georef: the image's georeference.
        width: image width in pixels.
        height: image height in pixels.
        bounds: (west, south, east, north) in EPSG:4326.

    Returns:
        A margin that holds all of the image, None where none is sure to.
    """
    if georef.method == "point":
        return ROUNDING
    try:
        x, y = outline(georef, width, height, DEGREES)
        margin = ROUNDING if _is_wgs84(str(georef.crs)) else DATUM_MARGIN
    except Exception:  # of any kind that a forged georeference leads to
        return None
    west, east, south, north = (float(v) for v in (x.min(), x.max(), y.min(), y.max()))
    if (
        max(east - west, north - south) > MAX_EXTENT
        or max(-south, north) > MAX_LATITUDE
        or max(-west, east) > MAX_LONGITUDE
    ):
        return None
    beyond = (bounds[0] - west, bounds[1] - south, east - bounds[2], north - bounds[3])
    return max(0.0, *beyond) + margin / math.cos(math.radians(max(-south, north)))


@lru_cache(maxsize=256)
def _is_wgs84(crs: str) -> bool:
    """Whether a CRS is on EPSG:4326's own datum, so that no way to another is chosen."""
    found = CRS.from_user_input(crs)
    datum = None if found.is_bound else found.datum
    return datum is not None and datum.name.startswith(WGS84)


def may_meet(bounds: Array, bbox: Bbox, bbox_crs: str) -> npt.NDArray[np.bool_]:
    """Tell for each image whether a box may meet it.

    Args:
        bounds: float64 (n, 4), in EPSG:4326 around all of each image, longitudes in -180..180;
            NaN where not known.
        bbox: (west, south, east, north) in ``bbox_crs``, as `mapping.check_bbox` wants it.
        bbox_crs: anything pyproj takes.

    Returns:
        bool (n,); False only for images of which `mapping.bbox_to_window` finds no window.
    """
    area = _in_degrees(bbox, bbox_crs)
    if area is None:
        return np.ones(len(bounds), bool)
    west, south, east, north = area
    across = np.zeros(len(bounds), bool)
    for turn in (-360.0, 0.0, 360.0):  # boxes' longitudes may count on beyond 180
        across |= (bounds[:, 2] + turn >= west) & (bounds[:, 0] + turn <= east)
    along = (bounds[:, 3] >= south) & (bounds[:, 1] <= north)
    return np.asarray((across & along) | np.isnan(bounds).any(axis=1))


def _in_degrees(bbox: Bbox, crs: str) -> Bbox | None:
    """Bounds of a box in EPSG:4326, widened so that they hold all of it; None if unknown.

    Longitudes are in -360..360, and the eastern one is the greater one.
    """
    west, south, east, north = bbox
    if crs.upper() == DEGREES:  # images are outlined alike here and there
        return west, south, east + (360.0 if west > east else 0.0), north
    period = longitude_period(crs)
    if period is not None and (west > east or max(-west, east) > period / 2):
        return None
    try:
        west, south, east, north = crs_transformer(crs, DEGREES).transform_bounds(
            *bbox, densify_pts=EDGE_POINTS
        )
    except (ProjError, ValueError):
        return None
    if not all(math.isfinite(v) for v in (west, south, east, north)):
        return None
    dy = DATUM_MARGIN + EXTENT_MARGIN * (north - south)
    farthest = min(max(abs(south - dy), abs(north + dy)), MAX_LATITUDE)
    east += 360.0 if west > east else 0.0
    extent = east - west
    dx = DATUM_MARGIN / math.cos(math.radians(farthest)) + EXTENT_MARGIN * extent
    if extent + 2 * dx >= 360.0:
        west, east, dx = -180.0, 180.0, 0.0
    return west - dx, south - dy, east + dx, north + dy
