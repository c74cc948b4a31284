"""Images as xarray, rioxarray and rio-tiler have them, and the example that uses them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import HEIGHT, ROOT, WIDTH, Run
from rasterio.transform import from_origin

import archive_pipeline as ap
from archive_pipeline.store.archived_image import ArchivedImage

xarray = pytest.importorskip("xarray")
rioxarray = pytest.importorskip("rioxarray")
SIDE, STEP = 700, 0.5  # pixels and metres: four tiles


@pytest.fixture(scope="module")
def north_up(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An archive of one lossless raster whose rows run along its CRS' axes, and its pixels."""
    from click.testing import CliRunner

    from archive_pipeline.commands.cli import main

    folder = tmp_path_factory.mktemp("north") / "flight"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 60_000, (2, SIDE, SIDE)).astype("uint16")
    with rasterio.open(
        folder / "a.tif", "w", driver="GTiff", width=SIDE, height=SIDE, count=2, dtype="uint16",
        crs="EPSG:32615", transform=from_origin(500_000, 3_200_000, STEP, STEP),
    ) as file:  # fmt: skip
        file.write(pixels)
    url = folder.parent / "a.zarr"
    done = CliRunner().invoke(
        main, ["ingest", str(folder), "--archive", str(url), "--workers", "0", "-q"]
    )
    assert done.exit_code == 0, done.output
    return url, pixels


def test_rioxarray_finds_the_place_of_what_zarr_opens(archive: Path, north_up: Any) -> None:
    for url in (archive, north_up[0]):
        for image in ap.open(url).images:
            group = f"flights/{image.flight}/{image.id}"
            opened = xarray.open_zarr(url, group=group, consolidated=False)
            for one in (opened, opened["pixels"]):
                assert one.rio.crs.to_string() == image.crs
            assert tuple(opened["pixels"].rio.transform())[:6] == image.transform


def test_a_lazy_image_is_bands_first_and_placed(archive: Path) -> None:
    image = ap.open(archive).images[0]
    lazy = image.to_xarray()
    assert (lazy.dims, lazy.shape) == (("band", "y", "x"), (3, HEIGHT, WIDTH))
    assert lazy.rio.crs.to_string() == image.crs
    assert tuple(lazy.rio.transform())[:6] == pytest.approx(image.transform)
    assert "x" not in lazy.coords  # its rows run askew
    values = np.moveaxis(image.read().values, 2, 0)
    for key in (
        np.s_[0],
        np.s_[:, 5:40, 300:],
        np.s_[2, ::-3, 10:50:7],
        np.s_[::2, -1, -5],
        np.s_[:, 10:10],
    ):
        np.testing.assert_array_equal(lazy[key].values, values[key])
    np.testing.assert_array_equal(lazy[:, [5, 1], 3].values, values[:, [5, 1], 3])


def test_only_what_is_looked_at_is_read(
    north_up: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, pixels = north_up
    windows, read = [], ArchivedImage.read

    def note(self: ArchivedImage, window: Any) -> Any:
        windows.append(window)
        return read(self, window)

    monkeypatch.setattr(ArchivedImage, "read", note)
    lazy = ap.open(url).images[0].to_xarray()
    part = lazy.sel(x=slice(500_010, 500_020), y=slice(3_199_990, 3_199_985)).isel(band=1)
    assert windows == []
    np.testing.assert_array_equal(part.values, pixels[1, 20:30, 20:40])
    assert windows == [(20, 20, 20, 10)]


def test_rio_tiler_reads_it(north_up: tuple[Path, Any]) -> None:
    reader = pytest.importorskip("rio_tiler.io")
    url, pixels = north_up
    with reader.XarrayReader(ap.open(url).images[0].to_xarray()) as opened:
        assert opened.bounds == (500_000, 3_200_000 - SIDE * STEP, 500_000 + SIDE * STEP, 3_200_000)
        box = (500_010, 3_199_990, 500_020, 3_199_995)
        part = opened.part(box, bounds_crs="EPSG:32615", dst_crs="EPSG:32615")
        np.testing.assert_array_equal(part.data, pixels[:, 10:20, 20:40])
        west, south, east, north = opened.get_geographic_bounds("EPSG:4326")
        place = opened.tms.tile((west + east) / 2, (south + north) / 2, 19)
        assert opened.tile(place.x, place.y, place.z).data.shape == (2, 256, 256)


def test_the_example_makes_a_page(archive: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("folium")
    page = tmp_path / "map.html"
    example = ROOT / "examples" / "archive_map.py"
    command = [sys.executable, str(example), str(archive), str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "green" in done.stdout
    text = page.read_text()
    for image in ap.open(archive).images:
        assert image.id in text
    assert "data:image/png;base64" in text
