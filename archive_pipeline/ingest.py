"""Flights into an archive: read, georeference, encode, commit, one task an image."""

from __future__ import annotations

import errno
import json
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from archive_pipeline import __version__, cluster, sources
from archive_pipeline.flight import SourceError, SourceImage, find_images, read_pixels, read_source
from archive_pipeline.georef import Georef, Window
from archive_pipeline.index import is_current, read_images, write_index
from archive_pipeline.jpeg_segments import blank_thumbnail
from archive_pipeline.pcdc.allocation import BudgetTooSmall
from archive_pipeline.pcdc.stages import stage, timed
from archive_pipeline.sources import Location, local_file, location
from archive_pipeline.store import (
    TILE,
    Archive,
    ArchiveError,
    ImageEntry,
    ImageWriter,
    NothingLeft,
    absolute,
    check_flight,
    image_key,
    in_process_only,
    is_one_shard,
    shard_count,
)
from archive_pipeline.zarr_codec import trim

if TYPE_CHECKING:
    from archive_pipeline.detectors import DetectorFile

INDEX_PASSES = 3  # of writing the index while others commit images; the last of them mends it
# what a store fails with for all images, not for one
STORE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
Tell = Callable[[str, int, int], None]  # an image's id, its shards that are done, and all
TOPIC = "archive_pipeline.shards"  # of events between workers and client
SMALL_BUDGET = 1 << 16  # bytes; below, an image may be stored losslessly instead
NEIGHBOURS = 32  # consecutive frames compared in one task
THUMBNAIL_WIDTH = 1000  # pixels; enough to match frames, and quick to decode from a JPEG
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
class Options:
    """Settings of an ingest, as the command line has them."""

    budget: Budget = field(default_factory=lambda: Budget(ratio=100))
    model: str | None = None  # shipped name or folder; the default model without one
    device: str = "auto"
    overwrite: bool = False
    ground_elevation: float | None = None
    detect: tuple[str, ...] = ()  # detectors whose finds in the originals are stored
    allocation: str = "uniform"  # of `ALLOCATIONS`
    adapt: int = 0  # updates that the policy is given on every image


@dataclass(frozen=True)
class Task:
    """One image to archive."""

    archive: str
    flight: str
    id: str
    path: Location
    options: Options
    model: str = ""  # SHA-256 of a model that is in the archive
    allocation: str = "uniform"
    policy: str = ""  # SHA-256 of a policy that is in the archive, where allocation is by it
    detectors: tuple[DetectorFile, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of one image; `error` is None unless it failed."""

    flight: str
    id: str
    path: str
    status: str  # "ingested" | "skipped" | "failed"
    error: str | None = None
    codec: str | None = None
    warnings: tuple[str, ...] = ()
    source_bytes: int = 0
    raw_bytes: int = 0
    archive_bytes: int = 0
    pixels: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, see `Report.stages`


@dataclass(frozen=True)
class Warned:
    """Something odd about an image that did not stop it."""

    path: str
    warning: str


@dataclass
class Report:
    """Result of an ingest over all its flights.

    Attributes:
        outcomes: one an image.
        neighbours: frames whose tags contradict their neighbours' pixels.
        seconds: wall time.
        model_bytes: size of the archive's models, each stored once.
        workers: threads that images were given to.
        retries: images given to another worker since theirs had died.
        workers_lost: workers that died.
    """

    outcomes: list[Outcome]
    neighbours: list[Warned]
    seconds: float
    model_bytes: int
    workers: int = 1
    retries: int = 0
    workers_lost: int = 0

    @property
    def stages(self) -> dict[str, float]:
        """Seconds that images took by stage, summed over workers.

        "start" is importing libraries and loading the model, once a worker; "encode" the networks
        and the allocation of the budget; "entropy" coding the symbols; "write" all the rest.
        """
        names = ("start", "read", "detect", "encode", "entropy", "write")
        sums = {name: sum(o.seconds.get(name, 0.0) for o in self.outcomes) for name in names}
        return {name: round(seconds, 3) for name, seconds in sums.items() if seconds}

    @property
    def warnings(self) -> list[Warned]:
        """All warnings: the images' own, then those of the comparison with neighbours."""
        own = [Warned(o.path, warning) for o in self.outcomes for warning in o.warnings]
        return own + self.neighbours

    def to_json(self) -> dict[str, Any]:
        """The contract of `archive ingest --json`."""
        done = [o for o in self.outcomes if o.status == "ingested"]
        return {
            "ingested": len(done),
            "skipped": sum(o.status == "skipped" for o in self.outcomes),
            "failed": [
                {"path": o.path, "error": o.error} for o in self.outcomes if o.status == "failed"
            ],
            "source_bytes": sum(o.source_bytes for o in done),
            "raw_bytes": sum(o.raw_bytes for o in done),
            "archive_bytes": sum(o.archive_bytes for o in done),
            "model_bytes": self.model_bytes,
            "seconds": round(self.seconds, 2),
            "megapixels_per_second": round(
                sum(o.pixels for o in done) / 1e6 / max(self.seconds, 1e-9), 3
            ),
            "stages": self.stages,
            "workers": self.workers,
            "workers_lost": self.workers_lost,
            "retries": self.retries,
            "warnings": [asdict(w) for w in self.warnings],
            "images": [asdict(o) for o in self.outcomes],
        }


def ingest(
    archive_url: str,
    flights: list[tuple[str, Location]],
    options: Options,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Callable[[Outcome, int], None] = lambda outcome, total: None,
    part: Callable[[str, int, int, int], None] = lambda name, done, parts, total: None,
) -> Report:
    """Archive every image of the flights; failures are outcomes, other work goes on.

    Args:
        archive_url: path or fsspec URL; made if there is none.
        flights: (flight id, directory or URL).
        progress: called after each image with its outcome and the number of images.
        part: called after each shard of an image of several: the image's id, how many are done,
            how many there are, and the number of images.

    Raises:
        FlightError: a flight directory cannot be used.
        ModelError: there is no such model, or it lacks the policy that is asked for.
        UtilityError: what `adapt` needs cannot be had.
        DetectorError: there is no such detector.
        ArchiveError: the archive cannot be written, or no longer.
        ClusterError: there is no such scheduler, or it was lost.
    """
    started = time.monotonic()
    for flight, _ in flights:
        check_flight(flight)
    if scheduler is not None:  # its workers have a working directory of their own
        archive_url = absolute(archive_url)
        flights = [(flight, sources.absolute(directory)) for flight, directory in flights]
    if in_process_only(archive_url):
        workers = 0
        if scheduler is not None:
            raise ArchiveError(f"{archive_url}: only this process sees it; leave out --scheduler")
    listed = [(flight, find_images(directory)) for flight, directory in flights]
    detectors = _find_detectors(options)
    archive = Archive.create(archive_url)
    tasks = [
        Task(archive_url, flight, id, path, options, detectors=detectors)
        for flight, images in listed
        for id, path in images
    ]
    entries = {
        entry.key: entry
        for flight in sorted({flight for flight, _ in flights})
        for entry in read_images(archive, flight, lambda name, error: None)  # written anew
    }
    outcomes: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        progress(outcome, len(tasks))

    pending = []
    with ThreadPoolExecutor() as threads:
        for task, known in zip(tasks, threads.map(partial(_known, entries), tasks), strict=True):
            if known is None:
                pending.append(task)
            else:
                note(known)
    if pending:
        model, allocation, policy = _add_model(archive, options)
        chosen = partial(replace, model=model, allocation=allocation, policy=policy)
        pending = [chosen(task) for task in pending]
        for flight in sorted({task.flight for task in pending}):
            archive.create_flight(flight)

    def tell(id: str, done: int, parts: int) -> None:
        part(id, done, parts, len(tasks))

    with (
        archive.writing(),
        _index_kept(archive, bool(pending)),
        cluster.connect(scheduler, workers, len(pending), options.device) as pool,
    ):
        size = pool.size
        if pool.client is not None:
            pool.client.subscribe_topic(TOPIC, lambda event: tell(*event[1]))
        job = partial(ingest_image, tell=tell) if pool.client is None else ingest_on_worker
        for task, result in pool.run(job, pending):
            if isinstance(result, StoreFailed):
                done = sum(outcome.status == "ingested" for outcome in outcomes)
                raise StoreFailed(f"{result}; {done} images were archived; run again for the rest")
            if isinstance(result, cluster.WorkerDied):
                result = _failed(task, str(result))
            elif isinstance(result, BaseException):
                result = _failed(task, f"{type(result).__name__}: {result}")
            note(result)
        neighbours = _compare_neighbours(archive, pool, outcomes)
    models = archive.size_of("models") + archive.size_of("policies")
    seconds = time.monotonic() - started
    return Report(outcomes, neighbours, seconds, models, size, pool.retries, pool.lost)


@contextmanager
def _index_kept(archive: Archive, changed: bool) -> Iterator[None]:
    """Write the index when images were written, even if that ended early."""
    try:
        yield
    except (ArchiveError, cluster.ClusterError):
        with suppress(ArchiveError):  # a full disk may have no room for it, either
            write_index(archive)
        raise
    if changed:
        write_index(archive)
    # who writes last has then seen what all others committed
    for _ in range(INDEX_PASSES):
        if is_current(archive):
            break
        write_index(archive)


def _add_model(archive: Archive, options: Options) -> tuple[str, str, str]:
    """Store the model and its policy in the archive.

    Returns the model's SHA-256, the allocation, and the policy's SHA-256 where that is by it.
    """
    # torch: only with work to do
    from archive_pipeline.models import DEFAULT_MODEL, load_named, read_policy
    from archive_pipeline.pcdc.model import ModelError

    name = options.model or DEFAULT_MODEL
    model = load_named(name)
    archive.add_model(model.sha256, model.files)
    if options.allocation != "policy":
        return model.sha256, options.allocation, ""
    policy = read_policy(name, model.networks.config.latents)
    if policy is None:
        raise ModelError(f"{name}: this model has no allocation policy")
    if options.adapt:
        from archive_pipeline.pcdc.utility import require_lpips

        require_lpips()  # said once here, and not by every image
    return model.sha256, "policy", archive.add_policy(policy)


def _find_detectors(options: Options) -> tuple[DetectorFile, ...]:
    """Detectors that are asked for; loaded once here, so that a bad one stops the ingest."""
    if not options.detect:
        return ()
    from archive_pipeline.detectors import find_detectors, load_detector

    files = tuple(find_detectors(options.detect))
    for file in files:
        load_detector(file, options.device)
    return files


def _compare_neighbours(
    archive: Archive, pool: cluster.Pool, outcomes: list[Outcome]
) -> list[Warned]:
    """Compare new frames that their cameras' tags locate with their neighbours.

    A service: whatever goes wrong in it is passed over.
    """
    paths = {image_key(o.flight, o.id): location(o.path) for o in outcomes if o.status != "failed"}
    new = {image_key(o.flight, o.id) for o in outcomes if o.status == "ingested"}
    lines: dict[tuple[str, int, int], list[_Frame]] = {}
    for flight in sorted({o.flight for o in outcomes if o.status == "ingested"}):
        for entry in read_images(archive, flight, lambda name, error: None):
            record = entry.record
            if entry.key in paths and record["georef"]["method"] == "camera":
                frame = _Frame(entry.key, paths[entry.key], record["captured"], record["georef"])
                line = (flight, record["width"], record["height"])
                lines.setdefault(line, []).append(frame)
    runs = []
    for (_, width, height), frames in lines.items():
        frames.sort(key=lambda frame: (frame.captured or "", frame.key))
        for start in range(0, max(1, len(frames) - 1), NEIGHBOURS - 1):  # one in common
            run = frames[start : start + NEIGHBOURS]
            if len(run) > 1 and any(frame.key in new for frame in run):
                runs.append(_Run(width, height, run))
    found: dict[str, Warned] = {}
    for _, result in pool.run(compare_frames, runs, gpu=False):
        for key, warning in result if isinstance(result, list) else ():
            found.setdefault(key, Warned(str(paths[key]), warning))
    return [found[key] for key in sorted(found)]


@dataclass(frozen=True)
class _Frame:
    """A frame to compare with its neighbours."""

    key: str
    path: Location
    captured: str | None
    georef: dict[str, Any]


@dataclass(frozen=True)
class _Run:
    """Consecutive frames of one size."""

    width: int
    height: int
    frames: list[_Frame]


def compare_frames(run: _Run) -> list[tuple[str, str]]:
    """Return (key, warning) of frames that contradict their neighbours (runs on a worker)."""
    from archive_pipeline.neighbours import neighbour_warnings

    frames = [(f.key, Georef.from_json(f.georef), _thumbnail(f.path)) for f in run.frames]
    return neighbour_warnings(frames, run.width, run.height)


def _thumbnail(place: Location) -> NDArray[np.uint8] | None:
    """A small grey copy of a frame, from its green band: a quick look decodes no more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            with local_file(place) as path, rasterio.open(path) as dataset:
                scale = min(1.0, THUMBNAIL_WIDTH / dataset.width)
                shape = tuple(max(1, round(n * scale)) for n in dataset.shape)
                band = min(2, dataset.count)
                grey: NDArray[np.uint8] = dataset.read(band, out_shape=shape)
        except (RasterioError, OSError):
            return None
    return grey if grey.dtype == np.uint8 else None


def _failed(task: Task, error: str) -> Outcome:
    line = " ".join(error.split()).removeprefix(f"{task.path}: ")
    return Outcome(task.flight, task.id, str(task.path), "failed", line)


def _known(entries: dict[str, ImageEntry], task: Task) -> Outcome | None:
    """The outcome of an image that need not be encoded; None where it must be."""
    entry = entries.get(image_key(task.flight, task.id))
    if entry is None or task.options.overwrite:
        return None
    try:
        same = _is_same(entry, task.path)
    except OSError as error:
        return _failed(task, error.strerror or str(error))
    wanted = {detector.sha256 for detector in task.detectors}
    if same and entry.detectable and wanted - set(entry.record.get("detectors", ())):
        reason = "archived without detections by this model; use --overwrite to store them"
        return _failed(task, reason)
    if same:
        return Outcome(task.flight, task.id, str(task.path), "skipped")
    return _failed(
        task,
        f"the archive holds another image as {task.flight}/{task.id}; "
        "use --overwrite to replace it or --flight to archive under another name",
    )


def _entry_at(archive: Archive, key: str) -> dict[str, ImageEntry]:
    """The image that is committed at a key now, if one is; a damaged record is written anew."""
    with suppress(ArchiveError):
        entry = archive.entry(key)
        return {} if entry is None else {key: entry}
    return {}


def _is_same(entry: ImageEntry, place: Location) -> bool:
    """Whether a file is the one that was archived; one at a URL need not be read for that."""
    recorded = entry.record.get("source_version")
    if isinstance(place, str) and recorded and recorded == sources.version(place):
        return True
    return sources.sha256(place) == entry.record["sha256"]


def ingest_on_worker(task: Task) -> Outcome:
    """`ingest_image` on a worker of Dask's, which tells the client how far large images are."""
    from distributed import get_worker

    worker = get_worker()
    return ingest_image(task, lambda *shards: worker.log_event(TOPIC, shards))


def ingest_image(task: Task, tell: Tell = lambda id, done, parts: None) -> Outcome:
    """Archive one image (runs on a worker); errors of the image become its outcome.

    Args:
        tell: called after each shard of an image of several.

    Raises:
        StoreFailed: the archive takes no more.
    """
    with timed() as seconds, stage("write"):
        outcome = _ingest_image(task, tell)
    return replace(outcome, seconds=seconds)


def _ingest_image(task: Task, tell: Tell) -> Outcome:
    """`ingest_image`, by stages."""
    with stage("start"):
        from archive_pipeline.models import allocation, use_device

        use_device(task.options.device)
    archive = Archive.reopen(task.archive, writable=True)
    archive.ensure_model(task.model)
    if task.policy:
        archive.ensure_policy(task.policy, task.model)
    key = image_key(task.flight, task.id)
    expected: tuple[type[Exception], ...] = (ArchiveError, OSError)
    if task.detectors:
        from archive_pipeline.detectors import DetectorError

        expected = (*expected, DetectorError)
    try:
        with archive.exclusive(key):
            # archived since by another ingest, or by a worker that died before it could say so
            known = _known(_entry_at(archive, key), task)
            if known is not None:
                return known
            with _fetched(task) as (path, version):
                with stage("read"):
                    source = read_source(path, task.id, task.options.ground_elevation)
                with allocation(task.allocation, task.policy, task.options.adapt):
                    entry = _write(archive, task, source, version, tell)
    except SourceError as error:
        return _failed(task, error.reason)
    except expected as error:
        cause = error.__cause__ if isinstance(error, ArchiveError) else error
        if isinstance(cause, OSError) and cause.errno in STORE_ERRORS:
            with suppress(ArchiveError):
                archive.delete(archive.stored(key))  # makes room for the index
            raise StoreFailed(f"cannot write to {task.archive}: {cause.strerror}") from error
        if isinstance(error, OSError):  # of the source, they are SourceErrors
            return _failed(task, f"cannot write to {task.archive}: {error.strerror or error}")
        return _failed(task, str(error))
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
def _fetched(task: Task) -> Iterator[tuple[Path, str | None]]:
    """The task's file on this machine, and the version of the object at a URL.

    Raises:
        SourceError: it cannot be copied.
    """
    with ExitStack() as stack:
        try:
            # before the copy: of an object that is replaced meanwhile the version is then stale
            version = sources.version(task.path) if isinstance(task.path, str) else None
            path = stack.enter_context(local_file(task.path))
        except OSError as error:
            raise SourceError(task.path, error.strerror or str(error)) from error
        yield path, version


def _write(
    archive: Archive, task: Task, source: SourceImage, version: str | None, tell: Tell
) -> ImageEntry:
    stored = replace(
        source, path=task.path, metadata=tuple(_without_preview(*m) for m in source.metadata)
    )
    record: dict[str, Any] = {
        "id": source.id,
        "sha256": source.sha256,
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
    if version is not None:
        record["source_version"] = version
    reader = _Reader(source)
    bits = [task.options.budget, task.model, task.allocation, task.policy, task.options.adapt]
    plan = [__version__, record, repr(bits), task.detectors]
    writer = ImageWriter(archive, task.flight, stored, json.dumps(plan, default=repr))
    writer.write_metadata()
    if source.mask != "none":
        # before the pixels: what the mask takes is then known, and they share the rest
        mask = writer.create_mask()
        for window in writer.missing(mask):
            mask[_area(window)] = reader.read_mask(window)
    if task.detectors and source.dtype == "uint8" and source.bands == 3:
        from archive_pipeline.detectors import pack_detections

        size = (source.width, source.height, TILE)
        read = reader.read_rgb
        with stage("detect"):
            found = pack_detections(task.detectors, task.options.device, read, *size)
        writer.write_detections(found)
        record["detectors"] = [detector.sha256 for detector in task.detectors]
    pixels = None
    conventions = _conventions(source)
    if source.lossy:
        budget = task.options.budget.bytes_for(source)
        lossy = record | {"codec": "pcdc", "model": task.model}
        # metadata are most of a very small image's bytes: loss would gain little
        least = budget // 2 if budget <= SMALL_BUDGET else 0
        coded = reader.coded_pixels()
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
        try:
            pixels[_area(window)] = reader.read(window)[0]
        except BudgetTooSmall as error:
            raise SourceError(source.path, f"does not fit its budget: it {error}") from error
        if parts > 1:
            tell(task.id, done, parts)
    return writer.commit(record, conventions)


class _Reader:
    """Reads windows of a source; an image of one window is read once."""

    def __init__(self, source: SourceImage) -> None:
        self.source = source
        self._whole: tuple[np.ndarray, np.ndarray | None] | None = None

    @stage("read")
    def read(self, window: Window) -> tuple[np.ndarray, np.ndarray | None]:
        if window != (0, 0, self.source.width, self.source.height):
            return read_pixels(self.source, window)
        if self._whole is None:
            self._whole = read_pixels(self.source)
        return self._whole

    def read_rgb(self, window: Window) -> NDArray[np.uint8]:
        """Pixels of an 8-bit RGB image."""
        return self.read(window)[0]

    def read_mask(self, window: Window) -> NDArray[np.uint8]:
        """The mask of an image that has one."""
        mask = self.read(window)[1]
        assert mask is not None
        return mask

    def coded_pixels(self) -> tuple[int, int]:
        """Pixels that pcdc codes, tiles without margins of the fill value, and its empty tiles.

        Of an image too large to be held, all pixels, and as many empty tiles as may lie around
        it: its budget is then not used to the full.
        """
        width, height = self.source.width, self.source.height
        if not is_one_shard(width, height):
            return width * height, 4 * -(-width // TILE) * -(-height // TILE)
        pixels, coded, empty = self.read((0, 0, width, height))[0], 0, 0
        for row in range(0, height, TILE):
            for col in range(0, width, TILE):
                part = trim(pixels[row : row + TILE, col : col + TILE], 0)
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
