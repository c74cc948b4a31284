"""The archive on disk or in a bucket: layout, commits and queries, on plain Zarr v3.

Layout (one image a group; everything else is derived or shared)::

    zarr.json                              root group, attribute archive_pipeline: format, and
                                           written_by, the version that made it (from 0.2.0 on)
    models/<sha256>/...                    config.json, model.safetensors, perhaps denoiser/
    policies/<sha256>.safetensors          allocation policies; reading needs none of them
    leases/<flight>                        in buckets: whose ingest writes a flight, meanwhile
    items.parquet                          the index, see `archive_pipeline.store.index`
    flights/<flight>/<image>/zarr.json     record of a committed image, written last
    flights/<flight>/<image>/pixels        uint8 (height, width, 3) by pcdc, or lossless any dtype
    flights/<flight>/<image>/overview_8    uint8 (height, width, 3) by pcdc: it an eighth as large a
                                           side; further ones are overview_64, ...
    flights/<flight>/<image>/mask          uint8 (height, width), lossless, where the source has one
    flights/<flight>/<image>/metadata      uint8 (bytes,), lossless: source record and originals
    flights/<flight>/<image>/detections    uint8 (bytes,), lossless: objects found in the original,
                                           where ingest was asked for them

An image exists once its group carries the `archive_pipeline` attribute: one write, after all
else. What a killed writer leaves behind is invisible and is removed by the next writer of that
image, or by `archive check --repair` (see `archive_pipeline.store.leftovers`).

An image is replaced beside the one that is there. Its arrays have two generations, which take
turns, told apart by the separator of Zarr's own chunk keys::

    pixels/zarr.json                       metadata of generation 0 ...
    pixels/c/0/0/0                         ... and its shards
    pixels/zarr.next.json                  metadata of generation 1, staged, ...
    pixels/c.0.0.0                         ... and its shards
    unfinished.json                        only of an image of several shards: what it is written
                                           from, so that a killed ingest goes on with it

The write of the group's `zarr.json` commits the new one: its record tells its generation (absent
means 0). Readers of this package take the metadata of that generation, staged or not. Plain Zarr
readers see the old arrays until the writer has made the staged metadata `zarr.json`, right after
the commit. The old shards, and all that was staged, go a moment later.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from archive_pipeline._version import __version__
from archive_pipeline.errors import did_you_mean
from archive_pipeline.locks import is_locked, locked
from archive_pipeline.store._backends import (
    has_versions,
    is_url,
    look_at_records,
    open_store,
)
from archive_pipeline.store._keys import Keys
from archive_pipeline.store.layout import (
    ATTRIBUTE,
    FORMAT,
    TOP_LEVEL,
    ArchiveError,
    ImageEntry,
    check_record,
    damaged_record,
    group_json,
    image_key,
    image_name,
    quote_name,
    reason_of,
    unquote_name,
)

# Compact metadata counts in an image's budget; whole shards at a time are what makes the
# budget image-wide and the decoder's batches long.
ZARR_SETTINGS = {"json_indent": None, "codec_pipeline.batch_size": 1 << 16}


def in_process_only(url: str) -> bool:
    """Whether an archive is visible to this process alone."""
    return "memory:" in url


def absolute(url: str) -> str:
    """The same archive for processes with another working directory."""
    return url if is_url(url) else str(Path(url).absolute())


def _store(url: str, read_only: bool) -> Store:
    try:
        return open_store(url, read_only)
    except (ImportError, ValueError, TypeError) as error:
        raise ArchiveError(f"{url}: {error}") from error


def _archives_like(missing: Path | None) -> str:
    """A hint at an archive beside a missing one whose name is like its own; else empty."""
    try:
        beside = [] if missing is None else list(missing.absolute().parent.iterdir())
        names = [path.name for path in beside if (path / "zarr.json").is_file()]
    except OSError:
        return ""
    return did_you_mean(missing.name, names) if missing is not None else ""


def _byte_of(key: str) -> int:
    """The byte of the lock file that stands for an image."""
    return 1 + int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")


class Archive(Keys):
    """An open archive. Make one with `Archive.open` or `Archive.create`.

    Attributes:
        written_by: the version that made it; None before 0.2.0, and where it was not looked at.
    """

    def __init__(self, url: str, store: Store) -> None:
        super().__init__(url, store)
        self.written_by: str | None = None
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
            raise ArchiveError(f"{url}: no archive there{_archives_like(archive.folder)}")
        try:
            attributes = json.loads(raw)["attributes"][ATTRIBUTE]
            found, written_by = attributes["format"], attributes.get("written_by")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArchiveError(f"{url}: a Zarr group, but not an archive") from error
        if found != FORMAT:
            raise ArchiveError(f"{url}: archive format {found!r} (this version reads {FORMAT})")
        archive.written_by = written_by if isinstance(written_by, str) else None
        return archive

    @classmethod
    def create(cls, url: str | Path) -> Archive:
        """Open an archive for writing, making it if there is none.

        Raises:
            ArchiveError: it cannot be made there, or something else is there.
        """
        archive = cls(str(url), _store(str(url), False))
        if archive.read_key("zarr.json") is None:
            archive._require_room()
            # never twice: the file that is there is what processes lock
            data = default_buffer_prototype().buffer.from_bytes(
                group_json({ATTRIBUTE: {"format": FORMAT, "written_by": __version__}})
            )
            try:
                sync(archive.store.set_if_not_exists("zarr.json", data))
            except Exception as error:  # what a store raises depends on its backend
                raise ArchiveError(f"{url}: zarr.json: {reason_of(error)}") from error
        return cls.open(url, writable=True)

    def _require_room(self) -> None:
        """Refuse to make an archive among files that are not an archive's.

        Raises:
            ArchiveError: its folder holds such.
        """
        try:
            names = os.listdir(self.folder) if self.folder is not None else []
        except FileNotFoundError:
            return
        except OSError as error:
            raise ArchiveError(f"{self.url}: {reason_of(error)}") from error
        # of an archive that lost its own, and of one that was just being made
        foreign = [n for n in names if n not in TOP_LEVEL and not n.startswith((".", "zarr."))]
        if foreign:
            raise ArchiveError(
                f"{self.url}: holds other files ({min(foreign)}); an archive needs a folder of "
                "its own"
            )

    @classmethod
    def reopen(cls, url: str, *, writable: bool = False) -> Archive:
        """Open an archive that `open` has found there before; nothing is read to do so."""
        return cls(url, _store(url, not writable))

    def create_flight(self, flight: str) -> None:
        """Make a flight's group and the one around it, where they are missing.

        Raises:
            ArchiveError: the store fails.
        """
        for key in ("flights/zarr.json", f"flights/{quote_name(flight)}/zarr.json"):
            if self.read_key(key) is None:
                self.write_key(key, group_json({}))

    # ----------------------------------------------------------------- locks

    @contextmanager
    def exclusive(self, key: str) -> Iterator[bool]:
        """Keep other processes from writing an image; on local file systems, else no lock.

        Yields whether they are kept from it.
        """
        path = self._lock_file()
        with nullcontext(False) if path is None else locked(path, _byte_of(key)) as held:
            yield held

    def is_exclusive(self, key: str) -> bool:
        """Whether somebody keeps others from writing an image, as far as that can be known."""
        path = self._lock_file()
        return path is not None and is_locked(path, _byte_of(key))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let readers know that images are being written; on local file systems."""
        path = self._lock_file()
        with nullcontext(False) if path is None else locked(path, 0, shared=True):
            yield

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Wait until nobody is `writing`, and let nobody begin; on local file systems."""
        path = self._lock_file()
        with nullcontext(False) if path is None else locked(path, 0) as held:
            yield held

    def is_written(self) -> bool:
        """Whether some process is `writing`, as far as that can be known."""
        path = self._lock_file()
        return path is not None and is_locked(path, 0)

    def _lock_file(self) -> Path | None:
        return self.store.root / "zarr.json" if isinstance(self.store, LocalStore) else None

    # --------------------------------------------------------------- queries

    def flights(self) -> list[str]:
        """Names of all flights."""
        return [unquote_name(n) for n in self.list_names("flights") if n != "zarr.json"]

    def keys(self, flight: str | None = None) -> Iterator[str]:
        """Group paths of a flight's images, or of all: committed or not, whole or damaged."""
        names = self.list_names("flights") if flight is None else [quote_name(flight)]
        for name in names:
            if name != "zarr.json":
                for key in self.list_names(f"flights/{name}"):
                    if key != "zarr.json":
                        yield f"flights/{name}/{key}"

    def record_versions(
        self, flight: str | None = None, before: float = math.inf
    ) -> dict[str, str | None] | None:
        """Group paths of images that may be committed, with their records' versions, in order.

        A version changes whenever the record does; where it is None, nothing is known of that.

        Args:
            flight: only this one.
            before: of local records, no versions of those modified since, by the file system's
                clock (ns): they may change once more within its tick, and look the same.

        Returns:
            None on stores that have no versions.

        Raises:
            ArchiveError: the store fails.
        """
        if isinstance(self.store, LocalStore):
            names = self.list_names("flights") if flight is None else [quote_name(flight)]
            try:
                return look_at_records(self.store.root, names, before)
            except OSError as error:
                raise ArchiveError(f"{self.url}: flights: {reason_of(error)}") from error
        if not has_versions(self.store):
            return None
        prefix = "flights" if flight is None else f"flights/{quote_name(flight)}"
        versions = {}
        for key, stored in self.stored(prefix).items():
            image, _, name = key.rpartition("/")
            if name == "zarr.json" and image.count("/") == 2:
                if stored.version is None:
                    return None
                versions[image] = stored.version
        return {key: versions[key] for key in sorted(versions, key=lambda key: key.split("/"))}

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
            raise damaged_record(key, error) from error
        return None if record is None else self.entry_of(key, record)

    def entry_of(self, key: str, record: Any) -> ImageEntry:
        """The image whose group at `key` holds this record.

        Raises:
            ArchiveError: the record is damaged.
        """
        try:
            check_record(record)
            entry = ImageEntry(unquote_name(key.split("/")[1]), record["id"], key, record)
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
            raise damaged_record(key, error) from error
        return entry
