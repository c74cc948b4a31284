"""Whether lossy pixels are of the picture that they should be of."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.geo.georef import Window
from archive_pipeline.store.layout import TILE

# Two pictures that have nothing to do with each other differ by 10 to 14 dB, and the codec at its
# coarsest by far less.
LEAST_PSNR = 16.0
# Means of so many pixels a side: the codec keeps them where it drops all that is finer.
BLOCK = 16
# Of the variance of an original's means, what differences from them may have. At its coarsest, over
# foliage, the codec has a third; another frame of the same flight, or grey, has all of it.
MOST_UNLIKE = 0.6
SLIGHT = 4.0  # grey levels; over calm water there is hardly more to tell pictures apart by
ODD_TIMES = 2.0  # that one tile differs by more than the whole, root mean square
FEW_BLOCKS = 16  # prove nothing of a tile


class Alike:
    """Compares restored pixels with an original's, window by window."""

    def __init__(self) -> None:
        self._squares, self._count = 0.0, 0
        self._whole = _Means()
        self._tiles: list[tuple[Window, _Means]] = []

    def add(
        self,
        window: Window,
        restored: NDArray[np.uint8],
        original: NDArray[np.uint8],
        mask: NDArray[np.uint8] | None,
    ) -> None:
        """Compare a window's pixels (height, width, bands), those that the mask (if any) shows."""
        col, row, width, height = window
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                area = slice(top, top + TILE), slice(left, left + TILE)
                one, two = restored[area].astype(np.float32), original[area].astype(np.float32)
                shown = None if mask is None else mask[area] > 0
                apart = one - two if shown is None else (one - two)[shown]
                self._squares += float(np.square(apart).sum(dtype=np.float64))
                self._count += apart.size
                means = _Means()
                means.add(one, two, shown)
                self._whole.join(means)
                place = col + left, row + top, two.shape[1], two.shape[0]
                self._tiles.append((place, means))

    def problem(self) -> str | None:
        """Why they are not the original's; None where they are."""
        error = self._squares / self._count if self._count else 0.0
        unlike = error and 10 * math.log10(255**2 / error) < LEAST_PSNR
        if unlike or self._whole.unlike(SLIGHT):
            return "its pixels have nothing to do with the original's"
        most = max(2 * SLIGHT, ODD_TIMES * self._whole.error)
        for (col, row, width, height), means in self._tiles:
            if means.blocks >= FEW_BLOCKS and means.unlike(most):
                return f"pixels {col},{row},{width},{height} have nothing to do with the original's"
        return None


class _Means:
    """How means over blocks of two pictures differ, and how they vary in the second."""

    def __init__(self) -> None:
        self.blocks = 0
        self._squares = 0.0  # of differences, a mean over the bands
        self._sums: NDArray[Any] = np.zeros(1)  # of the second's means and of their squares, a band
        self._sums_of_squares: NDArray[Any] = np.zeros(1)

    def add(self, one: NDArray[Any], two: NDArray[Any], shown: NDArray[Any] | None) -> None:
        """Add pixels (height, width, bands), but no blocks that are cut or not all shown."""
        first, second = _block_means(one), _block_means(two)
        if shown is not None:
            whole = _block_means(shown[..., None].astype(np.float32))[..., 0] == 1
            first, second = first[whole], second[whole]
        first, second = (m.reshape(-1, m.shape[-1]).astype(np.float64) for m in (first, second))
        self.blocks += len(first)
        self._squares += float(np.square(first - second).mean(1).sum())
        self._sums = self._sums + second.sum(0)
        self._sums_of_squares = self._sums_of_squares + np.square(second).sum(0)

    def join(self, other: _Means) -> None:
        """Count another's blocks, too."""
        self.blocks += other.blocks
        self._squares += other._squares
        self._sums = self._sums + other._sums
        self._sums_of_squares = self._sums_of_squares + other._sums_of_squares

    @property
    def error(self) -> float:
        """Root mean square of the differences."""
        return math.sqrt(self._squares / self.blocks) if self.blocks else 0.0

    def unlike(self, least: float) -> bool:
        """Whether the differences are larger than so many grey levels, and than alike pictures'."""
        if not self.blocks or self.error <= least:
            return False
        mean = self._sums / self.blocks
        variance = float((self._sums_of_squares / self.blocks - np.square(mean)).mean())
        return self.error**2 > MOST_UNLIKE * max(0.0, variance)


def _block_means(pixels: NDArray[Any]) -> NDArray[Any]:
    rows, cols = (side // BLOCK for side in pixels.shape[:2])
    cut = pixels[: rows * BLOCK, : cols * BLOCK]
    return cut.reshape(rows, BLOCK, cols, BLOCK, -1).mean((1, 3))
