"""What a verification says of one detector: numbers, differences, intervals, pass or fail."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from archive_pipeline.detection.boxes import Boxes
from archive_pipeline.detection.metrics import METRICS, Matched, Summary, change, intervals

NAMED = 5  # images that lost most, named with a failure
ROUNDING = 1e-9  # of differences of equal numbers
Numbers = dict[str, float | None]


@dataclass(frozen=True)
class GroupResult:
    """One image's objects of a class group: the reference, and both versions matched with it.

    Attributes:
        reference: float64 (n, 4): boxes of the labels, or of the original's sure detections.
    """

    reference: Boxes
    original: Matched
    restored: Matched


@dataclass(frozen=True)
class Failure:
    """A difference that exceeds the tolerance; `images` changed most, the worst first."""

    group: str
    metric: str
    difference: float
    images: list[str]


@dataclass
class ModelReport:
    """Numbers and verdict of one detector.

    Attributes:
        model, sha256: the detector.
        reference: "labels" or "originals", that is their detections.
        images: compared; `stored` of them by detections from ingest, the originals being gone.
        objects: reference objects by group.
        original, restored, delta: `METRICS` by group, None where nothing defines a number.
        intervals: 95 % bootstrap intervals of the differences, over images.
        changes: by group (change, lost objects) of each image, see `detection_metrics.change`.
        failures: differences that exceed the tolerance.
    """

    model: str
    sha256: str
    reference: str
    images: int
    stored: int
    objects: dict[str, int] = field(default_factory=dict)
    found: dict[str, tuple[int, int]] = field(default_factory=dict)
    original: dict[str, Numbers] = field(default_factory=dict)
    restored: dict[str, Numbers] = field(default_factory=dict)
    delta: dict[str, Numbers] = field(default_factory=dict)
    intervals: dict[str, dict[str, tuple[float, float] | None]] = field(default_factory=dict)
    changes: dict[str, dict[str, tuple[float, int]]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    @property
    def failed_groups(self) -> dict[str, list[Failure]]:
        """Failures by group, whose images are the same."""
        groups: dict[str, list[Failure]] = {}
        for failure in self.failures:
            groups.setdefault(failure.group, []).append(failure)
        return groups

    @property
    def compared(self) -> bool:
        """Whether there was any object to compare; without one nothing is proven."""
        return any(self.objects.values()) or any(sum(n) for n in self.found.values())

    @property
    def passed(self) -> bool:
        """No difference exceeds the tolerance, and there was something to compare."""
        return self.compared and not self.failures

    def to_json(self) -> dict[str, Any]:
        """This detector's part of `archive verify-detection --json`."""
        return {
            "model": self.model,
            "sha256": self.sha256,
            "images": self.images,
            "images_by_stored_detections": self.stored,
            "reference": self.reference,
            "passed": self.passed,
            "objects": self.objects,
            "detections": {group: list(counts) for group, counts in self.found.items()},
            "original": self.original,
            "restored": self.restored,
            "delta": self.delta,
            "interval": {
                group: {name: None if pair is None else list(pair) for name, pair in own.items()}
                for group, own in self.intervals.items()
            },
            "failures": [
                {"class": f.group, "metric": f.metric, "delta": f.difference, "images": f.images}
                for f in self.failures
            ],
        }


def judge(
    report: ModelReport,
    group: str,
    images: dict[str, GroupResult],
    confidence: float,
    tolerance: float,
) -> None:
    """Add one class group's numbers, differences and failures to a report.

    Where the reference has no object, no metric is defined; then the numbers of detections must
    not differ by more than the tolerance, as parts of the original's (of 1 where that has none).

    Args:
        images: results by the images' names.
        confidence: least confidence of a detection that counts.
    """
    original = Summary([r.original for r in images.values()], confidence)
    restored = Summary([r.restored for r in images.values()], confidence)
    every = np.ones(len(images))
    before, after = original.metrics(every), restored.metrics(every)
    difference = {name: after[name] - before[name] for name in METRICS}
    report.objects[group], found = original.counts()
    report.found[group] = (found, restored.counts()[1])
    report.original[group] = _numbers(before)
    report.restored[group] = _numbers(after)
    report.delta[group] = _numbers(difference)
    report.intervals[group] = {
        name: None if pair is None else (round(pair[0], 6), round(pair[1], 6))
        for name, pair in intervals(original, restored).items()
    }
    report.changes[group] = {
        name: change(r.original, r.restored, confidence) for name, r in images.items()
    }
    worst = sorted(report.changes[group].items(), key=lambda item: (-item[1][0], item[0]))
    named = [name for name, (amount, _) in worst[:NAMED] if amount > 0]
    judged = difference
    if not report.objects[group]:
        spurious = (report.found[group][1] - found) / max(found, 1)
        judged = {"detections": spurious}
    report.failures += [
        Failure(group, metric, round(value, 6), named)
        for metric, value in judged.items()
        if abs(value) > tolerance + ROUNDING  # false for NaN
    ]


def _numbers(values: dict[str, float]) -> Numbers:
    """For JSON, which has no NaN."""
    return {name: None if math.isnan(value) else round(value, 6) for name, value in values.items()}
