"""The archive's index: GeoParquet with one STAC item a row, derived from the records."""

from __future__ import annotations

import io
from typing import Any

from archive_pipeline.store import Archive, ArchiveError, ImageEntry

KEY = "items.parquet"
STAC_VERSION = "1.1.0"


def _row(entry: ImageEntry) -> dict[str, Any]:
    from shapely.geometry import Polygon

    record = entry.record
    ring = record["georef"]["footprint"]
    crs, transform = record["georef"]["crs"], record["georef"]["transform"]
    code = crs if crs and crs.startswith("EPSG:") else None
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "id": _text(f"{entry.flight}/{entry.id}"),
        "collection": _text(entry.flight),
        "geometry": Polygon(ring) if ring else None,
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

    rows = [_row(entry) for entry in archive.images(damaged=lambda name, error: None)]
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
    import pyarrow.parquet

    raw = archive.read_key(KEY)
    if raw is None:
        return None
    columns = ["archive:key", "archive:sha256"]
    try:
        table = pyarrow.parquet.read_table(
            io.BytesIO(raw), columns=columns, page_checksum_verification=True
        ).to_pydict()
        return dict(zip(*(table[name] for name in columns), strict=True))
    except Exception as error:  # Arrow raises many kinds for damaged files
        lines = str(error).splitlines() or [type(error).__name__]
        raise ArchiveError(f"{archive.url}: {KEY} is damaged: {lines[0]}") from error


def is_current(archive: Archive) -> bool:
    """Whether the index lists exactly the committed images."""
    try:
        index = read_index(archive)
    except ArchiveError:
        return False
    images = archive.images(damaged=lambda name, error: None)
    return index == {entry.key: entry.record["sha256"] for entry in images}
