"""Flights into an archive: read, georeference, encode, commit, one task an image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from archive_pipeline.errors import UsageError, did_you_mean
from archive_pipeline.flight import locations as sources
from archive_pipeline.flight.find import ImageFile, find_flight
from archive_pipeline.flight.formats import may_be_photo
from archive_pipeline.flight.locations import Location
from archive_pipeline.flight.poses import read_poses
from archive_pipeline.geo.terrain import check_dem
from archive_pipeline.jobs import cluster
from archive_pipeline.jobs._documents import DocumentOutcome, ingest_documents
from archive_pipeline.jobs._neighbouring import Warned, compare_neighbours
from archive_pipeline.jobs.ingest_image import (
    StoreFailed,
    failed,
    ingest_image,
    known_outcome,
)
from archive_pipeline.jobs.ingest_task import IngestOptions, IngestTask, Outcome, OverBudget
from archive_pipeline.jobs.ingested import note_sources
from archive_pipeline.jobs.known_images import Place, find_places
from archive_pipeline.stages import summed
from archive_pipeline.store.archive import Archive, absolute
from archive_pipeline.store.index import read_images, settle_index, write_index
from archive_pipeline.store.layout import (
    ArchiveError,
    ImageEntry,
    check_flight,
    image_key,
)
from archive_pipeline.store.leases import Leases, leased
from archive_pipeline.store.leftovers import Replaced
from archive_pipeline.store.stored_models import add_model, add_policy
from archive_pipeline.store.verdicts import void_verdicts

if TYPE_CHECKING:
    from archive_pipeline.detection.detectors import DetectorFile

TOPIC = "archive_pipeline.shards"  # of events between workers and client


@dataclass
class IngestReport:
    """Result of an ingest over all its flights.

    Attributes:
        outcomes: one an image.
        neighbours: frames whose tags contradict their neighbours' pixels.
        seconds: wall time.
        model_bytes: size of the archive's models, each stored once.
        workers: threads that images were given to.
        retries: images given to another worker since theirs had died.
        workers_lost: workers that died.
        documents: one a file that is kept as it is.
        left_out: all other files of the flights, and linked folders.
    """

    outcomes: list[Outcome]
    neighbours: list[Warned]
    seconds: float
    model_bytes: int
    workers: int = 1
    retries: int = 0
    workers_lost: int = 0
    documents: list[DocumentOutcome] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def stages(self) -> dict[str, float]:
        """Seconds that images took by stage (`stages`), summed over workers."""
        return summed(o.seconds for o in self.outcomes)

    @property
    def warnings(self) -> list[Warned]:
        """All warnings: those of files, then those of the comparison with neighbours."""
        return self.remarks + self.neighbours

    @property
    def remarks(self) -> list[Warned]:
        """What is odd about files, images first."""
        own = [Warned(o.path, warning) for o in self.outcomes for warning in o.remarks]
        return own + [Warned(d.path, d.warning) for d in self.documents if d.warning is not None]

    @property
    def failed(self) -> list[tuple[str, str]]:
        """Paths of files that are not archived, images first, and why."""
        every: list[Outcome | DocumentOutcome] = [*self.outcomes, *self.documents]
        return [(o.path, o.error or "") for o in every if o.status == "failed"]

    @property
    def over_budget(self) -> list[tuple[str, OverBudget]]:
        """Images that take more than their budgets, with the paths of their files."""
        return [(o.path, o.over_budget) for o in self.outcomes if o.over_budget is not None]

    def to_json(self) -> dict[str, Any]:
        """The contract of `archive ingest --json`."""
        done = [o for o in self.outcomes if o.status == "ingested"]
        return {
            "ingested": len(done),
            "skipped": sum(o.status == "skipped" for o in self.outcomes),
            "failed": [{"path": path, "error": error} for path, error in self.failed],
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
            "documents": [asdict(d) for d in self.documents],
            "not_archived": self.left_out,
            "over_budget": [{"path": path, **asdict(over)} for path, over in self.over_budget],
            "warnings": [asdict(w) for w in self.warnings],
            "images": [asdict(o) for o in self.outcomes],
        }


def ingest(
    archive_url: str,
    flights: list[tuple[str, Location]],
    options: IngestOptions,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Callable[[Outcome, int], None] = lambda outcome, total: None,
    part: Callable[[str, int, int, int], None] = lambda name, done, parts, total: None,
    stage: Callable[[str], None] = lambda name: None,
) -> IngestReport:
    """Archive every image of the flights; failures are outcomes, other work goes on.

    Args:
        archive_url: path or fsspec URL; made if there is none.
        flights: (flight id, directory or URL).
        progress: called after each image with its outcome and the number of images.
        part: called after each shard of an image of several: the image's id, how many are done,
            how many there are, and the number of images.
        stage: called with what is done before the first image and after the last.

    Raises:
        FlightError: a flight directory cannot be used.
        ModelError: there is no such model, or it lacks the policy that is asked for.
        UtilityError: what `adapt` needs cannot be had.
        DetectorError: there is no such detector.
        PosesError: the file of poses cannot be used.
        ArchiveError: the archive cannot be written, or no longer.
        ClusterError: there is no such scheduler, or it was lost.
    """
    started = time.monotonic()
    for flight, _ in flights:
        check_flight(flight)
    if scheduler is not None:  # its workers have a working directory of their own
        archive_url = absolute(archive_url)
        flights = [(flight, sources.absolute(directory)) for flight, directory in flights]
    workers = cluster.workers_in_reach(archive_url, scheduler, workers)
    cluster.check_device(options.device, scheduler)
    if options.dem is not None and scheduler is None:  # the file is on the workers' machines
        check_dem(options.dem)
    stage("listing files")
    looked = [(flight, directory, find_flight(directory)) for flight, directory in flights]
    listed = [(flight, found.images) for flight, _, found in looked]
    left_out = [f"{directory}/{other}" for _, directory, found in looked for other in found.others]
    if options.poses is not None:
        read_poses(options.poses)  # a bad file is said once, before anything is written
    if options.detect:
        stage("loading detectors")
    detectors = _find_detectors(options)
    tasks = [
        IngestTask(archive_url, flight, file.id, file, _options(file, options), detectors=detectors)
        for flight, files in listed
        for file in files
    ]
    _check_named(tasks, options)
    archive = Archive.create(archive_url)
    note_sources(archive_url, flights)
    outcomes: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        progress(outcome, len(tasks))

    def tell(id: str, done: int, parts: int) -> None:
        part(id, done, parts, len(tasks))

    # from before the model is looked for: nobody removes it then
    with leased(archive, (flight for flight, _ in flights)) as leases, archive.writing():
        stage("looking for new files")
        pending = _pending(archive, tasks, note)
        if pending:
            stage("starting")
        pending = _prepared(archive, pending, options)
        _void_verdicts(archive, pending)
        with (
            _index_kept(archive, bool(pending), stage),
            _collected(archive, leases) as replaced,
            cluster.connect(scheduler, workers, len(pending), options.device) as pool,
        ):
            replacing = options.overwrite and not options.images
            documents = ingest_documents(archive, looked, replacing)
            size = pool.size
            if pool.client is not None:
                pool.client.subscribe_topic(TOPIC, lambda event: tell(*event[1]))
            if pending:
                stage(f"encoding the first of {len(pending)}")
            job = partial(ingest_image, tell=tell) if pool.client is None else ingest_on_worker
            for task, result in pool.run(job, pending):
                leases.check()
                replaced.collect()
                outcome = _outcome(task, result, outcomes)
                if outcome.replaced:
                    replaced.add(image_key(task.flight, task.id))
                note(outcome)
            neighbours = compare_neighbours(archive, pool, outcomes, stage)
    models = archive.size_of("models") + archive.size_of("policies")
    seconds = time.monotonic() - started
    counts = size, pool.retries, pool.lost
    return IngestReport(outcomes, neighbours, seconds, models, *counts, documents, left_out)


def _void_verdicts(archive: Archive, pending: list[IngestTask]) -> None:
    """Forget verdicts of pixels that are about to be replaced."""
    replaced: dict[str, list[str]] = {}
    for task in pending:
        if task.replaces is not None:
            replaced.setdefault(task.flight, []).append(task.id)
    for flight, ids in replaced.items():
        void_verdicts(archive, flight, ids)


def _options(file: ImageFile, options: IngestOptions) -> IngestOptions:
    """What an ingest is asked for as to one file: `images` are those that it is asked for."""
    if not options.images or {file.id, file.below} & {*options.images}:
        return options
    return replace(options, lossless_jpeg=False, overwrite=False)


def _check_named(tasks: list[IngestTask], options: IngestOptions) -> None:
    """Raise `UsageError` for an image that is asked for and is not there, or is no JPEG."""
    named = {name: task for task in tasks for name in (task.file.below, task.file.id)}
    for name in options.images:
        if name not in named:
            raise UsageError(f"--image {name}: no such image{did_you_mean(name, named)}")
        if not named[name].keeps_file:
            raise UsageError(f"--image {name}: it is no JPEG, which --lossless-jpeg is about")


def _outcome(task: IngestTask, result: Outcome | BaseException, before: list[Outcome]) -> Outcome:
    """What became of a task.

    Raises:
        StoreFailed: the archive can no longer be written.
    """
    if isinstance(result, StoreFailed):
        done = sum(outcome.status == "ingested" for outcome in before)
        raise StoreFailed(f"{result}; {done} images were archived; run again for the rest")
    if isinstance(result, cluster.WorkerDied):
        return failed(task, str(result))
    if isinstance(result, BaseException):
        return failed(task, f"{type(result).__name__}: {result}")
    return result


def _pending(
    archive: Archive, tasks: list[IngestTask], note: Callable[[Outcome], None]
) -> list[IngestTask]:
    """Tasks of images that are not archived yet, by their ids; the others' outcomes are noted."""
    pending = []
    by_flight: dict[str, list[IngestTask]] = {}
    for task in tasks:
        by_flight.setdefault(task.flight, []).append(task)
    with ThreadPoolExecutor() as threads:
        for flight, some in sorted(by_flight.items()):
            entries = [*read_images(archive, flight, lambda name, error: None)]  # written anew
            _mend_models(archive, entries)
            files = [task.file for task in some]
            replaceable = {task.file.below for task in some if task.options.overwrite}
            places = find_places(archive, flight, files, entries, replaceable, threads)
            for task, place in zip(some, places, strict=True):
                outcome = _known(task, place)
                if outcome is None:
                    pending.append(replace(task, id=place.id, replaces=place.replaces))
                else:
                    note(outcome)
    return pending


def _mend_models(archive: Archive, entries: list[ImageEntry]) -> None:
    """Store models of images again that the archive lacks, if they are at hand."""
    needed = {str(entry.record["model"]) for entry in entries if entry.record.get("model")}
    for sha256 in needed - {*archive.list_names("models")} if needed else ():
        from archive_pipeline.codec.models import files_of  # torch

        files = files_of(sha256)
        if files is not None:
            add_model(archive, sha256, files)


def _known(task: IngestTask, place: Place) -> Outcome | None:
    """The outcome of a file that need not be encoded; None where it must be."""
    if place.error is not None:
        return failed(task, place.error)
    if place.known is not None:
        return known_outcome(task, place.known, place.reason)
    if place.reason is not None:
        return Outcome(task.flight, place.id, str(task.path), "skipped", reason=place.reason)
    return None


def _prepared(
    archive: Archive, pending: list[IngestTask], options: IngestOptions
) -> list[IngestTask]:
    """The tasks with what they need in the archive: model, policy, flights' groups."""
    if not pending:
        return []
    model, policy = "", ""
    if any(not task.keeps_file and may_be_photo(task.path) for task in pending):
        model, policy = _add_model(archive, options)
    for flight in sorted({task.flight for task in pending}):
        archive.create_flight(flight)
    return [replace(task, model=model, policy=policy) for task in pending]


@contextmanager
def _collected(archive: Archive, leases: Leases) -> Iterator[Replaced]:
    """Remove the old generations of images that were replaced, even if the ingest ends early."""
    replaced = Replaced(archive)
    try:
        yield replaced
    except (ArchiveError, cluster.ClusterError):
        if not leases.lost:
            replaced.collect(wait=True)  # makes room for the index
        raise
    if not leases.lost:
        replaced.collect(wait=True)


@contextmanager
def _index_kept(archive: Archive, changed: bool, stage: Callable[[str], None]) -> Iterator[None]:
    """Write the index when images were written, even if that ended early."""
    try:
        yield
    except (ArchiveError, cluster.ClusterError):
        with suppress(ArchiveError):  # a full disk may have no room for it, either
            write_index(archive)
        raise
    stage("writing the index")
    if changed:
        write_index(archive)
    settle_index(archive)


def _add_model(archive: Archive, options: IngestOptions) -> tuple[str, str]:
    """Store the model and its policy in the archive.

    Returns the model's SHA-256, and the policy's where allocation is by it.
    """
    # torch: only with work to do
    from archive_pipeline.codec.models import DEFAULT_MODEL, load_named, read_policy
    from archive_pipeline.pcdc.model_files import ModelError

    name = options.model or DEFAULT_MODEL
    model = load_named(name)
    add_model(archive, model.sha256, model.files)
    if options.allocation != "policy":
        return model.sha256, ""
    policy = read_policy(name, model.networks.config.latents)
    if policy is None:
        raise ModelError(f"{name}: this model has no allocation policy")
    if options.adapt:
        from archive_pipeline.pcdc.training.judge import require_lpips

        require_lpips()  # said once here, and not by every image
    return model.sha256, add_policy(archive, policy)


def _find_detectors(options: IngestOptions) -> tuple[DetectorFile, ...]:
    """Detectors that are asked for; loaded once here, so that a bad one stops the ingest."""
    if not options.detect:
        return ()
    from archive_pipeline.detection.detectors import find_detectors, load_detector

    files = tuple(find_detectors(options.detect))
    for file in files:
        load_detector(file, options.device)
    return files


def ingest_on_worker(task: IngestTask) -> Outcome:
    """`ingest_image` on a worker of Dask's, which tells the client how far large images are."""
    from distributed import get_worker

    worker = get_worker()
    return ingest_image(task, lambda *shards: worker.log_event(TOPIC, shards))
