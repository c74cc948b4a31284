"""The directories of a TIFF: what a file says of itself, without its pixels.

Classic TIFF and BigTIFF, both byte orders (TIFF 6.0; BigTIFF as libtiff has it). Nothing that a
damaged file claims leads to a read outside it or to a loop.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

EXIF_IFD, GPS_IFD, INTEROP_IFD = 0x8769, 0x8825, 0xA005
# Where a directory leads to others that are kept with it.
SUBDIRECTORIES = frozenset((EXIF_IFD, GPS_IFD, INTEROP_IFD))
# Bytes of a value by its type; 13, 16 to 18 are BigTIFF's and those of offsets.
TYPE_BYTES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
    16: 8, 17: 8, 18: 8,
}  # fmt: skip
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_UNITS = {5: 4, 10: 4}  # of what byte order swaps, where that is not the whole value
MAX_ENTRIES = 65536  # of a directory
MAX_VALUE = 64 << 20  # bytes; a damaged count must not become a huge allocation
MAX_DIRECTORIES = 65536  # of a file
MAX_SUBDIRECTORIES = 64  # that are looked into

WIDTH, HEIGHT, BITS, COMPRESSION, SAMPLES, PLANAR = 256, 257, 258, 259, 277, 284
SUBFILE, OLD_SUBFILE, SUBDIRECTORY = 254, 255, 330
STRIP_COUNTS, TILE_COUNTS = 279, 325
_REDUCED, _MASK = 1, 4  # bits of SUBFILE
_THUMBNAIL = 256  # pixels a side, at most, of a page that says nothing of itself

MANY_BANDS = 256
"""Up to so many bands nobody is kept waiting by them."""
# zstd, the tightest of TIFF's codecs, takes 4 bytes for a block of 128 KiB.
MOST_COMPRESSED = 1 << 16


@dataclass(frozen=True)
class Entry:
    """One tag of a directory: its TIFF type, number of values, and where these lie in the file."""

    tag: int
    kind: int
    count: int
    offset: int
    size: int


@dataclass(frozen=True)
class Directory:
    """One directory of a TIFF.

    Attributes:
        order: ``"<"`` or ``">"``.
        big: whether it is a BigTIFF's.
        entries: in the file's order; damaged ones, too.
        following: offset of the next one; 0 is none.
    """

    order: str
    big: bool
    entries: tuple[Entry, ...] = field(default=())
    following: int = 0

    def find(self, tag: int) -> Entry | None:
        """The entry of a tag."""
        return next((entry for entry in self.entries if entry.tag == tag), None)

    def number(self, file: BinaryIO, tag: int, absent: int = 0) -> int:
        """The first value of a tag of whole numbers; ``absent`` without one."""
        return next(iter(self.numbers(file, tag, 1)), absent)

    def numbers(self, file: BinaryIO, tag: int, most: int) -> tuple[int, ...]:
        """The first values of a tag of whole numbers; none without one.

        Raises:
            ValueError: they are not in the file.
        """
        entry = self.find(tag)
        code = _INTEGERS.get(entry.kind) if entry is not None else None
        if entry is None or code is None:
            return ()
        form = f"{self.order}{min(entry.count, most)}{code}"
        return struct.unpack(form, _read(file, entry.offset, struct.calcsize(form)))


def read_header(file: BinaryIO) -> tuple[str, bool, int] | None:
    """Byte order, whether it is a BigTIFF, and the first directory's offset; ``None``: no TIFF."""
    file.seek(0)
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 8:
        return None
    big = struct.unpack_from(order + "H", head, 2)[0] == 43
    if big and len(head) < 16:
        return None
    return order, big, struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)[0]


def read_directory(file: BinaryIO, order: str, big: bool, offset: int) -> Directory:
    """Read the directory at an offset.

    Raises:
        ValueError: there is none.
    """
    count_format, entry_format = ("Q", "HHQ8s") if big else ("H", "HHI4s")
    width = struct.calcsize(order + entry_format)
    number = struct.calcsize(order + count_format)
    count = struct.unpack(order + count_format, _read(file, offset, number))[0]
    if count > MAX_ENTRIES:
        raise ValueError(f"a directory of {count} entries")
    table = _read(file, offset + number, count * width)
    entries = []
    for index in range(count):
        tag, kind, items, value = struct.unpack_from(order + entry_format, table, index * width)
        size = items * TYPE_BYTES.get(kind, 1)
        place = offset + number + index * width + width - len(value)
        if size > len(value):
            place = struct.unpack(order + ("Q" if big else "I"), value)[0]
        entries.append(Entry(tag, kind, items, place, size))
    link = "Q" if big else "I"
    file.seek(offset + number + count * width)
    tail = file.read(struct.calcsize(order + link))
    following = struct.unpack(order + link, tail)[0] if len(tail) == (8 if big else 4) else 0
    return Directory(order, big, tuple(entries), following)


def first_directory(file: BinaryIO) -> Directory | None:
    """A TIFF's first directory; ``None`` where there is none that can be read."""
    header = read_header(file)
    if header is None:
        return None
    try:
        return read_directory(file, *header)
    except ValueError:
        return None


def count_pages(file: BinaryIO) -> int:
    """How many pictures of their own a TIFF has: overviews, thumbnails and masks are none.

    A directory that says nothing of itself counts as a thumbnail if it has 256 pixels a side at
    most while the first one has more.
    """
    header = read_header(file)
    if header is None:
        return 0
    order, big, offset = header
    seen: set[int] = set()
    sides: list[int] = []
    while offset and offset not in seen and len(seen) < MAX_DIRECTORIES:
        seen.add(offset)
        try:
            directory = read_directory(file, order, big, offset)
            offset = directory.following
            kind = directory.number(file, SUBFILE)
            old = directory.number(file, OLD_SUBFILE, 1)
            side = max(directory.number(file, tag) for tag in (WIDTH, HEIGHT))
        except ValueError:
            break
        first = len(seen) == 1  # which is what GDAL reads, whatever it says of itself
        if side and (first or (not kind & (_REDUCED | _MASK) and old != 2)):
            sides.append(side)
    return sum(not 0 < side <= _THUMBNAIL or side >= sides[0] for side in sides)


def left_out(file: BinaryIO) -> list[str]:
    """What the first directory leads to that nobody reads, one sentence each."""
    directory = first_directory(file)
    if directory is None:
        return []
    size = file.seek(0, io.SEEK_END)
    sentences = [
        f"its tag {entry.tag} of {entry.size} bytes is not archived"
        for entry in directory.entries
        if MAX_VALUE < entry.size <= size - entry.offset
    ]
    for offset in _subdirectories(file, directory):
        try:
            inner = read_directory(file, directory.order, directory.big, offset)
            kind = inner.number(file, SUBFILE)
            width, height = (inner.number(file, tag) for tag in (WIDTH, HEIGHT))
        except ValueError:
            continue
        if width and height and not kind & (_REDUCED | _MASK):
            sentences.append(f"a picture of {width} x {height} in a SubIFD is not archived")
    return sentences


def _subdirectories(file: BinaryIO, directory: Directory) -> tuple[int, ...]:
    """Offsets of a directory's SubIFDs."""
    try:
        return directory.numbers(file, SUBDIRECTORY, MAX_SUBDIRECTORIES)
    except ValueError:
        return ()


def kept_value(file: BinaryIO, entry: Entry) -> bytes | None:
    """The bytes of an entry's values; ``None`` where they are not in the file, or too many."""
    if not 0 < entry.size <= MAX_VALUE or entry.kind not in TYPE_BYTES:
        return None
    try:
        return _read(file, entry.offset, entry.size)
    except ValueError:
        return None


def swapped(value: bytes, kind: int) -> bytes:
    """The same values in the other byte order."""
    unit = _UNITS.get(kind, TYPE_BYTES[kind])
    if unit == 1:
        return value
    return b"".join(value[at : at + unit][::-1] for at in range(0, len(value), unit))


def check_bands(path: Path) -> None:
    """Refuse a TIFF of so many bands that the file cannot hold them.

    Each band costs GDAL memory and time before anything is read.

    Raises:
        ValueError: one line.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        directory = first_directory(file)
        if directory is None:
            return
        try:
            bands = directory.number(file, SAMPLES, 1)
            if bands <= MANY_BANDS:
                return
            sizes = directory.find(STRIP_COUNTS) or directory.find(TILE_COUNTS)
            separate = directory.number(file, PLANAR, 1) == 2
            blocks = 0 if sizes is None else sizes.count
            bits = bands * max(1, directory.number(file, BITS, 1))
            raw = directory.number(file, WIDTH) * directory.number(file, HEIGHT) * bits // 8
            packed = directory.number(file, COMPRESSION, 1) != 1
        except ValueError:
            return  # GDAL will say what is wrong
        held = path.stat().st_size * (MOST_COMPRESSED if packed else 1)
    if (separate and blocks < bands) or raw > held:
        raise ValueError(f"damaged: it claims {bands} bands, which the file is too small for")


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    """Bytes of a file; ValueError where it does not have them."""
    try:
        file.seek(offset)
        data = file.read(size)
    except (OSError, OverflowError) as error:
        raise ValueError(f"no offset of a file: {offset}") from error
    if len(data) != size:
        raise ValueError(f"{size} bytes at {offset} leave the file")
    return data
