"""Images placed in one CRS, and the pixels of a mosaic composed from them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from archive_pipeline.flight.raster import Mask, Pixels, Raster
from archive_pipeline.geo.georef import Window
from archive_pipeline.geo.globe import ROUNDING, near
from archive_pipeline.geo.mapping import (
    crs_transformer,
    longitude_period,
    pixel_mapping,
    to_pixels,
)
from archive_pipeline.jobs._resampling import Array, catmull_rom, shrink
from archive_pipeline.outputs.paths import OutputError
from archive_pipeline.store.layout import ArchiveError
from archive_pipeline.store.tile_cache import TileCache

MAP_STEP = 16
"""Positions are computed at every 16th pixel of a block and interpolated in between."""
FAR = 1e15
EDGE_POINTS = 33
READ_BYTES = 16 << 20
"""Source pixels that one step reads at most, in each thread; larger needs are split."""
DISTANCE_BYTES = 16 << 20
"""Distances from images' centres held at a time, in each thread; a block is cut into strips."""


class PlacedImage:
    """A raster placed in the mosaic's CRS."""

    def __init__(self, raster: Raster, crs: str) -> None:
        source = raster.source
        self.raster = raster
        self.id = source.id
        self._to_pixels = to_pixels(source.georef, source.width, source.height, crs)
        period = longitude_period(crs)
        to_ground = pixel_mapping(source.georef, inverse=False)
        from_source = crs_transformer(str(source.georef.crs), crs)

        def ground(cols: Array, rows: Array) -> tuple[Array, Array]:
            return from_source.transform(*to_ground(cols, rows))

        middle = np.array([source.width / 2, source.height / 2])
        x, y = ground(
            middle[0] + np.array([0, -0.5, 0.5, 0, 0]), middle[1] + np.array([0, 0, 0, -0.5, 0.5])
        )
        if period is not None:
            x = near(x, x[0], period)
        self.centre = float(x[0]), float(y[0])
        with np.errstate(invalid="ignore"):  # places that the CRS does not have are infinite
            area = (x[2] - x[1]) * (y[4] - y[3]) - (x[4] - x[3]) * (y[2] - y[1])
        self.pitch = math.sqrt(abs(float(area)))
        self.full_pitch = self.pitch  # of the image itself, where the raster is an overview of it
        self.handicap = 0.0
        col, row, width, height = raster.window
        edge = np.linspace(0, 1, EDGE_POINTS)
        zero, one = np.zeros_like(edge), np.ones_like(edge)
        x, y = ground(
            col + width * np.concatenate([edge, one, edge, zero]),
            row + height * np.concatenate([zero, edge, one, edge]),
        )
        if period is not None:
            x = near(x, self.centre[0], period)
        self.bounds = float(x.min()), float(y.min()), float(x.max()), float(y.max())
        if not (self.pitch > 0 and np.isfinite([self.pitch, *self.bounds, *self.centre]).all()):
            raise OutputError(f"{self.id}: the image's position cannot be expressed in {crs}")

    def pixels_at(self, xs: Array, ys: Array) -> tuple[Array, Array]:
        """Return columns and rows, float64 (len(ys), len(xs)), of a grid of ground points."""
        across, left, right_share = _nodes(xs)
        down, upper, lower_share = _nodes(ys)
        x, y = np.meshgrid(across, down)
        cols, rows = self._to_pixels(x.ravel(), y.ravel())
        # A place without a position must not spoil its neighbours: zero times infinity.
        cols = np.where(np.isfinite(cols), cols, FAR).reshape(x.shape)
        rows = np.where(np.isfinite(rows), rows, FAR).reshape(x.shape)

        def spread(nodes: Array) -> Array:
            share = lower_share[:, None]
            lines = nodes[upper] * (1 - share) + nodes[upper + 1] * share
            filled: Array = lines[:, left] * (1 - right_share) + lines[:, left + 1] * right_share
            return filled

        return spread(cols), spread(rows)

    def turn_to(self, lon: float, period: float) -> None:
        """Count the longitudes of the image's place in the turn that is nearest to another's."""
        west, south, east, north = self.bounds
        x, y = self.centre
        turned = float(near(np.array(x), lon, period))
        self.centre = turned, y
        self.bounds = west + turned - x, south, east + turned - x, north
        if east - west > period * (1 - ROUNDING):  # it is everywhere
            self.bounds = lon - period / 2, south, lon + period / 2, north

    def is_near(self, xs: Array, ys: Array, size: float) -> bool:
        """Whether a grid of ground points, northern ones first, may touch the image."""
        west, south, east, north = self.bounds
        across = west <= xs[-1] + size and east >= xs[0] - size
        return bool(across and south <= ys[0] + size and north >= ys[-1] - size)

    def measure(self, xs: Array, ys: Array, distance: npt.NDArray[np.float32]) -> None:
        """Write the distance from the centre, (len(ys), len(xs)), where the window has pixels."""
        cols, rows = self.pixels_at(xs, ys)
        col, row, width, height = self.raster.window
        inside = (cols >= col) & (cols < col + width) & (rows >= row) & (rows < row + height)
        x, y = self.centre
        distance[inside] = np.hypot(xs[None] - x, ys[:, None] - y)[inside] + self.handicap


def put_coarse_last(images: list[PlacedImage]) -> None:
    """Add to the distances of coarse images more than any image's distance from its centre."""
    corners = [image.bounds for image in images] + [image.centre * 2 for image in images]
    west, south = (min(c[axis] for c in corners) for axis in (0, 1))
    east, north = (max(c[axis] for c in corners) for axis in (2, 3))
    finest = min(image.full_pitch for image in images)
    for image in images:
        octaves = round(math.log2(image.full_pitch / finest))
        image.handicap = octaves * math.hypot(east - west, north - south)


class _Unreadable(Exception):
    """An image that turned out to be damaged."""

    def __init__(self, image: PlacedImage, reason: ArchiveError) -> None:
        super().__init__(image.id)
        self.image = image
        self.reason = reason


class Composer:
    """Fills the blocks of a mosaic from placed images; blocks may be filled by many threads.

    Attributes:
        images: those that take part. One that turns out to be damaged is taken out, and blocks
            that it is in already must be filled again.
    """

    def __init__(
        self,
        images: list[PlacedImage],
        size: float,
        damaged: Callable[[Raster, Exception], None],
        tiles: TileCache | None = None,
    ) -> None:
        """Take images, the mosaic's pixel size, and what to call with each damaged image once.

        Args:
            tiles: of these images and others, decoded before; none by default.
        """
        self.images = images
        self._size = size
        self._damaged = damaged
        self._tiles = TileCache() if tiles is None else tiles
        self._lock = threading.Lock()
        put_coarse_last(images)

    def compose(
        self, xs: Array, ys: Array
    ) -> tuple[Pixels, npt.NDArray[np.bool_], set[PlacedImage]]:
        """Fill one block: pixels (rows, cols, bands), where they are valid, and whose they are.

        Args:
            xs, ys: the pixels' centres, in the mosaic's CRS.
        """
        while True:
            images = self.images
            try:
                return self._compose(images, xs, ys)
            except _Unreadable as error:
                self._take_out(error)

    def _take_out(self, error: _Unreadable) -> None:
        with self._lock:
            if error.image in self.images:
                self.images = [image for image in self.images if image is not error.image]
                self._damaged(error.image.raster, error.reason)

    def _compose(
        self, images: list[PlacedImage], xs: Array, ys: Array
    ) -> tuple[Pixels, npt.NDArray[np.bool_], set[PlacedImage]]:
        shape = len(ys), len(xs)
        if not images:
            return np.zeros((*shape, 0)), np.zeros(shape, bool), set()
        source = images[0].raster.source
        pixels = np.zeros((*shape, source.bands), source.dtype)
        valid = np.zeros(shape, bool)
        used: set[PlacedImage] = set()
        near = [image for image in images if image.is_near(xs, ys, self._size)]
        rows = max(1, DISTANCE_BYTES // max(1, 4 * len(near) * len(xs)))
        rows = rows // MAP_STEP * MAP_STEP or rows
        for top in range(0, len(ys) if near else 0, rows):
            strip = np.s_[top : top + rows]
            used |= self._fill(near, xs, ys[strip], pixels[strip], valid[strip])
        return pixels, valid, used

    def _fill(
        self,
        images: list[PlacedImage],
        xs: Array,
        ys: Array,
        pixels: Pixels,
        valid: npt.NDArray[np.bool_],
    ) -> set[PlacedImage]:
        """Fill a strip in place; returns whose pixels it holds."""
        used: set[PlacedImage] = set()
        near = [image for image in images if image.is_near(xs, ys, self._size)]
        distance = np.full((len(near), len(ys), len(xs)), np.inf, np.float32)
        for layer, image in zip(distance, near, strict=True):
            image.measure(xs, ys, layer)
        # The nearest image may have a hole there; then the next one's turn comes.
        while near:
            open_ = ~valid & np.isfinite(distance.min(axis=0))
            winner = np.where(open_, distance.argmin(axis=0), -1)
            present = np.unique(winner[open_])
            if not present.size:
                break
            for index in present:
                image = near[index]
                at = np.nonzero(winner == index)
                distance[index][at] = np.inf
                cols, rows = image.pixels_at(xs, ys)
                values, good = _sample(image, self._tiles, cols[at], rows[at], self._size)
                at = at[0][good], at[1][good]
                pixels[at] = values[good]
                valid[at] = True
                if good.any():
                    used.add(image)
        return used


def _nodes(values: Array) -> tuple[Array, npt.NDArray[np.intp], Array]:
    """Every 16th of equally spaced values; for all of them the one before, and the next's share."""
    count = -(-max(len(values) - 1, 1) // MAP_STEP) + 1
    step = values[1] - values[0] if len(values) > 1 else 0.0
    position = np.arange(len(values)) / MAP_STEP
    before = np.minimum(position.astype(np.intp), count - 2)
    return values[0] + step * MAP_STEP * np.arange(count), before, position - before


def _sample(
    image: PlacedImage, tiles: TileCache, cols: Array, rows: Array, size: float
) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """Interpolate an image at n positions: pixels (n, bands) and whether they are valid."""
    raster = image.raster
    source = raster.source
    # Of an image that is smaller than a pixel of the mosaic the mean is all there is.
    factor = min(max(1, int(size / image.pitch + 1e-6)), max(raster.window[2:]))
    margin = 3 * factor
    col, row, width, height = raster.window
    c0, c1 = max(col, int(cols.min()) - margin), min(col + width, int(cols.max()) + margin + 1)
    r0, r1 = max(row, int(rows.min()) - margin), min(row + height, int(rows.max()) + margin + 1)
    cost = (c1 - c0) * (r1 - r0) * source.bands * np.dtype(source.dtype).itemsize
    if cost > READ_BYTES and len(cols) > 1:
        along = cols if np.ptp(cols) >= np.ptp(rows) else rows
        first = along <= np.median(along)
        if first.all():
            first = along < along.max()
        if first.any():
            pixels = np.empty((len(cols), source.bands), source.dtype)
            valid = np.empty(len(cols), bool)
            for part in (first, ~first):
                pixels[part], valid[part] = _sample(image, tiles, cols[part], rows[part], size)
            return pixels, valid
    read, mask = _read(image, tiles, (c0, r0, c1 - c0, r1 - r0))
    # float32 holds every level of 8- and 16-bit types.
    exact = (
        np.float32 if np.dtype(source.dtype).itemsize <= 2 or source.dtype == "float32" else None
    )
    values = read.astype(exact or np.float64)
    known = np.isfinite(values).all(axis=2)
    if mask is not None:
        known &= mask != 0
    if factor > 1:
        values, known = shrink(values, known, factor)
    result, good = catmull_rom(
        values, known, (cols - c0) / factor - 0.5, (rows - r0) / factor - 0.5
    )
    if np.dtype(source.dtype).kind in "iu":
        info = np.iinfo(source.dtype)
        result = np.clip(np.rint(result), info.min, info.max)
    return result.astype(source.dtype).T, good


def _read(image: PlacedImage, tiles: TileCache, window: Window) -> tuple[Pixels, Mask | None]:
    try:
        return tiles.read(image.raster, window)
    except ArchiveError as error:
        raise _Unreadable(image, error) from error
