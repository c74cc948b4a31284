"""Verification: numbers against pycocotools, verdicts, what is missing or damaged, side effects."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import resource
import select
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import rasterio
import zarr
from conftest import HEIGHT, WIDTH, Run
from PIL import Image, ImageFilter
from test_cluster import dask_processes
from toy_detector import NAMES, Objects, paint, paint_frame, save_toy_detector, write_labels
from zarr.codecs import BloscCodec, Crc32cCodec

from archive_pipeline.detection.boxes import Detections
from archive_pipeline.detection.metrics import METRICS, Summary, intervals, match
from archive_pipeline.flight.locations import location
from archive_pipeline.jobs import ingested
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.layout import pack_metadata

if importlib.util.find_spec("ultralytics") is None:  # not imported: it would write settings
    pytest.skip("the extra 'verify' is not installed", allow_module_level=True)

# What is painted on the three frames of the shared flight, by their order.
OBJECTS: list[Objects] = [
    [("car", 40, 40, 60, 30), ("car", 300, 200, 30, 60), ("person", 600, 100, 24, 24)],
    [("car", 100, 240, 50, 40), ("car", 500, 60, 60, 30), ("person", 200, 40, 30, 30)],
    [("car", 620, 200, 60, 40), ("car", 60, 150, 40, 60), ("car", 350, 40, 60, 28)],
]
SOFT = ("--tolerance", 0.2)  # what a codec may change of the toy's numbers, without judging it


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_detector(tmp_path_factory.mktemp("toy") / "toy.torchscript")


@pytest.fixture(scope="module")
def painted(flight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flight with painted objects; not to be changed."""
    folder = tmp_path_factory.mktemp("painted") / "town"
    for frame, objects in zip(sorted(flight.iterdir()), OBJECTS, strict=True):
        paint_frame(frame, objects, folder / frame.name)
    return folder


@pytest.fixture(scope="module")
def town(painted: Path, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its archive, with the toy's detections; not to be changed."""
    from click.testing import CliRunner

    from archive_pipeline.commands.cli import main

    url = tmp_path_factory.mktemp("town") / "town.zarr"
    args = ("ingest", painted, "--archive", url, "--ratio", 8, "--workers", 0, "--detect", toy)
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return url


@pytest.fixture(scope="module")
def labels(painted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled") / "labels" / "town"
    for frame, objects in zip(sorted(painted.iterdir()), OBJECTS, strict=True):
        write_labels(folder / f"{frame.stem}.txt", objects, WIDTH, HEIGHT)
    (folder.parents[1] / "data.yaml").write_text(f"names: {json.dumps(list(NAMES.values()))}\n")
    return folder


@pytest.fixture
def verify(run: Run, toy: Path) -> Run:
    """Run verify-detection in this process: verify(archive, ...)."""

    def call(url: object, *args: object, model: object = toy) -> Any:
        models = ("--model", model) if model else ()
        return run("verify-detection", "--archive", url, *models, "--workers", 0, "--json", *args)

    return call


def random_case(seed: int) -> list[tuple[Detections, np.ndarray]]:
    """Images with detections that hit, miss and repeat reference objects."""
    random = np.random.default_rng(seed)
    images = []
    for _ in range(6):
        objects = random.integers(0, 12)
        corner = random.uniform(0, 500, (objects, 2))
        boxes = np.concatenate([corner, corner + random.uniform(10, 60, (objects, 2))], axis=1)
        near = boxes[random.random(objects) < 0.8]
        found = np.concatenate([near, near[: len(near) // 3], random.uniform(0, 500, (4, 4))])
        found += random.normal(0, 3, found.shape)
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 5)
        scores = random.permutation(9000)[: len(found)] / 1e4  # no two equal
        images.append((Detections.of(found, scores, np.zeros(len(found))), boxes))
    return images


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_that_of_pycocotools(
    seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = random_case(seed)
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1}], "info": {}}
    found = []
    for number, (detections, boxes) in enumerate(images, 1):
        truth["images"].append({"id": number, "width": 600, "height": 600})
        for x0, y0, x1, y1 in boxes.tolist():
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": 1, "iscrowd": 0, "category_id": 1}
            truth["annotations"].append(
                {**box, "id": len(truth["annotations"]) + 1, "image_id": number}
            )
        for (x0, y0, x1, y1), score in zip(detections.boxes, detections.scores, strict=True):
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": 1, "score": score}
            found.append({**box, "image_id": number})
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    judge = COCOeval(coco, coco.loadRes(found), "bbox")
    judge.params.maxDets = [1000] * 3
    judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
    judge.evaluate()
    judge.accumulate()
    expected = judge.eval["precision"][:, :, 0, 0, 0].mean(axis=1)
    summary = Summary([match(d, boxes, 0.5) for d, boxes in images], 0.25)
    ours = summary.metrics(np.ones(len(images)))
    assert ours["map50"] == pytest.approx(expected[0], abs=1e-9)
    assert ours["map50_95"] == pytest.approx(expected.mean(), abs=1e-9)


def test_weights_are_repetitions() -> None:
    matched = [match(d, boxes, 0.5) for d, boxes in random_case(7)]
    weights = np.array([2, 0, 1, 3, 0, 1.0])
    repeated = [m for m, w in zip(matched, weights, strict=True) for _ in range(int(w))]
    by_weight = Summary(matched, 0.3).metrics(weights)
    by_hand = Summary(repeated, 0.3).metrics(np.ones(len(repeated)))
    assert by_weight == pytest.approx(by_hand)


def test_numbers_of_nothing_are_undefined() -> None:
    nothing = match(Detections.of([], [], []), np.zeros((0, 4)), 0.5)
    for images in ([], [nothing]):
        summary = Summary(images, 0.25)
        assert all(math.isnan(v) for v in summary.metrics(np.ones(len(images))).values())
        assert set(intervals(summary, summary, resamples=5).values()) == {None}


def test_intervals_are_paired_and_repeatable() -> None:
    one = Summary([match(d, boxes, 0.5) for d, boxes in random_case(1)], 0.25)
    two = Summary([match(d, boxes, 0.5) for d, boxes in random_case(2)], 0.25)
    assert set(intervals(one, one).values()) == {(0.0, 0.0)}
    first = intervals(one, two)
    assert first == intervals(one, two)
    low, high = first["recall"] or (0, 0)
    assert low < high


def test_restored_images_pass(verify: Run, town: Path) -> None:
    result = verify(town, *SOFT)
    assert result.code == 0, result.err
    assert result.json["passed"] is True
    assert result.json["failed"] == []
    (model,) = result.json["models"]
    assert (model["model"], model["images"], model["reference"]) == (
        "toy.torchscript", 3, "originals",
    )  # fmt: skip
    assert model["objects"] == {"vehicle": 7, "person": 2}
    for numbers in (model["original"], model["restored"], model["delta"]):
        assert set(numbers) == {"vehicle", "person"}
        assert set(numbers["vehicle"]) == set(METRICS)
    assert model["original"]["vehicle"] | {"confidence": 1} == dict.fromkeys(METRICS, 1.0)
    assert model["delta"]["vehicle"]["ratio"] == 0
    for name in METRICS:
        low, high = model["interval"]["vehicle"][name]
        assert low <= high
    images = result.json["images"]
    megapixels = WIDTH * HEIGHT / 1e6
    assert [image["megapixels"] for image in images] == [pytest.approx(megapixels, abs=1e-3)] * 3
    spent = sum(image["seconds"] for image in images)
    assert 0 < spent < result.json["seconds"]
    rate = result.json["seconds_per_20_megapixels"]
    assert rate == pytest.approx(spent / (3 * megapixels) * 20, rel=0.01)
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 1e8 < images[0]["peak_memory"] <= images[2]["peak_memory"] <= now
    assert result.json["peak_memory"] == images[2]["peak_memory"]


def test_labels_are_the_reference(verify: Run, town: Path, labels: Path) -> None:
    result = verify(town, "--labels", labels, *SOFT)
    assert result.code == 0, result.err
    (model,) = result.json["models"]
    assert model["reference"] == "labels"
    assert model["objects"] == {"vehicle": 7, "person": 2}
    assert model["original"]["vehicle"]["recall"] == 1
    assert 0.9 < model["original"]["vehicle"]["iou"] <= 1


def test_identical_pixels_differ_by_exactly_nothing(verify: Run, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    form = {"driver": "GTiff", "width": 160, "height": 96, "count": 3, "dtype": "uint8"}
    for number in range(3):  # three bands that are no colours are stored losslessly
        pixels = np.random.default_rng(number).integers(60, 140, (96, 160, 3), np.uint8)
        painted = paint(pixels, [("car", 20 + 10 * number, 30, 40, 24)])
        with rasterio.open(folder / f"{number}.tif", "w", photometric="MINISBLACK", **form) as out:
            out.write(np.moveaxis(painted, 2, 0))
    url = tmp_path / "a.zarr"
    assert run("ingest", folder, "--archive", url, "--workers", 0).code == 0
    assert {entry.record["codec"] for entry in Archive.open(url).images()} == {"lossless"}
    result = verify(url, "--tolerance", 0)
    assert result.code == 0, result.err
    (model,) = result.json["models"]
    assert model["objects"]["vehicle"] == 3
    assert set(model["delta"]["vehicle"].values()) == {0.0}
    assert [0.0, 0.0] in model["interval"]["vehicle"].values()


@pytest.fixture
def sabotaged(run: Run, painted: Path, town: Path, tmp_path: Path) -> Path:
    """The archive with the pixels of two of its three images blurred."""
    frames = sorted(painted.iterdir())
    blurred = tmp_path / "blurred" / "town"
    blurred.mkdir(parents=True)
    for frame in frames[:2]:
        with Image.open(frame) as image:
            soft = image.filter(ImageFilter.GaussianBlur(25))
            soft.save(blurred / frame.name, exif=image.info["exif"], quality=95)
    other = tmp_path / "other.zarr"
    assert run("ingest", blurred, "--archive", other, "--ratio", 8, "--workers", 0).code == 0
    url = Path(shutil.copytree(town, tmp_path / "sabotaged.zarr"))
    for frame in frames[:2]:
        pixels = Path("flights", "town", frame.name, "pixels")
        shutil.rmtree(url / pixels)
        shutil.copytree(other / pixels, url / pixels)
    return url


def test_a_sabotaged_archive_fails_and_names_the_images(
    verify: Run, run: Run, toy: Path, sabotaged: Path, painted: Path
) -> None:
    result = verify(sabotaged, *SOFT)
    assert result.code == 4
    assert result.json["passed"] is False
    (model,) = result.json["models"]
    ratio = next(f for f in model["failures"] if (f["class"], f["metric"]) == ("vehicle", "ratio"))
    assert ratio["delta"] == pytest.approx(-4 / 7, abs=1e-6)
    bad = [f"town/{frame.name}" for frame in sorted(painted.iterdir())[:2]]
    assert sorted(ratio["images"][:2]) == bad
    args = ("verify-detection", "--archive", sabotaged, "--model", toy, "--workers", 0, *SOFT)
    printed = run(*args)
    assert printed.code == 4
    (line,) = [x for x in printed.out.splitlines() if "below tolerance" in x and "vehicle" in x]
    assert "toy.torchscript: vehicle: ratio -0.571" in line
    assert all(name in line for name in bad)


def test_missing_and_other_originals_are_counted(
    verify: Run, run: Run, painted: Path, toy: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(painted, tmp_path / "elsewhere" / "town"))
    url = tmp_path / "a.zarr"
    assert run("ingest", moved, "--archive", url, "--ratio", 8, "--workers", 0).code == 0
    first, second, third = sorted(moved.iterdir())
    shutil.copy(third, second)
    first.unlink()
    result = verify(url, *SOFT)
    assert result.code == 3
    assert result.json["passed"] is True
    assert result.json["models"][0]["images"] == 1
    errors = {f["image"]: f["error"] for f in result.json["failed"]}
    assert f"the original is not in {moved}" in errors[f"town/{first.name}"]
    assert "--originals" in errors[f"town/{first.name}"]
    assert "not the file that was archived" in errors[f"town/{second.name}"]
    assert result.err.count("Failed: ") == 2
    # elsewhere, below another folder with a file of the same name
    shutil.copytree(painted, tmp_path / "all" / "b")
    shutil.copytree(moved, tmp_path / "all" / "a")
    result = verify(url, "--originals", tmp_path / "all", *SOFT)
    assert (result.code, result.json["models"][0]["images"]) == (0, 3)
    shutil.rmtree(moved)
    result = verify(url, *SOFT)
    assert result.code == 1
    assert result.json["passed"] is False
    assert result.err.splitlines()[-1] == (
        "Error: nothing is proven: no image could be compared (3 were not)"
    )
    assert set(result.json["models"][0]["delta"]["vehicle"].values()) == {None}


def test_originals_at_a_url_and_of_an_archive_that_moved(
    verify: Run, run: Run, painted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = tmp_path / "a.zarr"
    monkeypatch.chdir(painted.parent)  # folders are noted so that any working directory will do
    ingest = ("ingest", painted.name, "--archive", url, "--ratio", 8, "--workers", 0)
    assert run(*ingest).code == 0
    monkeypatch.chdir(tmp_path)
    url = url.rename(tmp_path / "moved.zarr")
    assert verify(url, *SOFT).json["models"][0]["images"] == 3
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user's"))
    result = verify(url, *SOFT)
    assert result.code == 1
    assert f"was archived from {painted.name}/" in result.json["failed"][0]["error"]
    assert "name the folder: --originals" in result.json["failed"][0]["error"]
    fs = fsspec.filesystem("memory")
    fs.put(str(painted), "/originals/town", recursive=True)
    try:
        result = verify(url, "--originals", "memory://originals", *SOFT)
        assert (result.code, result.json["models"][0]["images"]) == (0, 3), result.err
    finally:
        fs.rm("/originals", recursive=True)
    result = verify(url, "--originals", "memory://nowhere")
    assert (result.code, len(result.err.splitlines())) == (1, 1)
    assert "memory://nowhere" in result.err
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))  # nowhere to write to
    assert run(*ingest[:1], painted, *ingest[2:3], url, *ingest[4:]).code == 0


@contextmanager
def recorded_opens() -> Iterator[list[str]]:
    """Paths that Python opens meanwhile."""
    opened: list[str] = []
    watching = [True]  # a hook stays for ever

    def note(event: str, args: tuple[Any, ...]) -> None:
        if watching and event == "open":
            opened.append(str(args[0]))

    sys.addaudithook(note)
    yield opened
    watching.clear()


def test_places_that_an_archive_names_are_not_followed(
    verify: Run, run: Run, painted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's archive: its records name a server, a pipe, and a file of this machine."""
    source = Path(shutil.copytree(painted, tmp_path / "town"))
    url = tmp_path / "a.zarr"
    assert run("ingest", source, "--archive", url, "--ratio", 8, "--workers", 0).code == 0
    os.mkfifo(tmp_path / "pipe")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        places = [f"http://127.0.0.1:{port}/a.jpg", str(tmp_path / "pipe"), str(source / "x")]
        archive = Archive.open(url, writable=True)
        for entry, place in zip(list(archive.images()), places, strict=True):
            stored = ArchivedImage(archive, entry).source
            data = pack_metadata(dataclasses.replace(stored, path=location(place)))
            array = zarr.create_array(
                url,
                name=f"{entry.key}/metadata",
                shape=len(data),
                chunks=len(data),
                dtype=np.uint8,
                filters=None,
                compressors=[
                    BloscCodec(cname="zstd", clevel=7, shuffle="noshuffle", typesize=1),
                    Crc32cCodec(),
                ],
                fill_value=0,
                dimension_names=("byte",),
                overwrite=True,
            )
            array[:] = np.frombuffer(data, np.uint8)
            assert ArchivedImage(archive, entry).source.path == location(place)
        # what this user archived from is found all the same
        assert verify(url, *SOFT).json["models"][0]["images"] == 3
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        with recorded_opens() as opened:
            result = verify(url, *SOFT)
        assert result.code == 1
        errors = sorted(f["error"] for f in result.json["failed"])
        assert all(any(f"archived from {place};" in e for e in errors) for place in places)
        assert not {*places} & {*opened}
        assert not select.select([listener], [], [], 0)[0]
    # pipes and devices among the originals are not opened, either
    names = [path.name for path in sorted(source.iterdir())]
    for name, make in zip(names, (os.mkfifo, lambda p: p.symlink_to("/dev/zero")), strict=False):
        (source / name).unlink()
        make(source / name)
    result = verify(url, "--originals", source, *SOFT)
    assert (result.code, result.json["models"][0]["images"]) == (3, 1)
    errors = sorted(f["error"] for f in result.json["failed"])
    assert "not a file but a pipe" in errors[0]
    assert "not a file but a device" in errors[1]


def test_stored_detections_stand_in_for_deleted_originals(
    verify: Run, run: Run, painted: Path, labels: Path, toy: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(painted, tmp_path / "town"))
    url = tmp_path / "a.zarr"
    ingest = ("ingest", moved, "--archive", url, "--ratio", 8, "--workers", 0)
    assert run(*ingest, "--detect", toy, "--json").json["ingested"] == 3
    for entry in Archive.open(url).images():
        assert entry.record["archive_bytes"] <= WIDTH * HEIGHT * 3 / 8
        assert Archive.open(url).size_of(entry.key) == entry.record["archive_bytes"]
    assert run("check", "--archive", url).code == 0
    again = run(*ingest, "--detect", toy, "--json")
    assert (again.code, again.json["skipped"]) == (0, 3)
    live = verify(url, *SOFT).json["models"][0]
    shutil.rmtree(moved)
    result = verify(url, *SOFT)
    assert result.code == 0, result.err
    (model,) = result.json["models"]
    assert model["images_by_stored_detections"] == 3
    for key in ("original", "restored", "delta"):
        assert model[key] == live[key]
    assert verify(url, "--labels", labels, *SOFT).code == 0
    for args, message in (
        (("--slice", 320), "slices of 640 pixels, not 320"),
        (("--confidence", 0.05), "from a confidence of 0.1, not 0.05"),
    ):
        result = verify(url, *args)
        assert result.code == 1
        assert message in result.json["failed"][0]["error"]


def test_objects_are_kept_better(run: Run, painted: Path, toy: Path, tmp_path: Path) -> None:
    """By `--allocation objects`, at the same budget, and not where nothing was found."""
    errors: dict[str, list[float]] = {}
    for rule in ("uniform", "objects"):
        url = tmp_path / f"{rule}.zarr"
        args = ("ingest", painted, "--archive", url, "--ratio", 60, "--detect", toy)
        assert run(*args, "--allocation", rule, "--workers", 0).code == 0
        archive = Archive.open(url)
        for entry, objects in zip(archive.images(), OBJECTS, strict=True):
            assert entry.record["archive_bytes"] <= WIDTH * HEIGHT * 3 / 60
            with Image.open(painted / entry.id) as file:
                original = np.asarray(file, float)
            error = np.square(
                ArchivedImage(archive, entry).read((0, 0, WIDTH, HEIGHT)) - original
            ).mean(2)
            inside = np.zeros((HEIGHT, WIDTH), bool)
            for _, left, top, width, height in objects:
                inside[top : top + height, left : left + width] = True
            errors.setdefault(f"{rule} inside", []).append(error[inside].mean())
            errors.setdefault(f"{rule} outside", []).append(error[~inside].mean())
    mean = {name: np.mean(values) for name, values in errors.items()}
    assert mean["objects inside"] < 0.9 * mean["uniform inside"]
    assert mean["objects outside"] > mean["uniform outside"]


def test_detections_cannot_be_added_later(run: Run, own_archive: Path, flight: Path, toy: Path,
                                          tmp_path: Path) -> None:  # fmt: skip
    ingest = ("ingest", flight, "--archive", own_archive, "--ratio", 16, "--workers", 0)
    result = run(*ingest, "--detect", toy, "--json")
    assert result.code == 3
    assert {f["error"] for f in result.json["failed"]} == {
        "archived without detections by this model; use --overwrite to store them"
    }
    result = run("ingest", flight, "--archive", tmp_path / "b.zarr", "--detect", "nonsense")
    assert result.code == 1
    assert result.err.startswith("Error: nonsense: no such file")
    assert not (tmp_path / "b.zarr").exists()


def test_labels_and_images_that_do_not_fit(verify: Run, town: Path, labels: Path,
                                           tmp_path: Path) -> None:  # fmt: skip
    own = Path(shutil.copytree(labels, tmp_path / "labels"))
    shutil.copy(labels.parents[1] / "data.yaml", own)
    first, second, third = sorted(own.glob("*.txt"))
    first.rename(own / "unrelated.txt")
    second.write_text("0 0.5 0.5\n")
    result = verify(town, "--labels", own, *SOFT)
    assert result.code == 3
    errors = [f["error"] for f in result.json["failed"]]
    assert any("no label file" in e and f"town/{first.stem}" in e for e in errors)
    assert any("line 1 is not a label" in e and second.name in e for e in errors)
    assert any(
        "1 label files without an image: unrelated.txt" in w for w in result.json["warnings"]
    )
    third.write_text("7 0.5 0.5 0.1 0.1\n")
    result = verify(town, "--labels", own)
    assert "class 7 has no name" in result.err
    assert result.code == 1
    third.write_text("")  # an image without objects
    result = verify(town, "--labels", own, "--classes", "person")
    assert "nothing to compare was found or labelled" in result.err
    assert result.code == 1
    for folder, message in ((tmp_path / "empty", "no label files"),):
        folder.mkdir()
        result = verify(town, "--labels", folder)
        assert (result.code, len(result.err.splitlines())) == (1, 1)
        assert message in result.err
    (own / "data.yaml").write_text("nothing: here\n")
    assert "no class names" in verify(town, "--labels", own).err


def test_polygons_and_names_given(verify: Run, town: Path, labels: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(labels, tmp_path / "labels"))
    for path in own.glob("*.txt"):
        lines = []
        for line in path.read_text().splitlines():
            number, x, y, w, h = (float(v) for v in line.split())
            corners = [(x - w / 2, y - h / 2), (x + w / 2, y - h / 2), (x + w / 2, y + h / 2)]
            lines.append(" ".join(map(str, [int(number), *(v for c in corners for v in c)])))
        path.write_text("\n".join(lines))
    names = tmp_path / "classes.txt"
    names.write_text("car\nperson\n")
    (model,) = verify(town, "--labels", own, "--names", names, *SOFT).json["models"]
    assert model["objects"] == {"vehicle": 7, "person": 2}
    assert model["original"]["vehicle"]["iou"] > 0.9


def test_nothing_found_anywhere_proves_nothing(verify: Run, archive: Path) -> None:
    result = verify(archive)
    assert result.code == 1
    assert result.json["passed"] is False
    assert "NaN" not in result.out
    (model,) = result.json["models"]
    assert model["images"] == 3
    assert set(model["original"]["person"].values()) == {None}
    assert "nothing to compare was found or labelled (toy.torchscript)" in result.err


def test_objects_where_the_reference_has_none_fail(
    verify: Run, town: Path, labels: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(labels, tmp_path / "labels"))
    for path in own.glob("*.txt"):
        path.write_text("")
    result = verify(town, "--labels", own, "--names", labels.parents[1] / "data.yaml")
    # as many wrong detections before as after: no difference
    assert result.json["models"][0]["detections"]["vehicle"] == [7, 7]
    assert result.code == 0


def test_models_and_classes(verify: Run, town: Path, toy: Path, tmp_path: Path) -> None:
    result = verify(town, model="nonsense.pt")
    assert result.code == 1
    assert result.err == (
        "Error: nonsense.pt: no such file, and no model that Ultralytics publishes\n"
    )
    result = verify(town, "--classes", "building")
    assert result.code == 1
    assert result.err == (
        "Error: toy.torchscript: knows no class of 'building' "
        "(classes of toy.torchscript: car, person)\n"
    )
    result = verify(town, "--classes", "building", "--classes", "anything=person,car", *SOFT)
    assert result.code == 0
    assert list(result.json["models"][0]["delta"]) == ["anything"]
    assert result.json["models"][0]["objects"] == {"anything": 9}
    assert "Warning: toy.torchscript: knows no class of 'building'" in result.err
    assert verify(town, "--classes", "=car").code == 2
    second = save_toy_detector(tmp_path / "second.torchscript", 320)
    result = verify(town, "--model", second, *SOFT)
    assert result.code == 0, result.err
    assert [m["model"] for m in result.json["models"]] == [
        "toy.torchscript", "second.torchscript",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "args",
    [
        ("--tolerance", "-1"),
        ("--confidence", "2"),
        ("--iou", "0"),
        ("--slice", "8"),
        ("--originals", "nowhere"),
        ("--labels", "nowhere"),
        ("--classes", "a="),
    ],
)
def test_usage_errors(verify: Run, town: Path, args: tuple[str, str]) -> None:
    result = verify(town, *args)
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[-1].startswith("Error: ")


def test_rasters_that_are_no_photographs_are_left_out(
    verify: Run, run: Run, town: Path, painted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.fromarray(np.full((40, 50), 7, np.uint16)).save(folder / "height.tif")
    url = Path(shutil.copytree(town, tmp_path / "a.zarr"))
    assert run("ingest", folder, "--archive", url, "--workers", 0).code == 0
    result = verify(url, *SOFT)
    assert result.code == 0
    assert [s["image"] for s in result.json["skipped"]] == ["mixed/height.tif"]


def test_damaged_images_are_named(verify: Run, town: Path, painted: Path, tmp_path: Path) -> None:
    url = Path(shutil.copytree(town, tmp_path / "a.zarr"))
    first = sorted(painted.iterdir())[0].name
    pixels = url / "flights" / "town" / first / "pixels"
    (shard,) = (p for p in pixels.rglob("*") if p.is_file() and p.name != "zarr.json")
    shard.write_bytes(shard.read_bytes()[:100])
    result = verify(url, *SOFT)
    assert result.code == 3
    assert [f["image"] for f in result.json["failed"]] == [f"town/{first}"]


def unmeasured(result: Any) -> Any:
    """What a verification says, but for seconds and memory."""
    found = result.json
    for place in (found, *found["images"]):
        for measured in ("seconds", "seconds_per_20_megapixels", "peak_memory"):
            place.pop(measured, None)
    return found


def test_a_worker_agrees_and_nothing_is_left_behind(
    command: Run, verify: Run, town: Path, toy: Path, tmp_path: Path
) -> None:
    places = {name: tmp_path / name for name in ("home", "cwd", "tmp")}
    for place in places.values():
        place.mkdir()
    hook = tmp_path / "hook"
    hook.mkdir()
    calls = tmp_path / "calls.txt"
    calls.touch()
    # every process notes whom it talks to
    (hook / "sitecustomize.py").write_text(
        "import sys\n"
        "def note(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'):\n"
        "        host = args[1][0] if event == 'socket.connect' else args[0]\n"
        f"        open({str(calls)!r}, 'a').write(f'{{host}}\\n')\n"
        "sys.addaudithook(note)\n"
    )
    report = tmp_path / "report"
    env = {
        "HOME": str(places["home"]),
        "TMPDIR": str(places["tmp"]),
        "PYTHONPATH": str(hook),
        "PYTHONDONTWRITEBYTECODE": "1",
        **dict.fromkeys(("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "YOLO_CONFIG_DIR"), ""),
    }
    before = os.stat(toy.parent).st_mtime_ns
    result = command(
        "verify-detection", "--archive", town, "--model", toy, "--workers", 1, "--json",
        "--report", report, *SOFT, env=env, cwd=places["cwd"],
    )  # fmt: skip
    assert result.code == 0, result.err
    assert result.err == ""
    hosts = set(calls.read_text().split())
    assert hosts
    assert not {h for h in hosts if h != "localhost" and not h.startswith("127.")}
    assert [p for place in places.values() for p in place.rglob("*")] == []
    assert os.stat(toy.parent).st_mtime_ns == before
    assert sorted(p.name for p in report.iterdir()) == [
        "images.csv", "report.html", "result.json", "summary.csv",
    ]  # fmt: skip
    assert unmeasured(result) == unmeasured(verify(town, *SOFT))


@pytest.mark.slow
def test_a_scheduler_agrees(command: Run, verify: Run, town: Path, toy: Path) -> None:
    with dask_processes("", "") as (address, _):
        result = command(  # its workers have another working directory
            "verify-detection", "--archive", town.name, "--model", toy, "--scheduler", address,
            "--json", *SOFT, cwd=town.parent,
        )  # fmt: skip
    assert result.code == 0, result.err
    assert unmeasured(result) == unmeasured(verify(town, *SOFT))


def test_labels_without_names_are_told_as_they_are_compared(tmp_path: Path) -> None:
    from archive_pipeline.detection.labels import count_classes, find_labels, unnamed_classes

    (tmp_path / "a.txt").write_text("0 .5 .5 .1 .1\n2 .5 .5 .1 .1\n")
    (tmp_path / "b.txt").write_text("2 .1 .1 .1 .1\n\n7 .5 .5 .1 .1\nnonsense\n")
    labels = find_labels(tmp_path)
    assert labels.names is None
    assert count_classes(labels.files.values()) == {0: 1, 2: 2, 7: 1}
    line = unnamed_classes(labels, "yolo11s.pt", {0: "person", 1: "bicycle", 2: "car"})
    assert line == (
        f"{tmp_path}: no file names its classes; taken for those of yolo11s.pt: 0 (1 object) as "
        "person, 2 (2 objects) as car, 7 (1 object) as none (--names says otherwise)"
    )


def test_the_oldest_notes_of_sources_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(ingested, "MOST_NOTES", 3)
    for number in range(5):
        ingested.note_sources("a.zarr", [(f"flight {number}", tmp_path / f"{number}")])
        time.sleep(0.01)  # a file system's clock ticks
    assert sorted(ingested.noted_sources("a.zarr")) == ["flight 2", "flight 3", "flight 4"]


def test_retired_originals_are_told_in_one_line(
    run: Run, verify: Run, own_archive: Path, own_flight: Path
) -> None:
    names = sorted(p.name for p in own_flight.iterdir())
    for name in names[1:]:
        (own_flight / name).rename(own_flight.parent / name)
    args = ("--originals", own_flight)
    assert run("retire", "--archive", own_archive, *args, "--yes").code == 3
    none = verify(own_archive, *args)
    assert none.code == 1
    assert none.err.count("Failed: ") == 2
    [line] = [line for line in none.err.splitlines() if line.startswith("Not compared: ")]
    assert "beach: the originals of 1 image were deleted by archive retire on 20" in line
    assert line.endswith("verdicts that stand of them: none")
    assert none.err.endswith("archive retire has deleted the originals of 1 image\n")
    assert [image["image"] for image in none.json["retired"]] == [f"beach/{names[0]}"]


def test_stored_detections_stand_in_for_retired_originals(
    run: Run, verify: Run, town: Path, painted: Path, tmp_path: Path
) -> None:
    url = Path(shutil.copytree(town, tmp_path / "town.zarr"))
    flight = Path(shutil.copytree(painted, tmp_path / "town"))
    for path in sorted(flight.iterdir())[1:]:
        path.rename(tmp_path / path.name)
    args = ("--originals", flight)
    assert run("retire", "--archive", url, *args, "--yes").code == 3
    assert verify(url, *args, *SOFT).json["retired"] == []
    found = verify(url, *args, *SOFT, "--slice", 320)
    assert found.json["retired"] == []
    [first, *_] = found.json["failed"]
    assert "its original was deleted by archive retire on 20" in first["error"]
    assert "the stored detections are of slices of" in first["error"]
