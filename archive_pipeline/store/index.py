"""The archive's index: GeoParquet with one STAC item a row, derived from the records."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from archive_pipeline.store.archive import Archive
from archive_pipeline.store.layout import ArchiveError, ImageEntry, image_name

KEY = "items.parquet"
VERSION, RECORD = "archive:version", "archive:record"  # an object store's ETag; the record as JSON
STAC_VERSION = "1.1.0"


def read_images(
    archive: Archive,
    flight: str | None = None,
    damaged: Callable[[str, ArchiveError], None] | None = None,
) -> Iterator[ImageEntry]:
    """What `Archive.images` gives, by few requests where the archive is on an object store.

    One listing tells the records' versions there; those that the index has come from the index,
    others are read, several at a time. A stale or damaged index costs requests, nothing else.

    Args, Raises: as `Archive.images` has them.
    """
    for entry, _ in _versioned(archive, flight, damaged):
        yield entry


def _versioned(
    archive: Archive,
    flight: str | None = None,
    damaged: Callable[[str, ArchiveError], None] | None = None,
) -> Iterator[tuple[ImageEntry, str | None]]:
    """`read_images`, with the versions of the records where the store has them."""
    versions = archive.record_versions(flight)
    if versions is None:
        yield from ((entry, None) for entry in archive.images(flight, damaged))
        return
    known = (read_records(archive) if versions else None) or {}

    def read(key: str) -> ImageEntry | ArchiveError | None:
        version, record = known.get(key, (None, ""))
        try:
            if version == versions[key]:
                with suppress(ValueError, RecursionError, ArchiveError):  # then it is read
                    return archive.entry_of(key, json.loads(record))
            return archive.entry(key)
        except ArchiveError as error:
            return error

    keys = sorted(versions, key=lambda key: key.split("/"))
    with ThreadPoolExecutor() as pool:
        for key, entry in zip(keys, pool.map(read, keys), strict=True):
            if isinstance(entry, ImageEntry):
                yield entry, versions[key]
            elif entry is not None:
                if damaged is None:
                    raise entry
                damaged(image_name(key), entry)


def _row(entry: ImageEntry, version: str | None) -> dict[str, Any]:
    from archive_pipeline.geo.globe import cut_at_antimeridian

    record = entry.record
    ring = record["georef"]["footprint"]
    crs, transform = record["georef"]["crs"], record["georef"]["transform"]
    code = crs if crs and crs.startswith("EPSG:") else None
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "id": _text(f"{entry.flight}/{entry.id}"),
        "collection": _text(entry.flight),
        "geometry": cut_at_antimeridian(ring) if ring else None,
        "datetime": record["captured"],
        "proj:code": code,
        "proj:wkt2": None if code else crs,
        "proj:transform": list(transform) if transform else None,
        "proj:shape": [record["height"], record["width"]],
        "archive:image": _text(entry.id),
        "archive:key": entry.key,
        "archive:sha256": record["sha256"],
        "archive:codec": record["codec"],
        "archive:model": record.get("model"),
        "archive:source_bytes": record["source_bytes"],
        "archive:archive_bytes": record["archive_bytes"],
        VERSION: version,
        RECORD: json.dumps(record),
    }


def _text(name: str) -> str:
    """A file name as Parquet can hold it: bytes that are no text are replaced."""
    return name.encode("utf-8", "replace").decode()


def write_index(archive: Archive) -> int:
    """Write `items.parquet` anew from the images' records; returns the number of rows.

    Images whose record is damaged are left out.

    Raises:
        ArchiveError: the archive cannot be read or written.
    """
    import geopandas

    rows = [_row(*found) for found in _versioned(archive, damaged=lambda name, error: None)]
    columns = list(rows[0]) if rows else ["id", "geometry", "archive:key", "archive:sha256"]
    frame = geopandas.GeoDataFrame(rows, columns=columns, geometry="geometry", crs="EPSG:4326")
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False, write_covering_bbox=True, write_page_checksum=True)
    archive.write_key(KEY, buffer.getvalue())
    return len(rows)


def read_index(archive: Archive) -> dict[str, str] | None:
    """The index as {image key: sha256}; None where there is none.

    Raises:
        ArchiveError: it is damaged.
    """
    columns = _read_columns(archive, "archive:key", "archive:sha256")
    return None if columns is None else dict(zip(*columns, strict=True))


def read_records(archive: Archive) -> dict[str, tuple[str | None, str]] | None:
    """The index as {image key: version and record}; None where there is none that is whole."""
    try:
        columns = _read_columns(archive, "archive:key", VERSION, RECORD)
    except ArchiveError:
        return None
    if columns is None:
        return None
    return {key: (version, record) for key, version, record in zip(*columns, strict=True)}


def _read_columns(archive: Archive, *names: str) -> list[list[Any]] | None:
    from archive_pipeline.store import _parquet

    raw = archive.read_key(KEY, _parquet.MAX_BYTES)
    if raw is None:
        return None
    try:
        return _parquet.read_texts(raw, names)
    except Exception as error:  # Arrow raises many kinds for damaged files
        lines = str(error).splitlines() or [type(error).__name__]
        raise ArchiveError(f"{archive.url}: {KEY} is damaged: {lines[0]}") from error


def is_current(archive: Archive) -> bool:
    """Whether the index lists exactly the committed images, as they are."""
    found = _versioned(archive, damaged=lambda name, error: None)
    current = {entry.key: (version, json.dumps(entry.record)) for entry, version in found}
    return read_records(archive) == current
