"""The archive's index: GeoParquet with one STAC item a row, derived from the records."""

from __future__ import annotations

import io
from typing import Any

from archive_pipeline.store import Archive, ImageEntry

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
        "id": f"{entry.flight}/{entry.id}",
        "collection": entry.flight,
        "geometry": Polygon(ring) if ring else None,
        "datetime": record["captured"],
        "proj:code": code,
        "proj:wkt2": None if code else crs,
        "proj:transform": list(transform) if transform else None,
        "proj:shape": [record["height"], record["width"]],
        "archive:image": entry.id,
        "archive:key": entry.key,
        "archive:sha256": record["sha256"],
        "archive:codec": record["codec"],
        "archive:model": record.get("model"),
        "archive:source_bytes": record["source_bytes"],
        "archive:archive_bytes": record["archive_bytes"],
    }


def write_index(archive: Archive) -> int:
    """Write `items.parquet` anew from the images' records; returns the number of rows."""
    import geopandas

    rows = [_row(entry) for entry in archive.images()]
    columns = list(rows[0]) if rows else ["id", "geometry"]
    frame = geopandas.GeoDataFrame(rows, columns=columns, geometry="geometry", crs="EPSG:4326")
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False, write_covering_bbox=True)
    archive.write_key(KEY, buffer.getvalue())
    return len(rows)


def read_index(archive: Archive) -> dict[str, str] | None:
    """The index as {image key: sha256}; None where there is none.

    Raises:
        ValueError: it is damaged.
    """
    import pyarrow.parquet

    raw = archive.read_key(KEY)
    if raw is None:
        return None
    try:
        table = pyarrow.parquet.read_table(
            io.BytesIO(raw), columns=["archive:key", "archive:sha256"]
        ).to_pydict()
    except (pyarrow.ArrowException, KeyError) as error:
        raise ValueError(f"{KEY} is damaged: {str(error).splitlines()[0]}") from error
    return dict(zip(table["archive:key"], table["archive:sha256"], strict=True))
