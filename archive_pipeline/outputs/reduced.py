"""A raster made smaller on its way into a file."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from archive_pipeline.flight.raster import Mask, Pixels, Raster
from archive_pipeline.geo.georef import Window
from archive_pipeline.geo.mapping import scaled_transform, window_transform
from archive_pipeline.outputs._documents import of_size, without_statistics
from archive_pipeline.outputs.paths import OutputError

BLOCK = 512  # pixels a side
READ_PIXELS = 40_000_000  # of the raster at a time: a frame at once
ROUNDING = 1e-6  # pixels
LEAST_SHARE = 1e-6  # of a pixel that is valid, where sums of floats are not exact

Box = tuple[float, float, float, float]


class Reduced:
    """Part of a raster with fewer pixels, each a mean of the valid ones that it stands for.

    A `flight.raster.Raster`, of an image that is as large as it is. Pixels of a palette are picked,
    not averaged. EXIF gives the new size; lens and focal plane still refer to the whole frame.

    Args:
        raster: the pixels.
        box: left, top, right, bottom of the part in the raster's pixels, edges of which may cut
            some.
        width, height: of the result, not more than the box's.

    Raises:
        OutputError: the pixels are complex numbers.
    """

    def __init__(self, raster: Raster, box: Box, width: int, height: int) -> None:
        source = raster.source
        if np.dtype(source.dtype).kind == "c":
            raise OutputError(f"{source.id}: {source.dtype} pixels cannot be made smaller")
        self._raster = raster
        self._box = box
        left, top, right, bottom = box
        self._across, self._down = (right - left) / width, (bottom - top) / height
        numbers = left, top, self._across, self._down
        self._exact = all(abs(n - round(n)) < ROUNDING for n in numbers)
        moved = window_transform(source.georef, (left, top, right - left, bottom - top))
        self.source = replace(
            source,
            width=width,
            height=height,
            georef=scaled_transform(moved, self._across, self._down),
            metadata=of_size(source.metadata, width, height),
            tags=without_statistics(source.tags),
            band_tags=tuple(map(without_statistics, source.band_tags)),
        )
        self.window: Window = (0, 0, width, height)
        self.block = (BLOCK, BLOCK)
        self.decoder = raster.decoder
        self._last: tuple[Window, Pixels, Mask | None] | None = None

    def read(self, window: Window) -> Pixels:
        """Pixels of a window (col, row, width, height), `source.dtype` (height, width, bands)."""
        return self._of(window)[0]

    def read_mask(self, window: Window) -> Mask | None:
        """Alpha or validity of a window, uint8 (height, width); None: all valid."""
        return self._of(window)[1]

    def _of(self, window: Window) -> tuple[Pixels, Mask | None]:
        """Both, which writers ask for one after the other."""
        if self._last is None or self._last[0] != window:
            self._last = (window, *self._made(window))
        return self._last[1:]

    def _made(self, window: Window) -> tuple[Pixels, Mask | None]:
        col, row, width, height = window
        step = max(1, int(READ_PIXELS / (width * self._across * self._down)))
        parts = [
            self._strip((col, top, width, min(step, row + height - top)))
            for top in range(row, row + height, step)
        ]
        masks = [mask for _, mask in parts if mask is not None]
        pixels = np.concatenate([pixels for pixels, _ in parts])
        return pixels, np.concatenate(masks) if masks else None

    def _strip(self, window: Window) -> tuple[Pixels, Mask | None]:
        col, row, width, height = window
        left, top = self._box[0] + col * self._across, self._box[1] + row * self._down
        right, bottom = left + width * self._across, top + height * self._down
        # means that are not exact reach as far as the next ones' centres
        beside, below = (0, 0) if self._exact else map(math.ceil, (self._across, self._down))
        c, r, w, h = self._raster.window
        c0, c1 = max(c, math.floor(left + ROUNDING) - beside), math.ceil(right - ROUNDING) + beside
        r0, r1 = max(r, math.floor(top + ROUNDING) - below), math.ceil(bottom - ROUNDING) + below
        area = c0, r0, min(c + w, c1) - c0, min(r + h, r1) - r0
        pixels, mask = self._raster.read(area), self._raster.read_mask(area)
        box = max(0.0, left - c0), max(0.0, top - r0), right - c0, bottom - r0
        box = *box[:2], min(box[2], area[2]), min(box[3], area[3])
        size = width, height
        if self.source.colormap is not None:
            at = _centres(box, size)
            return pixels[at], None if mask is None else mask[at]
        if mask is None:
            return self._mean(pixels, size, box), None
        known = mask[..., None] != 0
        share = self._mean(known.astype(np.float32), size, box)
        total = self._mean(np.where(known, pixels, 0).astype(np.float32), size, box)
        means = np.where(share > LEAST_SHARE, total / np.maximum(share, LEAST_SHARE), 0)
        if self.source.mask == "alpha":
            return _typed(means, pixels.dtype), self._mean(mask[..., None], size, box)[..., 0]
        valid = share[..., 0] >= 0.5
        if self.source.mask == "nodata" and self.source.nodata is not None:
            means[~valid] = self.source.nodata
        return _typed(means, pixels.dtype), np.where(valid, 255, 0).astype(np.uint8)

    def _mean(self, pixels: Pixels, size: tuple[int, int], box: Box) -> Pixels:
        """Means (height, width, bands) of the pixels in a box."""
        # Pillow's box filter counts pixels whole: it is right where they are not cut
        kind = Image.Resampling.BOX if self._exact else Image.Resampling.BILINEAR
        is_byte = pixels.dtype == np.uint8
        planes = np.moveaxis(pixels if is_byte else pixels.astype(np.float32), 2, 0)
        pictures = (Image.fromarray(np.ascontiguousarray(plane)) for plane in planes)
        made = [np.asarray(picture.resize(size, kind, box)) for picture in pictures]
        return _typed(np.stack(made, axis=2), pixels.dtype)


def _centres(box: Box, size: tuple[int, int]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Index of the pixels at the centres of those that are made."""
    left, top, right, bottom = box
    cols = left + (np.arange(size[0]) + 0.5) * (right - left) / size[0]
    rows = top + (np.arange(size[1]) + 0.5) * (bottom - top) / size[1]
    return rows.astype(np.intp)[:, None], cols.astype(np.intp)[None, :]


def _typed(values: Pixels, dtype: np.dtype) -> Pixels:
    """The same numbers, rounded where the type has whole ones."""
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        values = np.clip(np.rint(values), info.min, info.max)
    return values.astype(dtype)
