"""HEIC and JPEG XL pictures to pixels, in a process of its own; run as a script by `decoded`.

The decoders are large, and files may be anybody's: what they take or break ends with this process.

    python _decoder.py HEIF|JPEGXL MOST_PIXEL_BYTES < FILE > PICTURE

A picture is a line of JSON, its shape, type, notes and the names and lengths of its metadata
blocks, then the pixels and the blocks.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

Block = tuple[str, bytes]
Picture = tuple[Any, list[Block], list[str]]
MOST_COLOURS = 4  # that come pixel by pixel; more come one by one
MOST_BLOCK = 16 << 20  # bytes of a metadata block
BOXES = {b"Exif": "EXIF", b"xml ": "XMP"}
# What other boxes hold: a film, a picture for bright screens, ... Room and proofs of origin aside.
_PLAIN = {b"ftyp", b"meta", b"mdat", b"free", b"skip", b"wide", b"idat"}
_PLAIN |= {b"JXL ", b"jxll", b"jxlc", b"jxlp", b"jxli", b"jbrd", b"brob", b"jumb", *BOXES}
_ENDS_EARLY = "NEED_MORE_INPUT", "end of file"  # what decoders say where data is missing


def heif(data: bytes, most: int) -> Picture:
    """A HEIC file's main picture, upright."""
    import pi_heif

    file = pi_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
    wide = file.mode.endswith("16")
    check(file.size[0] * file.size[1] * 4 * (2 if wide else 1), most)
    blocks = [("EXIF", file.info.get("exif")), ("XMP", file.info.get("xmp"))]
    blocks.append(("ICC", file.info.get("icc_profile")))
    more = len(file) - 1
    notes = [f"{more} further pictures are not archived"] if more else []
    kinds = {"depth_images": "depth", "aux": "auxiliary"}
    beside = [word for name, word in kinds.items() if file.info.get(name)]
    notes += [f"its {' and '.join(beside)} pictures are not archived"] if beside else []
    notes += left_out(data)
    pixels = np.array(file)  # a copy: a view's memory goes with the file
    return pixels, [(name, block) for name, block in blocks if block], notes


def jpeg_xl(data: bytes, most: int) -> Picture:
    """A JPEG XL file's first picture, upright."""
    import imagecodecs

    pixels = imagecodecs.jpegxl_decode(data, index=0, numthreads=1)
    check(pixels.nbytes, most)
    # of an animation, all pictures, with an axis more: nothing else tells
    animated = imagecodecs.jpegxl_decode(data, numthreads=1).ndim > pixels.ndim
    notes = ["its further pictures are not archived"] if animated else []
    if pixels.ndim == 3 and pixels.shape[2] > MOST_COLOURS:  # grey with other channels
        pixels = np.moveaxis(pixels, 0, 2)
    return pixels, list(blocks(data)), notes + (left_out(data) if data[:1] == b"\0" else [])


def check(size: int, most: int) -> None:
    """Refuse a picture that is too large."""
    if size > most:
        raise ValueError(f"its {size >> 20} MiB of pixels are more than {most >> 20}")


def left_out(data: bytes) -> list[str]:
    """What a file of boxes holds beside its picture and metadata."""
    kinds = {kind for kind, _ in boxes(data)} - _PLAIN
    told = ", ".join(repr(kind.decode("latin-1")) for kind in sorted(kinds)[:5])
    return [f"its boxes {told} are not archived"] if kinds else []


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of a file's boxes (ISO/IEC 14496-12), as far as they are whole."""
    at = 0
    while len(head := data[at : at + 8]) == 8:
        size, kind, start = int.from_bytes(head[:4], "big"), head[4:], at + 8
        if size == 1:
            size, start = int.from_bytes(data[start : start + 8], "big"), start + 8
        at = at + size if size else len(data)
        if at < start:
            return
        yield kind, data[start:at]


def blocks(data: bytes) -> Iterator[Block]:
    """EXIF and XMP of a JPEG XL file (ISO/IEC 18181-2), whose boxes may be packed by Brotli."""
    for kind, content in boxes(data):
        if kind == b"brob":
            import imagecodecs

            kind, packed = content[:4], content[4:]
            if kind not in BOXES:
                continue
            content = bytes(imagecodecs.brotli_decode(packed, out=MOST_BLOCK))
        if kind in BOXES and len(content) <= MOST_BLOCK:
            # EXIF begins behind an offset and as many bytes as that says
            skipped = 4 + int.from_bytes(content[:4], "big") if kind == b"Exif" else 0
            yield BOXES[kind], content[skipped:]


def main() -> None:
    """Decode what standard input gives."""
    kind, most = sys.argv[1], int(sys.argv[2])
    try:
        decode = {"HEIF": heif, "JPEGXL": jpeg_xl}[kind]
        pixels, blocks, notes = decode(sys.stdin.buffer.read(), most)
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        cut = any(word in said for word in _ENDS_EARLY)
        sys.exit(f"truncated: it ends inside its image data ({said})" if cut else said)
    head = {"shape": pixels.shape, "dtype": pixels.dtype.name, "notes": notes}
    head["blocks"] = [(name, len(block)) for name, block in blocks]
    out = sys.stdout.buffer
    out.write(json.dumps(head).encode() + b"\n")
    out.write(np.ascontiguousarray(pixels).data)
    for _, block in blocks:
        out.write(block)


if __name__ == "__main__":
    main()
