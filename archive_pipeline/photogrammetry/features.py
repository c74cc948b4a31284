"""SIFT features of a frame, of a copy of half its size, as photogrammetry takes them.

At full size the finest features are the camera's noise and its JPEG's artefacts, of which hardly
any match: OpenDroneMap, Metashape's "medium" and COLMAP's default size all begin smaller, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from archive_pipeline.geo.georef import Window

Read = Callable[[Window], NDArray[Any]]
"""Reads a window (col, row, width, height) as uint8 (height, width, 3) pixels."""

FEATURES = 8192  # of a frame at most: COLMAP's default
LONGEST = 3200  # pixels of the reduced copy's longer side at most: COLMAP's default
SMALL = 2000  # frames with a shorter longer side are taken as they are
STRIP = 608  # rows that are read at a time, for each pixel of the reduction: a row of tiles


@dataclass(frozen=True)
class Features:
    """Features of one frame.

    Attributes:
        points: float32 (n, 2): column and row in pixels of the whole frame, from the first pixel's
            outer corner on, as COLMAP counts.
        descriptors: uint8 (n, 128): square roots of SIFT's, as COLMAP stores them.
    """

    points: NDArray[np.float32]
    descriptors: NDArray[np.uint8]


def find_features(read: Read, width: int, height: int, most: int = FEATURES) -> Features:
    """Find a frame's strongest features; the same pixels always give the same.

    Args:
        read: reads the frame.
        width, height: of the frame, pixels.
        most: features at most.
    """
    factor = reduction(width, height)
    grey = _reduced(read, width, height, factor)
    keypoints, found = cv2.SIFT.create(most, enable_precise_upscale=True).detectAndCompute(
        grey, None
    )
    if found is None or not len(keypoints):
        return Features(np.zeros((0, 2), np.float32), np.zeros((0, 128), np.uint8))
    points = (np.array([k.pt for k in keypoints], np.float32) + 0.5) * factor
    sums = np.maximum(found.sum(axis=1, keepdims=True), 1e-6)
    roots = np.clip(np.rint(512 * np.sqrt(found / sums)), 0, 255).astype(np.uint8)
    return Features(points, roots)


def reduction(width: int, height: int) -> int:
    """What features are looked for on is smaller by this factor a side."""
    longer = max(width, height)
    return 1 if longer < SMALL else max(2, -(-longer // LONGEST))


def _reduced(read: Read, width: int, height: int, factor: int) -> NDArray[np.uint8]:
    """A grey copy of the frame, means of pixels, read some rows at a time."""
    width, height = width - width % factor, height - height % factor
    parts = []
    for top in range(0, height, STRIP * factor):
        rows = min(STRIP * factor, height - top)
        grey = cv2.cvtColor(np.ascontiguousarray(read((0, top, width, rows))), cv2.COLOR_RGB2GRAY)
        size = (width // factor, rows // factor)
        parts.append(cv2.resize(grey, size, interpolation=cv2.INTER_AREA))
    return np.concatenate(parts)
