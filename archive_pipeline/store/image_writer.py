"""Writing one image into an archive."""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.array_spec import ArrayConfig
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore, StorePath

from archive_pipeline.codec.zarr_codec import PCDCCodec
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.geo.georef import Window
from archive_pipeline.pcdc.bitstream import EMPTY_BYTES
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.layout import (
    ImageEntry,
    grid,
    group_json,
    image_key,
    pack_metadata,
    record_json,
    shard_count,
    shard_windows,
)

Shuffle = Literal["shuffle", "bitshuffle", "noshuffle"]
UNFINISHED = "archive_pipeline_unfinished"  # the plan of an image that is being written
SHARD_INDEX_BYTES = 16  # a tile's offset and length
CHECKSUM_BYTES = 4  # of every tile and of every shard's index
LEAST_BITS = 1e-6  # of bits_per_pixel, which must be positive
BITS_DIGITS = 12  # of bits_per_pixel in the metadata, at most
ARRAYS = ("detections", "mask", "metadata", "pixels")
ARRAY_CONFIG = ArrayConfig.from_dict({"write_empty_chunks": True})  # an absent tile is damage


class ImageWriter:
    """Writes one image: mask and metadata, then pixels shard by shard, then the commit.

    A crash at any point before `commit` leaves no visible image. Shards of an image of several
    that it left are kept by the next writer of the same plan.

    Args:
        plan: what the stored bytes follow from (source, options, model), in any words.
    """

    def __init__(self, archive: Archive, flight: str, source: SourceImage, plan: str) -> None:
        self.archive = archive
        self.flight = flight
        self.source = source
        self.key = image_key(flight, source.id)
        self._plan = hashlib.sha256(plan.encode("utf-8", "surrogateescape")).hexdigest()
        found = archive.stored(self.key)
        self._resumed = f"{self.key}/zarr.json" in found and self._is_planned()
        self._kept = found if self._resumed else {}
        # what a killed process has not renamed to its final name
        partial = [key for key in self._kept if key.endswith(".partial")]
        if partial:
            archive.delete(partial)
        if found and not self._resumed:
            archive.delete(found)

    def _is_planned(self) -> bool:
        """Whether what is there was begun by this plan."""
        raw = self.archive.read_key(f"{self.key}/zarr.json")
        return raw == group_json({UNFINISHED: self._plan})

    def write_metadata(self) -> None:
        """Store the source record and the byte-for-byte originals."""
        self._write_bytes("metadata", pack_metadata(self.source))

    def write_detections(self, data: bytes) -> None:
        """Store objects found in the original; before the pixels, which share the budget."""
        self._write_bytes("detections", data)

    def _write_bytes(self, name: str, content: bytes) -> None:
        data = np.frombuffer(content, np.uint8)
        array = self._create(name, self._lossless(data.shape, data.dtype, data.shape, None))
        array[:] = data

    def create_mask(self) -> zarr.Array:
        """Create the lossless mask array, uint8 (height, width)."""
        shape = (self.source.height, self.source.width)
        spec = self._lossless(shape, np.dtype(np.uint8), *grid(shape, 1), shuffle="bitshuffle")
        return self._create("mask", spec)

    def create_lossless(self) -> zarr.Array:
        """Create a lossless pixel array (height, width, bands) of the source's dtype."""
        return self._create("pixels", self._lossless_pixels())

    def _lossless_pixels(self) -> tuple[zarr.Array, bytes]:
        s = self.source
        shape = (s.height, s.width, s.bands)
        dtype = np.dtype(s.dtype)
        shuffle: Shuffle = "shuffle" if dtype.itemsize > 1 else "noshuffle"
        return self._lossless(shape, dtype, *grid(shape, dtype.itemsize), shuffle=shuffle)

    def create_pixels(
        self,
        model: str,
        budget: int,
        coded: tuple[int, int],
        record: dict[str, Any],
        conventions: dict[str, Any],
    ) -> tuple[zarr.Array, float]:
        """Create the pcdc pixel array, uint8 (height, width, 3), after all others.

        Args:
            model: SHA-256.
            budget: bytes for everything stored for the image.
            coded: pixels that are coded, and tiles that hold none.
            record, conventions: what `commit` will be given.

        Returns:
            The array, and its bits a coded pixel: `LEAST_BITS` where everything else takes the
            budget.
        """
        # Its own metadata count too; their length depends on the number of bits in them alone.
        probe = 0.5
        array, content = self._pixels(model, probe)
        metadata = len(content) - len(repr(probe))
        outer = [-(-n // s) for n, s in zip(array.shape, array.shards or (), strict=True)]
        inner = [s // c for s, c in zip(array.shards or (), array.chunks, strict=True)]
        tiles = math.prod(outer) * math.prod(inner)
        pixels, empty = coded
        # The record gives its own total: as many digits as the budget at most.
        fixed = (
            self._stored(without="pixels")
            + len(record_json({**record, "archive_bytes": budget}, conventions))
            + metadata
            + SHARD_INDEX_BYTES * tiles
            + CHECKSUM_BYTES * (math.prod(outer) + tiles)
            + EMPTY_BYTES * empty
        )
        left = budget - fixed - BITS_DIGITS
        bits = math.floor(8e6 * left / max(pixels, 1)) / 1e6
        bits = max(bits, LEAST_BITS)
        return self._create("pixels", self._pixels(model, bits)), bits

    def restate_bits(self, model: str, bits_per_pixel: float) -> None:
        """Have the pixel array's metadata say how many bits a coded pixel its streams take.

        For streams that take more than they were to.
        """
        spec = self._pixels(model, math.ceil(1e6 * bits_per_pixel) / 1e6)
        self.archive.write_key(f"{self.key}/pixels/zarr.json", spec[1])

    def bits_of(self, array: zarr.Array, window: Window, coded: int, empty: int) -> float:
        """Bits a coded pixel of a shard that an earlier run left.

        Args:
            coded, empty: its pixels that are coded, and its tiles that hold none.
        """
        tiles = math.prod(s // c for s, c in zip(array.shards or (), array.chunks, strict=True))
        size = self._kept[self._shard_key(array, window)].size
        streams = size - SHARD_INDEX_BYTES * tiles - CHECKSUM_BYTES * (tiles + 1)
        return 8 * max(0, streams - EMPTY_BYTES * empty) / max(coded, 1)

    def lossless_bytes(self, pixels: NDArray[Any]) -> int:
        """Bytes that the whole image's pixels would take as `create_lossless` stores them."""
        array, _ = self._lossless_pixels()
        array[:] = pixels
        return sum(sync(_sizes(array.store)))

    def sizes(self) -> dict[str, int]:
        """Bytes of each array by its name."""
        total = self._stored()
        sizes = {name: total - self._stored(without=name) for name in ARRAYS}
        return {name: size for name, size in sizes.items() if size}

    def missing(self, array: zarr.Array) -> list[Window]:
        """Windows (col, row, width, height) of the shards that are still to be written."""
        windows = shard_windows(array)
        return [w for w in windows if self._shard_key(array, w) not in self._kept]

    def _shard_key(self, array: zarr.Array, window: Window) -> str:
        """Key of the shard at a window."""
        rows, cols = (array.shards or array.chunks)[:2]
        place = (window[1] // rows, window[0] // cols, *(0,) * (array.ndim - 2))
        name = array.path.rpartition("/")[2]
        return f"{self.key}/{name}/{array.metadata.encode_chunk_key(place)}"

    def commit(self, record: dict[str, Any], conventions: dict[str, Any]) -> ImageEntry:
        """Make the image visible, by writing its record."""
        stored = total = self._stored()
        while True:
            final = {**record, "archive_bytes": total}
            content = record_json(final, conventions)
            if total == stored + len(content):
                break
            total = stored + len(content)
        self.archive.write_key(f"{self.key}/zarr.json", content)
        return ImageEntry(self.flight, self.source.id, self.key, final)

    def _stored(self, without: str = "zarr.json") -> int:
        """Bytes of the image's arrays, all or without one; the group's own do not count."""
        left_out = (f"{self.key}/zarr.json", f"{self.key}/{without}/")
        found = self.archive.stored(self.key)
        return sum(s.size for key, s in found.items() if not key.startswith(left_out))

    def _create(self, name: str, spec: tuple[zarr.Array, bytes]) -> zarr.Array:
        """Store an array's metadata; its shards from an earlier run stay if they fit to it."""
        draft, content = spec
        prefix = f"{self.key}/{name}"
        if shard_count(draft) > 1 and not self._resumed:
            self.archive.write_key(f"{self.key}/zarr.json", group_json({UNFINISHED: self._plan}))
            self._resumed = True
        own = [key for key in self._kept if key.startswith(f"{prefix}/")]
        if own and self.archive.read_key(f"{prefix}/zarr.json") != content:
            self.archive.delete(own)
            self._kept = {key: s for key, s in self._kept.items() if key not in own}
            own = []
        if not own:
            self.archive.write_key(f"{prefix}/zarr.json", content)
        path = StorePath(self.archive.store, prefix)
        return zarr.Array(zarr.AsyncArray(draft.metadata, path, config=ARRAY_CONFIG))

    def _pixels(self, model: str, bits_per_pixel: float) -> tuple[zarr.Array, bytes]:
        shape = (self.source.height, self.source.width, 3)
        chunks, shards = grid(shape, 1)
        return _draft(
            shape=shape,
            dtype=np.uint8,
            chunks=chunks,
            shards=shards,
            serializer=PCDCCodec(model, bits_per_pixel),
            compressors=[Crc32cCodec()],
            dimension_names=("y", "x", "band"),
        )

    def _lossless(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        chunks: tuple[int, ...],
        shards: tuple[int, ...] | None,
        shuffle: Shuffle = "noshuffle",
    ) -> tuple[zarr.Array, bytes]:
        return _draft(
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            shards=shards,
            compressors=[
                BloscCodec(cname="zstd", clevel=7, shuffle=shuffle, typesize=dtype.itemsize),
                Crc32cCodec(),
            ],
            dimension_names=("y", "x", "band")[: len(shape)] if len(shape) > 1 else ("byte",),
        )


async def _sizes(store: Store) -> list[int]:
    """Bytes of every key of a store."""
    return [await store.getsize(key) async for key in store.list()]


def _draft(**spec: Any) -> tuple[zarr.Array, bytes]:
    """An array in memory, and its metadata: making it in the store would take many requests."""
    store = MemoryStore()
    array = zarr.create_array(
        store,
        fill_value=0,
        filters=None,
        config=ARRAY_CONFIG,
        **spec,
    )
    content = sync(store.get("zarr.json", default_buffer_prototype()))
    assert content is not None
    return array, content.to_bytes()
