"""Archived images, whole or smaller, as `flight.raster.Raster` wants them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from archive_pipeline.errors import UsageError
from archive_pipeline.flight.raster import Mask, Pixels, Raster
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.geo.georef import Window
from archive_pipeline.geo.mapping import scaled_transform
from archive_pipeline.outputs.reduced import Reduced
from archive_pipeline.store.archived_image import ArchivedImage


@dataclass(frozen=True)
class View:
    """A window (col, row, width, height) of an archived image."""

    image: ArchivedImage
    window: Window

    @property
    def source(self) -> SourceImage:
        return self.image.source

    @property
    def block(self) -> tuple[int, int]:
        return self.image.block

    @property
    def decoder(self) -> str:
        return self.image.decoder

    def read(self, window: Window) -> Any:
        return self.image.read(window)

    def read_mask(self, window: Window) -> Any:
        return self.image.read_mask(window)


@dataclass(frozen=True)
class OverviewView:
    """A window (col, row, width, height) of an overview of an archived image.

    Args:
        factor: which of them, one of `ImageEntry.overviews`.
        window: in the overview's pixels.
    """

    image: ArchivedImage
    factor: int
    window: Window

    @cached_property
    def source(self) -> SourceImage:
        source, factor = self.image.source, self.factor
        return replace(
            source,
            width=-(-source.width // factor),
            height=-(-source.height // factor),
            georef=scaled_transform(source.georef, factor, factor),
        )

    @property
    def block(self) -> tuple[int, int]:
        return self.image.block

    @property
    def decoder(self) -> str:
        return self.image.decoder

    def read(self, window: Window) -> Pixels:
        return self.image.read_overview(self.factor, window)

    def read_mask(self, window: Window) -> Mask | None:
        """Means of the image's own mask; of one that is no alpha, valid where half of it is."""
        source, factor = self.image.source, self.factor
        col, row, width, height = (n * factor for n in window)
        area = col, row, min(width, source.width - col), min(height, source.height - row)
        mask = self.image.read_mask(area)
        if mask is None:
            return None
        means = np.asarray(Image.fromarray(mask).reduce(factor))
        return means if source.mask == "alpha" else np.where(means >= 128, 255, 0).astype(np.uint8)


def coarser(view: View, factor: float) -> View | OverviewView:
    """The smallest overview of an image that is not too small; the view itself without one.

    Args:
        factor: pixels of the image, a side, that one of the result may stand for.
    """
    fitting = [f for f in view.image.entry.overviews if f <= factor * (1 + 1e-6)]
    if not fitting:
        return view
    f = max(fitting)
    col, row, width, height = view.window
    left, top = col // f, row // f
    window = left, top, -(-(col + width) // f) - left, -(-(row + height) // f) - top
    return OverviewView(view.image, f, window)


def check_size(max_size: object) -> None:
    """Raise `UsageError` unless images can be made so small."""
    if type(max_size) is not int or max_size < 1:
        raise UsageError(f"max_size {max_size!r} is not a number of pixels")


def reduced(
    view: View, most: int, through: Callable[[View | OverviewView], Raster] = lambda raster: raster
) -> Raster:
    """A view made so small that no side has more than so many pixels; itself where it has none.

    Args:
        through: what pixels are read through, of the view or of an overview; as they are by
            default.
    """
    col, row, width, height = view.window
    factor = max(width, height) / most
    if factor <= 1:
        return through(view)
    size = max(1, round(width / factor)), max(1, round(height / factor))
    raster = coarser(view, factor)
    f = raster.factor if isinstance(raster, OverviewView) else 1
    box = col / f, row / f, (col + width) / f, (row + height) / f
    return Reduced(through(raster), box, *size)
