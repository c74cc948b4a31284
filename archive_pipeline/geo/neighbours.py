"""Do overlapping frames agree with their tags?  A cheap check by matching small thumbnails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from archive_pipeline.geo.georef import Georef

# Compass and gimbal tags are good to a few degrees; flips and swapped angles are far beyond.
MAX_YAW_ERROR_DEG = 20.0
# Position tags are good to metres; an offset of this share of the frame's width is a wrong tag.
MAX_OFFSET_SHARE = 0.25
MIN_INLIERS = 15
MATCH_RATIO = 0.75
FEATURES = 1500  # on a thumbnail; twice as many link hardly more frames, in thrice the time
REPROJECTION_PX = 4.0

Gray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Frame:
    id: str
    georef: Georef
    matrix: npt.NDArray[np.float64]  # (2, 3), thumbnail pixels to ground
    span: float  # width of the frame on the ground
    keypoints: npt.NDArray[np.float64]
    descriptors: npt.NDArray[np.float32]


def neighbour_warnings(
    frames: Sequence[tuple[str, Georef, Gray | None]], width: int, height: int
) -> list[tuple[str, str]]:
    """Name the frames whose position or direction tags contradict their neighbours' pixels.

    Consecutive frames are matched by features.  What the match says of a frame's rotation is
    summed along the flight and compared with the tags; the majority is taken to be right.

    Args:
        frames: ``(id, georef, thumbnail)`` in the order of capture; the thumbnail is a uint8
            (h, w) reduction of the whole frame, about 640 pixels wide.  Frames without thumbnail
            or transform, and pairs that do not match, say nothing.
        width: full width of the frames in pixels.
        height: full height of the frames in pixels.

    Returns:
        ``(id, one line)`` for each suspicious frame, in the order of ``frames``.
    """
    sift = cv2.SIFT.create(FEATURES)
    previous: _Frame | None = None
    # Runs of frames chained by matches: (id, rotation error summed so far, offset error to the
    # frame before or 0).
    runs: list[list[tuple[str, float, float]]] = []
    for id, georef, thumbnail in frames:
        frame = None
        if thumbnail is not None and georef.transform is not None:
            frame = _describe(sift, id, georef, thumbnail, width, height)
        link = None
        if previous is not None and frame is not None and previous.georef.crs == georef.crs:
            link = _compare(previous, frame)
        if frame is not None:
            if link is None:
                runs.append([(id, 0.0, 0.0)])
            else:
                runs[-1].append((id, runs[-1][-1][1] + link[0], link[1]))
        previous = frame
    return [warning for run in runs if len(run) > 1 for warning in _judge(run)]


def _describe(
    sift: cv2.Feature2D, id: str, georef: Georef, thumbnail: Gray, width: int, height: int
) -> _Frame | None:
    points, descriptors = sift.detectAndCompute(thumbnail, None)
    if descriptors is None or georef.transform is None:
        return None
    a, b, c, d, e, f = georef.transform
    rows, cols = thumbnail.shape
    sx, sy = width / cols, height / rows
    matrix = np.array([[a * sx, b * sy, c], [d * sx, e * sy, f]])
    keypoints = np.array([point.pt for point in points], dtype=np.float64)
    return _Frame(id, georef, matrix, math.hypot(a, d) * width, keypoints, descriptors)


def _compare(one: _Frame, two: _Frame) -> tuple[float, float] | None:
    """Return (rotation in degrees, offset as a share of the width) that the tags are off by."""
    pairs = cv2.BFMatcher().knnMatch(one.descriptors, two.descriptors, k=2)
    good = [p[0] for p in pairs if len(p) == 2 and p[0].distance < MATCH_RATIO * p[1].distance]
    if len(good) < MIN_INLIERS:
        return None
    source = one.keypoints[[match.queryIdx for match in good]]
    target = two.keypoints[[match.trainIdx for match in good]]
    _, inliers = cv2.estimateAffinePartial2D(
        source, target, ransacReprojThreshold=REPROJECTION_PX, maxIters=5000
    )
    if inliers is None or int(inliers.sum()) < MIN_INLIERS:
        return None
    kept = inliers.ravel().astype(bool)
    ground_one = _to_ground(one, source[kept])
    ground_two = _to_ground(two, target[kept])
    # The rotation that takes the second frame's ground points to the first's.
    u, v = (_complex(points - points.mean(axis=0)) for points in (ground_two, ground_one))
    rotation = math.degrees(float(np.angle(np.vdot(u, v))))
    offset = float(np.median(np.hypot(*(ground_one - ground_two).T))) / one.span
    return rotation, offset


def _to_ground(frame: _Frame, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(points @ frame.matrix[:, :2].T + frame.matrix[:, 2])


def _complex(points: npt.NDArray[np.float64]) -> npt.NDArray[np.complex128]:
    return np.asarray(points[:, 0] + 1j * points[:, 1])


def _judge(run: list[tuple[str, float, float]]) -> list[tuple[str, str]]:
    errors = np.array([_wrap(rotation) for _, rotation, _ in run])
    # The direction most frames agree with; the first of equals.
    near = np.abs(_wrap_all(errors[:, None] - errors[None, :])) <= MAX_YAW_ERROR_DEG
    majority = errors[int(near.sum(axis=1).argmax())]
    wrong = np.abs(_wrap_all(errors - majority)) > MAX_YAW_ERROR_DEG
    found = []
    for index, (id, rotation, offset) in enumerate(run):
        if wrong[index]:
            error = _wrap(rotation - majority)
            found.append((id, f"yaw tag is off by {abs(error):.0f}° against its neighbours"))
        elif offset > MAX_OFFSET_SHARE and not wrong[index - 1]:
            share = f"{offset:.0%} of the frame's width"
            found.append((id, f"position tag is off by {share} against {run[index - 1][0]}"))
    return found


def _wrap(degrees: float) -> float:
    return (degrees + 180.0) % 360.0 - 180.0


def _wrap_all(degrees: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray((degrees + 180.0) % 360.0 - 180.0)
