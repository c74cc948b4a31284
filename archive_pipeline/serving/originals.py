"""Original files beside what is archived of them, where they still are and still the same."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from archive_pipeline.outputs.reduced import Reduced
from archive_pipeline.serving._errors import NotFound
from archive_pipeline.serving._pictures import encoded
from archive_pipeline.serving._queries import parse_window
from archive_pipeline.serving._responses import MEDIA_TYPES, Made
from archive_pipeline.serving.catalogue import version_of
from archive_pipeline.serving.display import Shown, check_shown
from archive_pipeline.serving.site import Site
from archive_pipeline.serving.windows import LARGE_PIXELS, MaxSize, Text, size_of
from archive_pipeline.store.layout import ImageEntry


def router(site: Site) -> APIRouter:
    """The route of originals."""
    routes = APIRouter()

    @routes.get("/flights/{flight}/images/{image:path}/original.{ext}", response_class=Response)
    async def original(
        request: Request,
        flight: str,
        image: str,
        ext: Literal["png", "jpg", "webp"],
        window: Text = None,
        max_size: MaxSize = None,
    ) -> Response:
        def plan() -> Made:
            entry = site.image(flight, image)
            return plan_original(site, entry, ext, window, max_size)

        return await site.respond(request, plan)

    return routes


def plan_original(
    site: Site, entry: ImageEntry, ext: str, text: str | None, max_size: int | None
) -> Made:
    """A window of an original as a picture.

    Raises:
        NotFound: the original is not there, or is another file by now.
        UsageError: there is no such window, or it is too large.
    """
    area = parse_window(text, entry.record["width"], entry.record["height"])
    width, height, _ = size_of(area, max_size, ())
    found = site.originals.find(site.open(entry))
    if found is None:
        raise NotFound(f"the original of {entry.flight}/{entry.id} is not at hand (--originals)")
    source, version = found

    def make() -> bytes:
        check_shown(source)
        raster = site.originals.open(source, version)
        col, row, w, h = area
        if (width, height) == (w, h):
            shown, window = Shown(raster, site.levels(entry)), area
        else:
            box = col, row, col + w, row + h
            small = Reduced(raster, box, width, height)
            shown, window = Shown(small, site.levels(entry)), small.window
        return encoded(shown.read(window), shown.read_mask(window), ext)

    tag = f"original {version_of(entry)} {version} {area} {width} {ext}"
    # files are decoded once, and quickly: what is large is what is made of them
    return Made(tag, MEDIA_TYPES[ext], make, width * height > LARGE_PIXELS)
