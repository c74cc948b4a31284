"""Flights and images as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated, Any

import numpy as np
import shapely
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from archive_pipeline._version import __version__
from archive_pipeline.detection.detectors import unpack_detections
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.pcdc.model_files import DENOISER_CONFIG
from archive_pipeline.serving._queries import parse_bbox, parse_interval
from archive_pipeline.serving._responses import Json
from archive_pipeline.serving.catalogue import Snapshot, total_bounds
from archive_pipeline.serving.site import Site, href, name
from archive_pipeline.store.index_rows import CAPTURED, SIZES
from archive_pipeline.store.layout import ImageEntry

MOST_IMAGES = 1000  # in one list
MOST_DETECTIONS = 10_000


class ImageQuery(BaseModel):
    """Which images, as lists of them are asked for."""

    flight: str | None = Field(None, description="Only this flight.")
    text: str = Field("", max_length=200, description="Part of the name.")
    bbox: str | None = Field(None, description="west,south,east,north in degrees.")
    datetime: str | None = Field(None, description="A time, or an interval.")
    limit: int = Field(100, ge=1, le=MOST_IMAGES)
    after: str | None = Field(None, max_length=2000, description="`next` of a list.")


def router(site: Site) -> APIRouter:
    """Routes of lists and of single images."""
    routes = APIRouter()

    @routes.get("/api")
    async def api(request: Request) -> Json:
        return Json(await site.look(request, lambda: _api(site)))

    @routes.get("/flights")
    async def flights(request: Request) -> Json:
        return Json(await site.look(request, lambda: list_flights(site.catalogue.now)))

    @routes.get("/images")
    async def images(request: Request, query: Annotated[ImageQuery, Query()]) -> Json:
        chosen = None if query.flight is None else [query.flight]
        return Json(await site.look(request, lambda: _images(site.catalogue.now, query, chosen)))

    @routes.get("/flights/{flight}/images")
    async def flight_images(
        request: Request, flight: str, query: Annotated[ImageQuery, Query()]
    ) -> Json:
        def listed() -> dict[str, Any]:
            now = site.catalogue.now
            now.of_flight(name(flight))
            return _images(now, query, [name(flight)])

        return Json(await site.look(request, listed))

    return routes


def image_router(site: Site) -> APIRouter:
    """The route of single images, which comes last: their names may hold anything."""
    routes = APIRouter()

    @routes.get("/flights/{flight}/images/{image:path}")
    async def image(request: Request, flight: str, image: str) -> Json:
        def described() -> dict[str, Any]:
            return describe(site, site.image(flight, image))

        return Json(await site.look(request, described))

    return routes


def _api(site: Site) -> dict[str, Any]:
    now = site.catalogue.now
    return {
        "title": site.title,
        "version": __version__,
        "archive": site.options.archive,
        "images": len(now),
        "flights": len(now.flights),
        "bounds": total_bounds(now.bounds),
        "background": site.options.background,
        "damaged": len(now.damaged),
    }


def list_flights(now: Snapshot) -> list[dict[str, Any]]:
    """Flights with their extent in place and time, and their bytes."""
    sizes = [now.rows[column].to_numpy() for column in SIZES]
    listed = []
    for flight in now.flights:
        of = now.of_flight(flight)
        known = np.flatnonzero(np.isfinite(now.times[of])) + of.start
        ends = None
        if len(known):
            order = known[np.argsort(now.times[known], kind="stable")]
            ends = [now.rows[CAPTURED][int(n)].as_py() for n in (order[0], order[-1])]
        listed.append(
            {
                "id": flight,
                "href": href(flight),
                "images": of.stop - of.start,
                "bounds": total_bounds(now.bounds[of]),
                "datetime": ends,
                "source_bytes": int(sizes[0][of].sum()),
                "archive_bytes": int(sizes[1][of].sum()),
            }
        )
    return listed


def _images(now: Snapshot, query: ImageQuery, flights: Sequence[str] | None) -> dict[str, Any]:
    found = now.find(
        parse_bbox(query.bbox),
        parse_interval(query.datetime),
        flights,
        query.text,
        query.limit,
        query.after,
    )
    entries = now.entries(found.numbers)
    listed = [summary(entry, now, int(n)) for n, entry in zip(found.numbers, entries, strict=True)]
    return {"images": listed, "next": found.next, "matched": found.matched}


def summary(entry: ImageEntry, now: Snapshot, number: int) -> dict[str, Any]:
    """What lists tell of an image."""
    bounds = now.bounds[number]
    return _told(entry, now.shapes[number], bounds.tolist() if np.isfinite(bounds).all() else None)


def _told(entry: ImageEntry, shape: Any, bounds: list[float] | None) -> dict[str, Any]:
    record = entry.record
    sizes = record["source_bytes"], record["archive_bytes"]
    return {
        "id": entry.id,
        "flight": entry.flight,
        "href": href(entry.flight, entry.id),
        "datetime": record["captured"],
        "width": record["width"],
        "height": record["height"],
        "bands": record["bands"],
        "dtype": record["dtype"],
        "bbox": bounds,
        "footprint": None if shape is None else shapely.geometry.mapping(shape),
        "camera": _recorded_camera(record),
        "source_bytes": sizes[0],
        "archive_bytes": sizes[1],
        "ratio": round(sizes[0] / sizes[1], 2) if sizes[1] else None,
        "codec": record["codec"],
        "model": record.get("model"),
    }


def describe(site: Site, entry: ImageEntry) -> dict[str, Any]:
    """All that is told of one image.

    Raises:
        ArchiveError: its metadata are damaged.
    """
    from archive_pipeline.store.index_rows import footprint_of

    image = site.open(entry)
    source = image.source
    shape = footprint_of(entry)
    bounds = None if shape is None else list(shape.bounds)
    found, more = _detections(site, entry)
    georef = source.georef
    return {
        **_told(entry, shape, bounds),
        "camera": camera_of(source),
        "crs": georef.crs,
        "transform": georef.transform and list(georef.transform),
        "gcps": len(georef.gcps),
        "rpcs": georef.rpcs is not None,
        "position_source": georef.method,
        "warnings": list(source.warnings),
        "overviews": list(entry.overviews),
        "mask": entry.record["mask"],
        "detections": found,
        "more_detections": more,
        "original": site.originals.find(image) is not None,
        "steps": _steps(site, entry),
    }


def camera_of(source: SourceImage) -> str | None:
    """Make and model of a camera."""
    camera = source.camera
    return None if camera is None else _camera_name(camera.make, camera.model)


def _recorded_camera(record: dict[str, Any]) -> str | None:
    """The same by an image's record; None also in archives of earlier releases."""
    camera = record.get("camera") or {}
    make, model = (camera.get(name, "") for name in ("make", "model"))
    return _camera_name(make, model) if isinstance(make, str) and isinstance(model, str) else None


def _camera_name(make: str, model: str) -> str | None:
    make, model = make.strip(), model.strip()
    return (model if model.casefold().startswith(make.casefold()) else f"{make} {model}") or None


def _detections(site: Site, entry: ImageEntry) -> tuple[list[dict[str, Any]], int]:
    """Objects that detectors found at ingest, and how many more there are than are told."""
    image = site.open(entry)
    classes = image.detections(detected_classes) or {}
    stored = image.detections(unpack_detections) or {}
    listed = []
    for sha256, one in stored.items():
        detector, names = classes.get(sha256, (sha256[:12], {}))
        objects = one.found
        for box, score, label in zip(
            objects.boxes.tolist(), objects.scores.tolist(), objects.classes.tolist(), strict=True
        ):
            listed.append(
                {
                    "label": names.get(label, str(label)),
                    "confidence": score,
                    "box": box,
                    "detector": detector,
                }
            )
    listed.sort(key=lambda found: -found["confidence"])
    return listed[:MOST_DETECTIONS], max(0, len(listed) - MOST_DETECTIONS)


def detected_classes(data: bytes) -> dict[str, tuple[str, dict[int, str]]]:
    """Names of detectors and of their classes in what `pack_detections` made, by SHA-256."""
    import json

    return {
        str(one["sha256"]): (
            str(one["name"]),
            {int(number): str(label) for number, label in one["classes"].items()},
        )
        for one in json.loads(data)
    }


def _steps(site: Site, entry: ImageEntry) -> list[int]:
    """Denoising steps that an image can be shown with."""
    if entry.record["codec"] != "pcdc" or find_spec("torch") is None:
        return [0]
    key = f"models/{entry.record['model']}/{DENOISER_CONFIG}"
    return [0] if site.catalogue.archive.read_key(key) is None else [0, 1]
