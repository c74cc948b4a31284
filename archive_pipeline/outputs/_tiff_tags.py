"""Tags that GDAL has no place for, put into a Cloud Optimized GeoTIFF that it wrote.

EXIF and GPS directories, a camera's private tags and documents byte for byte. The file stays cloud
optimized: its first directory is written anew where it must be, before all others, and everything
behind moves by the bytes that this takes.
"""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from archive_pipeline.flight.tiff_directory import (
    Directory,
    Entry,
    kept_value,
    read_directory,
    read_header,
)
from archive_pipeline.flight.tiff_tags import Tag, pack_directory

PHOTOMETRIC, COLOURS = 262, 320
_GREY = (b"\1", b"\3")  # black is zero; of one bit, GDAL writes a palette of black and white
_PIXEL_OFFSETS = (273, 324)  # of strips, of tiles
_OFFSET_CODES = {4: "I", 16: "Q"}
_ALIGNED = 16
# What GDAL's COG driver writes behind the header; the first directory must follow it.
_LAYOUT = re.compile(rb"GDAL_STRUCTURAL_METADATA_SIZE=(\d{6}) bytes\n")


def insert_tags(plain: Path, final: Path, tags: Iterable[Tag], white_is_zero: bool) -> None:
    """Copy a little-endian TIFF and give its first directory more tags.

    Args:
        plain: the file as GDAL wrote it.
        final: the copy.
        tags: in little-endian order; they replace those of the same number.
        white_is_zero: pixels are said to be so in every directory that says the opposite.

    Raises:
        ValueError: the file is not what GDAL's COG driver writes.
        OSError: it cannot be read or written.
    """
    with open(plain, "rb") as source, open(final, "w+b") as target:
        header = read_header(source)
        if header is None or header[0] != "<":
            raise ValueError("not a little-endian TIFF")
        _, big, offset = header
        directories = []
        while offset:
            directories.append((offset, read_directory(source, "<", big, offset)))
            offset = directories[-1][1].following
        start = _first_place(source, big)
        shift = 0
        new = b""
        while shift < len(new) or not new:  # offsets are as long whatever the shift is
            shift = -(-len(new) // _ALIGNED) * _ALIGNED
            new = _first(source, directories, start, shift, big, tags, white_is_zero)
        _copy(source, target, start, new.ljust(shift, b"\0"), big)
        # The old first directory is no longer read, but its long values are.
        for offset, directory in directories:
            _move(source, target, offset, directory, shift, white_is_zero)


def _first_place(source: BinaryIO, big: bool) -> int:
    """Where the first directory goes: behind the header and what GDAL says of the layout."""
    header = 16 if big else 8
    source.seek(header)
    layout = _LAYOUT.match(source.read(64))
    end = header + (layout.end() + int(layout[1]) if layout else 0)
    return end + end % 2


def _first(
    source: BinaryIO,
    directories: list[tuple[int, Directory]],
    start: int,
    shift: int,
    big: bool,
    tags: Iterable[Tag],
    white_is_zero: bool,
) -> bytes:
    """The new first directory with all that belongs to it."""
    directory = directories[0][1]
    kept, placed = {}, {}
    for entry in directory.entries:
        value = b""
        if entry.size > (8 if big else 4):  # long values stay where they are
            placed[entry.tag] = entry.offset + shift
        else:
            value = _value(source, entry)
            if entry.tag in _PIXEL_OFFSETS:
                value = _moved(value, entry.kind, shift)
        kept[entry.tag] = Tag(entry.tag, entry.kind, entry.count, value)
    for tag in tags:
        kept[tag.number] = tag
        placed.pop(tag.number, None)
    if white_is_zero and kept[PHOTOMETRIC].value[:1] in _GREY:
        kept[PHOTOMETRIC] = Tag(PHOTOMETRIC, 3, 1, b"\0\0")
        kept.pop(COLOURS, None)
    following = directories[1][0] + shift if len(directories) > 1 else 0
    return pack_directory(kept.values(), "<", big, start, following, placed)


def _copy(source: BinaryIO, target: BinaryIO, start: int, new: bytes, big: bool) -> None:
    source.seek(0)
    target.write(source.read(start).ljust(start, b"\0"))
    target.write(new)
    shutil.copyfileobj(source, target, 1 << 20)
    target.seek(8 if big else 4)
    target.write(struct.pack("<Q" if big else "<I", start))


def _move(
    source: BinaryIO,
    target: BinaryIO,
    offset: int,
    directory: Directory,
    shift: int,
    white_is_zero: bool,
) -> None:
    """Correct what a directory's copy says of places in the file."""
    number, head, room, link = (8, 4, 8, "<Q") if directory.big else (2, 4, 4, "<I")
    head += room
    width = head + room
    for index, entry in enumerate(directory.entries):
        field = offset + shift + number + index * width + head
        inline = entry.size <= room
        if not inline:
            target.seek(field)
            target.write(struct.pack(link, entry.offset + shift))
        if entry.tag in _PIXEL_OFFSETS:
            target.seek(field if inline else entry.offset + shift)
            target.write(_moved(_value(source, entry), entry.kind, shift))
        elif entry.tag == PHOTOMETRIC and white_is_zero and _value(source, entry)[:1] in _GREY:
            target.seek(field)
            target.write(b"\0\0")
    if directory.following:
        target.seek(offset + shift + number + len(directory.entries) * width)
        target.write(struct.pack(link, directory.following + shift))


def _value(source: BinaryIO, entry: Entry) -> bytes:
    value = kept_value(source, entry)
    if value is None:
        raise ValueError(f"tag {entry.tag} leaves the file")
    return value


def _moved(value: bytes, kind: int, shift: int) -> bytes:
    """Offsets of pixels, moved; 0 is a block that is not stored."""
    code = _OFFSET_CODES[kind]
    count = len(value) // struct.calcsize("<" + code)
    offsets = struct.unpack(f"<{count}{code}", value)
    return struct.pack(f"<{count}{code}", *(at + shift if at else 0 for at in offsets))
