"""Spreading a hard bit budget over an image's tiles and blocks.

First comes the finest image step at which all tiles fit with every block at the base level. Then

- `uniform` leaves all blocks there, and fills the budget up in ever finer grains: tiles one step
  finer (an eighth of an octave), those that gain most first; blocks of one more tile one level
  up, those first that remove most error a bit. Blocks may be marked to be so many levels finer
  than all others, as those with objects in them are;
- `greedy` and `policy` begin with those steps of tiles and choose each block's level by what it is
  worth against what it costs: with a price of bits common to the whole image, the level of the
  largest worth - price * bits. The price is the lowest at which the image fits, and what is left
  goes to single blocks, those first that were nearest to a higher level. Worth is the squared
  error removed (greedy: the optimum of rate and distortion for separable costs), or what the
  policy says. Where levels so chosen are worth no more than the uniform ones, these stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.pcdc.constants import (
    BASE_LEVEL,
    LEVEL_OFFSETS,
    MAX_IMAGE_STEP,
    MIN_IMAGE_STEP,
)

LEVELS = len(LEVEL_OFFSETS)
ALLOCATIONS = ("policy", "greedy", "uniform")
# sinh of +-LAST_PRICE: between these prices any budget is met that levels can meet at all. Below
# zero, levels are taken for their bits alone: what a policy thinks worthless is still in the budget
LAST_PRICE = 25.0
PRICE_ROUNDS = 45
# levels are chosen again with room for the map that they took, and a little more: maps vary
MAP_ROUNDS = 4
MAP_SLACK = 1.02
# rANS spends a little more than the tables' entropy: rounding of a state, words, escapes
CODER_OVERHEAD = 1.0005
PROBE_EVERY = 8  # the image step is first looked for on every so many tiles


class BudgetTooSmall(ValueError):
    """Even the coarsest coding does not fit; `needed` is the number of bytes that it takes."""

    def __init__(self, budget: int, needed: int) -> None:
        super().__init__(f"needs {needed} bytes at the coarsest, {budget} are allowed")
        self.needed = needed


@dataclass(frozen=True)
class TilePlan:
    """How a tile is quantised: image step 8..55 and levels uint8 (B_h, B_w) in 1..5."""

    image_step: int
    levels: NDArray[np.uint8]


@dataclass(frozen=True)
class BlockCosts:
    """Costs of coding a tile's blocks at each level.

    Attributes:
        bits: (K, B_h, B_w) float64, R_b(beta) of the paper's equation (4).
        error: (K, B_h, B_w) float64, squared quantisation error of the latents.
    """

    bits: NDArray[np.float64]
    error: NDArray[np.float64]


class Allocator:
    """Fits plans to a budget.

    Attributes:
        price: of bits, in worth, at which the last plan met its budget; None where blocks were
            not valued.

    Args:
        grids: (B_h, B_w) of every tile.
        tile_bytes: upper bound of a tile's stored bytes at (tile, image step, level).
        block_costs: costs of all levels at (tile, image step).
        map_bits: bits that a tile's level map takes.
        worth: (K, B_h, B_w) worth of each level at (tile, image step, its costs), in a unit that
            all steps share; None allocates uniformly.
        each: results of a function for every tile; it may run them side by side.
        raised: uint8 (B_h, B_w) of every tile, levels by which its blocks are above the others
            where all are else alike; None for none. `tile_bytes` counts them.
    """

    def __init__(
        self,
        grids: list[tuple[int, int]],
        tile_bytes: Callable[[int, int, int], float],
        block_costs: Callable[[int, int], BlockCosts],
        map_bits: Callable[[NDArray[np.uint8]], float],
        worth: Callable[[int, int, BlockCosts], NDArray[np.float64]] | None,
        each: Callable[[Callable[[int], Any], Iterable[int]], list[Any]],
        raised: list[NDArray[np.uint8]] | None = None,
    ) -> None:
        self.grids = grids
        self._tile_bytes = tile_bytes
        self._block_costs = block_costs
        self._map_bits = map_bits
        self._worth = worth
        self._each = each
        self._raised = raised
        self.price: float | None = None
        self._cache: dict[tuple[int, int, int], float] = {}

    def forget(self, tiles: Iterable[int]) -> None:
        """Ask anew for what tiles cost: something about them has changed."""
        changed = set(tiles)
        self._cache = {key: cost for key, cost in self._cache.items() if key[0] not in changed}

    def _bytes(self, tile: int, step: int, level: int = BASE_LEVEL) -> float:
        key = (tile, step, level)
        if key not in self._cache:
            self._cache[key] = self._tile_bytes(tile, step, level)
        return self._cache[key]

    def _total(self, step: int, tiles: range, level: int = BASE_LEVEL) -> float:
        return sum(self._all_bytes(step, tiles, level))

    def _all_bytes(self, step: int, tiles: range, level: int) -> list[float]:
        missing = [t for t in tiles if (t, step, level) not in self._cache]
        self._each(lambda t: self._bytes(t, step, level), missing)
        return [self._bytes(t, step, level) for t in tiles]

    def _finest(self, budget: float, tiles: range, low: int, high: int) -> int:
        """Smallest step in low..high at which `tiles` fit, supposing that `high` fits."""
        while low < high:
            middle = (low + high) // 2
            if self._total(middle, tiles) <= budget:
                high = middle
            else:
                low = middle + 1
        return high

    def levels(self, tile: int, level: int) -> NDArray[np.uint8]:
        """Levels (B_h, B_w) of a tile with all blocks at one level, but for those raised."""
        levels = np.full(self.grids[tile], level, np.uint8)
        return levels if self._raised is None else np.minimum(levels + self._raised[tile], LEVELS)

    def plan(self, budget: float) -> list[TilePlan]:
        """Return a plan for every tile whose bytes, as estimated, add up to at most `budget`.

        Raises:
            BudgetTooSmall: level 1 at the coarsest step exceeds it.
        """
        step, level, spare = self._alike(budget)
        self.price = None
        uniform = self._uniform(step, level, spare)
        return uniform if self._worth is None else self._priced(budget, uniform)

    def _alike(self, budget: float) -> tuple[int, int, float]:
        """The finest step and level at which all blocks fit alike, and the bytes to spare.

        The level is the base level, unless steps end before the budget does.

        Raises:
            BudgetTooSmall: level 1 at the coarsest step exceeds it.
        """
        tiles = range(len(self.grids))
        level = BASE_LEVEL
        probe = tiles[::PROBE_EVERY]
        share = budget * sum(self.grids[t][0] * self.grids[t][1] for t in probe)
        share /= max(1, sum(h * w for h, w in self.grids))
        step = self._finest(share, probe, MIN_IMAGE_STEP, MAX_IMAGE_STEP)
        while step < MAX_IMAGE_STEP and self._total(step, tiles) > budget:
            step += 1
        while step > MIN_IMAGE_STEP and self._total(step - 1, tiles) <= budget:
            step -= 1
        while level > 1 and self._total(step, tiles, level) > budget:
            level -= 1
        spare = budget - self._total(step, tiles, level)
        if spare < 0:
            raise BudgetTooSmall(int(budget), int(np.ceil(budget - spare)))
        while step == MIN_IMAGE_STEP and level < LEVELS and spare > 0:
            left = budget - self._total(step, tiles, level + 1)
            if left < 0:
                break
            level, spare = level + 1, left
        return step, level, spare

    def _uniform(self, step: int, level: int, spare: float) -> list[TilePlan]:
        """Spend what all blocks alike leave: tile by tile, then on blocks of one more tile."""
        tiles = range(len(self.grids))
        # one grain finer: an image step, or a level where the steps end
        by_step = level == BASE_LEVEL and step > MIN_IMAGE_STEP
        finer = (step - 1, level) if by_step else (step, min(level + 1, LEVELS))
        chosen = dict.fromkeys(tiles, (step, level))
        taken = self._all_bytes(finer[0], tiles, finer[1])
        extra = {t: taken[t] - self._bytes(t, step, level) for t in tiles}
        # the error a grain removes grows with the coded bits, the price with the extra bytes
        for t in sorted(tiles, key=lambda t: (extra[t] / max(self._bytes(t, step, level), 1), t)):
            if finer != chosen[t] and extra[t] <= spare:
                chosen[t] = finer
                spare -= extra[t]
        plans = [TilePlan(chosen[t][0], self.levels(t, chosen[t][1])) for t in tiles]
        candidates = [t for t in tiles if chosen[t] == (step, level) and self.grids[t][0]]
        if level < LEVELS and candidates:
            t = max(candidates, key=lambda t: self._bytes(t, step, level))
            plans[t] = self._raise_blocks(t, plans[t], level, spare)
        return plans

    def _raise_blocks(self, tile: int, plan: TilePlan, level: int, spare: float) -> TilePlan:
        """Raise single blocks by one level while they and the level map's bits fit."""
        [costs] = self._each(lambda t: self._block_costs(t, plan.image_step), [tile])
        price = (costs.bits[level] - costs.bits[level - 1]).reshape(-1) / 8
        gain = (costs.error[level - 1] - costs.error[level]).reshape(-1)
        order = np.argsort(-gain / np.maximum(price, 1e-3), kind="stable")
        # a scattered map costs at most log2(K) bits a block plus the coarse choice of tables
        budget = spare - plan.levels.size * np.log2(LEVELS) / 8 - 2
        levels = plan.levels.copy().reshape(-1)
        for block in order:
            if levels[block] == level and price[block] <= budget:
                levels[block] = level + 1
                budget -= price[block]
        return TilePlan(plan.image_step, levels.reshape(plan.levels.shape))

    def _priced(self, budget: float, uniform: list[TilePlan]) -> list[TilePlan]:
        """Move levels about by worth and price, at the steps of the tiles in a uniform plan.

        Of the plans found that fit, the uniform one among them, it is the one of most worth.
        """
        tiles = [t for t, (rows, _) in enumerate(self.grids) if rows]
        if not tiles:
            return uniform
        steps = [plan.image_step for plan in uniform]
        bits, worth = zip(*self._each(lambda t: self._valued(t, steps[t]), tiles), strict=True)
        choice = _Choice(self.grids, steps, bits, worth, self._map_bits)
        # what is not in the blocks: headers, hyper-latents, coder states, empty tiles
        base = np.full(choice.bits.shape[1], BASE_LEVEL - 1)
        fixed = sum(self._bytes(t, step) for t, step in enumerate(steps))
        room = 8 / CODER_OVERHEAD * (budget - fixed) + choice.total(base)
        best = np.concatenate([plan.levels.ravel() for plan in uniform]).astype(np.int64) - 1
        map_bits = 0.0
        for _ in range(MAP_ROUNDS):
            levels = choice.within(room - map_bits)
            if levels is None:
                break
            self.price = choice.price
            taken = choice.map_bits(levels)
            if taken <= map_bits:
                best = max(best, levels, key=choice.total_worth)
                break
            map_bits = MAP_SLACK * taken
        return choice.plans(best)

    def _valued(self, tile: int, step: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bits and worth (K, B_h, B_w) of the levels of a tile's blocks."""
        assert self._worth is not None
        costs = self._block_costs(tile, step)
        return costs.bits, self._worth(tile, step, costs)


class _Choice:
    """Levels of all blocks of an image at its tiles' steps, flattened: worth and bits (K, n)."""

    def __init__(
        self,
        grids: list[tuple[int, int]],
        steps: list[int],
        costs: Iterable[NDArray[np.float64]],
        worth: Iterable[NDArray[np.float64]],
        map_bits: Callable[[NDArray[np.uint8]], float],
    ) -> None:
        self.grids = grids
        self.steps = steps
        self.bits = np.concatenate([c.reshape(LEVELS, -1) for c in costs], 1)
        self.worth = np.concatenate([w.reshape(LEVELS, -1) for w in worth], 1)
        self._map_bits = map_bits
        self.price = 0.0  # the one that the last levels within some bits were chosen at

    def within(self, bits: float) -> NDArray[np.int64] | None:
        """Levels - 1 (n,) of at most so many bits, and nearly all of them; None if none fit."""
        low, high = -LAST_PRICE, LAST_PRICE

        def at(position: float) -> NDArray[np.int64]:
            return np.argmax(self.worth - math.sinh(position) * self.bits, axis=0)

        levels = at(high)
        if self.total(levels) > bits:
            return None
        if self.total(best := at(low)) <= bits:
            self.price = math.sinh(low)
            return best
        for _ in range(PRICE_ROUNDS):
            middle = (low + high) / 2
            if self.total(chosen := at(middle)) <= bits:
                high, levels = middle, chosen
            else:
                low = middle
        self.price = math.sinh(high)
        return self._fill(levels, bits - self.total(levels))

    def _fill(self, levels: NDArray[np.int64], spare: float) -> NDArray[np.int64]:
        """Raise blocks to the level of most worth a bit, the best first, while they fit."""
        levels = levels.copy()
        place = np.arange(levels.size)
        extra = self.bits - self.bits[levels, place]
        better = (self.worth - self.worth[levels, place]) / np.maximum(extra, 1e-9)
        better[(extra <= 0) | (extra > spare)] = -np.inf
        best = better.argmax(0)
        rate = better[best, place]
        for block in np.argsort(-rate, kind="stable"):
            if not np.isfinite(rate[block]):
                break
            price = extra[best[block], block]
            if price <= spare:
                levels[block] = best[block]
                spare -= price
        return levels

    def total(self, levels: NDArray[np.int64]) -> float:
        """Bits of the blocks at levels - 1 (n,)."""
        return float(np.take_along_axis(self.bits, levels[None], 0).sum())

    def total_worth(self, levels: NDArray[np.int64]) -> float:
        """Worth of levels - 1 (n,)."""
        return float(np.take_along_axis(self.worth, levels[None], 0).sum())

    def map_bits(self, levels: NDArray[np.int64]) -> float:
        """Bits of the level maps."""
        return sum(self._map_bits(p.levels) for p in self.plans(levels) if p.levels.size)

    def plans(self, levels: NDArray[np.int64]) -> list[TilePlan]:
        """The plan of every tile."""
        out, start = [], 0
        for grid, step in zip(self.grids, self.steps, strict=True):
            count = grid[0] * grid[1]
            part = levels[start : start + count].reshape(grid)
            out.append(TilePlan(step, (part + 1).astype(np.uint8)))
            start += count
        return out
