"""Windows of pixels that are held in memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.geo.georef import Window


def reader_of(pixels: NDArray[np.uint8]) -> Callable[[Window], NDArray[np.uint8]]:
    """What gives windows (col, row, width, height) of pixels (H, W, 3)."""

    def read(window: Window) -> NDArray[np.uint8]:
        col, row, width, height = window
        return pixels[row : row + height, col : col + width]

    return read
