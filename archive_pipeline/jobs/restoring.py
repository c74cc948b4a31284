"""One image, or one mosaic, from the archive into a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archive_pipeline.flight.jpeg_segments import segments_of
from archive_pipeline.flight.raster import Raster
from archive_pipeline.geo.georef import Window
from archive_pipeline.geo.mapping import window_transform
from archive_pipeline.jobs import cluster
from archive_pipeline.jobs._targets import Targets
from archive_pipeline.jobs.decoding import Decoding
from archive_pipeline.jobs.mosaic import EmptyMosaic, write_mosaic
from archive_pipeline.jobs.selection import Selection
from archive_pipeline.jobs.views import OverviewView, View, coarser, reduced
from archive_pipeline.outputs import writers as outputs
from archive_pipeline.outputs.paths import OutputError
from archive_pipeline.outputs.publish import Stamps, existing
from archive_pipeline.stages import stage, timed
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.layout import ArchiveError, ImageEntry
from archive_pipeline.store.stored_models import require_denoiser

WRITERS = {
    "gtiff": outputs.write_gtiff,
    "jpeg": outputs.write_jpeg,
    "png": outputs.write_png,
}


@dataclass(frozen=True)
class RestoreTask:
    """One image to write."""

    archive: str
    entry: ImageEntry
    window: Window
    path: Path
    replace: Stamps
    format: str
    decoding: Decoding
    max_size: int | None = None


@dataclass(frozen=True)
class MosaicTask:
    """One mosaic to write."""

    path: Path
    selection: Selection
    crs: str | None
    resolution: float | None
    decoding: Decoding


@dataclass
class RestoreReport:
    """Files written, and images that could not be (id, reason).

    Attributes:
        seconds: wall time.
        stages: seconds of work by stage (`stages`), summed over workers; none for a mosaic,
            whose threads work on several at once.
        documents: files of flights that were written and are no images.
    """

    files: list[dict[str, Any]]
    failed: list[dict[str, str]]
    skipped: list[tuple[str, str]]
    seconds: float
    stages: dict[str, float] = field(default_factory=dict)
    documents: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The contract of `archive restore --json`."""
        return {
            "files": self.files,
            "documents": self.documents,
            "failed": self.failed,
            "seconds": round(self.seconds, 2),
            "stages": self.stages,
        }


def restore_image(task: RestoreTask) -> tuple[dict[str, Any], dict[str, float]]:
    """Write one image (runs on a worker); returns its entry of the report, and seconds by stage.

    Raises:
        ArchiveError, OutputError: one line that names the image.
    """
    with timed() as spent, stage("write"):
        return _write(task), spent


def _write(task: RestoreTask) -> dict[str, Any]:
    with stage("start"):
        settings = task.decoding.settings()
    archive = Archive.reopen(task.archive)
    if settings.steps:
        require_denoiser(archive, task.entry)
    image, replace = ArchivedImage(archive, task.entry, settings), task.replace
    entry = None
    while image.entry is not entry:  # replaced meanwhile: a file holds one image, not parts of two
        entry = image.entry
        original = image.original() if task.format == "jpeg" else None
        if original is not None:  # all of its segments, of which the record has some
            image.take_blocks(segments_of(original))
        view: Raster = View(image, task.window)
        if task.max_size is not None:
            view = reduced(View(image, task.window), task.max_size)
        if original is not None and view.window == (0, 0, *_size(image.entry)) == task.window:
            outputs.write_jpeg_file(task.path, view, original, replace)
        else:
            WRITERS[task.format](task.path, view, replace)
        replace = existing(task.path)
    georef = window_transform(view.source.georef, view.window)
    return {
        "path": str(task.path),
        "image": task.entry.id,
        "flight": task.entry.flight,
        "window": list(task.window),
        "crs": georef.crs,
        "transform": list(georef.transform) if georef.transform else None,
    }


def _size(entry: ImageEntry) -> tuple[int, int]:
    return entry.record["width"], entry.record["height"]


def restore_mosaic(
    archive: Archive,
    chosen: list[tuple[ImageEntry, Window]],
    task: MosaicTask,
    targets: Targets,
    report: RestoreReport,
    progress: Callable[[int], None],
) -> None:
    """Write a mosaic and report it, with the images that are left out because they are damaged."""
    replace = targets.claim(task.path)
    settings = task.decoding.settings()
    views: list[View] = []
    for entry, window in chosen:
        # where its pixels belong is computed once
        view = View(ArchivedImage(archive, entry, settings, fixed=("georef",)), window)
        try:
            if settings.steps:
                require_denoiser(archive, entry)
            _ = view.source  # read here, where damage concerns this image alone
            views.append(view)
        except ArchiveError as error:
            report.failed.append(failure(entry, error))

    def leave_out(raster: Raster, error: Exception) -> None:
        assert isinstance(raster, View | OverviewView)
        report.failed.append(failure(raster.image.entry, error))

    box = task.selection.bbox, task.selection.bbox_crs
    grid = task.crs, task.resolution
    try:
        made = write_mosaic(task.path, views, *box, *grid, progress, leave_out, replace, _coarser)
    except EmptyMosaic:
        if not report.failed:
            raise
        return
    file = {
        "path": str(task.path),
        "image": list(made.used),
        "window": [0, 0, made.width, made.height],
        "crs": made.crs,
        "transform": list(made.transform),
    }
    report.files.append(file)
    report.skipped += made.skipped


def _coarser(raster: Raster, factor: float) -> Raster:
    assert isinstance(raster, View)
    return coarser(raster, factor)


def restore_ortho(
    archive: Archive,
    entry: ImageEntry,
    window: Window,
    task: MosaicTask,
    targets: Targets,
    report: RestoreReport,
) -> None:
    """Write one image as a mosaic of its own and report it, or why it cannot be one."""
    own = RestoreReport([], [], [], 0.0)
    try:
        restore_mosaic(archive, [(entry, window)], task, targets, own, lambda total: None)
    except (OutputError, ArchiveError) as error:
        own.failed.append(failure(entry, error))
    for file in own.files:
        report.files.append({**file, "image": entry.id, "flight": entry.flight})
    report.failed += own.failed


def failure(entry: ImageEntry, error: BaseException) -> dict[str, str]:
    name = f"{entry.flight}/{entry.id}"
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, ArchiveError | OutputError | cluster.WorkerDied):
        text = str(error)  # says all there is to say
    if not text.startswith(f"{name}: "):
        text = f"{name}: {text.removeprefix(f'{entry.id}: ')}"
    return {"image": name, "error": " ".join(text.split())}
