"""The finest way to code all tiles of an image nearly alike within a budget, found by few looks.

Rungs are the ways to code a tile with all blocks alike, the finest first: each image step with the
base level, and beyond the steps' ends the other levels. Between an image with all tiles on one rung
and one with all on the next lie those with some tiles on the finer of the two, those with most
detail first: places of a ladder on which bytes fall evenly. What a tile takes is smooth in its
rung, so a guess at the place (`expected`) is corrected by what few tiles take, then by what all
take; to move on by so many places costs as many looks at a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.pcdc.constants import (
    BASE_LEVEL,
    LEVEL_OFFSETS,
    MAX_IMAGE_STEP,
    MIN_IMAGE_STEP,
)

LEVELS = len(LEVEL_OFFSETS)
# (image step, level)
RUNGS = [
    *((MIN_IMAGE_STEP, level) for level in range(LEVELS, BASE_LEVEL, -1)),
    *((step, BASE_LEVEL) for step in range(MIN_IMAGE_STEP, MAX_IMAGE_STEP + 1)),
    *((MAX_IMAGE_STEP, level) for level in range(BASE_LEVEL - 1, 0, -1)),
]
EXPONENTS = np.array([step + LEVEL_OFFSETS[level - 1] for step, level in RUNGS])

SAMPLE_EVERY = 10  # tiles of which one is looked at first
NEAR = 2  # rungs that what the sample takes says something about
SAMPLE_LOOKS = 3
GUESSES = 8  # at a place; what they have not found is halved from then on
PULL = (0.4, 2.5)  # how much faster bytes may fall than expected
LEAST_FALL = 0.03  # logarithm of what is expected that says how fast they do


class Ladder:
    """Where an image's tiles stand, and what they take there.

    Args:
        tile_bytes: bytes of tiles at (tile, image step, level), which fall along the rungs.
        expected: (len(RUNGS), n) about what the n tiles take on each rung, all above 0.
        order: all tiles, those first that become coarser first.
    """

    def __init__(
        self,
        tile_bytes: Callable[[list[tuple[int, int, int]]], list[float]],
        expected: NDArray[np.float64],
        order: NDArray[np.integer],
    ) -> None:
        self._tile_bytes = tile_bytes
        self._expected = expected
        self._order = order.tolist()
        self._cache: dict[tuple[int, int, int], float] = {}
        self._place: int | None = None  # where the last search ended
        self._pull = 1.0  # how much faster bytes fall than expected
        self.count = expected.shape[1]
        start = expected[0].sum()
        falls = np.diff(expected[:, order], axis=0).ravel().cumsum()
        self._at = np.maximum.accumulate(np.concatenate([[start], start + falls])[::-1])[::-1]

    def forget(self, tiles: Iterable[int]) -> None:
        """Ask anew for what tiles take."""
        changed = set(tiles)
        self._cache = {key: cost for key, cost in self._cache.items() if key[0] not in changed}

    def bytes_of(self, tiles: Iterable[tuple[int, int, int]]) -> list[float]:
        """Bytes of (tile, image step, level)."""
        wanted = list(tiles)
        missing = [key for key in dict.fromkeys(wanted) if key not in self._cache]
        self._cache.update(zip(missing, self._tile_bytes(missing), strict=True))
        return [self._cache[key] for key in wanted]

    def rungs(self, place: int) -> list[tuple[int, int]]:
        """(image step, level) of every tile at a place."""
        rung, coarser = divmod(place, self.count)
        rungs = [RUNGS[rung]] * self.count
        for t in self._order[:coarser]:
            rungs[t] = RUNGS[rung + 1]
        return rungs

    @property
    def last(self) -> int:
        """The coarsest place."""
        return len(self._at) - 1

    def total(self, place: int) -> float:
        """Bytes of all tiles at a place."""
        return sum(self.bytes_of((t, *rung) for t, rung in enumerate(self.rungs(place))))

    def guess(self, budget: float) -> int:
        """The place where a budget is probably met, after a look at some tiles."""
        if self._place is not None:
            return self._place
        tiles = self._sample()
        place, seen = self._nearest(budget), None
        for _ in range(SAMPLE_LOOKS):
            rung = round(place / self.count)
            if seen is not None and abs(rung - seen[0]) <= NEAR:
                break
            taken = sum(self.bytes_of((t, *RUNGS[rung]) for t in tiles))
            expected = float(self._expected[rung, tiles].sum())
            if seen is not None:
                self._learn(seen[1] / expected, seen[2] / taken)
            seen = rung, expected, taken
            total = taken / expected * float(self._at[rung * self.count])
            place = self._met(budget, rung * self.count, total)
        return place

    def _sample(self) -> list[int]:
        """Some of the larger tiles, of little to much detail."""
        middle = self._expected[len(RUNGS) // 2]
        large = [t for t in self._order if middle[t] >= middle.mean() / 2]
        count = math.ceil(self.count / SAMPLE_EVERY)
        return [large[(2 * k + 1) * len(large) // (2 * count)] for k in range(count)]

    def _nearest(self, expected: float) -> int:
        """The place where about so many bytes are expected."""
        at = int(np.searchsorted(-self._at, -expected))
        return min(at, len(self._at) - 1)

    def finest(self, budget: float) -> int | None:
        """The finest place found that fits; None where not even the last one does.

        Nearly the finest there is: what it leaves will not do for the next tile, as expected.
        """
        low, high = -1, len(self._at)  # places known not to fit, and to fit
        place, looks = self.guess(budget), 0
        before: tuple[int, float] | None = None
        while True:
            total = self.total(place)
            if total <= budget:
                high = place
            else:
                low = place
            if before is not None:
                self._learn(float(self._at[before[0]] / self._at[place]), before[1] / total)
            before, looks = (place, total), looks + 1
            if high - low <= 1:
                break
            if total <= budget and total * self._ratio(place, place - 1) > budget:
                break
            if looks < GUESSES:
                place = min(max(self._met(budget, place, total), low + 1), high - 1)
            else:
                place = (low + high) // 2
        if high == len(self._at):
            return None
        self._place = high
        return high

    def _ratio(self, here: int, there: int) -> float:
        """About how many times as many bytes another place takes."""
        return float(self._at[there] / self._at[here]) ** self._pull

    def _met(self, budget: float, place: int, total: float) -> int:
        """Where a budget is probably met, if all tiles take so many bytes at a place."""
        share = max(budget / total, 1e-9)
        return self._nearest(float(self._at[place]) * share ** (1 / self._pull))

    def _learn(self, expected: float, found: float) -> None:
        """Learn how bytes fall, from how many times those of a place are those of another one.

        Places that are near say little: single tiles differ.
        """
        if abs(math.log(expected)) > LEAST_FALL:
            self._pull = float(np.clip(math.log(found) / math.log(expected), *PULL))
