"""Images of any kind as 8-bit RGB to look at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.flight.raster import Mask, Pixels, Raster
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.geo.georef import Window
from archive_pipeline.outputs.paths import OutputError
from archive_pipeline.store.tile_cache import TileCache

LOW, HIGH = 2, 98  # percentiles that are black and white
SAMPLES = 4  # blocks that levels are taken from


@dataclass(frozen=True)
class Shown:
    """A raster's pixels as 8-bit RGB, its mask as it is.

    8-bit grey and RGB are shown as they are, palettes by their colours; of more than three bands
    the first three. Other types are stretched between `levels`, those of all the image.

    Args:
        raster: the pixels.
        levels: what is black and what is white, of types that are not 8-bit; see `levels_of`.
    """

    raster: Raster
    levels: tuple[float, float] | None = None

    @cached_property
    def source(self) -> SourceImage:
        return replace(
            self.raster.source,
            bands=3,
            dtype="uint8",
            colorinterp=("red", "green", "blue"),
            colormap=None,
            nodata=None,
            layout={},
        )

    @property
    def window(self) -> Window:
        return self.raster.window

    @property
    def block(self) -> tuple[int, int]:
        return self.raster.block

    @property
    def decoder(self) -> str:
        return self.raster.decoder

    def read(self, window: Window) -> NDArray[np.uint8]:
        """Pixels (height, width, 3) of a window (col, row, width, height)."""
        pixels, source = self.raster.read(window), self.raster.source
        if source.colormap is not None:
            colours = np.zeros((1 << 16, 3), np.uint8)
            colours[: len(source.colormap)] = np.array(source.colormap, np.uint8)[:, :3]
            return colours[pixels[..., 0]]
        pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1]
        if self.levels is not None:
            low, high = self.levels
            with np.errstate(invalid="ignore"):
                scaled = (pixels.astype(np.float32) - low) * (255 / max(high - low, 1e-30))
            pixels = np.nan_to_num(np.clip(np.rint(scaled), 0, 255)).astype(np.uint8)
        if source.white_is_zero:
            pixels = 255 - pixels
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))

    def read_mask(self, window: Window) -> Mask | None:
        return self.raster.read_mask(window)


@dataclass(frozen=True)
class KeptRaster:
    """A window of a raster whose tiles are kept for the next one that needs them."""

    raster: Raster
    window: Window
    tiles: TileCache

    @property
    def source(self) -> SourceImage:
        return self.raster.source

    @property
    def block(self) -> tuple[int, int]:
        return self.raster.block

    @property
    def decoder(self) -> str:
        return self.raster.decoder

    def read(self, window: Window) -> Pixels:
        return self.tiles.read(self.raster, window)[0]

    def read_mask(self, window: Window) -> Mask | None:
        return self.tiles.read(self.raster, window)[1]


def check_shown(source: SourceImage) -> None:
    """Refuse pixels that are no picture.

    Raises:
        OutputError: they are complex numbers.
    """
    if np.dtype(source.dtype).kind not in "uifb":
        raise OutputError(f"{source.id}: {source.dtype} pixels are no picture")


def levels_of(raster: Raster) -> tuple[float, float] | None:
    """Which values are black and white, of types that are not 8-bit: percentiles of a few blocks.

    Raises:
        ArchiveError: blocks are damaged.
    """
    source = raster.source
    if source.dtype == "uint8" or source.colormap is not None:
        return None
    across, down = raster.block
    col, row, width, height = raster.window
    values: list[NDArray[Any]] = []
    for n in range(SAMPLES):  # along a diagonal
        c = col + (width - 1) * (2 * n + 1) // (2 * SAMPLES) // across * across
        r = row + (height - 1) * (2 * n + 1) // (2 * SAMPLES) // down * down
        c, r = max(c, col), max(r, row)
        area = c, r, min(across, col + width - c), min(down, row + height - r)
        pixels, mask = raster.read(area)[..., :3].astype(np.float64), raster.read_mask(area)
        known = np.isfinite(pixels).all(axis=2)
        known &= True if mask is None else mask != 0
        values.append(pixels[known].ravel())
    flat = np.concatenate(values)
    if not flat.size:
        return 0.0, 1.0
    low, high = np.percentile(flat, [LOW, HIGH])
    return float(low), float(high)
