"""The diffusion decoder: reproducible pixels, archives that carry it, hostile model files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from golden import reference as ref
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.constants import CELL_SAMPLES
from archive_pipeline.pcdc.decoding import tile_seed
from archive_pipeline.pcdc.denoiser import Denoiser, grain_of, sample, scheduler
from archive_pipeline.pcdc.diffusion import NOISE_LEVELS, signal_powers, timesteps, white_noise
from archive_pipeline.pcdc.encoding import encode_tiles
from archive_pipeline.pcdc.layers import luma
from archive_pipeline.pcdc.model import Model
from archive_pipeline.pcdc.model_files import (
    DENOISER_CONFIG,
    DENOISER_WEIGHTS,
    ModelError,
    read_folder,
)
from archive_pipeline.pcdc.reader import decoder
from archive_pipeline.pcdc.reader.decoder import Reader
from archive_pipeline.store.stored_models import decoders_of

IMAGE = "DJI_0001.JPG"


@cache
def codec() -> Codec:
    return Codec(Model(ref.denoising_files()))


@pytest.fixture(scope="module")
def streams() -> list[bytes]:
    tiles = [ref.texture(96, 64, 1), ref.texture(40, 70, 2), ref.texture(1, 1), ref.texture(0, 0)]
    return encode_tiles(codec(), tiles, 3000)


def test_steps_zero_is_the_deterministic_decoder(streams: list[bytes]) -> None:
    for stream in streams:
        [symbols] = codec().decode_symbols([stream], 4096, 4096)
        [expected] = codec().synthesise([symbols])
        np.testing.assert_array_equal(codec().decode([stream], 4096, 4096)[0], expected)


def test_pixels_depend_on_the_tile_and_the_seed_only(streams: list[bytes]) -> None:
    steps = 2
    with ref.threads(1):
        together = codec().decode(streams, 4096, 4096, steps, 5)
    with ref.threads(2):
        backwards = codec().decode(streams[::-1], 4096, 4096, steps, 5)[::-1]
        alone = [codec().decode([s], 4096, 4096, steps, 5)[0] for s in streams]
    other = codec().decode(streams, 4096, 4096, steps, 6)
    plain = codec().decode(streams, 4096, 4096)
    for a, b, c in zip(together, backwards, alone, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    for k in range(2):
        assert together[k].shape == plain[k].shape
        assert (together[k] != other[k]).mean() > 0.1
        assert (together[k] != plain[k]).mean() > 0.1
    assert together[3].size == 0


def test_realism_is_how_much_of_the_change_is_shown(streams: list[bytes]) -> None:
    """None of it is the deterministic picture to the bit, a half is half of the way."""

    def pixels(steps: int, realism: float) -> np.ndarray:
        return codec().decode(streams[:1], 4096, 4096, steps, 5, realism)[0].astype(np.float64)

    plain, half, all_of_it = pixels(0, 1.0), pixels(1, 0.5), pixels(1, 1.0)
    np.testing.assert_array_equal(pixels(1, 0.0), plain)
    assert np.abs(all_of_it - plain).max() >= 8
    inside = (all_of_it > 0) & (all_of_it < 255)  # what is clipped lies further away
    np.testing.assert_allclose(half[inside], ((plain + all_of_it) / 2)[inside], atol=1)


def test_equal_tiles_of_one_image_differ_only_by_their_streams() -> None:
    assert tile_seed(b"a", 0) != tile_seed(b"b", 0)
    assert tile_seed(b"a", 1) == (tile_seed(b"a", 0) + 1) % 2**63
    assert 0 <= tile_seed(b"a", 2**63 - 1) < 2**63


def test_one_step_is_one_prediction_from_noise_on_x_bar() -> None:
    """Sampling, written out by hand for one step and for two."""
    denoiser = codec().model.denoiser()
    generator = torch.Generator().manual_seed(7)
    y_hat = torch.randn(1, 24, 17, 16)
    exponent = torch.full((1, 1, 17, 16), 30)
    x_bar = torch.rand(1, 3, 272, 256) - 0.5
    noise = torch.randn(x_bar.shape, generator=generator)
    kept = scheduler().alphas_cumprod
    last, half = kept[NOISE_LEVELS - 1], kept[NOISE_LEVELS // 2 - 1]
    x_t = last.sqrt() * x_bar + (1 - last).sqrt() * noise
    with torch.no_grad():
        first = denoiser(x_t, torch.tensor(NOISE_LEVELS - 1), y_hat, exponent, x_bar)
        error = (x_t - last.sqrt() * first) / (1 - last).sqrt()
        x_half = half.sqrt() * first + (1 - half).sqrt() * error
        second = denoiser(x_half, torch.tensor(NOISE_LEVELS // 2 - 1), y_hat, exponent, x_bar)
    torch.testing.assert_close(sample(denoiser, y_hat, exponent, x_bar, 1, [7]), first)
    torch.testing.assert_close(sample(denoiser, y_hat, exponent, x_bar, 2, [7]), second)


def test_an_untrained_denoiser_is_the_deterministic_decoder() -> None:
    denoiser = Denoiser(**ref.DENOISER_WIDTHS).eval()
    y_hat, x_bar = torch.randn(1, 24, 2, 2), torch.rand(1, 3, 32, 32)
    out = sample(denoiser, y_hat, torch.zeros(1, 1, 2, 2).long(), x_bar, 1, [0])
    torch.testing.assert_close(out, x_bar)


def test_grain_is_noise_of_the_octaves_and_strengths_that_gains_ask_for() -> None:
    noise = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    for octave in range(3):
        for colour in range(2):
            gains = torch.zeros(1, 6, 32, 32)
            gains[:, 2 * octave + colour] = 0.1
            grain = grain_of(noise, gains)
            # noise of three channels has less luma than each of them
            assert luma(grain).std().item() == pytest.approx(0 if colour else 0.067, abs=0.003)
            power = np.abs(np.fft.fft2(grain[0, 0].numpy())) ** 2
            far = np.hypot(*np.meshgrid(*2 * [np.fft.fftfreq(256)]))
            middle = (power * far).sum() / power.sum()  # cycles a pixel
            assert 0.25 / 2**octave < middle < 0.52 / 2**octave
    half = torch.zeros(1, 6, 32, 32)
    half[..., :16] = 0.1
    grain = grain_of(noise, half)
    assert grain[..., :116].std() > 0.05
    assert not grain[..., 140:].any()


def test_gains_see_the_noise_whatever_its_level() -> None:
    """A denoiser that only adds grain adds the same at all levels: it knows the noise."""
    denoiser = Denoiser(**ref.DENOISER_WIDTHS, grain=1).eval()
    torch.nn.init.constant_(denoiser.unet.conv_out.bias[CELL_SAMPLES:], 0.1)
    y_hat, exponent, x_bar = (
        torch.zeros(1, 24, 4, 4),
        torch.zeros(1, 1, 4, 4),
        torch.rand(1, 3, 64, 64),
    )
    noise = torch.randn(x_bar.shape, generator=torch.Generator().manual_seed(1))
    for level in (20, NOISE_LEVELS - 1):
        t = torch.tensor([level])
        with torch.no_grad():
            out = denoiser(scheduler().add_noise(x_bar, noise, t), t, y_hat, exponent, x_bar)
        expected = x_bar + grain_of(noise, torch.full((1, 2, 8, 8), 0.1))
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


def test_a_model_without_denoiser_says_so(streams: list[bytes]) -> None:
    plain = Codec(Model(ref.tiny_files()))
    [stream] = encode_tiles(plain, [ref.texture(64, 64)], 2000)
    for made in (plain, Reader(ref.tiny_files())):
        with pytest.raises(ModelError, match="has no denoiser"):
            made.decode([stream], 64, 64, 1)


def test_the_forward_process_is_that_of_diffusers() -> None:
    process = scheduler()
    np.testing.assert_allclose(signal_powers(), process.alphas_cumprod.numpy(), atol=1e-6)
    for steps in (1, 2, 3, 4, 7, 8, 32, 100):
        process.set_timesteps(steps)
        assert timesteps(steps) == process.timesteps.tolist()


def test_noise_is_the_same_for_a_seed_for_ever() -> None:
    """Restored pictures can be made again. PyTorch draws these numbers, too, up to rounding."""
    noise = white_noise(7, (1, 3, 16, 16))
    known = [-0.8201345, 0.3956312, 0.8989085, -1.3884039, -0.1669960, 0.2851500]
    np.testing.assert_allclose(noise.reshape(-1)[:6], known, atol=1e-6)
    for seed in (0, 2**63 - 1):
        drawn = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(seed))
        np.testing.assert_allclose(white_noise(seed, drawn.shape), drawn.numpy(), atol=2e-6)


# -------------------------------------------------------------------- hostile files


def changed(**settings: object) -> dict[str, bytes]:
    config = {"_class_name": "Denoiser", **ref.DENOISER_WIDTHS, **settings}
    return {**ref.denoising_files(), DENOISER_CONFIG: json.dumps(config).encode()}


def without(name: str) -> dict[str, bytes]:
    config = {k: v for k, v in ref.DENOISER_WIDTHS.items() if k != name}
    return {**ref.denoising_files(), DENOISER_CONFIG: json.dumps(config).encode()}


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> dict[str, bytes]:
    tensors = load_tensors(ref.denoising_files()[DENOISER_WEIGHTS])
    change(tensors)
    return {**ref.denoising_files(), DENOISER_WEIGHTS: save_tensors(tensors)}


BIAS = "unet.conv_out.bias"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (changed(width_8=1 << 30), "width_8=1073741824 is out of range"),
        (changed(layers=5), "layers=5 is out of range"),
        (changed(layers=True), "layers=True is out of range"),
        (changed(grain=5), "grain=5 is out of range"),
        (changed(grain=-1), "grain=-1 is out of range"),
        (changed(grain=False), "grain=False is out of range"),
        (changed(grain=1), "cannot be read"),
        (changed(width_16="64"), "width_16='64' is out of range"),
        (changed(width_16=32), "cannot be read"),
        (changed(width_8=48), "width_8=48 is no multiple of 32"),
        (changed(latents=25), "latents=25, but the codec has 24"),
        (changed(surprise=1), "surprise"),
        (changed(**{60_000 * "x": 1}), "its denoiser"),
        (without("layers"), "layers is missing"),
        (without("latents"), "latents is missing"),
        ({**ref.denoising_files(), DENOISER_CONFIG: b"[1, 2]"}, "its configuration is no object"),
        ({**ref.denoising_files(), DENOISER_CONFIG: b"{"}, "denoiser"),
        ({**ref.denoising_files(), DENOISER_CONFIG: b"\xff"}, "denoiser"),
        ({**ref.denoising_files(), DENOISER_WEIGHTS: b""}, "cannot be read"),
        ({**ref.denoising_files(), DENOISER_WEIGHTS: b"\xff" * 64}, "larger than allowed"),
        (with_tensors(lambda t: t.pop(BIAS)), f"{BIAS} is missing"),
        (with_tensors(lambda t: t.update({BIAS: t[BIAS].bfloat16()})), "neither"),
        (with_tensors(lambda t: t.update({BIAS: t[BIAS].double()})), "neither"),
        (with_tensors(lambda t: t.update({BIAS: t[BIAS] * torch.inf})), "not finite"),
        (with_tensors(lambda t: t.update({BIAS: t[BIAS][:5]})), "cannot be read"),
    ],
)
def test_broken_denoisers_end_in_one_error(
    broken: dict[str, bytes], message: str, streams: list[bytes]
) -> None:
    with pytest.raises(ModelError, match=message):
        Model(broken).denoiser()
    symbols = codec().decode_symbols(streams[:1], 4096, 4096)
    with pytest.raises(ModelError, match="its denoiser"):
        Reader(broken).synthesise(symbols, 1)


def test_weights_of_no_use_change_nothing(streams: list[bytes]) -> None:
    more = with_tensors(lambda t: t.update(more=torch.zeros(1)))
    symbols = codec().decode_symbols(streams[:1], 4096, 4096)
    [expected] = codec().synthesise(symbols, 1)
    np.testing.assert_array_equal(Codec(Model(more)).synthesise(symbols, 1)[0], expected)
    by_reader = [Reader(f).synthesise(symbols, 1)[0] for f in (more, ref.denoising_files())]
    np.testing.assert_array_equal(*by_reader)


def test_a_broken_denoiser_is_read_once(
    streams: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not again for every tile: it may be large."""
    broken = Reader(with_tensors(lambda t: t.pop(BIAS)))
    symbols = codec().decode_symbols(streams[:1], 4096, 4096)
    with pytest.raises(ModelError) as first:
        broken.synthesise(symbols, 1)
    monkeypatch.setattr(decoder, "read_denoiser", None)
    with pytest.raises(ModelError) as again:
        broken.synthesise(symbols, 1)
    assert str(again.value) == str(first.value)


def test_errors_are_one_line_with_the_reason() -> None:
    with pytest.raises(ModelError, match="size mismatch for unet") as caught:
        Model(changed(width_16=32)).denoiser()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_pixels_that_are_no_numbers_are_an_error(streams: list[bytes]) -> None:
    """Of finite weights that are too large; not a black picture."""
    huge = with_tensors(lambda t: t.update({BIAS: torch.full_like(t[BIAS].float(), 3e38)}))
    symbols = codec().decode_symbols(streams[:1], 4096, 4096)
    for made in (Codec(Model(huge)), Reader(huge)):
        with pytest.raises(ModelError, match="its denoiser gives pixels out of all range"):
            made.synthesise(symbols, 1)
        assert made.synthesise(symbols, 0)[0].any()


# ------------------------------------------------------------------------- archives


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "tiny", ref.denoising_files())


def test_the_denoiser_is_part_of_the_models_identity(model_folder: Path, tmp_path: Path) -> None:
    assert read_folder(model_folder) == ref.denoising_files()
    assert Model.from_folder(model_folder).sha256 == Model(ref.denoising_files()).sha256
    assert Model(ref.denoising_files()).sha256 != Model(ref.tiny_files()).sha256
    copy = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    (copy / DENOISER_WEIGHTS).unlink()
    with pytest.raises(ModelError, match="diffusion_pytorch_model"):
        read_folder(copy)


def test_archives_carry_the_denoiser(
    run: Run, command: Run, flight: Path, model_folder: Path, tmp_path: Path
) -> None:
    url = tmp_path / "archive.zarr"
    made = run(
        "ingest", flight, "--archive", url, "--ratio", 8, "--workers", 0, "--model", model_folder
    )
    assert made.code == 0, made.err
    stored = {
        str(p.relative_to(url / "models")).partition("/")[2]
        for p in (url / "models").rglob("*")
        if p.is_file()
    }
    assert stored == set(ref.denoising_files())

    def restored(name: str, *args: object) -> dict[str, bytes]:
        out = tmp_path / name
        where = ["--archive", url, "--workers", 0, "--image", IMAGE, "-o", out]
        done = run("restore", *where, "--format", "png", *args)
        assert done.code == 0, done.err
        pixels = {}
        for path in out.rglob("*.png"):
            with Image.open(path) as picture:
                pixels[path.name] = picture.tobytes()
                said[name] = picture.text["archive_pipeline restored"].partition("pixels: ")[2]
        return pixels

    said: dict[str, str] = {}

    plain, first = restored("plain"), restored("first", "--steps", 1)
    assert first == restored("again", "--steps", 1, "--seed", 0)
    other = restored("other", "--steps", 1, "--seed", 9)
    half = restored("half", "--steps", 1, "--seed", 9, "--realism", 0.5)
    assert plain == restored("after", "--steps", 0)
    assert plain == restored("none", "--steps", 1, "--realism", 0)
    for name in plain:
        assert len({plain[name], first[name], other[name], half[name]}) == 4
    sha256 = Model.from_folder(model_folder).sha256
    model = f"pcdc {sha256[:12]}, steps"
    assert said["plain"] == said["after"] == said["none"] == f"{model} 0"
    assert said["first"] == said["again"] == f"{model} 1, realism 1, seed 0"
    assert said["half"] == f"{model} 1, realism 0.5, seed 9"

    both = ["deterministic", "diffusion"]
    assert run("info", "--archive", url, "--json").json["models"] == {sha256: both}
    told = run("info", "--archive", url).out
    line = f"model {sha256[:12]}, decoders: deterministic (--steps 0), diffusion (--steps 1)"
    assert line in told.splitlines()

    for part in (url / "models").rglob("diffusion*"):
        part.write_bytes(part.read_bytes()[:-1] + b"?")
    damaged = command("restore", "--archive", url, "--image", IMAGE, "-o", tmp_path / "no")
    assert damaged.code == 1
    assert "its hash is another" in damaged.err


def test_a_broken_denoiser_is_no_fault_of_the_images(
    run: Run, flight: Path, tmp_path: Path
) -> None:
    """What ingest can see of it without running it, ingest refuses."""
    url, out = tmp_path / "archive.zarr", tmp_path / "out"
    folder = write(tmp_path / "shapes", with_tensors(lambda t: t.pop(BIAS)))
    ingest = ["ingest", flight, "--archive", url, "--ratio", 8, "--workers", 0, "--model"]
    assert run(*ingest, folder).code == 0
    done = run("restore", "--archive", url, "--workers", 0, "-o", out, "--steps", 1)
    assert done.code == 1
    assert f"{IMAGE}: model " in done.err
    assert f"its denoiser cannot be read: {BIAS} is missing" in done.err
    assert "damaged" not in done.err
    assert run("restore", "--archive", url, "--workers", 0, "-o", out).code == 0

    folder = write(tmp_path / "types", with_tensors(lambda t: t.update({BIAS: t[BIAS].double()})))
    ingest[3] = tmp_path / "other.zarr"
    refused = run(*ingest, folder)
    assert refused.code != 0
    assert "its denoiser: weights are neither float16 nor float32" in refused.err


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("codec", "lossless", "its codec contradicts the record"),
        ("codec", "jpeg", "its codec contradicts the record"),
        ("model", "ab" * 32, "its codec contradicts the record"),
        ("model", 5, "model 5 is no SHA-256"),
        ("model", "../models/x", "model '../models/x' is no SHA-256"),
        ("model", None, "model None is no SHA-256"),
    ],
)
def test_records_cannot_lie_about_what_decodes(
    field: str, value: object, problem: str, run: Run, archive: Path, tmp_path: Path
) -> None:
    """Or pixels that a denoiser made could be said to be lossless."""
    url = Path(shutil.copytree(archive, tmp_path / "a.zarr"))
    (url / "items.parquet").unlink()
    [path] = [p for p in url.glob("flights/*/*/zarr.json") if IMAGE in str(p)]
    group = json.loads(path.read_text())
    [record] = [v for v in group["attributes"].values() if isinstance(v, dict) and "sha256" in v]
    record[field] = value
    path.write_text(json.dumps(group))
    out = tmp_path / "out"
    done = run("restore", "--archive", url, "--workers", 0, "-o", out)
    assert done.code == 3, done.err
    assert problem in done.err
    assert {p.name.partition(".")[0] for p in out.rglob("*.tif")} == {"DJI_0002", "DJI_0003"}
    check = run("check", "--archive", url)
    assert check.code == 1
    assert problem in check.err + check.out


def test_what_models_can_decode_with_follows_from_all_of_their_files() -> None:
    a, b, c = "a" * 64, "b" * 64, "c" * 64
    transform, denoiser = ("config.json", "model.safetensors"), (DENOISER_CONFIG, DENOISER_WEIGHTS)
    keys = [f"models/{a}/{name}" for name in (*transform, *denoiser)]
    keys += [f"models/{b}/{name}" for name in (*transform, DENOISER_WEIGHTS)]
    keys += [f"models/{c}/{DENOISER_WEIGHTS}", "models/x", f"models/{c}"]
    keys += [f"models/{a[:12]}/{name}" for name in transform]
    found = decoders_of(keys)
    assert found == {a: ["deterministic", "diffusion"], b: [], c: []}


def test_archives_without_denoiser_restore_with_steps_0_only(
    run: Run, flight: Path, tmp_path: Path
) -> None:
    folder = ref.write_model(tmp_path / "plain")
    url, out = tmp_path / "archive.zarr", tmp_path / "out"
    made = run("ingest", flight, "--archive", url, "--ratio", 8, "--workers", 0, "--model", folder)
    assert made.code == 0, made.err
    done = run("restore", "--archive", url, "--workers", 0, "-o", out, "--steps", 2)
    assert done.code == 1
    assert "has no denoiser; --steps 0 restores it" in done.err
    mosaic = run("restore", "--archive", url, "--mosaic", "-o", out, "--steps", 2)
    assert mosaic.code == 1
    assert "has no denoiser" in mosaic.err
    assert run("restore", "--archive", url, "--workers", 0, "-o", out).code == 0
    [decoders] = run("info", "--archive", url, "--json").json["models"].values()
    assert decoders == ["deterministic"]
