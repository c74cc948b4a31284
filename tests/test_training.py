"""The training workflows run end to end: pack, train, resume, release, decode."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from golden import reference as ref
from PIL import Image

from archive_pipeline.models import DEFAULT_MODEL, shipped
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.constants import MAX_IMAGE_STEP, MIN_IMAGE_STEP
from archive_pipeline.pcdc.model import Model

sys.path.insert(0, str(ROOT / "workflows"))
train_transform = pytest.importorskip("train_transform", reason="needs the `train` extra")

BRIEF = ("--minutes", "0.03", "--batch", "1", "--size", "64", "--threads", "1", "--device", "cpu")


def workflow(name: str, *args: object) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "workflows" / name), *(str(a) for a in args)],
        capture_output=True,
        text=True,
        env=ref.subprocess_environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    for seed in range(30):
        Image.fromarray(ref.texture(80, 96, seed)).save(folder / f"{seed:02d}.png")
    packed = folder / "crops.npy"
    workflow("pack_crops.py", packed, folder)
    return packed


@pytest.mark.slow
def test_stage_1_trains_resumes_and_releases(crops: Path, tmp_path: Path) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    workflow("train_transform.py", crops, "--run", run, *BRIEF)
    first = torch.load(run / "checkpoint.pt", weights_only=True)
    workflow("train_transform.py", crops, "--run", run, "--resume", *BRIEF, "--minutes", "0.08")
    second = torch.load(run / "checkpoint.pt", weights_only=True)
    assert second["step"] > first["step"] > 0
    assert second["minutes"] > first["minutes"]
    with (run / "validation.csv").open() as file:
        rows = [[float(v) for v in row] for row in csv.reader(file)]
    assert {row[0] for row in rows} == {first["step"], second["step"]}
    assert np.isfinite(rows).all()

    sha256 = workflow("release_model.py", run / "checkpoint.pt", model).strip()
    codec = Codec(Model.from_folder(model))
    assert codec.model.sha256 == sha256
    tile = ref.texture(64, 80, 1)
    [decoded] = codec.decode(codec.encode([tile], 3000), 64, 80)
    # an untrained start is already a transform coder
    assert np.mean((decoded.astype(float) - tile) ** 2) < np.var(tile.astype(float)) / 2


def test_released_weights_are_a_start_with_the_same_output() -> None:
    """Also those of an earlier format, whose smaller kernels are set into the larger ones."""
    released = ref.tiny_codec().model.networks
    config = train_transform.replace(released.config, edge_kernel=3)
    grown = train_transform.TransformCodec(config)
    train_transform.load_released(grown, released)
    x = torch.from_numpy(ref.texture(64, 64)).permute(2, 0, 1)[None].float() / 127.5 - 1
    step = torch.tensor([30])
    levels = torch.zeros(1, 1, 4, 4).long()
    with torch.no_grad():
        a = train_transform.rate_distortion(released, x, step, levels, noise=False)
        b = train_transform.rate_distortion(grown.eval(), x, step, levels, noise=False)
    torch.testing.assert_close(a[0], b[0], rtol=1e-3, atol=1)
    torch.testing.assert_close(a[1], b[1], rtol=1e-3, atol=0.02)


def test_image_steps_cover_the_range_in_every_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([train_transform.random_steps(6, generator) for _ in range(4000)])
    assert draws.min() == MIN_IMAGE_STEP
    assert draws.max() == MAX_IMAGE_STEP
    assert (draws.diff(dim=1) >= 0).all()  # one from each sixth of the distribution
    share = (torch.arange(24000) + 0.5) / 24000
    bell = torch.where(share < 0.5, (share / 2).sqrt(), 1 - ((1 - share) / 2).sqrt())
    expected = (MIN_IMAGE_STEP + bell**0.65 * (MAX_IMAGE_STEP + 1 - MIN_IMAGE_STEP)).long()
    assert abs(draws.float().mean() - expected.float().mean()) < 0.1
    assert abs(draws.float().std() - expected.float().std()) < 0.1


@pytest.mark.slow
def test_stage_2_trains_and_releases_for_its_own_transform_only(
    crops: Path, tmp_path: Path
) -> None:
    try:
        from train_denoiser import lpips

        lpips("cpu")
    except Exception as error:  # torchvision raises what its download does
        pytest.skip(f"LPIPS weights cannot be loaded: {error}")
    model = tmp_path / "model"
    model.mkdir()
    for path in (shipped() / DEFAULT_MODEL).glob("*.*"):
        (model / path.name).write_bytes(path.read_bytes())
    run = tmp_path / "run"
    workflow("train_denoiser.py", crops, "--model", model, "--run", run, *BRIEF)
    sha256 = workflow("release_model.py", run / "checkpoint.pt", model).strip()
    released = Model.from_folder(model)
    assert released.sha256 == sha256
    assert released.has_denoiser
    codec = Codec(released)
    streams = codec.encode([ref.texture(64, 64)], 2000)
    assert codec.decode(streams, 64, 64, 1)[0].shape == (64, 64, 3)

    other = ref.write_model(tmp_path / "other")
    refused = subprocess.run(
        [sys.executable, ROOT / "workflows/release_model.py", run / "checkpoint.pt", other],
        capture_output=True,
        text=True,
        env=ref.subprocess_environment(),
    )
    assert refused.returncode == 1
    assert "was trained for transform" in refused.stderr
