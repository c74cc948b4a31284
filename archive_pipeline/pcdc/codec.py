"""Encoding and decoding of tiles: networks, quantisation, allocation and entropy coder together.

Everything before the entropy coder is float32 and may differ in the last bits between devices;
everything that the entropy *decoder* depends on is integer arithmetic.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archive_pipeline.pcdc import entropy
from archive_pipeline.pcdc.allocation import (
    BASE_LEVEL,
    CODER_OVERHEAD,
    Allocator,
    BlockCosts,
    BudgetTooSmall,
    TilePlan,
)
from archive_pipeline.pcdc.bitstream import (
    EMPTY_BYTES,
    HEADER_BYTES,
    MODEL_BYTES,
    Header,
    UnknownModel,
    parse,
)
from archive_pipeline.pcdc.constants import (
    BLOCK,
    BLOCK_SIDE,
    ERROR_WEIGHT,
    FIRST_CODED_SCALE,
    HYPER_LIMIT,
    HYPER_STRIDE,
    LEVEL_OFFSETS,
    SCALE_COUNT,
    STEPS_PER_OCTAVE,
    STRIDE,
)
from archive_pipeline.pcdc.entropy import CorruptStream
from archive_pipeline.pcdc.model import Model
from archive_pipeline.pcdc.parallel import each
from archive_pipeline.pcdc.transforms import expand_blocks, pad_to, step_size

T = TypeVar("T")
R = TypeVar("R")

SYMBOL_LIMIT = 1 << 15
MAX_PASSES = 8  # of planning and coding; nearly always one or two
UNSPENT_SHARE = 0.01  # of the budget, small enough to be left


# Worth of a tile's levels (K, B_h, B_w) from its pixels, its latents y (1, M, h, w), the blocks'
# costs and the image step, in a unit that does not depend on the step.
Worth = Callable[[NDArray[np.uint8], Tensor, BlockCosts, int], NDArray[np.float64]]


def least_error(
    tile: NDArray[np.uint8], latents: Tensor, costs: BlockCosts, image_step: int
) -> NDArray[np.float64]:
    """The worth of levels (K, B_h, B_w) that makes for the least squared error at a rate."""
    return -costs.error * math.exp2(2 * image_step / STEPS_PER_OCTAVE)


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


@dataclass
class _Quantised:
    """A tile at one image step: hyper-latents, and what latents are coded against."""

    z: NDArray[np.int64]
    z_index: NDArray[np.int64]
    index: NDArray[np.int16]
    v: NDArray[np.float32]
    z_bits: float


class Codec:
    """Codes tiles of one model, several at once (see `parallel`).

    Tiles are uint8 (height, width, 3) RGB with sides of 0..4096 pixels.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.prefix = bytes.fromhex(model.sha256)[:MODEL_BYTES]
        self.dtype = next(model.networks.parameters()).dtype
        self.least_kept = _least_kept(model.tables)

    # ---------------------------------------------------------------- encoding

    def encode(
        self,
        tiles: list[NDArray[np.uint8]],
        budget: int,
        worth: Worth | None = None,
        raised: list[NDArray[np.uint8]] | None = None,
    ) -> list[bytes]:
        """Encode an image's tiles into at most `budget` bytes in all.

        Args:
            worth: what decides between the levels of blocks; None treats them all alike.
            raised: (B_h, B_w) for every tile, how many levels its blocks are above the others;
                only without `worth`.

        Raises:
            BudgetTooSmall: even the coarsest coding takes more.
        """
        return self.encode_job(Encoding(self, tiles, worth, raised), budget)

    def encode_job(self, job: Encoding, budget: int) -> list[bytes]:
        """`encode` for an image that was analysed before."""
        allowed, best = float(budget), None
        for _ in range(MAX_PASSES):
            try:
                streams = self.encode_planned(job, job.allocator.plan(allowed))
            except BudgetTooSmall as error:
                if best is not None:
                    return best
                raise BudgetTooSmall(budget, max(error.needed, budget + 1)) from error
            unspent = budget - sum(map(len, streams))
            if unspent >= 0:
                best = streams
                if unspent <= UNSPENT_SHARE * budget:
                    break
                # the estimate was on the safe side: ask for most of what it left
                allowed += 0.9 * unspent
            elif best is not None:
                break
            else:
                # the estimate fell short by a few bytes
                allowed += unspent - len(job.tiles)
        if best is None:
            raise BudgetTooSmall(budget, budget - unspent)
        return best

    def encode_planned(self, job: Encoding, plans: list[TilePlan]) -> list[bytes]:
        """Encode tiles as planned."""
        streams: dict[int, bytes] = {}
        groups: dict[int, list[tuple[int, Header, list[tuple[NDArray, NDArray]], bytes]]] = {}
        coded = job.each(
            lambda t: job.symbols(t, plans[t]) if job.tiles[t].size else None, range(len(plans))
        )
        for t, (plan, symbols) in enumerate(zip(plans, coded, strict=True)):
            if symbols is None:
                streams[t] = Header(self.prefix, 0, 0).pack()
                continue
            height, width = job.tiles[t].shape[:2]
            phases, level_table, escapes = symbols
            lanes = entropy.lanes_log2(len(phases[1][0]) + len(phases[2][0]))
            header = Header(self.prefix, height, width, plan.image_step, lanes, level_table)
            groups.setdefault(lanes, []).append((t, header, phases, escapes))
        for lanes, members in groups.items():
            by_phase = [[m[2][p] for m in members] for p in range(3)]
            payloads = entropy.encode(self.model.tables, by_phase, 1 << lanes)
            for (t, header, _, escapes), payload in zip(members, payloads, strict=True):
                streams[t] = header.pack() + payload + escapes
        return [streams[t] for t in range(len(plans))]

    # ---------------------------------------------------------------- decoding

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
            elif header.level_table >= self.model.level_tables:
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
        tables = self.model.tables
        config = self.model.networks.config
        headers = [h for _, h, _ in members]
        decoder = entropy.Decoder(tables, [p for _, _, p in members], lanes)

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
            self._z_index(h.image_step, grid(a, HYPER_STRIDE), grid(b, HYPER_STRIDE))
            for h, (a, b) in zip(headers, shapes, strict=True)
        ]
        z_coded = decoder.decode([i[i >= FIRST_CODED_SCALE] for i in z_index])
        z_scattered = []
        for index, coded in zip(z_index, z_coded, strict=True):
            z = np.zeros(index.shape, np.int64)
            z[index >= FIRST_CODED_SCALE] = coded
            z_scattered.append(z)
        # hyper-latents never escape, so scales can be had before the escapes are read
        q_index = each(
            lambda t: self._q_index(z_scattered[t], headers[t].image_step, levels[t])[
                :, : shapes[t][0], : shapes[t][1]
            ],
            range(len(members)),
            self.model.device,
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
            q = np.zeros((config.latents, *index.shape[1:]), np.int64)
            q[index >= FIRST_CODED_SCALE] = coded
            out.append(Symbols(h.height, h.width, h.image_step, level, z, q))
        return out

    def synthesise(
        self, tiles: Sequence[Symbols], steps: int = 0, seeds: Sequence[int] | None = None
    ) -> list[NDArray[np.uint8]]:
        """Return the pixels of tiles, uint8 (height, width, 3).

        What a tile looks like depends neither on its company nor on the number of threads.

        Args:
            steps: 0 for the deterministic decoder, else denoising steps.
            seeds: of the tiles' noise; zeros if left out.

        Raises:
            ModelError: steps are asked for and the model has no denoiser.
        """
        if steps:
            self.model.denoiser()  # loaded here, not by several threads
        seeds = seeds or [0] * len(tiles)
        work = list(zip(tiles, seeds, strict=True))
        return each(lambda tile: self._synthesise(tile[0], steps, tile[1]), work, self.model.device)

    @torch.no_grad()
    def _synthesise(self, symbols: Symbols, steps: int, seed: int) -> NDArray[np.uint8]:
        if not symbols.height or not symbols.width:
            return np.zeros((symbols.height, symbols.width, 3), np.uint8)
        networks, device = self.model.networks, self.model.device
        h, w = symbols.q.shape[1:]
        z = torch.from_numpy(symbols.z)[None].to(device, self.dtype)
        step = torch.tensor([symbols.image_step], device=device)
        mean = networks.h_mean(z, step)[:, :, :h, :w]
        exponent = torch.from_numpy(self._exponent(symbols.image_step, symbols.levels, h, w))
        exponent = exponent.to(device)[None]
        q = torch.from_numpy(symbols.q)[None].to(device, self.dtype)
        y_hat = mean + step_size(exponent).to(self.dtype) * q
        x = networks.g_s(y_hat, exponent)
        if steps:
            from archive_pipeline.pcdc.denoiser import sample  # diffusers takes seconds

            x = sample(self.model.denoiser(), y_hat, exponent, x, steps, seed)
        x = x[0, :, : symbols.height, : symbols.width]
        pixels = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)  # + 127.5, and halves round up
        return pixels.permute(1, 2, 0).contiguous().cpu().numpy()

    def decode(
        self, streams: list[bytes], max_height: int, max_width: int, steps: int = 0, seed: int = 0
    ) -> list[NDArray[np.uint8]]:
        """Decode streams to uint8 (height, width, 3) tiles.

        Args:
            steps: 0 for the deterministic decoder, else denoising steps; their noise depends on
                `seed` and each tile's stream only.

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
        return self.synthesise(tiles, steps, [tile_seed(s, seed) for s in streams])

    # ------------------------------------------------- what both sides compute

    def _z_index(self, image_step: int, height: int, width: int) -> NDArray[np.int64]:
        with torch.no_grad():
            index = self.model.networks.prior(torch.tensor([image_step], device=self.model.device))
        column = index[0].cpu().numpy().astype(np.int64)
        return np.broadcast_to(column[:, None, None], (len(column), height, width))

    def level_map_bits(self, levels: NDArray[np.uint8]) -> float:
        """Bits that a tile's levels (B_h, B_w) take in its stream."""
        return float(self.level_table_bits(residuals_from_levels(levels).reshape(-1)).min())

    def level_table_bits(self, residuals: NDArray[np.int64]) -> NDArray[np.float64]:
        """Bits that residuals of levels (n,) take under each of the model's level tables."""
        tables = self.model.tables
        start = tables.start[SCALE_COUNT : SCALE_COUNT + self.model.level_tables]
        bits: NDArray[np.float64] = tables.bits[start[:, None] + residuals].sum(1)
        return bits

    def _q_index(
        self, z: NDArray[np.int64], image_step: int, levels: NDArray[np.uint8] | None
    ) -> NDArray[np.int64]:
        """Scale indices (M, 4 z_h, 4 z_w) int64, shifted by the levels and clamped if given."""
        device = self.model.device
        index = self.model.networks.h_scale.indices(
            torch.from_numpy(np.ascontiguousarray(z))[None].to(device),
            torch.tensor([image_step], device=device),
        )
        base = index[0].cpu().numpy().astype(np.int64)
        if levels is None:
            return base
        offsets = self._exponent(0, levels, *base.shape[1:])
        h, w = offsets.shape[1:]
        base[:, :h, :w] = np.clip(base[:, :h, :w] - offsets, 0, SCALE_COUNT - 1)
        return base

    @staticmethod
    def _exponent(
        image_step: int, levels: NDArray[np.uint8], height: int, width: int
    ) -> NDArray[np.int64]:
        """Step exponents (1, height, width) int64 of a tile's latents."""
        offsets = np.array(LEVEL_OFFSETS)[levels.astype(np.int64) - 1]
        spread = expand_blocks(torch.from_numpy(offsets)[None, None], height, width)
        return image_step + spread[0].numpy()


class Encoding:
    """An image on its way through the encoder: latents of all tiles, costs on demand."""

    def __init__(
        self,
        codec: Codec,
        tiles: list[NDArray[np.uint8]],
        worth: Worth | None = None,
        raised: list[NDArray[np.uint8]] | None = None,
    ) -> None:
        self.codec = codec
        self.tiles = tiles
        self.worth = worth
        self.latents = self.each(self._analyse, tiles)
        # the two image steps last looked at: the plan mostly takes one of them
        self._recent: list[dict[int, _Quantised]] = [{} for _ in tiles]
        grids = [
            (grid(tile.shape[0], BLOCK_SIDE), grid(tile.shape[1], BLOCK_SIDE))
            if tile.size
            else (0, 0)
            for tile in tiles
        ]
        self.allocator = Allocator(
            grids,
            self._tile_bytes,
            self.block_costs,
            codec.level_map_bits,
            self.block_worth if worth else None,
            self.each,
            raised,
        )

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`parallel.each` on the model's device."""
        return each(function, items, self.codec.model.device)

    @torch.no_grad()
    def _analyse(self, tile: NDArray[np.uint8]) -> Tensor | None:
        if not tile.size:
            return None
        codec = self.codec
        x = torch.from_numpy(np.ascontiguousarray(tile)).to(codec.model.device)
        x = x.permute(2, 0, 1)[None].to(codec.dtype) / 127.5 - 1
        return codec.model.networks.g_a(pad_to(x, STRIDE))

    def _quantise(self, t: int, image_step: int) -> _Quantised:
        recent = self._recent[t]
        if image_step not in recent:
            if len(recent) == 2:
                del recent[next(iter(recent))]
            recent[image_step] = self._quantise_anew(t, image_step)
        return recent[image_step]

    @torch.no_grad()
    def _quantise_anew(self, t: int, image_step: int) -> _Quantised:
        """Hyper-latents of a tile and v = (y - mean) / step(g), (M, h, w)."""
        y = self.latents_of(t)
        codec, networks = self.codec, self.codec.model.networks
        step = torch.tensor([image_step], device=y.device)
        h, w = y.shape[-2:]
        z = torch.round(networks.h_a(pad_to(y, HYPER_STRIDE), step))[0].cpu().numpy()
        z_index = codec._z_index(image_step, *z.shape[1:])
        tables = codec.model.tables
        # hyper-latents never escape: they stay one inside their table's ends
        bound = np.minimum(tables.limit(z_index) - 1, HYPER_LIMIT)
        bound = np.where(z_index < FIRST_CODED_SCALE, 0, bound)
        z = np.clip(z.astype(np.int64), -bound, bound)
        mean = networks.h_mean(torch.from_numpy(z)[None].to(y.device, codec.dtype), step)
        v = ((y - mean[..., :h, :w]) / step_size(step)).float()[0].cpu().numpy()
        index = codec._q_index(z, image_step, None)[:, :h, :w].astype(np.int16)
        z_bits = _bits(tables, z_index, z)
        return _Quantised(z, z_index, index, v, float(z_bits.sum()))

    def _round(self, v: NDArray[np.float32], index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Symbols of v: the nearest integers, or those below where that saves bits enough."""
        q = np.clip(np.rint(v), -SYMBOL_LIMIT, SYMBOL_LIMIT).astype(np.int64, order="C")
        q[index < FIRST_CODED_SCALE] = 0
        flat = q.reshape(-1)
        at = np.flatnonzero(flat)
        size, table = np.abs(flat[at]), index.reshape(-1)[at]
        tables = self.codec.model.tables
        limit = tables.limit(table)
        entry = tables.start[table] + limit + np.minimum(size, limit)
        lower = np.abs(v.reshape(-1)[at]) < self.codec.least_kept[entry]
        lower &= size < limit  # an escape's bits depend on more than its table
        at = at[lower]
        flat[at] -= np.sign(flat[at])
        return q

    def _level(
        self, quantised: _Quantised, level: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Scale indices and symbols with all blocks at one level."""
        offset = LEVEL_OFFSETS[level - 1]
        relative = np.float32(math.exp2(offset / STEPS_PER_OCTAVE))
        index = np.clip(quantised.index.astype(np.int64) - offset, 0, SCALE_COUNT - 1)
        return index, self._round(quantised.v / relative, index)

    def _tile_bytes(self, t: int, image_step: int, level: int) -> float:
        if self.latents[t] is None:
            return float(EMPTY_BYTES)
        quantised = self._quantise(t, image_step)
        levels = self.allocator.levels(t, level)
        if (levels == levels[0, 0]).all():
            index, q = self._level(quantised, int(levels[0, 0]))
            map_bits = 0.0
        else:
            index, q = self._planned(t, TilePlan(image_step, levels))
            map_bits = self.codec.level_map_bits(levels)
        bits = float(_bits(self.codec.model.tables, index, q).sum()) + map_bits
        lanes = 1 << entropy.lanes_log2(int((index >= FIRST_CODED_SCALE).sum()) + quantised.z.size)
        fixed = HEADER_BYTES + entropy.STATE_BYTES * lanes + 2
        return fixed + (bits + quantised.z_bits) / 8 * CODER_OVERHEAD

    def block_costs(self, t: int, image_step: int) -> BlockCosts:
        """Exact costs of a tile's blocks at every level."""
        quantised = self._quantise(t, image_step)
        rows, columns = self.allocator.grids[t]
        h, w = quantised.v.shape[1:]
        block = np.arange(h)[:, None] // BLOCK * columns + np.arange(w) // BLOCK
        # most latents are coded at no level at all: they cost nothing but their error
        coded = quantised.index - min(LEVEL_OFFSETS) >= FIRST_CODED_SCALE
        plane = np.where(coded, 0, quantised.v**2).sum(0, dtype=np.float64)
        left_out = np.bincount(block.ravel(), plane.ravel(), rows * columns)
        v, shifted = quantised.v[coded], quantised.index[coded].astype(np.int64)
        block = np.broadcast_to(block, coded.shape)[coded]
        bits, error = [], []
        for offset in LEVEL_OFFSETS:
            relative = np.float32(math.exp2(offset / STEPS_PER_OCTAVE))
            index = np.clip(shifted - offset, 0, SCALE_COUNT - 1)
            q = self._round(v / relative, index)
            taken = _bits(self.codec.model.tables, index, q)
            bits.append(np.bincount(block, taken, rows * columns))
            missed = (v - q.astype(np.float32) * relative) ** 2
            error.append(np.bincount(block, missed, rows * columns) + left_out)
        shape = (len(LEVEL_OFFSETS), rows, columns)
        return BlockCosts(np.reshape(bits, shape), np.reshape(error, shape))

    def block_worth(self, t: int, image_step: int, costs: BlockCosts) -> NDArray[np.float64]:
        """Worth (K, B_h, B_w) of the levels of a tile's blocks, given their costs."""
        assert self.worth is not None
        return self.worth(self.tiles[t], self.latents_of(t), costs, image_step)

    def latents_of(self, t: int) -> Tensor:
        """y (1, M, h, w) of a tile that is not empty."""
        latents = self.latents[t]
        assert latents is not None
        return latents

    def _planned(self, t: int, plan: TilePlan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Scale indices and symbols of a tile's latents, coded as planned."""
        quantised = self._quantise(t, plan.image_step)
        offsets = self.codec._exponent(0, plan.levels, *quantised.index.shape[1:])
        index = np.clip(quantised.index.astype(np.int64) - offsets, 0, SCALE_COUNT - 1)
        relative: NDArray[np.float32] = np.exp2(offsets / STEPS_PER_OCTAVE).astype(np.float32)
        return index, self._round(np.divide(quantised.v, relative), index)

    def reconstruct(self, t: int, plan: TilePlan) -> Symbols:
        """The symbols that decoding a tile, coded as planned, would give."""
        height, width = self.tiles[t].shape[:2]
        _, q = self._planned(t, plan)
        z = self._quantise(t, plan.image_step).z
        return Symbols(height, width, plan.image_step, plan.levels, z, q)

    def symbols(self, t: int, plan: TilePlan) -> tuple[list[tuple[NDArray, NDArray]], int, bytes]:
        """Return the coder's phases, the level table and the escapes of a tile."""
        tables = self.codec.model.tables
        index, q = self._planned(t, plan)
        quantised = self._quantise(t, plan.image_step)
        coded = index >= FIRST_CODED_SCALE
        limit = tables.limit(index[coded])
        values = np.clip(q[coded], -limit, limit)
        beyond = (np.abs(q[coded]) - limit)[np.abs(values) == limit]

        residuals = residuals_from_levels(plan.levels).reshape(-1)
        level_table = int(np.argmin(self.codec.level_table_bits(residuals)))
        z_coded = quantised.z_index >= FIRST_CODED_SCALE
        phases = [
            (np.full(residuals.shape, SCALE_COUNT + level_table), residuals),
            (quantised.z_index[z_coded], quantised.z[z_coded]),
            (index[coded], values),
        ]
        return phases, level_table, entropy.pack_escapes(beyond)


def tile_seed(stream: bytes, seed: int) -> int:
    """Seed of a tile's noise, 0..2^63 - 1: tiles differ, the same tile never does."""
    content = hashlib.sha256(stream).digest()
    return (int.from_bytes(content[:8], "little") + seed) % (1 << 63)


def _bits(
    tables: entropy.Tables, index: NDArray[np.int64], symbols: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Bits of every symbol under its table, escapes included."""
    limit = tables.limit(index)
    size = np.abs(symbols)
    bits = tables.bits[tables.start[index] + limit + np.clip(symbols, -limit, limit)]
    bits[index < FIRST_CODED_SCALE] = 0
    escaped = size >= np.maximum(limit, 1)
    escaped &= index >= FIRST_CODED_SCALE
    if escaped.any():
        beyond = size[escaped] - limit[escaped]
        bits[escaped] += 8 * (1 + (beyond > 127) + (beyond > 16383))
    return bits


def _least_kept(tables: entropy.Tables) -> NDArray[np.float64]:
    """For every entry of the tables the least magnitude that is coded as its symbol.

    Rate-distortion optimised quantisation: a symbol s > 0 costs bits(s) + w (v - s)^2 with w =
    `ERROR_WEIGHT`; below this v, s - 1 costs less. Entries of symbols <= 0 are not asked for.
    """
    count = len(tables.bits)
    table = np.searchsorted(tables.start[1:], np.arange(count), side="right")
    symbol = np.arange(count) - tables.start[table] - tables.zero[table]
    dearer = np.diff(tables.bits, prepend=tables.bits[0])
    return symbol - 0.5 + dearer / (2 * ERROR_WEIGHT)


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
