"""Metrics of pooled images under resampling, and what they say of bytes: BD-rates.

Metrics are of all images together, so an interval over images draws images with replacement and
computes every metric anew, of what was matched in each image: `detection.metrics.Summary` takes
how often each image counts. The draws are the same for all codecs, ratios and detectors: so
differences and ratios of codecs are paired.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.detection.metrics import INTERVAL, METRICS, SEED, Matched, Summary

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from rate_distortion import Curve, rate_ratio

Floats = NDArray[np.float64]
AT_PRECISION = {"ratio": "ratio_at", "precision": "precision_at", "recall": "recall_at"}
ALL_METRICS = (*METRICS, *AT_PRECISION.values())
LEAST_DEFINED = 0.95  # of resamples that must have a value for an interval to be told
TIE = 1e-9  # of precisions that are equal but for rounding


def draws(images: int, resamples: int) -> Floats:
    """How often each image counts, float64 (1 + resamples, images): once each, then resamples.

    The resamples are those of `detection.metrics.intervals`.
    """
    random = np.random.default_rng(SEED)
    rows = [np.ones(images)]
    for _ in range(resamples):
        drawn = random.integers(0, images, images)
        rows.append(np.bincount(drawn, minlength=images).astype(float))
    return np.stack(rows)


@dataclass(frozen=True)
class Sampled:
    """One codec at one ratio, as one detector saw it, under every row of `draws`.

    Attributes:
        bytes: float64 (1 + resamples,), of all images.
        values: the same of each of `ALL_METRICS`, NaN where nothing defines one.
    """

    bytes: Floats
    values: dict[str, Floats]

    def interval(self, metric: str, other: Sampled) -> tuple[float, float] | None:
        """Interval of this one's metric minus the other's, None where it is never defined."""
        difference = self.values[metric][1:] - other.values[metric][1:]
        return interval(difference, 0)


def interval(values: Floats, least: float) -> tuple[float, float] | None:
    """Percentiles `INTERVAL` of values that are not NaN.

    Returns:
        None without any, or where less than the part `least` of them is defined.
    """
    defined = values[~np.isnan(values)]
    if not len(defined) or len(defined) < least * len(values):
        return None
    low, high = np.percentile(defined, INTERVAL)
    return float(low), float(high)


def sample(
    matched: list[Matched],
    sizes: list[int],
    weights: Floats,
    confidence: float,
    target: Floats | None,
) -> Sampled:
    """Metrics and bytes of one codec's images under weights.

    Args:
        matched, sizes: of each image; bytes.
        weights: float64 (draws, images).
        confidence: least score of objects that count, mean average precision apart.
        target: the original's precision for each draw; None for the original itself.
    """
    summary = Summary(matched, confidence)
    rows = [summary.metrics(row) for row in weights]
    values = {name: np.array([row[name] for row in rows]) for name in METRICS}
    if target is None:
        values |= {at: values[name] for name, at in AT_PRECISION.items()}
    else:
        ranked = Ranked(matched, confidence)
        at = [ranked.at(*pair) for pair in zip(weights, target, strict=True)]
        columns = np.array(at).reshape(-1, len(AT_PRECISION)).T
        values |= dict(zip(AT_PRECISION.values(), columns, strict=True))
    return Sampled(weights @ np.array(sizes, float), values)


class Ranked:
    """All images' objects by falling score, for thresholds other than the usual one."""

    def __init__(self, images: list[Matched], confidence: float) -> None:
        scores = np.concatenate([m.found.scores for m in images])
        order = np.argsort(-scores, kind="stable")
        owner = np.repeat(np.arange(len(images)), [len(m.found) for m in images])
        self._image = owner[order]
        self._hit = np.concatenate([m.hits[0] for m in images])[order]
        self._references = np.array([m.references for m in images], float)
        falling = scores[order]
        self._ends = np.flatnonzero(np.diff(falling, append=-1) != 0)  # the last of equal scores
        self._usual = int((falling[self._ends] >= confidence).sum()) - 1

    def at(self, weights: Floats, target: float) -> tuple[float, float, float]:
        """Object ratio, precision and recall at the threshold that gives a precision.

        Precision may reach the target at several thresholds. From the usual one on, the threshold
        falls until the precision would be less than the target; where it is less at the usual
        one, the threshold rises until it is not. So the original, asked for its own precision,
        gives what it gives at the usual threshold, but for objects below it that are all right.

        Returns:
            NaN where no threshold has that precision.
        """
        each = weights[self._image]
        found, hits = (np.cumsum(v)[self._ends] for v in (each, each * self._hit))
        references = float(weights @ self._references)
        enough = hits >= (target - TIE) * found
        start = max(self._usual, 0)
        if self._usual < 0 or enough[start]:
            below = np.flatnonzero(~enough[start:])
            index = start + int(below[0]) - 1 if len(below) else len(enough) - 1
        else:
            above = np.flatnonzero(enough[:start] & (found[:start] > 0))
            index = int(above[-1]) if len(above) else -1
        if math.isnan(target) or index < 0 or not found[index] or not references:
            return math.nan, math.nan, math.nan
        return (
            float(found[index] / references),
            float(hits[index] / found[index]),
            float(hits[index] / references),
        )


@dataclass(frozen=True)
class Rate:
    """Bytes of a codec over another's at equal values of a metric.

    Attributes:
        ratio: geometric mean over the metric's range; NaN where the curves do not overlap.
        share: of the other's range of the metric, the part that was compared (0..1).
        interval: of the ratio; None where fewer than `LEAST_DEFINED` of the resamples overlap.
        defined: part of the resamples that do.
    """

    ratio: float
    share: float
    interval: tuple[float, float] | None
    defined: float


def rate(codec: list[Sampled], other: list[Sampled], metric: str) -> Rate:
    """Compare a codec's bytes with another's at equal quality (Bjontegaard).

    Each codec is a curve through its ratios: real bytes of all images, and the metric of all. For
    each resample both curves are made anew, of the same images. A curve may fall where bytes
    grow, as detectors are fickle: points that take more bytes than another for no more of the
    metric are dropped (`Curve.of`), as nobody would choose them, so the metric rises along what
    is left. Rates are compared over the range of the metric that both curves reach.

    Args:
        codec, other: at each ratio.
        metric: one of `ALL_METRICS`.
    """
    logs = []
    share = math.nan
    for draw in range(len(other[0].bytes)):
        curve, reference = (
            Curve.of([(float(s.bytes[draw]), float(s.values[metric][draw])) for s in some])
            for some in (codec, other)
        )
        ratio = rate_ratio(reference, curve, 0, math.inf) if reference else None
        logs.append(math.nan if ratio is None else ratio.log)
        if draw == 0 and ratio is not None:
            share = ratio.share
    values = np.exp(np.array(logs))
    defined = float(np.mean(~np.isnan(values[1:]))) if len(values) > 1 else math.nan
    return Rate(float(values[0]), share, interval(values[1:], LEAST_DEFINED), defined)
