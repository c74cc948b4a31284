"""What a detector loses in reconstructed pixels, and around which blocks: T of the utility.

original -> reference objects, each with the score that it is worth
reconstruction -> objects found -> loss of each reference object, and what is found wrongly
               -> spread evenly over the blocks that the object lies in
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.detection.boxes import Boxes, Detections, iou
from archive_pipeline.detection.detectors import Detector
from archive_pipeline.pcdc.constants import BLOCK_SIDE

LEAST_SCORE = 0.1  # weaker finds in the original are no objects that could be lost
_lock = threading.Lock()  # detectors are not made for several threads at once
FOUND = 0.3  # overlap from which on a find is of a reference object, if a badly placed one


@dataclass(frozen=True)
class TaskLoss:
    """Compares what a detector finds in reconstructions of a tile with a reference.

    Attributes:
        boxes: of reference objects (n, 4), in pixels of the tile.
        scores: what each of them is worth (n,), 0 to 1.
        height, width: of the tile.
    """

    detector: Detector
    boxes: Boxes
    scores: NDArray[np.float64]
    height: int
    width: int

    @classmethod
    def of(cls, detector: Detector, tile: NDArray[np.uint8]) -> TaskLoss:
        """The reference is what the detector finds in the original tile, uint8 (H, W, 3).

        Raises:
            DetectorError: the detector fails.
        """
        found = _find(detector, tile)
        found = found.where(found.scores >= LEAST_SCORE)
        return cls(detector, found.boxes, found.scores, *tile.shape[:2])

    def __call__(self, reconstruction: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What is lost in uint8 (H, W, 3) around each block, float32 (B_h, B_w).

        An object is lost as far as no find's overlap times score comes up to what it is worth;
        a find that is none of the reference counts with its score.

        Raises:
            DetectorError: the detector fails.
        """
        found = _find(self.detector, reconstruction)
        agree = iou(self.boxes, found.boxes)
        quality = (agree * found.scores).max(1, initial=0.0)
        lost = np.maximum(self.scores - quality, 0)
        wrong = self._wrong(found, agree)
        lost_map = self._spread(self.boxes, lost) + self._spread(wrong.boxes, wrong.scores)
        return lost_map.astype(np.float32)

    def _wrong(self, found: Detections, agree: NDArray[np.float64]) -> Detections:
        seen = agree.max(0, initial=0.0) >= FOUND
        return found.where(~seen & (found.scores >= LEAST_SCORE))

    def _spread(self, boxes: Boxes, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each value over the blocks (B_h, B_w) that its box meets, by its area in them."""
        rows, columns = -(-self.height // BLOCK_SIDE), -(-self.width // BLOCK_SIDE)
        down = _shares(boxes[:, 1], boxes[:, 3], rows)
        across = _shares(boxes[:, 0], boxes[:, 2], columns)
        spread: NDArray[np.float64] = np.einsum("n,nr,nc->rc", values, down, across)
        return spread


def _find(detector: Detector, tile: NDArray[np.uint8]) -> Detections:
    with _lock:
        [found] = detector.detect([tile])
    return found


def _shares(low: NDArray[np.float64], high: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Parts (n, count) of the intervals that lie in each block's side."""
    edges = BLOCK_SIDE * np.arange(count + 1, dtype=np.float64)
    inside = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
    inside = np.maximum(inside, 0)
    total = inside.sum(1, keepdims=True)
    return np.divide(inside, total, out=np.zeros_like(inside), where=total > 0)
