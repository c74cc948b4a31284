"""Map tiles of `archive serve`: their place, their pixels, what they are made of."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from conftest import Run
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image
from rasterio.enums import Resampling
from rasterio.transform import from_bounds
from rasterio.warp import reproject
from test_serve import client_of

from archive_pipeline.serving._rendering import enough

HALF = math.pi * 6378137.0


@pytest.fixture(scope="module")
def client(archive: Path) -> Iterator[TestClient]:
    with client_of(archive) as client:
        yield client


def tile_at(lon: float, lat: float, zoom: int) -> tuple[int, int]:
    """Column and row of the tile that holds a place."""
    turned = math.asinh(math.tan(math.radians(lat))) / math.pi
    return int((lon + 180) / 360 * 2**zoom), int((1 - turned) / 2 * 2**zoom)


def tile_transform(zoom: int, x: int, y: int, size: int) -> rasterio.Affine:
    side = 2 * HALF / 2**zoom
    west, north = x * side - HALF, HALF - y * side
    return from_bounds(west, north - side, west + side, north, size, size)


def pixels_of(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)))


def middle(client: TestClient, image: str) -> tuple[float, float]:
    west, south, east, north = client.get(f"/flights/beach/images/{image}").json()["bbox"]
    return (west + east) / 2, (south + north) / 2


def warped(path: Path, zoom: int, x: int, y: int, size: int) -> NDArray[np.uint8]:
    """What GDAL makes of a tile: RGB and alpha."""
    result = np.zeros((4, size, size), np.uint8)
    with rasterio.open(path) as file:
        bands = [*file.read(), file.dataset_mask()]
        for band, target in zip(bands, result, strict=True):
            reproject(
                band,
                target,
                src_transform=file.transform,
                src_crs=file.crs,
                dst_transform=tile_transform(zoom, x, y, size),
                dst_crs="EPSG:3857",
                resampling=Resampling.cubic,
            )
    return np.moveaxis(result, 0, 2)


def error_at(made: NDArray[np.uint8], true: NDArray[np.uint8], down: int, right: int) -> float:
    """Mean difference of levels where one lies over the other, moved by some pixels."""
    moved = np.roll(true, (down, right), (0, 1))[8:-8, 8:-8].astype(int)
    both = (made[8:-8, 8:-8, 3] == 255) & (moved[..., 3] == 255)
    assert both.sum() > 5000
    return float(np.abs(made[8:-8, 8:-8, :3] - moved[..., :3])[both].mean())


@pytest.mark.parametrize("size", [256, 512])
def test_a_tile_lies_where_gdal_has_it(
    client: TestClient, archive: Path, run: Run, tmp_path: Path, size: int
) -> None:
    done = run("restore", "--archive", archive, "-o", tmp_path, "--image", "DJI_0002.JPG")
    assert done.code == 0
    told = client.get("/flights/beach/images/DJI_0002.JPG/tilejson.json").json()
    zoom = told["maxzoom"] - (size == 512)
    x, y = tile_at(*middle(client, "DJI_0002.JPG"), zoom)
    path = f"/flights/beach/images/DJI_0002.JPG/tiles/{zoom}/{x}/{y}.png?size={size}"
    made = pixels_of(client.get(path).content)
    assert made.shape in ((size, size, 3), (size, size, 4))
    if made.shape[2] == 3:
        made = np.dstack([made, np.full((size, size), 255, np.uint8)])
    true = warped(next(tmp_path.rglob("DJI_0002*.tif")), zoom, x, y, size)
    assert np.mean((made[..., 3] > 0) != (true[..., 3] > 0)) < 0.02
    errors = {
        (down, right): error_at(made, true, down, right)
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
    }
    assert min(errors, key=lambda place: errors[place]) == (0, 0)
    assert errors[0, 0] < 2


def test_tiles_of_all_images_and_of_a_flight_are_the_same(client: TestClient) -> None:
    x, y = tile_at(*middle(client, "DJI_0001.JPG"), 20)
    flight = client.get(f"/flights/beach/tiles/20/{x}/{y}.webp")
    assert flight.content == client.get(f"/tiles/20/{x}/{y}.webp").content
    assert flight.headers["content-type"] == "image/webp"
    assert len(np.unique(pixels_of(flight.content))) > 50


def test_where_nothing_is(client: TestClient) -> None:
    empty = client.get("/tiles/3/0/0.png")
    assert not pixels_of(empty.content)[..., 3].any()
    assert (pixels_of(client.get("/tiles/3/0/0.jpg").content) == 255).all()


def test_a_browser_asks_again_and_is_told_that_nothing_changed(client: TestClient) -> None:
    x, y = tile_at(*middle(client, "DJI_0001.JPG"), 19)
    first = client.get(f"/tiles/19/{x}/{y}.jpg")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get(f"/tiles/19/{x}/{y}.jpg", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/tiles/25/0/0.png",
        "/tiles/-1/0/0.png",
        "/tiles/2/4/0.png",
        "/tiles/2/0/99999999999999999999.png",
        "/tiles/2/nan/0.png",
        "/tiles/2/0/0.gif",
        "/tiles/2/0/0.png?size=300",
        "/tiles/2/0/0.png?size=1000000000",
        "/footprints?bbox=1,2,3",
        "/footprints?bbox=nan,1,2,3",
        "/footprints?bbox=1,5,2,4",
        "/footprints?limit=1000000",
    ],
)
def test_what_is_no_tile_is_told_in_one_line(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 422
    assert len(answer.json()["detail"].splitlines()) == 1


def test_from_afar_frames_that_add_nothing_are_left_out() -> None:
    line = np.array([shapely.box(n, 0, n + 4, 3) for n in range(9)], dtype=object)
    needed = enough(line)
    assert needed.sum() < 6
    assert shapely.union_all(line[needed]).area > 0.97 * shapely.union_all(line).area
    apart = np.array([shapely.box(5 * n, 0, 5 * n + 4, 3) for n in range(9)], dtype=object)
    assert enough(apart).all()
    bow = shapely.Polygon([(0, 0), (9, 9), (9, 0), (0, 9)])  # of a forged record
    assert enough(np.array([bow, *line], dtype=object)).any()


def test_footprints(client: TestClient) -> None:
    found = client.get("/footprints").json()
    assert found["clustered"] is False
    assert [f["properties"]["id"] for f in found["features"]] == [
        f"DJI_000{n}.JPG" for n in (1, 2, 3)
    ]
    listed = client.get("/images").json()["images"]
    assert [f["geometry"] for f in found["features"]] == [i["footprint"] for i in listed]
    assert client.get("/footprints?bbox=0,0,1,1").json()["features"] == []
    few = client.get("/footprints?limit=2").json()
    assert few["clustered"] is True
    assert len(few["features"]) <= 2
    assert sum(f["properties"]["count"] for f in few["features"]) == 3
