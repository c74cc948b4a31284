"""The pixels of one image into its archive: lossless, or by the codec within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import zarr

from archive_pipeline.codec.settings import Raise, Settings
from archive_pipeline.codec.zarr_codec import count_coded, with_settings
from archive_pipeline.detection.boxes import Boxes
from archive_pipeline.detection.object_blocks import RaisedBlocks
from archive_pipeline.flight.pixels import SourcePixels
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.geo.georef import Window
from archive_pipeline.jobs.ingest_task import OverBudget
from archive_pipeline.store.image_writer import LEAST_BITS, ImageWriter
from archive_pipeline.store.layout import TILE, ImageEntry, shard_count, shard_windows

# Drivers whose files hold their pixels themselves, so that their size says something about these.
SELF_CONTAINED = frozenset(
    ("BMP", "COG", "GIF", "GTiff", "JP2OpenJPEG", "JPEG", "NITF", "PNG", "WEBP", "HEIF", "JPEGXL")
)


def allowed_bytes(source: SourceImage, budget: int) -> int:
    """Bytes that an image may take: its budget, and no more than its file does."""
    return min(budget, source.size_bytes) if source.driver in SELF_CONTAINED else budget


def exceeded(
    entry: ImageEntry, allowed: int, sizes: Callable[[], dict[str, int]]
) -> OverBudget | None:
    """What is to be said of an image that takes more than it may; None of others.

    Args:
        sizes: tells the bytes of each of its arrays by name.
    """
    taken, codec = entry.record["archive_bytes"], entry.record["codec"]
    if taken <= allowed:
        return None
    parts = sizes()
    parts["record"] = taken - sum(parts.values())
    listed = ", ".join(f"{name} {size}" for name, size in sorted(parts.items()))
    how = {"pcdc": "as coarse as can be", "lossless": "lossless, which is less"}
    pixels = how.get(codec, "those of the file itself, which is less")
    reason = f"bytes of {listed}; pixels are {pixels}"
    return OverBudget(entry.id, allowed, taken, taken - allowed, reason)


@dataclass(frozen=True)
class PixelJob:
    """What the pixels of one image are written with.

    Attributes:
        done: called after each shard of an image of several with their numbers, done and in all.
        objects: boxes whose blocks are coded finer.
    """

    writer: ImageWriter
    reader: SourcePixels
    settings: Settings = field(default_factory=Settings)
    objects: Boxes = field(default_factory=lambda: np.zeros((0, 4)))
    done: Callable[[int, int], None] = lambda done, parts: None

    def write_lossless(self) -> None:
        """Store the pixels as they are."""
        self._write_shards(self.writer.create_lossless(), self.settings)

    def write_coded(
        self, model: str, budget: int, record: dict[str, Any], conventions: dict[str, Any]
    ) -> bool:
        """Code the pixels of an 8-bit RGB image so that all of it takes `allowed_bytes` at most.

        Where that cannot be, they are coded as coarsely as the codec can, or stored losslessly if
        that takes less; the image then may take more.

        Args:
            model: SHA-256.
            record, conventions: what the image is committed with if it is coded.

        Returns:
            Whether they are coded.
        """
        writer = self.writer
        allowed = allowed_bytes(self.reader.source, budget)
        coded = self._coded(allowed / max(budget, 1))
        pixels, bits = writer.create_pixels(model, allowed, coded, record, conventions)
        missing = set(writer.missing(pixels))
        kept = [window for window in shard_windows(pixels) if window not in missing]
        # shards that an earlier run left may take more than their share, too
        taken = [writer.bits_of(pixels, w, *count_coded([self._part(w)], TILE)) for w in kept]
        self._write_shards(pixels, replace(self.settings, overspent=taken.append))
        most = max(taken, default=0.0)
        if shard_count(pixels) == 1 and (most > bits or bits <= LEAST_BITS):
            (window,) = shard_windows(pixels)
            if writer.lossless_bytes(self._part(window)) < writer.sizes()["pixels"]:
                self.write_lossless()
                return False
        if most > bits:
            writer.restate_bits(model, most)
        return True

    def _write_shards(self, array: zarr.Array, settings: Settings) -> None:
        parts, missing = shard_count(array), self.writer.missing(array)
        for number, window in enumerate(missing, parts - len(missing) + 1):
            part = self._part(window)
            finer = replace(settings, raised=self._raised(part, window))
            with_settings(array, finer)[area(window)] = part
            if parts > 1:
                self.done(number, parts)

    def _part(self, window: Window) -> np.ndarray:
        return self.reader.read(window)[0]

    def _raised(self, part: np.ndarray, window: Window) -> Raise | None:
        """What makes blocks with objects in them finer, where pixels of a window are written."""
        if not len(self.objects):
            return None
        col, row, _, _ = window
        return RaisedBlocks(part, self.objects - [col, row, col, row], TILE).of

    def _coded(self, share: float) -> tuple[int, int]:
        """Pixels that the bytes allowed are for, and empty tiles, as `count_coded` gives them.

        Of an image that would have to be decoded to be counted, all pixels, and as many empty tiles
        as may lie around them: of its budget something is left.

        Args:
            share: of the budget that is allowed. A file that is smaller than its budget is the
                limit for the pixels that it has, most others may be empty; but they get no more
                each than the budget gives them.
        """
        width, height = self.reader.source.width, self.reader.source.height
        if not self.reader.held and share == 1:
            return width * height, 4 * -(-width // TILE) * -(-height // TILE)
        tops = range(0, height, TILE)
        strips = ((0, top, width, min(TILE, height - top)) for top in tops)
        coded, empty = count_coded(map(self._part, strips), TILE)
        if self.reader.held:
            return coded, empty
        return max(coded, math.ceil(share * width * height)), empty


def area(window: Window) -> tuple[slice, slice]:
    """Index of a window (col, row, width, height) of an array (height, width, ...)."""
    col, row, width, height = window
    return slice(row, row + height), slice(col, col + width)
