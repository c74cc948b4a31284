"""Images made smaller, so that they can be looked at without decoding all of their pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from archive_pipeline.codec.settings import Settings
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.geo.georef import Window
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.image_writer import ImageWriter
from archive_pipeline.store.layout import (
    OVERVIEW_FACTORS,
    OVERVIEW_STEP,
    SHARD_TILES,
    TILE,
    ImageEntry,
    overview_name,
    overview_shape,
)
from archive_pipeline.store.overview_writer import OverviewWriter

SHARE = 0.03  # of an image's budget, for all its overviews
LARGEST = SHARD_TILES * TILE**2  # pixels of an overview, which is made in memory
LOOK = 2 * TILE  # pixels a side that can be decoded at once: no overview is smaller than needed
READ_BYTES = 32 << 20  # of an image at a time
FINER = 4  # times the bits a pixel of an overview, for the next smaller one
# A Zarr convention by its registered identifier.
MULTISCALES = {"uuid": "d35379db-88df-4056-af3a-620245f8e347", "name": "multiscales"}


class Readable(Protocol):
    """An image whose pixels can be read, from its file or from an archive."""

    @property
    def source(self) -> SourceImage: ...

    def read(self, window: Window) -> tuple[NDArray[Any], NDArray[np.uint8] | None]:
        """Pixels (h, w, 3) and mask (h, w) of a window."""


ReadWindow = Callable[[Window], tuple[NDArray[np.uint8], NDArray[np.uint8] | None]]


def factors_of(width: int, height: int) -> tuple[int, ...]:
    """What the overviews of an image are smaller by, a side, from the finest on.

    Each is eight times smaller than the one before, until one is seen at once. Finer steps would
    cost too much: within 3 % of a budget of a hundredth, an overview of a quarter has a tenth of a
    bit a pixel, and shows less than one of an eighth.
    """
    needed = [f for f in OVERVIEW_FACTORS if max(width, height) > LOOK * (f // OVERVIEW_STEP)]
    return tuple(f for f in needed if math.prod(overview_shape(height, width, f)) <= LARGEST)


def write_overviews(
    writer: ImageWriter, reader: Readable, model: str, budget: int, settings: Settings
) -> list[int]:
    """Store an image's overviews, each unless its share of the budget is too small to show much.

    Args:
        model: SHA-256.
        budget: bytes for everything that is stored for the image.

    Returns:
        The factors of those that are stored.
    """
    source = reader.source
    factors = factors_of(source.width, source.height)
    sizes = [math.prod(overview_shape(source.height, source.width, f)) for f in factors]
    weights = [size * FINER**n for n, size in enumerate(sizes)]
    stored = []
    pixels, before = None, 1
    for factor, weight in zip(factors, weights, strict=True):
        if pixels is None:
            pixels = reduced(reader.read, source.width, source.height, factor)
        else:
            pixels = _averaged(pixels, None, factor // before)
        before = factor
        share = int(SHARE * budget * weight / sum(weights))
        if writer.write_overview(factor, pixels, model, share, settings):
            stored.append(factor)
    return stored


@dataclass(frozen=True)
class _Archived:
    """An archived image as `write_overviews` reads it."""

    image: ArchivedImage

    @property
    def source(self) -> SourceImage:
        return self.image.source

    def read(self, window: Window) -> tuple[NDArray[Any], NDArray[np.uint8] | None]:
        return self.image.read(window), self.image.read_mask(window)


def lacks_overviews(entry: ImageEntry) -> bool:
    """Whether an image would have overviews if it were archived today, and has none."""
    record = entry.record
    due = record["codec"] == "pcdc" and factors_of(record["width"], record["height"])
    return bool(due) and not entry.overviews


def add_overviews(archive: Archive, entry: ImageEntry, settings: Settings) -> bool:
    """Give overviews to an archived image, of 3 % of its bytes at most, from its own pixels.

    To be called by who holds the image's lock or its flight's lease.

    Returns:
        Whether it has any now: where so few bytes show nothing, it gets none.

    Raises:
        ArchiveError: it is damaged, or was written just now; or the store fails.
    """
    record = entry.record
    image = ArchivedImage(archive, entry, settings)
    writer = OverviewWriter(archive, entry, image.source)
    reader, budget = _Archived(image), record["archive_bytes"]
    factors = write_overviews(writer, reader, record["model"], budget, settings)
    if factors:
        writer.add(factors, lambda attributes: with_multiscales(attributes, factors))
    return bool(factors)


def reduced(read: ReadWindow, width: int, height: int, factor: int) -> NDArray[np.uint8]:
    """An image made smaller: means of squares of pixels, of those that are valid.

    Args:
        read: gives pixels (h, w, 3) and mask (h, w) of a window (col, row, w, h).
        factor: side of the squares; fewer pixels count at the right and at the bottom.

    Returns:
        uint8 (ceil(height / factor), ceil(width / factor), 3); 0 where nothing is valid.
    """
    rows = max(1, READ_BYTES // (3 * width * factor)) * factor
    out = np.empty((*overview_shape(height, width, factor), 3), np.uint8)
    for top in range(0, height, rows):
        part, mask = read((0, top, width, min(rows, height - top)))
        smaller = _averaged(part, mask, factor)
        out[top // factor : top // factor + len(smaller)] = smaller
    return out


def _averaged(
    pixels: NDArray[np.uint8], mask: NDArray[np.uint8] | None, factor: int
) -> NDArray[np.uint8]:
    """Means of squares of valid pixels."""
    if mask is None:
        return np.asarray(Image.fromarray(pixels).reduce(factor))
    down, across = (np.arange(0, n, factor) for n in pixels.shape[:2])

    def sums(values: NDArray[Any]) -> NDArray[np.uint32]:
        rows = np.add.reduceat(values, down, axis=0, dtype=np.uint32)
        return np.add.reduceat(rows, across, axis=1, dtype=np.uint32)

    valid = mask != 0
    counts, total = sums(valid)[..., None], sums(pixels * valid[..., None])
    return ((total + counts // 2) // np.maximum(counts, 1)).astype(np.uint8)


def with_multiscales(attributes: dict[str, Any], factors: list[int]) -> dict[str, Any]:
    """Attributes of an image's group, with those of its arrays by resolution.

    Scales and translations (of pixel centres) are in pixels, rows before columns, relative to the
    array that each level is derived from.
    """
    named = [*attributes.get("zarr_conventions", ()), MULTISCALES]
    scales = {"layout": list(_layout(factors)), "resampling_method": "average"}
    return {**attributes, "zarr_conventions": named, "multiscales": scales}


def _layout(factors: list[int]) -> Iterator[dict[str, Any]]:
    yield {"asset": "pixels", "transform": {"scale": [1.0, 1.0]}}
    for factor in factors:
        shift = (factor - 1) / 2
        yield {
            "asset": overview_name(factor),
            "derived_from": "pixels",
            "transform": {"scale": [float(factor)] * 2, "translation": [shift] * 2},
        }
