"""Two reconstructions of the same frames, laid over each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.geo.camera import rotation
from archive_pipeline.photogrammetry.frames import Frame
from archive_pipeline.photogrammetry.reconstruction import Reconstruction

Array = NDArray[np.float64]

CELL_POINTS = 10  # points of the ground in a cell of the coarse surface, on average
LEAST_POINTS = 4  # of both reconstructions in a cell that is compared
SCALE_AGREES = 0.1  # of a reconstruction with the positions by GPS, which are good to metres
LEAST_CELLS = 10  # that say something of a surface


@dataclass(frozen=True)
class Difference:
    """How a reconstruction of restored frames differs from that of the originals.

    Attributes:
        scale: what it was larger by, before it was fitted.
        offsets: where each common frame's camera moved to: float64 (3,), metres.
        turns: how far it turned, degrees.
        points: the restored frames' points, fitted: float64 (n, 3).
        sunk: how much lower the ground lies below the cameras, metres; it goes with the focal
            length, which frames that all look down on flat ground do not tell. None where too few
            points are common.
        surface: root mean square of what else a coarse surface differs by in height, metres.
        cells: of the surface that were compared.
        cell_m: side of one.
    """

    scale: float
    offsets: dict[int, Array]
    turns: dict[int, float]
    points: Array
    sunk: float | None
    surface: float | None
    cells: int
    cell_m: float

    @property
    def moved(self) -> float:
        """Root mean square of the cameras' ways, metres."""
        return float(np.sqrt(np.mean([offset @ offset for offset in self.offsets.values()])))


def difference(original: Reconstruction, restored: Reconstruction) -> Difference | None:
    """Fit the restored frames' reconstruction to the originals' by a similarity, and compare.

    The rotation is the mean of what the frames' own rotations differ by: centres in one lane do
    not tell how the lane is rolled. Scale and place are those that fit centres best.

    Returns:
        None where fewer than two frames are in both.
    """
    common = sorted(original.centres.keys() & restored.centres.keys())
    if len(common) < 2:
        return None
    turn = _mean_rotation([original.rotations[i].T @ restored.rotations[i] for i in common])
    one = np.array([original.centres[i] for i in common])
    two = np.array([restored.centres[i] for i in common]) @ turn.T
    middle_one, middle_two = one.mean(axis=0), two.mean(axis=0)
    spread = ((two - middle_two) ** 2).sum()
    scale = float(((one - middle_one) * (two - middle_two)).sum() / spread) if spread else 1.0
    moved = scale * (two - middle_two) + middle_one
    points = scale * (restored.points @ turn.T - middle_two) + middle_one
    turns = {i: _angle(original.rotations[i] @ turn @ restored.rotations[i].T) for i in common}
    offsets = dict(zip(common, moved - one, strict=True))
    return Difference(scale, offsets, turns, points, *_surface(original.points, points))


def level(found: Reconstruction, frames: Sequence[Frame]) -> Reconstruction:
    """Turn a reconstruction so that down is where the frames' tags have it.

    Positions in one lane do not tell how it is rolled. Of the tags pitch and roll count, not yaw.
    """
    downs = [
        turn.T @ rotation(frames[index].camera) @ np.array([0.0, 0.0, -1.0])
        for index, turn in found.rotations.items()
        if frames[index].camera.pitch_deg is not None
    ]
    if not downs or not np.isfinite(downs).all():
        return found
    down = np.median(downs, axis=0)
    down /= np.linalg.norm(down)
    axis, cosine = np.cross(down, [0.0, 0.0, -1.0]), -down[2]
    if not cosine > 0:  # the tags contradict each other
        return found
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turn = np.eye(3) + cross + cross @ cross / (1 + cosine)  # Rodrigues' formula
    middle = np.mean([*found.centres.values()], axis=0)
    return replace(
        found,
        rotations={index: own @ turn.T for index, own in found.rotations.items()},
        centres={index: turn @ (at - middle) + middle for index, at in found.centres.items()},
        points=(found.points - middle) @ turn.T + middle,
    )


def in_metres(found: Reconstruction, where: Array) -> Reconstruction:
    """Scale a reconstruction by the distances between positions, where COLMAP could not.

    It leaves its own unit where frames in one lane do not fix how positions are to be fitted.

    Args:
        where: float64 (n, 3), see `frames.places`.
    """
    numbers = sorted(found.centres)
    given = np.nan_to_num(where[numbers])
    own = np.array([found.centres[number] for number in numbers])
    one, two = (np.linalg.norm(np.diff(at, axis=0), axis=1) for at in (given, own))
    if not (one.sum() > 0 and two.sum() > 0):
        return found
    scale = float(np.median(one[two > 0] / two[two > 0]))
    if not scale > 0 or abs(scale - 1) <= SCALE_AGREES:
        return found
    return replace(
        found,
        centres={number: scale * at for number, at in found.centres.items()},
        points=scale * found.points,
        spacing=scale * found.spacing,
    )


def _mean_rotation(rotations: list[Array]) -> Array:
    """The rotation next to all, by the sum of the squares of their matrices' differences."""
    u, _, v = np.linalg.svd(np.sum(rotations, axis=0))
    return np.asarray(u @ np.diag([1.0, 1.0, np.linalg.det(u @ v)]) @ v)


def _angle(rotation: Array) -> float:
    """How far a rotation turns, degrees; of tiny ones, too, for which a cosine is too coarse."""
    sine = np.linalg.norm(rotation - rotation.T) / (2 * np.sqrt(2))
    return float(np.degrees(np.arctan2(sine, (np.trace(rotation) - 1) / 2)))


def _surface(one: Array, two: Array) -> tuple[float | None, float | None, int, float]:
    """`Difference`'s sunk, surface, cells and cell_m, by cells' median heights."""
    if len(one) < CELL_POINTS or len(two) < CELL_POINTS:
        return None, None, 0, 0.0
    low, high = np.percentile(one[:, :2], [2, 98], axis=0)
    side = float(np.sqrt(np.prod(high - low) * CELL_POINTS / len(one)))
    if not side > 0:
        return None, None, 0, 0.0
    first, second = (_heights(points, low, side) for points in (one, two))
    common = sorted(first.keys() & second.keys())
    if len(common) < LEAST_CELLS:
        return None, None, len(common), side
    apart = np.array([first[c] - second[c] for c in common])
    sunk = float(np.median(apart))
    return sunk, float(np.sqrt(((apart - sunk) ** 2).mean())), len(common), side


def _heights(points: Array, low: Array, side: float) -> dict[tuple[int, int], float]:
    """Median height of the points of each cell that has enough."""
    cells = np.floor((points[:, :2] - low) / side).astype(np.int64)
    order = np.lexsort(cells.T)
    cells, heights = cells[order], points[order, 2]
    starts = np.flatnonzero(np.any(np.diff(cells, axis=0, prepend=cells[:1] - 1), axis=1))
    ends = [*starts[1:].tolist(), len(cells)]
    return {
        (int(cells[a, 0]), int(cells[a, 1])): float(np.median(heights[a:b]))
        for a, b in zip(starts.tolist(), ends, strict=True)
        if b - a >= LEAST_POINTS
    }
