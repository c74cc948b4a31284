"""Writing one image into an archive."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.array_spec import ArrayConfig
from zarr.core.buffer import default_buffer_prototype
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.core.sync import sync
from zarr.storage import MemoryStore, StorePath

from archive_pipeline.codec.jpeg_codec import JPEGFileCodec
from archive_pipeline.codec.settings import Settings
from archive_pipeline.codec.zarr_codec import PCDCCodec, count_coded, with_settings
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.geo.georef import Window
from archive_pipeline.pcdc.bitstream import EMPTY_BYTES
from archive_pipeline.store._backends import Stored
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.layout import (
    MAX_DOCUMENT,
    MAX_JSON,
    PLAN,
    SEPARATORS,
    STAGED,
    TILE,
    ArchiveError,
    ImageEntry,
    RecordError,
    array_generation,
    check_size,
    grid,
    image_key,
    is_shard,
    overview_name,
    pack_metadata,
    record_json,
    shard_count,
    shard_windows,
    sized_record_json,
    strays,
)
from archive_pipeline.store.leftovers import committed, discard, promote

Shuffle = Literal["shuffle", "bitshuffle", "noshuffle"]
SHARD_INDEX_BYTES = 16  # a tile's offset and length
CHECKSUM_BYTES = 4  # of every tile and of every shard's index
LEAST_BITS = 1e-6  # of bits_per_pixel, which must be positive
BITS_DIGITS = 12  # of bits_per_pixel in the metadata, at most
LEAST_OVERVIEW_BITS = 0.05  # a pixel; less shows nothing
ARRAY_CONFIG = ArrayConfig.from_dict({"write_empty_chunks": True})  # an absent tile is damage


class ImageWriter:
    """Writes one image: mask and metadata, then pixels shard by shard, then the commit.

    An image that is there stays, for all readers, until the commit: the new one is written beside
    it, as the other generation. A crash at any point before `commit` leaves no visible trace.
    Shards of an image of several that it left are kept by the next writer of the same plan.

    To be made by who holds the image's lock or its flight's lease.

    Args:
        plan: what the stored bytes follow from (source, options, model), in any words.

    Attributes:
        replaces: whether an image is there, which `commit` replaces; `leftovers.settle` removes
            what remains of it then.
    """

    def __init__(self, archive: Archive, flight: str, source: SourceImage, plan: str) -> None:
        self.archive = archive
        self.flight = flight
        self.source = source
        self.key = image_key(flight, source.id)
        found = archive.stored(self.key)
        standing, stray = self._standing(found) if found else (None, [])
        self.replaces = standing is not None
        self._generation = 0 if standing is None else 1 - standing
        digest = hashlib.sha256(plan.encode("utf-8", "surrogateescape")).hexdigest()
        self._plan = json.dumps({"plan": digest, "generation": self._generation}).encode()
        self._arrays: dict[str, bytes] = {}  # metadata of those that were created
        self._kept: dict[str, Stored] = {}
        self._resumed = (
            self._path(PLAN) in stray and archive.read_key(self._path(PLAN)) == self._plan
        )
        if self._resumed:
            self._kept = {key: found[key] for key in stray if self._is_next(key)}
        discard(archive, self.key, [key for key in stray if key not in self._kept])

    def _standing(self, found: Collection[str]) -> tuple[int | None, list[str]]:
        """The generation of the image that is there, None without one; and what is beside it."""
        try:
            entry = committed(self.archive, self.key)
        except RecordError:  # others may still read its pixels
            raw = self.archive.read_key(self._path("pixels", "zarr.json"))
            generation = None if raw is None else array_generation(raw) or 0
            return generation, strays(self.key, found, generation, None)
        if entry is None:
            return None, list(found)
        promote(self.archive, entry, found)
        return entry.generation, strays(self.key, found, entry.generation, entry.arrays)

    def _is_next(self, key: str) -> bool:
        """Whether a key is of the generation that this writes."""
        name, _, rest = key.removeprefix(f"{self.key}/").partition("/")
        return name == PLAN or rest == self._metadata or is_shard(rest, self._generation)

    @property
    def _metadata(self) -> str:
        """Where an array's metadata stand until the commit."""
        return STAGED if self.replaces else "zarr.json"

    def _path(self, *parts: str) -> str:
        return "/".join((self.key, *parts))

    def write_metadata(self) -> None:
        """Store the source record and the byte-for-byte originals."""
        self._write_bytes("metadata", pack_metadata(self.source))

    def write_detections(self, data: bytes) -> None:
        """Store objects found in the original; before the pixels, which share the budget."""
        check_size("its list of detections", len(data), MAX_JSON)
        self._write_bytes("detections", data)

    def _write_bytes(self, name: str, content: bytes) -> None:
        data = np.frombuffer(content, np.uint8)
        array = self._create(name, self._lossless(data.shape, data.dtype, data.shape, None))
        array[:] = data

    def write_overview(
        self, factor: int, pixels: NDArray[np.uint8], model: str, budget: int, settings: Settings
    ) -> bool:
        """Store the image made smaller, unless that takes more bytes than it may.

        To be written before the pixels, which share the budget.

        Args:
            factor: what it is smaller by, a side.
            pixels: uint8 (height, width, 3).
            model: SHA-256.
            budget: bytes for all that is stored of it.
            settings: where and in what precision it is coded.

        Returns:
            Whether it is stored.
        """
        coded, empty = count_coded([pixels], TILE)
        array, content = self._pixels(model, LEAST_BITS, pixels.shape)
        fixed = len(content) + BITS_DIGITS + _shard_overhead(array) + EMPTY_BYTES * empty
        bits = math.floor(8e6 * (budget - fixed) / max(coded, 1)) / 1e6
        if bits < LEAST_OVERVIEW_BITS:
            return False
        array, content = self._pixels(model, bits, pixels.shape)
        more: list[float] = []
        plain = Settings(settings.device, precision=settings.precision, overspent=more.append)
        with_settings(array, plain)[:] = pixels
        if more:
            return False
        name = overview_name(factor)
        self._arrays[name] = content
        self.archive.write_key(self._path(name, self._metadata), content)
        for key, data in sync(_contents(array.store)).items():
            if key != "zarr.json":
                self.archive.write_key(self._path(name, key), data)
        return True

    def drop_overviews(self) -> None:
        """Remove the overviews that were written: the pixels are stored losslessly."""
        names = [name for name in self._arrays if name.startswith("overview_")]
        for name in names:
            del self._arrays[name]
            found = self.archive.stored(self._path(name))
            self.archive.delete([key for key in found if self._is_next(key)])

    def create_mask(self) -> zarr.Array:
        """Create the lossless mask array, uint8 (height, width)."""
        shape = (self.source.height, self.source.width)
        spec = self._lossless(shape, np.dtype(np.uint8), *grid(shape, 1), shuffle="bitshuffle")
        return self._create("mask", spec)

    def create_lossless(self) -> zarr.Array:
        """Create a lossless pixel array (height, width, bands) of the source's dtype."""
        return self._create("pixels", self._lossless_pixels())

    def write_file(self, stream: bytes) -> None:
        """Store the source file itself as the pixels: a JPEG.

        Args:
            stream: the file, or its JPEG XL transcoding (`codec.transcoding`).
        """
        s = self.source
        shape = (s.height, s.width, s.bands)
        spec = self._draft(
            shape=shape,
            dtype=np.uint8,
            chunks=shape,
            serializer=JPEGFileCodec(s.size_bytes, s.salvaged),
            compressors=[Crc32cCodec()],
            dimension_names=("y", "x", "band"),
        )
        array = self._create("pixels", spec)
        key = self._shard_key(array, (0, 0, s.width, s.height))
        self.archive.write_key(key, _with_checksum(stream, array))

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
        pixels, empty = coded
        # The record gives its own total: as many digits as the budget at most.
        fixed = (
            self._stored(without="pixels")
            + len(record_json(self._final(record, budget), conventions))
            + metadata
            + _shard_overhead(array)
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
        _, content = self._pixels(model, math.ceil(1e6 * bits_per_pixel) / 1e6)
        self.archive.write_key(self._path("pixels", self._metadata), content)
        self._arrays["pixels"] = content

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
        sizes = dict.fromkeys(sorted(self._arrays), 0)
        for key, stored in self.archive.stored(self.key).items():
            name, _, rest = key.removeprefix(f"{self.key}/").partition("/")
            if name in sizes and (rest == self._metadata or is_shard(rest, self._generation)):
                sizes[name] += stored.size
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
        return self._path(name, array.metadata.encode_chunk_key(place))

    def commit(self, record: dict[str, Any], conventions: dict[str, Any]) -> ImageEntry:
        """Make the image visible, by writing its record; one that it replaces is gone then."""
        content, final = sized_record_json(self._final(record, 0), conventions, self._stored())
        check_size("its record", len(content), MAX_DOCUMENT)
        self.archive.write_key(self._path("zarr.json"), content)
        entry = ImageEntry(self.flight, self.source.id, self.key, final)
        with suppress(ArchiveError):  # it is committed; `settle` does the rest
            self._tidy(entry)
        return entry

    def _final(self, record: dict[str, Any], total: int) -> dict[str, Any]:
        """The record as it is written; generation 0 needs no word."""
        generation = {"generation": self._generation} if self._generation else {}
        return {**record, "archive_bytes": total, **generation}

    def _tidy(self, entry: ImageEntry) -> None:
        """After a commit: show plain Zarr readers the new arrays, and none that is gone."""
        if self.replaces:
            there = self.archive.list_names(self.key)
            gone = [name for name in there if name not in (*entry.arrays, "zarr.json")]
            if gone:
                self.archive.delete([self._path(name, "zarr.json") for name in gone])
            for name in entry.arrays:
                self.archive.write_key(self._path(name, "zarr.json"), self._arrays[name])
        if self._resumed:
            self.archive.delete([self._path(PLAN)])

    def _stored(self, without: str = "") -> int:
        """Bytes of the arrays that were created, all or without one."""
        return sum(size for name, size in self.sizes().items() if name != without)

    def _create(self, name: str, spec: tuple[zarr.Array, bytes]) -> zarr.Array:
        """Store an array's metadata; its shards from an earlier run stay if they fit to it."""
        draft, content = spec
        if shard_count(draft) > 1 and not self._resumed:
            self.archive.write_key(self._path(PLAN), self._plan)
            self._resumed = True
        own = [key for key in self._kept if key.startswith(f"{self._path(name)}/")]
        if own and self.archive.read_key(self._path(name, self._metadata)) != content:
            self.archive.delete(own)
            self._kept = {key: s for key, s in self._kept.items() if key not in own}
            own = []
        if not own:
            self.archive.write_key(self._path(name, self._metadata), content)
        self._arrays[name] = content
        path = StorePath(self.archive.store, self._path(name))
        return zarr.Array(zarr.AsyncArray(draft.metadata, path, config=ARRAY_CONFIG))

    def _pixels(
        self, model: str, bits_per_pixel: float, shape: tuple[int, ...] | None = None
    ) -> tuple[zarr.Array, bytes]:
        shape = shape or (self.source.height, self.source.width, 3)
        chunks, shards = grid(shape, 1)
        return self._draft(
            shape=shape,
            dtype=np.uint8,
            chunks=chunks,
            shards=shards,
            serializer=PCDCCodec(model, bits_per_pixel),
            compressors=[Crc32cCodec()],
            dimension_names=("y", "x", "band"),
            attributes=self._reference(shape),
        )

    def _reference(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Attributes by which rioxarray finds where an array's pixels lie; none of overviews."""
        georef, own = self.source.georef, (self.source.height, self.source.width)
        if georef.crs is None or georef.transform is None or shape[:2] != own:
            return {}
        return {"crs": georef.crs, "transform": list(georef.transform)}

    def _lossless(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        chunks: tuple[int, ...],
        shards: tuple[int, ...] | None,
        shuffle: Shuffle = "noshuffle",
    ) -> tuple[zarr.Array, bytes]:
        return self._draft(
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            shards=shards,
            compressors=[
                BloscCodec(cname="zstd", clevel=7, shuffle=shuffle, typesize=dtype.itemsize),
                Crc32cCodec(),
            ],
            dimension_names=("y", "x", "band")[: len(shape)] if len(shape) > 1 else ("byte",),
            attributes=self._reference(shape),
        )

    def _draft(self, **spec: Any) -> tuple[zarr.Array, bytes]:
        """An array in memory, and its metadata: making it in the store takes many requests."""
        store = MemoryStore()
        array = zarr.create_array(
            store,
            fill_value=0,
            filters=None,
            chunk_key_encoding={"name": "default", "separator": SEPARATORS[self._generation]},
            config=ARRAY_CONFIG,
            **spec,
        )
        content = sync(store.get("zarr.json", default_buffer_prototype()))
        assert content is not None
        return array, content.to_bytes()


def _with_checksum(chunk: bytes, array: zarr.Array) -> bytes:
    """A chunk of one file as it is stored; pixels would be what Zarr encodes."""
    prototype = default_buffer_prototype()
    metadata = array.metadata
    assert isinstance(metadata, ArrayV3Metadata)
    spec = metadata.get_chunk_spec((0,) * array.ndim, ARRAY_CONFIG, prototype)
    data = prototype.buffer.from_bytes(chunk)
    [stored] = sync(Crc32cCodec().encode([(data, spec)]))
    assert stored is not None
    return stored.to_bytes()


def _shard_overhead(array: zarr.Array) -> int:
    """Bytes that an array's shards have beside its tiles' streams."""
    outer = [-(-n // s) for n, s in zip(array.shape, array.shards or (), strict=True)]
    inner = [s // c for s, c in zip(array.shards or (), array.chunks, strict=True)]
    tiles = math.prod(outer) * math.prod(inner)
    return SHARD_INDEX_BYTES * tiles + CHECKSUM_BYTES * (math.prod(outer) + tiles)


async def _contents(store: Store) -> dict[str, bytes]:
    """All keys of a store with their bytes."""
    prototype = default_buffer_prototype()
    found = {key: await store.get(key, prototype) async for key in store.list()}
    return {key: data.to_bytes() for key, data in found.items() if data is not None}


async def _sizes(store: Store) -> list[int]:
    """Bytes of every key of a store."""
    return [await store.getsize(key) async for key in store.list()]
