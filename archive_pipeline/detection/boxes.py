"""Boxes of detected objects: a large image in slices, and its objects whole again.

    width x height pixels -> slice_rows -> overlapping windows -> a detector -> merge_slices

A box is (left, top, right, bottom) in pixels of the image, float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.geo.georef import Window

Boxes = NDArray[np.float64]

OVERLAP = 0.2  # of a slice's side, shared with the next one; what most sliced inference uses
NMS_IOU = 0.6  # two boxes of one class that overlap more are one object
SAME_IOU = 0.5  # what two slices see of one object, inside both of them, overlaps at least so much
OTHER_CLASS_IOU = 0.7  # the same for boxes that the detector gave different classes
INSIDE = 0.7  # of a cut piece that lies in the other slice's box
CUT_MARGIN = 4.0  # pixels; a box that ends so near to a slice's inner border may be cut by it
BOX_STEP, SCORE_STEP = 1 / 8, 1e-4  # what is kept of a detector's numbers, here and in archives


@dataclass(frozen=True)
class Detections:
    """Objects found in one image, by falling score.

    Attributes:
        boxes: float64 (n, 4), multiples of `BOX_STEP` pixels.
        scores: float64 (n,), confidences of 0 to 1, multiples of `SCORE_STEP`.
        classes: int64 (n,), indices of the detector's classes.
    """

    boxes: Boxes
    scores: NDArray[np.float64]
    classes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def of(cls, boxes: Any, scores: Any, classes: Any) -> Detections:
        """Round a detector's numbers and sort them by falling score; equal scores keep order."""
        rounded = np.round(np.asarray(boxes, np.float64).reshape(-1, 4) / BOX_STEP) * BOX_STEP
        values = np.round(np.asarray(scores, np.float64).reshape(-1) / SCORE_STEP) * SCORE_STEP
        order = np.argsort(-values, kind="stable")
        return cls(rounded[order], values[order], np.asarray(classes, np.int64).reshape(-1)[order])

    def where(self, chosen: Any) -> Detections:
        """Those of a boolean mask or of indices in rising order."""
        return Detections(self.boxes[chosen], self.scores[chosen], self.classes[chosen])

    def to_json(self) -> dict[str, list[int]]:
        """Columns of whole numbers, which compress well: boxes and scores in their steps."""
        boxes = np.round(self.boxes / BOX_STEP).astype(int)
        columns = {
            "left": boxes[:, 0],
            "top": boxes[:, 1],
            "width": boxes[:, 2] - boxes[:, 0],
            "height": boxes[:, 3] - boxes[:, 1],
            "score": np.round(self.scores / SCORE_STEP).astype(int),
            "class": self.classes,
        }
        return {name: column.tolist() for name, column in columns.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Detections:
        """Reverse `to_json`.

        Raises:
            ValueError, KeyError, TypeError: the data are damaged.
        """
        names = ("left", "top", "width", "height", "score", "class")
        columns = [np.asarray(data[name], np.int64).reshape(-1) for name in names]
        if len({len(column) for column in columns}) != 1:
            raise ValueError("columns of detections differ in length")
        left, top, width, height, score, classes = columns
        if np.any(width < 0) or np.any(height < 0) or np.any((score < 0) | (score > 10_000)):
            raise ValueError("detections are out of range")
        boxes = np.stack([left, top, left + width, top + height], axis=1) * BOX_STEP
        return cls.of(boxes, score * SCORE_STEP, classes)


EMPTY = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))


def areas(boxes: Boxes) -> NDArray[np.float64]:
    """Areas (n,) in square pixels; 0 for boxes turned inside out."""
    sides: Boxes = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    return sides[:, 0] * sides[:, 1]


def intersections(a: Boxes, b: Boxes) -> NDArray[np.float64]:
    """Areas (len(a), len(b)) that two sets of boxes share."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides: Boxes = np.maximum(high - low, 0)
    return sides[..., 0] * sides[..., 1]


def iou(a: Boxes, b: Boxes) -> NDArray[np.float64]:
    """Intersection over union (len(a), len(b)); 0 for empty boxes."""
    shared = intersections(a, b)
    union = areas(a)[:, None] + areas(b)[None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def suppress(found: Detections, by_class: bool = True) -> Detections:
    """Non-maximum suppression: of boxes that overlap more than `NMS_IOU`, the best one.

    Args:
        by_class: boxes of different classes leave each other alone.
    """
    alike = iou(found.boxes, found.boxes) > NMS_IOU
    if by_class:
        alike &= found.classes[:, None] == found.classes[None, :]
    kept = np.ones(len(found), bool)
    for i in range(len(found)):
        if kept[i]:
            kept[i + 1 :] &= ~alike[i, i + 1 :]
    return found.where(kept)


def slice_rows(width: int, height: int, size: int) -> list[list[Window]]:
    """Cut an image into rows of windows (col, row, width, height), evenly spread.

    Neighbours share `OVERLAP` of their side at least. All windows have one shape, so that they
    make batches: `size` squared, less where the image is smaller.
    """
    cols, rows = _starts(width, size), _starts(height, size)
    shape = min(width, size), min(height, size)
    return [[(col, row, *shape) for col in cols] for row in rows]


def _starts(length: int, size: int) -> list[int]:
    if length <= size:
        return [0]
    overlap = round(size * OVERLAP)
    count = math.ceil((length - overlap) / (size - overlap))
    return [round(i * (length - size) / (count - 1)) for i in range(count)]


def strips(
    read: Callable[[Window], NDArray[np.uint8]],
    width: int,
    height: int,
    rows: list[list[Window]],
    block: int,
) -> Iterator[NDArray[np.uint8]]:
    """Yield the pixels (height of the windows, width, 3) of each row of windows.

    Every pixel is read once, `block` rows of the image or a multiple at a time, and no more is
    held than a strip and a block.
    """
    held = np.zeros((0, width, 3), np.uint8)
    top = 0
    for windows in rows:
        _, row, _, size = windows[0]
        held, top = held[row - top :], row
        have, stop = top + len(held), row + size
        if have < stop:
            until = min(height, -(-stop // block) * block)
            held = np.concatenate([held, read((0, have, width, until - have))])
        yield held[:size]


def merge_slices(rows: list[list[Window]], found: list[list[Detections]]) -> Detections:
    """Put together what a detector found in the slices of one image, each object once.

    Two boxes from neighbouring slices are one object if they agree where both slices look: each
    is clipped to the other's slice before they are compared. So an object that is whole in one
    slice and cut by another's border is found once, with its whole box; one that every slice cuts
    becomes the union of its pieces; and two objects side by side stay two.

    Args:
        rows: windows as `slice_rows` returns them.
        found: for each window, boxes in pixels of the whole image.
    """
    parts = [d for line in found for d in line]
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in parts])]).astype(int)
    boxes = np.concatenate([d.boxes for d in parts])
    scores = np.concatenate([d.scores for d in parts])
    classes = np.concatenate([d.classes for d in parts])
    columns = len(rows[0])
    bounds = [np.array([c, r, c + w, r + h], float) for line in rows for c, r, w, h in line]
    outer = np.array([0, 0, bounds[-1][2], bounds[-1][3]])
    cut = np.concatenate([_cut(d.boxes, b, outer) for d, b in zip(parts, bounds, strict=True)])

    parent = np.arange(len(boxes))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for one, two in _neighbours(len(rows), columns):
        first = np.arange(offsets[one], offsets[one + 1])
        second = np.arange(offsets[two], offsets[two + 1])
        for a, b in _pairs(first, second, bounds[one], bounds[two], boxes, classes, cut):
            parent[root(b)] = root(a)

    objects: dict[int, list[int]] = {}
    for i in range(len(boxes)):
        objects.setdefault(root(i), []).append(i)
    merged = []
    for members in objects.values():
        whole = [i for i in members if not cut[i]]
        best = max(whole or members, key=lambda i: scores[i])
        box = boxes[best]
        if not whole:
            seen = boxes[members]
            box = np.concatenate([seen[:, :2].min(axis=0), seen[:, 2:].max(axis=0)])
        merged.append((box, scores[best], classes[best]))
    if not merged:
        return EMPTY
    return suppress(Detections.of(*(np.array(column) for column in zip(*merged, strict=True))))


def _cut(boxes: Boxes, window: Boxes, outer: Boxes) -> NDArray[np.bool_]:
    """Whether each box ends at a border of its slice that is none of the image."""
    near = np.abs(boxes - window) <= CUT_MARGIN
    result: NDArray[np.bool_] = (near & (window != outer)).any(axis=1)
    return result


def _neighbours(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Indices of windows that may overlap; evenly spread, even the next but one can."""
    for row in range(rows):
        for col in range(columns):
            for down in range(3):
                for right in range(-2 if down else 1, 3):
                    if row + down < rows and 0 <= col + right < columns:
                        yield row * columns + col, (row + down) * columns + col + right


def _pairs(
    first: NDArray[np.int_],
    second: NDArray[np.int_],
    here: Boxes,
    there: Boxes,
    boxes: Boxes,
    classes: NDArray[np.int64],
    cut: NDArray[np.bool_],
) -> Iterator[tuple[int, int]]:
    """Indices of boxes of two slices that are one object, each box once at most."""
    low, high = np.maximum(here[:2], there[:2]), np.minimum(here[2:], there[2:])
    if not len(first) or not len(second) or np.any(low >= high):
        return
    a = np.concatenate([boxes[first, :2].clip(low, high), boxes[first, 2:].clip(low, high)], 1)
    b = np.concatenate([boxes[second, :2].clip(low, high), boxes[second, 2:].clip(low, high)], 1)
    agree = iou(a, b)
    same = classes[first][:, None] == classes[second][None, :]
    least = np.where(same, SAME_IOU, OTHER_CLASS_IOU)
    smaller = np.minimum(areas(a)[:, None], areas(b)[None, :])
    inside = intersections(a, b) >= np.where(smaller > 0, INSIDE * smaller, np.inf)
    inside &= (cut[first][:, None] | cut[second][None, :]) & same
    likely = np.argwhere((agree >= least) | inside)
    order = sorted(likely.tolist(), key=lambda p: (-agree[p[0], p[1]], p))
    used_a: set[int] = set()
    used_b: set[int] = set()
    for i, j in order:
        if i not in used_a and j not in used_b:
            used_a.add(i)
            used_b.add(j)
            yield int(first[i]), int(second[j])
