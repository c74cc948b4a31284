"""A camera frame's geometry as GDAL and GIS take it: rational functions instead of a polynomial.

Control points become a polynomial of second order there, however many there are, which an oblique
frame is not: it lies pixels to tens of pixels away from where it belongs. RPCs of first order are a
pinhole over flat ground exactly. GDAL goes from the ground to the image by them, which is exact,
but finds the extent of what it warps by an iteration from the image to the ground, with the scale
at one point, and that gives up on frames whose scale differs too much from one edge to the other.
Where both are in a file, GDAL takes the control points.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from rasterio.errors import TransformWarning
from rasterio.rpc import RPC
from rasterio.transform import RPCTransformer

from archive_pipeline.geo.georef import Gcp, Georef
from archive_pipeline.geo.mapping import apply_homography, crs_transformer, homography

Array = npt.NDArray[np.float64]

# Points on each edge that must be found: as many as GDAL looks at for the extent of a warp.
EDGE_STEPS = 21
# Pixels that control points may be away from a plane seen by a pinhole: rounding, no terrain.
FLAT = 0.05
# Where GDAL's iteration takes the scale from, as a share of the way from the corner that sees the
# farthest ground to that with the nearest: nearer ends too early, farther goes astray.
SCALE_AT = 0.7


def with_camera_rpcs(georef: Georef, width: int, height: int) -> Georef:
    """An oblique frame's georeference with RPCs, if GDAL can use them.

    Args:
        georef: of the frame or a window of it.
        width, height: of that, pixels.

    Returns:
        RPCs in place of the control points where GDAL's own iteration finds all edges; else control
        points in the window itself, where a polynomial through them is less far off.  The same
        georeference for frames over terrain and for all that is no camera's.
    """
    if georef.method != "camera" or not georef.gcps:
        return georef
    row, col, x, y = np.array([gcp[:4] for gcp in georef.gcps], np.float64).T
    lon, lat = crs_transformer(str(georef.crs), "EPSG:4326").transform(x, y)
    pixels = np.column_stack([col, row])
    if np.ptp(lon) > 180.0:  # across the antimeridian
        return georef
    to_ground = homography(pixels, np.column_stack([lon, lat]))
    to_image: Array = np.asarray(np.linalg.inv(to_ground), np.float64)
    back = apply_homography(to_image, lon, lat)
    if np.hypot(back[0] - col, back[1] - row).max() > FLAT:
        return georef
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], float)
    rpcs = _rpcs(to_ground, corners)
    if _finds_edges(rpcs, width, height):
        return replace(georef, crs="EPSG:4326", gcps=(), rpcs=rpcs)
    return replace(georef, gcps=_points(homography(pixels, np.column_stack([x, y])), corners))


def _points(to_map: Array, corners: Array) -> tuple[Gcp, ...]:
    """Control points all over an image, as `camera.locate` gives them."""
    steps = np.linspace(0.0, 1.0, 4)
    cols, rows = np.tile(steps * corners[2, 0], 4), np.repeat(steps * corners[2, 1], 4)
    x, y = apply_homography(to_map, cols, rows)
    return tuple(
        (float(r), float(c), float(gx), float(gy), 0.0, str(n + 1), "")
        for n, (r, c, gx, gy) in enumerate(zip(rows, cols, x, y, strict=True))
    )


def _rpcs(to_ground: Array, corners: Array) -> dict[str, str]:
    """GDAL's items for a map from pixels to degrees, all heights alike."""
    width, height = corners[2]
    nearness = np.abs((to_ground @ np.column_stack([corners, np.ones(4)]).T)[2])
    far, near = corners[np.argmin(nearness)], corners[np.argmax(nearness)]
    lon, lat = map(float, apply_homography(to_ground, *(far + SCALE_AT * (near - far))))
    ground = np.column_stack(apply_homography(to_ground, *corners.T))
    lon_scale, lat_scale = (float(v) for v in np.abs(ground - (lon, lat)).max(axis=0))
    half = float(width / 2), float(height / 2)
    scaled_ground = np.array([[lon_scale, 0.0, lon], [0.0, lat_scale, lat], [0.0, 0.0, 1.0]])
    scaled_image = np.array([[half[0], 0.0, half[0]], [0.0, half[1], half[1]], [0.0, 0.0, 1.0]])
    matrix = np.linalg.inv(scaled_image) @ np.linalg.inv(to_ground) @ scaled_ground
    matrix /= matrix[2, 2]

    def terms(numbers: Array) -> str:
        # constant, longitude, latitude, height, and 16 of higher orders
        values = [float(numbers[2]), float(numbers[0]), float(numbers[1])]
        return " ".join(map(repr, values)) + " 0" * 17

    offsets = {"LONG": (lon, lon_scale), "LAT": (lat, lat_scale), "HEIGHT": (0.0, 1.0)}
    # GDAL counts pixels of RPCs from the middle of the first
    offsets |= {"SAMP": (half[0] - 0.5, half[0]), "LINE": (half[1] - 0.5, half[1])}
    items: dict[str, str] = {}
    for name, (offset, scale) in offsets.items():
        items |= {f"{name}_OFF": repr(offset), f"{name}_SCALE": repr(scale)}
    return items | {
        "SAMP_NUM_COEFF": terms(matrix[0]),
        "SAMP_DEN_COEFF": terms(matrix[2]),
        "LINE_NUM_COEFF": terms(matrix[1]),
        "LINE_DEN_COEFF": terms(matrix[2]),
    }


def _finds_edges(rpcs: dict[str, str], width: int, height: int) -> bool:
    """Whether GDAL finds the ground of all edges, as it does before it warps."""
    steps = np.linspace(0.0, 1.0, EDGE_STEPS)
    zero, one = np.zeros(EDGE_STEPS), np.ones(EDGE_STEPS)
    cols = np.concatenate([steps, steps, zero, one]) * width
    rows = np.concatenate([zero, one, steps, steps]) * height
    with warnings.catch_warnings(), RPCTransformer(RPC.from_gdal(rpcs)) as transformer:
        warnings.simplefilter("ignore", TransformWarning)  # of points that are not found
        lon, lat = transformer.xy(list(rows), list(cols), offset="ul")
    return bool(np.isfinite(lon).all() and np.isfinite(lat).all())
