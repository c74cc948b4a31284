"""The archive on disk or in a bucket: layout, commits and queries, on plain Zarr v3.

Layout (one image a group; everything else is derived or shared)::

    zarr.json                              root group, attribute archive_pipeline.format
    models/<sha256>/...                    config.json, model.safetensors, perhaps denoiser/
    policies/<sha256>.safetensors          allocation policies; reading needs none of them
    items.parquet                          the index, see `archive_pipeline.index`
    flights/<flight>/<image>/zarr.json     record of a committed image, written last
    flights/<flight>/<image>/pixels        uint8 (height, width, 3) by pcdc, or lossless any dtype
    flights/<flight>/<image>/mask          uint8 (height, width), lossless, where the source has one
    flights/<flight>/<image>/metadata      uint8 (bytes,), lossless: source record and originals
    flights/<flight>/<image>/detections    uint8 (bytes,), lossless: objects found in the original,
                                           where ingest was asked for them

An image exists once its group carries the `archive_pipeline` attribute: one write, after all
else. What a killed writer leaves behind is invisible and is removed by the next writer.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote, unquote, urlsplit
from urllib.request import url2pathname

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore

from archive_pipeline.flight import SourceImage
from archive_pipeline.georef import Georef, Window
from archive_pipeline.locks import is_locked, locked
from archive_pipeline.pcdc.bitstream import EMPTY_BYTES
from archive_pipeline.zarr_codec import PCDCCodec

T = TypeVar("T")
FORMAT = 1
ATTRIBUTE = "archive_pipeline"
TILE = 608  # divides 5472 x 3648; other sizes end in narrower tiles
SHARD_TILES = 100  # an image of at most so many tiles is one shard
LARGE_SHARD_SIDE = 8  # tiles a side of the shards of larger images
MAX_SIDE = 1 << 24
MAX_BANDS = 1 << 16
MAX_METADATA = 64 << 20
MAX_CHUNK = 256 << 20  # bytes
MAX_NAME = 240  # bytes of a node's name; file systems end at 255
MAX_REPORTED = 100  # damaged tiles looked for in one read
LOSSLESS_CHUNK_BYTES = 4 << 20
SHARD_INDEX_BYTES = 16  # a tile's offset and length
CHECKSUM_BYTES = 4  # of every tile and of every shard's index
BITS_DIGITS = 12  # of bits_per_pixel in the metadata, at most

# Compact metadata counts in an image's budget; whole shards at a time are what makes the
# budget image-wide and the decoder's batches long.
ZARR_SETTINGS = {"json_indent": None, "codec_pipeline.batch_size": 1 << 16}


class ArchiveError(Exception):
    """An archive, or an image in it, that cannot be used; one line that names it."""


class NothingLeft(ValueError):
    """All but the pixels takes an image's whole budget; its argument is that many bytes."""


@dataclass(frozen=True)
class ImageEntry:
    """What the archive's metadata say of one committed image (cheap to list).

    Attributes:
        flight, id: its names.
        key: its group's path in the store.
        record: the `archive_pipeline` attribute: sha256, width, height, bands, dtype, codec
            ("pcdc" or "lossless"), model, source_bytes, archive_bytes, georef, captured, mask,
            detectors (SHA-256 of those whose detections are stored; absent without any).
    """

    flight: str
    id: str
    key: str
    record: dict[str, Any]

    @property
    def detectable(self) -> bool:
        """Whether its pixels are what detectors take: three bands of 8 bits."""
        return self.record["dtype"] == "uint8" and self.record["bands"] == 3


def image_key(flight: str, image_id: str) -> str:
    """Store path of an image's group; ids may hold any characters."""
    name = _quote(image_id)
    if len(name) > MAX_NAME:  # the record holds the id
        name = f"{name[: MAX_NAME - 40]}~{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    return f"flights/{_quote(flight)}/{name}"


def check_flight(flight: str) -> None:
    """Refuse a flight id that cannot be stored.

    Raises:
        ArchiveError: it is empty or too long.
    """
    if not 0 < len(_quote(flight)) <= MAX_NAME:
        raise ArchiveError(f"{flight!r} is too long or empty for a flight's name; use --flight")


def _policy_key(sha256: str) -> str:
    return f"policies/{sha256}.safetensors"


def _quote(name: str) -> str:
    quoted = quote(name, safe=" ()+,-=@_.~", errors="surrogateescape")
    # no hidden, relative or reserved node names
    return f"%{ord(quoted[0]):02X}{quoted[1:]}" if quoted[:1] in (".", "_") else quoted


def _unquote(name: str) -> str:
    return unquote(name, errors="surrogateescape")


def in_process_only(url: str) -> bool:
    """Whether an archive is visible to this process alone."""
    return "memory:" in url


def absolute(url: str) -> str:
    """The same archive for processes with another working directory."""
    return url if "://" in url or "::" in url else str(Path(url).absolute())


def _store(url: str, read_only: bool) -> Store:
    if url.startswith("file://"):
        url = url2pathname(urlsplit(url).path)  # zarr's own local store writes atomically
    if "://" in url or "::" in url:
        try:
            return FsspecStore.from_url(url, read_only=read_only)
        except (ImportError, ValueError) as error:
            raise ArchiveError(f"{url}: {error}") from error
    return LocalStore(url, read_only=read_only)


class Archive:
    """An open archive. Make one with `Archive.open` or `Archive.create`."""

    def __init__(self, url: str, store: Store) -> None:
        self.url = url
        self.store = store
        zarr.config.set(ZARR_SETTINGS)

    @classmethod
    def open(cls, url: str | Path, *, writable: bool = False) -> Archive:
        """Open an existing archive.

        Raises:
            ArchiveError: there is none at `url`, or of a format this version does not know.
        """
        archive = cls(str(url), _store(str(url), not writable))
        raw = archive.read_key("zarr.json")
        if raw is None:
            raise ArchiveError(f"{url}: no archive there")
        try:
            found = json.loads(raw)["attributes"][ATTRIBUTE]["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArchiveError(f"{url}: a Zarr group, but not an archive") from error
        if found != FORMAT:
            raise ArchiveError(f"{url}: archive format {found!r} (this version reads {FORMAT})")
        return archive

    @classmethod
    def create(cls, url: str | Path) -> Archive:
        """Open an archive for writing, making it if there is none.

        Raises:
            ArchiveError: it cannot be made there, or something else is there.
        """
        archive = cls(str(url), _store(str(url), False))
        if archive.read_key("zarr.json") is None:
            try:
                zarr.create_group(
                    archive.store, attributes={ATTRIBUTE: {"format": FORMAT}}, overwrite=False
                )
            except Exception as error:  # what a store raises depends on its backend
                if archive.read_key("zarr.json") is None:  # nor has another process made it
                    raise ArchiveError(f"{url}: {_reason(error)}") from error
        return cls.open(url, writable=True)

    # ----------------------------------------------------------------- locks

    @contextmanager
    def exclusive(self, key: str) -> Iterator[None]:
        """Keep other processes from writing an image; on local file systems, else no lock."""
        digest = hashlib.sha256(key.encode()).digest()
        byte = 1 + int.from_bytes(digest[:7], "big")
        path = self._lock_file()
        with nullcontext() if path is None else locked(path, byte):
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let readers know that images are being written; on local file systems."""
        path = self._lock_file()
        with nullcontext() if path is None else locked(path, 0, shared=True):
            yield

    def is_written(self) -> bool:
        """Whether some process is `writing`, as far as that can be known."""
        path = self._lock_file()
        return path is not None and is_locked(path, 0)

    def _lock_file(self) -> Path | None:
        return self.store.root / "zarr.json" if isinstance(self.store, LocalStore) else None

    # ------------------------------------------------------------ plain keys

    def read_key(self, key: str) -> bytes | None:
        """Contents of a key, None where there is none.

        Raises:
            ArchiveError: the store fails.
        """
        try:
            buffer = sync(self.store.get(key, default_buffer_prototype()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # what a store raises depends on its backend
            raise ArchiveError(f"{self.url}: {key}: {_reason(error)}") from error
        return None if buffer is None else buffer.to_bytes()

    def write_key(self, key: str, data: bytes) -> None:
        """Write a key whole.

        Raises:
            ArchiveError: the store fails.
        """
        try:
            sync(self.store.set(key, default_buffer_prototype().buffer.from_bytes(data)))
        except Exception as error:  # what a store raises depends on its backend
            raise ArchiveError(f"{self.url}: {key}: {_reason(error)}") from error

    def list_names(self, prefix: str) -> list[str]:
        """Names directly below a prefix, sorted."""

        async def collect() -> list[str]:
            return [name async for name in self.store.list_dir(prefix)]

        try:
            return sorted(sync(collect()))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as error:  # what a store raises depends on its backend
            raise ArchiveError(f"{self.url}: {prefix}: {_reason(error)}") from error

    def size_of_key(self, key: str) -> int:
        """Bytes of one key, 0 where there is none."""
        try:
            return sync(self.store.getsize(key))
        except FileNotFoundError:
            return 0

    def size_of(self, prefix: str) -> int:
        """Bytes of all keys below a prefix."""
        return sync(self.store.getsize_prefix(prefix))

    def count_keys(self, prefix: str) -> int:
        """Number of keys below a prefix."""

        async def count() -> int:
            return sum([1 async for _ in self.store.list_prefix(prefix)])

        return sync(count())

    def delete(self, prefix: str) -> None:
        """Remove everything below a prefix, records first: what is half removed is invisible.

        Raises:
            ArchiveError: the store fails.
        """
        try:
            if sync(self.store.exists(f"{prefix}/zarr.json")):
                sync(self.store.delete(f"{prefix}/zarr.json"))
            sync(self.store.delete_dir(prefix))
        except Exception as error:  # what a store raises depends on its backend
            raise ArchiveError(f"{self.url}: {prefix}: {_reason(error)}") from error

    # ---------------------------------------------------------------- models

    def add_model(self, sha256: str, files: dict[str, bytes]) -> None:
        """Store a model's files once; readers of this archive need nothing else."""
        for name in sorted(files, reverse=True):  # config.json last: then the folder is complete
            if not sync(self.store.exists(f"models/{sha256}/{name}")):
                self.write_key(f"models/{sha256}/{name}", files[name])

    def use_model(self, sha256: str) -> None:
        """Make a stored model known to the codec.

        Raises:
            ArchiveError: it is missing, or its contents do not have this hash.
        """
        from archive_pipeline.models import register
        from archive_pipeline.pcdc.model import DENOISER_FILES, FILES, digest

        files = {}
        for name in FILES + DENOISER_FILES:
            data = self.read_key(f"models/{sha256}/{name}")
            if data is None and name in DENOISER_FILES:
                continue
            if data is None:
                raise ArchiveError(f"{self.url}: models/{sha256}/{name} is missing")
            files[name] = data
        if digest(files) != sha256:
            raise ArchiveError(f"{self.url}: models/{sha256} is damaged: its hash is another")
        register(files)

    def ensure_model(self, sha256: str) -> None:
        """Make a stored model known to the codec, unless this process knows it already.

        Raises:
            ArchiveError: it is missing, or its contents do not have this hash.
        """
        from archive_pipeline.models import is_known

        if not is_known(sha256):
            self.use_model(sha256)

    def add_policy(self, data: bytes) -> str:
        """Store an allocation policy's file once, for workers that encode; returns its SHA-256.

        Raises:
            ArchiveError: the store fails.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        if not self.size_of_key(_policy_key(sha256)):
            self.write_key(_policy_key(sha256), data)
        return sha256

    def ensure_policy(self, sha256: str, model: str) -> None:
        """Make a stored policy for a known model known to the codec, unless it is already.

        Raises:
            ArchiveError: it is missing, damaged, or for another codec.
        """
        from archive_pipeline.models import codec_for, is_known_policy, register_policy
        from archive_pipeline.pcdc.policy import PolicyError

        if is_known_policy(sha256):
            return
        data = self.read_policy(sha256)
        try:
            register_policy(data, codec_for(model).model.networks.config.latents)
        except PolicyError as error:
            raise ArchiveError(f"{self.url}: {_policy_key(sha256)}: {error}") from error

    def read_policy(self, sha256: str) -> bytes:
        """Read a stored policy's file.

        Raises:
            ArchiveError: it is missing, or its contents do not have this hash.
        """
        data = self.read_key(_policy_key(sha256))
        if data is None:
            raise ArchiveError(f"{self.url}: {_policy_key(sha256)} is missing")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ArchiveError(f"{self.url}: {_policy_key(sha256)} is damaged: its hash is another")
        return data

    def require_denoiser(self, entry: ImageEntry) -> None:
        """Make sure that an image can be decoded with denoising steps; lossless ones always can.

        Raises:
            ArchiveError: its model has no denoiser, or is missing or damaged.
        """
        if entry.record["codec"] != "pcdc":
            return
        from archive_pipeline.models import has_denoiser

        sha256 = entry.record["model"]
        self.ensure_model(sha256)
        if not has_denoiser(sha256):
            raise ArchiveError(
                f"{entry.flight}/{entry.id}: its model {sha256[:12]} has no denoiser; "
                "--steps 0 restores it"
            )

    # --------------------------------------------------------------- queries

    def flights(self) -> list[str]:
        """Names of all flights."""
        return [_unquote(n) for n in self.list_names("flights") if n != "zarr.json"]

    def keys(self, flight: str | None = None) -> Iterator[str]:
        """Group paths of a flight's images, or of all: committed or not, whole or damaged."""
        names = self.list_names("flights") if flight is None else [_quote(flight)]
        for name in names:
            if name != "zarr.json":
                for key in self.list_names(f"flights/{name}"):
                    if key != "zarr.json":
                        yield f"flights/{name}/{key}"

    def images(
        self,
        flight: str | None = None,
        damaged: Callable[[str, ArchiveError], None] | None = None,
    ) -> Iterator[ImageEntry]:
        """Committed images of a flight, or of all, in the order of their names.

        Args:
            flight: only this one.
            damaged: called with the name ("flight/id") and the error of each image whose record
                is damaged, which is then passed over.

        Raises:
            ArchiveError: a record is damaged and `damaged` is None.
        """
        for key in self.keys(flight):
            try:
                entry = self.entry(key)
            except ArchiveError as error:
                if damaged is None:
                    raise
                damaged(_unquote(key.removeprefix("flights/")), error)
                continue
            if entry is not None:
                yield entry

    def entry(self, key: str) -> ImageEntry | None:
        """The image whose group is at `key`, None where none is committed.

        Raises:
            ArchiveError: its record is damaged.
        """
        raw = self.read_key(f"{key}/zarr.json")
        if raw is None:
            return None
        try:
            record = json.loads(raw).get("attributes", {}).get(ATTRIBUTE)
            if record is None:
                return None
            _check_record(record)
            entry = ImageEntry(_unquote(key.split("/")[1]), record["id"], key, record)
            if image_key(entry.flight, entry.id) != key:
                raise ValueError(f"it is the record of {entry.id!r}")
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            RecursionError,
        ) as error:
            name = _unquote(key.removeprefix("flights/"))
            raise ArchiveError(f"{name}: damaged record: {_reason(error)}") from error
        return entry

    def image(self, entry: ImageEntry) -> ArchivedImage:
        """Open an image for reading."""
        return ArchivedImage(self, entry)


def _check_record(record: dict[str, Any]) -> None:
    """Refuse a record whose fields are not what readers rely on (ValueError, KeyError, ...)."""
    limits = {"width": MAX_SIDE, "height": MAX_SIDE, "bands": MAX_BANDS}
    for name, limit in limits.items():
        if type(record[name]) is not int or not 0 < record[name] <= limit:
            raise ValueError(f"{name} {record[name]!r} is out of range")
    for name in ("source_bytes", "archive_bytes"):
        if type(record[name]) is not int or record[name] < 0:
            raise ValueError(f"{name} {record[name]!r} is not a size")
    if record["codec"] not in ("pcdc", "lossless"):
        raise ValueError(f"codec {record['codec']!r} is unknown")
    if record["mask"] not in ("none", "alpha", "mask", "nodata"):
        raise ValueError(f"mask {record['mask']!r} is unknown")
    if not all(isinstance(record[name], str) and record[name] for name in ("id", "sha256")):
        raise ValueError("id and sha256 are not names")
    if not isinstance(record["captured"], str | None):
        raise ValueError("captured is not a time")
    detectors = record.get("detectors", [])
    if not isinstance(detectors, list) or not all(isinstance(d, str) for d in detectors):
        raise ValueError("detectors are not names")
    np.dtype(record["dtype"])
    georef = Georef.from_json(record["georef"])
    if not isinstance(georef.crs, str | None):
        raise ValueError("its CRS is not a text")
    numbers = [*(georef.transform or ()), *(x for point in georef.footprint or () for x in point)]
    if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        raise ValueError("its georeference is not finite")
    if georef.transform is not None and len(georef.transform) != 6:
        raise ValueError("its transform has not six numbers")
    if georef.footprint is not None and len(georef.footprint) < 4:
        raise ValueError("its footprint is not a ring")


def pack_metadata(source: SourceImage) -> bytes:
    """Serialise a source record and its byte-for-byte originals: a JSON index, then the blobs."""
    record = json.dumps(source.to_json(), separators=(",", ":")).encode()
    blobs = [("record", record), *source.metadata]
    index = json.dumps([[n, len(b)] for n, b in blobs], separators=(",", ":")).encode()
    return struct.pack("<I", len(index)) + index + b"".join(b for _, b in blobs)


def unpack_metadata(data: bytes) -> SourceImage:
    """Reverse `pack_metadata`.

    Raises:
        ValueError, KeyError, TypeError: the data are damaged.
    """
    if len(data) < 4:
        raise ValueError("metadata end early")
    (length,) = struct.unpack_from("<I", data)
    index = json.loads(data[4 : 4 + length])
    position = 4 + length
    blobs: list[tuple[str, bytes]] = []
    for name, size in index:
        if type(size) is not int or not 0 <= size <= len(data) - position:
            raise ValueError("metadata end early")
        blobs.append((str(name), data[position : position + size]))
        position += size
    return SourceImage.from_json(json.loads(blobs[0][1]), tuple(blobs[1:]))


class ArchivedImage:
    """A committed image, open for reading; a `Raster` source for `archive_pipeline.outputs`."""

    def __init__(self, archive: Archive, entry: ImageEntry) -> None:
        self.archive = archive
        self.entry = entry
        self._arrays: dict[str, zarr.Array] = {}
        self._present: set[str] = set()
        self._source: SourceImage | None = None

    @property
    def source(self) -> SourceImage:
        """The source record with its byte-for-byte originals.

        Raises:
            ArchiveError: the metadata are damaged.
        """
        if self._source is None:
            self._source = self._read_bytes("metadata", unpack_metadata)
        return self._source

    def detections(self, unpack: Callable[[bytes], T]) -> T | None:
        """Objects found in the original at ingest, None where none were looked for.

        Args:
            unpack: reads what `ImageWriter.write_detections` was given.

        Raises:
            ArchiveError: they are damaged.
        """
        if not self.entry.record.get("detectors"):
            return None
        return self._read_bytes("detections", unpack)

    def _read_bytes(self, name: str, unpack: Callable[[bytes], T]) -> T:
        array = self.array(name)
        try:
            if array.ndim != 1 or array.shape[0] > MAX_METADATA:
                raise ValueError(f"shape {array.shape}")
            self._require(array, name, (0,), array.shape)
            return unpack(np.asarray(array[:]).tobytes())
        except ArchiveError:
            raise
        except Exception as error:  # any damage ends in one clear line
            raise self._damaged(name, error) from error

    @property
    def block(self) -> tuple[int, int]:
        """(width, height) of the tiles that reads decode whole."""
        chunks = self.array("pixels").chunks
        return chunks[1], chunks[0]

    def read(self, window: Window) -> NDArray[Any]:
        """Pixels (height, width, bands) of a window (col, row, width, height).

        Raises:
            ArchiveError: naming the image and the tiles that are damaged.
        """
        return self._read("pixels", window)

    def read_mask(self, window: Window) -> NDArray[np.uint8] | None:
        """Mask uint8 (height, width) of a window; None where the source has none."""
        return self._read("mask", window) if self.entry.record["mask"] != "none" else None

    def _read(self, name: str, window: Window) -> NDArray[Any]:
        array = self.array(name)
        col, row, width, height = window
        if name == "pixels" and self.entry.record["codec"] == "pcdc":
            self._know_model(array)
        area = (slice(row, row + height), slice(col, col + width))
        try:
            self._require(array, name, (row, col), (row + height, col + width))
            return np.asarray(array[area])
        except ArchiveError:
            raise
        except Exception as error:  # codecs and stores raise what they like
            bad = self.damaged_tiles(name, window)
            if not bad:
                raise self._damaged(name, error) from error
            places = ", ".join(f"row {r} column {c}" for r, c, _ in bad[:4])
            more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
            raise ArchiveError(
                f"{self.entry.flight}/{self.entry.id}: {name}: damaged tile at {places}{more}: "
                f"{bad[0][2]}"
            ) from error

    def damaged_tiles(self, name: str, window: Window | None = None) -> list[tuple[int, int, str]]:
        """Tiles (row, column, reason) of an array that cannot be decoded, the first hundred."""
        array = self.array(name)
        rows, cols = array.chunks[:2]
        height, width = array.shape[:2]
        left, top, w, h = window or (0, 0, width, height)
        bad = []
        for r in range(top // rows, -(-(top + h) // rows)):
            for c in range(left // cols, -(-(left + w) // cols)):
                low, high = (r * rows, c * cols), ((r + 1) * rows, (c + 1) * cols)
                try:
                    self._require(array, name, low, high)
                    array[low[0] : high[0], low[1] : high[1]]
                except Exception as error:
                    bad.append((r, c, _reason(error).removeprefix("tile 0 of 1: ")))
                    if len(bad) == MAX_REPORTED:
                        return bad
        return bad

    def array(self, name: str) -> zarr.Array:
        """One of the image's arrays: "pixels", "mask", "metadata" or "detections".

        Raises:
            ArchiveError: it is missing or contradicts the record.
        """
        if name not in self._arrays:
            key = f"{self.entry.key}/{name}"
            try:
                array = zarr.open_array(self.archive.store, path=key, mode="r")
            except Exception as error:  # missing or malformed metadata
                raise self._damaged(name, error) from error
            record = self.entry.record
            expected: dict[str, tuple[tuple[int, ...], str]] = {
                "pixels": ((record["height"], record["width"], record["bands"]), record["dtype"]),
                "mask": ((record["height"], record["width"]), "uint8"),
                "metadata": (array.shape, "uint8"),
                "detections": (array.shape, "uint8"),
            }
            if (array.shape, array.dtype.name) != expected[name]:
                raise self._damaged(
                    name, ValueError(f"{array.dtype} {array.shape} contradicts the record")
                )
            if math.prod(array.chunks) * array.dtype.itemsize > MAX_CHUNK:
                raise self._damaged(
                    name, ValueError(f"tiles of {array.chunks} are larger than allowed")
                )
            self._arrays[name] = array
        return self._arrays[name]

    def _know_model(self, array: zarr.Array) -> None:
        sharding = array.metadata.codecs[0]  # type: ignore[union-attr]
        inner = getattr(sharding, "codecs", array.metadata.codecs)  # type: ignore[union-attr]
        for codec in inner:
            if isinstance(codec, PCDCCodec):
                try:
                    self.archive.ensure_model(codec.model)
                except ArchiveError as error:
                    raise self._damaged("pixels", error) from error

    def _require(
        self, array: zarr.Array, name: str, low: tuple[int, ...], high: tuple[int, ...]
    ) -> None:
        """Zarr reads an absent shard as fill values; a committed image has all of them."""
        outer = array.shards or array.chunks
        spans = [
            range(a // s, -(-min(b, n) // s))
            for a, b, s, n in zip(low, high, outer, array.shape, strict=False)
        ]
        for place in np.ndindex(*(len(s) for s in spans)):
            at = [s[i] for s, i in zip(spans, place, strict=True)]
            at += [0] * (array.ndim - len(at))
            key = f"{self.entry.key}/{name}/{array.metadata.encode_chunk_key(tuple(at))}"
            if key not in self._present:
                if not self.archive.size_of_key(key):  # zarr takes an empty one for absent, too
                    shard = f"{name}/{key.removeprefix(f'{self.entry.key}/{name}/')}"
                    raise ArchiveError(
                        f"{self.entry.flight}/{self.entry.id}: {shard} is missing or empty"
                    )
                self._present.add(key)

    def _damaged(self, name: str, error: BaseException) -> ArchiveError:
        return ArchiveError(
            f"{self.entry.flight}/{self.entry.id}: {name} is damaged: {_reason(error)}"
        )


def _reason(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):  # its text is the bare key
        return f"{error} is missing"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class ImageWriter:
    """Writes one image: mask and metadata, then pixels shard by shard, then the commit.

    A crash at any point before `commit` leaves no visible image.
    """

    def __init__(self, archive: Archive, flight: str, source: SourceImage) -> None:
        self.archive = archive
        self.flight = flight
        self.source = source
        self.key = image_key(flight, source.id)
        archive.delete(self.key)

    def write_metadata(self) -> None:
        """Store the source record and the byte-for-byte originals."""
        self._write_bytes("metadata", pack_metadata(self.source))

    def write_detections(self, data: bytes) -> None:
        """Store objects found in the original; before the pixels, which share the budget."""
        self._write_bytes("detections", data)

    def _write_bytes(self, name: str, content: bytes) -> None:
        data = np.frombuffer(content, np.uint8)
        array = self._create(name, data.shape, data.dtype, data.shape, None, 1)
        array[:] = data

    def create_mask(self) -> zarr.Array:
        """Create the lossless mask array, uint8 (height, width)."""
        shape = (self.source.height, self.source.width)
        return self._create("mask", shape, np.dtype(np.uint8), *_grid(shape, 1), 1)

    def create_lossless(self) -> zarr.Array:
        """Create a lossless pixel array (height, width, bands) of the source's dtype."""
        s = self.source
        shape = (s.height, s.width, s.bands)
        dtype = np.dtype(s.dtype)
        return self._create("pixels", shape, dtype, *_grid(shape, dtype.itemsize), dtype.itemsize)

    def create_pixels(
        self,
        model: str,
        budget: int,
        coded: tuple[int, int],
        record: dict[str, Any],
        conventions: dict[str, Any],
        least: int = 0,
    ) -> zarr.Array:
        """Create the pcdc pixel array, uint8 (height, width, 3), after all others.

        Args:
            model: SHA-256.
            budget: bytes for everything stored for the image.
            coded: pixels that are coded, and tiles that hold none.
            record, conventions: what `commit` will be given.
            least: bytes that the pixels should have at least.

        Raises:
            NothingLeft: everything else takes the budget.
        """
        # Its own metadata count too; their length depends on the number of bits in them alone.
        probe = 0.5
        array = self._create_pixels(model, probe)
        metadata = self.archive.size_of_key(f"{self.key}/pixels/zarr.json") - len(repr(probe))
        outer = [-(-n // s) for n, s in zip(array.shape, array.shards or (), strict=True)]
        inner = [s // c for s, c in zip(array.shards or (), array.chunks, strict=True)]
        tiles = math.prod(outer) * math.prod(inner)
        pixels, empty = coded
        # The record gives its own total: as many digits as the budget at most.
        others = self._stored() - self.archive.size_of_key(f"{self.key}/pixels/zarr.json")
        fixed = (
            others
            + len(_group_json({**record, "archive_bytes": budget}, conventions))
            + metadata
            + SHARD_INDEX_BYTES * tiles
            + CHECKSUM_BYTES * (math.prod(outer) + tiles)
            + EMPTY_BYTES * empty
        )
        left = budget - fixed - BITS_DIGITS
        if left <= least:
            raise NothingLeft(budget)
        bits = math.floor(8e6 * left / max(pixels, 1)) / 1e6
        return self._create_pixels(model, max(bits, 1e-6))

    def _create_pixels(self, model: str, bits_per_pixel: float) -> zarr.Array:
        shape = (self.source.height, self.source.width, 3)
        chunks, shards = _grid(shape, 1)
        return zarr.create_array(
            self.archive.store,
            name=f"{self.key}/pixels",
            shape=shape,
            dtype=np.uint8,
            chunks=chunks,
            shards=shards,
            fill_value=0,
            filters=None,
            serializer=PCDCCodec(model, bits_per_pixel),
            compressors=[Crc32cCodec()],
            dimension_names=("y", "x", "band"),
            # an absent tile is then always damage
            config={"write_empty_chunks": True},
            overwrite=True,
        )

    def _stored(self) -> int:
        """Bytes of the image's arrays; creating them made a group, which the record replaces."""
        return self.archive.size_of(self.key) - self.archive.size_of_key(f"{self.key}/zarr.json")

    def commit(self, record: dict[str, Any], conventions: dict[str, Any]) -> ImageEntry:
        """Make the image visible, by writing its record."""
        stored = total = self._stored()
        while True:
            final = {**record, "archive_bytes": total}
            content = _group_json(final, conventions)
            if total == stored + len(content):
                break
            total = stored + len(content)
        self.archive.write_key(f"{self.key}/zarr.json", content)
        return ImageEntry(self.flight, self.source.id, self.key, final)

    def _create(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        chunks: tuple[int, ...],
        shards: tuple[int, ...] | None,
        itemsize: int,
    ) -> zarr.Array:
        shuffle: Literal["shuffle", "bitshuffle", "noshuffle"] = "noshuffle"
        if itemsize > 1:
            shuffle = "shuffle"
        elif name == "mask":
            shuffle = "bitshuffle"
        return zarr.create_array(
            self.archive.store,
            name=f"{self.key}/{name}",
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            shards=shards,
            fill_value=0,
            filters=None,
            compressors=[
                BloscCodec(cname="zstd", clevel=7, shuffle=shuffle, typesize=itemsize),
                Crc32cCodec(),
            ],
            dimension_names=("y", "x", "band")[: len(shape)] if len(shape) > 1 else ("byte",),
            config={"write_empty_chunks": True},
            overwrite=True,
        )


def is_one_shard(width: int, height: int) -> bool:
    """Whether an 8-bit RGB image is one shard, written in one piece."""
    return -(-width // TILE) * -(-height // TILE) <= SHARD_TILES


def shard_windows(array: zarr.Array) -> Iterator[Window]:
    """Windows (col, row, width, height) that cover an image array a whole shard at a time."""
    height, width = array.shape[:2]
    rows, cols = (array.shards or array.chunks)[:2]
    for row in range(0, height, rows):
        for col in range(0, width, cols):
            yield col, row, min(cols, width - col), min(rows, height - row)


def shard_count(array: zarr.Array) -> int:
    """Number of an array's shards."""
    outer = array.shards or array.chunks
    return math.prod(-(-n // s) for n, s in zip(array.shape, outer, strict=True))


def _group_json(record: dict[str, Any], conventions: dict[str, Any]) -> bytes:
    attributes = {ATTRIBUTE: record, **conventions}
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(group, separators=(",", ":")).encode()


def _grid(shape: tuple[int, ...], itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunks and shards of an image array (height, width[, bands])."""
    rest = shape[2:]
    side = TILE
    while side > 64 and side * side * itemsize * int(np.prod(rest)) > LOSSLESS_CHUNK_BYTES:
        side //= 2
    rows, columns = -(-shape[0] // side), -(-shape[1] // side)
    if rows * columns > SHARD_TILES:
        rows, columns = _shard_side(rows), _shard_side(columns)
    return (side, side, *rest), (rows * side, columns * side, *rest)


def _shard_side(tiles: int) -> int:
    """Tiles a side of a large image's shards: the last shard is not a sliver.

    Shards share the budget by their pixels, and a few pixels' share is not enough for a stream.
    """
    if tiles <= LARGE_SHARD_SIDE:
        return tiles
    sides = range(LARGE_SHARD_SIDE // 2, LARGE_SHARD_SIDE + 1)
    return max(sides, key=lambda side: ((tiles - 1) % side, side))
