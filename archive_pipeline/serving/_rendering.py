"""Pictures of the ground: images resampled into north-up grids of Web Mercator."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from archive_pipeline.errors import UsageError
from archive_pipeline.flight.raster import Raster
from archive_pipeline.geo.georef import Bbox
from archive_pipeline.jobs.composing import Composer, PlacedImage
from archive_pipeline.jobs.views import View, coarser
from archive_pipeline.outputs.paths import OutputError
from archive_pipeline.serving.catalogue import Snapshot, version_of
from archive_pipeline.serving.display import Shown, check_shown
from archive_pipeline.serving.site import Site
from archive_pipeline.store.layout import ArchiveError, ImageEntry

MERCATOR = "EPSG:3857"
MOST_IMAGES = 48  # that a picture is made of
READ_PIXELS = 48 << 20  # that are decoded for a picture
STRETCH = 1.5  # an overview may be so much coarser than a picture: it is decoded many times faster
FAR = 8  # pixels of an image, a side, in one of a picture that leaves out what adds nothing
COVERED = 0.03  # of a footprint, that may be missing
CELLS = 6  # a side, of each of which one image is taken where there are too many


@dataclass(frozen=True)
class Grid:
    """A square of pixels.

    Attributes:
        west, north: of its first pixel's corner, in Web Mercator's metres.
        pixel: side of a pixel, in the same.
        size: pixels a side.
    """

    west: float
    north: float
    pixel: float
    size: int

    @property
    def bounds(self) -> Bbox:
        """West, south, east, north in Web Mercator's metres."""
        side = self.pixel * self.size
        return self.west, self.north - side, self.west + side, self.north

    @property
    def degrees(self) -> Bbox:
        """West, south, east, north in degrees."""
        west, south, east, north = self.bounds
        return _longitude(west), _latitude(south), _longitude(east), _latitude(north)


RADIUS = 6378137.0


def _longitude(x: float) -> float:
    return min(180.0, max(-180.0, math.degrees(x / RADIUS)))


def _latitude(y: float) -> float:
    return math.degrees(2 * math.atan(math.exp(y / RADIUS)) - math.pi / 2)


def chosen(now: Snapshot, grid: Grid, of: slice) -> NDArray[np.intp]:
    """Numbers of the images that a picture is made of.

    Those that may be seen in it; of very many only some, spread over it: where frames are so small,
    they lie on one another.

    Args:
        of: numbers of the images that there are to choose from.
    """
    west, south, east, north = grid.degrees
    reaches = now.reaches[of]
    with np.errstate(invalid="ignore"):
        near = (reaches[:, 0] <= east) & (reaches[:, 2] >= west)
        near &= (reaches[:, 1] <= north) & (reaches[:, 3] >= south)
    near |= np.isnan(reaches).any(axis=1)
    found = np.flatnonzero(near & now.mapped[of]) + of.start
    if len(found) > MOST_IMAGES:
        found = _spread(now, found, grid.degrees)
    ground = grid.pixel * math.cos(math.radians((south + north) / 2))
    if len(found) > 2 and (now.pitches[found] * FAR < ground).all():
        found = found[enough(now.shapes[found])]
    return found


def enough(shapes: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell of footprints whether they are needed to cover what all of them do, bool (n,).

    Frames of a line overlap by three quarters: where they are small, every other one, or fewer,
    show all. Spread ones are taken first: the first, the middle one, those in between.
    """
    count, shapes = len(shapes), shapely.make_valid(shapes)
    bits = max(1, (count - 1).bit_length())
    spread = sorted(range(count), key=lambda n: int(f"{n:0{bits}b}"[::-1], 2))
    needed, covered = np.zeros(count, bool), shapely.Polygon()
    for n in spread:
        if shapely.area(shapely.difference(shapes[n], covered)) > COVERED * shapely.area(shapes[n]):
            needed[n], covered = True, shapely.union(covered, shapes[n])
    return needed


def _spread(now: Snapshot, numbers: NDArray[np.intp], area: Bbox) -> NDArray[np.intp]:
    """Of images in an area those that are nearest to the middles of its cells."""
    west, south, east, north = area
    bounds = now.bounds[numbers]
    across = ((bounds[:, 0] + bounds[:, 2]) / 2 - west) / (east - west) * CELLS
    down = (north - (bounds[:, 1] + bounds[:, 3]) / 2) / (north - south) * CELLS
    col = np.clip(np.floor(across), 0, CELLS - 1)
    row = np.clip(np.floor(down), 0, CELLS - 1)
    distance = np.hypot(across - col - 0.5, down - row - 0.5)
    order = np.lexsort((numbers, distance))
    _, first = np.unique((row * CELLS + col)[order], return_index=True)
    return np.sort(numbers[order[first]])


def compose(
    site: Site, entries: Sequence[ImageEntry], grid: Grid, strict: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels uint8 (size, size, 3) of a grid, and 255 where there are any.

    Args:
        strict: an image that cannot be shown is an error; else it is left out.

    Raises:
        ArchiveError: an image is damaged.
        OutputError: it cannot be shown in Web Mercator.
        UsageError: too much would have to be decoded.
    """
    placed = []
    budget = float(READ_PIXELS)
    for entry in entries:
        try:
            image = _placed(site, entry, grid.pixel)
        except OutputError:
            if strict:
                raise
            continue
        cost = _cost(image, grid)
        if cost > budget:
            if strict:
                raise UsageError(f"{entry.id}: has no overview for a picture so small: zoom in")
            continue
        budget -= cost
        placed.append(image)
    size = grid.size
    if not placed:
        return np.zeros((size, size, 3), np.uint8), np.zeros((size, size), np.uint8)

    def damaged(raster: Raster, error: Exception) -> None:
        raise error

    steps = (np.arange(size, dtype=np.float64) + 0.5) * grid.pixel
    composer = Composer(placed, grid.pixel, damaged, site.tiles)
    pixels, valid, _ = composer.compose(grid.west + steps, grid.north - steps)
    return pixels, valid.astype(np.uint8) * np.uint8(255)


def _placed(site: Site, entry: ImageEntry, pixel: float) -> PlacedImage:
    """An image, or an overview of it, in its place; a copy to be changed.

    Raises:
        OutputError: it cannot be shown there.
        ArchiveError: it is damaged.
    """
    version = version_of(entry)
    whole = site.placed.get((version, 1))
    if whole is None:
        image = site.open(entry)
        check_shown(image.source)
        view = View(image, (0, 0, entry.record["width"], entry.record["height"]))
        whole = _place(Shown(view, site.levels(entry)))
        site.placed.put((version, 1), whole)
    shown = whole.raster
    assert isinstance(shown, Shown)
    assert isinstance(shown.raster, View)
    raster = coarser(shown.raster, STRETCH * pixel / whole.pitch)
    if raster is shown.raster:
        return copy.copy(whole)
    factor = raster.window[2:]
    found = site.placed.get((version, factor))
    if found is None:
        found = _place(Shown(raster, shown.levels))
        found.full_pitch = whole.pitch
        site.placed.put((version, factor), found)
    return copy.copy(found)


def _place(shown: Shown) -> PlacedImage:
    try:
        return PlacedImage(shown, MERCATOR)
    except OutputError:
        raise
    except Exception as error:  # a georeference that cannot be inverted, say
        raise ArchiveError(f"{shown.source.id}: georeference: {error}") from error


def _cost(image: PlacedImage, grid: Grid) -> float:
    """Pixels that are decoded of an image, about."""
    west, south, east, north = (
        max(a, b) if n < 2 else min(a, b)
        for n, (a, b) in enumerate(zip(image.bounds, grid.bounds, strict=True))
    )
    _, _, width, height = image.raster.window
    area = max(0.0, east - west) * max(0.0, north - south) / image.pitch**2
    return min(width * height, area)
