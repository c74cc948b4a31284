"""A committed image of an archive, open for reading."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray

from archive_pipeline.codec.jpeg_codec import JPEGFileCodec, file_of
from archive_pipeline.codec.settings import DEFAULT, Settings
from archive_pipeline.codec.zarr_codec import with_settings
from archive_pipeline.errors import NotInstalled
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.geo.georef import Window
from archive_pipeline.pcdc.model_files import ModelError
from archive_pipeline.store._arrays import FILE_OVERHEAD, model_of, open_array
from archive_pipeline.store._backends import MissingShard, TooLarge
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.layout import (
    MAX_JSON,
    MAX_METADATA,
    STAGED,
    TILE,
    ArchiveError,
    ImageEntry,
    array_generation,
    is_shard,
    overview_name,
    overview_shape,
    reason_of,
    unpack_metadata,
)
from archive_pipeline.store.stored_models import ensure_model

T = TypeVar("T")
MAX_ARRAY_DOCUMENT = 64 << 10  # bytes of an array's zarr.json
CHECKSUM_BYTES = 4  # behind a chunk that is a file
MAX_REPORTED = 100  # damaged tiles looked for in one read


class ArchivedImage:
    """A committed image, open for reading; what a `flight.raster.Raster` is made from.

    An image may be replaced while it is open. Each call then gives what was there before or what
    is there now, never some of both; from then on all give the latter.

    Args:
        settings: how its pixels are decoded.
        fixed: fields of the record that the image must keep then, beside its size and data type.

    Attributes:
        entry: the image that the last call read: another one once it was replaced.
    """

    def __init__(
        self,
        archive: Archive,
        entry: ImageEntry,
        settings: Settings = DEFAULT,
        fixed: tuple[str, ...] = (),
    ) -> None:
        self.archive = archive
        self.entry = entry
        self.settings = settings
        self._fixed = ("width", "height", "bands", "dtype", "mask", *fixed)
        self._arrays: dict[str, zarr.Array] = {}
        self._source: SourceImage | None = None

    @property
    def source(self) -> SourceImage:
        """The source record with its byte-for-byte originals.

        Raises:
            ArchiveError: the metadata are damaged.
        """
        if self._source is None:
            self._source = self._now(
                lambda: self._read_bytes("metadata", unpack_metadata, MAX_METADATA)
            )
        return self._source

    @property
    def decoder(self) -> str:
        """What makes its pixels, for people: codec, model and settings."""
        record, settings = self.entry.record, self.settings
        if record["codec"] != "pcdc":
            return "lossless"
        text = f"pcdc {record['model'][:12]}, steps {settings.steps}"
        if settings.steps:
            text += f", realism {str(settings.realism).removesuffix('.0')}, seed {settings.seed}"
        return text

    def take_blocks(self, blocks: Iterable[tuple[str, bytes]]) -> None:
        """Have `source` hold these metadata blocks, those of the original for one."""
        self._source = replace(self.source, metadata=tuple(blocks))

    def detections(self, unpack: Callable[[bytes], T]) -> T | None:
        """Objects found in the original at ingest, None where none were looked for.

        Args:
            unpack: reads what `ImageWriter.write_detections` was given.

        Raises:
            ArchiveError: they are damaged.
        """

        def read() -> T | None:
            found = bool(self.entry.record.get("detectors"))
            return self._read_bytes("detections", unpack, MAX_JSON) if found else None

        return self._now(read)

    def _now(self, read: Callable[[], T]) -> T:
        """What a read gives; if the image was replaced meanwhile, of the one that is there now."""
        while True:
            try:
                return read()
            except ArchiveError:
                if not self._renew():
                    raise

    def _renew(self) -> bool:
        """Take the image that is there now, if it is another one than the one that is open.

        Raises:
            ArchiveError: it does not fit to what was read before.
        """
        try:
            entry = self.archive.entry(self.entry.key)
        except ArchiveError:
            return False
        if entry is None or entry.record == self.entry.record:
            return False
        if any(entry.record[name] != self.entry.record[name] for name in self._fixed):
            raise ArchiveError(
                f"{entry.flight}/{entry.id}: replaced by another image while it was read; read it "
                "again"
            )
        self.entry, self._arrays, self._source = entry, {}, None
        return True

    def _read_bytes(self, name: str, unpack: Callable[[bytes], T], most: int) -> T:
        array = self.array(name)
        try:
            if array.ndim != 1 or array.shape[0] > most:
                raise ValueError(f"shape {array.shape}")
            return unpack(np.asarray(array[:]).tobytes())
        except MissingShard as error:
            raise self._missing(error) from error
        except Exception as error:  # any damage ends in one clear line
            raise self._damaged(name, error) from error

    def original(self) -> bytes | None:
        """The source file, byte for byte; None where only its pixels are kept.

        Raises:
            ArchiveError: it is missing or damaged.
        """
        return self._now(self._original)

    def _original(self) -> bytes | None:
        record, array = self.entry.record, self.array("pixels")
        codec = array.serializer
        if not isinstance(codec, JPEGFileCodec):
            return None
        chunk = array.metadata.encode_chunk_key((0, 0, 0))
        try:
            stored = self.archive.read_key(f"{array.path}/{chunk}", codec.bytes + FILE_OVERHEAD)
            if stored is None:
                raise ValueError(f"{chunk} is missing")
            pixels = array.shape[0] * array.shape[1]
            data = file_of(stored[:-CHECKSUM_BYTES], codec.bytes, pixels)
        except NotInstalled as error:
            raise self._not_installed(error) from error
        except (ArchiveError, ValueError) as error:
            raise self._damaged("pixels", error) from error
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise self._damaged("pixels", ValueError("the file in it is not the original"))
        return data

    @property
    def block(self) -> tuple[int, int]:
        """(width, height) of the tiles that reads decode whole; of a kept file's, as if it had any.

        A whole file is decoded at once, and kept for the next window.
        """
        if self._now(lambda: self.array("pixels")).shards is None:
            return TILE, TILE
        chunks = self._now(lambda: self.array("pixels")).chunks
        return chunks[1], chunks[0]

    def read(self, window: Window) -> NDArray[Any]:
        """Pixels (height, width, bands) of a window (col, row, width, height).

        Raises:
            ArchiveError: naming the image and the tiles that are damaged.
        """
        return self._now(lambda: self._read("pixels", window))

    def read_overview(self, factor: int, window: Window) -> NDArray[np.uint8]:
        """Pixels (height, width, 3) of a window (col, row, width, height) of an overview.

        Args:
            factor: one of `entry.overviews`.

        Raises:
            ArchiveError: naming the image and the tiles that are damaged.
        """
        return self._now(lambda: self._read(overview_name(factor), window))

    def read_mask(self, window: Window) -> NDArray[np.uint8] | None:
        """Mask uint8 (height, width) of a window; None where the source has none."""
        if self.entry.record["mask"] == "none":
            return None
        return self._now(lambda: self._read("mask", window))

    def _read(self, name: str, window: Window) -> NDArray[Any]:
        array = self.array(name)
        col, row, width, height = window
        if name != "mask" and self.entry.record["codec"] == "pcdc":
            try:
                ensure_model(self.archive, self.entry.record["model"])
            except ArchiveError as error:
                raise self._damaged(name, error) from error
        area = (slice(row, row + height), slice(col, col + width))
        try:
            return np.asarray(array[area])
        except MissingShard as error:
            raise self._missing(error) from error
        except NotInstalled as error:
            raise self._not_installed(error) from error
        except TooLarge as error:
            raise self._damaged(name, error) from error
        except (ModelError, ImportError) as error:  # no fault of the image's
            told = reason_of(error)
            raise ArchiveError(f"{self.entry.flight}/{self.entry.id}: {told}") from error
        except Exception as error:  # codecs and stores raise what they like
            if array.shards is None:  # of a file, which is decoded as a whole
                raise self._damaged(name, error) from error
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
                    bad.append((r, c, reason_of(error).removeprefix("tile 0 of 1: ")))
                    if len(bad) == MAX_REPORTED:
                        return bad
        return bad

    def array(self, name: str) -> zarr.Array:
        """One of the image's arrays: "pixels", "mask", "metadata", "detections", an overview.

        Raises:
            ArchiveError: it is missing or contradicts the record.
        """
        if name not in self._arrays:
            content, key = self._metadata(name), f"{self.entry.key}/{name}"
            try:
                sharded = name not in ("metadata", "detections")
                array = open_array(self.archive.store, key, content, sharded=sharded)
            except Exception as error:  # malformed metadata are of any kind
                raise self._damaged(name, error) from error
            record = self.entry.record
            expected: dict[str, tuple[tuple[int, ...], str]] = {
                "pixels": ((record["height"], record["width"], record["bands"]), record["dtype"]),
                "mask": ((record["height"], record["width"]), "uint8"),
                "metadata": (array.shape, "uint8"),
                "detections": (array.shape, "uint8"),
            }
            size = record["height"], record["width"]
            for factor in self.entry.overviews:
                expected[overview_name(factor)] = (*overview_shape(*size, factor), 3), "uint8"
            if (array.shape, array.dtype.name) != expected.get(name):
                raise self._damaged(
                    name, ValueError(f"{array.dtype} {array.shape} contradicts the record")
                )
            model = record["model"] if record["codec"] == "pcdc" and name != "mask" else None
            if sharded and model_of(array) != model:
                raise self._damaged(name, ValueError("its codec contradicts the record"))
            self._arrays[name] = with_settings(array, self.settings)
        return self._arrays[name]

    def count_shards(self, name: str) -> int:
        """Number of shards that are stored of an array."""
        prefix = f"{self.entry.key}/{name}"
        found = (key.removeprefix(f"{prefix}/") for key in self.archive.stored(prefix))
        return sum(is_shard(key, self.entry.generation) for key in found)

    def _metadata(self, name: str) -> bytes:
        """An array's metadata: its own, or staged ones that will be, of the record's generation."""
        found = None
        # staged ones may become its own between two reads
        for part in ("zarr.json", STAGED, "zarr.json"):
            key = f"{self.entry.key}/{name}/{part}"
            try:
                found = self.archive.read_key(key, MAX_ARRAY_DOCUMENT)
            except ArchiveError as error:
                raise self._damaged(name, error) from error
            if found is not None and array_generation(found) == self.entry.generation:
                return found
        if found is None:
            raise self._damaged(name, ValueError("its metadata are missing"))
        if array_generation(found) is None:
            return found  # what is wrong with them is found soon
        raise self._damaged(name, ValueError("its metadata are of another generation"))

    def _not_installed(self, error: NotInstalled) -> ArchiveError:
        return ArchiveError(f"{self.entry.flight}/{self.entry.id}: {error}")

    def _missing(self, error: MissingShard) -> ArchiveError:
        shard = str(error).removeprefix(f"{self.entry.key}/")
        return ArchiveError(f"{self.entry.flight}/{self.entry.id}: {shard} is missing or empty")

    def _damaged(self, name: str, error: BaseException) -> ArchiveError:
        return ArchiveError(
            f"{self.entry.flight}/{self.entry.id}: {name} is damaged: {reason_of(error)}"
        )
