"""Detectors: slices and merging, determinism, model files, what loading one leaves behind."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from toy_detector import Objects, paint, save_toy_detector

from archive_pipeline.detection import detectors as module
from archive_pipeline.detection.boxes import (
    EMPTY,
    OVERLAP,
    Detections,
    iou,
    merge_slices,
    slice_rows,
    strips,
    suppress,
)
from archive_pipeline.detection.detectors import (
    Detector,
    DetectorError,
    Read,
    detect,
    detect_all,
    find_detectors,
    import_ultralytics,
    load_detector,
    pack_detections,
    unpack_detections,
)
from archive_pipeline.detection.labels import GROUPS, group_classes, parse_groups

if importlib.util.find_spec("ultralytics") is None:  # not imported: it would write settings
    pytest.skip("the extra 'verify' is not installed", allow_module_level=True)
INT8 = DATA.parent / "weights" / "yolo11n_int8_openvino_model"
FRAME = 5472, 3648


@pytest.fixture(scope="module")
def toy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_detector(tmp_path_factory.mktemp("toy") / "toy.torchscript")


@pytest.fixture(scope="module")
def toy(toy_path: Path) -> Detector:
    return load_detector(find_detectors([str(toy_path)])[0], "cpu")


def reader(pixels: NDArray[np.uint8]) -> Read:
    return lambda w: pixels[w[1] : w[1] + w[3], w[0] : w[0] + w[2]]


def found_in(toy: Detector, pixels: NDArray[np.uint8], size: int | None = None) -> Detections:
    height, width = pixels.shape[:2]
    (found,) = detect(toy, [reader(pixels)], width, height, size, 608)
    return found


def boxes_of(objects: Objects) -> set[tuple[float, ...]]:
    return {(x, y, x + w, y + h) for _, x, y, w, h in objects}


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(32, 700))
def test_slices_cover_the_image_and_share_their_borders(width: int, height: int, size: int) -> None:
    rows = slice_rows(width, height, size)
    assert {w[2:] for line in rows for w in line} == {(min(width, size), min(height, size))}
    for starts, length in (([w[0] for w in rows[0]], width), ([r[0][1] for r in rows], height)):
        assert (starts[0], starts[-1] + min(size, length)) == (0, length)
        steps = np.diff(starts)
        assert all(0 < step <= size - round(size * OVERLAP) + 1 for step in steps)


def test_known_objects_at_slice_borders_of_a_large_frame(toy: Detector) -> None:
    rows = slice_rows(*FRAME, toy.input_size)
    col, row = rows[1][1][0], rows[1][1][1]  # left and upper border of an inner slice
    right = rows[1][0][0] + toy.input_size  # right border of the one before
    objects: Objects = [
        ("car", col - 30, 1500, 70, 40),  # a pair side by side on a border
        ("car", col + 60, 1500, 70, 40),
        ("car", right - 35, 1600, 70, 40),
        ("person", col - 20, row - 20, 50, 40),  # where four slices meet
        ("car", 2000, 2500, 900, 60),  # longer than any slice
        ("person", 0, 0, 40, 40),
        ("person", FRAME[0] - 40, FRAME[1] - 40, 40, 40),
    ]
    pixels = paint(np.full((FRAME[1], FRAME[0], 3), 120, np.uint8), objects)
    found = found_in(toy, pixels)
    assert {tuple(b) for b in found.boxes.tolist()} == boxes_of(objects)
    assert len(found) == len(objects)


def test_equal_pixels_give_equal_objects(toy: Detector) -> None:
    random = np.random.default_rng(1)
    pixels = random.integers(90, 150, (700, 900, 3), np.uint8)
    pixels = paint(pixels, [("car", 600, 300, 60, 30), ("person", 100, 650, 40, 40)])
    blurred = pixels.copy()
    blurred[250:400, 550:700] = 90
    versions = [reader(p) for p in (pixels, pixels.copy(), blurred)]
    one, two, three = detect(toy, versions, 900, 700, None, 608)
    alone = found_in(toy, pixels)
    for other in (two, alone):
        assert np.array_equal(one.boxes, other.boxes)
        assert np.array_equal(one.scores, other.scores)
        assert np.array_equal(one.classes, other.classes)
    assert (len(one), len(three)) == (2, 1)


def test_large_images_are_read_in_strips_once(
    toy: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects: Objects = [("car", 300, 600 * i + 10, 60, 80) for i in range(4)]
    pixels = paint(np.full((2000, 800, 3), 120, np.uint8), objects)
    expected = found_in(toy, pixels)
    read_rows: list[int] = []

    def read(window: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        read_rows.extend(range(window[1], window[1] + window[3]))
        return reader(pixels)(window)

    monkeypatch.setattr(module, "WHOLE_BYTES", 0)
    (found,) = detect(toy, [read], 800, 2000, None, 608)
    assert np.array_equal(found.boxes, expected.boxes)
    assert len(found) == 4
    assert sorted(read_rows) == list(range(2000))


def test_strips_hold_little() -> None:
    rows = slice_rows(64, 5000, 100)
    pixels = np.arange(5000 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(5000, 64, 3)
    for windows, strip in zip(rows, strips(reader(pixels), 64, 5000, rows, 32), strict=True):
        top = windows[0][1]
        assert np.array_equal(strip, pixels[top : top + 100])


def detections(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    table = np.array(rows, float).reshape(-1, 6)
    return Detections.of(table[:, :4], table[:, 4], table[:, 5])


def test_merging_keeps_neighbours_apart() -> None:
    rows = slice_rows(1000, 400, 640)  # two slices that share columns 360 to 640
    whole = (500, 100, 620, 140, 0.8, 0)
    beside = (500, 142, 620, 182, 0.7, 0)
    left = detections(whole, beside)
    right = detections((501, 100, 620, 140, 0.9, 0), (500, 142, 621, 182, 0.6, 0))
    merged = merge_slices(rows, [[left, right]])
    assert merged.boxes.tolist() == [[501, 100, 620, 140], [500, 142, 620, 182]]
    assert merged.scores.tolist() == pytest.approx([0.9, 0.7])


def test_merging_prefers_the_slice_that_sees_the_whole_object() -> None:
    rows = slice_rows(1000, 400, 640)
    piece = detections((540, 100, 640, 140, 0.9, 0))  # cut at column 640, and surer of it
    whole = detections((540, 100, 720, 140, 0.5, 1))
    merged = merge_slices(rows, [[piece, whole]])
    assert merged.boxes.tolist() == [[540, 100, 720, 140]]
    assert merged.classes.tolist() == [1]
    # a piece that the other slice would have seen stays an object of its own
    merged = merge_slices(rows, [[detections((540, 100, 640, 140, 0.9, 0)), EMPTY]])
    assert len(merged) == 1


def test_nothing_found_merges_to_nothing() -> None:
    rows = slice_rows(1000, 400, 640)
    assert len(merge_slices(rows, [[EMPTY, EMPTY]])) == 0


def test_suppression_by_class_and_across() -> None:
    both = detections((0, 0, 10, 10, 0.9, 2), (0, 0, 10, 9, 0.5, 7), (50, 0, 60, 10, 0.4, 2))
    assert len(suppress(both)) == 3
    assert suppress(both, by_class=False).classes.tolist() == [2, 2]
    assert iou(np.zeros((1, 4)), np.zeros((1, 4))).tolist() == [[0.0]]


@given(st.lists(st.tuples(*[st.floats(0, 500)] * 4, st.floats(0, 1), st.integers(0, 79))))
def test_stored_objects_come_back_exactly(rows: list[tuple[float, ...]]) -> None:
    table = np.array(rows, float).reshape(-1, 6)
    table[:, 2:4] += table[:, :2]
    found = Detections.of(table[:, :4], table[:, 4], table[:, 5])
    again = Detections.from_json(found.to_json())
    assert np.array_equal(again.boxes, found.boxes)
    assert np.array_equal(again.classes, found.classes)
    assert np.allclose(again.scores, found.scores, rtol=0, atol=1e-12)


def test_packed_detections_say_what_they_are(toy: Detector) -> None:
    pixels = paint(np.full((300, 800, 3), 120, np.uint8), [("person", 620, 100, 40, 40)])
    data = pack_detections(detect_all([toy.file], "cpu", reader(pixels), 800, 300, 608))
    assert b'"classes":{"1":"person"}' in data
    stored = unpack_detections(data)[toy.file.sha256]
    assert (stored.slice, stored.found.boxes.tolist()) == (640, [[620, 100, 660, 140]])
    for damaged in (b"{", data.replace(b'"left"', b'"west"'), data.replace(b"[320]", b"[320,1]")):
        with pytest.raises((ValueError, KeyError, TypeError)):
            unpack_detections(damaged)


def test_groups_of_classes() -> None:
    coco = {0: "person", 2: "car", 7: "truck", 9: "traffic light"}
    assert group_classes(coco, None) == {"vehicle": [2, 7], "person": [0]}
    assert group_classes({0: "Small-Vehicle", 1: "large_vehicle"}, None) == {"vehicle": [0, 1]}
    assert group_classes({0: "palm"}, None) == {"palm": [0]}
    assert group_classes(coco, {"lights": ("Traffic Light",), "roof": ("roof",)}) == {"lights": [9]}
    assert parse_groups([]) is None
    assert parse_groups(["big=truck, bus", "person", "palm"]) == {
        "big": ("truck", "bus"),
        "person": GROUPS["person"],
        "palm": ("palm",),
    }
    for text in ("", "=car", "big=", "big= ,"):
        with pytest.raises(ValueError, match="--classes"):
            parse_groups([text])


def test_random_weights_as_pt(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    path = tmp_path / "random.pt"
    import_ultralytics().YOLO("yolo11n.yaml", task="detect").save(path)
    threads = torch.get_num_threads()
    detector = load_detector(find_detectors([str(path)])[0], "cpu")
    assert torch.get_num_threads() == threads
    assert (len(detector.classes), detector.input_size) == (80, 640)
    pixels = np.random.default_rng(0).integers(0, 256, (320, 320, 3), np.uint8)
    first, second = detector.detect([pixels])[0], detector.detect([pixels])[0]
    assert np.array_equal(first.boxes, second.boxes)
    assert np.array_equal(first.scores, second.scores)


def test_onnx_finds_what_pt_finds(tmp_path: Path) -> None:
    import torch

    pytest.importorskip("onnx", reason="exports to ONNX need it")
    package = import_ultralytics()
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (160, 160, 3), np.uint8)
    model = package.YOLO("yolo11n.yaml", task="detect")
    for layer in model.model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    model.model.train()(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    for branch in model.model.model[-1].cv3:  # what is random is not to be sure of anything
        branch[-1].weight.data /= 8
        branch[-1].bias.data.fill_(-4)
    path = tmp_path / "random.pt"
    model.save(path)
    notes = importlib.import_module("ultralytics.utils").USER_CONFIG_DIR
    before = {p: p.stat().st_mtime_ns for p in [notes, *notes.glob("*")] if p.exists()}
    exported = package.YOLO(path).export(format="onnx", imgsz=160, device="cpu", verbose=False)
    # what an export notes in the settings is not written back where they were
    assert before == {p: p.stat().st_mtime_ns for p in [notes, *notes.glob("*")] if p.exists()}
    assert {p.name for p in tmp_path.iterdir()} == {"random.pt", "random.onnx"}
    one, two = (load_detector(f, "cpu") for f in find_detectors([str(path), str(exported)]))
    assert (two.input_size, two.classes) == (160, one.classes)
    one.input_size = 160
    first, second = one.detect([pixels])[0], two.detect([pixels])[0]
    assert len(second) == len(first) > 5
    assert 0.1 < first.scores[0] < 0.99
    assert np.allclose(second.scores, first.scores, rtol=0, atol=1e-3)
    agree = iou(first.boxes, second.boxes) * (first.classes[:, None] == second.classes)
    assert agree.max(1).min() > 0.95  # equal scores may come in another order


@pytest.mark.skipif(not INT8.is_dir(), reason=f"needs {INT8}")
def test_openvino_int8_sees_vehicles() -> None:
    from PIL import Image

    (file,) = find_detectors([str(INT8), str(INT8)])  # given twice, loaded once
    detector = load_detector(file, "cpu")
    image = DATA / "detection" / "images" / "test" / "DJI_0762-00001.jpg"
    found = found_in(detector, np.asarray(Image.open(image))[200:840, :1000])
    cars = found.where((found.classes == 2) & (found.scores > 0.25))
    assert detector.classes[2] == "car"
    assert 5 < len(cars) < 30


def test_models_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DetectorError, match=r"nonsense\.pt: no such file"):
        find_detectors(["nonsense.pt"])
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"not weights")
    with pytest.raises(DetectorError, match=r"^bad\.pt: cannot be loaded: "):
        load_detector(find_detectors([str(bad)])[0], "cpu")
    empty = tmp_path / "empty_openvino_model"
    empty.mkdir()
    with pytest.raises(DetectorError, match=r"^empty_openvino_model: cannot be loaded"):
        load_detector(find_detectors([str(empty)])[0], "cpu")
    # no network, whatever the machine has
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    started = time.monotonic()
    with pytest.raises(DetectorError, match=r"yolo11s\.pt: cannot be downloaded.*--model PATH"):
        find_detectors(["yolo11s.pt"])
    assert time.monotonic() - started < 15
    assert not any(p.is_file() for p in tmp_path.joinpath("cache").rglob("*"))


def test_classifiers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "classes.pt"
    import_ultralytics().YOLO("yolo11n-cls.yaml", task="classify").save(path)
    with pytest.raises(DetectorError, match="its task is classify"):
        load_detector(find_detectors([str(path)])[0], "cpu")


def test_weights_cannot_run_code(tmp_path: Path) -> None:
    import torch

    mark = tmp_path / "mark"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(mark),)

    path = tmp_path / "hostile.pt"
    torch.save({"model": Payload()}, path)
    with pytest.raises(DetectorError, match=r"hostile\.pt"):
        load_detector(find_detectors([str(path)])[0], "cpu")
    assert not mark.exists()


def test_the_extra_is_asked_for_and_never_imported_unasked(tmp_path: Path) -> None:
    code = (
        "import sys, archive_pipeline.jobs.ingest, archive_pipeline.jobs.restore,"
        " archive_pipeline.commands.cli, archive_pipeline.jobs.check,"
        " archive_pipeline.jobs.verify, archive_pipeline.detection.report;"
        "assert not {'ultralytics', 'openvino', 'torch', 'jinja2'} & set(sys.modules);"
        "sys.modules['ultralytics'] = None;"
        "from archive_pipeline.detection.detectors import find_detectors, DetectorError\n"
        "try: find_detectors(['yolo11s.pt'])\n"
        "except DetectorError as error: print(error)"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path)
    assert out == "ultralytics is not installed: pip install 'archive-pipeline[verify]'\n"


def test_pillow_stays_as_it_was() -> None:
    code = (
        "from PIL import Image; before = Image.open;"
        "from archive_pipeline.detection.detectors import import_ultralytics;"
        "import_ultralytics(); assert Image.open is before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
