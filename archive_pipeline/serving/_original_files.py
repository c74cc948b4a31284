"""Original files on this machine, told by their SHA-256, and their pixels."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from archive_pipeline.flight.locations import Location
from archive_pipeline.flight.pixels import SourcePixels
from archive_pipeline.flight.raster import Mask
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.geo.georef import Window
from archive_pipeline.jobs.originals import Originals, find_original
from archive_pipeline.serving._kept import Kept
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.layout import ImageEntry

LOOK_EVERY = 30.0  # seconds, at folders of originals
KEPT_BYTES = 256 << 20  # of decoded originals
BLOCK = 1024
KNOWN = 100_000  # files that were compared


@dataclass(frozen=True, eq=False)
class OriginalRaster:
    """An original file's pixels; read by one thread at a time."""

    source: SourceImage
    pixels: SourcePixels
    lock: threading.Lock

    @property
    def window(self) -> Window:
        return 0, 0, self.source.width, self.source.height

    @property
    def block(self) -> tuple[int, int]:
        return BLOCK, BLOCK

    @property
    def decoder(self) -> str:
        return "original"

    def read(self, window: Window) -> NDArray[Any]:
        with self.lock:
            return self.pixels.read(window)[0].copy()

    def read_mask(self, window: Window) -> Mask | None:
        with self.lock:
            mask = self.pixels.read(window)[1]
            return None if mask is None else mask.copy()


class OriginalFiles:
    """Originals of an archive's images on this machine's file systems.

    They are looked for only where this user has named or archived from; a file is one if its
    SHA-256 is the archived file's.

    Args:
        given: the folder to look in; None: where this user archived from.

    Raises:
        FlightError: the folder that is given holds no images.
    """

    def __init__(self, archive_url: str, given: Location | None) -> None:
        self._url, self._given = archive_url, given
        self._lock = threading.Lock()
        self._originals: Originals | None = None
        self._looked = -LOOK_EVERY
        self._same: Kept[bool] = Kept(KNOWN)
        self._rasters: Kept[OriginalRaster] = Kept(KEPT_BYTES)
        if given is not None:
            self._originals, self._looked = Originals(archive_url, given), time.monotonic()

    def _candidates(self, entry: ImageEntry) -> tuple[Location, ...]:
        with self._lock:
            age = time.monotonic() - self._looked
            if self._originals is None or age > LOOK_EVERY:
                # they may be deleted or moved while they are shown
                self._originals = Originals(self._url, self._given, strict=False)
                self._looked = time.monotonic()
            return self._originals.candidates(entry)

    def find(self, image: ArchivedImage) -> tuple[SourceImage, str] | None:
        """An image's original, and a text that changes when its file does; None without one."""
        for place in self._candidates(image.entry):
            stamp = _stamp(place)
            if stamp is None:
                continue
            key = str(place), stamp, image.source.sha256
            same = self._same.get(key)
            if same is None:
                same = find_original(image, (place,))[0] is not None
                self._same.put(key, same)
            if same:
                return replace(image.source, path=place), f"{place} {stamp}"
        return None

    def open(self, source: SourceImage, version: str) -> OriginalRaster:
        """An original to read pixels from; its file is opened when it is read."""
        found = self._rasters.get(version)
        if found is None:
            found = OriginalRaster(source, SourcePixels(source), threading.Lock())
            self._rasters.put(version, found, source.width * source.height * 4)
        return found


def _stamp(place: Location) -> str | None:
    """Tells a local file from what it was before; None of others, and of files that are gone."""
    if not isinstance(place, Path):
        return None
    try:
        found = os.stat(place)
    except OSError:
        return None
    return f"{found.st_mtime_ns}-{found.st_size}-{found.st_ino}"
