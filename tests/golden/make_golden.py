"""Make the golden streams, which every later version must decode to the same symbols.

    python tests/golden/make_golden.py --model      # trains the test model anew, then its streams
    python tests/golden/make_golden.py --streams    # streams of the present test model
    python tests/golden/make_golden.py --released   # streams of the model that is shipped

Golden streams are a promise: make them anew only with a new format or a new released model.
"""

from __future__ import annotations

import base64
import json
import lzma
import shutil
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflows" / "training")]

from golden import reference as ref  # noqa: E402
from training_samples import random_offsets  # noqa: E402
from transform_loss import rate_distortion  # noqa: E402
from transform_start import klt_start  # noqa: E402

from archive_pipeline.codec.models import DEFAULT_MODEL, shipped  # noqa: E402
from archive_pipeline.pcdc.allocation import BudgetTooSmall  # noqa: E402
from archive_pipeline.pcdc.codec import Codec  # noqa: E402
from archive_pipeline.pcdc.constants import MAX_IMAGE_STEP, MIN_IMAGE_STEP  # noqa: E402
from archive_pipeline.pcdc.decoding import Symbols  # noqa: E402
from archive_pipeline.pcdc.encoding import encode_tiles  # noqa: E402
from archive_pipeline.pcdc.model import Model, build_files  # noqa: E402
from archive_pipeline.pcdc.model_files import CONFIG, WEIGHTS  # noqa: E402
from archive_pipeline.pcdc.transforms import TransformCodec, TransformConfig, step_size  # noqa: E402

WIDTHS = TransformConfig(
    latents=24, hyper_latents=8, width_8=16, width_16=24, depth_8=1, depth_16=1
)
KEPT = 0.12  # share of the scale network's weights that are not zero, for a small file


def train(steps: int, seed: int) -> TransformCodec:
    """Train a small model on synthetic pictures, just long enough for meaningful streams."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    networks = TransformCodec(WIDTHS)
    size, batch = 128, 4
    pictures = [ref.texture(512, 512, seed=s) for s in range(12)]
    corners = np.stack([p[:size, :size] for p in pictures])
    klt_start(networks, torch.from_numpy(corners).permute(0, 3, 1, 2))
    masks: dict[nn.Parameter, torch.Tensor] = {}
    for layer in networks.h_scale.layers:
        assert isinstance(layer.weight, nn.Parameter)
        masks[layer.weight] = (torch.rand_like(layer.weight) < KEPT) / KEPT**0.5
    with torch.no_grad():
        for weight, mask in masks.items():
            weight *= mask
    optimiser = torch.optim.Adam(networks.parameters(), lr=2e-3)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps) + 2e-5
        crops = []
        for _ in range(batch):
            picture = pictures[rng.integers(len(pictures))]
            top, left = rng.integers(512 - size, size=2)
            crops.append(picture[top : top + size, left : left + size])
        x = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
        g = torch.randint(MIN_IMAGE_STEP, MAX_IMAGE_STEP + 1, (batch,), generator=generator)
        offsets = random_offsets(batch, size // 16, size // 16, generator)
        bits, x_bar, taken = rate_distortion(networks, x, g, offsets, noise=True)
        error = (x_bar - x).mul(127.5).square()
        wide = taken.repeat_interleave(16, -2).repeat_interleave(16, -1)
        distortion = (error * 8.66 / wide.square()).sum((1, 2, 3))
        loss = ((bits + distortion) * (step_size(g) / 32) ** 0.9).mean() / size**2
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for weight, mask in masks.items():
            assert weight.grad is not None
            weight.grad *= mask > 0
        nn.utils.clip_grad_norm_(networks.parameters(), 2.0)
        optimiser.step()
        if step % 50 == 0:
            click.echo(f"{step} loss {loss.item():.3f} bpp {bits.mean().item() / size**2:.3f}")
    with torch.no_grad():
        for name, weight in networks.named_parameters():
            if not name.startswith(("h_scale", "prior")):  # shorter numbers pack better
                weight.copy_(weight.bfloat16())
            elif name.endswith("weight"):
                weight.copy_((weight * 32).round() / 32)
    return networks


def crafted(model: Model) -> dict[str, Symbols]:
    """Symbols of any kind, level maps mixed, for streams of the reference writer."""
    sizes = {
        "crafted-1x1-step8": (1, 1, 8, 1.0),
        "crafted-17x33-step20": (17, 33, 20, 1.0),
        "crafted-16x4096-step40": (16, 4096, 40, 1.0),
        "crafted-200x130-step55": (200, 130, 55, 1.0),
        "crafted-wild-96x96-step30": (96, 96, 30, 40.0),
    }
    return {
        name: ref.random_symbols(model, h, w, step, seed, spread=spread)
        for seed, (name, (h, w, step, spread)) in enumerate(sizes.items())
    }


def entry(codec: Codec, stream: bytes) -> dict[str, Any]:
    [symbols] = codec.decode_symbols([stream], 4096, 4096)
    if not isinstance(symbols, Symbols):
        raise symbols
    out = ref.record(stream, symbols)
    if symbols.height * symbols.width <= 1200:
        out["pixels"] = base64.b64encode(codec.synthesise([symbols])[0].tobytes()).decode()
    return out


def encode(codec: Codec, tiles: list[np.ndarray], bits_per_pixel: float) -> list[bytes]:
    """Encode at about a rate, at the coarsest where that takes more."""
    budget = int(sum(t.shape[0] * t.shape[1] for t in tiles) * bits_per_pixel / 8)
    while True:
        try:
            return encode_tiles(codec, tiles, budget)
        except BudgetTooSmall as error:
            budget = max(budget + 1, error.needed)


def tiny_streams() -> None:
    codec = ref.tiny_codec()
    tiles = {
        "texture-1x1": (ref.texture(1, 1), 400.0),
        "texture-17x33": (ref.texture(17, 33), 2.0),
        "texture-40x20-finest": (ref.texture(40, 20, 3), 40.0),
        "texture-250x301": (ref.texture(250, 301, 4), 0.5),
        "texture-250x301-low": (ref.texture(250, 301, 4), 0.05),
        "texture-608x608": (ref.texture(608, 608, 5), 0.2),
        "constant-608x608": (ref.constant(608, 608), 0.02),
        "black-64x64": (ref.constant(64, 64, 0), 0.5),
        "noise-96x128": (ref.noise(96, 128), 1.0),
        "spots-200x200": (ref.spots(200, 200), 1.0),
        "empty": (ref.constant(0, 0), 100.0),
    }
    streams = {name: encode(codec, [tile], rate)[0] for name, (tile, rate) in tiles.items()}
    company = encode(codec, [ref.texture(128, 128, s) for s in range(4)], 0.4)
    streams |= {f"texture-128x128-{i}": stream for i, stream in enumerate(company)}
    for k, (name, symbols) in enumerate(crafted(codec.model).items()):
        streams[name] = ref.write_stream(codec.model, symbols, k, min(k, 3))
    entries = {name: entry(codec, stream) for name, stream in streams.items()}
    for name, symbols in crafted(codec.model).items():
        assert ref.matches(entries[name], symbols), name
    content = {"model": codec.model.sha256, "streams": entries}
    ref.STREAMS.write_text(json.dumps(content, indent=1) + "\n")
    for name, stream in streams.items():
        [symbols] = codec.decode_symbols([stream], 4096, 4096)
        levels, counts = np.unique(symbols.levels, return_counts=True)
        click.echo(
            f"{name}: {len(stream)} bytes, step {symbols.image_step}, "
            f"levels {dict(zip(levels.tolist(), counts.tolist(), strict=True))}, "
            f"{np.count_nonzero(symbols.q)} of {symbols.q.size} not 0, "
            f"{ref.escapes(codec.model, symbols) if symbols.q.size else 0} escapes"
        )


def released_streams() -> None:
    codec = Codec(Model.from_folder(shipped() / DEFAULT_MODEL))
    tiles = {
        "texture-304x304": (ref.texture(304, 304, 1), 0.5),
        "texture-17x33": (ref.texture(17, 33, 2), 4.0),
        "spots-128x96": (ref.spots(128, 96), 2.0),
    }
    entries = {
        name: entry(codec, encode(codec, [tile], rate)[0]) for name, (tile, rate) in tiles.items()
    }
    symbols = ref.random_symbols(codec.model, 40, 70, 36, seed=1)
    entries["crafted-40x70"] = entry(codec, ref.write_stream(codec.model, symbols, 2, 1))
    ref.RELEASED.mkdir(exist_ok=True)
    path = ref.RELEASED / f"{codec.model.sha256[:16]}.json"
    content = {"model": codec.model.sha256, "streams": entries}
    path.write_text(json.dumps(content, indent=1) + "\n")
    part = path.with_suffix(ref.PART)
    part.write_bytes(ref.entropy_part(codec.model))
    click.echo(
        f"{path.name}: {path.stat().st_size} bytes, {part.name}: {part.stat().st_size} bytes; "
        "earlier files there stay promises"
    )


@click.command(help=__doc__)
@click.option("--model", "anew", is_flag=True, help="Train the test model anew.")
@click.option("--streams", is_flag=True, help="Write the test model's streams.")
@click.option("--released", is_flag=True, help="Write the shipped model's streams.")
@click.option("--steps", default=600, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(anew: bool, streams: bool, released: bool, steps: int, seed: int) -> None:
    if anew:
        files = build_files(train(steps, seed))
        shutil.rmtree(ref.TINY, ignore_errors=True)
        ref.TINY.mkdir()
        (ref.TINY / CONFIG).write_bytes(files[CONFIG])
        packed = lzma.compress(files[WEIGHTS], preset=9 | lzma.PRESET_EXTREME)
        (ref.TINY / ref.PACKED).write_bytes(packed)
        click.echo(f"{Model(files).sha256}, {len(packed)} bytes packed")
    if anew or streams:
        tiny_streams()
    if released:
        released_streams()


if __name__ == "__main__":
    main()
