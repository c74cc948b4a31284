"""Frames that look aside lie where a pinhole's rays meet the ground, within a pixel, in any GIS.

Their pixels hold their own columns and rows, so that each pixel of what is made of them tells which
pixel of the frame it shows; where it should is computed here from the pose alone.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import Run
from pyproj import Geod, Transformer
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT

WIDTH, HEIGHT, FOCAL = 480, 360, 400.0
LON, LAT, ABOVE, YAW = 8.5, 47.5, 60.0, 30.0
UTM = "EPSG:32632"
STEP = 32  # of the pixels' values: columns and rows survive interpolation
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    'xmlns:drone-dji="http://www.dji.com/drone-dji/1.0/" '
    'drone-dji:GpsLatitude="{lat}" drone-dji:GpsLongitude="{lon}" '
    'drone-dji:RelativeAltitude="{above}" drone-dji:GimbalYawDegree="{yaw}" '
    'drone-dji:GimbalPitchDegree="{pitch}" drone-dji:GimbalRollDegree="0.0" '
    'drone-dji:CalibratedFocalLength="{focal}"/></rdf:RDF></x:xmpmeta>'
)


@pytest.fixture(params=[-90, -70, -60, -45])
def frame(request: pytest.FixtureRequest, tmp_path: Path, run: Run) -> tuple[int, Path]:
    """A pitch, and an archive with one frame of it."""
    pitch = request.param
    cols, rows = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    pixels = np.stack([cols * STEP, rows * STEP]).astype("uint16")
    folder = tmp_path / "f"
    folder.mkdir()
    profile = {"width": WIDTH, "height": HEIGHT, "count": 2, "dtype": "uint16"}
    with rasterio.open(folder / "a.tif", "w", driver="GTiff", **profile) as out:
        text = XMP.format(lat=LAT, lon=LON, above=ABOVE, yaw=YAW, pitch=pitch, focal=FOCAL)
        # rasterio joins key and value by "="
        key, _, value = text.partition("=")
        out.update_tags(ns="xml:XMP", **{key: value})
        out.write(pixels)
    url = tmp_path / "a.zarr"
    result = run("ingest", folder, "--archive", url, "--workers", 0)
    assert result.code == 0, result.err
    return pitch, url


def seen(pitch: float, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows of a pinhole that see places of the UTM zone: collinearity."""
    lon, lat = Transformer.from_crs(UTM, "EPSG:4326", always_xy=True).transform(x, y)
    start = np.full_like(lon, LON), np.full_like(lat, LAT)
    azimuth, _, metres = Geod(ellps="WGS84").inv(*start, lon, lat)
    azimuth = np.radians(azimuth)
    place = np.stack([metres * np.sin(azimuth), metres * np.cos(azimuth), np.full_like(x, -ABOVE)])
    yaw, tilt = math.radians(YAW), math.radians(pitch)
    axis = np.array(
        [math.sin(yaw) * math.cos(tilt), math.cos(yaw) * math.cos(tilt), math.sin(tilt)]
    )
    right = np.array([math.cos(yaw), -math.sin(yaw), 0.0])
    down = np.cross(axis, right)
    depth = axis @ place
    return WIDTH / 2 + FOCAL * (right @ place) / depth, HEIGHT / 2 + FOCAL * (down @ place) / depth


def worst(pitch: float, pixels: np.ndarray, shown: np.ndarray, transform: rasterio.Affine) -> float:
    """Pixels of the frame that a north-up raster of it is away from the truth, at most."""
    row, col = np.nonzero(shown)
    x, y = transform.c + transform.a * (col + 0.5), transform.f + transform.e * (row + 0.5)
    true = seen(pitch, x, y)
    inside = (np.abs(true[0] - WIDTH / 2) < WIDTH / 2 - 1) & (
        np.abs(true[1] - HEIGHT / 2) < HEIGHT / 2 - 1
    )
    assert inside.sum() > 1000
    found = pixels[:, row, col] / STEP
    return float(np.hypot(found[0] - true[0], found[1] - true[1])[inside].max())


def restored(run: Run, url: Path, name: str, *args: object) -> Path:
    out = url.parent / name
    result = run("restore", "--archive", url, "-o", out, "--workers", *args, "--json")
    assert result.code == 0, result.err
    (file,) = result.json["files"]
    return Path(file["path"])


def box(run: Run, url: Path) -> tuple[float, ...]:
    """West, south, east, north of the middle of the frame's footprint."""
    (flight,) = run("info", "--archive", url, "--json").json["flights"]
    ring = np.array(flight["images"][0]["footprint"][:4])
    middle, reach = ring.mean(axis=0), np.ptp(ring, axis=0) / 6
    return (*(middle - reach), *(middle + reach))


@pytest.mark.parametrize("part", ["whole", "window"])
def test_ortho_is_within_a_pixel(frame: tuple[int, Path], run: Run, part: str) -> None:
    pitch, url = frame
    area = ("--bbox", *box(run, url)) if part == "window" else ()
    path = restored(run, url, part, 0, "--ortho", "--crs", UTM, *area)
    with rasterio.open(path) as made:
        shown = made.dataset_mask() != 0
        assert worst(pitch, made.read([1, 2]).astype(float), shown, made.transform) < 1.0
        if part == "whole":  # and all of the frame is there
            ground = shown.sum() * abs(made.transform.a * made.transform.e)
            assert ground == pytest.approx(true_area(pitch), rel=0.01)


def true_area(pitch: float) -> float:
    """Square metres of ground that the frame shows: the shoelace of where its corners' rays end."""
    tilt = math.radians(pitch)
    axis, right = np.array([0.0, math.cos(tilt), math.sin(tilt)]), np.array([1.0, 0.0, 0.0])
    down = np.cross(axis, right)
    ends = []
    for u, v in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
        ray = FOCAL * axis + u * WIDTH / 2 * right + v * HEIGHT / 2 * down
        ends.append(ray[:2] * ABOVE / -ray[2])
    x, y = np.array(ends).T
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)


@pytest.mark.parametrize("part", ["whole", "window"])
def test_gdal_warps_what_it_can_within_a_pixel(
    frame: tuple[int, Path], run: Run, part: str
) -> None:
    pitch, url = frame
    area = ("--bbox", *box(run, url)) if part == "window" else ()
    path = restored(run, url, part, 0, *area)
    with rasterio.open(path) as made:
        easy = pitch in (-90, -70) or (pitch, part) == (-60, "window")
        assert (not made.gcps[0]) == easy, "GDAL would take the control points"
        if not easy:
            return  # docs/files.md sends these to --ortho
        with WarpedVRT(made, crs=UTM, resampling=Resampling.bilinear) as warped:
            pixels = warped.read([1, 2]).astype(float)
            shown = pixels[0] > 0
            assert worst(pitch, pixels, shown, warped.transform) < 1.0
            if part == "whole":
                ground = shown.sum() * abs(warped.transform.a * warped.transform.e)
                assert ground == pytest.approx(true_area(pitch), rel=0.02)
