"""Metadata blocks inside TIFF, PNG, WebP and JPEG 2000 files, byte for byte."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from archive_pipeline.flight.tiff_directory import first_directory, kept_value
from archive_pipeline.flight.tiff_tags import DOCUMENTS, exif_block

Block = tuple[str, bytes]

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RIFF = {b"EXIF": "EXIF", b"XMP ": "XMP", b"ICCP": "ICC"}
# UUIDs of boxes: the first as written by Kakadu and others, the second Adobe's.
_UUIDS = {
    b"JpgTiffExif->JP2": "EXIF",
    bytes.fromhex("be7acfcb97a942e89c71999491e3afac"): "XMP",
}
_MOST = 64 << 20  # bytes of a block
_MOST_PARTS = 4096
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


def png_blocks(path: Path) -> tuple[list[Block], int]:
    """Read every chunk of a PNG that is not pixels, named by its type, in file order.

    Also how many bytes follow the PNG's end.

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
        return blocks, length - file.tell()


def webp_blocks(path: Path) -> list[Block]:
    """Read EXIF, XMP and the colour profile of a WebP; what is damaged is left out."""
    blocks: list[Block] = []
    with open(path, "rb") as file:
        file.seek(12)
        for _ in range(_MOST_PARTS):
            head = file.read(8)
            if len(head) < 8:
                break
            size = int.from_bytes(head[4:], "little")
            name = _RIFF.get(head[:4])
            if name is None or size > _MOST:
                file.seek(size + size % 2, 1)
                continue
            payload = file.read(size + size % 2)[:size]
            if len(payload) == size:
                blocks.append((name, payload))
    return blocks


def jp2_blocks(path: Path) -> list[Block]:
    """Read EXIF, XMP and the colour profile of a JPEG 2000 file; what is damaged is left out."""
    with open(path, "rb") as file:
        return list(_boxes(file, path.stat().st_size))


def _boxes(file: BinaryIO, end: int, inner: bool = False) -> Iterator[Block]:
    """Blocks in the boxes from where a file is read to an offset."""
    for _ in range(_MOST_PARTS):
        if file.tell() + 8 > end:
            return
        start = file.tell()
        size, kind = int.from_bytes(file.read(4), "big"), file.read(4)
        if size == 1:
            size = int.from_bytes(file.read(8), "big")
        stop = start + size if size else end
        if not file.tell() <= stop <= end:
            return
        if kind == b"jp2h" and not inner:
            yield from _boxes(file, stop, inner=True)
        elif kind in (b"uuid", b"colr") and stop - file.tell() <= _MOST:
            payload = file.read(stop - file.tell())
            if kind == b"uuid" and payload[:16] in _UUIDS:
                yield _UUIDS[payload[:16]], payload[16:]
            elif kind == b"colr" and payload[:1] in (b"\2", b"\3"):
                yield "ICC", payload[3:]
        file.seek(stop)
