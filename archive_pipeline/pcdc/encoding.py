"""The encoder: an image's tiles on their way into at most so many bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archive_pipeline.pcdc import entropy
from archive_pipeline.pcdc.allocation import (
    CODER_OVERHEAD,
    Allocator,
    BlockCosts,
    BudgetTooSmall,
    TilePlan,
)
from archive_pipeline.pcdc.bitstream import EMPTY_BYTES, HEADER_BYTES, Header
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.constants import (
    BLOCK,
    BLOCK_SIDE,
    ERROR_WEIGHT,
    FIRST_CODED_SCALE,
    HYPER_LIMIT,
    HYPER_STRIDE,
    LEVEL_OFFSETS,
    MAX_IMAGE_STEP,
    SCALE_COUNT,
    STEPS_PER_OCTAVE,
    STRIDE,
)
from archive_pipeline.pcdc.decoding import Symbols, grid, residuals_from_levels
from archive_pipeline.pcdc.parallel import each
from archive_pipeline.pcdc.transforms import pad_to, step_size

T = TypeVar("T")
R = TypeVar("R")

SYMBOL_LIMIT = 1 << 15
MAX_PASSES = 8  # of planning and coding; nearly always one or two
UNSPENT_SHARE = 0.01  # of the budget, small enough to be left

# At image steps up to here the networks' own error, what g_s(g_a(x)) loses without quantisation, is
# a good part of all error: latents are then corrected for it.
CORRECTED_UP_TO = 25
CORRECTION = 0.9  # of the gradient; g_s is nearly orthonormal, so Newton's step would be about 1

# Error weights that rounding goes on with where even the coarsest step takes too many bits: with
# each of them more symbols become smaller, hyper-latents among them. Below the last, what rounding
# saves in symbols is lost to scales that fit less.
SPARING_WEIGHTS = (8.0, 3.0, 1.0, 0.3)


# Worth of a tile's levels (K, B_h, B_w) from its pixels, its latents y (1, M, h, w), the blocks'
# costs and the image step, in a unit that does not depend on the step.
Worth = Callable[[NDArray[np.uint8], Tensor, BlockCosts, int], NDArray[np.float64]]


def least_error(
    tile: NDArray[np.uint8], latents: Tensor, costs: BlockCosts, image_step: int
) -> NDArray[np.float64]:
    """The worth of levels (K, B_h, B_w) that makes for the least squared error at a rate."""
    return -costs.error * math.exp2(2 * image_step / STEPS_PER_OCTAVE)


def encode_tiles(
    codec: Codec,
    tiles: list[NDArray[np.uint8]],
    budget: int,
    worth: Worth | None = None,
    raised: list[NDArray[np.uint8]] | None = None,
    strict: bool = True,
) -> list[bytes]:
    """Encode an image's tiles, uint8 (height, width, 3), into at most `budget` bytes in all.

    Args:
        worth: what decides between the levels of blocks; None treats them all alike.
        raised: (B_h, B_w) for every tile, how many levels its blocks are above the others;
            only without `worth`.
        strict: whether a budget that cannot be kept is an error; else the coarsest coding is
            returned, whatever it takes.

    Raises:
        BudgetTooSmall: even the coarsest coding takes more; with raised blocks, even the coarsest
            step.
    """
    job = Encoding(codec, tiles, worth, raised)
    if raised is not None:
        return job.within(budget)
    return job.sparing(budget, strict)


@dataclass
class _Quantised:
    """A tile at one image step: hyper-latents, and what latents are coded against.

    Most latents are too small to be coded at any level; of the n others there are

    Attributes:
        place: (M, h, w) bool, which ones they are; they are kept in this array's order.
        index: (n,) int64 scale indices, not yet shifted by a level nor clamped.
        v: (n,) float32, (y - mean) / step(g).
        left_out: (h, w) float64, sums of v^2 of those that are not coded.
    """

    z: NDArray[np.int64]
    z_index: NDArray[np.int64]
    z_bits: float
    place: NDArray[np.bool_]
    index: NDArray[np.int64]
    v: NDArray[np.float32]
    left_out: NDArray[np.float64]

    def of_columns(self, plane: NDArray[np.int64]) -> NDArray[np.int64]:
        """The values (n,) that a plane of h x w has where the latents are."""
        return np.broadcast_to(plane, self.place.shape)[self.place]


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
        self._error_weight = ERROR_WEIGHT
        self._least_kept = least_kept(codec.model.tables, ERROR_WEIGHT)
        self._corrected = False
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

    def within(self, budget: int) -> list[bytes]:
        """The streams of all tiles, of at most `budget` bytes in all.

        Raises:
            BudgetTooSmall: even the coarsest coding takes more.
        """
        allowed, best = float(budget), None
        for _ in range(MAX_PASSES):
            try:
                streams = self.streams(self._plan(allowed))
            except BudgetTooSmall as error:
                if best is not None:
                    return best
                raise BudgetTooSmall(budget, max(error.needed, budget + 1)) from error
            unspent = budget - _total(streams)
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
                allowed += unspent - len(self.tiles)
        if best is None:
            raise BudgetTooSmall(budget, budget - unspent)
        return best

    def sparing(self, budget: int, strict: bool = True) -> list[bytes]:
        """As `within`; where even the coarsest step takes more, symbols are rounded down further.

        Args:
            strict: whether what still takes more is an error.

        Raises:
            BudgetTooSmall: even the coarsest coding takes more.
        """
        with suppress(BudgetTooSmall):
            return self.within(budget)
        fewest = self._coarsest()
        for weight in SPARING_WEIGHTS:
            self._set_error_weight(weight)
            with suppress(BudgetTooSmall):
                return self.within(budget)
            fewest = min(fewest, self._coarsest(), key=_total)
        if strict and _total(fewest) > budget:
            raise BudgetTooSmall(budget, _total(fewest))
        return fewest

    def _coarsest(self) -> list[bytes]:
        """The streams of all tiles at the coarsest step and level."""
        levels = (np.ones(grid, np.uint8) for grid in self.allocator.grids)
        return self.streams([TilePlan(MAX_IMAGE_STEP, part) for part in levels])

    def _set_error_weight(self, weight: float) -> None:
        """Round symbols with another weight of error against bits from now on."""
        self._error_weight = weight
        self._least_kept = least_kept(self.codec.model.tables, weight)
        self._recent = [{} for _ in self.tiles]
        self.allocator.forget(range(len(self.tiles)))

    def _plan(self, budget: float) -> list[TilePlan]:
        """A plan for every tile; at fine steps, of latents that are corrected for it first.

        Raises:
            BudgetTooSmall: even the coarsest coding takes more.
        """
        plans = self.allocator.plan(budget)
        fine = [
            t
            for t, plan in enumerate(plans)
            if plan.image_step <= CORRECTED_UP_TO and self.tiles[t].size
        ]
        if self._corrected or not fine:
            return plans
        self._corrected = True
        for t, y in zip(fine, self.each(lambda t: self._correct(t, plans[t]), fine), strict=True):
            self.latents[t] = y
            self._recent[t] = {}
        self.allocator.forget(fine)
        return self.allocator.plan(budget)

    def streams(self, plans: list[TilePlan]) -> list[bytes]:
        """The streams of all tiles, coded as planned."""
        codec = self.codec
        streams: dict[int, bytes] = {}
        groups: dict[int, list[tuple[int, Header, list[tuple[NDArray, NDArray]], bytes]]] = {}
        coded = self.each(
            lambda t: self._phases(t, plans[t]) if self.tiles[t].size else None, range(len(plans))
        )
        for t, (plan, phased) in enumerate(zip(plans, coded, strict=True)):
            if phased is None:
                streams[t] = Header(codec.prefix, 0, 0).pack()
                continue
            height, width = self.tiles[t].shape[:2]
            phases, level_table, escapes = phased
            lanes = entropy.lanes_log2(len(phases[1][0]) + len(phases[2][0]))
            header = Header(codec.prefix, height, width, plan.image_step, lanes, level_table)
            groups.setdefault(lanes, []).append((t, header, phases, escapes))
        for lanes, members in groups.items():
            by_phase = [[m[2][p] for m in members] for p in range(3)]
            payloads = entropy.encode(codec.model.tables, by_phase, 1 << lanes)
            for (t, header, _, escapes), payload in zip(members, payloads, strict=True):
                streams[t] = header.pack() + payload + escapes
        return [streams[t] for t in range(len(plans))]

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`parallel.each` on the model's device."""
        return each(function, items, self.codec.model.device)

    def _pixels(self, tile: NDArray[np.uint8]) -> Tensor:
        """A tile (1, 3, H, W) in -1..1, its border repeated up to a multiple of 16."""
        # PyTorch warns of memory that it may not write to
        x = torch.from_numpy(np.require(tile, requirements=["C", "W"]))
        x = x.to(self.codec.model.device).permute(2, 0, 1)[None].to(self.codec.dtype)
        return pad_to(x / 127.5 - 1, STRIDE)

    @torch.no_grad()
    def _analyse(self, tile: NDArray[np.uint8]) -> Tensor | None:
        return self.codec.model.networks.g_a(self._pixels(tile)) if tile.size else None

    def _correct(self, t: int, plan: TilePlan) -> Tensor:
        """Latents of a tile, not empty, after a step down the gradient of what g_s makes of them.

        That is of half the squared error in 8-bit pixels, without quantisation.
        """
        x, y = self._pixels(self.tiles[t]), self.latents_of(t).detach().requires_grad_()
        exponent = self.codec.exponents(plan.image_step, plan.levels, *y.shape[-2:])
        with torch.enable_grad():
            x_bar = self.codec.model.networks.g_s(y, torch.from_numpy(exponent).to(y.device)[None])
            error = (x_bar - x) * 127.5
            [gradient] = torch.autograd.grad(error.square().sum() / 2, y)
        return y.detach() - CORRECTION * gradient

    def _quantise(self, t: int, image_step: int) -> _Quantised:
        recent = self._recent[t]
        if image_step not in recent:
            if len(recent) == 2:
                del recent[next(iter(recent))]
            recent[image_step] = self._quantise_anew(t, image_step)
        return recent[image_step]

    @torch.no_grad()
    def _quantise_anew(self, t: int, image_step: int) -> _Quantised:
        """Hyper-latents of a tile, and its latents against the means that these predict."""
        y = self.latents_of(t)
        codec, networks = self.codec, self.codec.model.networks
        step = torch.tensor([image_step], device=y.device)
        h, w = y.shape[-2:]
        exact = networks.h_a(pad_to(y, HYPER_STRIDE), step)[0].cpu()
        z_index = codec.z_index(image_step, *exact.shape[1:])
        tables = codec.model.tables
        if self._error_weight < ERROR_WEIGHT:
            z = self._round(exact.float().numpy(), z_index)
        else:
            z = torch.round(exact).numpy().astype(np.int64)
        # hyper-latents never escape: they stay one inside their table's ends
        bound = np.minimum(tables.limit(z_index) - 1, HYPER_LIMIT)
        bound = np.where(z_index < FIRST_CODED_SCALE, 0, bound)
        z = np.clip(z, -bound, bound)
        mean = networks.h_mean(torch.from_numpy(z)[None].to(y.device, codec.dtype), step)
        v = ((y - mean[..., :h, :w]) / step_size(step)).float()[0].cpu().numpy()
        index = codec.q_index(z, image_step, None)[:, :h, :w]
        z_bits = float(_bits(tables, z_index, z).sum())
        place = index - min(LEVEL_OFFSETS) >= FIRST_CODED_SCALE
        left_out = np.where(place, 0, v**2).sum(0, dtype=np.float64)
        return _Quantised(z, z_index, z_bits, place, index[place], v[place], left_out)

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
        lower = np.abs(v.reshape(-1)[at]) < self._least_kept[entry]
        lower &= size < limit  # an escape's bits depend on more than its table
        at = at[lower]
        flat[at] -= np.sign(flat[at])
        return q

    def _symbols(
        self, quantised: _Quantised, offset: int | NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Scale indices and symbols (n,) at level offsets, one for all or one for each."""
        index = np.clip(quantised.index - offset, 0, SCALE_COUNT - 1)
        relative = np.exp2(np.divide(offset, STEPS_PER_OCTAVE)).astype(np.float32)
        return index, self._round(quantised.v / relative, index)

    def _tile_bytes(self, t: int, image_step: int, level: int) -> float:
        if self.latents[t] is None:
            return float(EMPTY_BYTES)
        quantised = self._quantise(t, image_step)
        levels = self.allocator.levels(t, level)
        if (levels == levels[0, 0]).all():
            index, q = self._symbols(quantised, LEVEL_OFFSETS[levels[0, 0] - 1])
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
        h, w = quantised.place.shape[1:]
        block = np.arange(h)[:, None] // BLOCK * columns + np.arange(w) // BLOCK
        left_out = np.bincount(block.ravel(), quantised.left_out.ravel(), rows * columns)
        block = quantised.of_columns(block)
        bits, error = [], []
        for offset in LEVEL_OFFSETS:
            index, q = self._symbols(quantised, offset)
            taken = _bits(self.codec.model.tables, index, q)
            bits.append(np.bincount(block, taken, rows * columns))
            step = np.float32(math.exp2(offset / STEPS_PER_OCTAVE))
            missed = (quantised.v - q.astype(np.float32) * step) ** 2
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
        """Scale indices and symbols (n,) of a tile's latents, coded as planned."""
        quantised = self._quantise(t, plan.image_step)
        offsets = self.codec.exponents(0, plan.levels, *quantised.place.shape[1:])
        return self._symbols(quantised, quantised.of_columns(offsets))

    def reconstruct(self, t: int, plan: TilePlan) -> Symbols:
        """The symbols that decoding a tile, coded as planned, would give."""
        height, width = self.tiles[t].shape[:2]
        quantised = self._quantise(t, plan.image_step)
        q = np.zeros(quantised.place.shape, np.int64)
        q[quantised.place] = self._planned(t, plan)[1]
        return Symbols(height, width, plan.image_step, plan.levels, quantised.z, q)

    def _phases(self, t: int, plan: TilePlan) -> tuple[list[tuple[NDArray, NDArray]], int, bytes]:
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


def _total(streams: list[bytes]) -> int:
    return sum(map(len, streams))


def least_kept(tables: entropy.Tables, error_weight: float) -> NDArray[np.float64]:
    """For every entry of the tables the least magnitude that is coded as its symbol.

    Rate-distortion optimised quantisation: a symbol s > 0 costs bits(s) + w (v - s)^2 with w =
    `error_weight`; below this v, s - 1 costs less. Entries of symbols <= 0 are not asked for.
    """
    count = len(tables.bits)
    table = np.searchsorted(tables.start[1:], np.arange(count), side="right")
    symbol = np.arange(count) - tables.start[table] - tables.zero[table]
    dearer = np.diff(tables.bits, prepend=tables.bits[0])
    return symbol - 0.5 + dearer / (2 * error_weight)
