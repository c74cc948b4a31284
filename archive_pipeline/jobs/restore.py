"""Archived images back as georeferenced files: whole, by window, or as one mosaic."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archive_pipeline.codec.settings import Settings
from archive_pipeline.errors import UsageError, did_you_mean
from archive_pipeline.flight.raster import Raster
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.geo.georef import Bbox, Georef, Window
from archive_pipeline.geo.mapping import bbox_to_window, check_bbox, check_crs, window_transform
from archive_pipeline.jobs import cluster
from archive_pipeline.jobs._targets import Targets
from archive_pipeline.jobs.mosaic import EmptyMosaic, check_grid, write_mosaic
from archive_pipeline.outputs import writers as outputs
from archive_pipeline.outputs.paths import OutputError, output_path
from archive_pipeline.outputs.publish import Stamps, existing
from archive_pipeline.pcdc.precision import Precision
from archive_pipeline.stages import stage, summed, timed
from archive_pipeline.store.archive import Archive, absolute
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.index import look
from archive_pipeline.store.layout import ArchiveError, ImageEntry

SUFFIXES = {"gtiff": ".tif", "jpeg": ".jpg", "png": ".png"}
WRITERS = {
    "gtiff": outputs.write_gtiff,
    "jpeg": outputs.write_jpeg,
    "png": outputs.write_png,
}
MOSAIC_NAME = "mosaic.tif"
LISTED = 5  # flights that an error names


@dataclass(frozen=True)
class View:
    """A window (col, row, width, height) of an archived image, as `outputs.Raster` wants it."""

    image: ArchivedImage
    window: Window

    @property
    def source(self) -> SourceImage:
        return self.image.source

    @property
    def block(self) -> tuple[int, int]:
        return self.image.block

    def read(self, window: Window) -> Any:
        return self.image.read(window)

    def read_mask(self, window: Window) -> Any:
        return self.image.read_mask(window)


@dataclass(frozen=True)
class Selection:
    """Which images to restore, and which part of each.

    Attributes:
        bbox: west, south, east, north in `bbox_crs`; whole images without one.
        flight: only this flight.
        images: ids, or "flight/id"; all where empty.
    """

    bbox: Bbox | None = None
    bbox_crs: str = "EPSG:4326"
    flight: str | None = None
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class RestoreTask:
    """One image to write."""

    archive: str
    entry: ImageEntry
    window: Window
    path: Path
    replace: Stamps
    format: str
    device: str
    steps: int
    seed: int
    precision: Precision


@dataclass(frozen=True)
class MosaicTask:
    """One mosaic to write."""

    path: Path
    selection: Selection
    crs: str | None
    resolution: float | None
    device: str
    steps: int
    seed: int
    precision: Precision


@dataclass
class RestoreReport:
    """Files written, and images that could not be (id, reason).

    Attributes:
        seconds: wall time.
        stages: seconds of work by stage (`stages`), summed over workers; none for a mosaic,
            whose threads work on several at once.
    """

    files: list[dict[str, Any]]
    failed: list[dict[str, str]]
    skipped: list[tuple[str, str]]
    seconds: float
    stages: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The contract of `archive restore --json`."""
        return {
            "files": self.files,
            "failed": self.failed,
            "seconds": round(self.seconds, 2),
            "stages": self.stages,
        }


def select(
    archive: Archive, selection: Selection
) -> tuple[list[tuple[ImageEntry, Window]], list[dict[str, str]]]:
    """Images and windows that a selection means, in the archive's order.

    Returns:
        The images with their windows, and {"image", "error"} of those that may be meant but whose
        records are damaged.

    Raises:
        ArchiveError: a flight or image is not in the archive.
        ValueError: the bounding box or its CRS is invalid.
    """
    if selection.bbox is not None:
        check_bbox(selection.bbox, selection.bbox_crs)
    if selection.flight is not None and selection.flight not in (flights := archive.flights()):
        hint = did_you_mean(selection.flight, flights)
        raise ArchiveError(f"{archive.url}: no flight {selection.flight}{hint or _some(flights)}")
    wanted = set(selection.images)
    found: set[str] = set()
    chosen = []
    failed: list[dict[str, str]] = []

    def note(name: str, error: ArchiveError) -> None:
        names = {name, name.partition("/")[2]}
        found.update(names)
        if not wanted or wanted & names:
            failed.append({"image": name, "error": str(error)})

    contents = look(archive, selection.flight, note)
    keys: set[str] | None = None
    if wanted:
        keys = {k for k, flight, id in contents.names() if wanted & {id, f"{flight}/{id}"}}
    elif selection.bbox is not None:
        keys = contents.near(selection.bbox, selection.bbox_crs)
    for entry in contents.entries(note, keys):
        names = {entry.id, f"{entry.flight}/{entry.id}"}
        if wanted and not wanted & names:
            continue
        found |= names
        width, height = entry.record["width"], entry.record["height"]
        window: Window | None = (0, 0, width, height)
        if selection.bbox is not None:
            georef = Georef.from_json(entry.record["georef"])
            try:
                window = bbox_to_window(georef, width, height, selection.bbox, selection.bbox_crs)
            except Exception as error:  # the box is fine, so the image's own georeference is not
                name = f"{entry.flight}/{entry.id}"
                failed.append({"image": name, "error": f"{name}: georeference: {error}"})
                continue
        if window is not None:
            chosen.append((entry, window))
    missing = sorted(wanted - found)
    if missing:
        known = {name for _, flight, id in contents.names() for name in (id, f"{flight}/{id}")}
        hints = [f"no image {name}{did_you_mean(name, known)}" for name in missing]
        raise ArchiveError(f"{archive.url}: {', '.join(hints)}")
    return chosen, failed


def _some(flights: list[str]) -> str:
    """The first of an archive's flights, for who asked for one that is not there."""
    listed = ", ".join(flights[:LISTED]) or "none"
    more = f" and {len(flights) - LISTED} more" if len(flights) > LISTED else ""
    return f" (there are: {listed}{more})"


def restore(
    archive_url: str,
    selection: Selection,
    output: Path,
    *,
    format: str = "gtiff",
    mosaic: bool = False,
    ortho: bool = False,
    crs: str | None = None,
    resolution: float | None = None,
    overwrite: bool = False,
    steps: int = 0,
    seed: int = 0,
    precision: Precision = "auto",
    device: str = "auto",
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda total: None,
    stage: Callable[[str], None] = lambda name: None,
) -> RestoreReport:
    """Write what a selection means below `output`, an image that fails being reported.

    Images go to `output`/flight/image, a mosaic to `output`/mosaic.tif. A file that is there
    already stays, and the image fails.

    Args:
        format: "gtiff", "jpeg" or "png"; a mosaic is always a GeoTIFF.
        mosaic: one raster of all images, made by this process.
        ortho: each image resampled to a north-up raster, made by this process.
        crs, resolution: of the mosaic or of the rasters, see `write_mosaic`.
        overwrite: replace files that `restore` wrote.
        steps: denoising steps; 0 is the deterministic decoder.
        seed: of the denoiser's noise.
        precision: of the codec's large networks.
        scheduler, workers: see `cluster.connect`.
        progress: called after each image, or each block of a mosaic, with their number.
        stage: called with what is done before the first image.

    Raises:
        UsageError: the bounding box, a CRS or the resolution is invalid, or a mosaic shall be
            made by a scheduler or other processes.
        ArchiveError: the archive cannot be used, or a name is not in it.
        OutputError: `output` is inside the archive, or a mosaic cannot be written.
        ClusterError: there is no such scheduler, or it was lost.
    """
    started = time.monotonic()
    _check_usage(selection, format, mosaic, ortho, crs, resolution, scheduler, workers)
    if scheduler is not None:  # its workers have a working directory of their own
        archive_url, output = absolute(archive_url), output.absolute()
    cluster.check_device(device, scheduler)
    archive = Archive.open(archive_url)
    targets = Targets(archive, output, overwrite)
    stage("choosing images")
    chosen, failed = select(archive, selection)
    report = RestoreReport([], failed, [], 0.0)
    if mosaic:
        decoding = (device, steps, seed, precision)
        task = MosaicTask(output / MOSAIC_NAME, selection, crs, resolution, *decoding)
        if chosen:
            stage(f"looking at {len(chosen)} images")
            _restore_mosaic(archive, chosen, task, targets, report, progress)
    elif ortho:
        decoding = (device, steps, seed, precision)
        for entry, window in chosen:
            full = window == (0, 0, entry.record["width"], entry.record["height"])
            path = output_path(output, entry.flight, entry.id, window, full, SUFFIXES[format])
            task = MosaicTask(path, selection, crs, resolution, *decoding)
            _restore_ortho(archive, entry, window, task, targets, report)
            progress(len(chosen))
    else:
        tasks = []
        for entry, window in chosen:
            full = window == (0, 0, entry.record["width"], entry.record["height"])
            path = output_path(output, entry.flight, entry.id, window, full, SUFFIXES[format])
            try:
                replace = targets.claim(path)
            except OutputError as error:
                failed.append(_failure(entry, error))
                continue
            place = (window, path, replace, format)
            tasks.append(RestoreTask(archive_url, entry, *place, device, steps, seed, precision))
        # a window is decoded sooner than a worker process has started
        local = 0 if selection.bbox is not None and workers is None else workers
        if tasks:
            stage(f"decoding the first of {len(tasks)}")
        _restore_images(archive_url, tasks, scheduler, local, report, progress)
    report.seconds = time.monotonic() - started
    return report


def _check_usage(
    selection: Selection,
    format: str,
    mosaic: bool,
    ortho: bool,
    crs: str | None,
    resolution: float | None,
    scheduler: str | None,
    workers: int | None,
) -> None:
    """Raise `UsageError` for what makes no sense, before anything is opened."""
    if format not in SUFFIXES:
        raise UsageError(f"format {format!r} is none of {', '.join(SUFFIXES)}")
    if mosaic and ortho:
        raise UsageError("--mosaic and --ortho exclude each other")
    if (mosaic or ortho) and format != "gtiff":
        raise UsageError(f"{'--mosaic' if mosaic else '--ortho'} writes a GeoTIFF")
    if (mosaic or ortho) and (scheduler is not None or workers):
        option = "--mosaic" if mosaic else "--ortho"
        raise UsageError(f"{option} is made by this process: leave out --scheduler and --workers")
    if not (mosaic or ortho) and (resolution is not None or crs is not None):
        raise UsageError("--resolution and --crs are a mosaic's: they need --mosaic or --ortho")
    try:
        check_crs(selection.bbox_crs)
        if selection.bbox is not None:
            check_bbox(selection.bbox, selection.bbox_crs)
        check_grid(crs, resolution)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _restore_images(
    archive_url: str,
    tasks: list[RestoreTask],
    scheduler: str | None,
    workers: int | None,
    report: RestoreReport,
    progress: Callable[[int], None],
) -> None:
    """Write images on workers and report them."""
    workers = cluster.workers_in_reach(archive_url, scheduler, workers)
    if not tasks:
        return
    spent_by_task: list[dict[str, float]] = []
    with cluster.connect(scheduler, workers, len(tasks), tasks[0].device) as pool:
        for task, result in pool.run(restore_image, tasks):
            if isinstance(result, BaseException):
                report.failed.append(_failure(task.entry, result))
            else:
                file, spent = result
                report.files.append(file)
                spent_by_task.append(spent)
            progress(len(tasks))
    report.files.sort(key=lambda f: f["path"])
    report.stages = summed(spent_by_task)


def _settings(task: RestoreTask | MosaicTask) -> Settings:
    """How a task decodes images.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    from archive_pipeline.codec.models import find_device

    return Settings(find_device(task.device), task.steps, task.seed, precision=task.precision)


def _failure(entry: ImageEntry, error: BaseException) -> dict[str, str]:
    name = f"{entry.flight}/{entry.id}"
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, ArchiveError | OutputError | cluster.WorkerDied):
        text = str(error)  # says all there is to say
    if not text.startswith(f"{name}: "):
        text = f"{name}: {text.removeprefix(f'{entry.id}: ')}"
    return {"image": name, "error": " ".join(text.split())}


def _restore_ortho(
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
        _restore_mosaic(archive, [(entry, window)], task, targets, own, lambda total: None)
    except (OutputError, ArchiveError) as error:
        own.failed.append(_failure(entry, error))
    for file in own.files:
        report.files.append({**file, "image": entry.id, "flight": entry.flight})
    report.failed += own.failed


def _restore_mosaic(
    archive: Archive,
    chosen: list[tuple[ImageEntry, Window]],
    task: MosaicTask,
    targets: Targets,
    report: RestoreReport,
    progress: Callable[[int], None],
) -> None:
    """Write a mosaic and report it, with the images that are left out because they are damaged."""
    replace = targets.claim(task.path)
    settings = _settings(task)
    views: list[View] = []
    for entry, window in chosen:
        # where its pixels belong is computed once
        view = View(ArchivedImage(archive, entry, settings, fixed=("georef",)), window)
        try:
            if task.steps:
                archive.require_denoiser(entry)
            _ = view.source  # read here, where damage concerns this image alone
            views.append(view)
        except ArchiveError as error:
            report.failed.append(_failure(entry, error))

    def leave_out(raster: Raster, error: Exception) -> None:
        assert isinstance(raster, View)
        report.failed.append(_failure(raster.image.entry, error))

    box = task.selection.bbox, task.selection.bbox_crs
    grid = task.crs, task.resolution
    try:
        made = write_mosaic(task.path, views, *box, *grid, progress, leave_out, replace)
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


def restore_image(task: RestoreTask) -> tuple[dict[str, Any], dict[str, float]]:
    """Write one image (runs on a worker); returns its entry of the report, and seconds by stage.

    Raises:
        ArchiveError, OutputError: one line that names the image.
    """
    with timed() as spent, stage("write"):
        return _write(task), spent


def _write(task: RestoreTask) -> dict[str, Any]:
    with stage("start"):
        settings = _settings(task)
    archive = Archive.reopen(task.archive)
    if task.steps:
        archive.require_denoiser(task.entry)
    image, replace = ArchivedImage(archive, task.entry, settings), task.replace
    entry = None
    while image.entry is not entry:  # replaced meanwhile: a file holds one image, not parts of two
        entry = image.entry
        WRITERS[task.format](task.path, View(image, task.window), replace)
        replace = existing(task.path)
    georef = window_transform(Georef.from_json(image.entry.record["georef"]), task.window)
    return {
        "path": str(task.path),
        "image": task.entry.id,
        "flight": task.entry.flight,
        "window": list(task.window),
        "crs": georef.crs,
        "transform": list(georef.transform) if georef.transform else None,
    }
