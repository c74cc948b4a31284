"""The antimeridian, global rasters and the poles: footprints, boxes, index, mosaics."""

from __future__ import annotations

import io
import math
from pathlib import Path

import geopandas
import numpy as np
import pyproj
import pytest
import rasterio
import shapely
from conftest import Run
from rasterio.transform import from_bounds

from archive_pipeline.geo.camera import CameraPose, camera_georef
from archive_pipeline.geo.georef import Bbox, Georef
from archive_pipeline.geo.globe import cut_at_antimeridian
from archive_pipeline.geo.mapping import (
    bbox_to_window,
    check_bbox,
    window_transform,
    with_footprint,
)
from archive_pipeline.store.archive import Archive

WIDTH, HEIGHT = 120, 60
FIJI = (177.0, -19.0, 183.0, -16.0)


def grid(crs: str, bounds: Bbox, width: int = WIDTH, height: int = HEIGHT) -> Georef:
    transform = tuple(from_bounds(*bounds, width, height))[:6]
    return with_footprint(Georef(crs, transform, method="transform"), width, height)


def around(crs: str, lon: float, lat: float, metres: float) -> Georef:
    x, y = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, lat)
    return grid(crs, (x - metres, y - metres, x + metres, y + metres))


def ring(georef: Georef) -> np.ndarray:
    assert georef.footprint is not None
    points = np.array(georef.footprint)
    assert (points[0] == points[-1]).all()
    assert shapely.Polygon(points).is_valid
    return points


def window(georef: Georef, *bbox: float, crs: str = "EPSG:4326") -> tuple[int, ...] | None:
    return bbox_to_window(georef, WIDTH, HEIGHT, bbox, crs)


CROSSING = {
    "degrees": lambda: grid("EPSG:4326", FIJI),
    "degrees from -183": lambda: grid("EPSG:4326", (-183.0, -19.0, -177.0, -16.0)),
    "another datum": lambda: grid("EPSG:4269", FIJI),
    "Fiji": lambda: around("EPSG:3460", 180.0, -17.5, 50_000),
    "UTM 60 S": lambda: around("EPSG:32760", 179.99, -17.5, 50_000),
    "UTM 1 S": lambda: around("EPSG:32701", -179.99, -17.5, 50_000),
    "mercator": lambda: grid("EPSG:3832", (3_303_000, -2e6, 3_403_000, -1.9e6)),
}


@pytest.mark.parametrize("kind", CROSSING)
def test_images_across_the_antimeridian(kind: str) -> None:
    georef = CROSSING[kind]()
    points = ring(georef)
    assert len(points) == 5
    west, south = points.min(axis=0)
    east, north = points.max(axis=0)
    assert -180 <= west < 180 < east < 184
    area = shapely.Polygon(points).area
    cut = cut_at_antimeridian(georef.footprint or ())
    assert isinstance(cut, shapely.MultiPolygon)
    assert len(cut.geoms) == 2
    assert cut.is_valid
    assert cut.bounds[::2] == (-180.0, 180.0)
    assert cut.area == pytest.approx(area)
    assert max(part.bounds[2] - part.bounds[0] for part in cut.geoms) < 4
    # one box in all the ways to say it
    middle, size = (south + north) / 2, 0.01
    low, high = middle - size, middle + size
    ways = [
        (180 - size, low, -180 + size, high),
        (180 - size, low, 180 + size, high),
        (-180 - size, low, -180 + size, high),
    ]
    found = {window(georef, *way) for way in ways}
    assert len(found) == 1
    (both,) = found
    assert both is not None
    halves = [
        window(georef, 180 - size, low, 180, high),
        window(georef, -180, low, -180 + size, high),
    ]
    left, right = halves
    assert left is not None
    assert right is not None
    assert left[0] == both[0]
    assert left[0] < right[0] <= left[0] + left[2]
    assert both[2] < WIDTH / 2
    assert window(georef, -170, low, 170, high) is None
    assert window(georef, 10, low, 20, high) is None
    part = window_transform(georef, both)
    lon = ring(part)[:, 0]
    assert np.ptp(lon) < 0.2
    assert bbox_to_window(part, *both[2:], ways[0]) is not None
    # the same box in a projection of the place
    x, y = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:3460", always_xy=True).transform(
        180, middle
    )
    assert window(georef, x - 500, y - 500, x + 500, y + 500, crs="EPSG:3460") is not None


@pytest.mark.parametrize("west", [-180.0, 0.0, -20.0, 100.0])
@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:4269", "EPSG:4087"])
def test_global_rasters(west: float, crs: str) -> None:
    metres = math.pi * 6378137 / 180 if crs == "EPSG:4087" else 1.0
    bounds = np.array([west, -90.0, west + 360, 90.0])
    if crs == "EPSG:4087" and west != -180:
        pytest.skip("its longitudes end at 180")
    georef = grid(crs, tuple(bounds * metres), 360, 180)
    points = ring(georef)
    assert np.ptp(points, axis=0) == pytest.approx([360, 180])
    cut = cut_at_antimeridian(georef.footprint or ())
    assert cut.bounds == pytest.approx((-180, -90, 180, 90))
    assert cut.area == pytest.approx(360 * 180)
    for lon in (-178.5, -100.5, -18.5, 0.5, 98.5, 179.5):
        found = bbox_to_window(georef, 360, 180, (lon - 0.2, 10.1, lon + 0.2, 10.9))
        assert found is not None
        col = int((lon - 0.2 - west) % 360)
        assert found == (col, 79, found[2], 1)
        assert found[2] <= 2
    assert bbox_to_window(georef, 360, 180, (-180, -90, 180, 90)) == (0, 0, 360, 180)
    assert bbox_to_window(georef, 360, 180, (0, -90, 360, 90)) == (0, 0, 360, 180)
    # a box that the raster's own edge cuts in two is in one window with both
    edge = west if west != 0 else 0.0
    both = bbox_to_window(georef, 360, 180, (edge - 2, 0, edge + 2, 1)) if edge > -170 else None
    assert both in (None, (0, 89, 360, 1))
    utm = bbox_to_window(georef, 360, 180, (300_000, 3.2e6, 400_000, 3.3e6), "EPSG:32615")
    assert utm is not None
    assert (utm[0] + west + 180) % 360 - 180 == pytest.approx(-96, abs=1)
    assert utm[2:] <= (3, 3)


@pytest.mark.parametrize(
    ("crs", "sign"), [("EPSG:3413", 1), ("EPSG:3031", -1), ("EPSG:5041", 1), ("EPSG:5042", -1)]
)
def test_images_round_a_pole(crs: str, sign: int) -> None:
    x, y = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(0, 90 * sign)
    georef = grid(crs, (x - 1e6, y - 1e6, x + 1e6, y + 1e6))
    points = ring(georef)
    assert np.ptp(points[:, 0]) == pytest.approx(360)
    assert (sign * points[:, 1]).max() == 90
    cut = cut_at_antimeridian(georef.footprint or ())
    assert cut.contains(shapely.Point(33, 89 * sign))
    assert not cut.contains(shapely.Point(33, 70 * sign))
    low, high = sorted((88 * sign, 89 * sign))
    found = [window(georef, lon, low, lon + 10, high) for lon in range(-180, 180, 10)]
    assert None not in found
    assert len(set(found)) > 20
    assert all(w is not None and w[2] < 20 and w[3] < 20 for w in found)
    assert window(georef, 175, low, -175, high) == window(georef, 175, low, 185, high)
    cap = window(
        georef, -180, *sorted((89.9 * sign, 90 * sign))[:1], 180, max(89.9 * sign, 90 * sign)
    )
    assert cap is not None
    assert abs(cap[0] + cap[2] / 2 - WIDTH / 2) <= 1
    assert abs(cap[1] + cap[3] / 2 - HEIGHT / 2) <= 1
    assert (
        window(georef, 10, *sorted((40 * sign, 50 * sign))[:1], 20, max(40 * sign, 50 * sign))
        is None
    )
    # a box in the same projection, and in another one of the pole
    for other in (crs, "EPSG:3995" if sign > 0 else "EPSG:5042"):
        x, y = pyproj.Transformer.from_crs("EPSG:4326", other, always_xy=True).transform(
            0, 90 * sign
        )
        box = window(georef, x - 1000, y - 1000, x + 1000, y + 1000, crs=other)
        assert box is not None
        assert box[2] <= 2
        assert abs(box[0] - WIDTH / 2) <= 1


def test_a_quarter_that_ends_at_the_pole() -> None:
    georef = grid("EPSG:3413", (0, 0, 1e6, 1e6))
    points = ring(georef)
    assert np.ptp(points[:, 0]) == pytest.approx(90)
    assert points[:, 1].max() == pytest.approx(90)
    assert shapely.Polygon(points).contains(shapely.Point(points[:, 0].mean(), 89.9))
    half = grid("EPSG:3413", (-1e6, 0, 1e6, 1e6))
    assert np.ptp(ring(half)[:, 0]) == pytest.approx(180)
    assert window(half, 35, 88, 44, 89) is None
    assert window(half, 134, 88, 136, 89) is not None


@pytest.mark.parametrize("pitch", [-90.0, -60.0])
@pytest.mark.parametrize("lon", [179.9999, 180.0, -180.0, -179.9999])
def test_a_frame_at_the_antimeridian(lon: float, pitch: float) -> None:
    pose = CameraPose(
        lon=lon,
        lat=-17.0,
        altitude_relative_m=100.0,
        yaw_deg=20.0,
        pitch_deg=pitch,
        focal_35mm=24.0,
    )
    georef = camera_georef(pose, 4000, 3000)
    points = ring(georef)
    assert np.ptp(points[:, 0]) < 0.01
    assert -180 <= points[:, 0].min() < 180 < points[:, 0].max()
    lat = points[:-1, 1].mean()
    for box in ((179.9999, lat, -179.9999, lat + 1e-5), (179.9999, lat, 180.0001, lat + 1e-5)):
        assert bbox_to_window(georef, 4000, 3000, box) is not None


def test_boxes_are_checked() -> None:
    for bbox in ((-180, -90, 180, 90), (170, 0, -170, 1), (350, 0, 360, 1), (-190, 0, -170, 1)):
        check_bbox(bbox)
    check_bbox((199, 0, -199, 1), "EPSG:4807")  # grads
    inf, nan = math.inf, math.nan
    for bbox, crs, reason in (
        ((nan, 0, 1, 1), "EPSG:4326", "not finite"),
        ((0, 0, inf, 1), "EPSG:4326", "not finite"),
        ((0, 2, 1, 1), "EPSG:4326", "south 2 is not less than north 1"),
        ((1, 0, 1, 1), "EPSG:4326", "empty"),
        ((-200, 0, 200, 1), "EPSG:4326", "whole turn"),
        ((185, 0, 175, 1), "EPSG:4326", "leaves longitude -180..180"),
        ((29.28, -94.8, 29.29, -94.79), "EPSG:4326", "west south east north"),
        ((2, 0, 1, 1), "EPSG:32615", "west 2 is not less than east 1"),
        ((0, 0, 1, 1), "EPSG:99999", "unknown coordinate reference system"),
        ((0, 0, 1, 1), "nonsense", "unknown coordinate reference system"),
        ((0, 0, 1, 1), "", "unknown coordinate reference system"),
        ((0, 0, 1, 1), "EPSG:4978", "no projected or geographic"),
        ((0, 0, 1, 1), "EPSG:5773", "no projected or geographic"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_bbox(bbox, crs)


def shade(lon: np.ndarray) -> np.ndarray:
    """Grey that rises from 179.75 to 180.25 degrees east, and is 0 far from there."""
    return np.rint(np.clip(500 * ((lon % 360) - 179.75), 0, 250))


@pytest.fixture(scope="module")
def fiji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rasters on both sides of the antimeridian, across it, and of the whole world."""
    folder = tmp_path_factory.mktemp("fiji")
    for name, crs, bounds in (
        ("across.tif", "EPSG:4326", (179.9, -17.1, 180.1, -17.0)),
        ("east.tif", "EPSG:4326", (-180.0, -17.1, -179.8, -17.0)),
        ("west.tif", "EPSG:4326", (179.8, -17.1, 180.0, -17.0)),
        ("world.tif", "EPSG:4326", (0.0, -90.0, 360.0, 90.0)),
    ):
        step = (bounds[2] - bounds[0]) / WIDTH
        lon = bounds[0] + step * (np.arange(WIDTH) + 0.5)
        pixels = np.broadcast_to(shade(lon).astype(np.uint8), (1, HEIGHT, WIDTH))
        with rasterio.open(
            folder / name, "w", driver="GTiff", width=WIDTH, height=HEIGHT, count=1, dtype="uint8",
            crs=crs, transform=from_bounds(*bounds, WIDTH, HEIGHT),
        ) as dataset:  # fmt: skip
            dataset.write(pixels)
    return folder


def test_selection_index_and_mosaic(run: Run, fiji: Path, tmp_path: Path) -> None:
    url, out = tmp_path / "a.zarr", tmp_path / "out"
    assert run("ingest", fiji, "--archive", url, "--workers", 0).code == 0
    listed = run("info", "--archive", url)
    assert "180.000000" in listed.out or "-180.000000" in listed.out
    raw = Archive.open(url).read_key("items.parquet")
    assert raw is not None
    frame = geopandas.read_parquet(io.BytesIO(raw)).set_index("id")
    assert frame.geometry.geom_type.to_dict() == {
        "across.tif": "MultiPolygon",
        "east.tif": "Polygon",
        "west.tif": "Polygon",
        "world.tif": "Polygon",
    }
    assert frame.geometry.is_valid.all()

    def images(*bbox: float) -> set[str]:
        args = ("--archive", url, "-o", out, "--overwrite", "--bbox", *bbox, "--json")
        result = run("restore", *args)
        assert result.code == 0, result.err
        return {file["image"] for file in result.json["files"]}

    for box in ((179.95, -17.08, -179.95, -17.02), (179.95, -17.08, 180.05, -17.02)):
        assert images(*box) == {"across.tif", "east.tif", "west.tif", "world.tif"}
    assert images(-179.95, -17.08, -179.91, -17.02) == {"across.tif", "east.tif", "world.tif"}
    names = [a for n in ("across.tif", "east.tif", "west.tif") for a in ("--image", n)]
    mosaic = ("restore", "--archive", url, "-o", out, "--mosaic", "--overwrite", "--json")
    box = ("--bbox", 179.85, -17.08, -179.85, -17.02)
    for more in ((), box):
        result = run(*mosaic, *names, *more)
        assert result.code == 0, result.err
        with rasterio.open(out / "mosaic.tif") as dataset:
            assert dataset.crs.to_epsg() in (32760, 32701)
            assert dataset.width < 5 * WIDTH
            assert (dataset.dataset_mask() > 0).mean() > 0.9
    for more, west, east in (((), 179.8, 180.2), (box, 179.85, 180.15)):
        result = run(*mosaic, *names, "--crs", "EPSG:4326", *more)
        assert result.code == 0, result.err
        with rasterio.open(out / "mosaic.tif") as dataset:
            assert dataset.bounds[::2] == pytest.approx((west, east), abs=2e-3)
            assert (dataset.dataset_mask() > 0).all()
            values = dataset.read(1)
            lon = dataset.xy(0, np.arange(dataset.width))[0]
        # whichever raster a pixel is from
        assert np.abs(values - shade(np.asarray(lon))).max() <= 2
    # a raster of the whole world fills both sides
    result = run(*mosaic, "--image", "world.tif", "--crs", "EPSG:4326", "--bbox", 170, -20, -170, 0)
    assert result.code == 0, result.err
    with rasterio.open(out / "mosaic.tif") as dataset:
        assert dataset.bounds[::2] == pytest.approx((170, 190), abs=4)
        assert (dataset.dataset_mask() > 0).all()


def test_ground_elevation_is_a_number(run: Run, fiji: Path, tmp_path: Path) -> None:
    for value in ("nan", "inf", "-inf"):
        args = ("ingest", fiji, "--archive", tmp_path / "a.zarr", "--ground-elevation", value)
        result = run(*args)
        assert result.code == 2
        assert "--ground-elevation must be a number" in result.err
