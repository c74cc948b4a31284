"""Archived images back as georeferenced files: whole, by window, or as one mosaic."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from archive_pipeline.errors import UsageError
from archive_pipeline.geo.georef import Window
from archive_pipeline.geo.mapping import check_bbox, check_crs
from archive_pipeline.jobs import cluster
from archive_pipeline.jobs._documents import restore_documents
from archive_pipeline.jobs._targets import Targets
from archive_pipeline.jobs.decoding import Decoding
from archive_pipeline.jobs.mosaic import check_grid
from archive_pipeline.jobs.restoring import (
    MosaicTask,
    RestoreReport,
    RestoreTask,
    failure,
    restore_image,
    restore_mosaic,
    restore_ortho,
)
from archive_pipeline.jobs.selection import Selection, select
from archive_pipeline.jobs.views import check_size
from archive_pipeline.outputs.paths import OutputError, output_path
from archive_pipeline.outputs.publish import sweep
from archive_pipeline.pcdc.precision import Precision
from archive_pipeline.stages import summed
from archive_pipeline.store.archive import Archive, absolute
from archive_pipeline.store.layout import ImageEntry

SUFFIXES = {"gtiff": ".tif", "jpeg": ".jpg", "png": ".png"}
MOSAIC_NAME = "mosaic.tif"


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
    max_size: int | None = None,
    overwrite: bool = False,
    steps: int = 0,
    seed: int = 0,
    realism: float = 1.0,
    precision: Precision = "auto",
    device: str = "auto",
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda total: None,
    stage: Callable[[str], None] = lambda name: None,
) -> RestoreReport:
    """Write what a selection means below `output`, an image that fails being reported.

    Images go to `output`/flight/image, a mosaic to `output`/mosaic.tif. A file that is there
    already stays, and the image fails. Whole flights have their documents with them.

    Args:
        format: "gtiff", "jpeg" or "png"; a mosaic is always a GeoTIFF.
        mosaic: one raster of all images, made by this process.
        ortho: each image resampled to a north-up raster, made by this process.
        crs, resolution: of the mosaic or of the rasters, see `write_mosaic`.
        max_size: pixels on the longer side of a restored image at most.
        overwrite: replace files that `restore` wrote.
        steps: denoising steps; 0 is the deterministic decoder.
        seed: of the denoiser's noise.
        realism: how much of the detail that denoising generates is in the pixels, 0..1.
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
    _check_size(max_size, mosaic or ortho)
    if scheduler is not None:  # its workers have a working directory of their own
        archive_url, output = absolute(archive_url), output.absolute()
    cluster.check_device(device, scheduler)
    archive = Archive.open(archive_url)
    targets = Targets(archive, output, overwrite)
    stage("choosing images")
    chosen, failed = select(archive, selection)
    report = RestoreReport([], failed, [], 0.0)
    decoding = Decoding(device, steps, seed, precision, realism)
    if mosaic:
        task = MosaicTask(output / MOSAIC_NAME, selection, crs, resolution, decoding)
        if chosen:
            stage(f"looking at {len(chosen)} images")
            restore_mosaic(archive, chosen, task, targets, report, progress)
    elif ortho:
        for entry, window in chosen:
            path = _path(output, entry, window, format)
            task = MosaicTask(path, selection, crs, resolution, decoding)
            restore_ortho(archive, entry, window, task, targets, report)
            progress(len(chosen))
    else:
        tasks = _tasks(archive_url, chosen, targets, format, decoding, max_size, report)
        # a window is decoded sooner than a worker process has started
        local = 0 if selection.bbox is not None and workers is None else workers
        if tasks:
            stage(f"decoding the first of {len(tasks)}")
        _restore_images(archive_url, tasks, scheduler, local, report, progress)
        if selection.bbox is None and not selection.images:
            report.documents, lost = restore_documents(archive, selection.flight, output, targets)
            report.failed += lost
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
    if selection.bbox is None and selection.bbox_crs != "EPSG:4326" and not (mosaic or ortho):
        raise UsageError("--bbox-crs is of a --bbox, which is not given")
    try:
        check_crs(selection.bbox_crs)
        if selection.bbox is not None:
            check_bbox(selection.bbox, selection.bbox_crs)
        check_grid(crs, resolution)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _path(output: Path, entry: ImageEntry, window: Window, format: str) -> Path:
    """Where a window of an image is written."""
    full = window == (0, 0, entry.record["width"], entry.record["height"])
    return output_path(output, entry.flight, entry.id, window, full, SUFFIXES[format])


def _tasks(
    archive_url: str,
    chosen: list[tuple[ImageEntry, Window]],
    targets: Targets,
    format: str,
    decoding: Decoding,
    max_size: int | None,
    report: RestoreReport,
) -> list[RestoreTask]:
    """A task for each image, but those whose files are taken, which are reported."""
    tasks = []
    for entry, window in chosen:
        path = _path(targets.output, entry, window, format)
        try:
            replace = targets.claim(path, _content(entry, window, format, max_size))
        except OutputError as error:
            report.failed.append(failure(entry, error))
            continue
        place = window, path, replace, format
        tasks.append(RestoreTask(archive_url, entry, *place, decoding, max_size))
    return tasks


def _content(entry: ImageEntry, window: Window, format: str, max_size: int | None) -> str | None:
    """SHA-256 of what is written, where that is the original itself."""
    record = entry.record
    size = record["width"], record["height"]
    smaller = max_size is not None and max_size < max(size)
    if record["codec"] != "jpeg" or format != "jpeg" or window != (0, 0, *size) or smaller:
        return None
    sha256: str = record["sha256"]
    return sha256


def _check_size(max_size: int | None, resampled: bool) -> None:
    """Raise `UsageError` unless images can be given this size."""
    if max_size is None:
        return
    check_size(max_size)
    if resampled:
        raise UsageError("--max-size is of images in their own grid; here --resolution is meant")


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
    try:
        with cluster.connect(scheduler, workers, len(tasks), tasks[0].decoding.device) as pool:
            for task, result in pool.run(restore_image, tasks):
                if isinstance(result, BaseException):
                    report.failed.append(failure(task.entry, result))
                else:
                    file, spent = result
                    report.files.append(file)
                    spent_by_task.append(spent)
                progress(len(tasks))
    finally:
        for folder in {task.path.parent for task in tasks}:
            sweep(folder)  # what killed workers, and killed runs before, have left
    report.files.sort(key=lambda f: f["path"])
    report.stages = summed(spent_by_task)
