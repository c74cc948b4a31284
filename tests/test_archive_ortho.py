"""Orthomosaics of many makes through an archive and back: only photographs are lossy."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner
from conftest import ORTHO, Run

from archive_pipeline.commands.cli import main
from archive_pipeline.geo.mapping import window_transform
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.index import read_index

pytestmark = pytest.mark.skipif(not ORTHO.is_dir(), reason=f"the orthomosaics are not at {ORTHO}")

NAMES = sorted(p.name for p in ORTHO.glob("*.tif")) if ORTHO.is_dir() else []


@pytest.fixture(scope="module")
def orthos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of all orthomosaics."""
    url = tmp_path_factory.mktemp("orthos") / "a.zarr"
    args = ["ingest", str(ORTHO), "--archive", str(url), "--ratio", "24", "--json"]
    result = CliRunner().invoke(main, [*args, "--workers", "0"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ingested"] == len(NAMES)
    return url


@pytest.fixture(scope="module")
def restored(orthos: Path) -> dict[str, Path]:
    """Whole restored files by image id."""
    out = orthos.parent / "out"
    args = ["restore", "--archive", str(orthos), "-o", str(out), "--workers", "0", "--json"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    return {f["image"]: Path(f["path"]) for f in json.loads(result.stdout)["files"]}


def test_archive_is_whole(run: Run, orthos: Path) -> None:
    result = run("check", "--archive", orthos, "--json")
    assert result.code == 0, result.err
    assert result.json["images"] == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_whole(orthos: Path, restored: dict[str, Path], name: str) -> None:
    archive = Archive.open(orthos)
    (entry,) = [e for e in archive.images() if e.id == name]
    with rasterio.open(ORTHO / name) as source, rasterio.open(restored[name]) as back:
        assert back.crs == source.crs
        assert back.transform == source.transform
        assert back.gcps == source.gcps
        assert back.shape == source.shape
        assert back.nodata == source.nodata
        assert back.colorinterp == source.colorinterp
        assert np.array_equal(back.dataset_mask(), source.dataset_mask())
        assert {f.name for f in back.mask_flag_enums[0]} == {
            f.name for f in source.mask_flag_enums[0]
        }
        if entry.record["codec"] == "lossless":
            assert back.dtypes == source.dtypes
            assert np.array_equal(back.read(), source.read(), equal_nan=True)
        else:
            shown = source.dataset_mask() != 0
            before, after = (d.read([1, 2, 3]).astype(float)[:, shown] for d in (source, back))
            assert 10 * np.log10(255**2 / np.mean((before - after) ** 2)) > 15
            raw = source.width * source.height * 3
            assert entry.record["archive_bytes"] <= raw / 24


def test_windows_equal_the_whole(run: Run, orthos: Path, restored: dict[str, Path]) -> None:
    archive = Archive.open(orthos)
    entries = [e for e in archive.images() if e.record["georef"]["transform"]]
    rng = random.Random(0)
    whole = {}
    for _ in range(20):
        entry = rng.choice(entries)
        width, height = entry.record["width"], entry.record["height"]
        left, right = sorted(rng.sample(range(width + 1), 2))
        top, bottom = sorted(rng.sample(range(height + 1), 2))
        image = ArchivedImage(archive, entry)
        if entry.id not in whole:
            whole[entry.id] = (
                image.read((0, 0, width, height)),
                image.read_mask((0, 0, width, height)),
            )
        window = (left, top, right - left, bottom - top)
        pixels, mask = whole[entry.id]
        assert np.array_equal(image.read(window), pixels[top:bottom, left:right])
        if mask is not None:
            assert np.array_equal(image.read_mask(window), mask[top:bottom, left:right])
    for entry in entries[:4]:
        ring = np.array(entry.record["georef"]["footprint"][:4])
        (west, south), (east, north) = (f * ring.min(0) + (1 - f) * ring.max(0) for f in (0.7, 0.4))
        out = orthos.parent / "windows"
        box = ("--bbox", west, south, east, north, "--image", entry.id)
        result = run("restore", "--archive", orthos, *box, "-o", out, "--json")
        assert result.code == 0, result.err
        (file,) = result.json["files"]
        col, row, width, height = file["window"]
        georef = ArchivedImage(archive, entry).source.georef
        with rasterio.open(file["path"]) as part, rasterio.open(restored[entry.id]) as full:
            expected = window_transform(georef, (col, row, width, height)).transform
            assert tuple(part.transform)[:6] == pytest.approx(expected, rel=1e-12)
            area = rasterio.windows.Window(col, row, width, height)
            assert np.array_equal(part.read(), full.read(window=area))
            assert np.array_equal(part.dataset_mask(), full.dataset_mask(window=area))


def test_the_archive_holds_what_restore_gives(orthos: Path, restored: dict[str, Path]) -> None:
    import zarr

    archive = Archive.open(orthos)
    for entry in archive.images():
        pixels = np.asarray(zarr.open_array(orthos / entry.key / "pixels", mode="r")[:])
        with rasterio.open(restored[entry.id]) as back:
            bands = np.moveaxis(back.read(list(range(1, pixels.shape[2] + 1))), 0, -1)
            # pixels that would look like nodata, or that are, are written so that they do not
            sure = back.dataset_mask() != 0
            if back.nodata is not None and entry.record["codec"] == "pcdc":
                sure &= (pixels != back.nodata).all(2)
        assert np.array_equal(bands[sure], pixels[sure], equal_nan=pixels.dtype.kind == "f")


def test_index_opens_in_geopandas_and_duckdb(orthos: Path) -> None:
    geopandas = pytest.importorskip("geopandas")
    path = orthos / "items.parquet"
    frame = geopandas.read_parquet(path)
    assert len(frame) == len(NAMES)
    assert frame.crs == "EPSG:4326"
    keys = {e.key: e.record["sha256"] for e in Archive.open(orthos).images()}
    assert read_index(Archive.open(orthos)) == keys
    west, south, east, north = frame.geometry.iloc[0].bounds
    assert len(geopandas.read_parquet(path, bbox=(west, south, east, north))) >= 1
    duckdb = pytest.importorskip("duckdb")
    ((count,),) = duckdb.sql(
        f"select count(*) from '{path}' where \"archive:codec\" = 'pcdc'"
    ).fetchall()
    assert count == sum(e.record["codec"] == "pcdc" for e in Archive.open(orthos).images())
