"""`archive verify-detection`: do detectors see in restored images what they saw in the originals?

original, or its stored detections ┐
                                   ├─ detectors ─ match with the reference ─ metrics ─ verdict
restored pixels ───────────────────┘
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from archive_pipeline.codec.settings import Settings
from archive_pipeline.detection.boxes import Boxes, Detections, suppress
from archive_pipeline.detection.detectors import (
    DEFAULT_DETECTOR,
    Detector,
    DetectorError,
    DetectorFile,
    Read,
    StoredDetections,
    detect,
    find_detectors,
    load_detector,
    unpack_detections,
    whole,
)
from archive_pipeline.detection.labels import (
    GROUPS,
    Groups,
    LabelError,
    Labels,
    find_labels,
    group_classes,
    read_labels,
)
from archive_pipeline.detection.metrics import match
from archive_pipeline.detection.verdict import GroupResult, ModelReport, judge
from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.flight.locations import Location
from archive_pipeline.flight.source_image import SourceError
from archive_pipeline.jobs import cluster
from archive_pipeline.jobs.originals import (
    at_hand,
    by_name,
    candidates,
    find_original,
    read_original,
)
from archive_pipeline.store.archive import Archive, absolute, in_process_only
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.index import read_images
from archive_pipeline.store.layout import ArchiveError, ImageEntry

FRAME = 20_000_000  # pixels that a usual drone camera takes


class VerifyError(ArchivePipelineError):
    """An image that cannot be compared; one line that names it and why."""


# errors that say all there is to say
EXPECTED = (
    VerifyError,
    ArchiveError,
    SourceError,
    LabelError,
    DetectorError,
    cluster.WorkerDied,
)


@dataclass(frozen=True)
class VerifyOptions:
    """Settings of a verification, as the command line has them.

    Attributes:
        models: detectors, see `detectors.find_detectors`.
        groups: class names by group; without them, see `detectors.group_classes`.
        originals: where the originals lie; by default where they were when archived.
        labels: YOLO labels, the reference; without them the originals' detections are.
        names: data.yaml or classes.txt of the labels.
        tolerance: largest difference of any metric that passes.
        confidence: least confidence of a detection that counts, mean average precision apart.
        iou: least intersection over union of a detection with its reference object.
        slice: side of slices in pixels; each detector's input size without one.
        device: "auto", "cpu" or "cuda".
        steps, seed: how the images are restored, as in `restore.restore`.
    """

    models: tuple[str, ...] = (DEFAULT_DETECTOR,)
    groups: Groups | None = None
    originals: Path | None = None
    labels: Path | None = None
    names: Path | None = None
    tolerance: float = 0.02
    confidence: float = 0.25
    iou: float = 0.5
    slice: int | None = None
    device: str = "auto"
    steps: int = 0
    seed: int = 0

    def settings(self) -> Settings:
        """How this process decodes the images.

        Raises:
            ValueError: CUDA is asked for and there is none.
        """
        from archive_pipeline.codec.models import find_device

        return Settings(find_device(self.device), self.steps, self.seed)


@dataclass(frozen=True)
class VerifyTask:
    """One image to compare."""

    archive: str
    entry: ImageEntry
    originals: tuple[Path, ...] | None  # candidates below --originals; None: the recorded path
    label: Path | None
    label_names: dict[int, str] | None
    detectors: tuple[tuple[DetectorFile, Groups], ...]
    options: VerifyOptions

    @property
    def name(self) -> str:
        return f"{self.entry.flight}/{self.entry.id}"


@dataclass(frozen=True)
class ImageResult:
    """What detectors found in one image.

    Attributes:
        entry: the archived image.
        original: its file or URL, None where detections stored at ingest stand in for it.
        groups: by SHA-256 of the detector and by group.
        errors: a line for each detector whose detections of the original are not stored.
        warning: a file in the original's place that is another.
        seconds: what it took on its worker, with its detectors loaded before.
        peak_memory: most bytes that its worker's process had held by then; None on Windows.
    """

    entry: ImageEntry
    original: Location | None
    groups: dict[str, dict[str, GroupResult]]
    errors: tuple[str, ...] = ()
    warning: str | None = None
    seconds: float = 0.0
    peak_memory: int | None = None

    @property
    def name(self) -> str:
        return f"{self.entry.flight}/{self.entry.id}"

    @property
    def pixels(self) -> int:
        return int(self.entry.record["width"] * self.entry.record["height"])


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
    """

    archive: str
    options: VerifyOptions
    models: list[ModelReport]
    images: list[ImageResult]
    failed: list[dict[str, str]]
    skipped: list[dict[str, str]]
    warnings: list[str]
    seconds: float

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

    def to_json(self) -> dict[str, Any]:
        """The contract of `archive verify-detection --json`."""
        return {
            "passed": self.passed,
            "models": [model.to_json() for model in self.models],
            "tolerance": self.options.tolerance,
            "confidence": self.options.confidence,
            "iou": self.options.iou,
            "failed": self.failed,
            "skipped": self.skipped,
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


def verify(
    archive_url: str,
    options: VerifyOptions,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda total: None,
) -> Verification:
    """Run detectors over originals and restored images and judge the differences.

    Args:
        progress: called after each image with the number of images.

    Raises:
        ArchiveError: the archive cannot be used.
        DetectorError: a detector cannot be had, or none knows a class that is asked for.
        FlightError: the folder of originals holds no images.
        LabelError: the labels cannot be used.
    """
    import dask

    started = time.monotonic()
    if scheduler is not None:  # its workers have a working directory of their own
        archive_url = absolute(archive_url)
        options = replace(
            options,
            originals=options.originals and options.originals.absolute(),
            labels=options.labels and options.labels.absolute(),
        )
    if in_process_only(archive_url):
        workers = 0
        if scheduler is not None:
            raise ArchiveError(f"{archive_url}: only this process sees it; leave out --scheduler")
    options.settings()  # a device that is not there is told at once
    archive = Archive.open(archive_url)
    labels = None if options.labels is None else find_labels(options.labels, options.names)
    found = None if options.originals is None else by_name(options.originals)
    detectors = [load_detector(f, options.device) for f in find_detectors(options.models)]
    groups, warnings = choose_groups(detectors, options.groups, labels)

    failed: list[dict[str, str]] = []

    def damaged(name: str, error: ArchiveError) -> None:
        failed.append({"image": name, "error": str(error)})

    tasks, skipped = [], []
    used: set[Path] = set()
    for entry in read_images(archive, damaged=damaged):
        name = f"{entry.flight}/{entry.id}"
        if not entry.detectable:
            reason = "stored losslessly; detectors take 8-bit RGB only"
            skipped.append({"image": name, "reason": reason})
            continue
        label = None
        if labels is not None:
            try:
                label = labels.find(entry.flight, entry.id)
            except LabelError as error:
                failed.append({"image": name, "error": str(error)})
                continue
            if label is None:
                text = f"{name}: no label file in {labels.folder} (empty for one without objects)"
                failed.append({"image": name, "error": text})
                continue
            used.add(label)
        originals = None if found is None else candidates(found, entry)
        names = None if labels is None else labels.names
        tasks.append(VerifyTask(archive_url, entry, originals, label, names, groups, options))
    if labels is not None:
        warnings += _unused(labels, used)

    results: dict[str, ImageResult] = {}
    with (
        TemporaryDirectory() as scratch,
        dask.config.set({"temporary-directory": scratch}),  # else workers leave theirs in /tmp
        cluster.connect(scheduler, workers, len(tasks), options.device) as pool,
    ):
        for task, result in pool.run(verify_image, tasks):
            if isinstance(result, BaseException):
                expected = isinstance(result, EXPECTED)
                text = str(result) if expected else f"{type(result).__name__}: {result}"
                if task.name not in text:
                    text = f"{task.name}: {text}"
                failed.append({"image": task.name, "error": " ".join(text.split())})
            else:
                results[task.entry.key] = result
                failed += [{"image": task.name, "error": error} for error in result.errors]
                warnings += [result.warning] if result.warning else []
            progress(len(tasks))
    images = [results[task.entry.key] for task in tasks if task.entry.key in results]
    reference = "originals" if labels is None else "labels"
    models = [_summarise(file, own, images, reference, options) for file, own in groups]
    seconds = time.monotonic() - started
    return Verification(archive_url, options, models, images, failed, skipped, warnings, seconds)


def choose_groups(
    detectors: list[Detector], asked: Groups | None, labels: Labels | None
) -> tuple[tuple[tuple[DetectorFile, Groups], ...], list[str]]:
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


def _unused(labels: Labels, used: set[Path]) -> list[str]:
    """One line that counts label files of which no image is in the archive."""
    rest = sorted(set(labels.files.values()) - used)
    if not rest:
        return []
    some = ", ".join(str(path.relative_to(labels.folder)) for path in rest[:3])
    more = ", ..." if len(rest) > 3 else ""
    return [f"{labels.folder}: {len(rest)} label files without an image: {some}{more}"]


def verify_image(task: VerifyTask) -> ImageResult:
    """Compare one image (runs on a worker).

    Raises:
        VerifyError, ArchiveError, SourceError, LabelError, DetectorError: one line.
    """
    options = task.options
    settings = options.settings()
    for file, _ in task.detectors:
        load_detector(file, options.device)
    started = time.monotonic()
    archive = Archive.reopen(task.archive)
    if options.steps:
        archive.require_denoiser(task.entry)
    image = ArchivedImage(archive, task.entry, settings)
    width, height = task.entry.record["width"], task.entry.record["height"]
    original, problem, other = find_original(image, task.originals)
    stored = image.detections(unpack_detections) if original is None else None
    if original is None and stored is None:
        raise VerifyError(f"{task.name}: {problem}, and the archive has no detections of it")
    block = image.block[1]
    groups: dict[str, dict[str, GroupResult]] = {}
    errors = []
    with at_hand(original) as file_at_hand:
        readers: list[Read] = [] if file_at_hand is None else [partial(read_original, file_at_hand)]
        readers = [whole(read, width, height) for read in (*readers, image.read)]
        for file, names in task.detectors:
            detector = load_detector(file, options.device)
            size = options.slice or detector.input_size
            known = None if stored is None else stored.get(file.sha256)
            if stored is not None:
                unfit = _unfit(known, file, size, options.confidence)
                if unfit:
                    errors.append(f"{task.name}: {problem}, and {unfit}")
                    continue
            found = detect(detector, readers, width, height, size, block)
            if known is not None:
                # what the archive does not keep of one must not count in the other
                after = found[0].where(found[0].scores >= known.floor)
                found = [known.found, after]
            groups[file.sha256] = compare(task, detector, names, *found)
    if errors and not groups:
        raise VerifyError(errors[0])
    path = None if original is None else original.path
    warning = f"{task.name}: {problem}; its stored detections are used" if other else None
    seconds = time.monotonic() - started
    return ImageResult(task.entry, path, groups, tuple(errors), warning, seconds, _peak_memory())


def _peak_memory() -> int | None:
    """Most bytes of memory that this process has held so far."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _unfit(
    stored: StoredDetections | None, file: DetectorFile, size: int, confidence: float
) -> str | None:
    """Why stored detections cannot stand in for the original's, if they cannot."""
    if stored is None:
        return f"no detections by {file.name} are stored"
    if stored.slice != size:
        return f"the stored detections are of slices of {stored.slice} pixels, not {size}"
    if stored.floor > confidence:
        return f"detections are stored from a confidence of {stored.floor:g}, not {confidence:g}"
    return None


def compare(
    task: VerifyTask, detector: Detector, groups: Groups, before: Detections, after: Detections
) -> dict[str, GroupResult]:
    """Match both versions' objects of each group with the reference."""
    options = task.options
    labelled: dict[str, Boxes] | None = None
    if task.label is not None:
        names = detector.classes if task.label_names is None else task.label_names
        record = task.entry.record
        labelled = read_labels(task.label, record["width"], record["height"], names)
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


def _summarise(
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
