"""The `pcdc` codec of Zarr v3: chunks of uint8 RGB pixels to PCDC streams.

Registered through the `zarr.codecs` entry point, so opening an archive needs no import. Its
configuration::

    {"name": "pcdc", "configuration": {"model": "<sha256>", "bits_per_pixel": 0.24}}

`model` names the weights (see `archive_pipeline.codec.models`); `bits_per_pixel` is the budget of a
write: its streams take at most that many bits a coded pixel, margins not counted. A write whose
pixels take more even at the coarsest raises `BudgetTooSmall`, a ValueError that says how many bytes
they need, and stores nothing. Sharding hands a whole image to one call when
`codec_pipeline.batch_size` allows it, so the budget is then image-wide. Readers ignore it.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.codec import ArrayBytesCodec, Codec
from zarr.codecs import ShardingCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.common import JSON, parse_named_configuration
from zarr.core.metadata.v3 import ArrayV3Metadata

from archive_pipeline.codec.settings import DEFAULT, Settings
from archive_pipeline.pcdc.bitstream import EMPTY_BYTES, MAX_SIDE
from archive_pipeline.stages import stage

NAME = "pcdc"


@dataclass(frozen=True)
class PCDCCodec(ArrayBytesCodec):
    """Learned lossy codec of uint8 chunks (height, width, 3).

    Lower and right margins that equal the fill value are cut before coding and come back
    exactly, so the chunks that sharding fills up at an image's edge cost nothing.

    Attributes:
        settings: how it runs, no part of its configuration; see `with_settings`.

    Raises:
        ValueError: the configuration is malformed, or the array is not uint8 (h, w, 3) with
            chunks of at most 4096 pixels a side; on decoding, a corrupt stream.
    """

    is_fixed_size = False

    model: str
    bits_per_pixel: float
    settings: Settings = field(default=DEFAULT, kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not re.fullmatch(r"[0-9a-f]{64}", self.model):
            raise ValueError(f"pcdc: model must be a SHA-256, got {self.model!r}")
        bits = self.bits_per_pixel
        if type(bits) not in (int, float) or not 0 < bits < math.inf:
            raise ValueError(f"pcdc: bits_per_pixel must be positive, got {bits!r}")

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        _, configuration = parse_named_configuration(data, NAME)
        if not isinstance(configuration, dict) or configuration.keys() != {
            "model",
            "bits_per_pixel",
        }:
            raise ValueError(
                f"pcdc: configuration must hold model and bits_per_pixel, got {configuration!r}"
            )
        return cls(**configuration)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, JSON]:
        configuration = {"model": self.model, "bits_per_pixel": self.bits_per_pixel}
        return {"name": NAME, "configuration": configuration}  # type: ignore[dict-item]

    def validate(self, *, shape: tuple[int, ...], dtype: object, chunk_grid: object) -> None:
        if shape[2:] != (3,):
            raise ValueError(f"pcdc codes (height, width, 3), not {shape}")
        _check_chunk(tuple(getattr(chunk_grid, "chunk_shape", shape)), dtype)

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> Self:
        # sharding does not validate its inner codecs, but shows them their chunks here
        _check_chunk(array_spec.shape, array_spec.dtype)
        return self

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError("the size of a pcdc stream is known only after encoding")

    async def encode(
        self, chunks_and_specs: Iterable[tuple[NDBuffer | None, ArraySpec]]
    ) -> Iterable[Buffer | None]:
        return await asyncio.to_thread(self._encode, list(chunks_and_specs))

    async def decode(
        self, chunks_and_specs: Iterable[tuple[Buffer | None, ArraySpec]]
    ) -> Iterable[NDBuffer | None]:
        return await asyncio.to_thread(self._decode, list(chunks_and_specs))

    def _encode(self, batch: list[tuple[NDBuffer | None, ArraySpec]]) -> list[Buffer | None]:
        with stage("start"):
            from archive_pipeline.codec.models import codec_for, encode  # torch: only for pixels

            # loaded here, so that its time does not count as encoding
            codec_for(self.model, self.settings.device, self.settings.precision)
        at = [i for i, (chunk, _) in enumerate(batch) if chunk is not None]
        tiles = []
        for i in at:
            chunk, spec = batch[i]
            assert chunk is not None
            tiles.append(trim(chunk.as_numpy_array(), int(spec.fill_value or 0)))
        # what an empty tile takes is not taken from the others
        pixels = sum(t.shape[0] * t.shape[1] for t in tiles)
        empty = EMPTY_BYTES * sum(not t.size for t in tiles)
        budget = int(self.bits_per_pixel * pixels / 8) + empty
        with stage("encode"):
            streams = encode(self.model, tiles, budget, self.settings)
        taken = sum(map(len, streams))
        if self.settings.overspent is not None and taken > budget:
            self.settings.overspent(8 * (taken - empty) / pixels)
        out: list[Buffer | None] = [None] * len(batch)
        for i, stream in zip(at, streams, strict=True):
            out[i] = batch[i][1].prototype.buffer.from_bytes(stream)
        return out

    def _decode(self, batch: list[tuple[Buffer | None, ArraySpec]]) -> list[NDBuffer | None]:
        with stage("start"):
            from archive_pipeline.codec.models import decoder_for  # only for pixels

        settings = self.settings
        out: list[NDBuffer | None] = [None] * len(batch)
        shapes: dict[tuple[int, int], list[int]] = {}
        for i, (data, spec) in enumerate(batch):
            if data is not None:
                shapes.setdefault((spec.shape[0], spec.shape[1]), []).append(i)
        for (height, width), at in shapes.items():
            streams = [data.to_bytes() for i in at if (data := batch[i][0]) is not None]
            with stage("start"):
                codec = decoder_for(self.model, settings)
            with stage("decode"):
                tiles = codec.decode(
                    streams, height, width, settings.steps, settings.seed, settings.realism
                )
            for i, tile in zip(at, tiles, strict=True):
                spec = batch[i][1]
                chunk = np.full(spec.shape, spec.fill_value or 0, np.uint8)
                chunk[: tile.shape[0], : tile.shape[1]] = tile
                out[i] = spec.prototype.nd_buffer.from_numpy_array(chunk)
        return out


def with_settings(array: zarr.Array, settings: Settings) -> zarr.Array:
    """The same array, whose pixels are decoded and encoded with these settings.

    Nothing is stored, and what others make of the array in this process does not change. An array
    that is pickled comes back with default settings.
    """
    metadata = array.metadata
    assert isinstance(metadata, ArrayV3Metadata)
    codecs = tuple(_with_settings(codec, settings) for codec in metadata.codecs)
    changed = replace(metadata, codecs=codecs)
    opened = array._async_array
    config = getattr(opened, "config", None) or opened._config  # its name before zarr 3.1.6
    return zarr.Array(zarr.AsyncArray(changed, array.store_path, config))


def _with_settings(codec: Codec, settings: Settings) -> Codec:
    if isinstance(codec, PCDCCodec):
        return replace(codec, settings=settings)
    if isinstance(codec, ShardingCodec):
        inner = tuple(_with_settings(one, settings) for one in codec.codecs)
        return replace(codec, codecs=inner)
    return codec


def _check_chunk(chunk: tuple[int, ...], dtype: object) -> None:
    if chunk[2:] != (3,) or max(chunk[:2]) > MAX_SIDE:
        raise ValueError(
            f"pcdc codes (height, width, 3) in chunks of sides up to {MAX_SIDE}, not {chunk}"
        )
    if dtype.to_native_dtype() != np.uint8:  # type: ignore[attr-defined]
        raise ValueError(f"pcdc codes uint8, not {dtype}")


def trim(chunk: NDArray[np.uint8], fill: int) -> NDArray[np.uint8]:
    """Cut lower rows and right columns that hold nothing but the fill value."""
    if chunk.size and (chunk[-1] != fill).any() and (chunk[:, -1] != fill).any():
        return chunk  # nearly always, and quickly known
    content = (chunk != fill).any(2)
    rows, columns = np.flatnonzero(content.any(1)), np.flatnonzero(content.any(0))
    if not len(rows):
        return chunk[:0, :0]
    return chunk[: rows[-1] + 1, : columns[-1] + 1]


def trimmed_tiles(
    pixels: NDArray[np.uint8], side: int, fill: int = 0
) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    """Row, column and content of an image's tiles, as the codec is given them and trims them."""
    for row in range(0, pixels.shape[0], side):
        for col in range(0, pixels.shape[1], side):
            yield row, col, trim(pixels[row : row + side, col : col + side], fill)


def count_coded(parts: Iterable[NDArray[np.uint8]], side: int) -> tuple[int, int]:
    """Pixels that are coded of images, margins of the fill value aside, and their empty tiles."""
    coded = empty = 0
    for part in parts:
        for _, _, tile in trimmed_tiles(part, side):
            coded += tile.shape[0] * tile.shape[1]
            empty += not tile.size
    return coded, empty
