"""How well found objects agree with reference objects: COCO's matching and average precision.

Both libraries that compute it (pycocotools, torchmetrics) want all images at once and know no
weights; a bootstrap over images needs both the other way round. So an image is matched where it
is processed, and what is left of it is summed as often as wanted. Tests hold it to pycocotools.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.detection.boxes import Boxes, Detections, iou

Array = NDArray[np.float64]

COCO_IOUS = tuple(np.linspace(0.5, 0.95, 10).tolist())
RECALLS = np.linspace(0, 1, 101)
METRICS = ("ratio", "confidence", "iou", "precision", "recall", "map50", "map50_95")
RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles
SEED = 0


@dataclass(frozen=True)
class Matched:
    """Found objects of one image and one class group against its reference objects.

    Attributes:
        found: the objects, by falling score.
        references: number of reference objects.
        hits: bool (1 + 10, n): object matched at the caller's IoU, and at each of `COCO_IOUS`.
        overlap: float64 (n,): IoU with the object matched at the caller's IoU, else 0.
        reference: int64 (n,): that object's index, else -1.
    """

    found: Detections
    references: int
    hits: NDArray[np.bool_]
    overlap: Array
    reference: NDArray[np.int64]


def match(found: Detections, references: Boxes, least_iou: float) -> Matched:
    """Match as COCO does: by falling score, each with the best reference object still free."""
    thresholds = (least_iou, *COCO_IOUS)
    hits = np.zeros((len(thresholds), len(found)), bool)
    overlap = np.zeros(len(found))
    reference = np.full(len(found), -1)
    agree = iou(found.boxes, references)
    candidates = np.flatnonzero((agree >= min(thresholds)).any(axis=1))
    for row, threshold in enumerate(thresholds):
        free = np.ones(len(references), bool)
        for i in candidates:
            left = np.where(free, agree[i], -1.0)
            best = int(np.argmax(left))
            if left[best] >= threshold:
                free[best] = False
                hits[row, i] = True
                if row == 0:
                    overlap[i], reference[i] = left[best], best
    return Matched(found, len(references), hits, overlap, reference)


class Summary:
    """Sums over images of one version (original or restored), for metrics under any weights."""

    def __init__(self, images: Sequence[Matched], confidence: float) -> None:
        """Args: confidence: least score of objects that count, mean average precision apart."""
        rows = []
        for image in images:
            sure = image.found.scores >= confidence
            hits = sure & image.hits[0]
            rows.append(
                (
                    image.references,
                    sure.sum(),
                    image.found.scores[sure].sum(),
                    hits.sum(),
                    image.overlap[hits].sum(),
                )
            )
        self.sums = np.array(rows, float).reshape(-1, 5)
        scores = np.concatenate([m.found.scores for m in images] or [np.zeros(0)])
        order = np.argsort(-scores, kind="stable")
        counts = [len(m.found) for m in images]
        self.image = np.repeat(np.arange(len(images)), counts)[order]
        hits = [m.hits[1:] for m in images] or [np.zeros((len(COCO_IOUS), 0), bool)]
        self.hits = np.concatenate(hits, axis=1)[:, order]

    def metrics(self, weights: Array) -> dict[str, float]:
        """Values of `METRICS`, NaN where nothing defines one.

        Args:
            weights: how often each image counts, float64 (images,).
        """
        references, found, score, hits, overlap = weights @ self.sums
        precisions = self._average_precisions(weights, references)
        return {
            "ratio": _over(found, references),
            "confidence": _over(score, found),
            "iou": _over(overlap, hits),
            "precision": _over(hits, found),
            "recall": _over(hits, references),
            "map50": float(precisions[0]),
            "map50_95": float(precisions.mean()),
        }

    def counts(self) -> tuple[int, int]:
        """Number of reference objects and of found ones."""
        return int(self.sums[:, 0].sum()), int(self.sums[:, 1].sum())

    def _average_precisions(self, weights: Array, references: float) -> Array:
        """Average precision at each of `COCO_IOUS`, over 101 recalls as COCO has it."""
        if not references:
            return np.full(len(COCO_IOUS), math.nan)
        each = weights[self.image]
        true = np.cumsum(self.hits * each, axis=1)
        every = np.cumsum(each)
        precision = np.divide(true, every, out=np.zeros_like(true), where=every > 0)
        # the best precision at this recall or a higher one
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        padded = np.concatenate([precision, np.zeros((len(precision), 1))], axis=1)
        at = [np.searchsorted(line, RECALLS) for line in true / references]
        return np.array([line[i].mean() for line, i in zip(padded, at, strict=True)])


def _over(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def intervals(
    original: Summary, restored: Summary, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, tuple[float, float] | None]:
    """Bootstrap intervals of restored minus original, both on the same resampled images.

    Returns:
        The 2.5th and 97.5th percentile for each metric, None where it is never defined.
    """
    count = len(original.sums)
    if not count:
        return dict.fromkeys(METRICS)
    random = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in METRICS}
    for _ in range(resamples):
        weights = np.bincount(random.integers(0, count, count), minlength=count).astype(float)
        before, after = original.metrics(weights), restored.metrics(weights)
        for name in METRICS:
            difference = after[name] - before[name]
            if not math.isnan(difference):
                drawn[name].append(difference)
    result: dict[str, tuple[float, float] | None] = {}
    for name, values in drawn.items():
        low, high = np.percentile(values, INTERVAL) if values else (math.nan, math.nan)
        result[name] = (float(low), float(high)) if values else None
    return result


def change(original: Matched, restored: Matched, confidence: float) -> tuple[float, int]:
    """How much one image's detections changed, and how many reference objects were lost.

    The change is in units of confidence: for each reference object the difference of the scores
    it was found with (0 where it was missed), plus that of the scores spent on nothing.
    """
    per_object = []
    wrong = []
    for m in (original, restored):
        sure = m.found.scores >= confidence
        scores = np.zeros(m.references)
        matched = sure & m.hits[0]
        scores[m.reference[matched]] = m.found.scores[matched]
        per_object.append(scores)
        wrong.append(m.found.scores[sure & ~m.hits[0]].sum())
    before, after = per_object
    lost = int(((before > 0) & (after == 0)).sum())
    return float(np.abs(after - before).sum() + abs(wrong[1] - wrong[0])), lost
