"""The pixels of one source file, window by window, decoded once."""

from __future__ import annotations

import math
import shutil
import tempfile
from typing import Any, Self

import numpy as np
import rasterio
from numpy.typing import NDArray

from archive_pipeline.flight.read import open_dataset, read_pixels, read_window
from archive_pipeline.flight.source_image import SourceError, SourceImage
from archive_pipeline.geo.georef import Window
from archive_pipeline.stages import stage

HELD_BYTES = 400 << 20  # of decoded pixels in memory; as much as the largest shard
TILE_SIDE = 2432  # pixels; larger blocks are decoded several times by windows that cut them
CHUNK_BYTES = 32 << 20  # decoded at a time: GDAL's cache holds it, so no band decodes it again


class SourcePixels:
    """Reads windows of a source file; a context manager, which frees what it holds.

    A small image is decoded once and held in memory, up to 400 MiB. A larger one that cannot be
    decoded from any place (a JPEG, a PNG, strips) is decoded once from top to bottom, as far as
    windows ask, into a temporary file. One of tiles is read where a window needs it, and so is one
    that is larger than half the room for temporary files.
    """

    def __init__(self, source: SourceImage) -> None:
        self.source = source
        self._whole: tuple[NDArray[Any], NDArray[np.uint8] | None] | None = None
        self._dataset: rasterio.DatasetReader | None = None  # while it is decoded into files
        self._planes: list[_Plane] | None = None  # these: pixels, and the mask where there is one
        self._rows = 0  # that are decoded into them
        self._step = 1  # rows that are decoded at a time

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()
        for plane in self._planes or ():
            plane.file.close()
        self._planes = self._whole = None

    def _close(self) -> None:
        """Close the dataset, which frees GDAL's cache of it."""
        if self._dataset is not None:
            self._dataset.close()
            self._dataset = None

    @property
    def held(self) -> bool:
        """Whether windows may be read again and again: no pixel is decoded twice.

        Raises:
            SourceError: the file is gone or damaged.
        """
        return self._in_memory or bool(self._files())

    @stage("read")
    def read(self, window: Window) -> tuple[NDArray[Any], NDArray[np.uint8] | None]:
        """Pixels and mask of a window (col, row, width, height), as `read_pixels` gives them.

        They may be views of what is held, not to be changed.

        Raises:
            SourceError: the file is gone or damaged, or there is no room for what it holds.
        """
        if self._in_memory:
            if self._whole is None:
                self._whole = read_pixels(self.source)
            pixels, mask = self._whole
            area = _area(window)
            return pixels[area], None if mask is None else mask[area]
        planes = self._files()
        if not planes:
            return read_pixels(self.source, window)
        self._decode(planes, window[1] + window[3])
        found = [plane.read(window) for plane in planes]
        return found[0], found[1] if len(found) > 1 else None

    def _files(self) -> list[_Plane]:
        """The files that a large image is decoded into; none where windows are read from it."""
        if self._planes is None:
            self._planes = []
            self._dataset = open_dataset(self.source)
            rows, cols = self._dataset.block_shapes[0]
            tiled = cols < self.source.width and max(rows, cols) <= TILE_SIDE
            if not tiled and self._row_bytes * self.source.height <= _room():
                self._planes = [_Plane(*kind) for kind in self._kinds]
                most = max(1, CHUNK_BYTES // self._row_bytes)
                self._step = most - most % rows or most
            else:
                self._close()
        return self._planes

    @property
    def _kinds(self) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shapes and types of the pixels and of the mask, where there is one."""
        source = self.source
        shape = (source.height, source.width)
        pixels = ((*shape, source.bands), np.dtype(source.dtype))
        return [pixels] if source.mask == "none" else [pixels, (shape, np.dtype(np.uint8))]

    @property
    def _row_bytes(self) -> int:
        return sum(math.prod(shape[1:]) * dtype.itemsize for shape, dtype in self._kinds)

    @property
    def _in_memory(self) -> bool:
        return self._row_bytes * self.source.height <= HELD_BYTES

    def _decode(self, planes: list[_Plane], until: int) -> None:
        """Decode what is not decoded yet of the rows up to `until`."""
        while self._rows < until:
            assert self._dataset is not None
            height = min(self._step, self.source.height - self._rows)
            window = (0, self._rows, self.source.width, height)
            parts = read_window(self._dataset, self.source, window)
            try:
                for plane, part in zip(planes, parts, strict=False):  # perhaps no mask
                    plane.file.write(np.ascontiguousarray(part).data)
                    plane.file.flush()
            except OSError as error:
                reason = f"its pixels do not fit into {tempfile.gettempdir()}: {error.strerror}"
                raise SourceError(self.source.path, reason) from error
            self._rows += height
            if self._rows == self.source.height:
                self._close()


class _Plane:
    """An array (height, width[, bands]) in a temporary file, written from the top."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape = shape
        self.dtype = dtype
        self.file = tempfile.TemporaryFile(prefix="archive-pixels-")  # noqa: SIM115  closed by its owner

    def read(self, window: Window) -> NDArray[Any]:
        """A copy of a window of the rows that are there."""
        # mapped anew for each window: pages that stayed mapped would count as memory in use
        rows = (window[1] + window[3], *self.shape[1:])
        return np.array(np.memmap(self.file, self.dtype, "r", shape=rows)[_area(window)])


def _area(window: Window) -> tuple[slice, slice]:
    col, row, width, height = window
    return slice(row, row + height), slice(col, col + width)


def _room() -> int:
    """Bytes that temporary files of one image may take: half of what is free."""
    try:
        return shutil.disk_usage(tempfile.gettempdir()).free // 2
    except OSError:
        return 0
