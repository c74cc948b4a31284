"""A verification of an archive: its settings, what detectors found, and what that says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from archive_pipeline._version import __version__
from archive_pipeline.codec.settings import Settings
from archive_pipeline.detection.boxes import Boxes, Detections, suppress
from archive_pipeline.detection.detectors import (
    DEFAULT_DETECTOR,
    Detector,
    DetectorError,
    DetectorFile,
    Read,
)
from archive_pipeline.detection.labels import GROUPS, Groups, Labels, group_classes
from archive_pipeline.detection.metrics import match
from archive_pipeline.detection.verdict import GroupResult, ModelReport, judge
from archive_pipeline.flight.locations import Location
from archive_pipeline.pcdc.precision import Precision

FRAME = 20_000_000  # pixels that a usual drone camera takes
DetectorGroups = tuple[tuple[DetectorFile, Groups], ...]
"""Detectors, each with the groups of classes that it is judged by."""


@dataclass(frozen=True)
class VerifyOptions:
    """Settings of a verification, as the command line has them.

    Attributes:
        models: detectors, see `detectors.find_detectors`.
        groups: class names by group; without them, see `detectors.group_classes`.
        originals: folder or URL in which the originals lie; by default the folders that this user
            archived from on this machine.
        labels: YOLO labels, the reference; without them the originals' detections are.
        names: data.yaml or classes.txt of the labels.
        tolerance: largest difference of any metric that passes.
        confidence: least confidence of a detection that counts, mean average precision apart.
        iou: least intersection over union of a detection with its reference object.
        slice: side of slices in pixels; each detector's input size without one.
        device: "auto", "cpu" or "cuda".
        steps, seed, precision, realism: how the images are restored, as in `restore.restore`.
    """

    models: tuple[str, ...] = (DEFAULT_DETECTOR,)
    groups: Groups | None = None
    originals: Location | None = None
    labels: Path | None = None
    names: Path | None = None
    tolerance: float = 0.02
    confidence: float = 0.25
    iou: float = 0.5
    slice: int | None = None
    device: str = "auto"
    steps: int = 0
    seed: int = 0
    precision: Precision = "auto"
    realism: float = 1.0

    def __post_init__(self) -> None:
        if not self.realism:
            object.__setattr__(self, "steps", 0)

    def settings(self) -> Settings:
        """How this process decodes the images.

        Raises:
            ValueError: CUDA is asked for and there is none.
        """
        from archive_pipeline.codec.models import find_device

        device = find_device(self.device)
        return Settings(
            device, self.steps, self.seed, precision=self.precision, realism=self.realism
        )


@dataclass(frozen=True)
class ImageResult:
    """What detectors found in one image.

    Attributes:
        key: the archived image's key in the archive.
        name: "flight/id", for people.
        sha256: hex digest of its original.
        width, height: pixels.
        original: its file or URL, None where detections stored at ingest stand in for it.
        groups: by SHA-256 of the detector and by group.
        errors: a line for each detector whose detections of the original are not stored.
        warning: a file in the original's place that is another.
        seconds: what it took on its worker, with its detectors loaded before.
        peak_memory: most bytes that its worker's process had held by then; None on Windows.
    """

    key: str
    name: str
    sha256: str
    width: int
    height: int
    original: Location | None
    groups: dict[str, dict[str, GroupResult]]
    errors: tuple[str, ...] = ()
    warning: str | None = None
    seconds: float = 0.0
    peak_memory: int | None = None

    @property
    def pixels(self) -> int:
        return self.width * self.height


Versions = Callable[[ImageResult], AbstractContextManager[tuple[Read | None, Read]]]
"""Opens an image: what reads its original, None where that is gone, and its restored pixels."""


@dataclass
class Verification:
    """Outcome of a verification.

    Attributes:
        archive: its URL.
        models: verdict and numbers of each detector.
        images: results, in the archive's order.
        failed: {"image", "error"} of each image that could not be compared.
        skipped: {"image", "reason"} of images that detectors cannot take.
        warnings: what is odd, a line each.
        retired: {"flight", "image", "deleted": when, "verdicts": [{"kind", "passed", "date"}]} of
            each image that could not be compared as `archive retire` has deleted its original.
    """

    archive: str
    options: VerifyOptions
    models: list[ModelReport]
    images: list[ImageResult]
    failed: list[dict[str, str]]
    skipped: list[dict[str, str]]
    warnings: list[str]
    seconds: float
    retired: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Every detector compared something, and no difference exceeds the tolerance."""
        return bool(self.models) and all(model.passed for model in self.models)

    @property
    def below_tolerance(self) -> bool:
        """Some difference exceeds the tolerance."""
        return any(model.failures for model in self.models)

    @property
    def unproven(self) -> str:
        """Why a verification without failures has not passed."""
        if not self.images:
            if self.retired:
                some = f"{len(self.retired)} image{'s' * (len(self.retired) != 1)}"
                return f"archive retire has deleted the originals of {some}"
            return f"no image could be compared ({len(self.failed) + len(self.skipped)} were not)"
        idle = ", ".join(model.model for model in self.models if not model.compared)
        return f"nothing to compare was found or labelled ({idle})"

    @property
    def seconds_per_frame(self) -> float | None:
        """Mean seconds of a worker for 20 megapixels: both versions, all detectors."""
        pixels = sum(image.pixels for image in self.images)
        return sum(image.seconds for image in self.images) * FRAME / pixels if pixels else None

    @property
    def peak_memory(self) -> int | None:
        """Most bytes that a worker's process held; None where nobody counted."""
        return max((image.peak_memory or 0 for image in self.images), default=0) or None

    def how(self) -> dict[str, Any]:
        """What images were verified by, as the archive remembers it."""
        return {
            "models": [{"model": model.model, "sha256": model.sha256} for model in self.models],
            "reference": sorted({model.reference for model in self.models}),
            "tolerance": self.options.tolerance,
            "confidence": self.options.confidence,
            "iou": self.options.iou,
            "steps": self.options.steps,
            "realism": self.options.realism if self.options.steps else None,
        }

    def to_json(self) -> dict[str, Any]:
        """The contract of `archive verify-detection --json`."""
        return {
            "version": __version__,
            "passed": self.passed,
            "models": [model.to_json() for model in self.models],
            "tolerance": self.options.tolerance,
            "confidence": self.options.confidence,
            "iou": self.options.iou,
            "failed": self.failed,
            "skipped": self.skipped,
            "retired": self.retired,
            "warnings": self.warnings,
            "seconds": round(self.seconds, 2),
            "seconds_per_20_megapixels": self.seconds_per_frame
            and round(self.seconds_per_frame, 2),
            "peak_memory": self.peak_memory,
            "images": [
                {
                    "image": image.name,
                    "megapixels": round(image.pixels / 1e6, 3),
                    "seconds": round(image.seconds, 3),
                    "peak_memory": image.peak_memory,
                }
                for image in self.images
            ],
        }


def choose_groups(
    detectors: list[Detector], asked: Groups | None, labels: Labels | None
) -> tuple[DetectorGroups, list[str]]:
    """For each detector the groups, with the names of their classes, that it can be judged by."""
    warnings = []
    chosen = []
    for detector in detectors:
        known = group_classes(detector.classes, asked)
        for group in (asked or {}).keys() - known.keys():
            warnings.append(f"{detector.file.name}: knows no class of {group!r}")
        groups: Groups = {}
        for group in known:
            listed = (asked or GROUPS).get(group, (group,))  # or a class by itself
            named = None if labels is None else labels.names
            if labels is not None and named and not group_classes(named, {group: listed}):
                warnings.append(f"{labels.folder}: the labels know no class of {group!r}")
            else:
                groups[group] = listed
        chosen.append((detector.file, groups))
    if not any(groups for _, groups in chosen):
        first = detectors[0]
        some = ", ".join(list(first.classes.values())[:8])
        more = ", ..." if len(first.classes) > 8 else ""
        raise DetectorError("; ".join(warnings) + f" (classes of {first.file.name}: {some}{more})")
    return tuple(chosen), sorted(set(warnings))


def compare(
    detector: Detector,
    groups: Groups,
    before: Detections,
    after: Detections,
    labelled: dict[str, Boxes] | None,
    options: VerifyOptions,
) -> dict[str, GroupResult]:
    """Match both versions' objects of each group with the reference.

    Args:
        before, after: what the detector found in the original and in the restored image.
        labelled: the reference, boxes by class name; None for the original's own detections.
    """
    results = {}
    for group, listed in groups.items():
        indices = group_classes(detector.classes, {group: listed})[group]
        one, two = (of_group(found, indices) for found in (before, after))
        if labelled is None:
            reference = one.boxes[one.scores >= options.confidence]
        else:
            own = group_classes(dict(enumerate(labelled)), {group: listed}).get(group, [])
            boxes = [list(labelled.values())[i] for i in own]
            reference = np.concatenate([np.zeros((0, 4)), *boxes])
        results[group] = GroupResult(
            reference, match(one, reference, options.iou), match(two, reference, options.iou)
        )
    return results


def of_group(found: Detections, classes: Iterable[int]) -> Detections:
    """Objects of a group of classes, each once though the detector named it twice."""
    return suppress(found.where(np.isin(found.classes, list(classes))), by_class=False)


def summarise(
    file: DetectorFile,
    groups: Groups,
    images: list[ImageResult],
    reference: str,
    options: VerifyOptions,
) -> ModelReport:
    """Numbers and verdict of one detector over all images."""
    own = [image for image in images if file.sha256 in image.groups]
    report = ModelReport(
        model=file.name,
        sha256=file.sha256,
        reference=reference,
        images=len(own),
        stored=sum(image.original is None for image in own),
    )
    for group in groups:
        results = {image.name: image.groups[file.sha256][group] for image in own}
        judge(report, group, results, options.confidence, options.tolerance)
    return report
