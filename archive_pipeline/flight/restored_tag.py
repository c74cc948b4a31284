"""The mark on files that `restore` writes, so that none of them is archived as an original.

Behind the mark's fixed text stands what made the pixels, so that detail which a denoiser generated
is never taken for measured. The mark lies where most copies keep it (not those of PNGs by GDAL and
Pillow) and where nothing of the original's is touched:

- JPEG: a COM segment, behind the original's segments;
- PNG: a tEXt chunk with the mark as its keyword;
- TIFF: an item of GDAL's metadata (tag 42112), which `gdal_translate` hands on.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import BinaryIO

from archive_pipeline.flight.jpeg_segments import NO_LENGTH
from archive_pipeline.flight.tiff_directory import first_directory

MARK = b"archive_pipeline restored"
TIFF_ITEM = "ARCHIVE_PIPELINE"

_GDAL_METADATA = 42112
_TIFF_MARK = re.compile(rb'<Item name="%b"[^<>]*>%b' % (TIFF_ITEM.encode(), MARK))
# The mark comes first among GDAL's items; what other tools put before it is short.
_MOST_METADATA = 1 << 20
# An ICC profile of 16 MB and an extended XMP packet take some 500 segments.
_MOST_PARTS = 4096


def mark(decoder: str) -> str:
    """A file's mark, ASCII.

    Args:
        decoder: what made the pixels, `Raster.decoder`.
    """
    return f"{MARK.decode()}; pixels: {decoder}"


def png_chunk(decoder: str) -> tuple[bytes, bytes]:
    """The chunk of a PNG that has its mark: keyword, and what made the pixels."""
    text = f"decoded from an archive, not an original; pixels: {decoder}"
    return b"tEXt", MARK + b"\0" + text.encode("ascii")


def is_restored(path: Path) -> bool:
    """Whether a file was written by `restore`, a mosaic included.

    Looks at the file's headers only, never at its pixels, and reads about a megabyte at most.

    Args:
        path: any file, whole or damaged; its name does not matter.

    Returns:
        False also where the file cannot be read.
    """
    try:
        # Opening a named pipe would wait for somebody to write to it.
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            start = file.read(8)
            file.seek(0)
            if start[:2] == b"\xff\xd8":
                return _in_jpeg(file)
            if start == b"\x89PNG\r\n\x1a\n":
                return _in_png(file)
            return start[:2] in (b"II", b"MM") and _in_tiff(file)
    except (OSError, ValueError, OverflowError, struct.error):
        return False


def _in_jpeg(file: BinaryIO) -> bool:
    position = 2
    for _ in range(_MOST_PARTS):
        file.seek(position)
        marker, code, length = struct.unpack(">BBH", file.read(4))
        if marker != 0xFF or code in (0xD9, 0xDA):
            return False
        if code == 0xFF:  # fills up
            position += 1
        elif code in NO_LENGTH:
            position += 2
        elif code == 0xFE and length >= 2 + len(MARK) and file.read(len(MARK)) == MARK:
            return True
        else:
            position += 2 + length
    return False


def _in_png(file: BinaryIO) -> bool:
    position = 8
    for _ in range(_MOST_PARTS):
        file.seek(position)
        size, kind = struct.unpack(">I4s", file.read(8))
        if kind == b"tEXt" and file.read(min(size, len(MARK) + 1)) == MARK + b"\0":
            return True
        if kind in (b"IDAT", b"IEND"):
            return False
        position += 12 + size
    return False


def _in_tiff(file: BinaryIO) -> bool:
    directory = first_directory(file)
    metadata = None if directory is None else directory.find(_GDAL_METADATA)
    if metadata is None:
        return False
    file.seek(metadata.offset)
    return _TIFF_MARK.search(file.read(min(metadata.size, _MOST_METADATA))) is not None
