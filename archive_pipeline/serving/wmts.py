"""Tiles as a Web Map Tile Service, OGC 07-057r7: capabilities, and requests by key and value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from fastapi import APIRouter, Request
from starlette.responses import Response

from archive_pipeline.errors import UsageError
from archive_pipeline.serving._responses import MEDIA_TYPES
from archive_pipeline.serving.catalogue import total_bounds
from archive_pipeline.serving.site import Site, href
from archive_pipeline.serving.tiles import MOST_ZOOM, plan_mosaic, tile_grid

MATRICES = "WebMercatorQuad"
ALL = "all"  # the layer of everything; those of flights are their paths
MOST_LAYERS = 1000
FORMATS = {MEDIA_TYPES[ext]: ext for ext in ("png", "jpg", "webp")}
NAMESPACES = {
    "xmlns": "http://www.opengis.net/wmts/1.0",
    "xmlns:ows": "http://www.opengis.net/ows/1.1",
    "xmlns:xlink": "http://www.w3.org/1999/xlink",
    "version": "1.0.0",
}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def router(site: Site) -> APIRouter:
    """Routes of the service."""
    routes = APIRouter()

    async def capabilities(request: Request) -> Response:
        base = str(request.base_url).rstrip("/")
        text = await site.look(request, lambda: describe(site, base))
        return Response(text, media_type="application/xml", headers={"Cache-Control": "no-cache"})

    @routes.get("/WMTSCapabilities.xml", response_class=Response)
    async def document(request: Request) -> Response:
        return await capabilities(request)

    @routes.get("/wmts", response_class=Response)
    async def by_key_and_value(request: Request) -> Response:
        given = {key.casefold(): value for key, value in request.query_params.items()}
        if given.get("service", "WMTS").upper() != "WMTS":
            raise UsageError("service is not WMTS")
        operation = given.get("request", "GetCapabilities").casefold()
        if operation == "getcapabilities":
            return await capabilities(request)
        if operation != "gettile":
            raise UsageError("request is neither GetCapabilities nor GetTile")
        z, y, x = (_number(given, key) for key in ("tilematrix", "tilerow", "tilecol"))
        if given.get("tilematrixset", MATRICES) != MATRICES or z > MOST_ZOOM:
            raise UsageError(f"tiles are of {MATRICES}, 0 to {MOST_ZOOM}")
        kind = given.get("format", "image/png")
        if kind not in FORMATS:
            raise UsageError(f"format is none of {', '.join(FORMATS)}")
        grid, layer = tile_grid(z, x, y, 256), given.get("layer", ALL)

        return await site.respond(
            request, lambda: plan_mosaic(site, _flight_of(site, layer), grid, FORMATS[kind])
        )

    return routes


def _number(given: dict[str, str], key: str) -> int:
    if not re.fullmatch(r"\d{1,8}", given.get(key, ""), re.ASCII):
        raise UsageError(f"{key} is not a number")
    return int(given[key])


def _flight_of(site: Site, layer: str) -> str | None:
    """The flight that a layer shows; None for that of everything.

    Raises:
        UsageError: there is no such layer.
    """
    if layer == ALL:
        return None
    for flight in site.catalogue.now.flights:
        if href(flight)[1:] == layer:
            return flight
    raise UsageError("there is no such layer")


def describe(site: Site, base: str) -> str:
    """Capabilities: a layer of everything, and one of each flight."""
    now = site.catalogue.now
    layers = [_layer(site.title, ALL, f"{base}/tiles", total_bounds(now.bounds))]
    for flight in now.flights[:MOST_LAYERS]:
        path = href(flight)
        bounds = total_bounds(now.bounds[now.of_flight(flight)])
        layers.append(_layer(flight, path[1:], f"{base}{path}/tiles", bounds))
    attributes = " ".join(f"{key}={quoteattr(value)}" for key, value in NAMESPACES.items())
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            f"<Capabilities {attributes}>",
            "<ows:ServiceIdentification>",
            f"<ows:Title>{_text(site.title)}</ows:Title>",
            "<ows:ServiceType>OGC WMTS</ows:ServiceType>",
            "<ows:ServiceTypeVersion>1.0.0</ows:ServiceTypeVersion>",
            "</ows:ServiceIdentification>",
            "<ows:OperationsMetadata>",
            *_operations(base),
            "</ows:OperationsMetadata>",
            "<Contents>",
            *layers,
            *_matrices(),
            "</Contents>",
            f"<ServiceMetadataURL xlink:href={quoteattr(f'{base}/WMTSCapabilities.xml')}/>",
            "</Capabilities>",
        ]
    )


def _operations(base: str) -> Iterator[str]:
    for operation in ("GetCapabilities", "GetTile"):
        yield (
            f'<ows:Operation name="{operation}"><ows:DCP><ows:HTTP>'
            f"<ows:Get xlink:href={quoteattr(f'{base}/wmts?')}>"
            '<ows:Constraint name="GetEncoding"><ows:AllowedValues><ows:Value>KVP</ows:Value>'
            "</ows:AllowedValues></ows:Constraint></ows:Get></ows:HTTP></ows:DCP></ows:Operation>"
        )


def _layer(title: str, identifier: str, path: str, bounds: list[float] | None) -> str:
    west, south, east, north = bounds or (-180.0, -85.0, 180.0, 85.0)
    formats = "".join(f"<Format>{kind}</Format>" for kind in FORMATS)
    place = "{TileMatrix}/{TileCol}/{TileRow}"
    resources = "".join(
        f'<ResourceURL format="{kind}" resourceType="tile" '
        f"template={quoteattr(f'{path}/{place}.{ext}')}/>"
        for kind, ext in FORMATS.items()
    )
    return (
        f"<Layer><ows:Title>{_text(title)}</ows:Title>"
        f"<ows:WGS84BoundingBox><ows:LowerCorner>{west!r} {south!r}</ows:LowerCorner>"
        f"<ows:UpperCorner>{east!r} {north!r}</ows:UpperCorner></ows:WGS84BoundingBox>"
        f"<ows:Identifier>{_text(identifier)}</ows:Identifier>"
        '<Style isDefault="true"><ows:Identifier>default</ows:Identifier></Style>'
        f"{formats}<TileMatrixSetLink><TileMatrixSet>{MATRICES}</TileMatrixSet>"
        f"</TileMatrixSetLink>{resources}</Layer>"
    )


def _matrices() -> Iterator[str]:
    import morecantile  # takes most of a second

    grid: Any = morecantile.tms.get(MATRICES)
    yield (
        f"<TileMatrixSet><ows:Identifier>{MATRICES}</ows:Identifier>"
        "<ows:SupportedCRS>urn:ogc:def:crs:EPSG::3857</ows:SupportedCRS>"
        "<WellKnownScaleSet>http://www.opengis.net/def/wkss/OGC/1.0/GoogleMapsCompatible"
        "</WellKnownScaleSet>"
    )
    for matrix in grid.tileMatrices[: MOST_ZOOM + 1]:
        left, top = matrix.pointOfOrigin
        yield (
            f"<TileMatrix><ows:Identifier>{matrix.id}</ows:Identifier>"
            f"<ScaleDenominator>{matrix.scaleDenominator!r}</ScaleDenominator>"
            f"<TopLeftCorner>{left!r} {top!r}</TopLeftCorner>"
            f"<TileWidth>{matrix.tileWidth}</TileWidth><TileHeight>{matrix.tileHeight}</TileHeight>"
            f"<MatrixWidth>{matrix.matrixWidth}</MatrixWidth>"
            f"<MatrixHeight>{matrix.matrixHeight}</MatrixHeight></TileMatrix>"
        )
    yield "</TileMatrixSet>"


def _text(value: str) -> str:
    """A name as XML can hold it."""
    return escape(_NOT_XML.sub("\ufffd", value))
