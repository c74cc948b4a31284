"""Pixels of one image that somebody writes, resamples or keeps: what all of them rely on."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.geo.georef import Window

Pixels = npt.NDArray[Any]
Mask = npt.NDArray[np.uint8]


class Raster(Protocol):
    """Pixels to be written: a window of one archived image."""

    @property
    def source(self) -> SourceImage:
        """The image's source record."""
        ...

    @property
    def window(self) -> Window:
        """``(col, row, width, height)`` to write, inside the image."""
        ...

    @property
    def block(self) -> tuple[int, int]:
        """``(width, height)`` of the image's tiles.

        Reads follow this grid, which starts at the image's first pixel, so that no tile is decoded
        more often than necessary.
        """
        ...

    @property
    def decoder(self) -> str:
        """What made the pixels, for people: a codec, its model and settings."""
        ...

    def read(self, window: Window) -> Pixels:
        """Return the pixels of a window of the image, ``source.dtype`` (height, width, bands)."""
        ...

    def read_mask(self, window: Window) -> Mask | None:
        """Return alpha or validity, uint8 (height, width), 0 is invalid; ``None``: all valid."""
        ...
