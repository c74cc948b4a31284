"""What a detector loses in reconstructions, and the crops that a policy learns objects from."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from golden import reference as ref
from PIL import Image
from toy_detector import paint, save_toy_detector

if importlib.util.find_spec("ultralytics") is None:  # not imported: it would write settings
    pytest.skip("the extra 'verify' is not installed", allow_module_level=True)

from archive_pipeline.detection.detectors import Detector, find_detectors, load_detector
from archive_pipeline.detection.task_loss import TaskLoss
from archive_pipeline.pcdc.policy import POLICY, pack_policy

GREY = np.full((320, 320, 3), 120, np.uint8)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    path = save_toy_detector(tmp_path_factory.mktemp("toy") / "toy.torchscript")
    return load_detector(*find_detectors([str(path)]), "cpu")


def test_nothing_is_lost_in_the_original(detector: Detector) -> None:
    tile = paint(GREY, [("car", 40, 64, 60, 30)])
    loss = TaskLoss.of(detector, tile)
    assert loss(tile).shape == (10, 10)
    assert (loss(tile) >= 0).all()
    # its score times its overlap with itself, up to the steps that boxes are rounded to
    assert loss(tile).sum() == pytest.approx(0, abs=0.05)


def test_a_lost_object_counts_where_it_was(detector: Detector) -> None:
    tile = paint(GREY, [("car", 40, 64, 60, 30), ("car", 200, 200, 40, 40)])
    loss = TaskLoss.of(detector, tile)
    lost = loss(paint(GREY, [("car", 40, 64, 60, 30)]))
    assert lost[6:8, 6:8].sum() == pytest.approx(loss.scores.mean(), abs=0.1)
    outside = lost.copy()
    outside[6:8, 6:8] = 0
    assert outside.sum() == pytest.approx(0, abs=0.05)
    faint = TaskLoss.of(detector, tile)(tile // 4 * 3 + 30)  # paler: found, with lower scores
    assert 0 < faint.sum() < loss(GREY).sum()


def test_what_is_found_wrongly_counts_as_well(detector: Detector) -> None:
    loss = TaskLoss.of(detector, GREY)
    wrong = loss(paint(GREY, [("person", 96, 128, 32, 64)]))
    assert wrong[4:6, 3].sum() == pytest.approx(wrong.sum())
    assert wrong.sum() > 0.5


def test_a_picture_of_levels_and_finds(tmp_path: Path) -> None:
    main = pytest.importorskip("allocation_picture", reason="needs the extra `benchmark`").main
    model = ref.write_model(tmp_path / "model")
    (model / POLICY).write_bytes(pack_policy(ref.tiny_policy()))
    frame = paint(GREY, [("car", 40, 64, 60, 30), ("car", 200, 200, 40, 40)])
    Image.fromarray(frame).save(tmp_path / "frame.png")
    toy = save_toy_detector(tmp_path / "toy.torchscript")
    args = [tmp_path / "out.png", tmp_path / "frame.png", "--detector", toy, "--model", model]
    result = CliRunner().invoke(main, [*map(str, args), "--source-ratio", "0.2"])
    assert result.exit_code == 0, result.output
    assert "of 2 found, policy: " in result.output
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 1000
    args[3] = tmp_path / "none.pt"
    refused = CliRunner().invoke(main, [*map(str, args)])
    assert refused.exit_code == 1
    assert "none.pt" in refused.output


def test_crops_know_where_their_objects_are(tmp_path: Path) -> None:
    object_crops = pytest.importorskip("object_crops", reason="needs the extra `train`")
    rng = np.random.default_rng(0)
    frame = rng.integers(90, 130, (600, 800, 3)).astype(np.uint8)
    boxes = [(100, 80, 60, 40), (500, 400, 30, 90)]
    frame = paint(frame, [("car", *box) for box in boxes])
    np.save(tmp_path / "crops.npy", frame.reshape(-1))
    (tmp_path / "crops.json").write_text(json.dumps([["a.jpg", 0, 600, 800]]))
    sure = [[x, y, x + w, y + h] for x, y, w, h in boxes]
    (tmp_path / "objects.json").write_text(json.dumps({"a.jpg": {"sure": sure, "unsure": []}}))
    paths = (tmp_path / "crops.npy", tmp_path / "objects.json")
    object_crops.RECOLOURED = 0
    source, seen = object_crops.ObjectCrops(*paths, 256), 0
    for _ in range(40):
        crop = source.crop(rng)
        red = crop.pixels[..., 0].astype(int) - crop.pixels[..., 2]
        rows, columns = np.nonzero(red > 100)
        seen += bool(len(rows))
        # all that is painted lies in blocks that are said to hold objects
        assert crop.objects[rows // 32, columns // 32].all()
        if not len(rows):
            assert crop.objects.sum() <= 6  # what is beside one that was just missed
    assert seen >= 20
