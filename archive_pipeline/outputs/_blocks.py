"""A raster's pixels block by block: what is read and written at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rasterio.io import DatasetWriter
from rasterio.windows import Window as RasterioWindow

from archive_pipeline.flight.raster import Pixels, Raster
from archive_pipeline.geo.georef import Window

COG_BLOCK = 512  # pixels a side
LEAST_BLOCK = 64
BLOCK_BYTES = 16 << 20
"""Of all bands of a block, which GDAL holds at once: many bands have smaller blocks."""
WRITE_BYTES = 64 << 20
"""Written at a time, so that GDAL's cache holds all blocks until they are full."""
READ_PIXELS = 1 << 23
READ_BYTES = 64 << 20
"""No single `Raster.read` asks for more than these, unless one block alone is larger."""


def read_windows(raster: Raster) -> Iterator[Window]:
    """Cut a raster's window into reads that follow its tile grid, row by row or several at once.

    Args:
        raster: the raster.

    Yields:
        ``(col, row, width, height)`` in image pixels, each a run of whole tiles (cut at the
        window's edge) of at most `READ_PIXELS` and `READ_BYTES`, or one tile. Rows of few tiles are
        read together, up to half of that: the tiles of a small window are decoded at once.
    """
    col, row, width, height = raster.window
    block_width, block_height = raster.block
    pixel = raster.source.bands * np.dtype(raster.source.dtype).itemsize
    most = min(READ_PIXELS, READ_BYTES // pixel)
    run = max(1, most // (block_width * block_height)) * block_width
    across = -(-(col % block_width + width) // block_width) * block_width
    rows = max(1, most // 2 // (across * block_height)) * block_height
    for top, bottom in _cuts(row, row + height, block_height, rows):
        for left, right in _cuts(col, col + width, block_width, run):
            yield left, top, right - left, bottom - top


def block_side(bands: int, dtype: str) -> int:
    """Pixels a side of a file's blocks."""
    side = COG_BLOCK
    while side > LEAST_BLOCK and side * side * bands * np.dtype(dtype).itemsize > BLOCK_BYTES:
        side //= 2
    return side


def write_parts(
    stage: DatasetWriter, pixels: Pixels, bands: list[int], window: RasterioWindow
) -> None:
    """Write pixels (bands, height, width) by rows of blocks, not more than the cache holds."""
    rows, cols = stage.block_shapes[0]
    top, left = window.row_off, window.col_off
    step = max(rows, WRITE_BYTES // max(1, pixels.nbytes // window.height) // rows * rows)
    for start, stop in _cuts(top, top + window.height, rows, step):
        run = max(cols, WRITE_BYTES // (len(bands) * pixels.itemsize * (stop - start)))
        for first, last in _cuts(left, left + window.width, cols, run // cols * cols):
            part = pixels[:, start - top : stop - top, first - left : last - left]
            stage.write(
                part, bands, window=RasterioWindow(first, start, last - first, stop - start)
            )


def _cuts(start: int, stop: int, grid: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut ``[start, stop)`` at ``step`` after the last multiple of ``grid``, again and again."""
    while start < stop:
        end = min(stop, start // grid * grid + step)
        yield start, end
        start = end
