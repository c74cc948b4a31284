"""Windows of images in their own pixel grid: pictures, GeoTIFFs, files as `restore` writes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from archive_pipeline.errors import UsageError
from archive_pipeline.flight.raster import Raster
from archive_pipeline.geo.georef import Window
from archive_pipeline.jobs.restoring import RestoreTask, restore_image
from archive_pipeline.jobs.views import OverviewView, View, reduced
from archive_pipeline.outputs.paths import output_path
from archive_pipeline.serving._pictures import encoded
from archive_pipeline.serving._queries import parse_window
from archive_pipeline.serving._responses import MEDIA_TYPES, Made, Written
from archive_pipeline.serving.catalogue import version_of
from archive_pipeline.serving.display import KeptRaster, Shown, check_shown
from archive_pipeline.serving.site import Site
from archive_pipeline.store.layout import ImageEntry

MOST_SIDE = 16_384  # pixels of a picture
MOST_PIXELS = 64 << 20  # of a picture
MOST_READ = 256 << 20  # pixels that are decoded for a picture
LARGE_PIXELS, LARGE_READ = 4 << 20, 16 << 20  # the same of a picture that is made alone
FORMATS = {"tif": "gtiff", "jpg": "jpeg", "png": "png"}
SUFFIXES = {"tif": ".tif", "jpg": ".jpg", "png": ".png"}

Text = Annotated[str | None, Query(max_length=100)]
MaxSize = Annotated[int | None, Query(ge=1, le=MOST_SIDE)]


def router(site: Site) -> APIRouter:
    """Routes of windows."""
    routes = APIRouter()

    @routes.get("/flights/{flight}/images/{image:path}/window.{ext}", response_class=Response)
    async def window(
        request: Request,
        flight: str,
        image: str,
        ext: Literal["png", "jpg", "webp", "tif"],
        window: Text = None,
        max_size: MaxSize = None,
        steps: int = 0,
    ) -> Response:
        def find() -> ImageEntry:
            return site.image(flight, image)

        def written() -> Written:
            entry = find()
            return plan_file(site, entry, ext, _area(entry, window), max_size, steps)

        if ext == "tif":
            return await site.send(request, written)
        return await site.respond(
            request, lambda: plan_window(site, find(), ext, window, max_size, steps)
        )

    @routes.get("/flights/{flight}/images/{image:path}/file.{ext}", response_class=Response)
    async def file(
        request: Request,
        flight: str,
        image: str,
        ext: Literal["jpg", "tif", "png"],
        steps: int = 0,
    ) -> Response:
        def plan() -> Written:
            entry = site.image(flight, image)
            return plan_file(site, entry, ext, _whole(entry), None, steps)

        return await site.send(request, plan)

    return routes


def _whole(entry: ImageEntry) -> Window:
    return 0, 0, entry.record["width"], entry.record["height"]


def _area(entry: ImageEntry, text: str | None) -> Window:
    return parse_window(text, entry.record["width"], entry.record["height"])


def plan_window(
    site: Site, entry: ImageEntry, ext: str, text: str | None, max_size: int | None, steps: int
) -> Made:
    """A window as a picture.

    Raises:
        UsageError: there is no such window, or it is too large.
    """
    area = _area(entry, text)
    width, height, large = size_of(area, max_size, entry.overviews)
    site.settings(steps)

    def make() -> bytes:
        image = site.open(entry, steps)
        check_shown(image.source)
        levels = site.levels(entry)

        def shown(raster: View | OverviewView) -> Raster:
            if large:
                return Shown(raster, levels)
            whole = 0, 0, raster.source.width, raster.source.height
            return KeptRaster(
                Shown(replace(raster, window=whole), levels), raster.window, site.tiles
            )

        made = reduced(View(image, area), max(width, height), shown)
        return encoded(made.read(made.window), made.read_mask(made.window), ext)

    tag = f"window {version_of(entry)} {area} {width} {steps} {ext}"
    return Made(tag, MEDIA_TYPES[ext], make, large)


def size_of(
    area: Window, max_size: int | None, overviews: tuple[int, ...]
) -> tuple[int, int, bool]:
    """Width and height of a picture of a window, and whether it takes much work.

    Args:
        overviews: what those that it may be made from are smaller by, a side.

    Raises:
        UsageError: it has too many pixels, or too many would be decoded for it.
    """
    _, _, width, height = area
    factor = max(1.0, max(width, height) / (max_size or MOST_SIDE))
    size = max(1, round(width / factor)), max(1, round(height / factor))
    if size[0] * size[1] > MOST_PIXELS or (max_size is None and factor > 1):
        raise UsageError(
            f"{width} x {height} pixels are too many for a picture: give a window or max_size"
        )
    read = width * height / max([f for f in overviews if f <= factor], default=1) ** 2
    if read > MOST_READ:
        raise UsageError(
            f"{width} x {height} pixels have no overview for a picture so small: give a window"
        )
    return *size, size[0] * size[1] > LARGE_PIXELS or read > LARGE_READ


def plan_file(
    site: Site, entry: ImageEntry, ext: str, area: Window, max_size: int | None, steps: int
) -> Written:
    """A window as `archive restore` writes it.

    Raises:
        UsageError: it is too large.
    """
    width, height, large = size_of(area, max_size, entry.overviews)
    site.settings(steps)
    full = area == _whole(entry) and max_size is None
    path = output_path(Path(), entry.flight, entry.id, area, full, SUFFIXES[ext])

    def write(folder: Path) -> Path:
        place = folder / path.name
        less = max_size if max(width, height) < max(area[2:]) else None
        how = FORMATS[ext], site.decoding(steps), less
        restore_image(RestoreTask(site.options.archive, entry, area, place, {}, *how))
        return place

    tag = f"file {version_of(entry)} {area} {width} {steps} {ext}"
    return Written(tag, MEDIA_TYPES[ext], write, large, path.name)
