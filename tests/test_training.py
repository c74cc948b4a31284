"""The training workflows run end to end: pack, train, resume, release, decode."""

from __future__ import annotations

import csv
import functools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pack_crops
import pytest
import release_model
import torch
import training_samples
from checkpoints import read_checkpoint, write_checkpoint
from click.testing import CliRunner
from conftest import ROOT
from detector_features import load_features
from golden import reference as ref
from PIL import Image
from symbol_tables import fitted_tables
from torch import nn
from training_samples import Crops, random_steps
from transform_loss import (
    COARSE_WEIGHTS,
    multiscale_squared_error,
    quantise,
    rate_distortion,
    squared_error,
    trained_bits,
)
from transform_start import config_of, klt_start, load_released, take_over

from archive_pipeline.codec.models import DEFAULT_MODEL, shipped
from archive_pipeline.detection.detectors import import_ultralytics
from archive_pipeline.pcdc.allocation import TilePlan
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.constants import FIRST_CODED_SCALE, MAX_IMAGE_STEP, MIN_IMAGE_STEP
from archive_pipeline.pcdc.encoding import Encoding, encode_tiles
from archive_pipeline.pcdc.model import Model, build_files, stored_as
from archive_pipeline.pcdc.model_files import FILES, FORMAT, digest, transform_digest
from archive_pipeline.pcdc.training.estimates import gaussian_bits
from archive_pipeline.pcdc.transforms import TransformCodec, TransformConfig, scale_of

TRAINING = ROOT / "workflows" / "training"
train_transform = pytest.importorskip("train_transform", reason="needs the `train` extra")
train_denoiser = pytest.importorskip("train_denoiser", reason="needs the `train` extra")
training = pytest.importorskip("training", reason="needs the `train` extra")

BRIEF = ("--minutes", "0.03", "--batch", "1", "--size", "64", "--threads", "1", "--device", "cpu")


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--")


def execute(name: str, *args: object, by: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *by, str(TRAINING / name), *(str(a) for a in args)],
        capture_output=True,
        text=True,
        env=ref.subprocess_environment(TORCH_HOME=str(Path(torch.hub.get_dir()).parent)),
        timeout=300,
    )


def workflow(name: str, *args: object, by: tuple[str, ...] = ()) -> str:
    """What a workflow prints."""
    done = execute(name, *args, by=by)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(name: str, *args: object) -> str:
    """What a workflow says that has to fail."""
    done = execute(name, *args)
    assert done.returncode == 1, done.stderr
    return done.stderr


def invoked(main: click.Command, *args: object, code: int = 0) -> str:
    """What a workflow says in this process: another one imports PyTorch anew, for seconds."""
    done = CliRunner().invoke(main, [str(a) for a in args])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    for seed in range(30):
        Image.fromarray(ref.texture(80, 96, seed)).save(folder / f"{seed:02d}.png")
    packed = folder / "crops.npy"
    workflow("pack_crops.py", packed, folder)
    return packed


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    script = tmp_path / "step.py"
    script.write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(TRAINING)!r})\n"
        "import processes\n"
        "processes.join(on_cuda=False)\n"
        "rank = processes.rank()\n"
        "torch.manual_seed(rank)\n"
        "network = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 1))\n"
        "processes.copy_of_first(network)\n"
        "x = torch.arange(20.0).view(4, 5).sin()[2 * rank:][:2]\n"
        "network(x).square().mean().backward()\n"
        "processes.average_gradients(network)\n"
        "seen = processes.number_of_first(rank + 7.5, 'cpu')\n"
        "gradients = [p.grad for p in network.parameters()]\n"
        f"path = {str(tmp_path)!r} + f'/{{rank}}.pt'\n"
        "torch.save((network.state_dict(), gradients, seen), path)\n"
        "processes.leave()\n"
    )
    subprocess.run([sys.executable, *TWO_PROCESSES, str(script)], check=True, timeout=300)
    (weights, first, seen), (others, second, also) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert seen == also == 7.5
    for name, value in weights.items():
        assert torch.equal(value, others[name])
    network = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
    network.load_state_dict(weights)
    network(torch.arange(20.0).view(4, 5).sin()).square().mean().backward()
    for parameter, one, other in zip(network.parameters(), first, second, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, parameter.grad)


TAKE_STEPS = """
import sys, torch
sys.path.insert(0, {training!r})
import processes, training

def main():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    optimiser = training.make_optimiser(network, 1e-2)
    if {before!r}:
        state = torch.load({before!r}, weights_only=True)
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
    for k in {numbers!r}:
        optimiser.zero_grad()
        network(torch.arange(20.0).view(4, 5).add(k).sin()).square().mean().backward()
        processes.average_gradients(network)
        optimiser.step()
    processes.collect(optimiser)
    if processes.rank() == 0:
        state = dict(network=network.state_dict(), optimiser=optimiser.state_dict())
        torch.save(state, {after!r})

processes.join(on_cuda=False)
main()
processes.leave()
"""


@pytest.mark.slow
def test_processes_share_the_optimiser_and_a_checkpoint_has_all_of_it(tmp_path: Path) -> None:
    def take(numbers: range, before: str, after: str, by: tuple[str, ...]) -> dict[str, Any]:
        script = tmp_path / "steps.py"
        names = {"before": before and str(tmp_path / before), "after": str(tmp_path / after)}
        script.write_text(TAKE_STEPS.format(training=str(TRAINING), numbers=numbers, **names))
        subprocess.run([sys.executable, *by, str(script)], check=True, timeout=300)
        return torch.load(tmp_path / after, weights_only=True)

    alone = take(range(12), "", "alone.pt", ())
    take(range(5), "", "first.pt", TWO_PROCESSES)
    take(range(5, 9), "first.pt", "second.pt", ())
    shared = take(range(9, 12), "second.pt", "third.pt", TWO_PROCESSES)
    for name, value in alone["network"].items():
        torch.testing.assert_close(shared["network"][name], value)
    assert shared["optimiser"]["state"].keys() == alone["optimiser"]["state"].keys()


def random_detector(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "random.pt"
    import_ultralytics().YOLO("yolo11n.yaml", task="detect").save(path)
    return path


def test_a_detectors_features_tell_pictures_apart(tmp_path: Path) -> None:
    crops = torch.stack([torch.from_numpy(ref.texture(64, 96, k)) for k in range(3)])
    crops = crops.permute(0, 3, 1, 2)
    seen = load_features(str(random_detector(tmp_path)), crops)
    x = crops.float() / 127.5 - 1
    assert seen.distance(x, x).tolist() == [0, 0, 0]
    a_little, much = (
        torch.nn.functional.avg_pool2d(x, k, 1, k // 2, count_include_pad=False) for k in (3, 9)
    )
    much.requires_grad_(True)
    assert (seen.distance(a_little, x) > 0).all()
    distances = seen.distance(much, x)
    assert (distances > seen.distance(a_little, x)).all()
    each = torch.cat([seen.distance(a, b) for a, b in zip(much.split(1), x.split(1), strict=True)])
    torch.testing.assert_close(distances, each)  # batch normalisation counts nothing here
    distances.sum().backward()
    assert much.grad is not None
    assert (much.grad.abs().amax((1, 2, 3)) > 0).all()
    assert not any(p.requires_grad for p in seen.parameters())


def test_what_has_no_features(tmp_path: Path) -> None:
    crops = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    (tmp_path / "detector.onnx").write_bytes(b"")
    import_ultralytics().YOLO("yolo11n-cls.yaml", task="classify").save(tmp_path / "classes.pt")
    for name, text in {
        "detector.onnx": "neither a .pt file nor an OpenVINO folder",
        "classes.pt": "its task is classify",
        "nothing.pt": "no such file",
    }.items():
        with pytest.raises(click.ClickException, match=text):
            load_features(str(tmp_path / name), crops)


@pytest.mark.slow
@pytest.mark.usefixtures("lpips_weights")
def test_stage_1_trains_resumes_and_releases(crops: Path, tmp_path: Path) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    detector = random_detector(tmp_path)
    made = ("--architecture", "fast", "--detector", detector)
    workflow("train_transform.py", crops, "--run", run, *BRIEF, *made)
    first = torch.load(run / "checkpoint.pt", weights_only=True)
    workflow("train_transform.py", crops, "--run", run, "--resume", *BRIEF, "--minutes", "0.08")
    second = torch.load(run / "checkpoint.pt", weights_only=True)
    assert second["step"] > first["step"] > 0
    assert second["minutes"] > first["minutes"]
    more = (*BRIEF, "--minutes", "0.13")
    workflow("train_transform.py", crops, "--run", run, "--resume", *more, by=TWO_PROCESSES)
    third = torch.load(run / "checkpoint.pt", weights_only=True)
    assert third["step"] > second["step"]
    with (run / "validation.csv").open() as file:
        rows = [[float(v) for v in row] for row in csv.reader(file)]
    assert [row[0] for row in rows[::5]] == [first["step"], second["step"], third["step"]]
    assert np.isfinite(rows).all()

    sha256 = workflow("release_model.py", run / "checkpoint.pt", model).strip()
    codec = Codec(Model.from_folder(model))
    assert codec.model.sha256 == sha256
    tile = ref.texture(64, 80, 1)
    [decoded] = codec.decode(encode_tiles(codec, [tile], 3000), 64, 80)
    # an untrained start is already a transform coder
    assert np.mean((decoded.astype(float) - tile) ** 2) < np.var(tile.astype(float)) / 2


def textures(count: int, side: int = 64) -> torch.Tensor:
    """Crops uint8 (count, 3, side, side)."""
    crops = np.stack([ref.texture(side, side, seed) for seed in range(count)])
    return torch.from_numpy(crops).permute(0, 3, 1, 2)


@torch.no_grad()
def coded(
    networks: TransformCodec, crops: torch.Tensor, image_step: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Bits of crops, their reconstruction in -1..1 and its squared error in 8-bit pixels."""
    x = crops.float() / 127.5 - 1
    step = torch.full((len(x),), image_step)
    levels = torch.zeros(len(x), 1, x.shape[2] // 16, x.shape[3] // 16).long()
    bits, x_bar, _ = rate_distortion(networks.eval(), x, step, levels, noise=False)
    return bits, x_bar, float((x_bar - x).mul(127.5).square().mean())


def test_released_weights_are_a_start_with_the_same_output() -> None:
    """Also those of an earlier format (smaller kernels, no shortcut) and of fewer blocks."""
    released = ref.tiny_codec().model.networks
    deeper = {"depth_8": 2, "depth_16": 3, "extra_depth_16": 1}
    config = replace(released.config, edge_kernel=3, shortcut=1, **deeper)
    grown = TransformCodec(config)
    load_released(grown, released, textures(4))
    a, b = (coded(networks, textures(1), 30) for networks in (released, grown))
    torch.testing.assert_close(a[0], b[0], rtol=1e-3, atol=1)
    torch.testing.assert_close(a[1], b[1], rtol=1e-3, atol=0.02)


def test_a_model_grows_to_the_releases_depth_and_is_the_same_there(tmp_path: Path) -> None:
    fast, small = (train_transform.ARCHITECTURES[name] for name in ("fast", "small"))
    assert Model.from_folder(shipped() / DEFAULT_MODEL).networks.config == small
    before = train_transform.klt_codec(fast, textures(24))
    for name, content in build_files(before).items():
        (tmp_path / name).write_bytes(content)
    grown = train_transform.grown(small, tmp_path, textures(4))
    assert grown.config == small != fast
    released = Model.from_folder(tmp_path).networks
    a, b = (coded(networks, textures(1), 30) for networks in (released, grown))
    torch.testing.assert_close(a[0], b[0], rtol=1e-3, atol=1)
    torch.testing.assert_close(a[1], b[1], rtol=1e-3, atol=0.02)


def test_a_wider_transform_starts_as_the_narrower_one_and_can_use_its_width() -> None:
    released = ref.tiny_codec().model.networks
    before = released.config
    wide = replace(
        before,
        width_8=before.width_8 + 8,
        width_16=before.width_16 + 16,
        depth_16=before.depth_16 + 1,
        latents=before.latents + 8,
        shortcut=1,
    )
    grown = TransformCodec(wide)
    load_released(grown, released, textures(24))
    seen = textures(1)
    a, b = (coded(networks, seen, MAX_IMAGE_STEP) for networks in (released, grown))
    torch.testing.assert_close(a[0], b[0], rtol=1e-3, atol=1)
    torch.testing.assert_close(a[1], b[1], rtol=1e-3, atol=0.02)
    # the further channels hold something, and the first step can give them a weight
    x = seen.float() / 127.5 - 1
    offsets = torch.zeros(1, 1, x.shape[2] // 16, x.shape[3] // 16).long()
    bits, x_bar, _ = rate_distortion(grown, x, torch.tensor([30]), offsets, noise=True)
    (bits.sum() + (x_bar - x).square().sum()).backward()
    for layer in (grown.g_a.net[2].mix[0], grown.g_s.net[-2]):
        assert not layer.weight[: before.width_8, before.width_8 :].any()
        assert layer.weight.grad[: before.width_8, before.width_8 :].abs().amax() > 0


def test_latents_that_released_weights_had_not_carry_what_they_left_out() -> None:
    released = ref.tiny_codec().model.networks
    more = released.config.latents + 40
    grown = TransformCodec(replace(released.config, latents=more, edge_kernel=3, shortcut=1))
    load_released(grown, released, textures(24))
    seen = textures(2)
    # at coarse steps they are zero, and all is as it was
    a, b = (coded(networks, seen, MAX_IMAGE_STEP) for networks in (released, grown))
    torch.testing.assert_close(a[0], b[0], rtol=1e-3, atol=1)
    torch.testing.assert_close(a[1], b[1], rtol=1e-3, atol=0.02)
    # at fine ones they take a good part of the error away
    a, b = (coded(networks, seen, MIN_IMAGE_STEP) for networks in (released, grown))
    assert b[2] < 0.7 * a[2]
    # what they are coded with fits them: another scale would take more
    with torch.no_grad():
        last = grown.h_scale.layers[-1]
        bias = last.bias.clone()
        for shift in (-4.0, 4.0):  # of 8, the gain: two octaves down and up
            last.bias[released.config.latents :] = bias[released.config.latents :] + shift
            assert coded(grown, seen, MIN_IMAGE_STEP)[0].sum() > b[0].sum()


@pytest.mark.parametrize(
    "config",
    [
        TransformConfig(),
        TransformConfig(latents=192, edge_kernel=1, shortcut=0),
        TransformConfig(12, 8, 16, 16, 1, 1),
        TransformConfig(12, 8, 16, 16, 2, 3, shortcut=0, extra_depth_16=0),
    ],
)
def test_weights_say_what_widths_they_are_of(config: TransformConfig) -> None:
    with torch.device("meta"):
        weights = TransformCodec(config).state_dict()
    assert config_of(weights) == config
    del weights["prior.knots"]
    with pytest.raises(click.ClickException, match=r"'prior\.knots' is missing"):
        config_of(weights)


def test_a_checkpoint_of_an_earlier_format_is_released_as_such(tmp_path: Path) -> None:
    networks = ref.tiny_codec().model.networks
    write_checkpoint(tmp_path / "checkpoint.pt", {"average": networks.state_dict()})
    folder = tmp_path / "model"
    workflow("release_model.py", tmp_path / "checkpoint.pt", folder)
    released = Model.from_folder(folder).networks
    assert released.config == networks.config
    for name, value in networks.state_dict().items():
        kept = value.to(stored_as(name, FORMAT)).float()
        assert torch.equal(released.state_dict()[name], kept), name


def test_a_release_may_lie_between_the_one_before_and_what_training_made_of_it(
    tmp_path: Path,
) -> None:
    before = ref.tiny_codec().model.networks
    trained = {k: v + torch.randn_like(v) / 8 for k, v in before.state_dict().items()}
    write_checkpoint(tmp_path / "checkpoint.pt", {"average": trained})
    old, new = ref.write_model(tmp_path / "old"), tmp_path / "new"
    command = (release_model.main, tmp_path / "checkpoint.pt", new, "--blend")
    invoked(*command, old, "--share", "0.25")
    for name, value in Model.from_folder(new).networks.state_dict().items():
        between = 0.75 * before.state_dict()[name] + 0.25 * trained[name]
        kept = between.to(stored_as(name, FORMAT)).float()
        torch.testing.assert_close(value, kept, rtol=0, atol=2**-8)  # the scales' grid
    assert "is of another architecture" in invoked(*command, shipped() / DEFAULT_MODEL, code=1)
    assert "config.json: No such file" in invoked(*command, tmp_path, code=1)


def test_a_release_may_lie_between_one_of_fewer_blocks_and_what_training_made_of_it(
    tmp_path: Path,
) -> None:
    before = ref.tiny_codec().model.networks
    deeper = TransformCodec(replace(before.config, depth_8=2, depth_16=3, extra_depth_16=1))
    take_over(deeper, before)
    average = {k: v + torch.randn_like(v) / 8 for k, v in deeper.state_dict().items()}
    old = ref.write_model(tmp_path / "old")
    torch.testing.assert_close(release_model.blended(average, old, 1.0), average)
    start = TransformCodec(deeper.config)
    start.load_state_dict(release_model.blended(average, old, 0.0))
    a, b = (coded(networks, textures(1), 30) for networks in (before, start))
    torch.testing.assert_close(a[:2], b[:2])
    # half-way the further blocks do half of what they learned
    half, name = release_model.blended(average, old, 0.5), "g_a.net.3.mix"
    torch.testing.assert_close(half[f"{name}.0.weight"], average[f"{name}.0.weight"])
    torch.testing.assert_close(half[f"{name}.2.weight"], average[f"{name}.2.weight"] / 2)
    (tmp_path / "deeper").mkdir()
    for name, content in build_files(deeper).items():
        (tmp_path / "deeper" / name).write_bytes(content)
    with pytest.raises(click.ClickException, match="is of another architecture"):
        # blocks would be lost
        release_model.blended(dict(before.state_dict()), tmp_path / "deeper", 0.5)


def test_the_transform_of_training_patches_fills_all_latents() -> None:
    """More of them leave out less, through the shortcut where the networks are narrower."""
    errors = []
    for latents in (16, 32, 64):
        torch.manual_seed(0)
        networks = TransformCodec(TransformConfig(latents, 8, 16, 16, 1, 1))
        klt_start(networks, textures(24))
        errors.append(coded(networks, textures(2), MIN_IMAGE_STEP)[2])
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.8 * errors[1]


def test_image_steps_cover_the_range_in_every_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([random_steps(6, generator) for _ in range(4000)])
    assert draws.min() == MIN_IMAGE_STEP
    assert draws.max() == MAX_IMAGE_STEP
    share = (torch.arange(24000) + 0.5) / 24000
    bell = torch.where(share < 0.5, (share / 2).sqrt(), 1 - ((1 - share) / 2).sqrt()) ** 0.65
    place = torch.cat([bell] * 13 + [share] * 7)  # 35 % from the whole range alike
    expected = (MIN_IMAGE_STEP + place * (MAX_IMAGE_STEP + 1 - MIN_IMAGE_STEP)).long()
    assert abs(draws.float().mean() - expected.float().mean()) < 0.2
    assert abs(draws.float().std() - expected.float().std()) < 0.2
    # batches are more alike than if all were drawn apart: most hold some of each
    assert draws.float().mean(1).std() < 0.6 * draws.float().std() / 6**0.5


def test_tables_are_fitted_to_the_symbols(crops: Path) -> None:
    networks = ref.tiny_codec().model.networks
    shares = fitted_tables(networks, crops, 64, 24)
    for row in shares:
        assert len(row) % 2
        assert len(row) >= 9
        assert row.sum() == pytest.approx(1)
        np.testing.assert_allclose(row, row[::-1], atol=1e-12)
    # pictures that are not among the crops take fewer bytes, if coded with the same symbols
    gaussian, fitted = (Codec(Model(build_files(networks, s))) for s in (None, shares))
    tiles = [ref.texture(192, 160, seed) for seed in range(40, 44)]
    for image_step in (20, 35, 50):
        job = Encoding(gaussian, tiles)
        plans = [TilePlan(image_step, np.full(g, 3, np.uint8)) for g in job.allocator.grids]
        said = gaussian.decode_symbols(job.streams(plans), 192, 160)
        again = Encoding(fitted, tiles)
        again.rounding.least_kept = job.rounding.least_kept
        streams = again.streams(plans)
        for a, b in zip(said, fitted.decode_symbols(streams, 192, 160), strict=True):
            np.testing.assert_array_equal(a.q, b.q)
        assert sum(map(len, streams)) < sum(map(len, job.streams(plans)))


@functools.cache
def other_transform() -> dict[str, bytes]:
    """Files of a transform codec of the default widths, other than the shipped one."""
    torch.manual_seed(3)
    return build_files(TransformCodec())


@pytest.fixture
def shipped_transform(tmp_path: Path) -> Path:
    """A model folder with the shipped transform codec and no denoiser."""
    model = tmp_path / "model"
    model.mkdir()
    for name in FILES:
        (model / name).write_bytes((shipped() / DEFAULT_MODEL / name).read_bytes())
    return model


@pytest.mark.slow
@pytest.mark.usefixtures("lpips_weights")
def test_stage_2_trains_and_releases_for_its_own_transform_only(
    crops: Path, shipped_transform: Path, tmp_path: Path
) -> None:
    model, run = shipped_transform, tmp_path / "run"
    workflow("train_denoiser.py", crops, "--model", model, "--run", run, *BRIEF)
    sha256 = workflow("release_model.py", run / "checkpoint.pt", model).strip()
    released = Model.from_folder(model)
    assert released.sha256 == sha256
    assert released.has_denoiser
    codec = Codec(released)
    streams = encode_tiles(codec, [ref.texture(64, 64)], 2000)
    assert codec.decode(streams, 64, 64, 1)[0].shape == (64, 64, 3)

    other = ref.write_model(tmp_path / "other")
    assert "was trained for transform" in refusal("release_model.py", run / "checkpoint.pt", other)


@pytest.mark.slow
@pytest.mark.usefixtures("lpips_weights")
def test_stage_2_starts_from_the_denoiser_of_another_transform(crops: Path, tmp_path: Path) -> None:
    """A released one, and a run's checkpoint, which --resume refuses for another transform."""
    model = tmp_path / "other"
    model.mkdir()
    for name, content in other_transform().items():
        (model / name).write_bytes(content)
    first, second = tmp_path / "first", tmp_path / "second"
    args = (crops, "--model", model, *BRIEF, "--lr", "1e-12")  # what is trained stays as it was
    workflow("train_denoiser.py", *args, "--run", first, "--start", shipped() / DEFAULT_MODEL)
    state = torch.load(first / "checkpoint.pt", weights_only=True)
    assert state["model"] == digest(other_transform())
    assert state["step"] > 0
    expected = Model.from_folder(shipped() / DEFAULT_MODEL).denoiser().state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(state["average"][name], value, rtol=1e-4, atol=1e-6)

    args = (crops, "--model", DEFAULT_MODEL, *BRIEF)
    problem = refusal("train_denoiser.py", *args, "--run", first, "--resume")
    assert f"is a run for transform {state['model'][:12]}" in problem
    workflow("train_denoiser.py", *args, "--run", second, "--start", first / "checkpoint.pt")
    moved = torch.load(second / "checkpoint.pt", weights_only=True)
    assert moved["model"] == transform_digest(Model.from_folder(shipped() / DEFAULT_MODEL).files)
    assert moved["step"] > 0


def test_starts_that_hold_no_denoiser(shipped_transform: Path, tmp_path: Path) -> None:
    denoiser = train_denoiser.Denoiser(latents=24, width_8=32, width_16=32, layers=1)
    checkpoint = tmp_path / "checkpoint.pt"
    for text, state in {
        "no checkpoint of a denoiser": {"codec": {}, "average": {}},
        "no checkpoint of a training stage": {"weights": {}},
        "a denoiser of other widths": {"denoiser": {}, "average": denoiser.state_dict()},
    }.items():
        write_checkpoint(checkpoint, state)
        with pytest.raises(click.ClickException, match=text):
            train_denoiser.load_start(train_denoiser.Denoiser(), checkpoint)
    checkpoint.write_bytes(b"no")
    with pytest.raises(click.ClickException, match=r"checkpoint\.pt is no checkpoint"):
        train_denoiser.load_start(denoiser, checkpoint)
    with pytest.raises(click.ClickException, match="has no denoiser"):
        train_denoiser.load_start(denoiser, shipped_transform)


def test_both_stages_quantise_alike() -> None:
    """What the denoiser is shown is what the transform's rate and error are measured on."""
    networks = ref.tiny_codec().model.networks
    x = torch.from_numpy(ref.texture(64, 128)).permute(2, 0, 1)[None].float() / 127.5 - 1
    step, offsets = torch.tensor([30]), torch.zeros(1, 1, 4, 8).long()
    offsets[..., 4:] = -8
    with torch.no_grad():
        _, expected, steps = rate_distortion(networks, x, step, offsets, noise=False)
    y_hat, exponent, x_bar = train_denoiser.decode(networks, x, step, offsets)
    torch.testing.assert_close(x_bar, expected)
    torch.testing.assert_close(networks.g_s(y_hat, exponent), x_bar)
    latents = quantise(networks, x, step, offsets)
    assert torch.equal(latents.step, steps)
    assert torch.equal(latents.q, latents.q.round())
    assert (latents.q.abs() <= latents.v.abs() + 0.5 + 1e-4).all()
    assert (latents.q.abs() >= latents.v.abs() - 1.5 - 1e-4).all()
    # as the encoder does, but for latents that it does not code
    job = Encoding(ref.tiny_codec(), [ref.texture(64, 128)])
    levels = np.repeat([[3, 3, 5, 5]], 2, 0).astype(np.uint8)
    q = job.reconstruct(0, TilePlan(30, levels)).q
    coded = (latents.scale[0] >= scale_of(torch.tensor(FIRST_CODED_SCALE))).numpy()
    same = q[coded] == latents.q[0].numpy()[coded]
    assert q[coded].any()
    assert same.mean() > 0.995


def test_scales_learn_from_symbols_and_latents_from_noise() -> None:
    torch.manual_seed(0)
    exact = torch.full((4000,), 0.4, requires_grad=True)
    symbols = torch.zeros(4000)  # as rounded: noise would reach beyond
    scale = torch.full((4000,), 0.25, requires_grad=True)
    bits = trained_bits(exact, symbols, scale)
    torch.testing.assert_close(bits, gaussian_bits(symbols, scale))
    bits.sum().backward()
    assert exact.grad is not None
    assert scale.grad is not None
    assert exact.grad.mean() > 0.1  # nearer to the mean is cheaper, though the symbol is the same
    assert (scale.grad > 0).all()  # all symbols are zero: the narrower the better
    scale.grad = None
    gaussian_bits(exact.detach() + torch.rand(4000) - 0.5, scale).sum().backward()
    assert scale.grad.mean() < 0  # what noise alone would have taught


def test_errors_of_colour_count_less() -> None:
    x = torch.zeros(1, 3, 2, 2)
    grey = squared_error(x + 2 / 127.5, x)
    torch.testing.assert_close(grey, torch.full_like(grey, 4.0))
    colour = torch.tensor([0.587, -0.299, 0.0]).view(1, 3, 1, 1) / 127.5  # of no luma
    errors = squared_error(x + colour, x)
    torch.testing.assert_close(
        errors[0, :, 0, 0], 0.5 * torch.tensor([0.587**2, 0.299**2, 0.0]), atol=1e-6, rtol=1e-4
    )


def test_errors_that_a_reduced_picture_shows_count_more() -> None:
    x = torch.zeros(1, 3, 8, 8)
    flat = multiscale_squared_error(x + 2 / 127.5, x)
    torch.testing.assert_close(flat, torch.full_like(flat, 4.0 * (1 + sum(COARSE_WEIGHTS))))
    board = (torch.arange(8) % 2 * 4.0 - 2)[None] * (torch.arange(8) % 2 * 2.0 - 1)[:, None]
    fine = multiscale_squared_error(x + board / 127.5, x)
    torch.testing.assert_close(fine, torch.full_like(fine, 4.0))


def test_bfloat16_is_used_where_it_is_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(precision: str, amx: bool = False) -> bool:
        monkeypatch.setattr("archive_pipeline.pcdc.precision._has_amx", lambda: amx)
        return settings(tmp_path, precision=precision).in_bfloat16

    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert chosen("auto", amx=True)
    assert not chosen("auto")
    assert chosen("bfloat16")
    assert not chosen("float32", amx=True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert not chosen("auto", amx=True)


def test_bfloat16_autocast_keeps_the_integer_network_exact() -> None:
    """Rate and error stay near float32's, and gradients reach all parts."""
    networks = TransformCodec(ref.tiny_codec().model.networks.config)
    networks.load_state_dict(ref.tiny_codec().model.networks.state_dict())
    x = torch.from_numpy(ref.texture(64, 64)).permute(2, 0, 1)[None].float() / 127.5 - 1
    step, offsets = torch.tensor([30]), torch.zeros(1, 1, 4, 4).long()
    with torch.no_grad():
        exact = rate_distortion(networks, x, step, offsets, noise=False)
    seen = {}
    networks.h_scale.register_forward_hook(lambda *a: seen.update(index=a[2], z_hat=a[1][0]))
    with torch.autocast("cpu", torch.bfloat16):
        bits, x_bar, _ = rate_distortion(networks, x, step, offsets, noise=True)
    assert torch.equal(seen["index"], networks.h_scale(seen["z_hat"], step))
    assert torch.equal(seen["index"].short(), networks.h_scale.indices(seen["z_hat"], step))
    assert bits.dtype == torch.float32
    assert float(bits.detach()) == pytest.approx(float(exact[0]), rel=0.1)
    assert float((x_bar.detach() - exact[1]).abs().mean()) < 0.02
    (bits.sum() + x_bar.float().square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in networks.parameters())


@pytest.mark.slow
def test_both_stages_can_be_compiled() -> None:
    """Traced without a break, forwards and backwards, as CUDA runs are; no code is generated."""
    networks = TransformCodec(ref.tiny_codec().model.networks.config)
    networks.load_state_dict(ref.tiny_codec().model.networks.state_dict())
    x = torch.from_numpy(ref.texture(64, 64)).permute(2, 0, 1)[None].float() / 127.5 - 1
    step, offsets = torch.tensor([30]), torch.zeros(1, 1, 4, 4).long()
    gradients = []
    for forward in (
        rate_distortion,
        torch.compile(rate_distortion, backend="aot_eager", fullgraph=True),
    ):
        bits, x_bar, _ = forward(networks, x, step, offsets, noise=False)
        networks.zero_grad()
        (bits.sum() + x_bar.square().sum()).backward()
        gradients.append([p.grad.clone() for p in networks.parameters() if p.grad is not None])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)

    denoiser = train_denoiser.Denoiser(latents=24, width_8=32, width_16=32, layers=1)
    nn.init.normal_(denoiser.unet.conv_out.weight, std=0.1)
    arguments = (x, torch.tensor([50]), torch.zeros(1, 24, 4, 4), step.view(1, 1, 1, 1) + offsets)
    with torch.no_grad():
        eager = denoiser(*arguments, x)
        compiled = torch.compile(denoiser, backend="aot_eager", fullgraph=True)(*arguments, x)
    assert (eager - x).abs().mean() > 0.01
    torch.testing.assert_close(compiled, eager)


# ------------------------------------------------------------------------------ shared parts


def settings(folder: Path, **changes: object) -> training.Settings:
    values = {"crops": folder, "folder": folder, "minutes": 1.0, "device": "cpu", "batch": 1}
    values |= {"size": 64, "lr": 0.1, "seed": 0, "threads": 0, "start": None}
    values |= {"resume": False, "compile": None, "precision": "float32"}
    return training.Settings(**{**values, **changes})


def test_learning_rate() -> None:
    """Up in a line, down in half a cosine, and never to nothing."""
    assert training.learning_rate(0.5, 0, 0) == pytest.approx(0.5 / 200)
    assert training.learning_rate(0.5, 99, 0) == pytest.approx(0.25)
    assert training.learning_rate(0.5, 10**6, 0) == 0.5
    assert training.learning_rate(0.5, 10**6, 0.5) == pytest.approx(0.25)
    assert training.learning_rate(0.5, 10**6, 1) == pytest.approx(0.01)


def make_run(folder: Path, **changes: object) -> training.Run:
    torch.manual_seed(0)
    network, average = nn.Linear(3, 2), nn.Linear(3, 2)
    average.load_state_dict(network.state_dict())
    options = settings(folder, **changes)
    run = training.Run(options, "net", network, average, clip=1.0, measure="bpp", notes={"a": "b"})
    if options.resume:
        run.restore(read_checkpoint(options.checkpoint))
    run.begin()
    return run


def take_step(run: training.Run, factor: float = 1.0) -> None:
    x = torch.linspace(-1, 1, 12).view(4, 3)
    run.update(factor * (run.network(x) - x.sum(1, keepdim=True)).square().mean())


def test_a_resumed_run_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(training.time, "monotonic", lambda: 0.6 * next(clock))
    whole = make_run(tmp_path, minutes=0.2)
    for _ in range(3):
        take_step(whole)
    whole.save()
    resumed = make_run(tmp_path, minutes=0.2, resume=True)
    assert (resumed.step, resumed.minutes) == (3, pytest.approx(0.03))
    for _ in range(2):
        take_step(whole)
        take_step(resumed)
    for one, other in ((whole.network, resumed.network), (whole.average, resumed.average)):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b)
    assert resumed.step == whole.step == 5
    assert set(read_checkpoint(tmp_path / "checkpoint.pt")) == {
        *("net", "average", "optimiser", "step", "minutes", "cosine", "a")
    }
    assert not (tmp_path / "checkpoint.part").exists()


def test_minutes_that_are_added_begin_a_new_cosine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(training.time, "monotonic", lambda: 0.6 * next(clock))
    ended = make_run(tmp_path, minutes=0.1)
    while not ended.finished:
        take_step(ended)
    ended.save()
    lowest, warmth = ended.rate, 12 / training.WARM_UP
    longer = make_run(tmp_path, minutes=0.3, resume=True)
    take_step(longer)
    assert longer.rate == pytest.approx(0.1 * (ended.step + 1) / training.WARM_UP, rel=0.02)
    assert longer.rate > 10 * lowest
    for _ in range(9):
        take_step(longer)
    longer.save()
    again = make_run(tmp_path, minutes=0.3, resume=True)
    assert again.began == longer.began == pytest.approx(0.1, abs=0.02)
    take_step(again)
    assert 0 < again.rate < 0.6 * 0.1 * warmth * 2
    assert again.rate == pytest.approx(
        training.learning_rate(0.1, longer.step, (longer.minutes - 0.1) / 0.2), rel=0.05
    )


def test_gradients_that_are_not_finite_change_no_weights(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for _ in range(2):  # SOAP's first step only measures
        take_step(run)
    before = [p.clone() for p in run.network.parameters()]
    take_step(run, float("nan"))
    assert run.step == 3
    assert all(torch.equal(a, b) for a, b in zip(before, run.network.parameters(), strict=True))
    take_step(run)
    assert not torch.equal(before[0], next(run.network.parameters()))
    assert all(p.isfinite().all() for p in run.average.parameters())


def test_averages_follow() -> None:
    network, average = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.ones_(network.weight)
    nn.init.zeros_(average.weight)
    training.follow(average, network, 0)  # decay 1 / 10
    assert average.weight.item() == pytest.approx(0.9)
    training.follow(average, network, 10**6)
    assert average.weight.item() == pytest.approx(0.9 + 0.1 * 0.001)


def test_log_and_validation_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    take_step(run)
    run.log(2.5, 0.25, 255**2 / 1000)
    run.report([(16, "1.5"), (24, "0.7")], "fine")
    rows = list(csv.reader((tmp_path / "log.csv").open()))
    assert rows[0] == ["step", "minutes", "lr", "loss", "bpp", "psnr", "grad"]
    assert rows[1][0::3] == ["1", "2.5000", rows[1][6]]
    assert rows[1][4:6] == ["0.2500", "30.00"]
    validation = list(csv.reader((tmp_path / "validation.csv").open()))
    assert [row[0:1] + row[2:] for row in validation] == [["1", "16", "1.5"], ["1", "24", "0.7"]]


def test_runs_are_not_overwritten_and_nothing_is_resumed_from_nowhere(
    crops: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for stage in (train_transform, train_denoiser):
        args = [str(crops), "--run", str(run), *BRIEF]
        nothing = CliRunner().invoke(stage.main, [*args, "--resume"])
        assert nothing.exit_code == 1
        assert "no such file to resume from" in nothing.stderr
        odd = CliRunner().invoke(stage.main, [*args, "--size", "100"])
        assert odd.exit_code == 2
        assert "100 is no multiple of 64" in odd.stderr
    run.mkdir()
    (run / "checkpoint.pt").write_bytes(b"precious")
    kept = CliRunner().invoke(train_transform.main, args)
    assert kept.exit_code == 1
    assert "holds a run: --resume it, or name another" in kept.stderr
    assert (run / "checkpoint.pt").read_bytes() == b"precious"


def test_crops_need_two_large_enough_images(crops: Path) -> None:
    assert Crops(crops, 64, 0).batch(2).shape == (2, 3, 64, 64)
    with pytest.raises(click.ClickException, match="fewer than 2 images of at least 128"):
        Crops(crops, 128, 0)


def test_the_same_images_are_held_out_at_every_size(tmp_path: Path) -> None:
    for k in range(60):
        side = 192 if k in (1, 2) else 128 if k in (25, 26) else 64
        Image.fromarray(np.full((side, side, 3), k, np.uint8)).save(tmp_path / f"{k:02d}.png")
    invoked(pack_crops.main, tmp_path / "crops.npy", tmp_path)
    held_out = {}
    for size in (64, 128, 192):
        crops = Crops(tmp_path / "crops.npy", size, 0)
        held_out[size] = [e[0] for e in crops.held_out]
        assert not {*held_out[size]} & {e[0] for e in crops.train}
    # of images none of which is a 25th, one is held out nevertheless
    assert held_out == {64: ["00.png", "25.png", "50.png"], 128: ["25.png"], 192: ["01.png"]}


def test_crops_are_made_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ramp's slope tells the scale: half of the crops as they are, half up to four times."""
    monkeypatch.setattr(training_samples, "COLLAGES", 0)
    monkeypatch.setattr(training_samples, "RECOLOURED", 0)
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 256, 1)
    for k in range(2):
        Image.fromarray(np.stack([ramp] * 3, 2)).save(tmp_path / f"{k}.png")
    invoked(pack_crops.main, tmp_path / "crops.npy", tmp_path)
    batch = Crops(tmp_path / "crops.npy", 64, 0).batch(400).float().mean(1)
    slopes = torch.maximum(
        (batch[:, -1] - batch[:, 0]).abs().amax(1), (batch[:, :, -1] - batch[:, :, 0]).abs().amax(1)
    )
    scale = slopes / 63
    assert 160 < (scale < 1.1).sum() < 260
    assert (scale > 2).sum() > 60
    assert scale.max() < 4.2


def test_collages_have_a_sharp_front_and_a_blurred_ground(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_samples, "SMALLEST_SCALE", 1)
    monkeypatch.setattr(training_samples, "DEFOCUS", (4, 4))
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    for k in range(2):
        Image.fromarray(noise[k]).save(tmp_path / f"{k}.png")
    invoked(pack_crops.main, tmp_path / "crops.npy", tmp_path)

    def busy(share: float) -> torch.Tensor:
        """Which cells of 8 x 8 pixels of 50 crops are as restless as the noise is."""
        monkeypatch.setattr(training_samples, "COLLAGES", share)
        batch = Crops(tmp_path / "crops.npy", 64, 0).batch(50).float()
        return batch.unfold(2, 8, 8).unfold(3, 8, 8).std((1, 4, 5)) > 30

    assert busy(0).all()
    shares = busy(1).float().mean((1, 2))
    assert 0.05 < shares.mean() < 0.6
    assert shares.std() > 0.05
    assert shares.max() > 0.5  # polygons; lines leave less


def test_other_colours_change_contrast_and_saturation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = np.full((64, 64, 3), (90, 90, 120), np.uint8)
    halves[32:] = (130, 130, 160)
    for k in range(2):
        Image.fromarray(halves).save(tmp_path / f"{k}.png")
    invoked(pack_crops.main, tmp_path / "crops.npy", tmp_path)
    for name, value in {"COLLAGES": 0, "RECOLOURED": 1, "SATURATION": (2, 2)}.items():
        monkeypatch.setattr(training_samples, name, value)
    for contrast in (0.5, 1.5):
        monkeypatch.setattr(training_samples, "CONTRAST", (contrast, contrast))
        [crop] = Crops(tmp_path / "crops.npy", 64, 0).batch(1).float()
        grey = crop.mean(0)
        assert abs(float(grey.mean()) - 120) < 1
        assert abs(float(grey.max() - grey.min()) - 40 * contrast) < 1
        assert abs(float((crop.amax(0) - crop.amin(0)).mean()) - 2 * 30 * contrast) < 1


# -------------------------------------------------------------------------------------- plots


@pytest.mark.parametrize("measure", ["bpp", "lpips"])
def test_plots(measure: str, tmp_path: Path) -> None:
    plot = pytest.importorskip("plot_training")
    pytest.importorskip("matplotlib")
    (tmp_path / "log.csv").write_text(
        f"step,minutes,lr,loss,{measure},psnr,grad\n"
        "50,1.0,1e-3,2.0,0.5,30,1\n"
        "100,2.0,1e-3,1.5,0.4,31,1\n"
        "200,3.0,1e-3,9.0,0.4,31,1\n"  # lost: the session after resumed from step 120
        "150,3.1,1e-3,1.4,0.4,31,1\n"
    )
    steps, more = ("", ",0.1,0.2") if measure == "bpp" else ("1,", ",31.0,0.4")
    (tmp_path / "validation.csv").write_text(
        f"60,1.2,16,{steps}1.2,35.0{more}\n60,1.2,24,{steps}0.7,33.0{more}\n"
        f"120,2.4,16,{steps}1.1,35.5{more}\n120,2.4,24,{steps}0.6,33.5{more}\n"
    )
    logs = plot.Logs.read(tmp_path)
    assert logs.log["loss"].tolist() == [2.0, 1.5, 1.4]
    assert logs.validation.tolist()[3][:5] == [2.4, 24, 1, 0.6, 33.5]
    result = CliRunner().invoke(plot.main, [str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "training.png").size[0] > 1000
    assert "<svg" in (tmp_path / "training.svg").read_text()


def test_plots_of_something_else(tmp_path: Path) -> None:
    plot = pytest.importorskip("plot_training")
    missing = CliRunner().invoke(plot.main, [str(tmp_path)])
    assert missing.exit_code == 1
    assert "log.csv: No such file" in missing.stderr
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    other = CliRunner().invoke(plot.main, [str(tmp_path)])
    assert other.exit_code == 1
    assert "holds no logs of a training run" in other.stderr
