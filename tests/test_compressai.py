"""The model among CompressAI's, and CompressAI's among the benchmark's peers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import reference as ref
from PIL import Image

pytest.importorskip("compressai", reason="needs CompressAI")

import zoo_peers
from compressai.registry.torch import MODELS
from compressai.utils.eval_model.__main__ import main as eval_model
from compressai.zoo import image_models
from compressai.zoo.image import model_urls

from archive_pipeline.codec.compressai_model import IMAGE_STEPS, PCDC
from archive_pipeline.codec.models import DEFAULT_MODEL, load_named
from archive_pipeline.pcdc.bitstream import HEADER_BYTES
from archive_pipeline.pcdc.codec import Codec


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with ref.threads(1):
        yield


@pytest.fixture(scope="module")
def net() -> PCDC:
    found = image_models[DEFAULT_MODEL](quality=4, pretrained=True)
    assert isinstance(found, PCDC)
    return found


def pixels(height: int = 96, width: int = 80, count: int = 2) -> torch.Tensor:
    tiles = np.stack([ref.texture(height, width, seed) for seed in range(count)])
    return torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10((a - b).square().mean()))


def test_it_is_registered(net: PCDC) -> None:
    assert MODELS[DEFAULT_MODEL] is PCDC
    assert net.image_step == IMAGE_STEPS[4]
    with pytest.raises(ValueError, match=r"quality 9 is not within 1..8"):
        image_models[DEFAULT_MODEL](quality=9)
    with pytest.raises(ValueError, match="comes with its weights"):
        image_models[DEFAULT_MODEL](quality=4, pretrained=False)


@pytest.mark.parametrize("size", [(96, 80), (50, 33)])
def test_streams_are_those_of_archives(net: PCDC, size: tuple[int, int]) -> None:
    x = pixels(*size)
    out = net.compress(x)
    [streams] = out["strings"]
    assert tuple(out["shape"]) == size
    expected = Codec(load_named(DEFAULT_MODEL)).decode(streams, 4096, 4096)
    x_hat = net.decompress(**out)["x_hat"]
    assert x_hat.shape == x.shape
    for tile, decoded in zip(expected, x_hat, strict=True):
        np.testing.assert_array_equal((decoded * 255).round().permute(1, 2, 0).numpy(), tile)


def test_qualities_and_estimates() -> None:
    x = pixels(128, 128, 1)
    bits, quality = [], []
    for q in (1, 4, 8):
        net = PCDC.released(q)
        out = net.compress(x)
        bits.append(8 * len(out["strings"][0][0]))
        quality.append(psnr(net.decompress(**out)["x_hat"], x))
        with torch.no_grad():
            made = net(x)
        estimate = -sum(float(p.log2().sum()) for p in made["likelihoods"].values())
        assert 0.9 * estimate < bits[-1] - 8 * HEADER_BYTES < 1.1 * estimate
        assert abs(psnr(made["x_hat"].clamp(0, 1), x) - quality[-1]) < 1.0
    assert bits == sorted(bits)
    assert quality == sorted(quality)


def test_training_goes_on_and_update_makes_a_coder_of_it() -> None:
    net = PCDC.released(4)
    x = pixels(64, 64, 1)
    before = net.compress(x)["strings"]
    assert not net.update(force=True)  # CompressAI's evaluation asks for it
    assert net.compress(x)["strings"] == before
    out = net(x)
    rate = -sum(p.log2().sum() for p in out["likelihoods"].values())
    (rate + (out["x_hat"] - x).square().sum()).backward()
    assert all(p.grad is not None for p in net.networks.g_a.parameters())
    with torch.no_grad():
        for parameter in net.networks.g_s.parameters():
            parameter.mul_(1.01)
    assert net.update()
    after = net.compress(x)
    assert after["strings"] != before  # another model's, which the header says
    assert psnr(net.decompress(**after)["x_hat"], x) > 20


def test_their_evaluation_reports_our_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture = ref.texture(192, 192, 3)  # multiples of 64: nothing is padded
    Image.fromarray(picture).save(folder / "a.png")
    arguments = ["pretrained", str(folder), "-a", DEFAULT_MODEL, "-q", "2,6", "-d", str(tmp_path)]
    eval_model([*arguments, "--per-image"])
    results = json.loads(capsys.readouterr().out)["results"]
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    for k, quality in enumerate((2, 6)):
        [[stream]] = PCDC.released(quality).compress(x)["strings"]
        assert results["bpp"][k] == pytest.approx(8 * len(stream) / 192**2)
    assert results["psnr-rgb"][1] > results["psnr-rgb"][0] > 20


def test_models_of_the_zoo_are_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, net: PCDC
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    zoo_peers._model.cache_clear()
    peer = zoo_peers.ALL_PEERS["compressai:bmshj2018-factorized"]
    urls = model_urls["bmshj2018-factorized"]["mse"]
    monkeypatch.setitem(urls, 1, "http://127.0.0.1:9/" + urls[1].rsplit("/", 1)[1])
    with pytest.raises(ImportError, match="its weights cannot be had"):
        peer.library()
    # untrained ones are large enough to code with
    model = image_models["bmshj2018-factorized"](quality=1, pretrained=False)
    model.update(force=True)
    weights = tmp_path / "hub" / "checkpoints" / urls[1].rsplit("/", 1)[1]
    weights.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), weights)
    assert peer.library().startswith("CompressAI 1.")
    picture = ref.texture(70, 90)
    data = peer.encode(picture, 1)
    decoded = peer.decode(data)
    assert decoded.shape == picture.shape
    padded = np.pad(picture, ((0, 58), (0, 38), (0, 0)), mode="edge").transpose(2, 0, 1)
    x = torch.from_numpy(padded)[None].float() / 255
    with torch.no_grad():
        coded = model.eval().compress(x)
        expected = model.decompress(**coded)["x_hat"][0, :, :70, :90].clamp(0, 1)
    assert peer.size(data) == sum(len(one) for [one] in coded["strings"])
    np.testing.assert_array_equal(decoded, (expected * 255).round().byte().permute(1, 2, 0).numpy())
    zoo_peers._model.cache_clear()
