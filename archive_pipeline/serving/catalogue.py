"""What an archive holds, in memory: found by place, time, flight and text."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from archive_pipeline.geo.georef import Bbox
from archive_pipeline.serving._errors import NotFound, Unavailable
from archive_pipeline.serving._queries import Interval, timestamp
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.index import KEY as INDEX
from archive_pipeline.store.index import current_rows, look
from archive_pipeline.store.index_rows import (
    CAPTURED,
    GROUP,
    IMAGE,
    SCHEMA,
    SIDES,
    VERSION,
    bounds_of,
    have_crs,
    reaches_of,
    shapes_of,
    to_records,
)
from archive_pipeline.store.layout import (
    MAX_NAME,
    ArchiveError,
    ImageEntry,
    StoreError,
    image_key,
    quote_name,
    unquote_name,
)

LOOK_EVERY = 1.0  # seconds, at least
LOOK_SHARE = 0.05  # of the time, at most, is spent looking at what has changed
DEGREE = 2 * np.pi * 6378137.0 / 360  # metres, at the equator
AWAY = 3.0  # seconds for which a bucket that is away is not asked again
QUICK = 0.25  # seconds; a look that takes longer is done while requests see what was there before


@dataclass(frozen=True)
class Found:
    """Images that a query means.

    Attributes:
        numbers: of the images, in the order of their names.
        matched: how many there are in all.
        next: what to continue after; None at the end.
    """

    numbers: NDArray[np.intp]
    matched: int
    next: str | None


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The images of an archive at one moment, numbered in the order of their names.

    Attributes:
        rows: of the index, one an image, with its record's version where that is known.
        keys: group path of each image.
        flights: ids of those that have images, in order.
        flight: int64 (n,), number of each image's flight.
        bounds: float64 (n, 4), west, south, east, north of corners in degrees; NaN without place.
        reaches: float64 (n, 4), the same of all of each image; NaN where none are sure to be.
        mapped: bool (n,), whether it is known where each image's pixels lie.
        shapes: object (n,), shapely geometries of footprints in degrees; None without place.
        pitches: float64 (n,), metres on the ground that a pixel is wide, about; NaN where it is not
            known.
        times: float64 (n,), seconds since 1970 of capture; NaN where it is not known.
        damaged: names ("flight/id") of images whose records are damaged, and why.
    """

    archive: Archive
    rows: pa.Table
    keys: list[str]
    flights: list[str]
    flight: NDArray[np.int64]
    bounds: NDArray[np.float64]
    reaches: NDArray[np.float64]
    mapped: NDArray[np.bool_]
    shapes: NDArray[Any]
    pitches: NDArray[np.float64]
    times: NDArray[np.float64]
    texts: list[str]
    damaged: dict[str, str]

    def __len__(self) -> int:
        return len(self.keys)

    def entries(self, numbers: Iterable[int]) -> list[ImageEntry]:
        """Images by their numbers."""
        chosen = [int(n) for n in numbers]
        records = to_records(self.rows.take(pa.array(chosen, pa.int64())))
        pairs = zip(chosen, records, strict=True)
        return [self.archive.entry_of(self.keys[n], record) for n, record in pairs]

    def version(self, number: int) -> str:
        """A text that changes whenever the image does."""
        known = self.rows[VERSION][number].as_py()
        return f"{self.keys[number]} {known}" if known else version_of(self.entries([number])[0])

    def number(self, flight: str, id: str) -> int | None:
        """Number of an image; None where there was none at this moment."""
        key = image_key(flight, id)
        at = self._place(key)
        return at if at < len(self) and self.keys[at] == key else None

    def _place(self, key: str) -> int:
        """Number of the first image that does not come before a key."""
        import bisect

        return bisect.bisect_left(self.keys, key.split("/"), key=lambda k: k.split("/"))

    def of_flight(self, flight: str) -> slice:
        """Numbers of a flight's images.

        Raises:
            NotFound: it has none.
        """
        key = f"flights/{quote_name(flight)}" if flight else ""
        first = self._place(f"{key}/")
        last = self._place(f"{key}/\U0010ffff")
        if not key or first == last:
            raise NotFound(f"no flight {flight!r}")
        return slice(first, last)

    def find(
        self,
        bbox: Bbox | None = None,
        datetime: Interval | None = None,
        flights: Sequence[str] | None = None,
        text: str = "",
        limit: int | None = None,
        after: str | None = None,
        ids: Sequence[str] | None = None,
    ) -> Found:
        """Images that meet a box, were taken in an interval, and so on.

        Args:
            bbox: west, south, east, north in degrees; west may be greater than east.
            datetime: first and last second; None is open.
            flights: only these; those that are not there have no images.
            text: that their name ("flight/id") holds, letter case aside.
            limit: images at most; all without one.
            after: `Found.next` of the query before.
            ids: of images, or "flight/id": only these.
        """
        chosen = np.ones(len(self), bool)
        if flights is not None:
            chosen[:] = False
            for flight in flights:
                try:
                    chosen[self.of_flight(flight)] = True
                except NotFound:
                    continue
        if datetime is not None:
            first, last = datetime
            with np.errstate(invalid="ignore"):
                chosen &= ~np.isnan(self.times)
                chosen &= True if first is None else self.times >= first
                chosen &= True if last is None else self.times <= last
        if ids is not None:
            wanted = set(ids)
            for n in np.flatnonzero(chosen):
                name = self.name(int(n))
                chosen[n] = name in wanted or name.partition("/")[2] in wanted
        if text:
            folded = text.casefold()
            chosen &= np.fromiter((folded in t for t in self.texts), bool, len(self))
        if bbox is not None:
            chosen &= self.meets(bbox)
        return self.page(np.flatnonzero(chosen), limit, after)

    def page(self, numbers: NDArray[np.intp], limit: int | None, after: str | None) -> Found:
        """Of the images of these numbers those after `Found.next` of before, so many at most."""
        first = 0
        if after is not None:
            key = f"flights/{after}"
            place = self._place(key)
            place += place < len(self) and self.keys[place] == key
            first = int(np.searchsorted(numbers, place))
        some = numbers[first:] if limit is None else numbers[first : first + limit]
        more = len(some) and first + len(some) < len(numbers)
        following = self.keys[some[-1]].removeprefix("flights/") if more else None
        return Found(some, len(numbers), following)

    def meets(self, bbox: Bbox) -> NDArray[np.bool_]:
        """Tell of each image whether its footprint, or its place, meets a box, bool (n,)."""
        west, south, east, north = bbox
        boxes = (
            [bbox] if west <= east else [(west, south, 180.0, north), (-180.0, south, east, north)]
        )
        found = np.zeros(len(self), bool)
        for box in boxes:
            with np.errstate(invalid="ignore"):
                near = (self.bounds[:, 0] <= box[2]) & (self.bounds[:, 2] >= box[0])
                near &= (self.bounds[:, 1] <= box[3]) & (self.bounds[:, 3] >= box[1])
            at = np.flatnonzero(near)
            area = shapely.box(*box)
            shapely.prepare(area)
            found[at] |= shapely.intersects(area, self.shapes[at])
        return found

    def name(self, number: int) -> str:
        """ "flight/id" of an image."""
        return f"{self.flights[self.flight[number]]}/{self.rows[IMAGE][int(number)].as_py()}"


def version_of(entry: ImageEntry) -> str:
    """A text that changes whenever an image's record does."""
    record = json.dumps(entry.record, sort_keys=True, separators=(",", ":"))
    return f"{entry.key} {hashlib.sha256(record.encode()).hexdigest()}"


def pitches_of(shapes: NDArray[Any], pixels: NDArray[Any]) -> NDArray[np.float64]:
    """Metres on the ground that a pixel is wide, float64 (n,), about; NaN where it is not known.

    Args:
        shapes: footprints in degrees, see `Snapshot`.
        pixels: numbers of the images' pixels.
    """
    areas = shapely.area(shapes)
    latitude = np.radians(shapely.bounds(shapes)[:, 1::2].mean(axis=1))
    with np.errstate(invalid="ignore"):
        return np.sqrt(np.where(areas > 0, areas, np.nan) * DEGREE**2 * np.cos(latitude) / pixels)


def total_bounds(bounds: NDArray[np.float64]) -> list[float] | None:
    """West, south, east, north of bounds (n, 4); None where none are known."""
    known = bounds[np.isfinite(bounds).all(axis=1)]
    return [*known[:, :2].min(0).tolist(), *known[:, 2:].max(0).tolist()] if len(known) else None


class Catalogue:
    """An archive's images in memory, as they are now or were a moment ago.

    Looked at again every second, where a look is quick, and less often where there are very many
    images: then meanwhile what was seen before is told, so that a request need not wait.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._looked = -math.inf  # when the last look began
        self._asked = -math.inf  # when it was last asked whether another is due
        self._stamp: str | None = None  # of the index that was seen
        self._took = 0.0
        self._failed: tuple[float, str] | None = None  # until when it is away, and why

    @property
    def now(self) -> Snapshot:
        """The archive's images.

        Raises:
            Unavailable: the archive cannot be read.
        """
        snapshot = self._snapshot
        if snapshot is not None and not self._is_old(snapshot):
            return snapshot
        if snapshot is None or self._took < QUICK:
            with self._lock:
                if self._snapshot is snapshot or self._snapshot is None:
                    self._look()
                assert self._snapshot is not None
                return self._snapshot
        if self._lock.acquire(blocking=False):  # nobody else looks at it
            threading.Thread(target=self._look_aside, daemon=True).start()
        return snapshot

    def _is_old(self, snapshot: Snapshot) -> bool:
        """Whether it is time for another look: by the clock, or as there is another index."""
        age = time.monotonic() - max(self._looked, self._asked)
        if age < LOOK_EVERY:
            return False
        self._asked = time.monotonic()
        since = self._asked - self._looked
        return since > self._took / LOOK_SHARE or _stamp(snapshot.archive) != self._stamp

    def _look_aside(self) -> None:
        try:
            self._look()
        except Unavailable:  # the next request is told
            self._snapshot = None
        finally:
            self._lock.release()

    def _look(self) -> None:
        started = time.monotonic()
        self._check_there()
        try:
            archive = Archive.open(self.url)
            self._stamp = _stamp(archive)
            self._snapshot = _snapshot(archive)
        except ArchiveError as error:
            self._snapshot = None
            self._fail(started, error)
            raise Unavailable(str(error)) from error
        self._looked, self._took = started, time.monotonic() - started

    def _fail(self, started: float, error: ArchiveError) -> None:
        """Note that the archive is away, where it took long to find that out."""
        now = time.monotonic()
        if now - started > QUICK:
            self._failed = now + AWAY, str(error)

    def _check_there(self) -> None:
        """Let nobody wait again for what was away a moment ago.

        Raises:
            Unavailable: it was.
        """
        if self._failed is not None and time.monotonic() < self._failed[0]:
            raise Unavailable(self._failed[1])

    @property
    def archive(self) -> Archive:
        return self.now.archive

    def find(self, **query: Any) -> Found:
        """As `Snapshot.find` has it, of the images that are there now."""
        return self.now.find(**query)

    def image(self, flight: str, id: str) -> ImageEntry:
        """An image as its record is at this very moment.

        Raises:
            NotFound: there is none.
            Unavailable: the archive cannot be read.
            ArchiveError: its record is damaged.
        """
        name = f"{flight}/{id}"
        if not id or not 0 < len(quote_name(flight)) <= MAX_NAME:
            raise NotFound(f"no image {name[:200]!r}")
        archive, started = self.archive, time.monotonic()
        self._check_there()
        try:
            entry = archive.entry(image_key(flight, id))
        except StoreError as error:
            self._fail(started, error)
            raise Unavailable(str(error)) from error
        if entry is None or (entry.flight, entry.id) != (flight, id):
            if archive.read_key("zarr.json") is None:
                raise Unavailable(f"{self.url}: no archive there")
            raise NotFound(f"no image {name!r}")
        return entry


def _stamp(archive: Archive) -> str | None:
    """Tells a local archive's index from the one that was there before."""
    if archive.folder is None:
        return None
    try:
        found = os.stat(archive.folder / INDEX)
    except OSError:
        return ""
    return f"{found.st_mtime_ns}-{found.st_size}-{found.st_ino}"


def _snapshot(archive: Archive) -> Snapshot:
    damaged: dict[str, str] = {}

    def note(name: str, error: ArchiveError) -> None:
        damaged[name] = str(error)

    contents = look(archive, damaged=note, in_rows=True)
    tables = [*current_rows(contents)]
    rows = pa.concat_tables(tables).unify_dictionaries().combine_chunks() if tables else None
    rows = SCHEMA.empty_table() if rows is None else rows
    keys = rows[GROUP].to_pylist()
    folders = [key.split("/")[1] for key in keys]
    order = {name: n for n, name in enumerate(dict.fromkeys(folders))}
    flights = [unquote_name(name) for name in order]
    flight = np.array([order[name] for name in folders], np.int64)
    pairs = zip(flight.tolist(), rows[IMAGE].to_pylist(), strict=True)
    shapes = shapes_of(rows)
    return Snapshot(
        archive,
        rows,
        keys,
        flights,
        flight,
        bounds_of(rows),
        reaches_of(rows),
        have_crs(rows) & (shapely.area(shapes) > 0),
        shapes,
        pitches_of(shapes, np.prod([rows[side].to_numpy() for side in SIDES], axis=0)),
        np.array([timestamp(t) for t in rows[CAPTURED].to_pylist()], np.float64),
        [f"{flights[n]}/{id}".casefold() for n, id in pairs],
        damaged,
    )
