"""A box of ground to take away: as one GeoTIFF, or as the frames that show it."""

from __future__ import annotations

import asyncio
import math
import zipfile
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request
from starlette.responses import Response, StreamingResponse

from archive_pipeline.errors import ArchivePipelineError, UsageError
from archive_pipeline.geo.georef import Bbox
from archive_pipeline.jobs.restore import MOSAIC_NAME, restore
from archive_pipeline.jobs.restoring import RestoreTask, restore_image
from archive_pipeline.jobs.selection import Selection
from archive_pipeline.outputs.paths import OutputError, output_path
from archive_pipeline.serving._errors import Gone, NoRoom, NotFound, Unavailable
from archive_pipeline.serving._queries import parse_bbox
from archive_pipeline.serving._responses import MEDIA_TYPES, Written, attachment
from archive_pipeline.serving.catalogue import DEGREE, Snapshot
from archive_pipeline.serving.site import Site
from archive_pipeline.store.layout import ArchiveError, ImageEntry

MOST_PIXELS = 150_000_000  # of a mosaic
MOST_FRAMES = 500  # of a mosaic, or of a zip
PIECE = 1 << 20  # bytes that are sent at a time
FAILED = "FAILED.txt"

Text = Annotated[str | None, Query(max_length=200)]


def router(site: Site) -> APIRouter:
    """Routes of downloads."""
    routes = APIRouter()

    @routes.get("/mosaic.tif", response_class=Response)
    async def mosaic(
        request: Request,
        bbox: Annotated[str, Query(max_length=200)],
        resolution: Annotated[float | None, Query(gt=0, allow_inf_nan=False)] = None,
        flight: str | None = None,
    ) -> Response:
        return await site.send(request, lambda: plan_mosaic(site, bbox, resolution, flight))

    @routes.get("/frames.zip", response_class=Response)
    async def frames(request: Request, bbox: Text = None, flight: str | None = None) -> Response:
        def find() -> list[ImageEntry]:
            now = site.catalogue.now
            return now.entries(_frames(now, parse_bbox(bbox), flight))

        entries = await site.look(request, find)
        return StreamingResponse(
            zipped(site, request, entries),
            media_type="application/zip",
            headers={
                "Content-Disposition": attachment("frames.zip"),
                "Cache-Control": "no-store",
                "X-Frames": str(len(entries)),
            },
        )

    return routes


def _frames(now: Snapshot, area: Bbox | None, flight: str | None) -> list[int]:
    """Numbers of the images that a box meets.

    Raises:
        NotFound: there are none, or no such flight.
        UsageError: there are too many.
    """
    if flight is not None:
        now.of_flight(flight)
    numbers = now.find(area, flights=None if flight is None else [flight]).numbers.tolist()
    if not numbers:
        raise NotFound("no image shows that box")
    if len(numbers) > MOST_FRAMES:
        raise UsageError(
            f"{len(numbers)} images show that box, more than the {MOST_FRAMES} of one download: "
            "take a smaller box, or archive restore"
        )
    return [int(n) for n in numbers]


def plan_mosaic(site: Site, bbox: str, resolution: float | None, flight: str | None) -> Written:
    """A box as one GeoTIFF, as `archive restore --mosaic` writes it.

    Raises:
        NotFound: no image shows the box.
        UsageError: the box is none, or the mosaic would be too large.
    """
    area = parse_bbox(bbox)
    assert area is not None
    now = site.catalogue.now
    numbers = _frames(now, area, flight)
    _check_size(now, numbers, area, resolution)
    selection = Selection(area, flight=flight)

    def write(folder: Path) -> Path:
        report = restore(
            site.options.archive,
            selection,
            folder,
            mosaic=True,
            resolution=resolution,
            precision=site.options.precision,
            device=site.options.device,
        )
        if not report.files:
            raise ArchiveError(report.failed[0]["error"] if report.failed else "nothing is there")
        return folder / MOSAIC_NAME

    versions = " ".join(now.version(n) for n in numbers)
    tag = f"mosaic {versions} {area} {resolution}"
    return Written(tag, MEDIA_TYPES["tif"], write, True, MOSAIC_NAME)


def _check_size(now: Snapshot, numbers: list[int], area: Bbox, resolution: float | None) -> None:
    """Refuse a mosaic of too many pixels."""
    bounds = now.bounds[numbers]
    west, south, east, north = area
    if west < east:  # what of the box there are images in
        west, east = max(west, np.nanmin(bounds[:, 0])), min(east, np.nanmax(bounds[:, 2]))
    south, north = max(south, np.nanmin(bounds[:, 1])), min(north, np.nanmax(bounds[:, 3]))
    pitches = now.pitches[numbers]
    finest = np.nanmin(pitches) if np.isfinite(pitches).any() else math.inf
    pixel = resolution or finest
    cosine = math.cos(math.radians((south + north) / 2))
    across, down = ((east - west) % 360) * DEGREE * cosine, (north - south) * DEGREE
    pixels = max(0.0, across / pixel) * max(0.0, down / pixel)
    if pixels > MOST_PIXELS:
        least = math.sqrt(across * down / MOST_PIXELS)
        raise UsageError(
            f"{pixels / 1e6:.0f} megapixels are more than the {MOST_PIXELS / 1e6:.0f} of one "
            f"download: take a smaller box, or resolution={math.ceil(least * 100) / 100:g}"
        )


class _Sink:
    """What a zip file is written to while it is sent."""

    def __init__(self) -> None:
        self._held = bytearray()

    def write(self, data: bytes) -> int:
        self._held += data
        return len(data)

    def flush(self) -> None:
        pass

    def take(self) -> bytes:
        """What was written since."""
        taken, self._held = bytes(self._held), bytearray()
        return taken


async def zipped(site: Site, request: Request, entries: list[ImageEntry]) -> AsyncIterator[bytes]:
    """A zip file of whole frames as JPEGs with their metadata, piece by piece.

    What JPEG cannot hold comes as GeoTIFF. Images that are damaged are named in `FAILED`.
    """
    sink, failed = _Sink(), []
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as file:  # type: ignore[call-overload]
        for entry in entries:
            try:
                path, done = await _patiently(site, request, partial(_frame, site, entry))
            except Gone:
                return
            except ArchivePipelineError as error:
                failed.append(f"{entry.flight}/{entry.id}: {error}")
                continue
            try:
                member = "/".join(path.parts[len(Path(site.temporary.name).parts) + 1 :])
                with file.open(member, "w", force_zip64=True) as into, path.open("rb") as data:
                    while piece := data.read(PIECE):
                        into.write(piece)
                        yield sink.take()
            finally:
                done()
        if failed:
            file.writestr(FAILED, "\n".join(failed).encode("utf-8", "replace"))
    yield sink.take()


async def _patiently(
    site: Site, request: Request, write: Callable[[Path], Path]
) -> tuple[Path, Callable[[], None]]:
    """A file of a zip, after others' where there are too many."""
    while True:
        try:
            return await site.write(request, write, large=True)
        except NoRoom:
            raise
        except Unavailable as busy:
            await asyncio.sleep(busy.seconds)


def _frame(site: Site, entry: ImageEntry, folder: Path) -> Path:
    """A whole image as a JPEG, or as a GeoTIFF where it is no JPEG's."""
    window = 0, 0, entry.record["width"], entry.record["height"]

    def written(suffix: str, format: str) -> Path:
        path = output_path(folder, entry.flight, entry.id, window, True, suffix)
        how = format, site.decoding(0)
        restore_image(RestoreTask(site.options.archive, entry, window, path, {}, *how))
        return path

    try:
        return written(".jpg", "jpeg")
    except OutputError:
        return written(".tif", "gtiff")
