"""The Python interface: its examples, what it gives of an archive, and how light it is."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
import rasterio
from conftest import HEIGHT, WIDTH, Run

import archive_pipeline as ap
from archive_pipeline import api
from archive_pipeline.commands.cli import main
from archive_pipeline.errors import UsageError

COMMANDS = ("ingest", "restore", "check", "info", "verify_detection", "remove")
# loaded only where something of them is used
HEAVY = {
    "torch", "zarr", "rasterio", "boto3", "pyproj", "PIL", "dask", "distributed", "fsspec",
    "geopandas", "pyarrow", "shapely", "cv2", "diffusers", "numpy", "xarray", "tqdm",
}  # fmt: skip
# the same once an archive is open and its images are listed
LATER = {"torch", "rasterio", "boto3", "pyproj", "PIL", "dask", "distributed", "cv2", "diffusers"}


def test_examples_of_the_functions_run(
    flight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(flight, tmp_path / "beach")
    monkeypatch.chdir(tmp_path)
    found = {test.name.rpartition(".")[2]: test for test in doctest.DocTestFinder().find(api)}
    order = ["api", "ingest", "open", "restore", "check", "info", "verify_detection", "remove"]
    assert {name for name, test in found.items() if test.examples} == set(order)
    if importlib.util.find_spec("ultralytics") is None:
        order.remove("verify_detection")
    else:
        from toy_detector import save_toy_detector

        save_toy_detector(tmp_path / "detector.torchscript")
    said: list[str] = []
    for name in order:
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found[name], out=said.append)
    assert not said, "".join(said)


def test_functions_take_what_commands_take() -> None:
    """Every option of a command is an argument of its function, with the same default."""
    for name in COMMANDS:
        function = inspect.signature(getattr(ap, name)).parameters
        command = main.commands[name.replace("_", "-")]
        shown = {"as_json", "quiet", "verbose", "all_images", "strict"}  # what a terminal sees
        for option in command.params:
            if option.name in shown:
                continue
            long = max(option.opts, key=len).lstrip("-").replace("-", "_")
            assert long in function, (name, long)
            default = function[long].default
            if isinstance(option, click.Option) and not option.multiple:
                given = option.get_default(click.Context(command))
                given = given if isinstance(given, str | int | float) else None
                assert default == given, (name, long)
        told = {"progress", "part", "stage", "drawn"}
        options = {max(o.opts, key=len).lstrip("-").replace("-", "_") for o in command.params}
        assert set(function) - told <= options, name


def test_an_image_is_what_restore_writes(archive: Path, run: Run, tmp_path: Path) -> None:
    opened = ap.open(archive)
    image = opened["DJI_0002.JPG"]
    assert (image.width, image.height, image.lossless) == (WIDTH, HEIGHT, False)
    assert image is opened[image.name]
    with pytest.raises(KeyError, match="is not there"):
        opened["DJI_0009.JPG"]
    west, south = np.min(image.footprint, 0)
    east, north = np.max(image.footprint, 0)
    box = (west, south, (west + east) / 2, (south + north) / 2)
    assert image in opened.find(box)
    pixels = image.window(box)
    args = ("--archive", archive, "--image", image.id, "--bbox", *box, "-o", tmp_path, "--json")
    [file] = run("restore", *args).json["files"]
    with rasterio.open(file["path"]) as written:
        np.testing.assert_array_equal(np.moveaxis(written.read(), 0, 2), pixels)
        assert written.transform.almost_equals(rasterio.Affine(*pixels.transform))
        assert written.crs == rasterio.crs.CRS.from_user_input(pixels.crs)
    with pytest.raises(ap.ArchivePipelineError, match="shows nothing of"):
        image.window((0, 0, 1, 1))
    with pytest.raises(ValueError, match="is not inside"):
        image.read((0, 0, WIDTH + 1, HEIGHT))
    array = pixels.to_xarray()
    assert array.shape == (3, *pixels.shape[:2])
    assert array.spatial_ref.attrs["crs_wkt"].startswith("PROJCRS")
    assert len(array.spatial_ref.attrs["GeoTransform"].split()) == 6


def test_a_window_is_what_a_mosaic_has(archive: Path, run: Run, tmp_path: Path) -> None:
    opened = ap.open(archive)
    ring = np.array([image.footprint for image in opened.images])
    (west, south), (east, north) = ring.min((0, 1)), ring.max((0, 1))
    box = (west, south, (west + east) / 2, (south + north) / 2)
    pixels = opened.window(box)
    args = ("--archive", archive, "--mosaic", "--bbox", *box, "-o", tmp_path, "--json")
    [file] = run("restore", *args).json["files"]
    with rasterio.open(file["path"]) as written:
        np.testing.assert_array_equal(np.moveaxis(written.read(), 0, 2), pixels.values)
        assert pixels.mask is not None
        np.testing.assert_array_equal(written.dataset_mask() > 0, pixels.mask)
        assert tuple(written.transform)[:6] == pytest.approx(pixels.transform)
    array = pixels.to_xarray()
    a, _, c, _, e, f = pixels.transform
    assert array.x[0] == pytest.approx(c + a / 2)
    assert array.y[0] == pytest.approx(f + e / 2)
    assert array.mask.shape == array.shape[1:]
    with pytest.raises(ap.ArchivePipelineError):
        opened.window((0, 0, 1, 1))


def test_one_error_to_catch(tmp_path: Path) -> None:
    for call in (ap.open, ap.info, ap.check, ap.restore):
        with pytest.raises(ap.ArchivePipelineError, match="no archive there"):
            call(tmp_path / "none.zarr")
    with pytest.raises(ap.ArchivePipelineError, match="no such directory"):
        ap.ingest(tmp_path / "none", tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="exclude each other"):
        ap.ingest(tmp_path, tmp_path / "a.zarr", ratio=10, bpp=1)
    assert not (tmp_path / "a.zarr").exists()


def test_arguments_that_are_of_no_use(archive: Path, flight: Path, tmp_path: Path) -> None:
    opened = ap.open(archive)
    image = opened.images[0]
    box = (1, 2, 3, 4)
    refused: list[tuple[Callable[..., object], tuple[object, ...], dict[str, object]]] = [
        (ap.ingest, (flight, tmp_path / "a.zarr"), options)
        for options in (
            {"ratio": "x"}, {"ratio": 1e-310}, {"ratio": True}, {"bpp": float("nan")},
            {"precision": "half"},
            {"source_ratio": -1}, {"device": "tpu"}, {"device": None}, {"adapt": 1.5},
            {"ground_elevation": float("nan")}, {"allocation": None}, {"detect": 7},
            {"workers": -1},
        )
    ]  # fmt: skip
    refused += [
        (ap.ingest, (place, tmp_path / "a.zarr"), {}) for place in ((), None, [None], [flight, 3])
    ]
    refused += [
        (call, (archive,), options)
        for call in (ap.open, ap.restore, ap.verify_detection)
        for options in (
            {"steps": -1}, {"steps": 1.5}, {"steps": "1"}, {"seed": -1}, {"device": "tpu"},
            {"precision": None},
        )
    ]  # fmt: skip
    refused += [
        (ap.restore, (archive,), options)
        for options in ({"image": None}, {"image": [3]}, {"format": "bmp"}, {"bbox": (1, 2, 3)})
    ]
    refused += [
        (ap.verify_detection, (archive,), options)
        for options in ({"tolerance": -1}, {"confidence": 2}, {"iou": 0}, {"slice": 1.5})
    ]
    refused += [(image.window, (b,), {}) for b in (None, (1, 2, 3), (3, 2, 1, 0), ("a",) * 4)]
    refused += [(opened.window, (b,), {}) for b in (None, (1, 2, 3))]
    refused += [(opened.find, (box, "EPSG:0"), {}), (image.read, ((0, 0, 1.5, 1),), {})]
    for call, args, options in refused:
        with pytest.raises(UsageError) as raised:
            call(*args, **options)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import archive_pipeline as ap; assert ap.open and ap.ingest", HEAVY),
        ("import archive_pipeline.commands.cli", HEAVY),
        ("import archive_pipeline as ap; ap.open({url!r}).images", LATER),
        ("import archive_pipeline as ap; ap.info({url!r})", LATER),
        (
            "import archive_pipeline as ap; ap.open({url!r}).images[0].read((0, 0, 9, 9))",
            {"archive_pipeline.pcdc.training", "dask", "distributed", "torchmetrics", "cv2"},
        ),
    ],
    ids=["import", "--help", "open", "info", "decode"],
)
def test_nothing_is_loaded_before_it_is_used(code: str, unwanted: set[str], archive: Path) -> None:
    code = code.format(url=str(archive))
    code = f"{code}\nimport sys; print(*sorted({unwanted!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
