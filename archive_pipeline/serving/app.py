"""The application: its routes, its errors, what it lets in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from archive_pipeline._version import __version__
from archive_pipeline.errors import ArchivePipelineError, NotInstalled, UsageError
from archive_pipeline.outputs.paths import OutputError
from archive_pipeline.serving import (
    downloads,
    footprints,
    listing,
    originals,
    stac_api,
    tiles,
    windows,
    wmts,
)
from archive_pipeline.serving._door import Door
from archive_pipeline.serving._errors import Gone, NotFound, Unavailable
from archive_pipeline.serving._responses import Json
from archive_pipeline.serving.options import ServeOptions
from archive_pipeline.serving.site import Site
from archive_pipeline.store.layout import ArchiveError, StoreError

PAGE = Path(__file__).parent / "page"


def make_app(options: ServeOptions, site: Site | None = None) -> FastAPI:
    """The server's application.

    Args:
        options: what is served, and to whom.
        site: what its routes share; a new one by default.
    """
    site = Site(options) if site is None else site
    app = FastAPI(
        title="archive serve",
        version=__version__,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        openapi_url="/api/openapi.json",
    )
    app.state.site = site
    app.add_middleware(Door, options=options)
    _handle_errors(app, site)
    for part in (listing, footprints, tiles, windows, originals, downloads, wmts, stac_api):
        app.include_router(part.router(site))
    app.include_router(listing.image_router(site))
    if PAGE.is_dir():

        @app.get("/", include_in_schema=False)
        async def page() -> FileResponse:
            return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

        app.mount("/page", StaticFiles(directory=PAGE))
    return app


def _handle_errors(app: FastAPI, site: Site) -> None:
    """Answer every error by one line of JSON."""

    async def answer(request: Request, error: Exception) -> Response:
        status, headers = 500, {}
        if isinstance(error, StoreError):
            error = Unavailable(str(error))
        if isinstance(error, ArchiveError) and not await _is_there(site, request):
            error = Unavailable(f"{site.options.archive}: no archive there")
        if isinstance(error, HTTPException):
            return _line(error.status_code, str(error.detail), dict(error.headers or {}))
        if isinstance(error, Unavailable):
            status, headers = 503, {"Retry-After": str(error.seconds)}
        elif isinstance(error, NotFound):
            status = 404
        elif isinstance(error, NotInstalled):
            status = 501
        elif isinstance(error, UsageError | OutputError):
            status = 422
        return _line(status, str(error), headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return _line(422, f"{place}: {first['msg']}", {})

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    async def unexpected(request: Request, error: Exception) -> Response:
        return _line(500, type(error).__name__, {})

    app.add_exception_handler(ArchivePipelineError, answer)
    app.add_exception_handler(HTTPException, answer)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Gone, gone)
    app.add_exception_handler(Exception, unexpected)


async def _is_there(site: Site, request: Request) -> bool:
    """Whether the archive can be read at all."""

    def look() -> bool:
        try:
            return site.catalogue.archive.read_key("zarr.json") is not None
        except (ArchiveError, Unavailable):
            return False

    try:
        return await site.look(request, look)
    except (Unavailable, Gone):
        return True


def _line(status: int, text: str, headers: dict[str, Any]) -> Json:
    detail = " ".join(text.split())
    return Json({"detail": detail}, status, {"Cache-Control": "no-store", **headers})
