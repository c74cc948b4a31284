"""Mosaics of synthetic flights over a ground whose colour is known everywhere."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyproj
import pytest
import rasterio

from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.geo.georef import Georef, Window
from archive_pipeline.geo.mapping import with_footprint
from archive_pipeline.jobs import composing, mosaic
from archive_pipeline.jobs.mosaic import EmptyMosaic, write_mosaic
from archive_pipeline.outputs.paths import OutputError
from archive_pipeline.store import tile_cache
from archive_pipeline.store.layout import ArchiveError

UTM = "EPSG:32615"
X0, Y0 = 300000.0, 3250000.0
BLOCK = (64, 64)


def ground(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the true colour, (..., 3) between 40 and 200, smooth over metres."""
    u, v = (x - X0) / 3.0, (y - Y0) / 4.0
    return np.stack(
        [120 + 70 * np.sin(u) * np.cos(v), 120 + 70 * np.cos(u + v), 120 + 4 * (u - v)], axis=-1
    )


@dataclasses.dataclass(eq=False)
class Frame:
    """A raster held in memory that records what is read from it."""

    source: SourceImage
    pixels: npt.NDArray[Any]
    mask: npt.NDArray[np.uint8] | None
    window: Window
    block: tuple[int, int] = BLOCK
    reads: list[Window] = dataclasses.field(default_factory=list)
    decoder: str = "pcdc 0123456789ab, steps 0"

    def read(self, window: Window) -> npt.NDArray[Any]:
        self.reads.append(window)
        col, row, width, height = window
        return self.pixels[row : row + height, col : col + width]

    def read_mask(self, window: Window) -> npt.NDArray[np.uint8] | None:
        col, row, width, height = window
        return None if self.mask is None else self.mask[row : row + height, col : col + width]


def frame(
    name: str,
    east: float = 0.0,
    north: float = 0.0,
    yaw: float = 0.0,
    pitch: float = 0.1,
    size: tuple[int, int] = (200, 150),
    crs: str = UTM,
    dtype: str = "uint8",
    holes: npt.NDArray[np.bool_] | None = None,
    shift: float = 0.0,
    gcps: bool = False,
    **record: Any,
) -> Frame:
    """Photograph the ground: centre in metres from (X0, Y0), yaw clockwise in degrees."""
    width, height = size
    a, s, c = math.radians(yaw), math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
    assert -math.pi <= a <= math.pi
    turn = np.array([[c, s], [-s, c]]) @ np.diag([pitch, -pitch])
    origin = np.array([X0 + east, Y0 + north]) - turn @ np.array([width / 2, height / 2])
    transform = (turn[0, 0], turn[0, 1], origin[0], turn[1, 0], turn[1, 1], origin[1])

    def place(cols: Any, rows: Any) -> tuple[Any, Any]:
        ta, tb, tc, td, te, tf = transform
        return ta * cols + tb * rows + tc, td * cols + te * rows + tf

    cols, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    values = ground(*place(cols, rows)) + shift
    if gcps:
        points = [(0, 0), (width, 0), (width, height), (0, height)]
        tied = tuple((float(q), float(p), *place(p, q), 0.0, "", "") for p, q in points)
        georef = Georef(crs, gcps=tied, method="camera")
    else:
        georef = Georef(crs, transform, method="transform")
    if crs != UTM:
        corners = pyproj.Transformer.from_crs(UTM, crs, always_xy=True)
        far = [(0, 0), (width, 0), (width, height), (0, height)]
        tied = tuple(
            (float(q), float(p), *corners.transform(*place(p, q)), 0.0, "", "") for p, q in far
        )
        georef = Georef(crs, gcps=tied, method="camera")
    interp = ("red", "green", "blue")
    source = SourceImage(
        Path(name), name, name, 0, "JPEG", width, height, 3, dtype,
        mask="none" if holes is None else "mask", colorinterp=interp,
        georef=with_footprint(georef, width, height),
    )  # fmt: skip
    pixels = np.rint(values).astype(dtype) if np.dtype(dtype).kind in "iu" else values.astype(dtype)
    mask = None if holes is None else np.where(holes, 0, 255).astype(np.uint8)
    if holes is not None:
        pixels[holes] = 0
    source = dataclasses.replace(source, **record)
    return Frame(source, pixels[..., : source.bands], mask, (0, 0, width, height))


def read_back(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_], Any, Any]:
    with rasterio.open(path) as dataset:
        cols, rows = np.meshgrid(np.arange(dataset.width) + 0.5, np.arange(dataset.height) + 0.5)
        x = dataset.transform.c + dataset.transform.a * cols
        y = dataset.transform.f + dataset.transform.e * rows
        pixels = np.moveaxis(dataset.read(), 0, -1)
        return pixels, dataset.dataset_mask() != 0, x, y


def assert_is_ground(pixels: npt.NDArray[Any], truth: npt.NDArray[np.float64]) -> None:
    """Allow two roundings; up to half a pixel of extrapolation at frame edges.

    A shift by half a pixel would be an error of 0.7 root mean square.
    """
    error = pixels - truth
    assert np.sqrt((error**2).mean()) < 0.5
    assert np.abs(error).max() < 3


def test_overlapping_yawed_frames_reproduce_the_ground(tmp_path: Path) -> None:
    frames = [
        frame("a", yaw=33),
        frame("b", east=9, north=4, yaw=-120),
        frame("c", north=12, yaw=77),
    ]
    result = write_mosaic(tmp_path / "m.tif", frames)
    assert result.crs == UTM
    assert result.used == ("a", "b", "c")
    assert result.skipped == ()
    assert result.transform[0] == pytest.approx(0.1)
    pixels, valid, x, y = read_back(tmp_path / "m.tif")
    assert_is_ground(pixels[valid], ground(x, y)[valid])
    covered = sum(f.source.width * f.source.height for f in frames) * 0.01
    assert 0.5 * covered < valid.sum() * 0.01 < covered
    with rasterio.open(tmp_path / "m.tif") as dataset:
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert dataset.crs.to_epsg() == 32615
        assert dataset.transform.b == dataset.transform.d == 0
        assert dataset.transform.e < 0


def test_seams_lie_halfway_and_input_order_does_not_matter(tmp_path: Path) -> None:
    frames = [frame("a", shift=-30), frame("b", east=8, yaw=10, shift=30)]
    write_mosaic(tmp_path / "1.tif", frames)
    write_mosaic(tmp_path / "2.tif", frames[::-1])
    pixels, valid, x, y = read_back(tmp_path / "1.tif")
    np.testing.assert_array_equal(pixels, read_back(tmp_path / "2.tif")[0])
    both = valid & (np.abs(x - X0 - 4) < 1.5) & (np.abs(y - Y0) < 5)
    brighter = pixels[..., 0] > ground(x, y)[..., 0]
    assert both.sum() > 1000
    np.testing.assert_array_equal(brighter[both], (x > X0 + 4)[both])


def test_a_coarse_image_comes_after_finer_ones_however_near_its_centre(tmp_path: Path) -> None:
    fine = frame("fine", east=3)
    coarse = frame("coarse", pitch=0.3, shift=30)  # four times as large, centred on the box
    made = write_mosaic(tmp_path / "m.tif", [coarse, fine])
    pixels, _, x, y = read_back(tmp_path / "m.tif")
    assert made.used == ("coarse", "fine")
    inside = (abs(x - X0 - 3) < 9.5) & (abs(y - Y0) < 7)
    # the coarse one is 30 brighter
    assert np.abs(pixels[inside] - ground(x, y)[inside]).max() < 4


def test_holes_are_filled_by_the_next_image(tmp_path: Path) -> None:
    hole = np.zeros((150, 200), bool)
    hole[60:90, 80:120] = True
    frames = [frame("a", holes=hole), frame("b", east=6, yaw=20)]
    write_mosaic(tmp_path / "m.tif", frames)
    pixels, valid, x, y = read_back(tmp_path / "m.tif")
    assert valid[(np.abs(x - X0) < 1.9) & (np.abs(y - Y0) < 1.4)].all()
    # Nearest neighbour beside the hole is half a pixel off at most.
    assert np.abs(pixels[valid] - ground(x, y)[valid]).max() <= 4
    write_mosaic(tmp_path / "alone.tif", frames[:1])
    _, valid, x, y = read_back(tmp_path / "alone.tif")
    assert not valid[(np.abs(x - X0) < 1.9) & (np.abs(y - Y0) < 1.4)].any()


def test_box_limits_extent_and_reads(tmp_path: Path) -> None:
    frames = [frame("a", yaw=30, size=(640, 640)), frame("far", east=500)]
    to_degrees = pyproj.Transformer.from_crs(UTM, "EPSG:4326", always_xy=True)
    box = to_degrees.transform_bounds(X0 - 3, Y0 - 2, X0 + 3, Y0 + 2)
    result = write_mosaic(tmp_path / "m.tif", frames, box)
    assert result.used == ("a",)
    assert not frames[1].reads
    assert abs(result.width - 60) < 6
    assert abs(result.height - 40) < 6
    seen = {tile for col, row, w, h in frames[0].reads for tile in tiles_of(col, row, w, h)}
    assert len(seen) <= 9
    _, valid, _, _ = read_back(tmp_path / "m.tif")
    assert valid.all()


def tiles_of(col: int, row: int, width: int, height: int) -> list[tuple[int, int]]:
    across = range(col // BLOCK[0], (col + width - 1) // BLOCK[0] + 1)
    return [
        (tx, ty)
        for ty in range(row // BLOCK[1], (row + height - 1) // BLOCK[1] + 1)
        for tx in across
    ]


def test_reads_stay_small_and_tiles_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composing, "READ_BYTES", 40_000)
    frames = [frame("a", yaw=40, size=(500, 400)), frame("b", east=20, yaw=44, size=(500, 400))]
    write_mosaic(tmp_path / "m.tif", frames)
    for one in frames:
        # What is needed, and a ring of tiles around it.
        assert all(w * h * 3 < 40_000 * 4 for _, _, w, h in one.reads)
    pixels, valid, x, y = read_back(tmp_path / "m.tif")
    assert_is_ground(pixels[valid], ground(x, y)[valid])

    monkeypatch.undo()
    again = frame("a", yaw=40, size=(1500, 900), pitch=0.02)
    write_mosaic(tmp_path / "again.tif", [again])
    counts = np.zeros((900 // 64 + 1, 1500 // 64 + 1), int)
    for col, row, w, h in again.reads:
        counts[row // 64 : -(-(row + h) // 64), col // 64 : -(-(col + w) // 64)] += 1
    assert counts.min() == 1
    assert counts.mean() < 1.1


def test_window_limits_what_is_used(tmp_path: Path) -> None:
    one = frame("a")
    one.window = (50, 40, 64, 30)
    result = write_mosaic(tmp_path / "m.tif", [one])
    assert (result.width, result.height) in [(w, h) for w in (64, 65) for h in (30, 31)]
    assert all(c >= 50 and r >= 40 and c + w <= 114 and r + h <= 70 for c, r, w, h in one.reads)


@pytest.mark.parametrize("factor", [2, 3.5, 10])
def test_coarser_mosaics_average(factor: float, tmp_path: Path) -> None:
    one = frame("a", yaw=15, size=(400, 300), pitch=0.02)
    noise = np.random.default_rng(1).normal(0, 12, one.pixels.shape)
    one.pixels = np.clip(one.pixels + noise, 0, 255).astype(np.uint8)
    write_mosaic(tmp_path / "m.tif", [one], resolution=0.02 * factor)
    pixels, valid, x, y = read_back(tmp_path / "m.tif")
    error = (pixels - ground(x, y))[valid]
    assert abs(error.mean()) < 1
    assert error.std() < 14 / int(factor)


def test_an_image_within_one_pixel_gives_its_mean(tmp_path: Path) -> None:
    one = frame("a", east=200_000, north=250_000, yaw=15)
    tracemalloc.start()
    try:
        made = write_mosaic(tmp_path / "m.tif", [one], resolution=1e6)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert (made.width, made.height) == (1, 1)
    pixels, _, _, _ = read_back(tmp_path / "m.tif")
    np.testing.assert_allclose(pixels[0, 0], one.pixels.mean(axis=(0, 1)), atol=1)
    with pytest.raises(OutputError, match="coarser resolution"):
        write_mosaic(tmp_path / "n.tif", [one], resolution=1e-300)


def test_memory_does_not_grow_with_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic, "THREADS", 1)
    monkeypatch.setattr(tile_cache, "CACHE_BYTES", 1 << 20)

    def peak(count: int) -> int:
        base = frame("a", size=(560, 560))
        stack = []
        for n in range(count):
            moved = frame("a", east=n % 2 - 0.5, north=0.001 * n, size=(560, 560)).source.georef
            source = dataclasses.replace(base.source, id=f"{n:03}", georef=moved)
            stack.append(dataclasses.replace(base, source=source))
        tracemalloc.start()
        try:
            box = (X0 - 25, Y0 - 25, X0 + 25, Y0 + 25)
            write_mosaic(tmp_path / f"{count}.tif", stack, box, UTM)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # Distances alone would take another 1 MB a frame.
    assert peak(40) < peak(8) + (12 << 20)


class Damaged(Frame):
    """A frame that cannot be read below a row."""

    first_row = 0

    def read(self, window: Window) -> npt.NDArray[Any]:
        if window[1] + window[3] > self.first_row:
            raise ArchiveError(f"{self.source.id}: damaged tile")
        return super().read(window)


@pytest.mark.parametrize("first_row", [0, 900])
def test_a_damaged_image_gives_nothing(first_row: int, tmp_path: Path) -> None:
    size: Any = {"size": (1800, 1400), "pitch": 0.05}
    good = frame("a", yaw=20, **size)
    bad = Damaged(**vars(frame("b", east=40, shift=30, **size)))
    bad.first_row = first_row
    box = (X0 - 28, Y0 - 22, X0 + 28, Y0 + 22)  # 3 x 2 blocks, all of which `good` covers
    write_mosaic(tmp_path / "alone.tif", [good], box, UTM, resolution=0.05)
    found: list[tuple[Any, str]] = []
    made = write_mosaic(
        tmp_path / "m.tif", [good, bad], box, UTM, resolution=0.05,
        damaged=lambda one, why: found.append((one, str(why))),
    )  # fmt: skip
    assert found == [(bad, "b: damaged tile")]
    assert made.used == ("a",)
    for got, want in zip(
        read_back(tmp_path / "m.tif"), read_back(tmp_path / "alone.tif"), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    assert bool(bad.reads) == bool(first_row)  # it was in blocks that were written already
    with pytest.raises(ArchiveError, match="damaged tile"):
        write_mosaic(tmp_path / "x.tif", [good, bad], box, UTM)
    with pytest.raises(EmptyMosaic, match="no image has valid pixels"):
        write_mosaic(tmp_path / "x.tif", [bad], box, UTM, damaged=lambda raster, error: None)
    assert not (tmp_path / "x.tif").exists()


def test_an_image_that_cannot_be_placed_is_left_out(tmp_path: Path) -> None:
    flat = frame("flat")
    georef = dataclasses.replace(flat.source.georef, transform=(0.0, 0.0, X0, 0.0, 0.0, Y0))
    unknown = dataclasses.replace(flat.source.georef, crs="EPSG:0")
    far = frame("far")
    place = dataclasses.replace(far.source.georef, transform=(1e9, 0.0, 0.0, 0.0, -1e9, 0.0))
    images = [
        frame("a"),
        dataclasses.replace(flat, source=dataclasses.replace(flat.source, georef=georef)),
        dataclasses.replace(flat, source=dataclasses.replace(flat.source, georef=unknown)),
        dataclasses.replace(far, source=dataclasses.replace(far.source, georef=place)),
    ]
    found: list[str] = []
    made = write_mosaic(
        tmp_path / "m.tif", images, out_crs="EPSG:3857", resolution=1,
        damaged=lambda raster, error: found.append(raster.source.id),
    )  # fmt: skip
    assert made.used == ("a",)
    assert sorted(found) == ["far", "flat", "flat"]


def test_four_corner_frames_in_another_crs(tmp_path: Path) -> None:
    frames = [frame("a", yaw=33, gcps=True), frame("b", east=5, yaw=3, crs="EPSG:4326")]
    result = write_mosaic(tmp_path / "m.tif", frames)
    assert result.crs == UTM
    assert result.used == ("a", "b")
    pixels, valid, x, y = read_back(tmp_path / "m.tif")
    assert_is_ground(pixels[valid], ground(x, y)[valid])


def test_utm_zone_and_pixel_size_follow_from_the_images(tmp_path: Path) -> None:
    result = write_mosaic(tmp_path / "m.tif", [frame("a", crs="EPSG:4326")])
    assert result.crs == UTM
    assert result.transform[0] == pytest.approx(0.1, rel=1e-3)
    result = write_mosaic(tmp_path / "n.tif", [frame("a")], out_crs="EPSG:3857", resolution=0.25)
    assert result.crs == "EPSG:3857"
    assert result.transform[0] == 0.25


def test_float_rasters_keep_their_nodata(tmp_path: Path) -> None:
    height = frame(
        "dsm",
        yaw=20,
        dtype="float32",
        bands=1,
        mask="nodata",
        nodata=-9999.0,
        colorinterp=("gray",),
    )
    height.mask = np.full((150, 200), 255, np.uint8)
    height.mask[:20] = 0
    height.pixels[:20] = -9999
    write_mosaic(tmp_path / "m.tif", [height])
    pixels, valid, x, y = read_back(tmp_path / "m.tif")
    assert (pixels[~valid] == -9999).all()
    assert not valid.all()
    assert np.abs(pixels[valid][:, 0] - ground(x, y)[valid][:, 0]).max() < 2.5


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    deep = frame("deep", dtype="uint16")
    grey = frame("grey", bands=1, colorinterp=("gray",))
    result = write_mosaic(tmp_path / "m.tif", [frame("a"), deep, grey])
    assert result.used == ("a",)
    assert result.skipped == (
        ("deep", "3-band uint16, not 8-bit RGB"),
        ("grey", "1-band uint8, not 8-bit RGB"),
    )
    with pytest.raises(OutputError, match=r"deep \(3-band uint16\)|grey \(1-band uint8\)"):
        write_mosaic(tmp_path / "x.tif", [deep, grey])
    assert not (tmp_path / "x.tif").exists()


def test_nothing_to_do_is_an_error(tmp_path: Path) -> None:
    lost = frame("lost")
    lost.source = dataclasses.replace(lost.source, georef=Georef())
    with pytest.raises(OutputError, match="no image with a position"):
        write_mosaic(tmp_path / "m.tif", [lost])
    with pytest.raises(OutputError, match="no image with a position"):
        write_mosaic(tmp_path / "m.tif", [frame("a")], (10.0, 10.0, 11.0, 11.0))
    with pytest.raises(OutputError, match="no image has valid pixels"):
        write_mosaic(tmp_path / "m.tif", [frame("a", holes=np.ones((150, 200), bool))])
    with pytest.raises(ValueError, match="resolution"):
        write_mosaic(tmp_path / "m.tif", [frame("a")], resolution=0)
    assert list(tmp_path.iterdir()) == []


def test_the_same_id_in_two_flights(tmp_path: Path) -> None:
    frames = [frame("a"), frame("a", east=15, sha256="other")]
    write_mosaic(tmp_path / "m.tif", frames)
    pixels, valid, x, y = read_back(tmp_path / "m.tif")
    assert_is_ground(pixels[valid], ground(x, y)[valid])


def test_missing_tiles_are_cut_into_rectangles() -> None:
    keys = {(0, 0), (1, 0), (0, 1), (1, 1), (3, 1), (0, 3), (1, 3), (5, 9)}
    found = tile_cache._rectangles(keys)
    cells = [
        (x, y) for c0, r0, c1, r1 in found for x in range(c0, c1 + 1) for y in range(r0, r1 + 1)
    ]
    assert sorted(cells) == sorted(keys)
    assert (0, 0, 1, 1) in found
    assert len(found) == 4
