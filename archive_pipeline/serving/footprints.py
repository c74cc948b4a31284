"""Footprints as GeoJSON; where there are too many of them, how many lie where."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import shapely
from fastapi import APIRouter, Query, Request
from numpy.typing import NDArray

from archive_pipeline.geo.georef import Bbox
from archive_pipeline.serving._queries import parse_bbox, parse_interval
from archive_pipeline.serving._responses import Json
from archive_pipeline.serving.catalogue import Snapshot, total_bounds
from archive_pipeline.serving.site import Site, href
from archive_pipeline.store.index_rows import CAPTURED, IMAGE

MOST_FEATURES = 5000
Limit = Annotated[int, Query(ge=1, le=MOST_FEATURES)]


def router(site: Site) -> APIRouter:
    """The route of footprints."""
    routes = APIRouter()

    @routes.get("/footprints")
    async def footprints(
        request: Request,
        bbox: str | None = None,
        flight: str | None = None,
        datetime: str | None = None,
        text: Annotated[str, Query(max_length=200, description="Part of the name.")] = "",
        limit: Limit = 1000,
    ) -> Json:
        def made() -> dict[str, Any]:
            now, area, when = site.catalogue.now, parse_bbox(bbox), parse_interval(datetime)
            found = now.find(area, when, None if flight is None else [flight], text)
            return collection(now, found.numbers, area, limit)

        return Json(await site.look(request, made), media_type="application/geo+json")

    return routes


def collection(
    now: Snapshot, numbers: NDArray[np.intp], area: Bbox | None, limit: int
) -> dict[str, Any]:
    """Footprints of images of an area, or points that stand for several, at most `limit` of them.

    A point has `cluster`, `count` and `bbox` among its properties. Images without place have none.
    """
    numbers = numbers[np.isfinite(now.bounds[numbers]).all(axis=1)]
    if len(numbers) <= limit:
        features = _footprints(now, numbers)
    else:
        features = _clusters(now, numbers, area, limit)
    return {
        "type": "FeatureCollection",
        "features": features,
        "numberMatched": len(numbers),
        "clustered": len(numbers) > limit,
    }


def _footprints(now: Snapshot, numbers: NDArray[np.intp]) -> list[dict[str, Any]]:
    rows = now.rows.take(numbers)
    features = []
    for number, id, time in zip(
        numbers.tolist(), rows[IMAGE].to_pylist(), rows[CAPTURED].to_pylist(), strict=True
    ):
        flight = now.flights[now.flight[number]]
        properties = {"id": id, "flight": flight, "href": href(flight, id), "datetime": time}
        features.append(
            {
                "type": "Feature",
                "id": f"{flight}/{id}",
                "geometry": shapely.geometry.mapping(now.shapes[number]),
                "properties": properties,
            }
        )
    return features


def _clusters(
    now: Snapshot, numbers: NDArray[np.intp], area: Bbox | None, limit: int
) -> list[dict[str, Any]]:
    """Images by the cells of an area that their middles are in."""
    bounds = now.bounds[numbers]
    west, south, east, north = area or total_bounds(bounds) or (-180.0, -90.0, 180.0, 90.0)
    width = (east - west) % 360 or 360.0  # it may cross the antimeridian
    height = max(north - south, 1e-12)
    cells = max(1, math.isqrt(limit))
    x, y = (bounds[:, 0] + bounds[:, 2]) / 2, (bounds[:, 1] + bounds[:, 3]) / 2
    across = x - west if west <= east else (x - west) % 360
    col = np.clip(across / width * cells, 0, cells - 1).astype(np.intp)
    row = np.clip((y - south) / height * cells, 0, cells - 1).astype(np.intp)
    _, cell = np.unique(row * cells + col, return_inverse=True)
    counts = np.bincount(cell)
    middles = [np.bincount(cell, values) / counts for values in (x, y)]
    extents = np.full((len(counts), 4), np.inf)
    np.minimum.at(extents, cell, bounds * [1, 1, -1, -1])
    extents *= [1, 1, -1, -1]
    return [
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": [float(lon), float(lat)]},
            "properties": {"cluster": True, "count": int(count), "bbox": extent.tolist()},
        }
        for lon, lat, count, extent in zip(*middles, counts, extents, strict=True)
    ]
