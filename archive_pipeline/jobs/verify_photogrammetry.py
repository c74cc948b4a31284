"""`archive verify-photogrammetry`: does photogrammetry still get from restored frames what it got?

original ┐              ┌ tie points ─ reconstruction ┐
         ├─ features ───┤                             ├─ differences ─ verdict
restored ┘              └ tie points ─ reconstruction ┘
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from archive_pipeline.codec.models import find_device
from archive_pipeline.codec.settings import Settings
from archive_pipeline.errors import require
from archive_pipeline.flight import locations
from archive_pipeline.flight.locations import Location
from archive_pipeline.flight.source_image import SourceError
from archive_pipeline.jobs import cluster
from archive_pipeline.jobs._cores import cpu_count
from archive_pipeline.jobs._verdicts import keep_verdict, tell_retired
from archive_pipeline.jobs._verifying import (
    OriginalRetired,
    one_line,
    original_of,
    peak_memory,
    scratch_folder,
)
from archive_pipeline.jobs.originals import Originals, original_pixels
from archive_pipeline.photogrammetry.frames import Frame
from archive_pipeline.photogrammetry.resuming import MOST_OF_ONE, Results, versions
from archive_pipeline.photogrammetry.verdict import NAMED, FlightReport
from archive_pipeline.photogrammetry.verification import PhotogrammetryOptions, PhotogrammetryReport
from archive_pipeline.store.archive import Archive, absolute
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.index import read_images
from archive_pipeline.store.layout import ArchiveError, ImageEntry
from archive_pipeline.store.retired import has_retired
from archive_pipeline.store.verdicts import record_digest

if TYPE_CHECKING:
    from archive_pipeline.photogrammetry.features import Features

# errors that say all there is to say
EXPECTED = (ArchiveError, SourceError, cluster.WorkerDied)


@dataclass(frozen=True)
class FrameTask:
    """One frame whose features are to be found."""

    archive: str
    entry: ImageEntry
    originals: tuple[Location, ...]  # files that may be the original
    missing: str | None  # what to say where none of them is, see `find_original`
    frame: Frame
    options: PhotogrammetryOptions


@dataclass(frozen=True)
class FrameFeatures:
    """Features of both versions of a frame."""

    original: Features
    restored: Features
    peak_memory: int | None
    kept: set[str]  # names of `Results`


def verify_photogrammetry(
    archive_url: str,
    options: PhotogrammetryOptions,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda total: None,
    stage: Callable[[str], None] = lambda name: None,
) -> PhotogrammetryReport:
    """Compare tie points, and reconstructions, of originals and restored frames.

    Args:
        progress: called after each frame's features with the number of frames.
        stage: called with what is done before the first frame and after the last.

    Raises:
        ArchiveError: the archive cannot be used, or has no such flight.
        FlightError: the folder of originals holds no images.
        NotInstalled: a package is missing.
    """
    started = time.monotonic()
    for module in ("cv2", "pycolmap"):
        require(module, "archive verify-photogrammetry", "photogrammetry")
    if scheduler is not None:  # its workers have a working directory of their own
        archive_url = absolute(archive_url)
        originals = options.originals and locations.absolute(options.originals)
        options = replace(options, originals=originals)
    workers = cluster.workers_in_reach(archive_url, scheduler, workers)
    cluster.check_device(options.device, scheduler)
    archive = Archive.open(archive_url)
    report = PhotogrammetryReport(archive_url, options)
    results = Results()
    results.tidy()
    stage("looking for originals")
    flights = _tasks(archive, report)
    total = sum(map(len, flights.values()))
    threads = workers or cpu_count()

    def step() -> None:
        progress(total)

    with (
        scratch_folder() as scratch,
        cluster.connect(scheduler, workers, total, options.device) as pool,
    ):
        for flight, tasks in flights.items():
            stage(f"{flight}: finding features")
            found = _verify_flight(
                pool, flight, tasks, report, results, scratch, threads, step, stage
            )
            report.flights.append(found)
            _keep(found, tasks, report)
    results.forget()
    report.seconds = time.monotonic() - started
    return report


def _tasks(archive: Archive, report: PhotogrammetryReport) -> dict[str, list[FrameTask]]:
    """The frames to compare by flight; `report` is told of images that are none."""
    options = report.options
    found = Originals(archive.url, options.originals, strict=not has_retired(archive))

    def damaged(name: str, error: ArchiveError) -> None:
        report.failed.append({"image": name, "error": str(error)})

    flights: dict[str, list[FrameTask]] = {}
    for entry in read_images(archive, options.flight, damaged):
        tasks = flights.setdefault(entry.flight, [])
        name = f"{entry.flight}/{entry.id}"
        reason = None if entry.detectable else "no photograph: not 8-bit RGB"
        try:
            source = ArchivedImage(archive, entry).source
        except ArchiveError as error:
            damaged(name, error)
            continue
        if source.camera is None:
            reason = reason or "no frame: nothing is known of a camera"
        else:
            frame = Frame(name, entry.record["width"], entry.record["height"], source.camera)
            reason = reason or frame.problem
        if reason is not None:
            report.skipped.append({"image": name, "reason": reason})
            continue
        places = found.candidates(entry), found.problem(entry)
        tasks.append(FrameTask(archive.url, entry, *places, frame, options))
    if options.flight is not None and not flights and not report.failed:
        raise ArchiveError(f"{archive.url}: no images of flight {options.flight}")
    return flights


def _verify_flight(
    pool: cluster.Pool,
    flight: str,
    tasks: list[FrameTask],
    report: PhotogrammetryReport,
    results: Results,
    scratch: Path,
    threads: int,
    step: Callable[[], None],
    stage: Callable[[str], None],
) -> FlightReport:
    """Find a flight's features, and compare. Features are on disk meanwhile, not in memory."""
    from archive_pipeline.photogrammetry.comparison import compare
    from archive_pipeline.photogrammetry.matching import Matcher, image_name

    options = report.options
    with TemporaryDirectory(dir=scratch) as folder:
        path = Path(folder)
        frames = [task.frame for task in tasks]
        numbers = {frame.name: number for number, frame in enumerate(frames)}
        matcher = Matcher(path / "features.db", frames, options.seed, threads, results)
        have, retired = [], []
        for task, result in pool.run(find_both_features, tasks):
            name = task.frame.name
            number = numbers[name]
            if isinstance(result, OriginalRetired):
                retired.append(task.entry)
            elif isinstance(result, BaseException):
                report.failed.append(
                    {"image": task.frame.name, "error": one_line(task.frame.name, result, EXPECTED)}
                )
            else:
                matcher.add(image_name("o", number), result.original)
                matcher.add(image_name("r", number), result.restored)
                results.names |= result.kept
                have.append(number)
                report.peak_memory = max(report.peak_memory or 0, result.peak_memory or 0) or None
            step()
        if retired:
            report.retired += tell_retired(Archive.reopen(report.archive), retired)
        if len(have) < 2:
            reason = _too_few(tasks, len(have), len(retired))
            return FlightReport(flight, [frames[number] for number in have], reason=reason)
        return compare(
            flight,
            {number: frames[number] for number in sorted(have)},
            matcher,
            options.tolerances,
            quick=options.quick,
            seed=options.seed,
            scratch=path,
            threads=threads,
            results=results,
            stage=stage,
        )


def _keep(found: FlightReport, tasks: list[FrameTask], report: PhotogrammetryReport) -> None:
    """Have the archive remember a flight's verdict, if there is one."""
    if not (found.passed or found.failures):
        return
    options, judged = report.options, {frame.name for frame in found.judged}
    entries = [task.entry for task in tasks if task.frame.name in judged]
    alone = [frame.name for frame in found.frames if frame.name not in judged]
    if alone:
        some = ", ".join(alone[:NAMED]) + (", ..." if len(alone) > NAMED else "")
        report.warnings.append(
            f"{found.flight}: nothing is proven of {len(alone)} of {len(found.frames)} frames, "
            f"whose originals do not fit to others either: {some}"
        )
    how = {
        "tolerances": dict(vars(options.tolerances)),
        "features": options.features,
        "seed": options.seed,
    }
    kind = "photogrammetry-quick" if options.quick else "photogrammetry"
    report.warnings += keep_verdict(report.archive, kind, found.passed, how, entries)


def _too_few(tasks: list[FrameTask], have: int, retired: int) -> str:
    if not tasks:
        return "no frames of a camera with a position"
    if retired:
        return f"archive retire has deleted the originals of {retired} of {len(tasks)} frames"
    if have < len(tasks):
        return f"{have} of {len(tasks)} frames could be compared, and tie points need two"
    return "a single frame, and tie points need two"


def find_both_features(task: FrameTask) -> FrameFeatures:
    """Find features of an original and of what is restored of it (runs on a worker).

    Raises:
        ArchiveError, SourceError: one line.
        OriginalRetired: there is nothing to compare it with any more.
    """
    from archive_pipeline.photogrammetry.features import Features, find_features

    options, frame = task.options, task.frame
    settings = Settings(find_device(options.device), precision=options.precision)
    archive = Archive.reopen(task.archive)
    # it is compared with a file
    image = ArchivedImage(archive, task.entry, settings, fixed=("sha256",))
    original, problem, _, retired = original_of(archive, image, task.originals, task.missing)
    if original is None:
        raise (OriginalRetired if retired else ArchiveError)(f"{frame.name}: {problem}")

    results = Results()

    def features(of: object, read: Callable[[], AbstractContextManager[Any]]) -> Features:
        question = {"features": of, "most": options.features, **versions()}
        kept = results.get(question) if of else None
        if kept is not None:
            return Features(kept["points"], kept["descriptors"])
        with read() as window:
            found = find_features(window, frame.width, frame.height, options.features)
        if of:
            results.put(question, {"points": found.points, "descriptors": found.descriptors})
        return found

    before = features(original.sha256, lambda: original_pixels(original))
    how = [settings.device, options.precision, record_digest(task.entry)]
    stored = _stored_pixels(archive, task.entry)
    after = features(stored and [*how, stored], lambda: nullcontext(image.read))
    return FrameFeatures(before, after, peak_memory(), results.names)


def _stored_pixels(archive: Archive, entry: ImageEntry) -> str | None:
    """SHA-256 of what is stored of an image's pixels; None where it is too much to read at once.

    Raises:
        ArchiveError: the store fails.
    """
    whole = hashlib.sha256()
    for key, stored in sorted(archive.stored(f"{entry.key}/pixels").items()):
        if stored.size > MOST_OF_ONE:
            return None
        whole.update(f"{key} {stored.size} ".encode("utf-8", "surrogateescape"))
        whole.update(archive.read_key(key, MOST_OF_ONE) or b"")
    return whole.hexdigest()
