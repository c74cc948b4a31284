"""The segments of a JPEG file that are not pixels: read them, put them back, and the thumbnail.

A segment is ``(name, payload)``: ``"APP0"`` ... ``"APP15"`` or ``"COM"``, and the bytes after the
marker and its length.  ``("TRAILER", bytes)`` is what follows the end of the image.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Segment = tuple[str, bytes]

TRAILER = "TRAILER"
PICTURES_LEFT_OUT = "bytes of further pictures (MPF) are not archived"
MAX_PAYLOAD = 65533
THUMBNAIL_BOX = (160, 120)

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
NO_LENGTH = {0x01, *range(0xD0, 0xD9)}
_FRAME_HEADERS = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_MP_ENTRIES = 0xB002
_MP_THUMBNAIL = 1  # class of an individual image's type
_EXIF, _MPF, _ADOBE, _JFIF = b"Exif\0\0", b"MPF\0", b"Adobe", b"JFIF\0"


@dataclass(frozen=True)
class JpegLayout:
    """What a walk over a JPEG's markers finds.

    Attributes:
        segments: every APPn and COM segment up to the first scan, in file order.
        end: offset behind the end-of-image marker; ``None`` where the file stops before it.
        pictures: (start, end) of further pictures behind the image that its MPF directory names.
        previews: whether that calls all of them thumbnails.
    """

    segments: list[Segment]
    end: int | None
    pictures: tuple[tuple[int, int], ...] = ()
    previews: bool = False

    def trailers(self, data: bytes) -> list[Segment]:
        """What follows the image, but for the pictures that its MPF directory names."""
        start, found = len(data) if self.end is None else self.end, []
        for first, last in (*self.pictures, (len(data), len(data))):
            if start < first:
                found.append((TRAILER, data[start:first]))
            start = max(start, last)
        return found


def read_segments(path: Path) -> list[Segment]:
    """Read every APPn and COM segment in file order, then what follows the image.

    Raises:
        ValueError: the file is no JPEG or its headers are cut off.
        OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    layout = walk(data)
    return [*layout.segments, *layout.trailers(data)]


def segments_of(data: bytes) -> list[Segment]:
    """What `read_segments` finds, in the bytes of a file that may be damaged.

    Raises:
        ValueError: they are no JPEG.
    """
    layout = walk(data, salvage=True)
    return [*layout.segments, *layout.trailers(data)]


def walk(data: bytes, salvage: bool = False) -> JpegLayout:
    """Walk the markers of a whole JPEG file, scans included.

    Args:
        salvage: pass over what is damaged.

    Raises:
        ValueError: the data are no JPEG or end inside the headers, unless that is salvaged.
    """
    segments: list[Segment] = []
    position, scanned = 2, False
    multi_picture: int | None = None
    if data[:2] != bytes([0xFF, _SOI]):
        raise ValueError("not a JPEG: it does not start with the JPEG signature")
    while True:
        if scanned:
            match = _MARKER_IN_SCAN.search(data, position)
            if match is None:
                return JpegLayout(segments, None)
            position = match.start()
        try:
            code, position = _marker(data, position)
        except ValueError:
            if not salvage:
                raise
            position = data.find(b"\xff", position)
            if position < 0 or not data[position:].strip(b"\xff"):
                return JpegLayout(segments, None)
            continue
        if code == _EOI:
            return JpegLayout(segments, position, *_pictures(data, multi_picture, position))
        if code in NO_LENGTH:
            continue
        payload = _payload(data, position)
        if payload is None:
            if scanned or salvage:
                return JpegLayout(segments, None)
            raise ValueError("truncated inside the JPEG headers")
        position += 2 + len(payload)
        name = _segment_name(code)
        if name is not None and not scanned:
            segments.append((name, payload))
            if name == "APP2" and payload.startswith(_MPF):
                multi_picture = position - len(payload) + len(_MPF)
        scanned = scanned or code == _SOS


def write_segments(jpeg: bytes, segments: list[Segment]) -> bytes:
    """Give a freshly encoded JPEG the segments of another file.

    The encoder's own APPn and COM segments go, the stored ones come in their order.  Three kinds
    are not copied blindly: an Adobe APP14 (or a JFIF APP0) that contradicts the new encoding's
    colour transform gives way to the encoder's own, and an MPF directory is dropped because the
    preview frames it points to are gone.

    Args:
        jpeg: the new encoding, a complete JPEG.
        segments: what `read_segments` returned for the original.

    Returns:
        The JPEG with the stored segments; its coded pixels are untouched.

    Raises:
        ValueError: ``jpeg`` is no complete JPEG, or a segment has an unknown name or is too long.
    """
    own: list[Segment] = []
    rest: list[bytes] = []
    components = 0
    position = 2
    end = walk(jpeg).end
    if end is None:
        raise ValueError("truncated: the JPEG ends inside its image data")
    while True:
        start = position
        code, position = _marker(jpeg, position)
        if code in NO_LENGTH:
            continue
        if code == _SOS:
            rest.append(jpeg[start:end])
            break
        payload = _payload(jpeg, position)
        if payload is None:
            raise ValueError("truncated inside the JPEG headers")
        position += 2 + len(payload)
        name = _segment_name(code)
        if name is not None:
            own.append((name, payload))
            continue
        rest.append(jpeg[start:position])
        if code in _FRAME_HEADERS and len(payload) > 5:
            components = payload[5]

    adobe = next((p for n, p in own if n == "APP14" and p.startswith(_ADOBE)), None)
    transform = int(components == 3) if adobe is None else _adobe_transform(adobe)
    kept: list[Segment] = []
    trailer = b""
    for name, payload in segments:
        if name == TRAILER:
            trailer = payload
        elif name == "APP2" and payload.startswith(_MPF):
            continue
        elif name == "APP14" and payload.startswith(_ADOBE):
            if _adobe_transform(payload) == transform:
                kept.append((name, payload))
        elif name == "APP0" and payload.startswith(_JFIF) and components == 3 and not transform:
            continue
        else:
            kept.append((name, payload))
    if adobe is not None and not any(n == "APP14" and p.startswith(_ADOBE) for n, p in kept):
        kept.append(("APP14", adobe))
    head = b"".join(_pack(name, payload) for name, payload in kept)
    return b"".join([jpeg[:2], head, *rest, trailer])


def blank_thumbnail(exif_app1: bytes) -> tuple[bytes, tuple[int, int] | None]:
    """Overwrite the JPEG thumbnail inside an EXIF segment by zeros.

    Every tag, length and offset stays, so the block only compresses better.

    Args:
        exif_app1: the payload of an APP1 segment, ``Exif\\0\\0`` and a TIFF structure.

    Returns:
        The payload and the thumbnail's ``(offset, length)`` in it; the payload as it is and
        ``None`` where there is no (well-formed) thumbnail.
    """
    place = _thumbnail_place(exif_app1)
    if place is None:
        return exif_app1, None
    offset, length = place
    if exif_app1[offset : offset + 2] != bytes([0xFF, _SOI]):
        return exif_app1, None
    return exif_app1[:offset] + bytes(length) + exif_app1[offset + length :], place


def fill_thumbnail(exif_app1: bytes, image: npt.NDArray[np.uint8]) -> bytes:
    """Put a new thumbnail where `blank_thumbnail` left zeros.

    Args:
        exif_app1: the blanked payload.
        image: uint8 (height, width, 3), RGB; shrunk to fit 160 x 120 pixels, the EXIF size.

    Returns:
        The payload, of the same length, with a JPEG of the highest quality that fits followed by
        zeros; unchanged where nothing was blanked or nothing fits.
    """
    place = _thumbnail_place(exif_app1)
    if place is None:
        return exif_app1
    offset, length = place
    if any(exif_app1[offset : offset + length]):
        return exif_app1
    picture = Image.fromarray(image)
    picture.thumbnail(THUMBNAIL_BOX)
    for quality in (90, 80, 70, 60, 50, 40, 30, 20, 10):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        coded = buffer.getvalue()
        if len(coded) <= length:
            padded = coded + bytes(length - len(coded))
            return exif_app1[:offset] + padded + exif_app1[offset + length :]
    return exif_app1


def _pictures(
    data: bytes, header: int | None, end: int
) -> tuple[tuple[tuple[int, int], ...], bool]:
    """Places behind ``end`` that an MPF directory names (CIPA DC-007), in order; see `JpegLayout`.

    Args:
        header: offset of the directory's TIFF header, which its offsets count from.
    """
    nothing = (), False
    if header is None:
        return nothing
    order = {b"II": "<", b"MM": ">"}.get(data[header : header + 2])
    if order is None:
        return nothing
    found = []
    try:
        first = header + struct.unpack_from(order + "I", data, header + 4)[0]
        count = struct.unpack_from(order + "H", data, first)[0]
        for entry in range(first + 2, first + 2 + 12 * count, 12):
            tag, _, size, table = struct.unpack_from(order + "HHII", data, entry)
            if tag != _MP_ENTRIES:
                continue
            for at in range(header + table, header + table + size, 16):
                kind, length, offset = struct.unpack_from(order + "III", data, at)
                place = header + offset, min(len(data), header + offset + length)
                if end <= place[0] < place[1]:
                    found.append((place, kind >> 16 & 0xFF == _MP_THUMBNAIL))
    except struct.error:
        return nothing
    return tuple(sorted(place for place, _ in found)), all(preview for _, preview in found)


def _marker(data: bytes, position: int) -> tuple[int, int]:
    """Return the marker code at ``position``, fill bytes skipped, and the offset behind it."""
    if position >= len(data):
        raise ValueError("truncated inside the JPEG headers")
    if data[position] != 0xFF:
        raise ValueError(f"damaged JPEG: no marker at byte {position}")
    while position < len(data) and data[position] == 0xFF:
        position += 1
    if position >= len(data):
        raise ValueError("truncated inside the JPEG headers")
    return data[position], position + 1


def _payload(data: bytes, position: int) -> bytes | None:
    if position + 2 > len(data):
        return None
    length = int.from_bytes(data[position : position + 2], "big")
    if length < 2 or position + length > len(data):
        return None
    return data[position + 2 : position + length]


def _segment_name(code: int) -> str | None:
    if 0xE0 <= code <= 0xEF:
        return f"APP{code - 0xE0}"
    return "COM" if code == 0xFE else None


def _pack(name: str, payload: bytes) -> bytes:
    number = name.removeprefix("APP")
    if name == "COM":
        code = 0xFE
    elif number != name and number.isdecimal() and int(number) < 16:
        code = 0xE0 + int(number)
    else:
        raise ValueError(f"unknown JPEG segment {name!r}")
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"JPEG segment {name} has {len(payload)} bytes, more than {MAX_PAYLOAD}")
    return bytes([0xFF, code]) + (len(payload) + 2).to_bytes(2, "big") + payload


def _adobe_transform(payload: bytes) -> int:
    return payload[11] if len(payload) > 11 else 0


def _thumbnail_place(exif_app1: bytes) -> tuple[int, int] | None:
    """Find (offset, length) of IFD1's JPEG; only IFD0 and IFD1 are visited, so cycles cannot."""
    if not exif_app1.startswith(_EXIF):
        return None
    tiff = exif_app1[len(_EXIF) :]
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return None
    try:
        first = struct.unpack_from(order + "I", tiff, 4)[0]
        count = struct.unpack_from(order + "H", tiff, first)[0]
        first_end = first + 2 + 12 * count + 4
        second = struct.unpack_from(order + "I", tiff, first_end - 4)[0]
        if second == 0 or first <= second < first_end:
            return None
        count = struct.unpack_from(order + "H", tiff, second)[0]
        second_end = second + 2 + 12 * count + 4
        found: dict[int, int] = {}
        for entry in range(second + 2, second_end - 4, 12):
            tag, kind, items = struct.unpack_from(order + "HHI", tiff, entry)
            if tag in (0x0201, 0x0202) and kind in (3, 4) and items == 1:
                number = order + ("H" if kind == 3 else "I")
                found[tag] = struct.unpack_from(number, tiff, entry + 8)[0]
    except struct.error:
        return None
    offset, length = found.get(0x0201, 0), found.get(0x0202, 0)
    tables = ((0, 8), (first, first_end), (second, second_end))
    clear = all(offset >= end or offset + length <= start for start, end in tables)
    if length < 4 or offset + length > len(tiff) or not clear:
        return None
    return offset + len(_EXIF), length
