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
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote, unquote

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.array_spec import ArrayConfig
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, StorePath

from archive_pipeline.flight import SourceImage
from archive_pipeline.georef import Georef, Window
from archive_pipeline.locks import is_locked, locked
from archive_pipeline.objects import (
    CompleteStore,
    MissingShard,
    Stored,
    delete_keys,
    has_versions,
    is_url,
    list_keys,
    open_store,
)
from archive_pipeline.pcdc.bitstream import EMPTY_BYTES
from archive_pipeline.zarr_codec import PCDCCodec

T = TypeVar("T")
Shuffle = Literal["shuffle", "bitshuffle", "noshuffle"]
FORMAT = 1
ATTRIBUTE = "archive_pipeline"
UNFINISHED = "archive_pipeline_unfinished"  # the plan of an image that is being written
TILE = 608  # divides 5472 x 3648; other sizes end in narrower tiles
SHARD_TILES = 100  # an image of at most so many tiles is one shard
LARGE_SHARD_SIDE = 8  # tiles a side of the shards of larger images
MAX_SIDE = 1 << 24
MAX_BANDS = 1 << 16
MAX_METADATA = 64 << 20
MAX_CHUNK = 256 << 20  # bytes
MAX_SHARD = 1 << 30  # bytes of pixels
MAX_NAME = 240  # bytes of a node's name; file systems end at 255
MAX_REPORTED = 100  # damaged tiles looked for in one read
LOSSLESS_CHUNK_BYTES = 4 << 20
SHARD_INDEX_BYTES = 16  # a tile's offset and length
CHECKSUM_BYTES = 4  # of every tile and of every shard's index
BITS_DIGITS = 12  # of bits_per_pixel in the metadata, at most

ARRAY_CONFIG = ArrayConfig.from_dict({"write_empty_chunks": True})  # an absent tile is damage
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
            detectors (SHA-256 of those whose detections are stored; absent without any),
            source_version (ETag of a source at a URL).
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
    return url if is_url(url) else str(Path(url).absolute())


def _store(url: str, read_only: bool) -> Store:
    try:
        return open_store(url, read_only)
    except (ImportError, ValueError) as error:
        raise ArchiveError(f"{url}: {error}") from error


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
            # never twice: the file that is there is what processes lock
            data = default_buffer_prototype().buffer.from_bytes(
                _group_json({ATTRIBUTE: {"format": FORMAT}})
            )
            try:
                sync(archive.store.set_if_not_exists("zarr.json", data))
            except Exception as error:  # what a store raises depends on its backend
                raise ArchiveError(f"{url}: zarr.json: {_reason(error)}") from error
        return cls.open(url, writable=True)

    @classmethod
    def reopen(cls, url: str, *, writable: bool = False) -> Archive:
        """Open an archive that `open` has found there before; nothing is read to do so."""
        return cls(url, _store(url, not writable))

    def create_flight(self, flight: str) -> None:
        """Make a flight's group and the one around it, where they are missing.

        Raises:
            ArchiveError: the store fails.
        """
        for key in ("flights/zarr.json", f"flights/{_quote(flight)}/zarr.json"):
            if self.read_key(key) is None:
                self.write_key(key, _group_json({}))

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

    def stored(self, prefix: str) -> dict[str, Stored]:
        """All keys below a prefix.

        Raises:
            ArchiveError: the store fails.
        """
        try:
            return sync(list_keys(self.store, prefix))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except Exception as error:  # what a store raises depends on its backend
            raise ArchiveError(f"{self.url}: {prefix}: {_reason(error)}") from error

    def size_of(self, prefix: str) -> int:
        """Bytes of all keys below a prefix."""
        return sum(key.size for key in self.stored(prefix).values())

    def delete(self, keys: Collection[str]) -> None:
        """Remove keys of one node, its record or metadata first: half removed is invisible.

        Raises:
            ArchiveError: the store fails.
        """
        first = min((key for key in keys if key.endswith("/zarr.json")), key=len, default=None)
        try:
            for some in ([first] if first else [], [key for key in keys if key != first]):
                if some:
                    sync(delete_keys(self.store, some))
        except Exception as error:  # what a store raises depends on its backend
            raise ArchiveError(f"{self.url}: {_reason(error)}") from error

    # ---------------------------------------------------------------- models

    def add_model(self, sha256: str, files: dict[str, bytes]) -> None:
        """Store a model's files once; readers of this archive need nothing else."""
        present = self.stored(f"models/{sha256}")
        for name in sorted(files, reverse=True):  # config.json last: then the folder is complete
            if f"models/{sha256}/{name}" not in present:
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
        if self.read_key(_policy_key(sha256)) is None:
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

    def record_versions(self, flight: str | None = None) -> dict[str, str] | None:
        """Group paths of images that may be committed, with their records' versions.

        A version changes whenever the record does. None on stores that have none, such as a
        local disk.
        """
        prefix = "flights" if flight is None else f"flights/{_quote(flight)}"
        if not has_versions(self.store):
            return None
        versions = {}
        for key, stored in self.stored(prefix).items():
            image, _, name = key.rpartition("/")
            if name == "zarr.json" and image.count("/") == 2:
                if stored.version is None:
                    return None
                versions[image] = stored.version
        return versions

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
                damaged(image_name(key), error)
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
        except (ValueError, AttributeError, RecursionError) as error:
            raise _damaged_record(key, error) from error
        return None if record is None else self.entry_of(key, record)

    def entry_of(self, key: str, record: Any) -> ImageEntry:
        """The image whose group at `key` holds this record.

        Raises:
            ArchiveError: the record is damaged.
        """
        try:
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
            raise _damaged_record(key, error) from error
        return entry

    def image(self, entry: ImageEntry) -> ArchivedImage:
        """Open an image for reading."""
        return ArchivedImage(self, entry)


def image_name(key: str) -> str:
    """An image's name ("flight/id") by its group's path, for messages."""
    return _unquote(key.removeprefix("flights/"))


def _damaged_record(key: str, error: BaseException) -> ArchiveError:
    return ArchiveError(f"{image_name(key)}: damaged record: {_reason(error)}")


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
    if not isinstance(record.get("source_version"), str | None):
        raise ValueError("source_version is not a text")
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
            return unpack(np.asarray(array[:]).tobytes())
        except MissingShard as error:
            raise self._missing(error) from error
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
            return np.asarray(array[area])
        except MissingShard as error:
            raise self._missing(error) from error
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
                array = zarr.open_array(
                    CompleteStore(self.archive.store), path=key, mode="r", zarr_format=3
                )
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
            sizes = (array.chunks, MAX_CHUNK), (array.shards or array.chunks, MAX_SHARD)
            for shape, limit in sizes:
                if not 0 < math.prod(shape) * array.dtype.itemsize <= limit:
                    raise self._damaged(
                        name, ValueError(f"tiles of {shape} are empty or larger than allowed")
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

    def _missing(self, error: MissingShard) -> ArchiveError:
        shard = str(error).removeprefix(f"{self.entry.key}/")
        return ArchiveError(f"{self.entry.flight}/{self.entry.id}: {shard} is missing or empty")

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
        return raw == _group_json({UNFINISHED: self._plan})

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
        spec = self._lossless(shape, np.dtype(np.uint8), *_grid(shape, 1), shuffle="bitshuffle")
        return self._create("mask", spec)

    def create_lossless(self) -> zarr.Array:
        """Create a lossless pixel array (height, width, bands) of the source's dtype."""
        s = self.source
        shape = (s.height, s.width, s.bands)
        dtype = np.dtype(s.dtype)
        shuffle: Shuffle = "shuffle" if dtype.itemsize > 1 else "noshuffle"
        spec = self._lossless(shape, dtype, *_grid(shape, dtype.itemsize), shuffle=shuffle)
        return self._create("pixels", spec)

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
        array, content = self._pixels(model, probe)
        metadata = len(content) - len(repr(probe))
        outer = [-(-n // s) for n, s in zip(array.shape, array.shards or (), strict=True)]
        inner = [s // c for s, c in zip(array.shards or (), array.chunks, strict=True)]
        tiles = math.prod(outer) * math.prod(inner)
        pixels, empty = coded
        # The record gives its own total: as many digits as the budget at most.
        fixed = (
            self._stored(without="pixels")
            + len(_record_json({**record, "archive_bytes": budget}, conventions))
            + metadata
            + SHARD_INDEX_BYTES * tiles
            + CHECKSUM_BYTES * (math.prod(outer) + tiles)
            + EMPTY_BYTES * empty
        )
        left = budget - fixed - BITS_DIGITS
        if left <= least:
            raise NothingLeft(budget)
        bits = math.floor(8e6 * left / max(pixels, 1)) / 1e6
        return self._create("pixels", self._pixels(model, max(bits, 1e-6)))

    def missing(self, array: zarr.Array) -> list[Window]:
        """Windows (col, row, width, height) of the shards that are still to be written."""
        name = array.path.rpartition("/")[2]
        rows, cols = (array.shards or array.chunks)[:2]
        rest = (0,) * (array.ndim - 2)
        windows = []
        for window in shard_windows(array):
            place = (window[1] // rows, window[0] // cols, *rest)
            shard = array.metadata.encode_chunk_key(place)
            if f"{self.key}/{name}/{shard}" not in self._kept:
                windows.append(window)
        return windows

    def commit(self, record: dict[str, Any], conventions: dict[str, Any]) -> ImageEntry:
        """Make the image visible, by writing its record."""
        stored = total = self._stored()
        while True:
            final = {**record, "archive_bytes": total}
            content = _record_json(final, conventions)
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
            self.archive.write_key(f"{self.key}/zarr.json", _group_json({UNFINISHED: self._plan}))
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
        chunks, shards = _grid(shape, 1)
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


def _record_json(record: dict[str, Any], conventions: dict[str, Any]) -> bytes:
    return _group_json({ATTRIBUTE: record, **conventions})


def _group_json(attributes: dict[str, Any]) -> bytes:
    group = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    return json.dumps(group, separators=(",", ":")).encode()


def _grid(shape: tuple[int, ...], itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunks and shards of an image array (height, width[, bands])."""
    rest = shape[2:]
    side, pixel = TILE, itemsize * math.prod(rest)
    while side > 64 and side * side * pixel > LOSSLESS_CHUNK_BYTES:
        side //= 2
    rows, columns = -(-shape[0] // side), -(-shape[1] // side)
    # so many bands that the smallest tile is large: a shard is still held in memory
    most = min(SHARD_TILES, max(1, SHARD_TILES * LOSSLESS_CHUNK_BYTES // (side * side * pixel)))
    if rows * columns > most:
        limit = min(LARGE_SHARD_SIDE, math.isqrt(most))
        rows, columns = _shard_side(rows, limit), _shard_side(columns, limit)
    return (side, side, *rest), (rows * side, columns * side, *rest)


def _shard_side(tiles: int, limit: int) -> int:
    """Tiles a side of a large image's shards: the last shard is not a sliver.

    Shards share the budget by their pixels, and a few pixels' share is not enough for a stream.
    """
    if tiles <= limit:
        return tiles
    sides = range(max(1, limit // 2), limit + 1)
    return max(sides, key=lambda side: ((tiles - 1) % side, side))
