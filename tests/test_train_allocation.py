"""Stage 3 of training, small: objects found, imitated, and PPO with a detector as the task."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden import reference as ref
from PIL import Image
from toy_detector import paint, save_toy_detector

if importlib.util.find_spec("ultralytics") is None:  # not imported: it would write settings
    pytest.skip("the extra 'verify' is not installed", allow_module_level=True)
pytest.importorskip("train_allocation", reason="needs the extra `train`")

import find_objects
import imitate_objects
import pack_crops
import train_allocation

from archive_pipeline.pcdc.policy import POLICY, load_policy

LATENTS = ref.tiny_codec().model.networks.config.latents


def invoke(command: object, *args: object) -> str:
    result = CliRunner().invoke(command, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_objects_become_a_policy(tmp_path: Path, lpips_weights: None) -> None:
    rng = np.random.default_rng(0)
    flight = tmp_path / "flight"
    flight.mkdir()
    for k in range(3):
        frame = rng.integers(80, 140, (640, 640, 3)).astype(np.uint8)
        frame = paint(frame, [("car", 60 + 90 * k, 100, 80, 50), ("car", 400, 440, 60, 90)])
        Image.fromarray(frame).save(flight / f"{k}.png")
    detector = save_toy_detector(tmp_path / "toy.torchscript")
    crops, objects = tmp_path / "crops.npy", tmp_path / "objects.json"
    invoke(pack_crops.main, crops, flight)
    said = invoke(
        find_objects.main, crops.with_suffix(".json"), objects, flight, "--detector", detector
    )
    assert said == "6 objects in 3 images, 0 of them labelled\n"
    boxes = json.loads(objects.read_text())["1.png"]["sure"]
    assert sorted(boxes)[0] == pytest.approx([150, 100, 230, 150], abs=2)

    model, run = ref.write_model(tmp_path / "model"), tmp_path / "imitation"
    args = [crops, objects, "--model", model, "--run", run, "--holdout", "2.png", "--threads", 1]
    args += ["--count", 40, "--epochs", 20, "--lr", 5e-3]
    invoke(imitate_objects.main, *args)
    with (run / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert float(rows[-1]["objects"]) > float(rows[-1]["others"]) + 0.05  # they can be told apart
    start = load_policy((run / POLICY).read_bytes(), LATENTS)

    ppo = tmp_path / "ppo"
    args = [crops, objects, "--model", model, "--run", ppo, "--detector", detector, "--threads", 1]
    args += ["--start", run / POLICY, "--tiles", 8, "--updates", 1, "--decoder-updates", 1]
    invoke(train_allocation.main, *args)
    with (ppo / "log.csv").open(newline="") as file:
        assert [row["part"] for row in csv.DictReader(file)] == ["decoder"]
    table = torch.load(ppo / "table.pt", weights_only=True)
    lost = torch.stack([row["terms"][:, 3] for row in table])
    assert lost.min() >= 0
    assert lost.sum() > 0  # the coarsest levels lose some of the objects
    trained = load_policy((ppo / POLICY).read_bytes(), LATENTS)
    assert trained.config.usual_bits(30) > 1
    assert not torch.equal(trained.importance_of.weight, start.importance_of.weight)
