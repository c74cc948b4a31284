"""JPEG frames that are archived as the files that they are, byte for byte."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from os.path import splitext
from pathlib import Path

from archive_pipeline.codec.jpeg_codec import MAX_BYTES, MAX_PIXEL_BYTES, pixels_of
from archive_pipeline.codec.transcoding import TranscodingError, recompress
from archive_pipeline.flight.jpeg_segments import PICTURES_LEFT_OUT, Segment, blank_thumbnail
from archive_pipeline.flight.source_image import (
    EXIF_PREFIX,
    XMP_PREFIX,
    SourceError,
    SourceImage,
)
from archive_pipeline.flight.xmp import EXTENDED_PREFIX
from archive_pipeline.stages import stage
from archive_pipeline.store.image_writer import ImageWriter
from archive_pipeline.store.layout import pack_metadata

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")
# What restored GeoTIFFs and PNGs are given of a JPEG's segments; the others are in the file.
_DESCRIPTIVE = {
    "APP1": (EXIF_PREFIX, XMP_PREFIX, EXTENDED_PREFIX),
    "APP2": (b"ICC_PROFILE\0",),
    "APP13": (b"Photoshop 3.0\0",),
}


def is_named_jpeg(name: str) -> bool:
    """Whether a file's name says that it is a JPEG."""
    return splitext(name)[1].lower() in SUFFIXES


def why_not(source: SourceImage) -> str | None:
    """Why an image cannot be kept as its file; None where it can."""
    if source.driver != "JPEG":
        return "it is no JPEG"
    if source.dtype != "uint8" or source.bands not in (1, 3):
        return f"a JPEG of {source.bands} bands of {source.dtype}"
    pixel_bytes = math.prod((source.width, source.height, source.bands))
    if source.size_bytes > MAX_BYTES or pixel_bytes > MAX_PIXEL_BYTES:
        return f"larger than {MAX_BYTES >> 20} MiB, or than {MAX_PIXEL_BYTES >> 20} MiB of pixels"
    return None


def slim(source: SourceImage) -> SourceImage:
    """The record of an image that is kept as its file, without what is in that only."""
    return replace(
        source,
        metadata=tuple(segment for segment in source.metadata if _is_descriptive(segment)),
        warnings=tuple(w for w in source.warnings if not w.endswith(PICTURES_LEFT_OUT)),
    )


def without_previews(source: SourceImage) -> SourceImage:
    """The record of an image with its EXIF thumbnail blank, which restoring makes again."""
    return replace(source, metadata=tuple(_without_preview(*block) for block in source.metadata))


def _without_preview(name: str, payload: bytes) -> Segment:
    return name, blank_thumbnail(payload)[0] if name == "APP1" else payload


def _is_descriptive(segment: Segment) -> bool:
    name, payload = segment
    return payload.startswith(_DESCRIPTIVE.get(name, ()))


def bytes_as_file(source: SourceImage) -> int:
    """Bytes that an image takes as its file, at most, beside its record, mask and detections."""
    return source.size_bytes + len(pack_metadata(slim(source)))


def write_file(writer: ImageWriter, source: SourceImage, recompressed: bool) -> str | None:
    """Store a JPEG file as the pixels.

    Args:
        source: as it was read, with the path that it is at.
        recompressed: as JPEG XL, where libjxl takes the file and that is smaller.

    Returns:
        Why it is not recompressed, though it should be.

    Raises:
        SourceError: the file is damaged, or has changed.
    """
    try:
        data = Path(source.path).read_bytes()
    except OSError as error:
        raise SourceError(source.path, error.strerror or str(error)) from error
    if hashlib.sha256(data).hexdigest() != source.sha256:
        raise SourceError(source.path, "has changed since it was listed")
    shape = source.height, source.width, source.bands
    try:
        with stage("read"):
            pixels_of(data, shape, source.salvaged)  # what readers will do
    except ValueError as error:
        raise SourceError(source.path, str(error)) from error
    stream, reason = data, None
    if recompressed:
        try:
            with stage("encode"):
                stream = recompress(data, source.width * source.height)
        except TranscodingError as error:
            reason = f"kept as it is, since JPEG XL does not take it: {error}"
    writer.write_file(min(stream, data, key=len))
    return reason
