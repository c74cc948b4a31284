"""Flights into an archive: read, georeference, encode, commit, one task an image."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from archive_pipeline import cluster
from archive_pipeline.flight import SourceError, SourceImage, find_images, read_pixels, read_source
from archive_pipeline.georef import Georef, Window
from archive_pipeline.index import write_index
from archive_pipeline.jpeg_segments import blank_thumbnail
from archive_pipeline.models import DEFAULT_MODEL
from archive_pipeline.pcdc.allocation import BudgetTooSmall
from archive_pipeline.store import (
    TILE,
    Archive,
    ArchiveError,
    ImageEntry,
    ImageWriter,
    image_key,
    is_one_shard,
    shard_windows,
)
from archive_pipeline.zarr_codec import trim

# Zarr conventions of georeferenced arrays, by their registered identifiers.
PROJ = {"uuid": "f17cb550-5864-4468-aeb7-f3180cfb622f", "name": "proj"}
SMALL_BUDGET = 1 << 16  # bytes; below, an image may be stored losslessly instead
SPATIAL = {"uuid": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4", "name": "spatial"}


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
    model: str = DEFAULT_MODEL
    device: str = "auto"
    overwrite: bool = False
    ground_elevation: float | None = None


@dataclass(frozen=True)
class Task:
    """One image to archive."""

    archive: str
    flight: str
    id: str
    path: Path
    model: str  # SHA-256, stored in the archive
    options: Options


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


@dataclass
class Report:
    """Result of an ingest over all its flights."""

    outcomes: list[Outcome]
    seconds: float
    model_bytes: int

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
            "images": [asdict(o) for o in self.outcomes],
        }


def ingest(
    archive_url: str,
    flights: list[tuple[str, Path]],
    options: Options,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Callable[[Outcome, int], None] = lambda outcome, total: None,
) -> Report:
    """Archive every image of the flights; failures are outcomes, other work goes on.

    Args:
        archive_url: path or fsspec URL; made if there is none.
        flights: (flight id, directory).
        progress: called after each image with its outcome and the number of images.

    Raises:
        FlightError: a flight directory cannot be used.
        ModelError: there is no such model.
        ArchiveError: the archive cannot be written.
    """
    from archive_pipeline.models import load_named

    started = time.monotonic()
    listed = [(flight, find_images(directory)) for flight, directory in flights]
    model = load_named(options.model)
    archive = Archive.create(archive_url)
    archive.add_model(model.sha256, model.files)
    tasks = [
        Task(archive_url, flight, id, path, model.sha256, options)
        for flight, images in listed
        for id, path in images
    ]
    outcomes: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        progress(outcome, len(tasks))

    pending = []
    with ThreadPoolExecutor() as pool:
        for task, known in zip(tasks, pool.map(partial(_known, archive), tasks), strict=True):
            if known is None:
                pending.append(task)
            else:
                note(known)
    with cluster.connect(scheduler, workers, len(pending)) as client:
        for task, result in cluster.run(client, ingest_image, pending):
            if isinstance(result, BaseException):
                result = _failed(task, f"{type(result).__name__}: {result}")
            note(result)
    if pending:
        write_index(archive)
    files = sum(len(content) for content in model.files.values())
    return Report(outcomes, time.monotonic() - started, files)


def _failed(task: Task, error: str) -> Outcome:
    line = " ".join(error.split()).removeprefix(f"{task.path}: ")
    return Outcome(task.flight, task.id, str(task.path), "failed", line)


def _known(archive: Archive, task: Task) -> Outcome | None:
    """The outcome of an image that need not be encoded; None where it must be."""
    try:
        entry = archive.entry(image_key(task.flight, task.id))
        if entry is None or task.options.overwrite:
            return None
        with open(task.path, "rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == entry.record["sha256"]
    except (OSError, KeyError) as error:
        return _failed(task, getattr(error, "strerror", None) or str(error))
    except ArchiveError:
        return None  # a damaged record is written anew
    if same:
        return Outcome(task.flight, task.id, str(task.path), "skipped")
    return _failed(
        task,
        f"the archive holds another image as {task.flight}/{task.id}; "
        "use --overwrite to replace it or --flight to archive under another name",
    )


def ingest_image(task: Task) -> Outcome:
    """Archive one image (runs on a worker); errors of the image become its outcome."""
    from archive_pipeline.models import is_known, use_device

    use_device(task.options.device)
    archive = Archive.open(task.archive, writable=True)
    if not is_known(task.model):
        archive.use_model(task.model)
    try:
        source = read_source(task.path, task.id, task.options.ground_elevation)
        entry = _write(archive, task, source)
    except (SourceError, ArchiveError, OSError, MemoryError) as error:
        return _failed(task, str(error) or type(error).__name__)
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


def _write(archive: Archive, task: Task, source: SourceImage) -> ImageEntry:
    stored = replace(source, metadata=tuple(_without_preview(*m) for m in source.metadata))
    writer = ImageWriter(archive, task.flight, stored)
    record = {
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
    reader = _Reader(source)
    writer.write_metadata()
    if source.mask != "none":
        # before the pixels: what the mask takes is then known, and they share the rest
        mask = writer.create_mask()
        for window in shard_windows(mask):
            mask[_area(window)] = reader.read(window)[1]
    pixels = None
    conventions = _conventions(source)
    if source.lossy:
        record |= {"codec": "pcdc", "model": task.model}
        budget = task.options.budget.bytes_for(source)
        left = budget - writer.overhead(record, conventions)
        if left > 0 and (left > budget / 2 or budget > SMALL_BUDGET):
            coded = reader.coded_pixels()
            pixels = writer.create_pixels(task.model, 8 * left / max(coded, 1))
        elif budget > SMALL_BUDGET:
            reason = f"its metadata and mask alone exceed the budget of {budget} bytes"
            raise SourceError(source.path, reason)
        else:
            # metadata are most of such a small image's bytes: loss would gain nothing
            record["codec"] = "lossless"
            del record["model"]
            record["warnings"].append(f"stored losslessly: {budget} bytes are too few for it")
    if pixels is None:
        pixels = writer.create_lossless()
    for window in shard_windows(pixels):
        try:
            pixels[_area(window)] = reader.read(window)[0]
        except BudgetTooSmall as error:
            raise SourceError(source.path, f"does not fit its budget: it {error}") from error
    return writer.commit(record, conventions)


class _Reader:
    """Reads windows of a source; an image of one window is read once."""

    def __init__(self, source: SourceImage) -> None:
        self.source = source
        self._whole: tuple[np.ndarray, np.ndarray | None] | None = None

    def read(self, window: Window) -> tuple[np.ndarray, np.ndarray | None]:
        if window != (0, 0, self.source.width, self.source.height):
            return read_pixels(self.source, window)
        if self._whole is None:
            self._whole = read_pixels(self.source)
        return self._whole

    def coded_pixels(self) -> int:
        """Pixels that pcdc codes: tiles without margins of the fill value.

        Of an image too large to be held, all pixels: its budget is then not used to the full.
        """
        width, height = self.source.width, self.source.height
        if not is_one_shard(width, height):
            return width * height
        pixels, total = self.read((0, 0, width, height))[0], 0
        for row in range(0, height, TILE):
            for col in range(0, width, TILE):
                part = trim(pixels[row : row + TILE, col : col + TILE], 0)
                total += part.shape[0] * part.shape[1]
        return total


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
