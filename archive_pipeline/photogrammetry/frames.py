"""Frames that take part in a comparison, their lenses and places, and which are matched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pyproj import Proj

from archive_pipeline.geo.camera import field_of_view_pitch
from archive_pipeline.geo.pose import CameraPose

EVERY_PAIR = 12  # frames of a flight, up to which each is matched with each
NEIGHBOURS = 16  # that a frame of a larger flight is matched with at least
SMALLEST = 64  # pixels a side
HIGHEST_M = 1e5  # metres of a camera above or below the sea
FOCALS = 0.1, 10.0  # of the longer side, least and most: COLMAP's limits
Pair = tuple[int, int]
"""Two frames by their numbers, the lower first."""


@dataclass(frozen=True)
class Frame:
    """One frame.

    Attributes:
        name: "flight/id", for people.
        width, height: pixels.
        camera: its pose, of which the position is known.
    """

    name: str
    width: int
    height: int
    camera: CameraPose

    @property
    def problem(self) -> str | None:
        """Why it cannot take part, if it cannot; what an archive says may be forged."""
        camera = self.camera
        if min(self.width, self.height) < SMALLEST:
            return "too small for features"
        if camera.lon is None or camera.lat is None:
            return "no position"
        heights = [h for h in (camera.altitude_gps_m, camera.altitude_relative_m) if h is not None]
        inside = abs(camera.lat) <= 90 and abs(camera.lon) <= 360
        if not inside or not all(abs(height) <= HIGHEST_M for height in heights):
            return "its position is not on Earth"
        return None

    @property
    def lens(self) -> tuple[str, str, int, int, float | None]:
        """The same of frames that one camera took with one lens; its focal length in pixels."""
        pitch = field_of_view_pitch(self.camera, self.width, self.height)
        focal = round(1 / pitch, 3) if pitch else 0.0
        least, most = (f * max(self.width, self.height) for f in FOCALS)
        return (
            self.camera.make,
            self.camera.model,
            self.width,
            self.height,
            focal if least <= focal <= most else None,
        )


def places(frames: Sequence[Frame]) -> NDArray[np.float64]:
    """Where the cameras were: float64 (n, 3), metres east, north and up of the frames' middle.

    Heights are those above take-off where all frames have them, else those by GPS, else NaN.
    """
    lon, lat = (np.array([getattr(f.camera, n) for f in frames]) for n in ("lon", "lat"))
    # the middle as a vector: no frame is far away where longitudes start anew
    around = np.angle(np.exp(1j * np.radians(lon)).mean(), deg=True)
    local = Proj(proj="aeqd", lat_0=float(lat.mean()), lon_0=float(around), ellps="WGS84")
    east, north = local(lon, lat)
    up = np.full(len(frames), np.nan)
    for name in ("altitude_gps_m", "altitude_relative_m"):
        heights = [getattr(f.camera, name) for f in frames]
        if None not in heights:
            up = np.array(heights, np.float64)
    return np.column_stack([east, north, up])


def choose_pairs(frames: Sequence[Frame]) -> list[Pair]:
    """Frames to match: each with each of few; of many each with those taken nearest to it."""
    count = len(frames)
    if count <= EVERY_PAIR:
        return [(i, j) for i in range(count) for j in range(i + 1, count)]
    where = places(frames)[:, :2]
    pairs: set[Pair] = set()
    for i in range(count):
        away = np.hypot(*(where - where[i]).T)
        away[i] = np.inf
        nearest = np.argsort(away, kind="stable")[:NEIGHBOURS]
        pairs |= {(min(i, j), max(i, j)) for j in nearest.tolist()}
    return sorted(pairs)
