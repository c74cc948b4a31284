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

from archive_pipeline.geo import globe
from archive_pipeline.geo.georef import Bbox, Georef, Window

Array = npt.NDArray[np.float64]
Mapping2D = Callable[[Array, Array], tuple[Array, Array]]

# Less than this fraction of a pixel is rounding in the projection, not coverage.
PIXEL_TOLERANCE = 1e-3
# Points on every edge of an outline that is carried from one CRS to another.
EDGE_POINTS = 21
# Images of more degrees have edges that are curves elsewhere, and so many points on them.
LARGE_DEG, LARGE_EDGE_POINTS = 10.0, 201


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


def raster_georef(
    dataset: rasterio.DatasetReader, beside: rasterio.crs.CRS | None = None
) -> Georef:
    """Read the georeference that an open GDAL dataset carries itself.

    Args:
        dataset: an open rasterio dataset.
        beside: the CRS that a file beside it gives, where it has none itself.

    Returns:
        Its CRS with its transform, or its GCPs, or its RPCs; method ``"none"`` with neither.
    """
    crs = crs_to_text(dataset.crs or beside)
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


def with_footprint(georef: Georef, width: float, height: float) -> Georef:
    """Return ``georef`` with the footprint of its first ``width`` x ``height`` pixels.

    The footprint is ``None`` where the CRS is unknown, local, or not valid at that place. That of
    an image across the antimeridian has longitudes beyond 180; that of one round a pole has the
    pole in it.
    """
    try:
        lon, lat = outline(georef, width, height, "EPSG:4326")
    except ValueError:
        return replace(georef, footprint=None)
    return replace(georef, footprint=globe.ring(lon, lat, EDGE_POINTS - 1))


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
        bbox: ``(west, south, east, north)`` in ``bbox_crs``, see `check_bbox`.
        bbox_crs: anything pyproj takes; geographic ones in the order longitude, latitude.

    Returns:
        ``(col, row, width, height)`` inside the image, or ``None`` when nothing is shared or the
        image has no known position.  The whole image where only the camera's place is known, and
        that is in the box.

    Raises:
        ValueError: as `check_bbox` has it.
    """
    check_bbox(bbox, bbox_crs)
    if georef.method == "point":
        return (0, 0, width, height) if _has_spot(georef, bbox, bbox_crs) else None
    try:
        shared, crs = _shared(georef, width, height, bbox, bbox_crs)
    except ValueError:
        return None
    if shared.area <= 0.0:
        return None
    points = shapely.get_coordinates(shapely.segmentize(shared, max(shared.length / 200, 1e-12)))
    cols, rows = to_pixels(georef, width, height, crs)(points[:, 0], points[:, 1])
    if not (np.isfinite(cols).all() and np.isfinite(rows).all()):
        return None
    left = max(0, math.floor(cols.min() + PIXEL_TOLERANCE))
    top = max(0, math.floor(rows.min() + PIXEL_TOLERANCE))
    right = min(width, math.ceil(cols.max() - PIXEL_TOLERANCE))
    bottom = min(height, math.ceil(rows.max() - PIXEL_TOLERANCE))
    if right <= left or bottom <= top:
        return None
    return left, top, right - left, bottom - top


def _has_spot(georef: Georef, bbox: Bbox, bbox_crs: str) -> bool:
    """Whether the place of an image of unknown extent is in a box."""
    assert georef.footprint is not None
    west, south, east, north = bbox
    x, y = crs_transformer("EPSG:4326", bbox_crs).transform(*georef.footprint[0])
    if not (math.isfinite(x) and math.isfinite(y)):
        return False
    period = longitude_period(bbox_crs)
    if period is not None:
        east += period if west > east else 0.0
        x += period * math.ceil((west - x) / period)
    return west <= x <= east and south <= y <= north


def _shared(
    georef: Georef, width: int, height: int, bbox: Bbox, bbox_crs: str
) -> tuple[shapely.Geometry, str]:
    """The ground that an image and a box share, and the CRS it is in.

    That is the box's, or degrees where an image is so large that the box's CRS may end before it.

    Raises:
        ValueError: the image's or the box's position cannot be expressed there.
    """
    west, south, east, north = bbox
    period = longitude_period(bbox_crs)
    large = _is_large(georef)
    points = LARGE_EDGE_POINTS if large else EDGE_POINTS
    if period is not None:
        area = box(west, south, east + (period if west > east else 0.0), north)
        image = globe.region(*outline(georef, width, height, bbox_crs, points), period)
        return globe.shared(image, area, period), bbox_crs
    if georef.crs == bbox_crs or not large:
        x, y = outline(georef, width, height, bbox_crs, points)
        image = shapely.make_valid(shapely.Polygon(np.column_stack([x, y])))
        return image.intersection(box(west, south, east, north)), bbox_crs
    cols, rows = _edges(points)
    x, y = west + (east - west) * cols, north - (north - south) * rows
    lon, lat = crs_transformer(bbox_crs, "EPSG:4326").transform(x, y)
    if not (np.isfinite(lon).all() and np.isfinite(lat).all()):
        raise ValueError(f"the bounding box leaves the area of {bbox_crs}")
    image = globe.region(*outline(georef, width, height, "EPSG:4326", points))
    return globe.shared(image, globe.region(lon, lat), 360.0), "EPSG:4326"


def _is_large(georef: Georef) -> bool:
    """Whether an image is so large that edges are curves in other CRSs."""
    if georef.footprint is None:
        return False
    lon, lat = zip(*georef.footprint, strict=True)
    return max(max(lon) - min(lon), max(lat) - min(lat)) > LARGE_DEG


def check_bbox(bbox: Bbox, bbox_crs: str = "EPSG:4326") -> None:
    """Raise ``ValueError`` with a clear message unless ``bbox`` is a proper box in ``bbox_crs``.

    One whose west is greater than its east crosses the antimeridian, as in RFC 7946 and STAC; so
    does one whose longitudes run beyond 180 (or -180), up to a whole turn.
    """
    try:
        west, south, east, north = bbox
        finite = all(math.isfinite(v) for v in bbox)
    except (TypeError, ValueError) as error:
        raise ValueError(f"bounding box {bbox!r} is not four numbers") from error
    if not finite:
        raise ValueError(f"bounding box {bbox} is not finite")
    check_crs(bbox_crs)
    period = longitude_period(bbox_crs)
    if south >= north:
        raise ValueError(f"bounding box south {south} is not less than north {north}")
    if period is not None:
        half = period / 2
        reach = half if west > east else period
        if (
            min(west, east) < -reach
            or max(west, east) > reach
            or not (-half / 2 <= south and north <= half / 2)
        ):
            raise ValueError(
                f"bounding box {bbox} leaves longitude -{half:g}..{half:g}, latitude "
                f"-{half / 2:g}..{half / 2:g}; the order is west south east north"
            )
        if west == east or east - west > period:
            raise ValueError(
                f"bounding box west {west} to east {east} is empty or over a whole turn"
            )
    elif west >= east:
        raise ValueError(f"bounding box west {west} is not less than east {east}")


def window_transform(georef: Georef, window: tuple[float, float, float, float]) -> Georef:
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
    if not georef.is_mapped:
        return moved
    return with_footprint(moved, width, height)


def scaled_transform(georef: Georef, across: float, down: float) -> Georef:
    """Return the georeference of an image's pixels made larger, from the same first corner on.

    Args:
        georef: the image's georeference.
        across, down: columns and rows of the image that a pixel stands for.

    Returns:
        The same georeference with transform, GCPs and RPCs of the larger pixels.
    """
    transform = georef.transform
    if transform is not None:
        a, b, c, d, e, f = transform
        transform = (a * across, b * down, c, d * across, e * down, f)
    gcps = tuple((p[0] / down, p[1] / across, *p[2:]) for p in georef.gcps)
    rpcs = georef.rpcs
    if rpcs is not None:
        rpcs = dict(rpcs)
        for name, size in (("SAMP", across), ("LINE", down)):
            # an RPC's pixels are counted from the first one's centre
            if f"{name}_OFF" in rpcs:
                offset, unit = _split_unit(rpcs[f"{name}_OFF"])
                rpcs[f"{name}_OFF"] = f"{(offset + 0.5) / size - 0.5!r} {unit}".strip()
            if f"{name}_SCALE" in rpcs:
                scale, unit = _split_unit(rpcs[f"{name}_SCALE"])
                rpcs[f"{name}_SCALE"] = f"{scale / size!r} {unit}".strip()
    return replace(georef, transform=transform, gcps=gcps, rpcs=rpcs)


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
    u, v = apply_homography(s, source[:, 0], source[:, 1])
    x, y = apply_homography(t, target[:, 0], target[:, 1])
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


def apply_homography(matrix: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Where a projective map (3, 3) takes points."""
    u, v, w = matrix @ np.stack([x, y, np.ones_like(x)])
    return u / w, v / w


def _shift_rpc(value: str, offset: float) -> str:
    if offset == 0:  # untouched items keep their exact text
        return value
    number, unit = _split_unit(value)
    return f"{number - offset!r} {unit}".strip()


def _split_unit(value: str) -> tuple[float, str]:
    """A number of an RPC and its unit: GDAL may append one ("12.5 pixels")."""
    number, _, unit = value.strip().partition(" ")
    return float(number), unit


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


@lru_cache(maxsize=256)
def check_crs(text: str) -> None:
    """Raise ``ValueError`` unless pyproj knows the CRS and it says where on a map a point lies."""
    if not (_crs(text).is_projected or _crs(text).is_geographic):
        raise ValueError(f"{text!r} is no projected or geographic reference system")
    crs_transformer("EPSG:4326", text)


@lru_cache(maxsize=256)
def longitude_period(crs: str) -> float | None:
    """What longitudes repeat after in a geographic CRS: 360 degrees; ``None`` in any other.

    Raises:
        ValueError: the CRS is unknown.
    """
    known = _crs(crs)
    if not known.is_geographic:
        return None
    return round(2 * math.pi / known.axis_info[0].unit_conversion_factor, 9)


@lru_cache(maxsize=8)
def _edges(points: int) -> tuple[Array, Array]:
    """Places on the edges of a unit square, from its upper left corner, each corner once."""
    edge = np.linspace(0.0, 1.0, points)[:-1]
    zero, one = np.zeros_like(edge), np.ones_like(edge)
    return np.concatenate([edge, one, 1 - edge, zero]), np.concatenate([zero, edge, one, 1 - edge])


def outline(
    georef: Georef, width: float, height: float, crs: str, points: int = EDGE_POINTS
) -> tuple[Array, Array]:
    """An image's outline in ``crs``, not closed, with so many points on each edge.

    Raises:
        ValueError: it has no finite position there.
    """
    if georef.crs is None:
        raise ValueError("the image has no coordinate reference system")
    cols, rows = _edges(points)
    x, y = pixel_mapping(georef, inverse=False)(width * cols, height * rows)
    x, y = crs_transformer(georef.crs, crs).transform(x, y)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(f"the image's position cannot be expressed in {crs}")
    return x, y


def to_pixels(georef: Georef, width: int, height: int, crs: str) -> Mapping2D:
    """Return the map (x, y) in ``crs`` -> (cols, rows) of an image.

    Longitudes may be counted in any turn: the image's own are used.

    Raises:
        ValueError: the image has no position, or there is no transformation.
    """
    to_image = crs_transformer(crs, str(georef.crs))
    inverse = pixel_mapping(georef, inverse=True)
    period = longitude_period(str(georef.crs))
    middle = 0.0
    if period is not None:
        centre = np.array([width / 2]), np.array([height / 2])
        middle = float(pixel_mapping(georef, inverse=False)(*centre)[0][0])

    def mapping(x: Array, y: Array) -> tuple[Array, Array]:
        u, v = (np.asarray(values, dtype=np.float64) for values in to_image.transform(x, y))
        return inverse(u if period is None else globe.near(u, middle, period), v)

    return mapping


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
    return lambda u, v: apply_homography(matrix, u, v)


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
