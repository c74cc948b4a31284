"""One image into an archive: what a worker does with a task of `archive_pipeline.jobs.ingest`."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from archive_pipeline._version import __version__
from archive_pipeline.codec.settings import Settings
from archive_pipeline.flight.find import ImageFile
from archive_pipeline.flight.jpeg_segments import blank_thumbnail
from archive_pipeline.flight.locations import Location, local_file
from archive_pipeline.flight.pixels import SourcePixels
from archive_pipeline.flight.read import Ground, read_source
from archive_pipeline.flight.restored_tag import is_restored
from archive_pipeline.flight.sidecars import digest
from archive_pipeline.flight.source_image import SourceError, SourceImage
from archive_pipeline.geo.georef import Georef
from archive_pipeline.geo.terrain import Terrain
from archive_pipeline.jobs._image_pixels import PixelJob, allowed_bytes, area
from archive_pipeline.jobs.known_images import RESTORED, held_by_another, is_of, keys_of
from archive_pipeline.pcdc.precision import Precision
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

if TYPE_CHECKING:
    from archive_pipeline.detection.detectors import DetectorFile

# what a store fails with for all images, not for one
STORE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
Tell = Callable[[str, int, int], None]  # an image's id, its shards that are done, and all
SURE = 0.25  # least score of an object whose blocks are coded finer; what detectors report
# Zarr conventions of georeferenced arrays, by their registered identifiers.
PROJ = {"uuid": "f17cb550-5864-4468-aeb7-f3180cfb622f", "name": "proj"}
SPATIAL = {"uuid": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4", "name": "spatial"}


class StoreFailed(ArchiveError):
    """An archive that takes no more images: a full disk, for one."""


@dataclass(frozen=True)
class Budget:
    """What an image may take, everything stored for it counted. Exactly one field is set.

    Attributes:
        ratio: raw bytes (height x width x 3) over archive bytes.
        bpp: archive bits a pixel.
        source_ratio: bytes of the source file over archive bytes.
    """

    ratio: float | None = None
    bpp: float | None = None
    source_ratio: float | None = None

    def bytes_for(self, source: SourceImage) -> int:
        """Bytes allowed for an image."""
        pixels = source.width * source.height
        if self.bpp is not None:
            return int(pixels * self.bpp / 8)
        if self.source_ratio is not None:
            return int(source.size_bytes / self.source_ratio)
        assert self.ratio is not None
        return int(pixels * 3 / self.ratio)


@dataclass(frozen=True)
class IngestOptions:
    """Settings of an ingest, as the command line has them."""

    budget: Budget = field(default_factory=lambda: Budget(ratio=100))
    model: str | None = None  # shipped name or folder; the default model without one
    device: str = "auto"
    overwrite: bool = False
    ground_elevation: float | None = None
    detect: tuple[str, ...] = ()  # detectors whose finds in the originals are stored
    allocation: str = "uniform"  # of `ALLOCATIONS`, or "objects" for what `detect` finds
    adapt: int = 0  # updates that the policy is given on every image
    precision: Precision = "auto"  # of the codec's large networks
    dem: str | None = None  # a raster of the ground's heights
    salvage: bool = False  # damaged JPEGs as far as they can be decoded


@dataclass(frozen=True)
class IngestTask:
    """One image to archive.

    Attributes:
        id: of the image that it becomes.
        file: what it is made of.
        replaces: SHA-256 of the file whose image it replaces; None where there is none yet.
    """

    archive: str
    flight: str
    id: str
    file: ImageFile
    options: IngestOptions
    replaces: str | None = None
    model: str = ""  # SHA-256 of a model that is in the archive
    policy: str = ""  # SHA-256 of a policy that is in the archive, where allocation is by it
    detectors: tuple[DetectorFile, ...] = ()

    @property
    def path(self) -> Location:
        """Where the file is."""
        return self.file.path


@dataclass(frozen=True)
class OverBudget:
    """An image that takes more bytes than it may, since less cannot be had.

    Attributes:
        image: its id.
        budget_bytes: what it may take: its budget, or the size of its file where that is less.
        archive_bytes, excess_bytes: what it takes, and by how much that is more.
        reason: what takes them, in one line.
    """

    image: str
    budget_bytes: int
    archive_bytes: int
    excess_bytes: int
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What became of one image.

    `error` is None unless it failed; `reason` says why a file was skipped that the archive does not
    have under an id of its own; `replaced` whether another image stood in its place, what remains
    of which is to be removed.
    """

    flight: str
    id: str
    path: str
    status: str  # "ingested" | "skipped" | "failed"
    error: str | None = None
    reason: str | None = None
    codec: str | None = None
    warnings: tuple[str, ...] = ()
    source_bytes: int = 0
    raw_bytes: int = 0
    archive_bytes: int = 0
    pixels: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, see `IngestReport.stages`
    over_budget: OverBudget | None = None
    replaced: bool = False

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know of an image that did not fail."""
        if self.reason is None:
            return self.warnings
        return (f"skipped: it {self.reason}", *self.warnings)


def failed(task: IngestTask, error: str) -> Outcome:
    """The outcome of an image that is not archived, for a reason told in one line."""
    line = " ".join(error.split()).removeprefix(f"{task.path}: ")
    return Outcome(task.flight, task.id, str(task.path), "failed", line)


def known_outcome(task: IngestTask, entry: ImageEntry, reason: str | None = None) -> Outcome:
    """The outcome of an image that the archive has."""
    wanted = {detector.sha256 for detector in task.detectors}
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
    if held is None or (overwrite and held.record["sha256"] in (task.replaces, sha256)):
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
    options = task.options
    with stage("start"):
        from archive_pipeline.codec.models import find_device

        settings = Settings(
            find_device(options.device),
            allocation=options.allocation,
            policy=task.policy,
            adapt=options.adapt,
            precision=options.precision,
        )
    archive = Archive.reopen(task.archive, writable=True)
    archive.ensure_model(task.model)
    if task.policy:
        archive.ensure_policy(task.policy, task.model, settings.device)
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
                source = read_source(path, task.id, _ground(options), options.salvage)
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
    """What frames are projected to."""
    terrain = None if options.dem is None else Terrain(options.dem)
    return Ground(options.ground_elevation, terrain)


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
    source = reader.source
    stored = replace(
        source, path=task.path, metadata=tuple(_without_preview(*m) for m in source.metadata)
    )
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
    if task.file.version is not None:
        record["source_version"] = task.file.version
    options = task.options
    bits = [options.budget, task.model, options.allocation, task.policy, options.adapt]
    plan = [__version__, record, repr(bits), task.detectors]
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
        from archive_pipeline.detection.detectors import detect_all, pack_detections

        size = (source.width, source.height, TILE)
        with stage("detect"):
            found = detect_all(task.detectors, options.device, lambda w: reader.read(w)[0], *size)
        writer.write_detections(pack_detections(found))
        if options.allocation == "objects":
            sure = [objects.boxes[objects.scores >= SURE] for _, objects in found]
            objects = np.concatenate(sure)
        record["detectors"] = [detector.sha256 for detector in task.detectors]

    def done(number: int, parts: int) -> None:
        tell(task.id, number, parts)

    conventions = _conventions(source)
    pixels = PixelJob(writer, reader, settings, objects, done)
    if not source.lossy:
        pixels.write_lossless()
        return writer.commit(record, conventions), None, writer.replaces
    budget = options.budget.bytes_for(source)
    coded = record | {"codec": "pcdc", "model": task.model}
    if pixels.write_coded(task.model, budget, coded, conventions):
        record = coded
    entry = writer.commit(record, conventions)
    allowed = allowed_bytes(source, budget)
    return entry, _exceeded(entry, allowed, writer.sizes), writer.replaces


def _exceeded(
    entry: ImageEntry, allowed: int, sizes: Callable[[], dict[str, int]]
) -> OverBudget | None:
    """What is to be said of an image that takes more than it may; None of others."""
    taken = entry.record["archive_bytes"]
    if taken <= allowed:
        return None
    parts = sizes()
    parts["record"] = taken - sum(parts.values())
    listed = ", ".join(f"{name} {size}" for name, size in sorted(parts.items()))
    how = "as coarse as can be" if entry.record["codec"] == "pcdc" else "lossless, which is less"
    return OverBudget(
        entry.id, allowed, taken, taken - allowed, f"bytes of {listed}; pixels are {how}"
    )


def _without_preview(name: str, payload: bytes) -> tuple[str, bytes]:
    """Blank a JPEG's EXIF thumbnail, which restoring makes again from the pixels."""
    return name, blank_thumbnail(payload)[0] if name == "APP1" else payload


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
