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
from archive_pipeline.codec.settings import Raise, Settings
from archive_pipeline.codec.zarr_codec import trimmed_tiles, with_settings
from archive_pipeline.detection.boxes import Boxes
from archive_pipeline.detection.object_blocks import RaisedBlocks
from archive_pipeline.flight.find import ImageFile
from archive_pipeline.flight.jpeg_segments import blank_thumbnail
from archive_pipeline.flight.locations import Location, local_file
from archive_pipeline.flight.pixels import SourcePixels
from archive_pipeline.flight.read import read_source
from archive_pipeline.flight.restored_tag import is_restored
from archive_pipeline.flight.sidecars import digest
from archive_pipeline.flight.source_image import SourceError, SourceImage
from archive_pipeline.geo.georef import Georef, Window
from archive_pipeline.jobs.known_images import RESTORED, held_by_another, is_of, keys_of
from archive_pipeline.pcdc.allocation import BudgetTooSmall
from archive_pipeline.stages import stage, timed
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.image_writer import ImageWriter, NothingLeft
from archive_pipeline.store.layout import (
    TILE,
    ArchiveError,
    ImageEntry,
    image_key,
    shard_count,
)

if TYPE_CHECKING:
    from archive_pipeline.detection.detectors import DetectorFile

# what a store fails with for all images, not for one
STORE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
Tell = Callable[[str, int, int], None]  # an image's id, its shards that are done, and all
SURE = 0.25  # least score of an object whose blocks are coded finer; what detectors report
SMALL_BUDGET = 1 << 16  # bytes; below, an image may be stored losslessly instead
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
class Outcome:
    """What became of one image.

    `error` is None unless it failed; `reason` says why a file was skipped that the archive does not
    have under an id of its own.
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
    """The image that is committed at a key now, if one is; a damaged record is written anew."""
    with suppress(ArchiveError):
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
                source = read_source(path, task.id, options.ground_elevation)
                sidecars = _digest(task)
            # whoever has this file, too, may archive it under another of its ids
            with archive.exclusive(f"{task.flight}/{source.sha256}"):
                known = _outcome_now(archive, task, source.sha256, sidecars)
                if known is not None:
                    return known
                with SourcePixels(source) as pixels:
                    entry = _write(archive, task, pixels, sidecars, settings, tell)
    except SourceError as error:
        return failed(task, error.reason)
    except expected as error:
        cause = error.__cause__ if isinstance(error, ArchiveError) else error
        if isinstance(cause, OSError) and cause.errno in STORE_ERRORS:
            with suppress(ArchiveError):
                archive.delete(archive.stored(key))  # makes room for the index
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
    )


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
) -> ImageEntry:
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
            mask[_area(window)] = part
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
    pixels = None
    conventions = _conventions(source)
    if source.lossy:
        budget = options.budget.bytes_for(source)
        lossy = record | {"codec": "pcdc", "model": task.model}
        # metadata are most of a very small image's bytes: loss would gain little
        least = budget // 2 if budget <= SMALL_BUDGET else 0
        coded = _coded_pixels(reader)
        try:
            pixels = writer.create_pixels(task.model, budget, coded, lossy, conventions, least)
            record = lossy
        except NothingLeft as error:
            if budget > SMALL_BUDGET:
                reason = f"its metadata and mask alone exceed the budget of {budget} bytes"
                raise SourceError(source.path, reason) from error
            record["warnings"].append(f"stored losslessly: {budget} bytes are too few for it")
    if pixels is None:
        pixels = writer.create_lossless()
    parts, missing = shard_count(pixels), writer.missing(pixels)
    for done, window in enumerate(missing, parts - len(missing) + 1):
        part = reader.read(window)[0]
        try:
            finer = replace(settings, raised=_raised(part, window, objects))
            with_settings(pixels, finer)[_area(window)] = part
        except BudgetTooSmall as error:
            raise SourceError(source.path, f"does not fit its budget: it {error}") from error
        if parts > 1:
            tell(task.id, done, parts)
    return writer.commit(record, conventions)


def _raised(part: np.ndarray, window: Window, objects: Boxes) -> Raise | None:
    """What makes blocks with objects in them finer, where pixels of a window are written."""
    if not len(objects):
        return None
    col, row, _, _ = window
    return RaisedBlocks(part, objects - [col, row, col, row], TILE).of


def _coded_pixels(reader: SourcePixels) -> tuple[int, int]:
    """Pixels that pcdc codes, tiles without margins of the fill value, and its empty tiles.

    Of an image that would have to be decoded for it, all pixels, and as many empty tiles as may lie
    around it: its budget is then not used to the full.
    """
    width, height = reader.source.width, reader.source.height
    if not reader.held:
        return width * height, 4 * -(-width // TILE) * -(-height // TILE)
    coded = empty = 0
    for row in range(0, height, TILE):
        band = reader.read((0, row, width, min(TILE, height - row)))[0]
        for _, _, part in trimmed_tiles(band, TILE):
            coded += part.shape[0] * part.shape[1]
            empty += not part.size
    return coded, empty


def _without_preview(name: str, payload: bytes) -> tuple[str, bytes]:
    """Blank a JPEG's EXIF thumbnail, which restoring makes again from the pixels."""
    return name, blank_thumbnail(payload)[0] if name == "APP1" else payload


def _area(window: Window) -> tuple[slice, slice]:
    col, row, width, height = window
    return slice(row, row + height), slice(col, col + width)


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
