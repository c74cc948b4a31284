"""Map tiles in Web Mercator: of all images, of a flight, of one image; and their TileJSON."""

from __future__ import annotations

import math
from functools import cache
from typing import Annotated, Any, Literal

import numpy as np
import shapely
from fastapi import APIRouter, Path, Query, Request
from numpy.typing import NDArray
from starlette.responses import Response

from archive_pipeline._version import __version__
from archive_pipeline.errors import UsageError
from archive_pipeline.serving._pictures import encoded
from archive_pipeline.serving._rendering import RADIUS, Grid, chosen, compose
from archive_pipeline.serving._responses import MEDIA_TYPES, Json, Made
from archive_pipeline.serving.catalogue import Snapshot, pitches_of, total_bounds, version_of
from archive_pipeline.serving.site import Site, href, name
from archive_pipeline.store.index_rows import footprint_of
from archive_pipeline.store.layout import ImageEntry

MOST_ZOOM = 24
CIRCUMFERENCE = 2 * math.pi * RADIUS

Ext = Literal["png", "jpg", "webp"]
Zoom = Annotated[int, Path(ge=0, le=MOST_ZOOM)]
Place = Annotated[int, Path(ge=0, lt=1 << MOST_ZOOM)]
Size = Annotated[Literal["256", "512"], Query()]


def router(site: Site) -> APIRouter:
    """Routes of tiles."""
    routes = APIRouter()
    options: dict[str, Any] = {"response_class": Response}

    @routes.get("/tiles/{z}/{x}/{y}.{ext}", **options)
    async def all_tiles(
        request: Request, z: Zoom, x: Place, y: Place, ext: Ext, size: Size = "256"
    ) -> Response:
        grid = tile_grid(z, x, y, int(size))
        return await site.respond(request, lambda: plan_mosaic(site, None, grid, ext))

    @routes.get("/flights/{flight}/tiles/{z}/{x}/{y}.{ext}", **options)
    async def flight_tiles(
        request: Request, flight: str, z: Zoom, x: Place, y: Place, ext: Ext, size: Size = "256"
    ) -> Response:
        grid = tile_grid(z, x, y, int(size))
        return await site.respond(request, lambda: plan_mosaic(site, name(flight), grid, ext))

    @routes.get("/flights/{flight}/images/{image:path}/tiles/{z}/{x}/{y}.{ext}", **options)
    async def image_tiles(
        request: Request,
        flight: str,
        image: str,
        z: Zoom,
        x: Place,
        y: Place,
        ext: Ext,
        size: Size = "256",
    ) -> Response:
        grid = tile_grid(z, x, y, int(size))

        def plan() -> Made:
            return plan_tile(site, site.image(flight, image), grid, ext)

        return await site.respond(request, plan)

    @routes.get("/tilejson.json")
    async def all_json(request: Request) -> Json:
        return Json(await site.look(request, lambda: _mosaic_json(site, request, None)))

    @routes.get("/flights/{flight}/tilejson.json")
    async def flight_json(request: Request, flight: str) -> Json:
        return Json(await site.look(request, lambda: _mosaic_json(site, request, name(flight))))

    @routes.get("/flights/{flight}/images/{image:path}/tilejson.json")
    async def image_json(request: Request, flight: str, image: str) -> Json:
        def told() -> dict[str, Any]:
            return _image_json(request, site.image(flight, image))

        return Json(await site.look(request, told))

    return routes


def tile_grid(z: int, x: int, y: int, size: int) -> Grid:
    """The pixels of a tile, rows counted from the north.

    Raises:
        UsageError: there is no such tile.
    """
    if not (x < 1 << z and y < 1 << z):
        raise UsageError(f"there is no tile {z}/{x}/{y}")
    side = CIRCUMFERENCE / (1 << z)
    half = CIRCUMFERENCE / 2
    return Grid(x * side - half, half - y * side, side / size, size)


def plan_mosaic(site: Site, flight: str | None, grid: Grid, ext: str) -> Made:
    """A tile of all images, or of a flight's.

    Raises:
        NotFound: there is no such flight.
    """
    now = site.catalogue.now
    of = slice(0, len(now)) if flight is None else now.of_flight(flight)
    numbers = chosen(now, grid, of)
    if not len(numbers):
        return empty(grid.size, ext)

    def make() -> bytes:
        return encoded(*compose(site, now.entries(numbers), grid, False), ext)

    versions = " ".join(now.version(int(n)) for n in numbers)
    return Made(f"tile {versions} {grid} {ext}", MEDIA_TYPES[ext], make)


def plan_tile(site: Site, entry: ImageEntry, grid: Grid, ext: str) -> Made:
    """A tile of one image."""

    def make() -> bytes:
        return encoded(*compose(site, [entry], grid, True), ext)

    return Made(f"tile {version_of(entry)} {grid} {ext}", MEDIA_TYPES[ext], make)


@cache
def empty(size: int, ext: str) -> Made:
    """A tile where nothing is."""
    blank = np.zeros((size, size, 3), np.uint8), np.zeros((size, size), np.uint8)
    made = encoded(*blank, ext)
    return Made(f"empty {size} {ext}", MEDIA_TYPES[ext], lambda: made)


def _mosaic_json(site: Site, request: Request, flight: str | None) -> dict[str, Any]:
    now = site.catalogue.now
    of = slice(0, len(now)) if flight is None else now.of_flight(flight)
    title = site.title if flight is None else flight
    path = "" if flight is None else href(flight)
    return _tilejson(request, title, path, total_bounds(now.bounds[of]), finest_zoom(now, of))


def _image_json(request: Request, entry: ImageEntry) -> dict[str, Any]:
    shape = footprint_of(entry)
    bounds = None if shape is None or not shape.area else list(shape.bounds)
    width, height = entry.record["width"], entry.record["height"]
    shapes = np.array([shape], dtype=object)
    zoom = _zoom(pitches_of(shapes, np.array([width * height])), shapely.bounds(shapes))
    return _tilejson(request, entry.id, href(entry.flight, entry.id), bounds, zoom)


def _tilejson(
    request: Request, title: str, path: str, bounds: list[float] | None, zoom: int
) -> dict[str, Any]:
    west, south, east, north = bounds or (-180.0, -85.0, 180.0, 85.0)
    base = str(request.base_url).rstrip("/")
    return {
        "tilejson": "3.0.0",
        "name": title,
        "version": __version__.split("+")[0],
        "scheme": "xyz",
        "tiles": [f"{base}{path}/tiles/{{z}}/{{x}}/{{y}}.png"],
        "minzoom": 0,
        "maxzoom": zoom,
        "bounds": [west, south, east, north],
        "center": [(west + east) / 2, (south + north) / 2, min(zoom, _fitting(west, east))],
    }


def _fitting(west: float, east: float) -> int:
    """The zoom at which so many degrees are about a screen wide."""
    return max(0, math.floor(math.log2(4 * 360 / max(east - west, 1e-6))))


def finest_zoom(now: Snapshot, of: slice) -> int:
    """The zoom at which the finest of some images has its own pixels."""
    return _zoom(now.pitches[of], now.bounds[of])


def _zoom(pitches: NDArray[np.float64], bounds: NDArray[np.float64]) -> int:
    known = np.isfinite(pitches)
    if not known.any():
        return 0
    middles = np.clip(bounds[known, 1::2].mean(axis=1), -85, 85)
    finest = float((pitches[known] / np.cos(np.radians(middles))).min())
    return min(MOST_ZOOM, max(0, math.ceil(math.log2(CIRCUMFERENCE / 256 / finest))))
