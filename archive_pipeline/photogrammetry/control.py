"""How much a reconstruction differs from itself: its tie points get their own noise once more.

Few frames do not pin their cameras down. Whether restored frames move them further than that alone
is what a Monte Carlo test says: the originals' points are moved at random by as much as the
adjustment itself finds them to be off, and all is reconstructed anew. If the restored frames moved
the cameras further than each of 19 such repeats, then at a level of 5 % it was not the points' own
noise.

Repeats with residuals' noise are James, Robson and Smith's (2017, doi:10.1002/esp.4125); the rank
as a test is Barnard's (1963), that it may end early Besag and Clifford's (1991).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.photogrammetry.alignment import Difference, difference
from archive_pipeline.photogrammetry.reconstruction import Reconstruction

REPEATS = 19  # of which none may be above what is tested at a level of 1 in 20
BATCH = 4  # at a time, whatever the number of threads: the result must not depend on them

Keypoints = list[NDArray[np.float32]]


@dataclass(frozen=True)
class Control:
    """Repeats of the originals' reconstruction.

    Attributes:
        noise: standard deviation of what moved columns and rows of points, pixels.
        moved: root mean square of the cameras' ways in each repeat, metres; infinite where the
            frames did not fit together any more.
        ways: of each camera over the repeats, root mean square, metres.
    """

    noise: float
    moved: list[float]
    ways: dict[int, float]

    @property
    def most(self) -> float:
        """The farthest that a repeat moved the cameras, metres."""
        return max(self.moved)


def run_control(
    original: Reconstruction,
    keypoints: Keypoints,
    again: Callable[[Keypoints], Reconstruction | None],
    moved: float,
    seed: int,
    threads: int,
    step: Callable[[int], None],
) -> Control | None:
    """Repeat a reconstruction until a repeat moves the cameras as far, or `REPEATS` times.

    Args:
        original: what came out, in metres.
        keypoints: of each frame, float32 (n, 2), from which it came out.
        again: reconstructs from others.
        moved: root mean square of the cameras' ways that is tested, metres.
        seed: of the noise.
        threads: for so many reconstructions at once at most.
        step: called with the number of the next repeats' last one.

    Returns:
        None where nothing tells how far the points are off.
    """
    if not np.isfinite(original.noise):
        return None

    def repeat(number: int) -> Difference | None:
        rng = np.random.default_rng([abs(seed), number])
        noisy = [
            (points + rng.normal(0, original.noise, points.shape)).astype(np.float32)
            for points in keypoints
        ]
        found = again(noisy)
        return None if found is None else difference(original, found)

    results: list[Difference | None] = []
    with ThreadPoolExecutor(max(1, min(threads, BATCH))) as pool:
        for start in range(0, REPEATS, BATCH):
            stop = min(start + BATCH, REPEATS)
            step(stop)
            results += pool.map(repeat, range(start, stop))
            if any(result is None or result.moved >= moved for result in results):
                break
    return _summary(original.noise, results)


def _summary(noise: float, results: list[Difference | None]) -> Control:
    ways: dict[int, list[float]] = {}
    for result in results:
        for index, offset in () if result is None else result.offsets.items():
            ways.setdefault(index, []).append(float(offset @ offset))
    moved = [float("inf") if result is None else result.moved for result in results]
    means = {index: float(np.sqrt(np.mean(squares))) for index, squares in ways.items()}
    return Control(noise, moved, means)
