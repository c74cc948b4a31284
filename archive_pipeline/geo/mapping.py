"""From pixels to the ground and back: which ground an image shows, which pixels a box covers.

Coordinates, windows and boxes are those of `georef`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import rasterio
import shapely
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError, ProjError
from rasterio._err import CPLE_BaseError
from rasterio.control import GroundControlPoint
from rasterio.errors import RasterioError
from rasterio.rpc import RPC
from rasterio.transform import GCPTransformer, RPCTransformer
from shapely.geometry import box

from archive_pipeline.geo.georef import Bbox, Georef, Window

Array = npt.NDArray[np.float64]
Mapping2D = Callable[[Array, Array], tuple[Array, Array]]

# Less than this fraction of a pixel is rounding in the projection, not coverage.
PIXEL_TOLERANCE = 1e-3
# Points on every edge of an outline that is carried from one CRS to another.
EDGE_POINTS = 21


def crs_to_text(crs: rasterio.crs.CRS | None) -> str | None:
    """Return ``"EPSG:n"`` if that code gives exactly this CRS again, else WKT2; ``None`` if empty.

    Args:
        crs: a rasterio CRS.
    """
    if not crs:
        return None
    epsg = crs.to_epsg()
    if epsg is not None:
        again = rasterio.crs.CRS.from_epsg(epsg)
        if again == crs and again.to_wkt() == crs.to_wkt():
            return f"EPSG:{epsg}"
    return str(crs.to_wkt(version="WKT2_2019"))


def raster_georef(dataset: rasterio.DatasetReader) -> Georef:
    """Read the georeference that an open GDAL dataset carries itself.

    Args:
        dataset: an open rasterio dataset.

    Returns:
        Its CRS with its transform, or its GCPs, or its RPCs; method ``"none"`` with neither.
    """
    crs = crs_to_text(dataset.crs)
    rpcs = dataset.tags(ns="RPC") or None
    points, gcp_crs = dataset.gcps
    if not dataset.transform.is_identity:
        georef = Georef(crs, tuple(dataset.transform)[:6], rpcs=rpcs, method="transform")
    elif points:
        gcps = tuple((p.row, p.col, p.x, p.y, p.z or 0.0, p.id or "", p.info or "") for p in points)
        georef = Georef(crs_to_text(gcp_crs), gcps=gcps, rpcs=rpcs, method="gcps")
    elif rpcs:
        # RPCs are defined on WGS 84, whatever else the file says.
        georef = Georef(crs or "EPSG:4326", rpcs=rpcs, method="rpcs")
    else:
        return Georef(crs)
    return with_footprint(georef, dataset.width, dataset.height)


def with_footprint(georef: Georef, width: int, height: int) -> Georef:
    """Return ``georef`` with the footprint of its first ``width`` x ``height`` pixels.

    The footprint is ``None`` where the CRS is unknown, local, or not valid at that place.
    """
    cols = np.array([0, width, width, 0, 0], dtype=np.float64)
    rows = np.array([0, 0, height, height, 0], dtype=np.float64)
    try:
        lon, lat = _outline(georef, cols, rows, "EPSG:4326")
    except ValueError:
        return replace(georef, footprint=None)
    ring = tuple((float(x), float(y)) for x, y in zip(lon, lat, strict=True))
    return replace(georef, footprint=ring)


def bbox_to_window(
    georef: Georef, width: int, height: int, bbox: Bbox, bbox_crs: str = "EPSG:4326"
) -> Window | None:
    """Find the smallest pixel window that covers what a bounding box and an image share.

    The true outlines are intersected: a yawed frame whose enclosing rectangle meets the box while
    its own outline does not is disjoint from it.

    Args:
        georef: the image's georeference.
        width: image width in pixels.
        height: image height in pixels.
        bbox: ``(west, south, east, north)`` in ``bbox_crs``.
        bbox_crs: anything pyproj takes; geographic ones in the order longitude, latitude.

    Returns:
        ``(col, row, width, height)`` inside the image, or ``None`` when nothing is shared or the
        image has no known position.

    Raises:
        ValueError: the box is empty, inverted, not finite, crosses the antimeridian, leaves the
            globe, or its CRS is unknown.
    """
    check_bbox(bbox, bbox_crs)
    edge = np.linspace(0.0, 1.0, EDGE_POINTS)[:-1]
    zero, one = np.zeros_like(edge), np.ones_like(edge)
    cols = width * np.concatenate([edge, one, 1 - edge, zero])
    rows = height * np.concatenate([zero, edge, one, 1 - edge])
    try:
        x, y = _outline(georef, cols, rows, bbox_crs)
    except ValueError:
        return None
    shifts = [0.0]
    if _crs(bbox_crs).is_geographic and np.ptp(x) > 180.0:
        x = np.where(x < 0, x + 360.0, x)
        shifts = [0.0, 360.0]
    outline = shapely.make_valid(shapely.Polygon(np.column_stack([x, y])))
    west, south, east, north = bbox
    shared = shapely.union_all(
        [outline.intersection(box(west + s, south, east + s, north)) for s in shifts]
    )
    if shared.area <= 0.0:
        return None
    points = shapely.get_coordinates(shapely.segmentize(shared, max(shared.length / 200, 1e-12)))
    to_image = crs_transformer(bbox_crs, str(georef.crs))
    px, py = to_image.transform(points[:, 0], points[:, 1])
    cols, rows = pixel_mapping(georef, inverse=True)(
        np.asarray(px, dtype=np.float64), np.asarray(py, dtype=np.float64)
    )
    if not (np.isfinite(cols).all() and np.isfinite(rows).all()):
        return None
    left = max(0, math.floor(cols.min() + PIXEL_TOLERANCE))
    top = max(0, math.floor(rows.min() + PIXEL_TOLERANCE))
    right = min(width, math.ceil(cols.max() - PIXEL_TOLERANCE))
    bottom = min(height, math.ceil(rows.max() - PIXEL_TOLERANCE))
    if right <= left or bottom <= top:
        return None
    return left, top, right - left, bottom - top


def check_bbox(bbox: Bbox, bbox_crs: str = "EPSG:4326") -> None:
    """Raise ``ValueError`` with a clear message unless ``bbox`` is a proper box in ``bbox_crs``."""
    west, south, east, north = bbox
    if not all(math.isfinite(v) for v in bbox):
        raise ValueError(f"bounding box {bbox} is not finite")
    geographic = _crs(bbox_crs).is_geographic
    if west >= east:
        hint = "; boxes across the antimeridian must be split in two" if geographic else ""
        raise ValueError(f"bounding box west {west} is not less than east {east}{hint}")
    if south >= north:
        raise ValueError(f"bounding box south {south} is not less than north {north}")
    if geographic and (west < -180 or east > 180 or south < -90 or north > 90):
        raise ValueError(
            f"bounding box {bbox} leaves longitude -180..180, latitude -90..90; "
            "the order is west south east north"
        )


def window_transform(georef: Georef, window: Window) -> Georef:
    """Return the georeference of a window's own pixel grid.

    Args:
        georef: the whole image's georeference.
        window: ``(col, row, width, height)`` in the image's pixels.

    Returns:
        The same georeference with transform, GCPs and RPC offsets moved to the window's first
        pixel, and the window's footprint.
    """
    col, row, width, height = window
    transform = georef.transform
    if transform is not None:
        a, b, c, d, e, f = transform
        transform = (a, b, a * col + b * row + c, d, e, d * col + e * row + f)
    gcps = tuple((p[0] - row, p[1] - col, *p[2:]) for p in georef.gcps)
    rpcs = georef.rpcs
    if rpcs is not None:
        rpcs = {
            key: _shift_rpc(value, {"SAMP_OFF": col, "LINE_OFF": row}.get(key, 0))
            for key, value in rpcs.items()
        }
    moved = replace(georef, transform=transform, gcps=gcps, rpcs=rpcs)
    if georef.footprint is None:
        return moved
    return with_footprint(moved, width, height)


def homography(source: Array, target: Array) -> Array:
    """Fit the projective map that takes one set of points to another.

    Args:
        source: float64 (n, 2), n >= 4, no three of some four in a line.
        target: float64 (n, 2).

    Returns:
        float64 (3, 3), scaled so that its last element is 1; least squares for n > 4.
    """
    # Centred and scaled to about 1, or UTM northings would swamp the least squares.
    s, t = _normaliser(source), _normaliser(target)
    u, v = _apply_homography(s, source[:, 0], source[:, 1])
    x, y = _apply_homography(t, target[:, 0], target[:, 1])
    zero, one = np.zeros_like(u), np.ones_like(u)
    rows = np.concatenate(
        [
            np.column_stack([u, v, one, zero, zero, zero, -x * u, -x * v]),
            np.column_stack([zero, zero, zero, u, v, one, -y * u, -y * v]),
        ]
    )
    solution = np.linalg.lstsq(rows, np.concatenate([x, y]), rcond=None)[0]
    matrix = np.linalg.inv(t) @ np.append(solution, 1.0).reshape(3, 3) @ s
    return np.asarray(matrix / matrix[2, 2])


def _normaliser(points: Array) -> Array:
    centre = points.mean(axis=0)
    scale = 1.0 / max(float(np.abs(points - centre).max()), 1e-12)
    return np.array([[scale, 0, -scale * centre[0]], [0, scale, -scale * centre[1]], [0, 0, 1.0]])


def _apply_homography(matrix: Array, x: Array, y: Array) -> tuple[Array, Array]:
    u, v, w = matrix @ np.stack([x, y, np.ones_like(x)])
    return u / w, v / w


def _shift_rpc(value: str, offset: int) -> str:
    # GDAL may append a unit ("12.5 pixels"); untouched items keep their exact text.
    if offset == 0:
        return value
    number, _, unit = value.strip().partition(" ")
    return f"{float(number) - offset!r} {unit}".strip()


@lru_cache(maxsize=256)
def _crs(text: str) -> CRS:
    try:
        return CRS.from_user_input(text)
    except CRSError as error:
        raise ValueError(f"unknown coordinate reference system {text!r}") from error


@lru_cache(maxsize=256)
def crs_transformer(source: str, target: str) -> Transformer:
    try:
        return Transformer.from_crs(_crs(source), _crs(target), always_xy=True)
    except ProjError as error:
        raise ValueError(f"no transformation from {source} to {target}") from error


def check_crs(text: str) -> None:
    """Raise ``ValueError`` unless pyproj knows the CRS and it says where on a map a point lies."""
    if not (_crs(text).is_projected or _crs(text).is_geographic):
        raise ValueError(f"{text!r} is no projected or geographic reference system")
    crs_transformer("EPSG:4326", text)


def _outline(georef: Georef, cols: Array, rows: Array, crs: str) -> tuple[Array, Array]:
    """Carry pixel coordinates to ``crs``; ``ValueError`` where that gives no finite position."""
    if georef.crs is None:
        raise ValueError("the image has no coordinate reference system")
    x, y = pixel_mapping(georef, inverse=False)(cols, rows)
    x, y = crs_transformer(georef.crs, crs).transform(x, y)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(f"the image's position cannot be expressed in {crs}")
    return x, y


def pixel_mapping(georef: Georef, inverse: bool) -> Mapping2D:
    """Return the map (cols, rows) -> (x, y) in the image's CRS, or its inverse."""
    if georef.transform is not None:
        a, b, c, d, e, f = georef.transform
        matrix = np.array([[a, b, c], [d, e, f], [0.0, 0.0, 1.0]])
        return _projective(matrix, inverse)
    if georef.gcps and georef.method == "camera":
        pixels = np.array([(p[1], p[0]) for p in georef.gcps])
        ground = np.array([(p[2], p[3]) for p in georef.gcps])
        return _projective(homography(pixels, ground), inverse)
    if georef.gcps:
        points = [GroundControlPoint(p[0], p[1], p[2], p[3], p[4]) for p in georef.gcps]
        return _gdal(lambda: GCPTransformer(points), inverse)
    if georef.rpcs is not None:
        try:
            rpc = RPC.from_gdal(georef.rpcs)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError("the image's RPCs are incomplete") from error
        # The mean height of the scene is the best flat ground there is without a terrain model.
        return _gdal(lambda: RPCTransformer(rpc, RPC_HEIGHT=rpc.height_off), inverse)
    raise ValueError("the image has no position")


def _projective(matrix: Array, inverse: bool) -> Mapping2D:
    if inverse:
        try:
            matrix = np.asarray(np.linalg.inv(matrix), dtype=np.float64)
        except np.linalg.LinAlgError as error:
            raise ValueError("the image's transform is degenerate") from error
    return lambda u, v: _apply_homography(matrix, u, v)


def _gdal(create: Callable[[], GCPTransformer | RPCTransformer], inverse: bool) -> Mapping2D:
    try:
        transformer = create()
    except (RasterioError, CPLE_BaseError, ValueError) as error:
        raise ValueError(f"the image's control points or RPCs are unusable: {error}") from error

    def forward(cols: Array, rows: Array) -> tuple[Array, Array]:
        x, y = transformer.xy(rows, cols, offset="ul")
        return np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)

    def backward(x: Array, y: Array) -> tuple[Array, Array]:
        rows, cols = transformer.rowcol(x, y, op=lambda values: values)
        return np.asarray(cols, dtype=np.float64), np.asarray(rows, dtype=np.float64)

    return backward if inverse else forward
