"""Metadata blocks inside TIFF and PNG files, byte for byte."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from PIL import Image

Block = tuple[str, bytes]

# TIFF tags whose values are whole documents of their own.
TIFF_BLOCKS = {700: "XMP", 33723: "IPTC", 34377: "PHOTOSHOP", 34675: "ICC"}
# A damaged count must not become a huge allocation.
MAX_BLOCK = 64 << 20
MAX_ENTRIES = 65536

_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
# Descriptive tags of the main IFD that belong to the camera, not to the raster's storage.
_CAMERA_TAGS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
_TYPE_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Pixels and what GDAL decodes with them.
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}


def tiff_blocks(path: Path) -> list[Block]:
    """Read the document tags of a TIFF's first directory, classic or BigTIFF.

    Args:
        path: the file.

    Returns:
        ``("XMP" | "IPTC" | "PHOTOSHOP" | "ICC", raw bytes)`` in tag order, then ``("EXIF", ...)``,
        an EXIF block built from the EXIF and GPS directories, where there are any.  Damaged
        entries are left out.
    """
    blocks: list[Block] = []
    with open(path, "rb") as file:
        try:
            entries = tiff_entries(file)
            for tag, offset, size in entries:
                if tag in TIFF_BLOCKS and size <= MAX_BLOCK:
                    _seek(file, offset)
                    payload = file.read(size)
                    if len(payload) == size:
                        blocks.append((TIFF_BLOCKS[tag], payload))
        except (struct.error, ValueError, OverflowError):
            return blocks
        if {tag for tag, _, _ in entries} & {_EXIF_IFD, _GPS_IFD}:
            exif = _tiff_exif(file)
            if exif:
                blocks.append(("EXIF", exif))
    return blocks


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


def tiff_entries(file: BinaryIO) -> list[tuple[int, int, int]]:
    """Return (tag, value offset, value bytes) of the first directory."""
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None:
        return []
    big = struct.unpack_from(order + "H", head, 2)[0] == 43
    _seek(file, struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)[0])
    count_format, entry_format = ("Q", "HHQ8s") if big else ("H", "HHI4s")
    width = struct.calcsize(order + entry_format)
    count = struct.unpack(order + count_format, file.read(struct.calcsize(order + count_format)))[0]
    if count > MAX_ENTRIES:
        return []
    start = file.tell()
    table = file.read(count * width)
    entries = []
    for index in range(count):
        tag, kind, items, value = struct.unpack_from(order + entry_format, table, index * width)
        size = items * _TYPE_BYTES.get(kind, 1)
        if size <= len(value):
            offset = start + index * width + width - len(value)
        else:
            offset = struct.unpack(order + ("Q" if big else "I"), value)[0]
        entries.append((tag, offset, size))
    return entries


def _seek(file: BinaryIO, offset: int) -> None:
    """Go to an offset that a file names; ValueError where no file of this system has one."""
    try:
        file.seek(offset)
    except OSError as error:
        raise ValueError(f"no offset of a file: {offset}") from error


def _tiff_exif(file: BinaryIO) -> bytes:
    # Pillow raises many types on broken directories, all of which mean: no EXIF.
    try:
        file.seek(0)
        source, exif = Image.Exif(), Image.Exif()
        source.load_from_fp(file)
        for tag in _CAMERA_TAGS:
            if tag in source:
                exif[tag] = source[tag]
        for ifd in (_EXIF_IFD, _GPS_IFD):
            values = source.get_ifd(ifd)
            if values:
                exif.get_ifd(ifd).update(values)
        return exif.tobytes()
    except Exception:
        return b""
