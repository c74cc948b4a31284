"""The encoder: an image's tiles on their way into at most so many bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
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
from archive_pipeline.pcdc.codec import Codec, joined
from archive_pipeline.pcdc.constants import (
    BASE_LEVEL,
    BLOCK_SIDE,
    FIRST_CODED_SCALE,
    LEVEL_OFFSETS,
    MAX_IMAGE_STEP,
    SCALE_COUNT,
    STEPS_PER_OCTAVE,
    STRIDE,
)
from archive_pipeline.pcdc.decoding import Symbols, grid, residuals_from_levels
from archive_pipeline.pcdc.ladder import EXPONENTS
from archive_pipeline.pcdc.quantiser import Coded, Quantised, Rounding, expected_bytes, quantise
from archive_pipeline.pcdc.transforms import pad_to

T = TypeVar("T")
R = TypeVar("R")

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


# Table indices and symbols of one of the coder's phases; all of a tile's, its level table, its
# escapes.
Phase = tuple[NDArray, NDArray]
Phases = tuple[list[Phase], int, bytes]

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
        self.latents = self._batched(self._analyse, range(len(tiles)))
        self.rounding = Rounding(codec.model.tables)
        self._corrected: set[int] | None = None  # tiles, once a plan was asked for
        # of every tile the symbols last looked at, by image step and levels: a plan takes one of
        # them; and what blocks were last valued with
        self._coded: list[dict[tuple[int, bytes], Coded]] = [{} for _ in tiles]
        self._quantised: list[tuple[int, Quantised] | None] = [None] * len(tiles)
        grids = [
            (grid(tile.shape[0], BLOCK_SIDE), grid(tile.shape[1], BLOCK_SIDE))
            if tile.size
            else (0, 0)
            for tile in tiles
        ]
        self.allocator = Allocator(
            grids,
            self.tile_bytes,
            self.block_costs,
            codec.level_map_bits,
            self.block_worth if worth else None,
            self.each,
            raised,
            np.reshape(self.each(self._expected, self.latents), (len(tiles), len(EXPONENTS))).T,
        )

    def within(self, budget: int) -> list[bytes]:
        """The streams of all tiles, of at most `budget` bytes in all.

        Raises:
            BudgetTooSmall: even the coarsest coding takes more.
        """
        allowed, best = float(budget), None
        for _ in range(MAX_PASSES):
            try:
                streams = self.streams(self.plan(allowed))
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
        self.rounding = Rounding(self.codec.model.tables, weight)
        self._forget(range(len(self.tiles)))

    def _forget(self, tiles: Iterable[int]) -> None:
        """Quantise tiles anew: something about them has changed."""
        for t in tiles:
            self._coded[t], self._quantised[t] = {}, None
        self.allocator.forget(tiles)

    def plan(self, budget: float) -> list[TilePlan]:
        """A plan for every tile; at fine steps, of latents that are corrected for it first.

        Raises:
            BudgetTooSmall: even the coarsest coding takes more.
        """
        if self._corrected is None:
            self._corrected = set()
            step = self.allocator.likely_step(budget)
            if step <= CORRECTED_UP_TO:
                levels = (self.allocator.levels(t, BASE_LEVEL) for t in range(len(self.tiles)))
                self._correct_all([TilePlan(step, part) for part in levels])
        plans = self.allocator.plan(budget)
        while self._correct_all(plans):
            plans = self.allocator.plan(budget)
        return plans

    def _correct_all(self, plans: list[TilePlan]) -> bool:
        """Correct latents of tiles that are planned at fine steps; whether there were any left."""
        assert self._corrected is not None
        fine = [
            t
            for t, plan in enumerate(plans)
            if plan.image_step <= CORRECTED_UP_TO
            and self.latents[t] is not None
            and t not in self._corrected
        ]
        corrected = self._batched(lambda at: self._correct(at, [plans[t] for t in at]), fine)
        for t, y in zip(fine, corrected, strict=True):
            self.latents[t] = y
        self._corrected.update(fine)
        self._forget(fine)
        return bool(fine)

    def streams_at(self, image_step: int) -> list[bytes]:
        """The streams of all tiles at an image step, 8..55, with all blocks at the base level."""
        levels = (self.allocator.levels(t, BASE_LEVEL) for t in range(len(self.tiles)))
        plans = [TilePlan(image_step, part) for part in levels]
        self._corrected = self._corrected or set()
        self._correct_all(plans)
        return self.streams(plans)

    def streams(self, plans: list[TilePlan]) -> list[bytes]:
        """The streams of all tiles, coded as planned."""
        codec = self.codec
        streams: dict[int, bytes] = {}
        groups: dict[int, list[tuple[int, Header, list[Phase], bytes]]] = {}
        coded = self._batched(
            lambda at: self._phases(at, [plans[t] for t in at]), range(len(plans))
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
        return self.codec.each(function, items)

    def _batched(self, function: Callable[[list[int]], list[R]], tiles: Sequence[int]) -> list[R]:
        """Results for tiles of a function that takes several of one size at once."""
        return self.codec.each_batch(function, tiles, self._size)

    def _size(self, t: int) -> tuple[int, int]:
        height, width = self.tiles[t].shape[:2]
        return height, width

    def _pixels(self, tiles: list[int]) -> Tensor:
        """Tiles (n, 3, H, W) in -1..1, their borders repeated up to a multiple of 16."""
        x = self.codec.to_device([self.tiles[t] for t in tiles]).permute(0, 3, 1, 2)
        return pad_to(x.to(self.codec.dtype) / 127.5 - 1, STRIDE)

    @torch.no_grad()
    def _analyse(self, tiles: list[int]) -> list[Tensor | None]:
        if not self.tiles[tiles[0]].size:
            return [None] * len(tiles)
        return [*self.codec.analyse(self._pixels(tiles)).split(1)]

    def _correct(self, tiles: list[int], plans: list[TilePlan]) -> list[Tensor]:
        """Latents of tiles, none empty, after a step down the gradient of what g_s makes of them.

        That is of half the squared error in 8-bit pixels, without quantisation.
        """
        x = self._pixels(tiles)
        y = joined([self.latents_of(t) for t in tiles]).detach().requires_grad_()
        exponent = self.codec.to_device(
            [self.codec.exponents(plan.image_step, plan.levels, *y.shape[-2:]) for plan in plans]
        )
        with torch.enable_grad():
            x_bar = self.codec.model.networks.g_s(y, exponent)
            error = (x_bar - x) * 127.5
            [gradient] = torch.autograd.grad(error.square().sum() / 2, y)
        return [*(y.detach() - CORRECTION * gradient).split(1)]

    def _expected(self, y: Tensor | None) -> NDArray[np.float64]:
        """About the bytes of a tile on each rung of the allocator's ladder."""
        if y is None:
            return np.full(len(EXPONENTS), float(EMPTY_BYTES))
        return HEADER_BYTES + entropy.STATE_BYTES + expected_bytes(y, EXPONENTS)

    def quantised(self, tiles: Sequence[tuple[int, int]]) -> list[Quantised]:
        """Tiles of one size, none empty, at (tile, image step)."""
        at = {}
        for t, step in tiles:
            known = self._quantised[t]
            if known is not None and known[0] == step:
                at[t, step] = known[1]
        missing = [key for key in tiles if key not in at]
        if missing:
            latents = [self.latents_of(t) for t, _ in missing]
            made = quantise(self.codec, latents, [g for _, g in missing], self.rounding)
            at.update(zip(missing, made, strict=True))
            if self.worth is not None:  # blocks will be valued
                for (t, g), found in zip(missing, made, strict=True):
                    self._quantised[t] = g, found
        return [at[key] for key in tiles]

    def coded(self, t: int, plan: TilePlan) -> Coded:
        """The symbols of a tile, not empty, coded as planned."""
        [coded] = self._coded_all([t], [plan])
        return coded

    def _coded_all(self, tiles: list[int], plans: list[TilePlan]) -> list[Coded]:
        """The symbols of tiles of one size, none empty, coded as planned."""
        keys = [(plan.image_step, plan.levels.tobytes()) for plan in plans]
        missing = [k for k, t in enumerate(tiles) if keys[k] not in self._coded[t]]
        quantised = self.quantised([(tiles[k], plans[k].image_step) for k in missing])
        for k, found in zip(missing, quantised, strict=True):
            recent, levels = self._coded[tiles[k]], plans[k].levels
            offset: int | NDArray[np.int64] = LEVEL_OFFSETS[levels[0, 0] - 1]
            if (levels != levels[0, 0]).any():
                [offset] = self.codec.exponents(0, levels, *found.v.shape[1:])
            if len(recent) == 2:
                del recent[next(iter(recent))]
            recent[keys[k]] = found.symbols(self.rounding, offset)
        return [self._coded[t][key] for t, key in zip(tiles, keys, strict=True)]

    def tile_bytes(self, tiles: list[tuple[int, int, int]]) -> list[float]:
        """About the bytes, rather more, of tiles at (tile, image step, level of all blocks)."""
        return self.codec.each_batch(self._tile_bytes, tiles, lambda key: self._size(key[0]))

    def _tile_bytes(self, tiles: list[tuple[int, int, int]]) -> list[float]:
        if not self.tiles[tiles[0][0]].size:
            return [float(EMPTY_BYTES)] * len(tiles)
        plans = [TilePlan(step, self.allocator.levels(t, level)) for t, step, level in tiles]
        coded = self._coded_all([t for t, _, _ in tiles], plans)
        return [self._bytes(one, plan.levels) for one, plan in zip(coded, plans, strict=True)]

    def _bytes(self, coded: Coded, levels: NDArray[np.uint8]) -> float:
        """Upper bound of a tile's stored bytes."""
        bits = coded.bits
        if (levels != levels[0, 0]).any():
            bits += self.codec.level_map_bits(levels)
        lanes = 1 << entropy.lanes_log2(len(coded.q) + coded.z.size)
        return HEADER_BYTES + entropy.STATE_BYTES * lanes + 2 + bits / 8 * CODER_OVERHEAD

    def block_costs(self, t: int, image_step: int) -> BlockCosts:
        """Exact costs of a tile's blocks at every level."""
        [quantised] = self.quantised([(t, image_step)])
        self._quantised[t] = image_step, quantised  # its levels are about to be chosen
        return quantised.block_costs(self.rounding)

    def block_worth(self, t: int, image_step: int, costs: BlockCosts) -> NDArray[np.float64]:
        """Worth (K, B_h, B_w) of the levels of a tile's blocks, given their costs."""
        assert self.worth is not None
        return self.worth(self.tiles[t], self.latents_of(t), costs, image_step)

    def latents_of(self, t: int) -> Tensor:
        """y (1, M, h, w) of a tile that is not empty."""
        latents = self.latents[t]
        assert latents is not None
        return latents

    def reconstruct(self, t: int, plan: TilePlan) -> Symbols:
        """The symbols that decoding a tile, coded as planned, would give."""
        height, width = self.tiles[t].shape[:2]
        coded = self.coded(t, plan)
        q = np.zeros(self.latents_of(t).shape[1:], np.int64)
        q.reshape(-1)[coded.place] = coded.q
        return Symbols(height, width, plan.image_step, plan.levels, coded.z, q)

    def _phases(self, tiles: list[int], plans: list[TilePlan]) -> list[Phases | None]:
        """What the coder is given of tiles of one size; None for empty ones."""
        if not self.tiles[tiles[0]].size:
            return [None] * len(tiles)
        coded = self._coded_all(tiles, plans)
        return [self._phases_of(*each) for each in zip(coded, plans, strict=True)]

    def _phases_of(self, coded: Coded, plan: TilePlan) -> Phases:
        limit = self.codec.model.tables.limits.take(coded.index)
        values = np.clip(coded.q, -limit, limit)
        escaped = np.flatnonzero(np.abs(values) == limit)
        beyond = np.abs(coded.q[escaped]) - limit[escaped]

        residuals = residuals_from_levels(plan.levels).reshape(-1)
        level_table = int(np.argmin(self.codec.level_table_bits(residuals)))
        z_coded = coded.z_index >= FIRST_CODED_SCALE
        phases: list[Phase] = [
            (np.full(residuals.shape, SCALE_COUNT + level_table), residuals),
            (coded.z_index[z_coded], coded.z[z_coded]),
            (coded.index, values),
        ]
        return phases, level_table, entropy.pack_escapes(beyond)


def _total(streams: list[bytes]) -> int:
    return sum(map(len, streams))
