"""The ground below a camera as a plane through the points that photogrammetry found in its view."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

LEAST = 10  # points in view that tell how the ground slopes
STEEP = 1.0  # metres a metre: what rises more is no ground
USUAL_SLOPE = 0.3  # that few points are not to tell more of
ROUNDS = 10


@dataclass(frozen=True)
class GroundPlane:
    """A plane.

    Attributes:
        below_m: how far it is below the camera, metres.
        slope: metres that it rises a metre east and a metre north.
    """

    below_m: float
    slope: tuple[float, float] = (0.0, 0.0)


def ground_below(points: Array, rotation: Array, focal: float | None) -> GroundPlane | None:
    """The plane next to most of the points that a camera sees.

    Args:
        points: float64 (n, 3), metres east, north and up of the camera.
        rotation: float64 (3, 3), rows are the image's right, its down and the optical axis.
        focal: focal length as a share of the image's longer side.

    Returns:
        A level one in the middle of all points where few are in view; None without any below it.
    """
    if not len(points):
        return None
    right, down, depth = rotation @ points.T
    view = depth > 0.0
    if focal is not None:
        view &= np.maximum(np.abs(right), np.abs(down)) * focal <= depth / 2
    below = -float(np.median(points[:, 2]))
    if view.sum() >= LEAST:
        return _fitted(points[view]) or GroundPlane(-float(np.median(points[view, 2])))
    return GroundPlane(below)


def _fitted(points: Array) -> GroundPlane | None:
    """A plane that outliers hardly move (weights of Cauchy's); None of one that is no ground."""
    size = float(np.abs(points).max())
    if not size > 0.0:
        return None
    east, north, up = points.T / size
    design = np.column_stack([np.ones_like(east), east, north])
    plane = np.array([np.median(up), 0.0, 0.0])
    for _ in range(ROUNDS):
        off = up - design @ plane
        spread = max(1.4826 * float(np.median(np.abs(off))), 1e-6)
        weights = 1.0 / (1.0 + (off / (2 * spread)) ** 2) / spread**2
        matrix = (design * weights[:, None]).T @ design
        matrix[[1, 2], [1, 2]] += USUAL_SLOPE**-2
        plane = np.linalg.solve(matrix, design.T @ (weights * up))
    if not np.abs(plane[1:]).max() <= STEEP:
        return None
    return GroundPlane(-float(plane[0]) * size, (float(plane[1]), float(plane[2])))
