"""A STAC API (1.0) of the archive: flights are collections, images are items.

https://github.com/radiantearth/stac-api-spec: core, collections, features and item search.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import numpy as np
import orjson
import shapely
from fastapi import APIRouter, Query, Request
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from archive_pipeline.errors import UsageError
from archive_pipeline.geo.georef import Bbox
from archive_pipeline.serving._errors import NotFound
from archive_pipeline.serving._queries import parse_bbox, parse_interval
from archive_pipeline.serving._responses import Json
from archive_pipeline.serving.catalogue import Found, Snapshot
from archive_pipeline.serving.site import Site, href, name
from archive_pipeline.store.stac import STAC_VERSION
from archive_pipeline.store.stac_json import SUMMED, collections, items

MOST_ITEMS = 1000  # in one answer
MOST_NAMES = 1000  # of images or flights in one question
MOST_BODY = 256 << 10  # bytes of a question
THUMBNAIL = 512  # pixels
GEOJSON = "application/geo+json"
OPENAPI = "application/vnd.oai.openapi+json;version=3.1"
CONFORMS = [
    *(f"https://api.stacspec.org/v1.0.0/{name}" for name in ("core", "collections", "item-search")),
    "https://api.stacspec.org/v1.0.0/ogcapi-features",
    *(f"http://www.opengis.net/spec/ogcapi-features-1/1.0/conf/{n}" for n in ("core", "geojson")),
]


class Search(BaseModel):
    """What an item search is for, as its body has it."""

    bbox: list[float] | None = Field(None, min_length=4, max_length=6)
    intersects: dict[str, Any] | None = None
    datetime: str | None = Field(None, max_length=200)
    ids: list[str] | None = Field(None, max_length=MOST_NAMES)
    collections: list[str] | None = Field(None, max_length=MOST_NAMES)
    limit: int = Field(10, ge=1)
    token: str | None = Field(None, max_length=2000)


class SearchQuery(BaseModel):
    """The same as parameters of an address."""

    bbox: str | None = Field(None, description="west,south,east,north in degrees.")
    datetime: str | None = Field(None, description="A time, or an interval.")
    ids: str | None = Field(None, description="Images, with commas between.")
    collections: str | None = Field(None, description="Flights, with commas between.")
    limit: int = Field(10, ge=1)
    token: str | None = Field(None, max_length=2000, description="Of a `next` link.")


class ItemsQuery(BaseModel):
    """Which images of a flight."""

    bbox: str | None = Field(None, description="west,south,east,north in degrees.")
    datetime: str | None = Field(None, description="A time, or an interval.")
    limit: int = Field(10, ge=1)
    token: str | None = Field(None, max_length=2000, description="Of a `next` link.")


def router(site: Site) -> APIRouter:
    """Routes of the STAC API."""
    routes, api = APIRouter(), _Api(site)

    @routes.get("/stac")
    async def landing(request: Request) -> Json:
        return Json(api.landing(_base(request)))

    @routes.get("/stac/conformance")
    async def conformance() -> Json:
        return Json({"conformsTo": CONFORMS})

    @routes.get("/stac/collections")
    async def all_collections(request: Request) -> Json:
        base = _base(request)
        return Json(await site.look(request, lambda: api.collections(base)))

    @routes.get("/stac/collections/{flight}")
    async def one_collection(request: Request, flight: str) -> Json:
        base = _base(request)
        return Json(await site.look(request, lambda: api.collection(base, name(flight))))

    @routes.get("/stac/collections/{flight}/items")
    async def flight_items(
        request: Request, flight: str, query: Annotated[ItemsQuery, Query()]
    ) -> Json:
        base = _base(request)
        found = await site.look(request, lambda: api.flight_items(base, name(flight), query))
        return Json(found, media_type=GEOJSON)

    @routes.get("/stac/collections/{flight}/items/{image:path}")
    async def item(request: Request, flight: str, image: str) -> Json:
        base = _base(request)
        found = await site.look(request, lambda: api.item(base, name(flight), name(image)))
        return Json(found, media_type=GEOJSON)

    @routes.get("/items")
    @routes.get("/stac/search")
    async def search(request: Request, query: Annotated[SearchQuery, Query()]) -> Json:
        base, path = _base(request), request.url.path
        found = await site.look(request, lambda: api.search_by_address(base, path, query))
        return Json(found, media_type=GEOJSON)

    @routes.post("/stac/search")
    async def search_by_body(request: Request) -> Json:
        base, body = _base(request), await _body(request)
        found = await site.look(request, lambda: api.search_by_body(base, body))
        return Json(found, media_type=GEOJSON)

    return routes


class _Api:
    """What the routes answer.

    Args:
        site: the archive that is served.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._collections: tuple[Snapshot, list[dict[str, Any]]] | None = None
        self._home = _home(site)

    def landing(self, base: str) -> dict[str, Any]:
        api = f"{base}/stac"
        return {
            "type": "Catalog",
            "stac_version": STAC_VERSION,
            "id": self._site.title,
            "title": self._site.title,
            "description": "Images of an archive, a collection a flight",
            "conformsTo": CONFORMS,
            "links": [
                _link("self", api),
                _link("root", api),
                _link("data", f"{api}/collections"),
                _link("conformance", f"{api}/conformance"),
                _link("search", f"{api}/search", GEOJSON, method="GET"),
                _link("search", f"{api}/search", GEOJSON, method="POST"),
                _link("service-desc", f"{base}/api/openapi.json", OPENAPI),
                _link("service-doc", f"{base}/", "text/html"),
            ],
        }

    def collections(self, base: str) -> dict[str, Any]:
        now, api = self._site.catalogue.now, f"{base}/stac"
        known = self._collections
        if known is None or known[0] is not now:
            known = now, list(collections(now.rows.select(SUMMED)).values())
            self._collections = known
        found = [_with_links(collection, api) for collection in known[1]]
        links = [_link("self", f"{api}/collections"), _link("root", api)]
        return {"collections": found, "links": links}

    def collection(self, base: str, flight: str) -> dict[str, Any]:
        now = self._site.catalogue.now
        of = now.of_flight(flight)
        rows = now.rows.select(SUMMED).slice(of.start, of.stop - of.start)
        return _with_links(next(iter(collections(rows).values())), f"{base}/stac", flight)

    def item(self, base: str, flight: str, image: str) -> dict[str, Any]:
        now = self._site.catalogue.now
        number = now.number(flight, image)
        if number is None:
            raise NotFound(f"no image {f'{flight}/{image}'!r}")
        return self._items(now, np.array([number]), base)[0]

    def flight_items(self, base: str, flight: str, query: ItemsQuery) -> dict[str, Any]:
        now = self._site.catalogue.now
        now.of_flight(flight)
        found = now.find(
            parse_bbox(query.bbox),
            parse_interval(query.datetime),
            [flight],
            limit=min(query.limit, MOST_ITEMS),
            after=query.token,
        )
        address = f"{base}{_collection_path(flight)}/items"
        return self._page(now, found, base, address, query.model_dump(exclude_none=True))

    def search_by_address(self, base: str, path: str, query: SearchQuery) -> dict[str, Any]:
        bbox = parse_bbox(query.bbox)
        lists = {
            part: text.split(",")
            for part in ("ids", "collections")
            if (text := getattr(query, part)) is not None
        }
        asked = {"datetime": query.datetime, "limit": query.limit, "token": query.token} | lists
        now = self._site.catalogue.now
        found = _find(now, _search(asked), bbox)
        return self._page(now, found, base, base + path, query.model_dump(exclude_none=True))

    def search_by_body(self, base: str, body: bytes) -> dict[str, Any]:
        try:
            asked = orjson.loads(body or b"{}")
        except orjson.JSONDecodeError as error:
            raise UsageError(f"the body is no JSON: {error}") from error
        search = _search(asked)
        bbox = None if search.bbox is None else parse_bbox(",".join(map(repr, search.bbox)))
        now, address = self._site.catalogue.now, f"{base}/stac/search"
        found = _find(now, search, bbox)
        page = self._page(now, found, base, address)
        if found.next is not None:
            body_of_next = {**asked, "token": found.next}
            page["links"].append(
                _link("next", address, GEOJSON, method="POST", body=body_of_next, merge=False)
            )
        return page

    def _page(
        self,
        now: Snapshot,
        found: Found,
        base: str,
        address: str,
        query: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Items as an answer, with a link to those that follow where a query is given."""
        links = [_link("root", f"{base}/stac")]
        if query is not None:
            links.append(_link("self", f"{address}?{urlencode(query)}", GEOJSON))
            if found.next is not None:
                following = urlencode(query | {"token": found.next})
                links.append(_link("next", f"{address}?{following}", GEOJSON, method="GET"))
        return {
            "type": "FeatureCollection",
            "features": self._items(now, found.numbers, base),
            "links": links,
            "numberMatched": found.matched,
            "numberReturned": len(found.numbers),
        }

    def _items(self, now: Snapshot, numbers: NDArray[np.intp], base: str) -> list[dict[str, Any]]:
        """Items with addresses that hold for whoever asked."""
        made = items(now.rows.take(numbers))
        for item, number in zip(made, numbers.tolist(), strict=True):
            flight = now.flights[now.flight[number]]
            image = now.name(number).removeprefix(f"{flight}/")
            collection = f"{base}{_collection_path(flight)}"
            address = f"{collection}/items/{quote(image, safe='/', errors='surrogateescape')}"
            item["links"] = [
                _link("self", address, GEOJSON),
                _link("root", f"{base}/stac"),
                _link("parent", collection),
                _link("collection", collection),
            ]
            item["assets"] = self._stored(item["assets"]) | _views(item, base + href(flight, image))
        return made

    def _stored(self, assets: dict[str, Any]) -> dict[str, Any]:
        """What is in the archive itself, for those who can reach it."""
        if self._home is None:
            return {}
        return {
            part: asset | {"href": self._home + asset["href"].removeprefix(".")}
            for part, asset in assets.items()
        }


def _home(site: Site) -> str | None:
    """The archive's own address; None where those who ask must not know it."""
    archive = site.options.archive.rstrip("/")
    if "://" in archive:
        return None if "@" in archive else archive  # it may hold a password
    return Path(archive).absolute().as_uri() if site.options.is_local else None


def _views(item: dict[str, Any], address: str) -> dict[str, Any]:
    """An image as the server shows it."""
    found = {
        "thumbnail": _asset(
            f"{address}/window.jpg?max_size={THUMBNAIL}", "image/jpeg", "thumbnail"
        ),
        "geotiff": _asset(
            f"{address}/file.tif", "image/tiff; application=geotiff", "data", "GeoTIFF"
        ),
    }
    if item["properties"]["archive:codec"] == "pcdc":
        found["jpeg"] = _asset(f"{address}/file.jpg", "image/jpeg", "visual", "JPEG with metadata")
    if "proj:code" in item["properties"] or "proj:wkt2" in item["properties"]:
        found["tiles"] = _asset(
            f"{address}/tilejson.json", "application/json", "tiles", "TileJSON of map tiles"
        )
    return found


def _asset(href: str, kind: str, role: str, title: str | None = None) -> dict[str, Any]:
    return {"href": href, "type": kind, "roles": [role], **({"title": title} if title else {})}


def _link(rel: str, href: str, kind: str = "application/json", **more: Any) -> dict[str, Any]:
    return {"rel": rel, "href": href, "type": kind, **more}


def _with_links(collection: dict[str, Any], api: str, flight: str | None = None) -> dict[str, Any]:
    own = f"{api}/collections/{_quoted(collection['id'] if flight is None else flight)}"
    links = [
        _link("self", own),
        _link("root", api),
        _link("parent", api),
        _link("items", f"{own}/items", GEOJSON),
    ]
    return collection | {"links": links}


def _collection_path(flight: str) -> str:
    return f"/stac/collections/{_quoted(flight)}"


def _quoted(text: str) -> str:
    return quote(text, safe="", errors="surrogateescape")


def _base(request: Request) -> str:
    return str(request.base_url).rstrip("/")


async def _body(request: Request) -> bytes:
    """What a request brings with it.

    Raises:
        UsageError: it is larger than any question.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY:
            raise UsageError(f"a search of more than {MOST_BODY} bytes is refused")
    return body


def _search(asked: Any) -> Search:
    try:
        return Search.model_validate(asked)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "search"
        raise UsageError(f"{place}: {first['msg']}") from error


def _find(now: Snapshot, search: Search, bbox: Bbox | None) -> Found:
    """Images that a search means.

    Raises:
        UsageError: it asks for what is no place or time.
    """
    limit = min(search.limit, MOST_ITEMS)
    when = parse_interval(search.datetime)
    if search.intersects is None:
        return now.find(bbox, when, search.collections, "", limit, search.token, search.ids)
    if bbox is not None:
        raise UsageError("bbox and intersects are not both to be given")
    shape = _shape(search.intersects)
    near = now.find(shape.bounds, when, search.collections, ids=search.ids).numbers
    shapely.prepare(shape)
    return now.page(near[shapely.intersects(shape, now.shapes[near])], limit, search.token)


def _shape(geometry: dict[str, Any]) -> shapely.Geometry:
    try:
        shape = shapely.from_geojson(orjson.dumps(geometry))
    except (shapely.errors.ShapelyError, TypeError) as error:
        raise UsageError("intersects is no GeoJSON geometry") from error
    if shape.is_empty or not np.isfinite(shape.bounds).all() or not shape.is_valid:
        raise UsageError("intersects is empty or no valid geometry")
    return shape
