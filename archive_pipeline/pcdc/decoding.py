"""Decoding of tiles: all that does not depend on what runs the networks.

Whatever runs them, PyTorch (`codec`) or NumPy (`reader`): what the entropy decoder depends on is
integer arithmetic, the same for both. Pixels come of float arithmetic and may differ in the last
bits.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.pcdc import entropy
from archive_pipeline.pcdc.bitstream import MODEL_BYTES, Header, UnknownModel, parse
from archive_pipeline.pcdc.constants import (
    BASE_LEVEL,
    BLOCK,
    FIRST_CODED_SCALE,
    HYPER_STRIDE,
    LEVEL_OFFSETS,
    SCALE_COUNT,
    STRIDE,
)
from archive_pipeline.pcdc.entropy import CorruptStream, Tables
from archive_pipeline.pcdc.model_files import ModelError

LARGEST = 1e6  # magnitude of what becomes pixels

T = TypeVar("T")
R = TypeVar("R")


def grid(pixels: int, unit: int) -> int:
    """Number of units that cover so many pixels."""
    return -(-pixels // unit)


@dataclass
class Symbols:
    """What a stream says: header fields and integers, the same on every machine.

    Attributes:
        levels: uint8 (B_h, B_w) in 1..5.
        z: int64 (Z, ceil(h/64), ceil(w/64)).
        q: int64 (M, ceil(h/16), ceil(w/16)).
    """

    height: int
    width: int
    image_step: int
    levels: NDArray[np.uint8]
    z: NDArray[np.int64]
    q: NDArray[np.int64]


class TileDecoder(ABC):
    """Decodes tiles of one model, several at once; who runs the networks adds how.

    Tiles are uint8 (height, width, 3) RGB with sides of 0..4096 pixels.

    Args:
        sha256: the model's identity.
        tables: its frequency tables.
        level_tables: how many of them are for level maps.
        latents: its number of latent channels M.
    """

    batch_pixels = 1
    """Tiles that networks take at once have so many pixels together, or are one."""

    def __init__(self, sha256: str, tables: Tables, level_tables: int, latents: int) -> None:
        self.prefix = bytes.fromhex(sha256)[:MODEL_BYTES]
        self._tables = tables
        self._level_tables = level_tables
        self._latents = latents

    @abstractmethod
    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Results of a function for all items, in order; it may run them side by side."""

    def each_batch(
        self,
        function: Callable[[list[T]], list[R]],
        items: Sequence[T],
        size_of: Callable[[T], tuple[int, int]],
    ) -> list[R]:
        """Results for all items, in order, of a function that takes batches of them.

        Args:
            size_of: height and width of an item, which those of a batch share.
        """
        alike: dict[tuple[int, int], list[int]] = {}
        for i, item in enumerate(items):
            alike.setdefault(size_of(item), []).append(i)
        batches = []
        for (height, width), at in alike.items():
            most = max(1, self.batch_pixels // max(1, height * width))
            batches += [at[start : start + most] for start in range(0, len(at), most)]
        parts = self.each(lambda at: function([items[i] for i in at]), batches)
        made = {
            i: result
            for at, results in zip(batches, parts, strict=True)
            for i, result in zip(at, results, strict=True)
        }
        return [made[i] for i in range(len(items))]

    @abstractmethod
    def prior_index(self, image_step: int) -> NDArray[np.int64]:
        """Scale indices (Z,) of the channels of hyper-latents, 0..79."""

    @abstractmethod
    def scale_indices(
        self, z: Sequence[NDArray[np.int64]], image_steps: Sequence[int]
    ) -> list[NDArray[np.int64]]:
        """Scale indices (M, 4 z_h, 4 z_w) of tiles' latents, exact, neither shifted nor clamped.

        Args:
            z: their hyper-latents (Z, z_h, z_w), all of one shape.
        """

    @abstractmethod
    def _prepare(self, steps: int) -> None:
        """Load what decoding with so many steps takes, before several threads want it.

        Raises:
            ModelError: steps are asked for and the model has no denoiser.
        """

    @abstractmethod
    def _synthesise(
        self, tiles: Sequence[Symbols], steps: int, seeds: Sequence[int], realism: float
    ) -> list[NDArray[np.uint8]]:
        """The pixels (height, width, 3) of tiles of one size, none of them empty."""

    def decode_symbols(
        self, streams: list[bytes], max_height: int, max_width: int
    ) -> list[Symbols | CorruptStream]:
        """Entropy-decode streams, exactly; empty tiles have zero height and width.

        A stream that cannot be decoded yields its error in place of symbols, so that one bad
        tile does not hide others.

        Raises:
            UnknownModel: a stream was made by another model.
        """
        results: list[Symbols | CorruptStream | None] = [None] * len(streams)
        groups: dict[int, list[tuple[int, Header, bytes]]] = {}
        for t, stream in enumerate(streams):
            try:
                header, payload = parse(stream, max_height, max_width)
            except CorruptStream as error:
                results[t] = error
                continue
            if header.model != self.prefix:
                raise UnknownModel(f"stream was made by model {header.model.hex()}...")
            if header.empty:
                nothing = np.zeros((0, 0, 0), np.int64)
                results[t] = Symbols(0, 0, 0, np.zeros((0, 0), np.uint8), nothing, nothing)
            elif header.level_table >= self._level_tables:
                results[t] = CorruptStream("level table out of range")
            else:
                groups.setdefault(header.lanes_log2, []).append((t, header, payload))
        for lanes, members in groups.items():
            try:
                decoded: list = self._decode_group(members, 1 << lanes)
            except CorruptStream:
                # find out which: decode the group's tiles one by one
                decoded = []
                for member in members:
                    try:
                        decoded += self._decode_group([member], 1 << lanes)
                    except CorruptStream as error:
                        decoded.append(error)
            for (t, _, _), symbols in zip(members, decoded, strict=True):
                results[t] = symbols
        return results  # type: ignore[return-value]  # every place is filled by now

    def _decode_group(self, members: list[tuple[int, Header, bytes]], lanes: int) -> list[Symbols]:
        tables = self._tables
        headers = [h for _, h, _ in members]
        decoder = entropy.Decoder(tables, [p for _, _, p in members], lanes, self.each)

        shapes = [(grid(h.height, STRIDE), grid(h.width, STRIDE)) for h in headers]
        blocks = [(grid(a, BLOCK), grid(b, BLOCK)) for a, b in shapes]
        residuals = decoder.decode(
            [
                np.full(a * b, SCALE_COUNT + h.level_table)
                for h, (a, b) in zip(headers, blocks, strict=True)
            ]
        )
        levels = [
            levels_from_residuals(r.reshape(b)) for r, b in zip(residuals, blocks, strict=True)
        ]

        z_index = [
            self.z_index(h.image_step, grid(a, HYPER_STRIDE), grid(b, HYPER_STRIDE))
            for h, (a, b) in zip(headers, shapes, strict=True)
        ]
        z_coded = decoder.decode([i[i >= FIRST_CODED_SCALE] for i in z_index])
        z_scattered = []
        for index, coded in zip(z_index, z_coded, strict=True):
            z = np.zeros(index.shape, np.int64)
            z[index >= FIRST_CODED_SCALE] = coded
            z_scattered.append(z)
        # hyper-latents never escape, so scales can be had before the escapes are read

        def scales(at: list[int]) -> list[NDArray[np.int64]]:
            base = self.scale_indices(
                [z_scattered[t] for t in at], [headers[t].image_step for t in at]
            )
            return [self.shifted(b, levels[t], shapes[t]) for b, t in zip(base, at, strict=True)]

        q_index = self.each_batch(
            scales, range(len(members)), lambda t: (headers[t].height, headers[t].width)
        )
        q_coded = decoder.decode([i[i >= FIRST_CODED_SCALE] for i in q_index])
        used = decoder.finish()

        out = []
        for (_, h, payload), n, z, index, coded, level in zip(
            members, used, z_scattered, q_index, q_coded, levels, strict=True
        ):
            escaped = np.abs(coded) == tables.limit(index[index >= FIRST_CODED_SCALE])
            beyond = entropy.unpack_escapes(payload[n:], int(escaped.sum()))
            coded[escaped] += np.sign(coded[escaped]) * beyond
            q = np.zeros((self._latents, *index.shape[1:]), np.int64)
            q[index >= FIRST_CODED_SCALE] = coded
            out.append(Symbols(h.height, h.width, h.image_step, level, z, q))
        return out

    def synthesise(
        self,
        tiles: Sequence[Symbols],
        steps: int = 0,
        seeds: Sequence[int] | None = None,
        realism: float = 1.0,
    ) -> list[NDArray[np.uint8]]:
        """Return the pixels of tiles, uint8 (height, width, 3).

        What a tile looks like depends neither on its company nor on the number of threads.

        Args:
            steps: 0 for the deterministic decoder, else denoising steps.
            seeds: of the tiles' noise; zeros if left out.
            realism: how much of what denoising changes is in the pixels, 0..1.

        Raises:
            ModelError: steps are asked for and the model has no denoiser.
        """
        steps = steps if realism else 0
        self._prepare(steps)
        seeds = seeds or [0] * len(tiles)

        def pixels(at: list[int]) -> list[NDArray[np.uint8]]:
            some = [tiles[t] for t in at]
            if not some[0].height or not some[0].width:
                return [np.zeros((tile.height, tile.width, 3), np.uint8) for tile in some]
            return self._synthesise(some, steps, [seeds[t] for t in at], realism)

        return self.each_batch(
            pixels, range(len(tiles)), lambda t: (tiles[t].height, tiles[t].width)
        )

    def decode(
        self,
        streams: list[bytes],
        max_height: int,
        max_width: int,
        steps: int = 0,
        seed: int = 0,
        realism: float = 1.0,
    ) -> list[NDArray[np.uint8]]:
        """Decode streams to uint8 (height, width, 3) tiles.

        Args:
            steps: 0 for the deterministic decoder, else denoising steps; their noise depends on
                `seed` and each tile's stream only.
            realism: as in `synthesise`.

        Raises:
            CorruptStream: naming the first bad stream by its position.
            UnknownModel: a stream was made by another model.
            ModelError: steps are asked for and the model has no denoiser.
        """
        tiles = []
        for t, symbols in enumerate(self.decode_symbols(streams, max_height, max_width)):
            if isinstance(symbols, CorruptStream):
                raise CorruptStream(f"tile {t} of {len(streams)}: {symbols}")
            tiles.append(symbols)
        return self.synthesise(tiles, steps, [tile_seed(s, seed) for s in streams], realism)

    def require_numbers(self, largest: float) -> None:
        """Refuse what a denoiser made if it is no picture: it would be a black or a white one.

        Args:
            largest: magnitude of its values, which are -1..1 and a little beyond.

        Raises:
            ModelError: it is none.
        """
        if not largest < LARGEST:  # NaN is not either
            name = self.prefix.hex()[:12]
            raise ModelError(f"model {name}: its denoiser gives pixels out of all range")

    def z_index(self, image_step: int, height: int, width: int) -> NDArray[np.int64]:
        """Scale indices of hyper-latents (Z, height, width)."""
        column = self.prior_index(image_step)
        return np.broadcast_to(column[:, None, None], (len(column), height, width))

    @classmethod
    def shifted(
        cls, index: NDArray[np.int64], levels: NDArray[np.uint8], shape: tuple[int, int]
    ) -> NDArray[np.int64]:
        """Scale indices (M, h, w) int64 of a tile's h x w latents, by its levels and clamped."""
        h, w = shape
        shifted = index[:, :h, :w] - cls.exponents(0, levels, h, w)
        clamped: NDArray[np.int64] = np.clip(shifted, 0, SCALE_COUNT - 1)
        return clamped

    @staticmethod
    def exponents(
        image_step: int, levels: NDArray[np.uint8], height: int, width: int
    ) -> NDArray[np.int64]:
        """Step exponents (1, height, width) int64 of a tile's latents, from levels (B_h, B_w)."""
        offsets = np.array(LEVEL_OFFSETS)[levels.astype(np.int64) - 1]
        spread = offsets.repeat(BLOCK, 0).repeat(BLOCK, 1)
        return image_step + spread[None, :height, :width]


def tile_seed(stream: bytes, seed: int) -> int:
    """Seed of a tile's noise, 0..2^63 - 1: tiles differ, the same tile never does."""
    content = hashlib.sha256(stream).digest()
    return (int.from_bytes(content[:8], "little") + seed) % (1 << 63)


def residuals_from_levels(levels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Level map (B_h, B_w) in 1..5 to residuals mod 5 against the left (or upper) neighbour."""
    value = levels.astype(np.int64) - 1
    before = np.empty_like(value)
    before[:, 1:] = value[:, :-1]
    before[1:, 0] = value[:-1, 0]
    before[0, 0] = BASE_LEVEL - 1
    return (value - before) % len(LEVEL_OFFSETS)


def levels_from_residuals(residuals: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Reverse `residuals_from_levels`."""
    steps = residuals.copy()
    steps[:, 0] = np.cumsum(residuals[:, 0]) + BASE_LEVEL - 1
    return (np.cumsum(steps, 1) % len(LEVEL_OFFSETS) + 1).astype(np.uint8)
