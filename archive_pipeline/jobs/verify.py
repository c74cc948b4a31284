"""`archive verify-detection`: do detectors see in restored images what they saw in the originals?

original, or its stored detections ┐
                                   ├─ detectors ─ match with the reference ─ metrics ─ verdict
restored pixels ───────────────────┘
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from archive_pipeline.detection.detectors import (
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
    LabelError,
    Labels,
    find_labels,
    read_labels,
    unnamed_classes,
)
from archive_pipeline.detection.verdict import GroupResult
from archive_pipeline.detection.verification import (
    DetectorGroups,
    ImageResult,
    Verification,
    VerifyOptions,
    Versions,
    choose_groups,
    compare,
    summarise,
)
from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.flight import locations
from archive_pipeline.flight.locations import Location
from archive_pipeline.flight.source_image import SourceError
from archive_pipeline.jobs import cluster
from archive_pipeline.jobs._verdicts import keep_verdict, tell_retired
from archive_pipeline.jobs._verifying import (
    OriginalRetired,
    one_line,
    original_of,
    peak_memory,
    scratch_folder,
)
from archive_pipeline.jobs.originals import Originals, original_pixels
from archive_pipeline.store.archive import Archive, absolute
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.index import read_images
from archive_pipeline.store.layout import ArchiveError, ImageEntry
from archive_pipeline.store.retired import has_retired
from archive_pipeline.store.stored_models import require_denoiser


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
class VerifyTask:
    """One image to compare."""

    archive: str
    entry: ImageEntry
    originals: tuple[Location, ...]  # files that may be the original
    missing: str | None  # what to say where none of them is, see `find_original`
    label: Path | None
    label_names: dict[int, str] | None
    detectors: DetectorGroups
    options: VerifyOptions

    @property
    def name(self) -> str:
        return f"{self.entry.flight}/{self.entry.id}"


def verify(
    archive_url: str,
    options: VerifyOptions,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda total: None,
    stage: Callable[[str], None] = lambda name: None,
) -> Verification:
    """Run detectors over originals and restored images and judge the differences.

    Args:
        progress: called after each image with the number of images.
        stage: called with what is done before the first image and after the last.

    Raises:
        ArchiveError: the archive cannot be used.
        DetectorError: a detector cannot be had, or none knows a class that is asked for.
        FlightError: the folder of originals holds no images.
        LabelError: the labels cannot be used.
    """
    started = time.monotonic()
    if scheduler is not None:  # its workers have a working directory of their own
        archive_url = absolute(archive_url)
        options = replace(
            options,
            originals=options.originals and locations.absolute(options.originals),
            labels=options.labels and options.labels.absolute(),
        )
    workers = cluster.workers_in_reach(archive_url, scheduler, workers)
    options.settings()  # a device that is not there is told at once
    archive = Archive.open(archive_url)
    stage("loading detectors")
    labels = None if options.labels is None else find_labels(options.labels, options.names)
    detectors = [load_detector(f, options.device) for f in find_detectors(options.models)]
    groups, warnings = choose_groups(detectors, options.groups, labels)
    if labels is not None and labels.names is None:
        warnings += [unnamed_classes(labels, d.file.name, d.classes) for d in detectors]
    reference = "originals" if labels is None else "labels"
    done = Verification(archive_url, options, [], [], [], [], warnings, 0.0)
    stage("looking for originals")
    tasks = _tasks(archive, labels, groups, done)
    if tasks:
        stage(f"comparing the first of {len(tasks)}")
    retired = _compare_all(tasks, scheduler, workers, done, progress)
    done.retired = tell_retired(archive, retired)
    stage("judging")
    done.models = [summarise(file, own, done.images, reference, options) for file, own in groups]
    done.seconds = time.monotonic() - started
    if done.passed or done.below_tolerance:
        # by every detector: what one of them could not compare is not proven
        compared = {image.key for image in done.images if not image.errors}
        entries = [task.entry for task in tasks if task.entry.key in compared]
        done.warnings += keep_verdict(archive_url, "detection", done.passed, done.how(), entries)
    return done


def _tasks(
    archive: Archive, labels: Labels | None, groups: DetectorGroups, done: Verification
) -> list[VerifyTask]:
    """The images to compare; `done` is told of those that cannot be."""
    found = Originals(archive.url, done.options.originals, strict=not has_retired(archive))
    names = None if labels is None else labels.names

    def damaged(name: str, error: ArchiveError) -> None:
        done.failed.append({"image": name, "error": str(error)})

    tasks = []
    used: set[Path] = set()
    for entry in read_images(archive, damaged=damaged):
        name = f"{entry.flight}/{entry.id}"
        if not entry.detectable:
            reason = "stored losslessly; detectors take 8-bit RGB only"
            done.skipped.append({"image": name, "reason": reason})
            continue
        label = None
        if labels is not None:
            try:
                label = labels.find(entry.flight, entry.id)
            except LabelError as error:
                done.failed.append({"image": name, "error": str(error)})
                continue
            if label is None:
                text = f"{name}: no label file in {labels.folder} (empty for one without objects)"
                done.failed.append({"image": name, "error": text})
                continue
            used.add(label)
        originals = found.candidates(entry), found.problem(entry)
        tasks.append(VerifyTask(archive.url, entry, *originals, label, names, groups, done.options))
    if labels is not None:
        done.warnings += _unused(labels, used)
    return tasks


def _compare_all(
    tasks: list[VerifyTask],
    scheduler: str | None,
    workers: int | None,
    done: Verification,
    progress: Callable[[int], None],
) -> list[ImageEntry]:
    """Run the tasks; `done` is given their results in the archive's order.

    Returns:
        Images whose originals `archive retire` has deleted, so that nothing could be compared.
    """
    results: dict[str, ImageResult] = {}
    retired = []
    with (
        scratch_folder(),
        cluster.connect(scheduler, workers, len(tasks), done.options.device) as pool,
    ):
        for task, result in pool.run(verify_image, tasks):
            if isinstance(result, OriginalRetired):
                retired.append(task.entry)
            elif isinstance(result, BaseException):
                text = one_line(task.name, result, EXPECTED)
                done.failed.append({"image": task.name, "error": text})
            else:
                results[result.key] = result
                done.failed += [{"image": task.name, "error": error} for error in result.errors]
                done.warnings += [result.warning] if result.warning else []
            progress(len(tasks))
    done.images = [results[task.entry.key] for task in tasks if task.entry.key in results]
    return retired


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
        OriginalRetired: there is nothing to compare it with any more.
    """
    options = task.options
    settings = options.settings()
    for file, _ in task.detectors:
        load_detector(file, options.device)
    started = time.monotonic()
    archive = Archive.reopen(task.archive)
    if settings.steps:
        require_denoiser(archive, task.entry)
    # it is compared with a file
    image = ArchivedImage(archive, task.entry, settings, fixed=("sha256",))
    width, height = task.entry.record["width"], task.entry.record["height"]
    original, problem, other, retired = original_of(archive, image, task.originals, task.missing)
    stored = image.detections(unpack_detections) if original is None else None
    if original is None and stored is None:
        text = f"{task.name}: {problem}, and the archive has no detections of it"
        raise (OriginalRetired if retired else VerifyError)(text)
    block = image.block[1]
    groups: dict[str, dict[str, GroupResult]] = {}
    errors = []
    with original_pixels(original) as read_original:
        both = (image.read,) if read_original is None else (read_original, image.read)
        readers = [whole(read, width, height) for read in both]
        for file, names in task.detectors:
            detector = load_detector(file, options.device)
            size = options.slice or detector.input_size
            known = None if stored is None else stored.get(file.sha256)
            if stored is not None:
                unfit = _unfit(known, file, size, options.confidence)
                if unfit:
                    errors.append(f"{task.name}: {problem}, and {unfit}")
                    continue
            *first, after = detect(detector, readers, width, height, size, block)
            if known is None:
                [before] = first
            else:
                # what the archive does not keep of one must not count in the other
                before, after = known.found, after.where(after.scores >= known.floor)
            labelled = None
            if task.label is not None:
                classes = detector.classes if task.label_names is None else task.label_names
                labelled = read_labels(task.label, width, height, classes)
            groups[file.sha256] = compare(detector, names, before, after, labelled, options)
    if errors and not groups:
        raise VerifyError(errors[0])
    return ImageResult(
        task.entry.key,
        task.name,
        task.entry.record["sha256"],
        width,
        height,
        original=None if original is None else original.path,
        groups=groups,
        errors=tuple(errors),
        warning=f"{task.name}: {problem}; its stored detections are used" if other else None,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
    )


def versions_of(report: Verification) -> Versions:
    """What opens a compared image again, for the report's pictures.

    Raises:
        ArchiveError: the archive is gone.
    """
    archive, settings = Archive.open(report.archive), report.options.settings()

    @contextmanager
    def opened(result: ImageResult) -> Iterator[tuple[Read | None, Read]]:
        entry = archive.entry(result.key)
        if entry is None or entry.record["sha256"] != result.sha256:
            raise ArchiveError(f"{result.name}: was replaced since it was compared")
        image = ArchivedImage(archive, entry, settings, fixed=("sha256",))
        source = None if result.original is None else replace(image.source, path=result.original)
        with original_pixels(source) as read:
            yield read, image.read

    return opened


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
