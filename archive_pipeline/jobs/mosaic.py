"""One north-up mosaic of many images, each pixel from the image that saw it closest to nadir."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyproj
import rasterio
from rasterio.crs import CRS
from rasterio.io import DatasetWriter
from rasterio.windows import Window as RasterioWindow

from archive_pipeline.flight.raster import Pixels, Raster
from archive_pipeline.geo.georef import Affine6, Bbox, Window
from archive_pipeline.geo.globe import mean_longitude
from archive_pipeline.geo.mapping import (
    bbox_to_window,
    check_bbox,
    check_crs,
    crs_to_text,
    crs_transformer,
    longitude_period,
)
from archive_pipeline.jobs._cores import cpu_count
from archive_pipeline.jobs.composing import EDGE_POINTS, Composer, PlacedImage
from archive_pipeline.outputs.nodata import avoid_nodata, storable_nodata
from archive_pipeline.outputs.paths import OutputError
from archive_pipeline.outputs.publish import NOTHING, Stamps
from archive_pipeline.outputs.writers import cog_writer
from archive_pipeline.store.layout import MAX_SIDE, ArchiveError, reason_of

T = TypeVar("T")
R = TypeVar("R")

BLOCK = 512
THREADS = 8
"""At most: each takes some 100 MB, and the decoder has threads of its own."""


class EmptyMosaic(OutputError):
    """No image has a pixel to give."""


@dataclass(frozen=True)
class Mosaic:
    """What `write_mosaic` wrote.

    Attributes:
        crs: ``"EPSG:n"`` or WKT2.
        transform: ``(a, b, c, d, e, f)`` as rasterio orders it; ``b`` and ``d`` are 0.
        width, height: pixels.
        used: ids of the images that pixels came from, sorted.
        skipped: ``(id, reason)`` of images that touch the box but cannot take part.
    """

    crs: str
    transform: Affine6
    width: int
    height: int
    used: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Grid:
    """The pixels of a mosaic: multiples of their size, so neighbouring boxes fit together."""

    crs: str
    size: float
    left: int
    top: int
    width: int
    height: int

    @property
    def transform(self) -> Affine6:
        return self.size, 0.0, self.left * self.size, 0.0, -self.size, self.top * self.size

    def blocks(self) -> Iterator[Window]:
        for row in range(0, self.height, BLOCK):
            for col in range(0, self.width, BLOCK):
                yield col, row, min(BLOCK, self.width - col), min(BLOCK, self.height - row)

    def centres(self, block: Window) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Coordinates of a block's pixel centres, float64, from west and from north."""
        col, row, width, height = block
        xs = (self.left + col + 0.5 + np.arange(width, dtype=np.float64)) * self.size
        ys = (self.top - row - 0.5 - np.arange(height, dtype=np.float64)) * self.size
        return xs, ys


def check_grid(out_crs: str | None, resolution: float | None) -> None:
    """Raise ``ValueError`` with a clear message unless a mosaic can have this CRS and pixel size.

    Args:
        out_crs, resolution: as `write_mosaic` has them.
    """
    if resolution is not None and not 0 < resolution < math.inf:
        raise ValueError(f"resolution {resolution} is not a positive number")
    if out_crs is not None:
        check_crs(out_crs)


def write_mosaic(
    path: Path,
    rasters: Iterable[Raster],
    bbox: Bbox | None = None,
    bbox_crs: str = "EPSG:4326",
    out_crs: str | None = None,
    resolution: float | None = None,
    progress: Callable[[int], None] = lambda total: None,
    damaged: Callable[[Raster, Exception], None] | None = None,
    replace: Stamps = NOTHING,
    coarser: Callable[[Raster, float], Raster] = lambda raster, factor: raster,
) -> Mosaic:
    """Resample images to one north-up Cloud Optimized GeoTIFF.

    Each pixel comes from one image: of those with a valid pixel there, the one whose centre is
    nearest on the ground, images of about twice the pixel size or more coming after all finer
    ones; equal distances go to the smaller id, so the order of ``rasters`` does not matter.
    Resampling is bicubic (Catmull-Rom) after averaging down where the mosaic is coarser by a
    factor of two or more; beside invalid pixels it is nearest neighbour.  Uncovered ground is
    masked by an internal mask, or by the nodata value where the images share one and are not
    photographs.

    Only the tiles that pixels come from are read.  Memory stays bounded whatever the extent and
    however many images overlap.

    Args:
        path: the output file; its folder is created.
        rasters: the images; pixels outside their windows are not used.
        bbox: ``(west, south, east, north)`` to cover; the extent of all images without one.
        bbox_crs: anything pyproj takes.
        out_crs: CRS of the mosaic, projected or geographic; by default the projected CRS that
            most images have, else ``bbox_crs`` if it is projected, else the UTM zone of the
            centre.
        resolution: pixel size in units of the CRS; by default the finest image's.
        progress: called after each block of 512 x 512 pixels with their number.
        damaged: called with each image that cannot be placed or read, and why.  None of its
            pixels are in the mosaic, whose extent stays as planned.
        replace: what may be replaced, see `publish`.
        coarser: gives what an image shall be read from where a pixel of the mosaic is as large as
            so many of its own, a side: an overview that is not coarser than that, or itself.

    Returns:
        Where the mosaic lies and which images it is made of.

    Raises:
        EmptyMosaic: no image with a position touches the box, or none has a valid pixel there.
        OutputError: the images differ in band count or type and none of them are 8-bit RGB (if
            some are, the mosaic is made of those and the others are reported as skipped); it
            would be too large; the file cannot be written, or another is there.
        ArchiveError: an image cannot be placed or read and ``damaged`` is None.
        ValueError: the box, a CRS or the resolution is no such thing.
    """
    check_grid(out_crs, resolution)
    if bbox is not None:
        check_bbox(bbox, bbox_crs)

    def take_out(raster: Raster, error: Exception) -> None:
        if damaged is None:
            raise error
        damaged(raster, error)

    touching, skipped = _select(rasters, bbox, bbox_crs, take_out)
    group, others = _one_kind(touching)
    crs = _pick_crs(group, bbox, bbox_crs) if group and out_crs is None else str(out_crs)
    images = _place(group, crs, take_out)
    if not images:
        where = "touches the bounding box" if bbox is not None else "and a known extent"
        raise EmptyMosaic(f"{path}: no image with a position {where}")
    size = resolution or min(image.pitch for image in images)
    grid = _grid(path, _extent(images, bbox, bbox_crs, crs), crs, size)
    images = [_coarser(image, crs, size, coarser) for image in images]
    composer = Composer(images, size, take_out)
    nodata = _shared_nodata(group)
    decoders = "; ".join(sorted({raster.decoder for raster in group}))
    with cog_writer(path, _profile(grid, group, nodata), decoders, replace=replace) as stage:
        for band, name in enumerate(group[0].source.descriptions, 1):
            if name:
                stage.set_band_description(band, name)
        used = _fill(stage, grid, composer, nodata, progress)
        if not used:
            within = " in the bounding box" if bbox is not None else ""
            reason = f"no image has valid pixels{within} where those of size {size:g} have centres"
            raise EmptyMosaic(f"{path}: {reason}")
    names = tuple(sorted({image.id for image in used}))
    return Mosaic(
        crs_to_text(CRS.from_user_input(crs)) or crs,
        grid.transform,
        grid.width,
        grid.height,
        names,
        (*skipped, *others),
    )


def _grid(path: Path, extent: Bbox, crs: str, size: float) -> _Grid:
    west, south, east, north = extent
    if not max(east - west, north - south) / size < MAX_SIDE:
        raise OutputError(
            f"{path}: more than {MAX_SIDE} pixels of {size:g} a side; take a smaller box or a "
            "coarser resolution"
        )
    left, top = math.floor(west / size + 1e-6), math.ceil(north / size - 1e-6)
    width = max(1, math.ceil(east / size - 1e-6) - left)
    height = max(1, top - math.floor(south / size + 1e-6))
    return _Grid(crs, size, left, top, width, height)


def _profile(grid: _Grid, group: list[Raster], nodata: float | int | None) -> dict[str, Any]:
    source = group[0].source
    return {
        "width": grid.width,
        "height": grid.height,
        "count": source.bands,
        "dtype": source.dtype,
        "crs": CRS.from_user_input(grid.crs),
        "transform": rasterio.Affine(*grid.transform),
        "photometric": "RGB" if source.lossy else "MINISBLACK",
        **({} if nodata is None else {"nodata": nodata}),
    }


def _fill(
    stage: DatasetWriter,
    grid: _Grid,
    composer: Composer,
    nodata: float | int | None,
    progress: Callable[[int], None],
) -> set[PlacedImage]:
    """Write all blocks; returns the images that are in them."""
    held: dict[Window, set[PlacedImage]] = {}

    def write(block: Window, pixels: Pixels, valid: npt.NDArray[np.bool_]) -> None:
        target = RasterioWindow(*block)
        if nodata is not None:
            pixels[~valid] = nodata
            if pixels.dtype.kind in "iu":
                avoid_nodata(pixels, valid, nodata)
        stage.write(np.moveaxis(pixels, 2, 0), window=target)
        if nodata is None:
            stage.write_mask(valid.astype(np.uint8) * np.uint8(255), window=target)

    def compose(block: Window) -> tuple[Pixels, npt.NDArray[np.bool_], set[PlacedImage]]:
        return composer.compose(*grid.centres(block))

    total = -(-grid.width // BLOCK) * -(-grid.height // BLOCK)
    for block, (pixels, valid, sources) in _side_by_side(compose, grid.blocks()):
        progress(total)
        if sources:
            held[block] = sources
            write(block, pixels, valid)
    # What a damaged image gave before its damage was found goes again.
    while stale := [block for block, had in held.items() if not had <= {*composer.images}]:
        if not composer.images:
            return set()
        for block, (pixels, valid, sources) in _side_by_side(compose, stale):
            held[block] = sources
            write(block, pixels, valid)
    return set().union(*held.values())


def _side_by_side(function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Items with their results, in order; threads work on the next ones meanwhile."""
    threads = min(cpu_count(), THREADS)
    with ThreadPoolExecutor(threads, "mosaic") as pool:
        waiting: deque[tuple[T, Future[R]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for item, future in waiting:
                yield item, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _select(
    rasters: Iterable[Raster],
    bbox: Bbox | None,
    bbox_crs: str,
    damaged: Callable[[Raster, Exception], None],
) -> tuple[list[Raster], list[tuple[str, str]]]:
    """Return the rasters that touch the box, by id, and those that can never take part."""
    found, skipped = [], []
    for raster in sorted(rasters, key=lambda raster: (raster.source.id, raster.source.sha256)):
        source = raster.source
        if not source.georef.is_mapped:
            skipped.append((source.id, "its position is not known"))
            continue
        try:
            crs_transformer(str(source.georef.crs), "EPSG:4326")
            touches = bbox is None or bbox_to_window(
                source.georef, source.width, source.height, bbox, bbox_crs
            )
        except Exception as error:  # the box is fine, so the image's own georeference is not
            damaged(raster, ArchiveError(f"{source.id}: georeference: {reason_of(error)}"))
            continue
        if not touches:
            continue
        odd = source.colormap is not None or source.white_is_zero
        if odd or np.dtype(source.dtype).kind not in "iuf":
            kind = "palette" if source.colormap is not None else source.dtype
            kind = "WhiteIsZero" if source.white_is_zero else kind
            skipped.append((source.id, f"{kind} pixels cannot be resampled"))
        else:
            found.append(raster)
    return found, skipped


def _place(
    rasters: list[Raster], crs: str, damaged: Callable[[Raster, Exception], None]
) -> list[PlacedImage]:
    placed = []
    for raster in rasters:
        try:
            placed.append(PlacedImage(raster, crs))
        except OutputError as error:
            damaged(raster, error)
        except Exception as error:  # a georeference that cannot be inverted, say
            reason = f"{raster.source.id}: georeference: {reason_of(error)}"
            damaged(raster, ArchiveError(reason))
    return placed


def _coarser(
    image: PlacedImage, crs: str, size: float, coarser: Callable[[Raster, float], Raster]
) -> PlacedImage:
    """The image, or an overview of it in its place."""
    raster = coarser(image.raster, size / image.pitch)
    if raster is image.raster:
        return image
    placed = PlacedImage(raster, crs)
    placed.full_pitch = image.pitch
    return placed


def _one_kind(rasters: list[Raster]) -> tuple[list[Raster], list[tuple[str, str]]]:
    """Keep rasters of one band count and type."""
    groups: dict[str, list[Raster]] = defaultdict(list)
    for raster in rasters:
        source = raster.source
        kind = "8-bit RGB" if source.lossy else f"{source.bands}-band {source.dtype}"
        groups[kind].append(raster)
    if len(groups) < 2:
        return rasters, []
    main = "8-bit RGB" if "8-bit RGB" in groups else max(groups, key=lambda k: len(groups[k]))
    odd = [
        (raster.source.id, kind)
        for kind, group in groups.items()
        if kind != main
        for raster in group
    ]
    if main != "8-bit RGB":
        named = ", ".join(f"{image} ({kind})" for image, kind in odd)
        raise OutputError(f"cannot mosaic {main} images together with {named}")
    return groups[main], [(image, f"{kind}, not {main}") for image, kind in odd]


def _pick_crs(rasters: list[Raster], bbox: Bbox | None, bbox_crs: str) -> str:
    counts = Counter(str(raster.source.georef.crs) for raster in rasters)
    projected = [crs for crs in counts if pyproj.CRS.from_user_input(crs).is_projected]
    if projected:
        return min(projected, key=lambda crs: (-counts[crs], crs))
    if bbox is not None and pyproj.CRS.from_user_input(bbox_crs).is_projected:
        return bbox_crs
    corners = [point for raster in rasters for point in raster.source.georef.footprint or ()]
    lon, lat = mean_longitude(np.array(corners)[:, 0]), np.mean(corners, axis=0)[1]
    zone = int((lon + 180) // 6) % 60 + 1
    return f"EPSG:{(32600 if lat >= 0 else 32700) + zone}"


def _extent(images: list[PlacedImage], bbox: Bbox | None, bbox_crs: str, crs: str) -> Bbox:
    """Bounds of the images, or what of them is in the box; longitudes may run beyond 180."""
    box: Bbox | None = None
    if bbox is not None:
        box = crs_transformer(bbox_crs, crs).transform_bounds(*bbox, densify_pts=EDGE_POINTS)
    period = longitude_period(crs)
    if period is not None:
        if box is not None and box[0] > box[2]:
            box = box[0], box[1], box[2] + period, box[3]
        lon = mean_longitude(np.array([image.centre[0] for image in images]), period)
        for image in images:
            image.turn_to(lon if box is None else (box[0] + box[2]) / 2, period)
    bounds = np.array([image.bounds for image in images])
    west, south = bounds[:, :2].min(axis=0)
    east, north = bounds[:, 2:].max(axis=0)
    if box is not None:
        west, south = max(west, box[0]), max(south, box[1])
        east, north = min(east, box[2]), min(north, box[3])
    return float(west), float(south), float(east), float(north)


def _shared_nodata(rasters: list[Raster]) -> float | int | None:
    first = rasters[0].source
    values = {repr(raster.source.nodata) for raster in rasters}
    kept = all(raster.source.mask == "nodata" for raster in rasters)
    if first.lossy or len(values) > 1 or not kept:
        return None
    return storable_nodata(first.nodata, first.dtype)
