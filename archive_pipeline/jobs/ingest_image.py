"""One image into an archive: what a worker does with a task of `archive_pipeline.jobs.ingest`."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from archive_pipeline._version import __version__
from archive_pipeline.codec.settings import Settings
from archive_pipeline.flight.locations import local_file
from archive_pipeline.flight.pixels import SourcePixels
from archive_pipeline.flight.placing import Ground
from archive_pipeline.flight.poses import PosesError, placed_by, read_poses
from archive_pipeline.flight.read import read_source
from archive_pipeline.flight.restored_tag import is_restored
from archive_pipeline.flight.sidecars import digest
from archive_pipeline.flight.source_image import SourceError, SourceImage
from archive_pipeline.geo.georef import Georef
from archive_pipeline.geo.terrain import Terrain
from archive_pipeline.jobs._image_pixels import PixelJob, allowed_bytes, area, exceeded
from archive_pipeline.jobs._jpeg_files import (
    bytes_as_file,
    slim,
    why_not,
    without_previews,
    write_file,
)
from archive_pipeline.jobs._overviews import with_multiscales, write_overviews
from archive_pipeline.jobs.ingest_task import IngestOptions, IngestTask, Outcome, OverBudget
from archive_pipeline.jobs.known_images import (
    RESTORED,
    held_by_another,
    held_for_retired,
    is_of,
    keys_of,
)
from archive_pipeline.stages import stage, timed
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.image_writer import ImageWriter
from archive_pipeline.store.layout import (
    PLAN,
    TILE,
    ArchiveError,
    ImageEntry,
    RecordError,
    image_key,
)
from archive_pipeline.store.leftovers import settle
from archive_pipeline.store.retired import is_retired
from archive_pipeline.store.stored_models import ensure_model, ensure_policy

if TYPE_CHECKING:
    from archive_pipeline.detection.task_loss import TaskLoss

# what a store fails with for all images, not for one
STORE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
Tell = Callable[[str, int, int], None]  # an image's id, its shards that are done, and all
SURE = 0.25  # least score of an object whose blocks are coded finer; what detectors report
# Zarr conventions of georeferenced arrays, by their registered identifiers.
PROJ = {"uuid": "f17cb550-5864-4468-aeb7-f3180cfb622f", "name": "proj"}
SPATIAL = {"uuid": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4", "name": "spatial"}


class StoreFailed(ArchiveError):
    """An archive that takes no more images: a full disk, for one."""


def failed(task: IngestTask, error: str) -> Outcome:
    """The outcome of an image that is not archived, for a reason told in one line."""
    line = " ".join(error.split()).removeprefix(f"{task.path}: ")
    return Outcome(task.flight, task.id, str(task.path), "failed", line)


def known_outcome(task: IngestTask, entry: ImageEntry, reason: str | None = None) -> Outcome:
    """The outcome of an image that the archive has."""
    wanted = {detector.sha256 for detector in task.detectors}
    if task.keeps_file and entry.record["codec"] != "jpeg":
        return failed(task, "archived by the codec, not as its file; use --overwrite to keep that")
    if entry.detectable and wanted - set(entry.record.get("detectors", ())):
        missing = "archived without detections by this model; use --overwrite to store them"
        return failed(task, missing)
    return Outcome(task.flight, entry.id, str(task.path), "skipped", reason=reason)


def _outcome_now(archive: Archive, task: IngestTask, sha256: str, sidecars: str) -> Outcome | None:
    """The outcome of an image that somebody else has archived meanwhile; None where nobody has.

    Another ingest, or a worker that died before it could say so.

    Raises:
        ArchiveError: the store fails.
    """
    key = image_key(task.flight, task.id)
    overwrite, held = task.options.overwrite, _entry_at(archive, key)
    if task.replaces is None:
        for other in keys_of(task.flight, task.file):
            entry = held if other == key else _entry_at(archive, other)
            if entry is not None and is_of(entry, task.flight, task.file, sha256, sidecars):
                return None if overwrite and other == key else known_outcome(task, entry)
    if held is None or (overwrite and held.record["sha256"] == sha256):
        return None
    if is_retired(archive, held):
        return failed(task, held_for_retired(task.flight, task.id))
    if overwrite and held.record["sha256"] == task.replaces:
        return None
    return failed(task, held_by_another(task.flight, task.id, not overwrite))


def _entry_at(archive: Archive, key: str) -> ImageEntry | None:
    """The image that is committed at a key now, if one is; a damaged record is written anew.

    Raises:
        ArchiveError: the store fails.
    """
    with suppress(RecordError):
        return archive.entry(key)
    return None


def ingest_image(task: IngestTask, tell: Tell = lambda id, done, parts: None) -> Outcome:
    """Archive one image (runs on a worker); errors of the image become its outcome.

    Args:
        tell: called after each shard of an image of several.

    Raises:
        StoreFailed: the archive takes no more.
    """
    with timed() as seconds, stage("write"):
        outcome = _ingest_image(task, tell)
    return replace(outcome, seconds=seconds)


def _ingest_image(task: IngestTask, tell: Tell) -> Outcome:
    """`ingest_image`, by stages."""
    archive = Archive.reopen(task.archive, writable=True)
    settings = _ready(archive, task)
    key = image_key(task.flight, task.id)
    expected: tuple[type[Exception], ...] = (ArchiveError, OSError)
    if task.detectors:
        from archive_pipeline.detection.detectors import DetectorError

        expected = (*expected, DetectorError)
    try:
        with archive.exclusive(key), _fetched(task) as path:
            if is_restored(path):
                return Outcome(task.flight, task.id, str(task.path), "skipped", reason=RESTORED)
            with stage("read"):
                source = read_source(path, task.id, _ground(task.options), task.options.salvage)
                sidecars = _digest(task)
            # whoever has this file, too, may archive it under another of its ids
            with archive.exclusive(f"{task.flight}/{source.sha256}"):
                known = _outcome_now(archive, task, source.sha256, sidecars)
                if known is not None:
                    return known
                cleared = _cleared(archive, key, (SourceError, *expected))
                with cleared, SourcePixels(source) as pixels:
                    entry, over, replaced = _write(archive, task, pixels, sidecars, settings, tell)
    except SourceError as error:
        return failed(task, error.reason)
    except PosesError as error:  # a worker has another file, or none
        return failed(task, str(error))
    except expected as error:
        cause = _store_error(error)
        if cause is not None:
            raise StoreFailed(f"cannot write to {task.archive}: {cause.strerror}") from error
        if isinstance(error, OSError):  # of the source, they are SourceErrors
            return failed(task, f"cannot write to {task.archive}: {error.strerror or error}")
        return failed(task, str(error))
    return Outcome(
        task.flight,
        task.id,
        str(task.path),
        "ingested",
        codec=entry.record["codec"],
        warnings=tuple(entry.record["warnings"]),
        source_bytes=source.size_bytes,
        raw_bytes=source.width * source.height * source.bands * np.dtype(source.dtype).itemsize,
        archive_bytes=entry.record["archive_bytes"],
        pixels=source.width * source.height,
        over_budget=over,
        replaced=replaced,
    )


def _ready(archive: Archive, task: IngestTask) -> Settings:
    """Load what encoding needs; returns how it is done."""
    options = task.options
    with stage("start"):
        from archive_pipeline.codec.models import find_device

        settings = Settings(
            find_device(options.device),
            allocation=options.allocation,
            policy=task.policy,
            adapt=options.adapt,
            task_of=_task_of(task) if options.adapt else None,
            precision=options.precision,
        )
    if task.model:  # none, where all are kept as files
        ensure_model(archive, task.model)
    if task.policy:
        ensure_policy(archive, task.policy, task.model, settings.device)
    return settings


def _task_of(task: IngestTask) -> Callable[[NDArray[np.uint8]], TaskLoss] | None:
    """The task of the first detector that is asked for."""
    if not task.detectors:
        return None
    from archive_pipeline.detection.detectors import load_detector
    from archive_pipeline.detection.task_loss import TaskLoss

    return partial(TaskLoss.of, load_detector(task.detectors[0], task.options.device))


def _store_error(error: BaseException) -> OSError | None:
    """What a store fails with for all images, if this error is of that."""
    cause = error.__cause__ if isinstance(error, ArchiveError) else error
    return cause if isinstance(cause, OSError) and cause.errno in STORE_ERRORS else None


@contextmanager
def _cleared(archive: Archive, key: str, expected: tuple[type[Exception], ...]) -> Iterator[None]:
    """Remove what was written of an image that fails; nothing that is committed.

    A full store needs the room for its index. Else what an image of several shards has stays: the
    next run goes on with it.
    """
    try:
        yield
    except expected as error:
        with suppress(ArchiveError):  # `check` tells of it
            found = archive.stored(key)
            if found and (_store_error(error) or f"{key}/{PLAN}" not in found):
                settle(archive, key)
        raise


def _ground(options: IngestOptions) -> Ground:
    """What places frames beside their own tags."""
    terrain = None if options.dem is None else Terrain(options.dem)
    poses = None if options.poses is None else read_poses(options.poses)
    return Ground(options.ground_elevation, terrain, poses)


@contextmanager
def _fetched(task: IngestTask) -> Iterator[Path]:
    """The task's file on this machine, with its sidecars beside it.

    Raises:
        SourceError: they cannot be copied.
    """
    with ExitStack() as stack:
        for sidecar in task.file.sidecars:
            if sidecar.is_too_large:
                name = PurePosixPath(sidecar.path).name
                raise SourceError(task.path, f"its sidecar {name} has {sidecar.size} bytes")
        try:
            beside = {sidecar.ending: sidecar.path for sidecar in task.file.sidecars}
            path = stack.enter_context(local_file(task.path, beside))
        except OSError as error:
            raise SourceError(task.path, error.strerror or str(error)) from error
        yield path


def _digest(task: IngestTask) -> str:
    try:
        return digest(task.file.sidecars)
    except OSError as error:
        raise SourceError(task.path, f"its sidecars: {error.strerror or error}") from error


def _write(
    archive: Archive,
    task: IngestTask,
    reader: SourcePixels,
    sidecars: str,
    settings: Settings,
    tell: Tell,
) -> tuple[ImageEntry, OverBudget | None, bool]:
    """Returns the image, by how much it exceeds its budget, and whether it replaced another."""
    source, options = reader.source, task.options
    if task.keeps_file:
        return _write_file(archive, task, reader, sidecars)
    record = _record(task, source, sidecars)
    if options.lossless_jpeg and source.lossy:
        record["warnings"].append("no JPEG: its pixels are coded lossily")
    bits = [options.budget, task.model, options.allocation, task.policy, options.adapt]
    writer, objects = _begun(archive, task, reader, source, record, bits)

    def done(number: int, parts: int) -> None:
        tell(task.id, number, parts)

    conventions = _conventions(source)
    pixels = PixelJob(writer, reader, settings, objects, done)
    if not source.lossy:
        pixels.write_lossless()
        if _outgrew(writer, source):
            return _write_file(archive, task, reader, sidecars, source.size_bytes)
        return writer.commit(record, conventions), None, writer.replaces
    if not task.model:
        raise SourceError(task.path, "has changed since it was listed")
    budget = options.budget.bytes_for(source)
    allowed = allowed_bytes(source, budget)
    coded = record | {"codec": "pcdc", "model": task.model, "allocation": options.allocation}
    if task.policy:
        coded["policy"] = task.policy
    scaled = conventions
    if overviews := write_overviews(writer, reader, task.model, allowed, settings):
        coded["overviews"] = overviews
        scaled = with_multiscales(conventions, overviews)
    if pixels.write_coded(task.model, budget, coded, scaled):
        record, conventions = coded, scaled
    else:
        writer.drop_overviews()
    if _outgrew(writer, source):
        return _write_file(archive, task, reader, sidecars, allowed)
    entry = writer.commit(record, conventions)
    return entry, exceeded(entry, allowed, writer.sizes), writer.replaces


def _begun(
    archive: Archive,
    task: IngestTask,
    reader: SourcePixels,
    source: SourceImage,
    record: dict[str, Any],
    how: list[Any],
) -> tuple[ImageWriter, NDArray[np.float64]]:
    """A writer of an image whose metadata, mask and detections it has stored.

    Args:
        source: what is stored of the reader's.
        record: is told of the detectors.
        how: pixels will be written.

    Returns:
        It, and the boxes of `_write_detections`.
    """
    stored = replace(without_previews(source), path=task.path)
    plan = [__version__, record, repr(how), task.detectors]
    writer = ImageWriter(archive, task.flight, stored, json.dumps(plan, default=repr))
    writer.write_metadata()
    if source.mask != "none":
        # before the pixels: what the mask takes is then known, and they share the rest
        mask = writer.create_mask()
        for window in writer.missing(mask):
            part = reader.read(window)[1]
            assert part is not None
            mask[area(window)] = part
    objects = np.zeros((0, 4))
    if task.detectors and source.dtype == "uint8" and source.bands == 3:
        objects = _write_detections(task, reader, writer)
        record["detectors"] = [detector.sha256 for detector in task.detectors]
    return writer, objects


def _outgrew(writer: ImageWriter, source: SourceImage) -> bool:
    """Whether what was written of a JPEG takes more than the file itself would."""
    if why_not(source) is not None:
        return False
    beside = ("mask", "detections")  # which it has in any case
    taken = sum(size for name, size in writer.sizes().items() if name not in beside)
    return taken > bytes_as_file(source)


def _write_file(
    archive: Archive,
    task: IngestTask,
    reader: SourcePixels,
    sidecars: str,
    allowed: int | None = None,
) -> tuple[ImageEntry, OverBudget | None, bool]:
    """Archive a JPEG as the file that it is; what `_write` returns.

    Args:
        allowed: bytes that it may take, where it is kept so as all else takes more. Any install
            then reads it: it is not recompressed.

    Raises:
        SourceError: it cannot be kept so.
    """
    reason = why_not(reader.source)
    if reason is not None:
        raise SourceError(task.path, f"{reason}, which --lossless-jpeg cannot keep")
    source = slim(reader.source)
    record = _record(task, source, sidecars) | {"codec": "jpeg"}
    writer, _ = _begun(archive, task, reader, source, record, ["file", allowed])
    note = write_file(writer, reader.source, allowed is None)
    if note is not None:
        record["warnings"].append(note)
    entry = writer.commit(record, _conventions(source))
    over = exceeded(entry, allowed, writer.sizes) if allowed is not None else None
    return entry, over if source.lossy else None, writer.replaces


def _record(task: IngestTask, source: SourceImage, sidecars: str) -> dict[str, Any]:
    """What an image's record says as long as its pixels are lossless and without detections."""
    record: dict[str, Any] = {
        "id": source.id,
        "sha256": source.sha256,
        "sidecars": sidecars,
        "width": source.width,
        "height": source.height,
        "bands": source.bands,
        "dtype": source.dtype,
        "mask": source.mask,
        "codec": "lossless",
        "source_bytes": source.size_bytes,
        "captured": source.captured,
        "georef": source.georef.to_json(),
        "warnings": list(source.warnings),
    }
    if source.camera is not None:
        record["camera"] = source.camera.brief()
        if source.georef.method in ("camera", "point"):
            record["placed_by"] = placed_by(source.camera)
    if task.file.version is not None:
        record["source_version"] = task.file.version
    return record


def _write_detections(
    task: IngestTask, reader: SourcePixels, writer: ImageWriter
) -> NDArray[np.float64]:
    """Store what the detectors see in the original.

    Returns:
        Boxes (n, 4) of the objects whose blocks are coded finer, in pixels: x0, y0, x1, y1; none
        unless the allocation is by objects.
    """
    from archive_pipeline.detection.detectors import detect_all, pack_detections

    source, options = reader.source, task.options
    size = (source.width, source.height, TILE)
    with stage("detect"):
        found = detect_all(task.detectors, options.device, lambda w: reader.read(w)[0], *size)
    writer.write_detections(pack_detections(found))
    if options.allocation != "objects":
        return np.zeros((0, 4))
    return np.concatenate([objects.boxes[objects.scores >= SURE] for _, objects in found])


def _conventions(source: SourceImage) -> dict[str, Any]:
    """Attributes of the proj: and spatial: Zarr conventions."""
    georef: Georef = source.georef
    if georef.transform is None or georef.crs is None:
        return {}
    code = "proj:code" if georef.crs.startswith("EPSG:") else "proj:wkt2"
    return {
        "zarr_conventions": [PROJ, SPATIAL],
        code: georef.crs,
        "spatial:dimensions": ["y", "x"],
        "spatial:transform": list(georef.transform),
        "spatial:shape": [source.height, source.width],
    }
