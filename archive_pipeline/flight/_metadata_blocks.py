"""Metadata blocks inside TIFF and PNG files, byte for byte."""

from __future__ import annotations

import zlib
from pathlib import Path

from archive_pipeline.flight.tiff_directory import first_directory, kept_value
from archive_pipeline.flight.tiff_tags import DOCUMENTS, exif_block

Block = tuple[str, bytes]

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Pixels and what GDAL decodes with them.
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}


def tiff_blocks(path: Path) -> list[Block]:
    """Read what a TIFF's first directory holds beside pixels and georeference.

    Args:
        path: the file, classic or BigTIFF.

    Returns:
        ``("XMP" | "IPTC" | "PHOTOSHOP" | "ICC", raw bytes)`` in tag order, then ``("EXIF", ...)``,
        see `tiff_tags.exif_block`, where there is anything for it.  Damaged entries are left out.
    """
    blocks: list[Block] = []
    with open(path, "rb") as file:
        directory = first_directory(file)
        if directory is None:
            return blocks
        for entry in directory.entries:
            payload = kept_value(file, entry) if entry.tag in DOCUMENTS else None
            if payload is not None:
                blocks.append((DOCUMENTS[entry.tag], payload))
        exif = exif_block(file)
    return [*blocks, ("EXIF", exif)] if exif else blocks


def png_blocks(path: Path) -> list[Block]:
    """Read every chunk of a PNG that is not pixels, named by its type, in file order.

    The checksums of all chunks are verified, those of the pixels too: GDAL takes what is missing
    at the end of a PNG for black.

    Raises:
        ValueError: the file is no PNG, is cut off, or a checksum does not match.
    """
    blocks: list[Block] = []
    length = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(8) != _PNG_SIGNATURE:
            raise ValueError("not a PNG: it does not start with the PNG signature")
        kind = b""
        while kind != b"IEND":
            head = file.read(8)
            size = int.from_bytes(head[:4], "big")
            if len(head) < 8 or file.tell() + size + 4 > length:
                raise ValueError("truncated: the PNG ends before its end chunk")
            kind, payload, checksum = head[4:], file.read(size), file.read(4)
            if zlib.crc32(kind + payload) != int.from_bytes(checksum, "big"):
                raise ValueError(
                    f"damaged PNG: chunk {kind.decode('latin-1')!r} has a bad checksum"
                )
            if kind not in _PNG_PIXELS:
                blocks.append((kind.decode("latin-1"), payload))
    return blocks
