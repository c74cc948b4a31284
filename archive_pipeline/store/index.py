"""The archive's index: GeoParquet with one STAC item a row, derived from the records.

What is in an archive is decided by the records alone. A row stands for its image's record while
the record's version (`Archive.record_versions`) is the row's; all others are read. So a stale,
damaged or missing index costs time, nothing else.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from archive_pipeline.geo.georef import Bbox
from archive_pipeline.store import _parquet
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.index_rows import (
    GROUP,
    IMAGE,
    REPEATED,
    SCHEMA,
    SHA256,
    VERSION,
    as_texts,
    bounds_of,
    geo_metadata,
    have_crs,
    reaches_of,
    sound,
    summary_of,
    to_records,
    to_rows,
    to_summaries,
)
from archive_pipeline.store.layout import (
    ArchiveError,
    ImageEntry,
    image_name,
    reason_of,
    unquote_name,
)
from archive_pipeline.store.stac import FILE_SCHEMA, from_file, to_file
from archive_pipeline.store.stac_json import SPEC_VERSION, SUMMED, collections

KEY = "items.parquet"
PLACE = b"archive_pipeline:place"  # `_place` where the versions are from
# A record goes into the index without version until it is so old: one that was written just now
# may be replaced within the same tick of a file system's clock (of FAT's: 2 s).
SETTLED = 3_000_000_000  # ns
BATCH = 1000  # images
ROW_GROUP = 16_384  # images
PASSES = 3  # of writing the index while others commit images; the last of them mends it

Damaged = Callable[[str, ArchiveError], None]
Found = ImageEntry | ArchiveError | None


@dataclass(frozen=True)
class Contents:
    """The images that are in an archive at one moment.

    Attributes:
        rows: the index; no rows where there is none to be used.
        images: group path of each image, in order, with the number of its row, or as its record
            tells it where that was read.
        versions: of the records, None where unknown.
        place: where the index is from, None without one.
    """

    archive: Archive
    rows: pa.Table
    images: dict[str, int | ImageEntry]
    versions: dict[str, str | None]
    place: str | None

    def entries(
        self, damaged: Damaged | None = None, keys: Collection[str] | None = None
    ) -> Iterator[ImageEntry]:
        """The images, in order.

        Args:
            damaged: as `Archive.images` has it.
            keys: group paths of those that are wanted; all without any.

        Raises:
            ArchiveError: as `Archive.images` has it.
        """
        wanted = iter([key for key in self.images if keys is None or key in keys])
        while batch := list(islice(wanted, BATCH)):
            numbers = [n for n in map(self.images.get, batch) if isinstance(n, int)]
            records = iter(_records(_take(self.rows, numbers)))
            for key in batch:
                found: Found | int = self.images[key]
                if isinstance(found, int):
                    found = _entry(self.archive, key, next(records))
                yield from _told(key, found, damaged)

    def names(self) -> Iterator[tuple[str, str, str]]:
        """Group path, flight and id of each image."""
        ids = self.rows[IMAGE].to_pylist()
        for key, image in self.images.items():
            id = ids[image] if isinstance(image, int) else image.id
            yield key, unquote_name(key.split("/")[1]), id

    def summaries(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Flight of each image and what `archive info` tells of the image."""
        numbers = [image for image in self.images.values() if isinstance(image, int)]
        told = iter(to_summaries(_take(self.rows, numbers)))
        for flight, images in groupby(self.images.items(), lambda item: item[0].split("/")[1]):
            name = unquote_name(flight)
            for _, image in images:
                yield name, next(told) if isinstance(image, int) else summary_of(image.record)

    def near(self, bbox: Bbox, bbox_crs: str) -> set[str]:
        """Group paths of all images that a box meets, and of some others.

        Args:
            bbox, bbox_crs: as `geo.mapping.bbox_to_window` has them.
        """
        from archive_pipeline.geo.bounds import may_meet

        meets = may_meet(reaches_of(self.rows), bbox, bbox_crs) & have_crs(self.rows)
        near = meets.tolist()
        return {
            key for key, image in self.images.items() if not isinstance(image, int) or near[image]
        }


def read_images(
    archive: Archive,
    flight: str | None = None,
    damaged: Damaged | None = None,
    keys: Collection[str] | None = None,
) -> Iterator[ImageEntry]:
    """What `Archive.images` gives; only those records are read that the index has not.

    Args, Raises: as `Archive.images` and `Contents.entries` have them.
    """
    yield from look(archive, flight, damaged).entries(damaged, keys)


def look(
    archive: Archive,
    flight: str | None = None,
    damaged: Damaged | None = None,
    before: float = math.inf,
    in_rows: bool = False,
) -> Contents:
    """See what is in an archive, by one listing (a look at each record's file) and the index.

    Args:
        flight, damaged: as `Archive.images` has them.
        before: as `Archive.record_versions` has it.
        in_rows: whether records that are read become rows, too: they take less memory so.

    Raises:
        ArchiveError: the store fails, or a record is damaged and `damaged` is None.
    """
    versions = archive.record_versions(flight, before)
    if versions is None:
        versions = dict.fromkeys(archive.keys(flight))
    rows, place = _usable(archive) if versions else (SCHEMA.empty_table(), None)
    images: dict[str, int | ImageEntry] = {}
    images.update(_holding(rows, versions, place == _place(archive)))
    tables = [rows]
    for entries in _read_entries(archive, [k for k in versions if k not in images], damaged):
        if in_rows:
            first = sum(map(len, tables))
            images.update((entry.key, first + n) for n, entry in enumerate(entries))
            tables.append(to_rows((entry, versions[entry.key]) for entry in entries))
        else:
            images.update((entry.key, entry) for entry in entries)
    if len(tables) > 1:
        rows = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    ordered = {key: images[key] for key in versions if key in images}
    return Contents(archive, rows, ordered, versions, place)


def _read_entries(
    archive: Archive, keys: list[str], damaged: Damaged | None
) -> Iterator[list[ImageEntry]]:
    """Images by their records, some at a time, in order."""
    size = 64 if _place(archive) else 1  # for a thread: local files take less time than it does
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(keys), BATCH):
            some = keys[start : start + BATCH]
            parts = [some[n : n + size] for n in range(0, len(some), size)]
            read = pool.map(lambda part: [_read(archive, key) for key in part], parts)
            found = zip(some, chain.from_iterable(read), strict=True)
            yield [entry for key, one in found for entry in _told(key, one, damaged)]


def _place(archive: Archive) -> str:
    """Tells a local archive from a copy of it, whose files have other inodes."""
    if archive.folder is None:
        return ""
    try:
        return f"{os.stat(archive.folder / 'zarr.json').st_ino:x}"
    except OSError:  # it is gone
        return ""


def _time(archive: Archive) -> float:
    """Now by the clock from which a local archive's files get their times, ns.

    Raises:
        ArchiveError: the archive cannot be written.
    """
    if archive.folder is None:
        return math.inf
    try:
        with tempfile.TemporaryFile(dir=archive.folder) as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError as error:
        raise ArchiveError(f"{archive.url}: {reason_of(error)}") from error


def _holding(rows: pa.Table, versions: dict[str, str | None], same_place: bool) -> dict[str, int]:
    """Group paths of images that are as their rows say, and the rows' numbers."""

    def of_copy(version: str | None) -> str | None:
        """A local version without its inode, which a copied file does not keep."""
        return version and version.rpartition("-")[0]

    holding = {}
    told = zip(
        rows[GROUP].to_pylist(), rows[VERSION].to_pylist(), sound(rows).tolist(), strict=True
    )
    for number, (key, version, is_sound) in enumerate(told):
        if version is None or not is_sound:
            continue
        now = versions.get(key)
        if version == now or (not same_place and of_copy(version) == of_copy(now)):
            holding[key] = number
    return holding


def _take(rows: pa.Table, numbers: list[Any]) -> pa.Table:
    return rows.take(pa.array(numbers, pa.int64()))


def _read(archive: Archive, key: str) -> Found:
    try:
        return archive.entry(key)
    except ArchiveError as error:
        return error


def _records(rows: pa.Table) -> list[Any]:
    """Records of rows; None of those that give none."""
    try:
        return to_records(rows)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        if len(rows) == 1:
            return [None]
        return [record for n in range(len(rows)) for record in _records(rows.slice(n, 1))]


def _entry(archive: Archive, key: str, record: Any) -> Found:
    """The image of a row's record; its own is read where that is none."""
    with suppress(ArchiveError):
        return archive.entry_of(key, record)
    return _read(archive, key)


def _told(key: str, found: Found, damaged: Damaged | None) -> Iterator[ImageEntry]:
    if isinstance(found, ImageEntry):
        yield found
    elif found is not None:
        if damaged is None:
            raise found
        damaged(image_name(key), found)


# ------------------------------------------------------------------ the file


def current_rows(contents: Contents) -> Iterator[pa.Table]:
    """Rows of all images of `look(..., in_rows=True)` as they are now, in order, some at a time."""
    images = iter(contents.images.items())
    while batch := dict(islice(images, ROW_GROUP)):
        rows = _take(contents.rows, [*batch.values()])
        told = rows[VERSION].to_pylist()  # perhaps of the files that these were copied from
        now = [v and contents.versions[k] for k, v in zip(batch, told, strict=True)]
        at = rows.schema.get_field_index(VERSION)
        yield rows.set_column(at, VERSION, pa.array(now, pa.string()))


def write_index(archive: Archive) -> int:
    """Write `items.parquet` as the records are now; returns the number of rows.

    Images whose record is damaged are left out.

    Raises:
        ArchiveError: the archive cannot be read or written.
    """
    before = _time(archive) - SETTLED
    contents = look(archive, None, lambda name, error: None, before, in_rows=True)
    numbers = [n for n in contents.images.values() if isinstance(n, int)]  # all of them
    bounds = bounds_of(contents.rows)[numbers]
    flights = collections(_take(contents.rows.select(SUMMED), numbers))
    metadata = {
        b"geo": json.dumps(geo_metadata(bounds)).encode(),
        b"stac-geoparquet": json.dumps({"version": SPEC_VERSION, "collections": flights}).encode(),
        PLACE: _place(archive).encode(),
    }
    options = {
        "use_dictionary": REPEATED,
        "compression": _parquet.compressions(FILE_SCHEMA, SCHEMA.names),
        "write_page_checksum": True,
    }
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, FILE_SCHEMA.with_metadata(metadata), **options) as writer:
        for rows in current_rows(contents):
            writer.write_table(to_file(rows))
    archive.write_key(KEY, sink.getvalue().to_pybytes())
    return len(contents.images)


def settle_index(archive: Archive) -> None:
    """Write the index until it agrees with the records, beside others who commit.

    Who writes last has then seen what all others committed.

    Raises:
        ArchiveError: the archive cannot be read or written.
    """
    for _ in range(PASSES):
        if is_current(archive):
            break
        write_index(archive)


def _damaged(archive: Archive, error: Exception) -> ArchiveError:
    lines = str(error).splitlines() or [type(error).__name__]
    return ArchiveError(f"{archive.url}: {KEY} is damaged: {lines[0]}")


def _usable(archive: Archive) -> tuple[pa.Table, str | None]:
    """The index and where it is from; no rows and None if it is missing, damaged or outdated."""
    with suppress(Exception):  # Arrow raises many kinds for damaged files
        raw = archive.read_key(KEY, _parquet.MAX_BYTES)
        if raw is not None:
            schema = _parquet.read_schema(raw)
            if schema.equals(FILE_SCHEMA):
                rows = from_file(_parquet.read_table(raw, SCHEMA.names))
                return rows, schema.metadata[PLACE].decode()
    return SCHEMA.empty_table(), None


def is_outdated(archive: Archive) -> bool:
    """Whether there is an index, but one that another release wrote.

    Raises:
        ArchiveError: it is damaged.
    """
    raw = archive.read_key(KEY, _parquet.MAX_BYTES)
    try:
        return raw is not None and not _parquet.read_schema(raw).equals(FILE_SCHEMA)
    except Exception as error:  # Arrow raises many kinds for damaged files
        raise _damaged(archive, error) from error


def read_index(archive: Archive) -> dict[str, str] | None:
    """The index as {image key: sha256}; None where there is none.

    Raises:
        ArchiveError: it is damaged.
    """
    raw = archive.read_key(KEY, _parquet.MAX_BYTES)
    if raw is None:
        return None
    try:
        return dict(zip(*_parquet.read_texts(raw, (GROUP, SHA256)), strict=True))
    except Exception as error:  # Arrow raises many kinds for damaged files
        raise _damaged(archive, error) from error


# ------------------------------------------------------- against the records


def is_current(archive: Archive) -> bool:
    """Whether the index lists exactly the committed images, as they are."""
    contents = look(archive, damaged=lambda name, error: None)
    if contents.place != _place(archive) or contents.rows[GROUP].to_pylist() != [*contents.images]:
        return False
    read = [e for e in contents.images.values() if isinstance(e, ImageEntry)]
    numbers = [n for n, e in enumerate(contents.images.values()) if isinstance(e, ImageEntry)]
    told = _take(contents.rows, numbers)
    return told[VERSION].null_count == len(told) and all(_equal(told, read))


def _equal(rows: pa.Table, entries: list[ImageEntry]) -> Iterator[bool]:
    """Whether rows are those of images, but for the versions."""
    for start in range(0, len(entries), BATCH):
        some = entries[start : start + BATCH]
        told = as_texts(rows.slice(start, BATCH)).drop_columns(VERSION)
        true = as_texts(to_rows((e, None) for e in some)).drop_columns(VERSION)
        if told.equals(true):
            yield from [True] * len(some)
        else:
            yield from (told.slice(n, 1).equals(true.slice(n, 1)) for n in range(len(some)))


def differences(
    archive: Archive, entries: Iterable[ImageEntry], keys: Collection[str] | None = None
) -> dict[str, bool]:
    """What the index says otherwise than the images.

    Args:
        entries: all images of the archive.
        keys: group paths of those to compare; all without any.

    Returns:
        Group paths of images that only one of both has, or that the index describes in another
        way; and whether the index has them.

    Raises:
        ArchiveError: the index is damaged.
    """
    images = {entry.key: entry for entry in entries}
    if is_outdated(archive):  # of that one what it has always had
        sources = read_index(archive) or {}
        known = dict.fromkeys(sources, 0)
        same = {k for k, entry in images.items() if sources.get(k) == entry.record["sha256"]}
    else:
        raw = archive.read_key(KEY, _parquet.MAX_BYTES)
        try:
            rows = SCHEMA.empty_table()
            if raw is not None:
                rows = from_file(_parquet.read_table(raw, SCHEMA.names))
        except Exception as error:
            raise _damaged(archive, error) from error
        known = {key: n for n, key in enumerate(rows[GROUP].to_pylist())}
        both = [entry for entry in images.values() if entry.key in known]
        equal = _equal(_take(rows, [known[entry.key] for entry in both]), both)
        same = {entry.key for entry, is_equal in zip(both, equal, strict=True) if is_equal}
    compared = images.keys() | known.keys() if keys is None else set(keys)
    either = compared & (images.keys() | known.keys())
    return {key: key in known for key in sorted(either - same)}
