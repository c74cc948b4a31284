"""STAC items and collections of images, as JSON; links and assets are relative to the archive."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from archive_pipeline.store._camera_columns import cameras_of, instrument_of, platform_of
from archive_pipeline.store.index_rows import (
    BOUNDS,
    CAMERA,
    CAPTURED,
    FLIGHT,
    IMAGE,
    OTHER,
    POSE,
    SIDES,
    TRANSFORM,
    VERSION,
    bounds_of,
    words_of,
)
from archive_pipeline.store.stac import STAC_VERSION, projections, times_of, to_file

SPEC_VERSION = "1.1.0"  # of STAC-GeoParquet
# Columns that are for reading records again, or that an item has under another name.
INTERNAL = ("geometry", TRANSFORM, CAMERA, POSE, "archive:reach", OTHER, VERSION)
TOP = ("type", "stac_version", "stac_extensions", IMAGE, FLIGHT)
SUMMED = (
    FLIGHT,
    "bbox",
    CAPTURED,
    CAMERA,
    "archive:model",
    "proj:code",
    "proj:wkt2",
    TRANSFORM,
    *SIDES,
)
TIMES = ("datetime", "start_datetime", "end_datetime")
WORLD = [-180.0, -90.0, 180.0, 90.0]


def items(rows: pa.Table) -> list[dict[str, Any]]:
    """STAC items of rows of the index.

    What is not known is left out; without place, geometry is null.
    """
    table = to_file(rows)
    shapes = shapely.from_wkb(np.array(table["geometry"].to_pylist(), dtype=object))
    columns = table.drop_columns(list(INTERNAL)).to_pylist()
    return [_item(row, shape) for row, shape in zip(columns, shapes, strict=True)]


def _item(row: dict[str, Any], shape: shapely.Geometry) -> dict[str, Any]:
    item = {name: row.pop(name) for name in TOP}
    bbox, links, assets = (row.pop(name) for name in ("bbox", "links", "assets"))
    time, first, last = (row.pop(name) for name in TIMES)
    item["geometry"] = None
    if not shape.is_empty:
        item["geometry"] = shapely.geometry.mapping(shape)
        item["bbox"] = _bbox(shape, [bbox[name] for name in BOUNDS])
    properties = {"datetime": time and _text(time)}
    if time is None:
        properties |= {"start_datetime": _text(first), "end_datetime": _text(last)}
    item["properties"] = properties | _known(row)
    return item | {"links": links, "assets": _known(assets)}


def _bbox(shape: shapely.Geometry, bounds: list[float]) -> list[float]:
    """Bounds as GeoJSON has them: west is greater than east across the antimeridian."""
    west, south, east, north = bounds
    parts = shapely.bounds(shapely.get_parts(shape))
    eastern = parts[:, 0] > 0.0  # longitudes
    if west > -180.0 or east < 180.0 or eastern.all() or not eastern.any():
        return bounds
    return [float(parts[eastern, 0].min()), south, float(parts[~eastern, 2].max()), north]


def _text(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")


def _known(value: Any) -> Any:
    """The same without what is null; times as texts."""
    if isinstance(value, dict):
        return {name: _known(v) for name, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_known(v) for v in value]
    return _text(value) if isinstance(value, datetime) else value


def collections(rows: pa.Table) -> dict[str, dict[str, Any]]:
    """STAC collections by their ids: one a flight, without links.

    Args:
        rows: of the index, of which the columns `SUMMED` are looked at.
    """
    if not len(rows):
        return {}
    flights, which = words_of(rows[FLIGHT])
    order = np.argsort(which, kind="stable")
    cuts = np.flatnonzero(np.diff(np.array(which)[order])) + 1
    bounds, times = bounds_of(rows), times_of(rows)
    summaries = _Summaries(rows)
    found: dict[str, dict[str, Any]] = {}
    for at in np.split(order, cuts):
        flight = flights[which[at[0]]] or ""
        ends = pc.min_max(times.take(pa.array(at))).as_py()
        found[flight] = {
            "type": "Collection",
            "stac_version": STAC_VERSION,
            "stac_extensions": [],
            "id": flight,
            "title": flight,
            "description": f"{len(at)} images of the flight {flight}",
            "license": "other",
            "extent": {
                "spatial": {"bbox": [_extent(bounds[at])]},
                "temporal": {"interval": [[time and _text(time) for time in ends.values()]]},
            },
            "summaries": summaries.of(at),
            "links": [],
        }
    return found


def _extent(bounds: NDArray[np.float64]) -> list[float]:
    """Where images are; the world if that is known of none."""
    known = bounds[np.isfinite(bounds).all(axis=1)]
    if not len(known):
        return WORLD
    return [*known[:, :2].min(axis=0).tolist(), *known[:, 2:].max(axis=0).tolist()]


class _Summaries:
    """What images of flights have in common.

    Args:
        rows: as `collections` has them.
    """

    def __init__(self, rows: pa.Table) -> None:
        cameras, camera = cameras_of(rows)
        models, model = words_of(rows["archive:model"])
        codes, code = words_of(rows["proj:code"])
        platforms = [None if one is None else platform_of(one) for one in cameras]
        instruments = [None if one is None else instrument_of(one) for one in cameras]
        self._texts: dict[str, tuple[list[str | None], NDArray[np.int64]]] = {
            "platform": (platforms, np.array(camera)),
            "instruments": (instruments, np.array(camera)),
            "proj:code": (codes, np.array(code)),
            "archive:model": (models, np.array(model)),
        }
        self._gsd = np.asarray(projections(rows)["gsd"].fill_null(np.nan))

    def of(self, at: NDArray[np.intp]) -> dict[str, Any]:
        """Summaries of the images of these numbers."""
        found: dict[str, Any] = {}
        for name, (words, which) in self._texts.items():
            values = {words[n] for n in np.unique(which[at]).tolist()}
            if known := sorted(value for value in values if value is not None):
                found[name] = known
        gsd = self._gsd[at][np.isfinite(self._gsd[at])]
        if len(gsd):
            found["gsd"] = {"minimum": float(gsd.min()), "maximum": float(gsd.max())}
        return found
