"""The byte layout of one tile's stream.

A stream is self-contained; all numbers are little endian::

    offset  size  field
    0       1     format version, 1
    1       8     first bytes of the model's SHA-256
    9       2     tile height in pixels, 0..4096
    11      2     tile width in pixels, 0..4096; of an empty tile nothing follows
    13      1     image step g, 8..55
    14      1     low nibble: log2 of the lanes (0..7); high nibble: table of the level map
    15      5L    states of the L lanes
    ..      2n    words of the coder
    ..      ..    escape values, LEB128, up to the end

The coder holds three phases: residuals of the level map in raster order, hyper-latents and
latents, the last two in (channel, row, column) order and only where the scale index is at least
`FIRST_CODED_SCALE`; other symbols are zero. Escape values say how far the latents at their
tables' ends lie beyond; hyper-latents never lie there.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.pcdc.constants import MAX_IMAGE_STEP, MIN_IMAGE_STEP
from archive_pipeline.pcdc.entropy import MAX_LANES_LOG2, CorruptStream

VERSION = 1
MAX_SIDE = 4096
MODEL_BYTES = 8

_FIXED = struct.Struct("<B8sHH")
_CODED = struct.Struct("<BB")
EMPTY_BYTES = _FIXED.size
HEADER_BYTES = _FIXED.size + _CODED.size


class UnknownModel(ArchivePipelineError, LookupError):
    """A stream or an archive needs a model that is not at hand."""


@dataclass(frozen=True)
class Header:
    """Header of a tile's stream; `image_step` and what follows mean nothing for an empty tile."""

    model: bytes
    height: int
    width: int
    image_step: int = MIN_IMAGE_STEP
    lanes_log2: int = 0
    level_table: int = 0

    @property
    def empty(self) -> bool:
        return not (self.height and self.width)

    def pack(self) -> bytes:
        fixed = _FIXED.pack(VERSION, self.model, self.height, self.width)
        if self.empty:
            return fixed
        return fixed + _CODED.pack(self.image_step, self.lanes_log2 | self.level_table << 4)


def parse(stream: bytes, max_height: int, max_width: int) -> tuple[Header, bytes]:
    """Split a stream into its header and payload.

    Raises:
        CorruptStream: it is not a stream of a known version, or is larger than
            max_height x max_width, or a field is out of range.
    """
    if len(stream) < _FIXED.size:
        raise CorruptStream(f"stream of {len(stream)} bytes is shorter than its header")
    version, model, height, width = _FIXED.unpack_from(stream)
    if version != VERSION:
        raise CorruptStream(f"stream format {version} is unknown (this reader knows {VERSION})")
    if height > min(max_height, MAX_SIDE) or width > min(max_width, MAX_SIDE):
        raise CorruptStream(
            f"stream holds {height}x{width} pixels, more than its {max_height}x{max_width} tile"
        )
    if not (height and width):
        if height or width or len(stream) != _FIXED.size:
            raise CorruptStream("malformed empty tile")
        return Header(model, 0, 0), b""
    if len(stream) < HEADER_BYTES:
        raise CorruptStream("stream ends inside its header")
    image_step, packed = _CODED.unpack_from(stream, _FIXED.size)
    lanes_log2 = packed & 15
    if not MIN_IMAGE_STEP <= image_step <= MAX_IMAGE_STEP or lanes_log2 > MAX_LANES_LOG2:
        raise CorruptStream("header field out of range")
    header = Header(model, height, width, image_step, lanes_log2, packed >> 4)
    return header, stream[HEADER_BYTES:]
