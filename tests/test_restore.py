"""Restore: windows equal the whole, other Zarr readers see the same, tags come back, odd boxes."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import FRAMES, HEIGHT, WIDTH, Run
from PIL import Image
from rasterio.windows import Window

from archive_pipeline.geo.georef import Georef
from archive_pipeline.geo.mapping import window_transform
from archive_pipeline.stages import STAGES
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage

READ_ELSEWHERE = """
import json, sys
import numpy as np, xarray, zarr
group, out = sys.argv[1:]
pixels = zarr.open(group, mode="r")["pixels"][:]
lazy = xarray.open_zarr(group, consolidated=False)["pixels"]
assert lazy.dims == ("y", "x", "band"), lazy.dims
part = np.asarray(lazy[100:200, 500:700])
assert (part == pixels[100:200, 500:700]).all()
assert "archive_pipeline.store.archive" not in sys.modules
np.save(out, pixels)
"""


@pytest.fixture(scope="module")
def whole(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Pixels of every image, restored whole, by id."""
    opened = Archive.open(archive)
    return {
        e.id: ArchivedImage(opened, e).read((0, 0, e.record["width"], e.record["height"]))
        for e in opened.images()
    }


def test_windows_equal_the_whole(archive: Path, whole: dict[str, np.ndarray]) -> None:
    opened = Archive.open(archive)
    entries = list(opened.images())
    rng = random.Random(0)
    for _ in range(40):
        entry = rng.choice(entries)
        left, right = sorted(rng.sample(range(WIDTH + 1), 2))
        top, bottom = sorted(rng.sample(range(HEIGHT + 1), 2))
        pixels = ArchivedImage(opened, entry).read((left, top, right - left, bottom - top))
        assert np.array_equal(pixels, whole[entry.id][top:bottom, left:right])


def test_a_box_comes_back_with_its_window(
    run: Run, archive: Path, whole: dict[str, np.ndarray], tmp_path: Path
) -> None:
    entry = next(Archive.open(archive).images())
    ring = np.array(entry.record["georef"]["footprint"][:4])
    west, south = 0.6 * ring.min(0) + 0.4 * ring.max(0)
    east, north = 0.4 * ring.min(0) + 0.6 * ring.max(0)
    args = ("--archive", archive, "--bbox", west, south, east, north, "-o", tmp_path, "--json")
    result = run("restore", *args, "--image", entry.id)
    assert result.code == 0, result.err
    (file,) = result.json["files"]
    col, row, width, height = file["window"]
    expected = window_transform(Georef.from_json(entry.record["georef"]), (col, row, width, height))
    with rasterio.open(file["path"]) as dataset:
        assert dataset.crs.to_string() == file["crs"] == entry.record["georef"]["crs"]
        assert tuple(dataset.transform)[:6] == pytest.approx(expected.transform, rel=1e-12)
        assert tuple(file["transform"]) == expected.transform
        pixels = np.moveaxis(dataset.read([1, 2, 3]), 0, -1)
    assert np.array_equal(pixels, whole[entry.id][row : row + height, col : col + width])
    assert run("restore", *args, "--bbox", 10, 10, 11, 11).json["files"] == []


@pytest.mark.parametrize(
    ("box", "crs"),
    [
        ((1, 2, 1, 3), "EPSG:4326"),
        ((1, 3, 2, 1), "EPSG:4326"),
        ((2, 1, 1, 3), "EPSG:32615"),
        ((float("nan"), 1, 2, 3), "EPSG:4326"),
        ((0, 0, float("inf"), 1), "EPSG:32615"),
        ((0, 0, 1, 1), "EPSG:0"),
        ((0, 0, 1, 1), "nonsense"),
    ],
)
def test_boxes_that_are_none(run: Run, archive: Path, tmp_path: Path, box: tuple, crs: str) -> None:
    result = run("restore", "--archive", archive, "--bbox", *box, "--bbox-crs", crs, "-o", tmp_path)
    assert result.code == 2
    assert len(result.err.strip().splitlines()[-1]) < 300
    assert not list(tmp_path.iterdir())


def test_other_readers_see_the_same(
    archive: Path, whole: dict[str, np.ndarray], tmp_path: Path
) -> None:
    pytest.importorskip("xarray")
    entry = next(Archive.open(archive).images())
    saved = tmp_path / "pixels.npy"
    subprocess.run(
        [sys.executable, "-c", READ_ELSEWHERE, str(archive / entry.key), str(saved)],
        check=True,
        cwd=tmp_path,
        timeout=300,
    )
    np.testing.assert_array_equal(np.load(saved), whole[entry.id])


def test_formats(run: Run, archive: Path, whole: dict[str, np.ndarray], tmp_path: Path) -> None:
    for form, suffix in (("gtiff", ".tif"), ("png", ".png"), ("jpeg", ".JPG")):
        result = run(
            "restore", "--archive", archive, "--format", form, "-o", tmp_path, "--workers", 0,
            "--json",
        )  # fmt: skip
        assert result.code == 0, result.err
        assert len(result.json["files"]) == FRAMES
        for file in result.json["files"]:
            assert file["path"].endswith(suffix)
            with Image.open(file["path"]) as image:
                pixels = np.asarray(image.convert("RGB")).astype(int)
            difference = np.abs(pixels - whole[file["image"]])
            assert difference.max() == 0 if form != "jpeg" else difference.mean() < 3


@pytest.mark.parametrize("workers", [0, 1])
def test_restore_says_where_the_time_went(
    run: Run, archive: Path, workers: int, tmp_path: Path
) -> None:
    result = run("restore", "--archive", archive, "--workers", workers, "-o", tmp_path, "--json")
    stages = result.json["stages"]
    assert {"decode", "entropy", "write"} <= stages.keys() <= {*STAGES}
    assert min(stages.values()) > 0
    assert sum(stages.values()) < result.json["seconds"] + 0.01  # one at a time here


def test_mosaic(run: Run, archive: Path, tmp_path: Path) -> None:
    result = run("restore", "--archive", archive, "--mosaic", "-o", tmp_path, "--json")
    assert result.code == 0, result.err
    (file,) = result.json["files"]
    assert len(file["image"]) == FRAMES
    with rasterio.open(file["path"]) as dataset:
        assert dataset.transform.b == dataset.transform.d == 0
        assert (dataset.width, dataset.height) == tuple(file["window"][2:])


def test_names_that_are_not_there(run: Run, archive: Path, tmp_path: Path) -> None:
    for args in (("--image", "DJI_9999.JPG"), ("--flight", "none")):
        result = run("restore", "--archive", archive, *args, "-o", tmp_path)
        assert result.code == 1
        assert args[1] in result.err
        assert len(result.err.splitlines()) == 1


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
def test_every_exif_and_xmp_tag_comes_back(
    run: Run, flight: Path, archive: Path, tmp_path: Path
) -> None:
    def tags(folder: Path) -> dict[str, dict[str, object]]:
        out = subprocess.check_output(
            ["exiftool", "-j", "-G1", "-a", "-u", "-n", "-struct", "-EXIF:all", "-XMP:all",
             "-ICC_Profile:all", *sorted(str(p) for p in folder.glob("*.JPG"))],
        )  # fmt: skip
        # the preview is made anew from the pixels; where it lies and how long it is may change
        return {
            Path(f.pop("SourceFile")).name: {
                k: v for k, v in f.items() if not k.startswith("IFD1:Thumbnail")
            }
            for f in json.loads(out)
        }

    result = run(
        "restore", "--archive", archive, "--format", "jpeg", "-o", tmp_path, "--workers", 0
    )
    assert result.code == 0, result.err
    before, after = tags(flight), tags(tmp_path / flight.name)
    assert len(before) == FRAMES
    assert all(any(k.startswith("XMP-drone-dji:") for k in f) for f in before.values())
    assert after == before


def test_windows_read_by_gdal_too(run: Run, archive: Path, tmp_path: Path) -> None:
    result = run("restore", "--archive", archive, "--workers", 0, "-o", tmp_path, "--json")
    for file in result.json["files"]:
        with rasterio.open(file["path"]) as dataset:
            assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert dataset.read(1, window=Window(600, 0, 20, 20)).shape == (20, 20)
