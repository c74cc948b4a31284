"""New frames beside their neighbours: do their cameras' tags agree with their pixels?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from archive_pipeline.flight.formats import open_image
from archive_pipeline.flight.locations import Location, local_file, location
from archive_pipeline.flight.source_image import SourceError
from archive_pipeline.geo.georef import Georef
from archive_pipeline.jobs import cluster
from archive_pipeline.jobs.ingest_task import Outcome
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.index import read_images
from archive_pipeline.store.layout import image_key

NEIGHBOURS = 32  # consecutive frames compared in one task
THUMBNAIL_WIDTH = 640  # pixels; enough to match frames, and quick to decode from a JPEG


@dataclass(frozen=True)
class Warned:
    """Something odd about an image that did not stop it."""

    path: str
    warning: str


def compare_neighbours(
    archive: Archive,
    pool: cluster.Pool,
    outcomes: list[Outcome],
    stage: Callable[[str], None] = lambda name: None,
) -> list[Warned]:
    """Compare new frames that their cameras' tags locate with their neighbours.

    A service: whatever goes wrong in it is passed over.

    Args:
        stage: called with how far it is.
    """
    paths = {image_key(o.flight, o.id): location(o.path) for o in outcomes if o.status != "failed"}
    new = {image_key(o.flight, o.id) for o in outcomes if o.status == "ingested"}
    lines: dict[tuple[str, int, int], list[_TaggedFrame]] = {}
    for flight in sorted({o.flight for o in outcomes if o.status == "ingested"}):
        for entry in read_images(archive, flight, lambda name, error: None, paths):
            record = entry.record
            if record["georef"]["method"] == "camera":
                frame = _TaggedFrame(
                    entry.key, paths[entry.key], record["captured"], record["georef"]
                )
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
    done, total = 0, sum(len(run.frames) for run in runs)
    if runs:
        stage("comparing neighbours")
    for run, result in pool.run(compare_frames, runs, gpu=False):
        done += len(run.frames)
        stage(f"comparing neighbours: {done} of {total} frames")
        for key, warning in result if isinstance(result, list) else ():
            found.setdefault(key, Warned(str(paths[key]), warning))
    return [found[key] for key in sorted(found)]


@dataclass(frozen=True)
class _TaggedFrame:
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
    frames: list[_TaggedFrame]


def compare_frames(run: _Run) -> list[tuple[str, str]]:
    """Return (key, warning) of frames that contradict their neighbours (runs on a worker)."""
    from archive_pipeline.geo.neighbours import neighbour_warnings

    frames = [(f.key, Georef.from_json(f.georef), _thumbnail(f.path)) for f in run.frames]
    return neighbour_warnings(frames, run.width, run.height)


def _thumbnail(place: Location) -> NDArray[np.uint8] | None:
    """A small grey copy of a frame, from its green band: a quick look decodes no more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            with local_file(place) as path, open_image(path) as dataset:
                scale = min(1.0, THUMBNAIL_WIDTH / dataset.width)
                shape = tuple(max(1, round(n * scale)) for n in dataset.shape)
                band = min(2, dataset.count)
                grey: NDArray[np.uint8] = dataset.read(band, out_shape=shape)
        except (SourceError, RasterioError, OSError):
            return None
    return grey if grey.dtype == np.uint8 else None
