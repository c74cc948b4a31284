"""Spreading a hard bit budget over an image's tiles and blocks.

Until a learned policy takes over, the rule is: every block of the image gets the same step,
which minimises squared error for a uniform quantiser, and the budget is filled up in ever finer
grains. (1) The finest image step at which all tiles fit. (2) Tiles one step finer (an eighth of
an octave), those that gain most first, while they fit. (3) Blocks of one more tile one level
up, those first that remove most error a bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.pcdc.constants import LEVEL_OFFSETS, MAX_IMAGE_STEP, MIN_IMAGE_STEP

BASE_LEVEL = 3
LEVELS = len(LEVEL_OFFSETS)
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

    Args:
        grids: (B_h, B_w) of every tile.
        tile_bytes: upper bound of a tile's stored bytes at (tile, image step, level).
        block_costs: costs of all levels at (tile, image step).
    """

    def __init__(
        self,
        grids: list[tuple[int, int]],
        tile_bytes: Callable[[int, int, int], float],
        block_costs: Callable[[int, int], BlockCosts],
    ) -> None:
        self.grids = grids
        self._tile_bytes = tile_bytes
        self._block_costs = block_costs
        self._cache: dict[tuple[int, int, int], float] = {}

    def _bytes(self, tile: int, step: int, level: int = BASE_LEVEL) -> float:
        key = (tile, step, level)
        if key not in self._cache:
            self._cache[key] = self._tile_bytes(tile, step, level)
        return self._cache[key]

    def _total(self, step: int, tiles: range, level: int = BASE_LEVEL) -> float:
        return sum(self._bytes(t, step, level) for t in tiles)

    def _finest(self, budget: float, tiles: range, low: int, high: int) -> int:
        """Smallest step in low..high at which `tiles` fit, supposing that `high` fits."""
        while low < high:
            middle = (low + high) // 2
            if self._total(middle, tiles) <= budget:
                high = middle
            else:
                low = middle + 1
        return high

    def plan(self, budget: float) -> list[TilePlan]:
        """Return a plan for every tile whose bytes, as estimated, add up to at most `budget`.

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

        # one grain finer, tile by tile: an image step, or a level where the steps end
        by_step = level == BASE_LEVEL and step > MIN_IMAGE_STEP
        finer = (step - 1, level) if by_step else (step, min(level + 1, LEVELS))
        chosen = dict.fromkeys(tiles, (step, level))
        extra = {t: self._bytes(t, *finer) - self._bytes(t, step, level) for t in tiles}
        # the error a grain removes grows with the coded bits, the price with the extra bytes
        for t in sorted(tiles, key=lambda t: (extra[t] / max(self._bytes(t, step, level), 1), t)):
            if finer != chosen[t] and extra[t] <= spare:
                chosen[t] = finer
                spare -= extra[t]
        plans = [
            TilePlan(chosen[t][0], np.full(self.grids[t], chosen[t][1], np.uint8)) for t in tiles
        ]
        candidates = [t for t in tiles if chosen[t] == (step, level) and self.grids[t][0]]
        if level < LEVELS and candidates:
            t = max(candidates, key=lambda t: self._bytes(t, step, level))
            plans[t] = self._raise_blocks(t, plans[t], level, spare)
        return plans

    def _raise_blocks(self, tile: int, plan: TilePlan, level: int, spare: float) -> TilePlan:
        """Raise single blocks by one level while they and the level map's bits fit."""
        costs = self._block_costs(tile, plan.image_step)
        price = (costs.bits[level] - costs.bits[level - 1]).reshape(-1) / 8
        gain = (costs.error[level - 1] - costs.error[level]).reshape(-1)
        order = np.argsort(-gain / np.maximum(price, 1e-3), kind="stable")
        # a scattered map costs at most log2(K) bits a block plus the coarse choice of tables
        budget = spare - plan.levels.size * np.log2(LEVELS) / 8 - 2
        levels = plan.levels.copy().reshape(-1)
        for block in order:
            if price[block] <= budget:
                levels[block] = level + 1
                budget -= price[block]
        return TilePlan(plan.image_step, levels.reshape(plan.levels.shape))
