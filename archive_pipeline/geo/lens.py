"""How a lens bends what it sees, as programs of photogrammetry write it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

STEPS = 4001  # of the table by which a polynomial is inverted
WIDEST = 1.5  # radians from the optical axis; tangents grow beyond all bounds at pi / 2


@dataclass(frozen=True)
class Distortion:
    """Radial distortion: a ray at an angle a from the axis is seen at r (1 + k1 r^2 + k2 r^4 ...).

    Distances from the principal point are shares of the focal length. Tangential terms, which are
    fractions of a pixel to a few pixels, are left out.

    Attributes:
        radial: k1, k2, ...
        fisheye: r is the angle (OpenCV's fisheye model), else its tangent (Brown's model).
    """

    radial: tuple[float, ...]
    fisheye: bool = False

    def straightened(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Tangents of rays in place of where they are seen.

        Args:
            x, y: float64 (n,), right and down, as shares of the focal length.

        Returns:
            What a pinhole would see; points beyond what the polynomial can be of, as far out as it
            goes.
        """
        seen = np.hypot(x, y)
        angle = np.linspace(0.0, WIDEST, STEPS)
        tangent = np.tan(angle)
        r = angle if self.fisheye else tangent
        powers = np.arange(1, len(self.radial) + 1) * 2
        with np.errstate(over="ignore", invalid="ignore"):  # of a forged one
            bent = r * (1.0 + (np.array(self.radial) * r[:, None] ** powers).sum(axis=1))
            # behind the first place where it does not grow it is of no lens
            falls = np.flatnonzero(~(np.diff(bent) > 0.0))
        end = int(falls[0]) + 1 if len(falls) else STEPS
        if end < 2:
            return x, y
        straight = np.interp(seen, bent[:end], tangent[:end])
        scale = np.divide(straight, seen, out=np.ones_like(seen), where=seen > 0.0)
        return x * scale, y * scale


@dataclass(frozen=True)
class Lens:
    """An image's lens.

    Attributes:
        focal: focal length as a share of the image's longer side.
        centre: principal point from the image's middle, right and down, in the same shares.
        distortion: None of a pinhole.
        note: what of it is not understood.
    """

    focal: float
    centre: tuple[float, float] = (0.0, 0.0)
    distortion: Distortion | None = None
    note: str = ""

    @property
    def is_one(self) -> bool:
        """Whether its numbers can be a lens'."""
        radial = self.distortion.radial if self.distortion else ()
        return bool(np.isfinite([*self.centre, *radial]).all() and 0.0 < self.focal < math.inf)


def bent(radial: Sequence[float], fisheye: bool = False) -> Distortion | None:
    """Distortion by its coefficients; None of a pinhole."""
    return Distortion(tuple(radial), fisheye) if fisheye or any(radial) else None


def not_read(model: str) -> str:
    """A word on a lens whose distortion is not understood."""
    return f"distortion of a lens of the model {model} is not read"
