"""Tiles of several rasters, decoded once however many windows need them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np

from archive_pipeline.flight.raster import Mask, Pixels, Raster
from archive_pipeline.geo.georef import Window

CACHE_BYTES = 256 << 20
FETCHING = 16  # images, about, that are read at a time

Place = tuple[int, int]
Tile = tuple[Pixels, Mask | None]
Key = tuple[Raster, Place]


class TileCache:
    """Decoded tiles of all images, the least recently used ones dropped first.

    One thread reads tiles of an image at a time, so that none is decoded twice; the decoder uses
    all cores by itself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fetching = [threading.Lock() for _ in range(FETCHING)]
        self._kept: OrderedDict[Key, Tile] = OrderedDict()
        self._bytes = 0

    def read(self, raster: Raster, window: Window) -> Tile:
        """Read a window inside ``raster.window``; tiles not in store come by one read.

        Rasters that are equal share their tiles.
        """
        col, row, width, height = window
        across, down = raster.block
        needed = {
            (tx, ty)
            for ty in range(row // down, (row + height - 1) // down + 1)
            for tx in range(col // across, (col + width - 1) // across + 1)
        }
        held = self._held(raster, needed)
        if len(held) < len(needed):
            with self._fetching[hash(raster) % FETCHING]:
                held = self._held(raster, needed)  # another thread may have read them
                missing = needed - held.keys()
                if missing:
                    held.update(self._fetch(raster, missing))
                self._keep(raster, held)
        source = raster.source
        pixels = np.empty((height, width, source.bands), source.dtype)
        mask: Mask | None = None
        for (tx, ty), (tile, tile_mask) in held.items():
            left, top, _, _ = _clip(raster, tx, ty, tx, ty)
            h, w = tile.shape[:2]
            c0, c1 = max(left, col), min(left + w, col + width)
            r0, r1 = max(top, row), min(top + h, row + height)
            there = np.s_[r0 - row : r1 - row, c0 - col : c1 - col]
            here = np.s_[r0 - top : r1 - top, c0 - left : c1 - left]
            pixels[there] = tile[here]
            if tile_mask is not None:
                mask = np.full((height, width), 255, np.uint8) if mask is None else mask
                mask[there] = tile_mask[here]
        return pixels, mask

    def _held(self, raster: Raster, needed: set[Place]) -> dict[Place, Tile]:
        """Those of a raster's tiles that are in store."""
        held = {}
        with self._lock:
            for place in needed:
                # Not the image's id: another flight may have the same.
                tile = self._kept.get((raster, place))
                if tile is not None:
                    self._kept.move_to_end((raster, place))
                    held[place] = tile
        return held

    def _fetch(self, raster: Raster, keys: set[tuple[int, int]]) -> Iterator[tuple[Place, Tile]]:
        for left, top, right, bottom in _rectangles(keys):
            area = _clip(raster, left, top, right, bottom)
            pixels, mask = raster.read(area), raster.read_mask(area)
            for ty in range(top, bottom + 1):
                for tx in range(left, right + 1):
                    c, r, width, height = _clip(raster, tx, ty, tx, ty)
                    c, r = c - area[0], r - area[1]
                    here = np.s_[r : r + height, c : c + width]
                    cut = None if mask is None else mask[here].copy()
                    yield (tx, ty), (pixels[here].copy(), cut)

    def _keep(self, raster: Raster, tiles: dict[Place, Tile]) -> None:
        with self._lock:
            for place, tile in tiles.items():
                if (raster, place) not in self._kept:
                    self._kept[raster, place] = tile
                    self._bytes += _size(tile)
            while self._bytes > CACHE_BYTES and len(self._kept) > 1:
                self._bytes -= _size(self._kept.popitem(last=False)[1])


def _size(tile: Tile) -> int:
    pixels, mask = tile
    return int(pixels.nbytes) + (0 if mask is None else mask.nbytes)


def _rectangles(keys: set[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """Cut a set of (column, row) into few rectangles (left, top, right, bottom), ends included."""
    found: list[tuple[int, int, int, int]] = []
    growing: dict[tuple[int, int], int] = {}
    last = 0
    for row in sorted({row for _, row in keys}):
        columns = sorted(column for column, r in keys if r == row)
        breaks = [n for n in range(1, len(columns)) if columns[n] != columns[n - 1] + 1]
        runs: dict[tuple[int, int], int] = {}
        for start, stop in zip([0, *breaks], [*breaks, len(columns)], strict=True):
            run = columns[start], columns[stop - 1]
            # A run right below the same run makes its rectangle taller.
            runs[run] = growing.pop(run) if run in growing and row == last + 1 else row
        found += [(left, top, right, last) for (left, right), top in growing.items()]
        growing, last = runs, row
    return found + [(left, top, right, last) for (left, right), top in growing.items()]


def _clip(raster: Raster, left: int, top: int, right: int, bottom: int) -> Window:
    """Return the part of a raster's window that a range of tiles, ends included, covers."""
    across, down = raster.block
    col, row, width, height = raster.window
    c0, c1 = max(col, left * across), min(col + width, (right + 1) * across)
    r0, r1 = max(row, top * down), min(row + height, (bottom + 1) * down)
    return c0, r0, c1 - c0, r1 - r0
