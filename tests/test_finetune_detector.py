"""Fine-tuning a detector: slices with their labels, the start's weights, a short run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, ROOT
from PIL import Image
from toy_detector import Objects, paint, write_labels

if importlib.util.find_spec("ultralytics") is None:  # not imported: it would write settings
    pytest.skip("the extra 'verify' is not installed", allow_module_level=True)

import torch
from detection_slices import label_of, prepare
from finetune_detector import load_start, minutes_spent
from openvino_weights import architecture, load_export, read_weights

from archive_pipeline.detection.detectors import find_detectors, import_ultralytics, load_detector

INT8 = DATA.parent / "weights" / "yolo11n_int8_openvino_model"
needs_int8 = pytest.mark.skipif(not INT8.is_dir(), reason=f"needs {INT8}")
NAMES = "path: .\ntrain: images/train\nval: images/test\nnames: [car, person]\n"


def dataset(folder: Path, frames: dict[str, Objects]) -> Path:
    """A labelled folder of 200 x 120 images."""
    (folder / "images" / "train").mkdir(parents=True)
    (folder / "data.yaml").write_text(NAMES)
    for name, objects in frames.items():
        pixels = paint(np.full((120, 200, 3), 120, np.uint8), objects)
        Image.fromarray(pixels).save(folder / "images" / "train" / f"{name}.png")
        write_labels(folder / "labels" / "train" / f"{name}.txt", objects, 200, 120)
    return folder


def test_slices_keep_objects_and_their_scale(tmp_path: Path) -> None:
    # 96 pixels with an overlap of 0.2: columns 0, 52, 104, rows 0, 24
    objects: Objects = [("car", 10, 30, 20, 10), ("car", 90, 40, 10, 10), ("person", 150, 80, 8, 8)]
    data = dataset(tmp_path / "data", {"a-1": objects, "b-1": objects})
    facts = prepare(data, ("b*",), {"vehicle": ("car", "van")}, 96, tmp_path / "slices")
    assert facts["train"] == {"images": 1, "objects": 2, "slices": 4}
    assert facts["classes"] == {"vehicle": ["car"]}
    made = sorted(p.stem for p in (tmp_path / "slices" / "train" / "images").iterdir())
    assert made == ["a-1-0-0", "a-1-0-24", "a-1-52-0", "a-1-52-24"]  # 104: the person is no vehicle
    for name in made:
        label = tmp_path / "slices" / "train" / "labels" / f"{name}.txt"
        pixels = np.asarray(Image.open(tmp_path / "slices" / "train" / "images" / f"{name}.png"))
        assert pixels.shape == (96, 96, 3)
        red = np.argwhere((pixels[..., 0] > 200) & (pixels[..., 1] < 100))
        shown = np.zeros((96, 96), bool)
        for line in label.read_text().splitlines():
            kind, *numbers = line.split()
            x, y, w, h = (float(v) * 96 for v in numbers)
            assert kind == "0"
            shown[round(y - h / 2) : round(y + h / 2), round(x - w / 2) : round(x + w / 2)] = True
        missed = {tuple(p) for p in red} - {tuple(p) for p in np.argwhere(shown)}
        assert len(missed) <= 40, name  # six of ten columns of the cut car are left of it, at most
        assert shown.sum() == len(red) - len(missed)
    assert not list(data.rglob("*.cache"))


def test_labels_lie_beside_images(tmp_path: Path) -> None:
    assert label_of(Path("/images/x/images/train/a.b.jpg")) == Path(
        "/images/x/labels/train/a.b.txt"
    )
    assert label_of(Path("/x/a.jpg")) == Path("/x/a.txt")


@pytest.mark.parametrize(
    ("holdout", "message"), [(("*",), "left for 'train'"), (("z*",), "left for 'val'")]
)
def test_nothing_left_to_train_on(tmp_path: Path, holdout: tuple[str, ...], message: str) -> None:
    data = dataset(tmp_path / "data", {"a": [("car", 1, 1, 9, 9)]})
    with pytest.raises(Exception, match=message):
        prepare(data, holdout, None, 96, tmp_path / "slices")
    with pytest.raises(Exception, match=r"data\.yaml"):
        prepare(tmp_path, holdout, None, 96, tmp_path / "slices")


def photograph(size: int) -> np.ndarray:
    image = Image.open(DATA / "detection" / "images" / "train" / "DJI-00760-00039.jpg")
    return np.asarray(image)[200 : 200 + size, 600 : 600 + size]


def as_input(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / 255


@needs_int8
def test_int8_weights_in_pytorch_see_the_same() -> None:
    pixels = photograph(640)
    model = load_export(INT8, [as_input(pixels)])
    assert architecture(INT8)[0] == "yolo11n.yaml"
    weight, bias = read_weights(INT8)["model.0.conv"]
    assert weight.shape == (16, 3, 3, 3)
    assert bias is not None
    with torch.no_grad():
        found = model.eval()(as_input(pixels))[0][0].numpy()
        scores = found[4:].max(0)
        in_training = model.train()(as_input(pixels))["scores"].sigmoid()[0].amax(0).numpy()
    assert np.allclose(in_training, scores, atol=1e-3)  # the statistics are this image's
    import openvino

    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    export = openvino.Core().compile_model(str(INT8 / "yolo11n.xml"), "CPU", exact)
    expected = export(as_input(pixels).numpy())[0][0]
    sure = expected[4:].max(0) > 0.25
    assert sure.sum() > 5
    # the export rounds activations to eight bits as well
    assert np.abs(scores - expected[4:].max(0)).max() < 0.15
    assert np.corrcoef(scores, expected[4:].max(0))[0, 1] > 0.98
    assert np.median(np.abs(found[:4, sure] - expected[:4, sure])) < 1


@needs_int8
def test_groups_begin_with_a_class_that_the_start_knows(tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", {name: [("car", 1, 1, 60, 30)] for name in "ab"})
    groups = {"vehicle": ("car", "truck"), "crane": ("crane",)}
    prepare(data, ("b*",), None, 96, tmp_path / "slices")
    model = load_start(str(INT8), tmp_path / "slices", 96, groups, 0)
    assert (model.names[2], model.names[7], len(model.names)) == ("vehicle", "truck", 80)


@pytest.mark.slow
def test_a_run_trains_resumes_and_exports(tmp_path: Path) -> None:
    frames: dict[str, Objects] = {
        f"{part}-{i}": [("car", 15 * i + 3, 8 * i, 40, 24), ("person", 150 - 12 * i, 70, 24, 24)]
        for part in ("a", "b")
        for i in range(8)
    }
    data, run = dataset(tmp_path / "data", frames), tmp_path / "run"
    before = {p: p.read_bytes() for p in data.rglob("*") if p.is_file()}
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()

    def finetune(*args: object) -> str:
        fixed = ("--run", run, "--size", 96, "--input-size", 96, "--batch", 4, "--device", "cpu")
        places = {"HOME": str(home), "TMPDIR": str(scratch), "HTTPS_PROXY": "http://127.0.0.1:9"}
        done = subprocess.run(
            [sys.executable, ROOT / "workflows" / "detection" / "finetune_detector.py", data]
            + [str(a) for a in (*fixed, *args)],
            env={**os.environ, **places},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    card = finetune("--start", "yolo11n.yaml", "--holdout", "b-*", "--minutes", 0.1)
    assert "| train | 8 | 16 |" in card
    first = (run / "train" / "results.csv").read_text().splitlines()
    spent = minutes_spent(run)
    finetune("--start", "yolo11n.yaml", "--minutes", spent + 0.05, "--resume")
    second = (run / "train" / "results.csv").read_text().splitlines()
    assert second[: len(first)] == first
    assert len(second) > len(first)
    assert minutes_spent(run) > spent

    (file,) = find_detectors([str(run / "detector_openvino_model")])
    detector = load_detector(file, "cpu")
    assert (detector.classes, detector.input_size) == ({0: "car", 1: "person"}, 96)
    # the weights beside it are those of the export
    from safetensors import safe_open

    yolo = import_ultralytics().YOLO("yolo11n.yaml", task="detect").model
    exported = read_weights(run / "detector_openvino_model")["model.23.cv3.0.2"][0]
    with safe_open(run / "detector.safetensors", "pt") as weights:
        assert len(weights.keys()) == len(yolo.state_dict())
        kept = weights.get_tensor("model.23.cv3.0.2.weight").numpy()
    assert np.allclose(kept, exported, rtol=0, atol=1e-3)
    # neither says where on this machine anything lay
    for text in (run / "README.md", run / "detector_openvino_model" / "metadata.yaml"):
        assert str(tmp_path) not in text.read_text()
        assert str(ROOT) not in text.read_text()
    assert {p.name for p in run.iterdir()} == {
        "README.md", "detector.safetensors", "detector_openvino_model", "slices", "slices.json",
        "train",
    }  # fmt: skip
    assert {p: p.read_bytes() for p in data.rglob("*") if p.is_file()} == before
    assert not [*home.rglob("*"), *scratch.rglob("*")]
    assert {p.name for p in tmp_path.iterdir()} == {"data", "run", "home", "scratch"}
