"""Spreading a hard bit budget over an image's tiles and blocks.

First comes the finest step at which all tiles fit with every block at the base level, or with some
tiles a step finer (`ladder`). Then

- `uniform` leaves all blocks there, and fills the budget up by blocks of one more tile one level
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

from archive_pipeline.pcdc.constants import BASE_LEVEL, MAX_IMAGE_STEP
from archive_pipeline.pcdc.ladder import EXPONENTS, LEVELS, Ladder

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
FALL = 0.14  # octaves that bytes fall with each step, where nothing is known of the tiles


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
        tile_bytes: upper bounds of tiles' stored bytes at (tile, image step, level).
        block_costs: costs of all levels at (tile, image step).
        map_bits: bits that a tile's level map takes.
        worth: (K, B_h, B_w) worth of each level at (tile, image step, its costs), in a unit that
            all steps share; None allocates uniformly.
        each: results of a function for every tile; it may run them side by side.
        raised: uint8 (B_h, B_w) of every tile, levels by which its blocks are above the others
            where all are else alike; None for none. `tile_bytes` counts them.
        expected: (len(RUNGS), n) about the bytes of every tile on each rung of the `ladder`, all
            above 0; None where only the tiles' sizes are known.
    """

    def __init__(
        self,
        grids: list[tuple[int, int]],
        tile_bytes: Callable[[list[tuple[int, int, int]]], list[float]],
        block_costs: Callable[[int, int], BlockCosts],
        map_bits: Callable[[NDArray[np.uint8]], float],
        worth: Callable[[int, int, BlockCosts], NDArray[np.float64]] | None,
        each: Callable[[Callable[[int], Any], Iterable[int]], list[Any]],
        raised: list[NDArray[np.uint8]] | None = None,
        expected: NDArray[np.float64] | None = None,
    ) -> None:
        self.grids = grids
        self._block_costs = block_costs
        self._map_bits = map_bits
        self._worth = worth
        self._each = each
        self._raised = raised
        self.price: float | None = None
        blocks = np.array([1 + rows * columns for rows, columns in grids], np.float64)
        if expected is None:
            expected = np.exp2(-FALL * EXPONENTS)[:, None] * blocks
        # where there is most detail a finer step adds least to the bytes there are
        order = np.argsort(expected[len(expected) // 2] / blocks, kind="stable")
        self._ladder = Ladder(tile_bytes, expected, order)

    def forget(self, tiles: Iterable[int]) -> None:
        """Ask anew for what tiles cost: something about them has changed."""
        self._ladder.forget(tiles)

    def likely_step(self, budget: float) -> int:
        """The image step that most tiles will probably have."""
        if not self.grids:
            return MAX_IMAGE_STEP
        return min(step for step, _ in self._ladder.rungs(self._ladder.guess(budget)))

    def levels(self, tile: int, level: int) -> NDArray[np.uint8]:
        """Levels (B_h, B_w) of a tile with all blocks at one level, but for those raised."""
        levels = np.full(self.grids[tile], level, np.uint8)
        return levels if self._raised is None else np.minimum(levels + self._raised[tile], LEVELS)

    def plan(self, budget: float) -> list[TilePlan]:
        """Return a plan for every tile whose bytes, as estimated, add up to at most `budget`.

        Raises:
            BudgetTooSmall: level 1 at the coarsest step exceeds it.
        """
        if not self.grids:
            return []
        place = self._ladder.finest(budget)
        if place is None:
            least = self._ladder.total(self._ladder.last)
            raise BudgetTooSmall(int(budget), int(np.ceil(least)))
        self.price = None
        uniform = self._uniform(place, budget - self._ladder.total(place))
        return uniform if self._worth is None else self._priced(budget, uniform)

    def _uniform(self, place: int, spare: float) -> list[TilePlan]:
        """All tiles at a place of the ladder, and what that leaves on blocks of one of them."""
        rungs = self._ladder.rungs(place)
        plans = [TilePlan(step, self.levels(t, level)) for t, (step, level) in enumerate(rungs)]
        step, level = max(rungs, key=lambda rung: (rung[0], -rung[1]))  # the coarser of the two
        tiles = [t for t, r in enumerate(rungs) if r == (step, level) and self.grids[t][0]]
        if level < LEVELS and tiles:
            taken = self._bytes(tiles, rungs)
            t = tiles[int(np.argmax(taken))]
            plans[t] = self._raise_blocks(t, plans[t], level, spare)
        return plans

    def _bytes(self, tiles: Iterable[int], rungs: list[tuple[int, int]]) -> list[float]:
        """Bytes of some tiles, each at its (image step, level) of those of all."""
        return self._ladder.bytes_of((t, *rungs[t]) for t in tiles)

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
        fixed = sum(self._bytes(range(len(steps)), [(step, BASE_LEVEL) for step in steps]))
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
