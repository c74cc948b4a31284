"""The tags of a TIFF directory that are not about how its pixels are stored, to keep and to write.

What cameras write into a TIFF's own directory (black levels, opcodes, serial numbers) and into its
EXIF and GPS directories is what radiometry and photogrammetry need. It is kept as an EXIF block,
which is a TIFF without pixels, each value byte for byte.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import BinaryIO

from archive_pipeline.flight.tiff_directory import (
    SUBDIRECTORIES,
    TYPE_BYTES,
    Directory,
    first_directory,
    kept_value,
    read_directory,
    swapped,
)

# Whole documents of their own, kept as blocks by these names.
DOCUMENTS = {700: "XMP", 33723: "IPTC", 34377: "PHOTOSHOP", 34675: "ICC"}
# How pixels are stored (TIFF 6.0, TechNote 2 and libtiff's own), and directories of other pixels.
_STORAGE = {
    *range(254, 260), 262, *range(263, 267), 273, *range(277, 280), 284, *range(288, 294), 317,
    *range(320, 326), *range(326, 331), 338, 339, 347, *range(512, 522), *range(529, 533), 34016,
    *range(34664, 34665), 50674,
}  # fmt: skip
# What GDAL reads and writes itself: georeference, its metadata, nodata, RPCs.
_GDALS = {33550, 33920, 33922, 34264, 34735, 34736, 34737, 42112, 42113, 50844, 50909}
MAKER_NOTE = 37500
MOST_GAP = 1 << 14  # bytes left empty for a maker's note to lie where it lay
_DEPTH = 3  # EXIF's directory leads to that of interoperability, and nothing further


@dataclass(frozen=True)
class Tag:
    """One tag with its values as they are in a file, or with the directory that it leads to.

    Attributes:
        place: where a maker's note was: many count from the file's start what lies in them.
    """

    number: int
    kind: int
    count: int
    value: bytes
    inside: tuple[Tag, ...] | None = None
    place: int = 0


def exif_block(file: BinaryIO) -> bytes:
    """What a TIFF's first directory says beside pixels and georeference, as an EXIF block.

    Args:
        file: the TIFF, classic or big.

    Returns:
        A classic TIFF structure without pixels in the file's byte order, values byte for byte;
        empty where there is nothing to keep. Damaged entries are left out.
    """
    directory = first_directory(file)
    if directory is None:
        return b""
    size = file.seek(0, io.SEEK_END)
    tags = _tags(file, directory, size, _DEPTH)
    kept = [t for t in tags if t.number not in _STORAGE | _GDALS | DOCUMENTS.keys()]
    return pack(kept, directory.order) if kept else b""


def read_block(exif: bytes) -> tuple[Tag, ...]:
    """The tags of an EXIF block (without its ``Exif`` prefix), values in little-endian order."""
    file = io.BytesIO(exif)
    directory = first_directory(file)
    if directory is None:
        return ()
    tags = _tags(file, directory, len(exif), _DEPTH)
    skipped = _STORAGE | _GDALS | DOCUMENTS.keys()
    kept = tuple(tag for tag in tags if tag.number not in skipped)
    return tuple(_little_endian(tag) for tag in kept) if directory.order == ">" else kept


def pack(tags: Iterable[Tag], order: str) -> bytes:
    """A classic TIFF structure with one directory, and those that it leads to."""
    head = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8)
    return head + pack_directory(tags, order, False, 8)


def pack_directory(
    tags: Iterable[Tag],
    order: str,
    big: bool,
    offset: int,
    following: int = 0,
    placed: Mapping[int, int] = MappingProxyType({}),
) -> bytes:
    """A directory, then its long values and the directories that it leads to.

    A maker's note in one of those lies where it was, unless the directory is there.

    Args:
        tags: in any order; values in ``order``.
        big: as BigTIFF writes it.
        offset: where it will be in the file.
        following: offset of the next directory.
        placed: offsets of tags' values that are in the file already.

    Raises:
        struct.error: it does not fit into a classic TIFF.
    """
    tags = sorted(tags, key=lambda tag: tag.number)
    number, entry, link, room = ("Q", "HHQ", "Q", 8) if big else ("H", "HHI", "I", 4)
    head = struct.calcsize(order + number)
    width = struct.calcsize(order + entry) + room
    tail = offset + head + width * len(tags) + room
    table, values = [struct.pack(order + number, len(tags))], b""
    kept = {}
    for note in (inner for tag in tags for inner in tag.inside or ()):
        fits = len(note.value) > room and 0 <= note.place - tail <= MOST_GAP
        if note.number == MAKER_NOTE and fits:
            values = b"\0" * (note.place - tail) + note.value
            kept = {MAKER_NOTE: note.place}
    for tag in tags:
        at = tail + len(values)
        at += at % 2
        if tag.number in placed:
            value, field = b"", struct.pack(order + link, placed[tag.number])
        elif tag.inside is not None:
            value = pack_directory(tag.inside, order, big, at, placed=kept)
            field = struct.pack(order + link, at)
        else:
            value = b"" if len(tag.value) <= room else _rebased(tag, at)
            field = struct.pack(order + link, at) if value else tag.value.ljust(room, b"\0")
        values += b"\0" * (at - tail - len(values)) + value if value else b""
        table.append(struct.pack(order + entry, tag.number, tag.kind, tag.count) + field)
    return b"".join([*table, struct.pack(order + link, following), values])


def _rebased(tag: Tag, at: int) -> bytes:
    """A tag's values, to lie at an offset.

    In a maker's note that is a directory whose values lie behind it, counted from the file's start,
    they are counted anew.
    """
    for order in "<>" if tag.number == MAKER_NOTE and tag.place else "":
        data = bytearray(tag.value)
        table = 2 + 12 * struct.unpack_from(order + "H", data)[0]
        if not 2 < table <= len(data):
            continue
        for field in range(2, table, 12):
            kind, count, offset = struct.unpack_from(order + "HII", data, field + 2)
            size = TYPE_BYTES.get(kind, 0) * count
            last = tag.place + len(data) - size
            inside = tag.place + table <= offset <= last
            if kind not in TYPE_BYTES or (size > 4 and not inside):
                break
            if size > 4:
                struct.pack_into(order + "I", data, field + 8, offset + at - tag.place)
        else:
            return bytes(data)
    return tag.value


def _tags(file: BinaryIO, directory: Directory, room: int, depth: int) -> list[Tag]:
    """The tags of a directory, as long as all together take no more bytes than the file."""
    found: dict[int, Tag] = {}
    for entry in directory.entries:
        value = kept_value(file, entry)
        if value is None or entry.tag in found or entry.size > room:
            continue
        room -= entry.size
        if entry.tag not in SUBDIRECTORIES:
            place = entry.offset if entry.tag == MAKER_NOTE else 0
            found[entry.tag] = Tag(entry.tag, entry.kind, entry.count, value, place=place)
            continue
        place = directory.number(file, entry.tag)
        if depth > 1 and place:
            try:
                inner = read_directory(file, directory.order, directory.big, place)
            except ValueError:
                continue
            inside = tuple(_tags(file, inner, room, depth - 1))
            room -= sum(len(tag.value) for tag in inside)
            if inside:
                found[entry.tag] = Tag(entry.tag, 4, 1, b"", inside)
    return list(found.values())


def _little_endian(tag: Tag) -> Tag:
    if tag.inside is not None:
        return replace(tag, inside=tuple(_little_endian(inner) for inner in tag.inside))
    return replace(tag, value=swapped(tag.value, tag.kind))
