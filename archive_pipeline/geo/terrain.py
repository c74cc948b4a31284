"""The ground as a raster of heights: how high a camera is above it, and where its rays meet it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import rasterio
from pyproj import CRS, Geod, Transformer
from pyproj.exceptions import CRSError, ProjError
from rasterio.errors import RasterioError
from rasterio.windows import Window

from archive_pipeline.errors import UsageError
from archive_pipeline.geo.pose import CameraPose

Array = npt.NDArray[np.float64]

WGS84 = Geod(ellps="WGS84")
# Heights in EXIF are above the sea, that is EGM96, unless the tags say: above the ellipsoid.
SEA, ELLIPSOID = "EPSG:4326+5773", "EPSG:4979"
FIXED_RTK = ("16", "50")  # DJI's RtkFlag: single, fixed
FARTHEST = 8.0  # heights above ground that a ray is followed down below the camera's ground
BLOCK = 512  # pixels a side that are read at a time
STEPS = 400  # on a ray, before the place between two of them is found
HALVINGS = 30


@dataclass(frozen=True)
class Terrain:
    """A raster of heights, any that GDAL opens, in its own CRS and vertical datum.

    Attributes:
        path: of the raster.
    """

    path: str

    def height(self, lon: Array, lat: Array) -> Array:
        """Heights of the ground, float64 of the same shape, bilinear; NaN outside and at nodata."""
        heights, transform, transformer = _loaded(self.path)
        x, y = transformer.transform(lon, lat)
        a, b, c, d, e, f, *_ = ~transform
        x, y = np.asarray(x), np.asarray(y)
        return _bilinear(heights, d * x + e * y + f - 0.5, a * x + b * y + c - 0.5)

    def reaches(self, camera: CameraPose) -> bool:
        """Whether there is a height below a camera."""
        return not math.isnan(self._below(camera))

    def trusts(self, camera: CameraPose) -> bool:
        """Whether a camera's absolute height is better than that above its take-off."""
        return camera.altitude_gps_m is not None and camera.survey.get("RtkFlag") in FIXED_RTK

    def above_ground(self, camera: CameraPose) -> float | None:
        """Height above the ground below a camera by its absolute height; ``None``: not known."""
        ground = self._below(camera)
        if camera.altitude_gps_m is None or math.isnan(ground):
            return None
        kind = camera.survey.get("AltitudeType", "") + camera.survey.get("GPSAltitudeRef", "")
        datum = ELLIPSOID if "Rtk" in kind or "ellipsoid" in kind else SEA
        return _to_datum(self.path, datum, camera) - ground

    def meet(
        self, camera: CameraPose, above_ground: float, rays: Array
    ) -> tuple[Array, Array, Array]:
        """Where rays meet the ground.

        Args:
            camera: the pose.
            above_ground: its height above the ground below it.
            rays: float64 (n, 3) in east, north, up, all of which go down.

        Returns:
            Longitudes, latitudes and heights in the raster's datum, float64 (n,) each. Where the
            raster has no heights, the ground is as high as below the camera.
        """
        base = self._below(camera)
        base = 0.0 if math.isnan(base) else base
        down = rays / -rays[:, 2:]

        def ground(depth: Array) -> tuple[Array, Array, Array]:
            east, north = down[:, 0] * depth, down[:, 1] * depth
            azimuth, distance = np.degrees(np.arctan2(east, north)), np.hypot(east, north)
            start = np.full(len(depth), camera.lon), np.full(len(depth), camera.lat)
            lon, lat, _ = WGS84.fwd(*start, azimuth, distance)
            heights = self.height(lon, lat)
            return lon, lat, np.where(np.isnan(heights), base, heights)

        top = base + above_ground
        low, high = np.zeros(len(down)), np.full(len(down), above_ground * FARTHEST)
        found = np.zeros(len(down), bool)
        for depth in np.linspace(0.0, above_ground * FARTHEST, STEPS)[1:]:
            under = ~found & (top - depth <= ground(np.full(len(down), depth))[2])
            high[under] = depth
            found |= under
            low[~found] = depth
            if found.all():
                break
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            under = top - middle <= ground(middle)[2]
            high, low = np.where(under, middle, high), np.where(under, low, middle)
        return ground(high)

    def _below(self, camera: CameraPose) -> float:
        return float(self.height(np.array([camera.lon]), np.array([camera.lat]))[0])


def check_dem(path: str) -> None:
    """Raise `UsageError`, one line, unless a file can be a `Terrain`."""
    try:
        _loaded(path)
    except (RasterioError, CRSError, ProjError, ValueError) as error:
        raise UsageError(f"--dem {path}: {' '.join(str(error).split())}") from error


@lru_cache(maxsize=2)
def _loaded(path: str) -> tuple[_Heights, rasterio.Affine, Transformer]:
    with rasterio.open(path) as dataset:
        if not dataset.crs:
            raise ValueError("it has no coordinate reference system")
        if dataset.transform.is_identity:
            raise ValueError("it has no georeference")
        crs = CRS.from_wkt(dataset.crs.to_wkt())
        flat = crs.sub_crs_list[0] if crs.is_compound else crs
        transformer = Transformer.from_crs("EPSG:4326", flat, always_xy=True)
        return _Heights(path, dataset.height, dataset.width), dataset.transform, transformer


@dataclass(frozen=True)
class _Heights:
    """Heights of a raster, read in blocks when they are asked for; NaN where there are none."""

    path: str
    rows: int
    cols: int

    def at(self, row: npt.NDArray[np.int64], col: npt.NDArray[np.int64]) -> Array:
        inside = (row >= 0) & (row < self.rows) & (col >= 0) & (col < self.cols)
        values = np.full(row.shape, np.nan)
        found = zip(row[inside] // BLOCK, col[inside] // BLOCK, strict=True)
        blocks = {(int(r), int(c)) for r, c in found}
        for r, c in blocks:
            mine = inside & (row // BLOCK == r) & (col // BLOCK == c)
            values[mine] = _block(self.path, r, c)[row[mine] - r * BLOCK, col[mine] - c * BLOCK]
        return values


@lru_cache(maxsize=64)
def _block(path: str, row: int, col: int) -> Array:
    with rasterio.open(path) as dataset:
        window = Window(col * BLOCK, row * BLOCK, BLOCK, BLOCK)
        window = window.intersection(Window(0, 0, dataset.width, dataset.height))
        return np.asarray(dataset.read(1, window=window, masked=True).astype(float).filled(np.nan))


def _bilinear(heights: _Heights, row: Array, col: Array) -> Array:
    """Heights between the centres of pixels; at the raster's edge, those of the edge."""
    known = np.isfinite(row) & np.isfinite(col)
    known &= (row > -1) & (col > -1) & (row < heights.rows) & (col < heights.cols)
    row, col = np.where(known, row, 0.0), np.where(known, col, 0.0)
    row, col = np.clip(row, 0, heights.rows - 1), np.clip(col, 0, heights.cols - 1)
    r, c = np.floor(row).astype(np.int64), np.floor(col).astype(np.int64)
    r1, c1 = np.minimum(r + 1, heights.rows - 1), np.minimum(c + 1, heights.cols - 1)
    v, u = row - r, col - c
    upper = heights.at(r, c) * (1 - u) + heights.at(r, c1) * u
    lower = heights.at(r1, c) * (1 - u) + heights.at(r1, c1) * u
    return np.where(known, upper * (1 - v) + lower * v, np.nan)


def _to_datum(path: str, datum: str, camera: CameraPose) -> float:
    """A camera's absolute height in the vertical datum of a raster, if that has one."""
    assert camera.altitude_gps_m is not None
    transformer = _vertical(path, datum)
    if transformer is None:
        return camera.altitude_gps_m
    height = transformer.transform(camera.lon, camera.lat, camera.altitude_gps_m)[2]
    return float(height) if math.isfinite(height) else camera.altitude_gps_m


@lru_cache(maxsize=8)
def _vertical(path: str, datum: str) -> Transformer | None:
    with rasterio.open(path) as dataset:
        crs = CRS.from_wkt(dataset.crs.to_wkt())
    if len(crs.axis_info) < 3:
        return None
    try:
        return Transformer.from_crs(datum, crs, always_xy=True)
    except ProjError:
        return None
