"""The documents inside an image file, EXIF, XMP and ICC, on their way into another file.

Sources of any format keep their metadata blocks byte for byte; what is written as JPEG or PNG gets
them as JPEG segments or PNG chunks.
"""

from __future__ import annotations

import io
import shutil
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile

from archive_pipeline.flight.jpeg_segments import MAX_PAYLOAD, Segment, write_segments
from archive_pipeline.flight.restored_tag import MARK, png_chunk
from archive_pipeline.flight.source_image import (
    EXIF_PREFIX,
    TIFF_DRIVERS,
    XMP_PREFIX,
    SourceImage,
)
from archive_pipeline.flight.tiff_tags import Tag, read_block
from archive_pipeline.flight.xmp import xmp_packet
from archive_pipeline.geo.georef import Window

MAX_ICC = 16 << 20
_ICC_PREFIX = b"ICC_PROFILE\0"
_PHOTOSHOP_PREFIX = b"Photoshop 3.0\0"
_ASCII = 2  # TIFF's type of texts
# Keyword, uncompressed, no language, no translated keyword.
_PNG_XMP = b"XML:com.adobe.xmp\0\0\0\0\0"
# Not among them: what belongs to animation or to the original's bit depth and palette.
_PNG_KEPT = frozenset(b"cHRM gAMA iCCP sRGB cICP mDCV cLLI pHYs eXIf tIME tEXt zTXt iTXt".split())


@dataclass(frozen=True)
class Embedded:
    """The documents inside an image file: EXIF's TIFF structure, the XMP packet, the profile."""

    exif: bytes = b""
    xmp: bytes = b""
    icc: bytes = b""


def embedded_documents(source: SourceImage) -> Embedded:
    """Find EXIF, XMP and ICC among a source's metadata blocks, whichever format they are from."""
    exif = xmp = icc = b""
    pieces: list[bytes] = []
    for name, payload in source.metadata:
        if name == "APP1" and payload.startswith(EXIF_PREFIX):
            exif = exif or payload
        elif name == "APP1" and payload.startswith(XMP_PREFIX):
            xmp = xmp or payload.removeprefix(XMP_PREFIX)
        elif name == "APP2" and payload.startswith(_ICC_PREFIX):
            pieces.append(payload.removeprefix(_ICC_PREFIX))
        elif name in ("EXIF", "eXIf"):
            exif = payload
        elif name == "XMP":
            xmp = payload
        elif name == "ICC":
            icc = payload
        elif name == "iTXt" and payload.startswith(_PNG_XMP):
            xmp = payload.removeprefix(_PNG_XMP)
        elif name == "iCCP":
            try:
                icc = zlib.decompressobj().decompress(payload.partition(b"\0")[2][1:], MAX_ICC)
            except zlib.error:
                continue
    if pieces:
        # Each piece starts with its number and their count.
        icc = b"".join(piece[2:] for piece in sorted(pieces))
    return Embedded(exif.removeprefix(EXIF_PREFIX), xmp.rstrip(b"\0"), icc)


def exif_tags(exif: bytes) -> dict[str, str]:
    """Return EXIF as the ``EXIF_*`` tags that GDAL shows for a JPEG with the same block."""
    if not 0 < len(exif) <= MAX_PAYLOAD - len(EXIF_PREFIX):
        return {}
    carrier = io.BytesIO()
    Image.new("L", (8, 8)).save(carrier, "JPEG")
    data = write_segments(carrier.getvalue(), [("APP1", EXIF_PREFIX + exif)])
    with quiet(), MemoryFile(data, ext=".jpg") as file, file.open(driver="JPEG") as dataset:
        return {k: v for k, v in dataset.tags().items() if k.startswith("EXIF_")}


def tiff_tags(source: SourceImage, window: Window) -> list[Tag]:
    """What a source's documents are in a TIFF's first directory: EXIF, XMP, IPTC, Photoshop's.

    XMP is made UTF-8 and one packet, as TIFF's readers want it. Texts of a photograph's EXIF end
    with one NUL: of more, as cameras fill up names with, libtiff warns whenever a file is opened.

    Args:
        window: of which EXIF gives the size, unless that is the whole image.
    """
    embedded = embedded_documents(source)
    exif = EXIF_PREFIX + embedded.exif
    if window != (0, 0, source.width, source.height):
        exif = set_dimensions(exif, window[2], window[3])
    tags = list(read_block(exif.removeprefix(EXIF_PREFIX)))
    if source.driver not in TIFF_DRIVERS:
        tags = [_unpadded(tag) if tag.kind == _ASCII else tag for tag in tags]
    photoshop = b"".join(
        payload.removeprefix(_PHOTOSHOP_PREFIX)
        for name, payload in source.metadata
        if name == "PHOTOSHOP" or (name == "APP13" and payload.startswith(_PHOTOSHOP_PREFIX))
    )
    iptc = next((payload for name, payload in source.metadata if name == "IPTC"), b"")
    texts = {700: xmp_packet(source.metadata), 33723: iptc, 34377: photoshop}
    return [*tags, *(Tag(n, 1 if n == 700 else 7, len(t), t) for n, t in texts.items() if t)]


def _unpadded(text: Tag) -> Tag:
    value = text.value.rstrip(b"\0") + b"\0"
    return replace(text, count=len(value), value=value) if len(value) < text.count else text


def pack_segments(source: SourceImage) -> list[Segment]:
    """Pack the embedded documents of a source that is no JPEG into JPEG segments."""
    embedded = embedded_documents(source)
    segments: list[Segment] = []
    if embedded.exif:
        segments.append(("APP1", EXIF_PREFIX + embedded.exif))
    if embedded.xmp:
        segments.append(("APP1", XMP_PREFIX + embedded.xmp))
    # A segment holds no more, and only ICC may be spread; the archive keeps the whole block.
    segments = [segment for segment in segments if len(segment[1]) <= MAX_PAYLOAD]
    size = MAX_PAYLOAD - len(_ICC_PREFIX) - 2
    pieces = [embedded.icc[start : start + size] for start in range(0, len(embedded.icc), size)]
    for number, piece in enumerate(pieces if len(pieces) < 256 else [], 1):
        segments.append(("APP2", _ICC_PREFIX + bytes([number, len(pieces)]) + piece))
    return segments


def set_dimensions(exif_app1: bytes, width: int, height: int) -> bytes:
    """Overwrite the pixel dimensions in an EXIF segment where it has them; nothing moves."""
    data = bytearray(exif_app1)
    base = len(EXIF_PREFIX)
    order = {b"II": "<", b"MM": ">"}.get(bytes(data[base : base + 2]))
    if order is None:
        return exif_app1
    sizes = {0x0100: width, 0x0101: height, 0xA002: width, 0xA003: height}
    try:
        directories = [struct.unpack_from(order + "I", data, base + 4)[0]]
        # The main directory points to EXIF's own; no other is visited, so cycles cannot be.
        for directory in directories:
            count = struct.unpack_from(order + "H", data, base + directory)[0]
            for index in range(count):
                entry = base + directory + 2 + 12 * index
                tag, kind, items = struct.unpack_from(order + "HHI", data, entry)
                if tag == 0x8769 and len(directories) == 1:
                    directories.append(struct.unpack_from(order + "I", data, entry + 8)[0])
                elif tag in sizes and kind in (3, 4) and items == 1:
                    struct.pack_into(order + " HI"[kind - 2], data, entry + 8, sizes[tag])
    except struct.error:
        return exif_app1
    return bytes(data)


def of_size(metadata: tuple[Segment, ...], width: int, height: int) -> tuple[Segment, ...]:
    """Metadata blocks of an image, whose EXIF gives another number of pixels."""
    changed = []
    for name, payload in metadata:
        if name in ("APP1", "EXIF", "eXIf"):
            bare = not payload.startswith(EXIF_PREFIX)
            if not bare or name != "APP1":
                prefixed = EXIF_PREFIX + payload if bare else payload
                sized = set_dimensions(prefixed, width, height)
                payload = sized.removeprefix(EXIF_PREFIX) if bare else sized
        changed.append((name, payload))
    return tuple(changed)


def without_statistics(tags: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Tags by namespaces, but for those that GDAL and others make of an image's pixels."""
    return {
        namespace: {k: v for k, v in items.items() if not k.startswith("STATISTICS_")}
        for namespace, items in tags.items()
    }


def png_chunks(source: SourceImage, decoder: str) -> list[tuple[bytes, bytes]]:
    """Metadata chunks of a PNG, those of the source if that is one, and the mark.

    Args:
        decoder: what made the pixels, for the mark.
    """
    own = [c for c in _source_chunks(source) if c[0] != b"tEXt" or not c[1].startswith(MARK)]
    return [*own, png_chunk(decoder)]


def _source_chunks(source: SourceImage) -> list[tuple[bytes, bytes]]:
    if source.driver == "PNG":
        named = [(name.encode("ascii"), payload) for name, payload in source.metadata]
        return [chunk for chunk in named if chunk[0] in _PNG_KEPT]
    embedded = embedded_documents(source)
    chunks = []
    if embedded.icc:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(embedded.icc)))
    if embedded.exif:
        chunks.append((b"eXIf", embedded.exif))
    if embedded.xmp:
        chunks.append((b"iTXt", _PNG_XMP + embedded.xmp))
    return chunks


def insert_chunks(plain: Path, final: Path, chunks: list[tuple[bytes, bytes]]) -> None:
    """Copy a PNG and put chunks behind its header chunk."""
    with open(plain, "rb") as reader, open(final, "wb") as writer:
        # Signature and IHDR have a fixed length.
        writer.write(reader.read(33))
        for kind, payload in chunks:
            writer.write(struct.pack(">I", len(payload)) + kind + payload)
            writer.write(struct.pack(">I", zlib.crc32(kind + payload)))
        shutil.copyfileobj(reader, writer, 1 << 20)


@contextmanager
def quiet() -> Iterator[None]:
    """Images without a position are ordinary here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield
