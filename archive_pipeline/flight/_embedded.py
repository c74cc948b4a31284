"""What a file holds beside the picture that GDAL reads: metadata that are kept, and what is not."""

from __future__ import annotations

from pathlib import Path

import rasterio
from PIL import Image

from archive_pipeline.flight._metadata_blocks import (
    Block,
    jp2_blocks,
    png_blocks,
    tiff_blocks,
    webp_blocks,
)
from archive_pipeline.flight.classes import class_blocks
from archive_pipeline.flight.decoded import DECODERS
from archive_pipeline.flight.jpeg_segments import PICTURES_LEFT_OUT, walk
from archive_pipeline.flight.source_image import TIFF_DRIVERS, Notes, SourceError
from archive_pipeline.flight.tiff_directory import count_pages, left_out


def embedded(
    path: Path, dataset: rasterio.DatasetReader, salvage: bool, notes: Notes
) -> list[Block]:
    """The original metadata blocks of a file, and the classes that a sidecar names.

    Args:
        dataset: it, opened.
        salvage: what is damaged is passed over.
        notes: are told of what is left out.

    Raises:
        SourceError: it is damaged, or holds several images of their own.
    """
    if dataset.driver == "JPEG":
        return _jpeg(path, salvage, notes)
    return [*_own(path, dataset, notes), *class_blocks(path, notes)]


def _own(path: Path, dataset: rasterio.DatasetReader, notes: Notes) -> list[Block]:
    driver = dataset.driver
    if driver in DECODERS:
        notes.leave_out(*dataset.notes)
        return list(dataset.blocks)
    if driver in TIFF_DRIVERS:
        return _tiff(path, notes)
    if driver in ("PNG", "WEBP", "GIF"):
        notes.leave_out(*_animation(path))
    if driver == "NITF" and len(dataset.subdatasets) > 1:
        notes.leave_out(_further(len(dataset.subdatasets) - 1))
    if driver == "PNG":
        try:
            blocks, behind = png_blocks(path)
        except ValueError as error:
            raise SourceError(path, str(error)) from error
        if behind:
            notes.leave_out(f"{behind} bytes behind its end are not archived")
        return blocks
    if driver == "WEBP":
        return webp_blocks(path)
    return jp2_blocks(path) if driver == "JP2OpenJPEG" else []


def _jpeg(path: Path, salvage: bool, notes: Notes) -> list[Block]:
    data = path.read_bytes()
    try:
        layout = walk(data, salvage)
    except ValueError as error:
        raise SourceError(path, str(error)) from error
    if layout.end is None and not salvage:
        raise SourceError(path, "truncated: the JPEG ends inside its image data")
    trailers = layout.trailers(data)
    end = len(data) if layout.end is None else layout.end
    left = len(data) - end - sum(len(payload) for _, payload in trailers)
    if left:
        told = f"{left} {PICTURES_LEFT_OUT}"
        if layout.previews:  # which can be made again
            notes.append(told)
        else:
            notes.leave_out(told)
    return [*layout.segments, *trailers]


def _tiff(path: Path, notes: Notes) -> list[Block]:
    with open(path, "rb") as file:
        pages = count_pages(file)
        if pages > 1:
            reason = f"a TIFF of {pages} pages, which are images of their own: split it (tiffsplit)"
            raise SourceError(path, reason)
        notes.leave_out(*left_out(file))
    return tiff_blocks(path)


def _animation(path: Path) -> list[str]:
    """A word on the pictures of an animation that are not read."""
    try:
        with Image.open(path) as image:
            pictures = getattr(image, "n_frames", 1)
    except Exception:  # of what Pillow cannot read, GDAL says what it is
        return []
    return [_further(pictures - 1)] if pictures > 1 else []


def _further(pictures: int) -> str:
    return f"{pictures} further picture{'s are' if pictures > 1 else ' is'} not archived"
