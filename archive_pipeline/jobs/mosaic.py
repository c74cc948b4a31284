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
from rasterio.windows import Window as RasterioWindow

from archive_pipeline.flight.raster import Pixels, Raster
from archive_pipeline.geo.georef import Affine6, Bbox, Window
from archive_pipeline.geo.mapping import bbox_to_window, check_bbox, crs_transformer, pixel_mapping
from archive_pipeline.jobs._cores import cpu_count
from archive_pipeline.jobs._resampling import Array, catmull_rom, shrink
from archive_pipeline.outputs.paths import OutputError
from archive_pipeline.outputs.writers import avoid_nodata, cog_writer, storable_nodata
from archive_pipeline.store.tile_cache import TileCache

T = TypeVar("T")
R = TypeVar("R")

BLOCK = 512
MAP_STEP = 16
"""Positions are computed at every 16th pixel of a block and interpolated in between."""
FAR = 1e15
EDGE_POINTS = 33
READ_BYTES = 16 << 20
"""Source pixels that one step reads at most, in each thread; larger needs are split."""
THREADS = 8
"""At most: each takes some 100 MB, and the decoder has threads of its own."""


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


def write_mosaic(
    path: Path,
    rasters: Iterable[Raster],
    bbox: Bbox | None = None,
    bbox_crs: str = "EPSG:4326",
    out_crs: str | None = None,
    resolution: float | None = None,
    progress: Callable[[int], None] = lambda total: None,
) -> Mosaic:
    """Resample images to one north-up Cloud Optimized GeoTIFF.

    Each pixel comes from one image: of those with a valid pixel there, the one whose centre is
    nearest on the ground, images of about twice the pixel size or more coming after all finer
    ones; equal distances go to the smaller id, so the order of ``rasters`` does not matter.
    Resampling is bicubic (Catmull-Rom) after averaging down where the mosaic is coarser by a
    factor of two or more; beside invalid pixels it is nearest neighbour.  Uncovered ground is
    masked by an internal mask, or by the nodata value where the images share one and are not
    photographs.

    Only the tiles that pixels come from are read.  Memory stays bounded whatever the extent.

    Args:
        path: the output file; its folder is created.
        rasters: the images; pixels outside their windows are not used.
        bbox: ``(west, south, east, north)`` to cover; the extent of all images without one.
        bbox_crs: anything pyproj takes.
        out_crs: CRS of the mosaic; by default the projected CRS that most images have, else
            ``bbox_crs`` if it is projected, else the UTM zone of the centre.
        resolution: pixel size in units of the CRS; by default the finest image's.
        progress: called after each block of 512 x 512 pixels with their number.

    Returns:
        Where the mosaic lies and which images it is made of.

    Raises:
        OutputError: no image with a position touches the box; the images differ in band count or
            type and none of them are 8-bit RGB (if some are, the mosaic is made of those and the
            others are reported as skipped); the file cannot be written.
        ValueError: the box, a CRS or the resolution is no such thing.
    """
    if bbox is not None:
        check_bbox(bbox, bbox_crs)
    if resolution is not None and not 0 < resolution < math.inf:
        raise ValueError(f"resolution {resolution} is not a positive number")
    touching, skipped = _select(rasters, bbox, bbox_crs)
    group, others = _one_kind(touching)
    skipped += others
    if not group:
        raise OutputError(f"{path}: no image with a position touches the bounding box")
    crs = _pick_crs(group, bbox, bbox_crs) if out_crs is None else out_crs
    images = [_Image(raster, crs) for raster in group]
    _put_coarse_last(images)
    size = resolution or min(image.pitch for image in images)
    west, south, east, north = _extent(images, bbox, bbox_crs, crs)
    # On a grid through the origin mosaics of neighbouring boxes fit together.
    left, top = math.floor(west / size + 1e-6), math.ceil(north / size - 1e-6)
    width = max(1, math.ceil(east / size - 1e-6) - left)
    height = max(1, top - math.floor(south / size + 1e-6))
    transform: Affine6 = (size, 0.0, left * size, 0.0, -size, top * size)

    source = group[0].source
    nodata = _shared_nodata(group)
    profile: dict[str, Any] = {
        "width": width,
        "height": height,
        "count": source.bands,
        "dtype": source.dtype,
        "crs": CRS.from_user_input(crs),
        "transform": rasterio.Affine(*transform),
        "photometric": "RGB" if source.lossy else "MINISBLACK",
    }
    if nodata is not None:
        profile["nodata"] = nodata
    used: set[str] = set()
    tiles = TileCache()
    with cog_writer(path, profile) as stage:
        for band, name in enumerate(source.descriptions, 1):
            if name:
                stage.set_band_description(band, name)

        def compose(block: Window) -> tuple[Pixels, npt.NDArray[np.bool_], set[str]]:
            col, row, w, h = block
            xs = (left + col + 0.5 + np.arange(w, dtype=np.float64)) * size
            ys = (top - row - 0.5 - np.arange(h, dtype=np.float64)) * size
            return _compose(images, tiles, xs, ys, size)

        blocks = list(_blocks(width, height))
        for block, (pixels, valid, sources) in _side_by_side(compose, blocks):
            progress(len(blocks))
            used |= sources
            if not sources:
                continue
            target = RasterioWindow(*block)
            if nodata is not None:
                pixels[~valid] = nodata
                if pixels.dtype.kind in "iu":
                    avoid_nodata(pixels, valid, nodata)
            stage.write(np.moveaxis(pixels, 2, 0), window=target)
            if nodata is None:
                stage.write_mask(valid.astype(np.uint8) * np.uint8(255), window=target)
        if not used:
            raise OutputError(f"{path}: no image has valid pixels in the bounding box")
    return Mosaic(crs, transform, width, height, tuple(sorted(used)), tuple(skipped))


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


class _Image:
    """A raster placed in the mosaic's CRS."""

    def __init__(self, raster: Raster, crs: str) -> None:
        source = raster.source
        self.raster = raster
        self.id = source.id
        self._to_source = crs_transformer(crs, str(source.georef.crs))
        self._to_pixels = pixel_mapping(source.georef, inverse=True)
        to_ground = pixel_mapping(source.georef, inverse=False)
        from_source = crs_transformer(str(source.georef.crs), crs)

        def ground(cols: Array, rows: Array) -> tuple[Array, Array]:
            return from_source.transform(*to_ground(cols, rows))

        middle = np.array([source.width / 2, source.height / 2])
        x, y = ground(
            middle[0] + np.array([0, -0.5, 0.5, 0, 0]), middle[1] + np.array([0, 0, 0, -0.5, 0.5])
        )
        self.centre = float(x[0]), float(y[0])
        area = (x[2] - x[1]) * (y[4] - y[3]) - (x[4] - x[3]) * (y[2] - y[1])
        self.pitch = math.sqrt(abs(float(area)))
        self.handicap = 0.0
        col, row, width, height = raster.window
        edge = np.linspace(0, 1, EDGE_POINTS)
        zero, one = np.zeros_like(edge), np.ones_like(edge)
        x, y = ground(
            col + width * np.concatenate([edge, one, edge, zero]),
            row + height * np.concatenate([zero, edge, one, edge]),
        )
        self.bounds = float(x.min()), float(y.min()), float(x.max()), float(y.max())
        if not (self.pitch > 0 and np.isfinite([self.pitch, *self.bounds, *self.centre]).all()):
            raise OutputError(f"{self.id}: the image's position cannot be expressed in {crs}")

    def pixels_at(self, xs: Array, ys: Array) -> tuple[Array, Array]:
        """Return columns and rows, float64 (len(ys), len(xs)), of a grid of ground points."""
        across, left, right_share = _nodes(xs)
        down, upper, lower_share = _nodes(ys)
        x, y = np.meshgrid(across, down)
        u, v = self._to_source.transform(x.ravel(), y.ravel())
        cols, rows = self._to_pixels(np.asarray(u), np.asarray(v))
        # A place without a position must not spoil its neighbours: zero times infinity.
        cols = np.where(np.isfinite(cols), cols, FAR).reshape(x.shape)
        rows = np.where(np.isfinite(rows), rows, FAR).reshape(x.shape)

        def spread(nodes: Array) -> Array:
            share = lower_share[:, None]
            lines = nodes[upper] * (1 - share) + nodes[upper + 1] * share
            filled: Array = lines[:, left] * (1 - right_share) + lines[:, left + 1] * right_share
            return filled

        return spread(cols), spread(rows)


def _put_coarse_last(images: list[_Image]) -> None:
    """Add to the distances of coarse images more than any image's distance from its centre."""
    corners = [image.bounds for image in images] + [image.centre * 2 for image in images]
    west, south = (min(c[axis] for c in corners) for axis in (0, 1))
    east, north = (max(c[axis] for c in corners) for axis in (2, 3))
    finest = min(image.pitch for image in images)
    for image in images:
        octaves = round(math.log2(image.pitch / finest))
        image.handicap = octaves * math.hypot(east - west, north - south)


def _select(
    rasters: Iterable[Raster], bbox: Bbox | None, bbox_crs: str
) -> tuple[list[Raster], list[tuple[str, str]]]:
    """Return the rasters that touch the box, by id, and those that can never take part."""
    found, skipped = [], []
    for raster in sorted(rasters, key=lambda raster: (raster.source.id, raster.source.sha256)):
        source = raster.source
        if source.georef.footprint is None:
            skipped.append((source.id, "its position is not known"))
        elif bbox is not None and not bbox_to_window(
            source.georef, source.width, source.height, bbox, bbox_crs
        ):
            continue
        elif source.colormap is not None or np.dtype(source.dtype).kind not in "iuf":
            kind = "palette" if source.colormap is not None else source.dtype
            skipped.append((source.id, f"{kind} pixels cannot be resampled"))
        else:
            found.append(raster)
    return found, skipped


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
    lon, lat = np.mean(corners, axis=0)
    zone = int((lon + 180) // 6) % 60 + 1
    return f"EPSG:{(32600 if lat >= 0 else 32700) + zone}"


def _extent(images: list[_Image], bbox: Bbox | None, bbox_crs: str, crs: str) -> Bbox:
    bounds = np.array([image.bounds for image in images])
    west, south = bounds[:, :2].min(axis=0)
    east, north = bounds[:, 2:].max(axis=0)
    if bbox is not None:
        box = crs_transformer(bbox_crs, crs).transform_bounds(*bbox, densify_pts=EDGE_POINTS)
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


def _blocks(width: int, height: int) -> Iterator[Window]:
    for row in range(0, height, BLOCK):
        for col in range(0, width, BLOCK):
            yield col, row, min(BLOCK, width - col), min(BLOCK, height - row)


def _nodes(values: Array) -> tuple[Array, npt.NDArray[np.intp], Array]:
    """Every 16th of equally spaced values; for all of them the one before, and the next's share."""
    count = -(-max(len(values) - 1, 1) // MAP_STEP) + 1
    step = values[1] - values[0] if len(values) > 1 else 0.0
    position = np.arange(len(values)) / MAP_STEP
    before = np.minimum(position.astype(np.intp), count - 2)
    return values[0] + step * MAP_STEP * np.arange(count), before, position - before


def _compose(
    images: list[_Image], tiles: TileCache, xs: Array, ys: Array, size: float
) -> tuple[Pixels, npt.NDArray[np.bool_], set[str]]:
    """Fill one block: pixels (rows, cols, bands), where they are valid, and whose they are."""
    source = images[0].raster.source
    shape = len(ys), len(xs)
    pixels = np.zeros((*shape, source.bands), source.dtype)
    valid = np.zeros(shape, bool)
    used: set[str] = set()
    near = [
        image
        for image in images
        if image.bounds[0] <= xs[-1] + size
        and image.bounds[2] >= xs[0] - size
        and image.bounds[1] <= ys[0] + size
        and image.bounds[3] >= ys[-1] - size
    ]
    if not near:
        return pixels, valid, used
    distance = np.full((len(near), *shape), np.inf, np.float32)
    for layer, image in zip(distance, near, strict=True):
        cols, rows = image.pixels_at(xs, ys)
        col, row, width, height = image.raster.window
        inside = (cols >= col) & (cols < col + width) & (rows >= row) & (rows < row + height)
        x, y = image.centre
        layer[inside] = np.hypot(xs[None] - x, ys[:, None] - y)[inside] + image.handicap
    # The nearest image may have a hole there; then the next one's turn comes.
    while True:
        winner = np.where(valid | ~np.isfinite(distance.min(axis=0)), -1, distance.argmin(axis=0))
        present = np.unique(winner[winner >= 0])
        if not present.size:
            return pixels, valid, used
        for index in present:
            image = near[index]
            at = np.nonzero(winner == index)
            distance[index][at] = np.inf
            cols, rows = image.pixels_at(xs, ys)
            values, good = _sample(image, tiles, cols[at], rows[at], size)
            at = at[0][good], at[1][good]
            pixels[at] = values[good]
            valid[at] = True
            if good.any():
                used.add(image.id)


def _sample(
    image: _Image, tiles: TileCache, cols: Array, rows: Array, size: float
) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """Interpolate an image at n positions: pixels (n, bands) and whether they are valid."""
    raster = image.raster
    source = raster.source
    factor = max(1, int(size / image.pitch + 1e-6))
    margin = 3 * factor
    col, row, width, height = raster.window
    c0, c1 = max(col, int(cols.min()) - margin), min(col + width, int(cols.max()) + margin + 1)
    r0, r1 = max(row, int(rows.min()) - margin), min(row + height, int(rows.max()) + margin + 1)
    cost = (c1 - c0) * (r1 - r0) * source.bands * np.dtype(source.dtype).itemsize
    if cost > READ_BYTES and len(cols) > 1:
        along = cols if np.ptp(cols) >= np.ptp(rows) else rows
        first = along <= np.median(along)
        if first.all():
            first = along < along.max()
        if first.any():
            pixels = np.empty((len(cols), source.bands), source.dtype)
            valid = np.empty(len(cols), bool)
            for part in (first, ~first):
                pixels[part], valid[part] = _sample(image, tiles, cols[part], rows[part], size)
            return pixels, valid
    read, mask = tiles.read(raster, (c0, r0, c1 - c0, r1 - r0))
    # float32 holds every level of 8- and 16-bit types.
    exact = (
        np.float32 if np.dtype(source.dtype).itemsize <= 2 or source.dtype == "float32" else None
    )
    values = read.astype(exact or np.float64)
    known = np.isfinite(values).all(axis=2)
    if mask is not None:
        known &= mask != 0
    if factor > 1:
        values, known = shrink(values, known, factor)
    result, good = catmull_rom(
        values, known, (cols - c0) / factor - 0.5, (rows - r0) / factor - 0.5
    )
    if np.dtype(source.dtype).kind in "iu":
        info = np.iinfo(source.dtype)
        result = np.clip(np.rint(result), info.min, info.max)
    return result.astype(source.dtype).T, good
