"""Stage 1: train the transform codec (transforms, hyperprior, scales) for all rates at once.

    python workflows/pack_crops.py crops.npy FLIGHTS...
    python workflows/train_transform.py crops.npy --run runs/transform --minutes 120

Every crop draws an image step g and, half the time, random per-block levels, so one model serves
all rates. The loss is bits + lambda(step) * squared error with lambda = 8.66 / step^2, the slope
of a uniform quantiser at high rate (dD/dR = -2 ln 2 * step^2 / 12), so a block coded with a
finer step also weighs its error more, as the allocation means it to.

The learning rate follows a cosine over --minutes of training time; --resume continues a run from
its checkpoint, also with another --minutes; --start goes on from released weights with a new
optimiser. CUDA runs use bfloat16 autocast, CPUs float32.
"""

from __future__ import annotations

import csv
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import click
import cv2
import numpy as np
import torch
from pytorch_optimizer import SOAP
from torch import Tensor, nn
from torch.nn import functional as F

from archive_pipeline.pcdc.constants import (
    BLOCK,
    FINEST_STEP,
    HYPER_LIMIT,
    LATENT_GAIN,
    LEVEL_OFFSETS,
    MAX_IMAGE_STEP,
    MIN_IMAGE_STEP,
    SCALE_COUNT,
    SCALE_ZERO,
    STEPS_PER_OCTAVE,
)
from archive_pipeline.pcdc.layers import round_half_up
from archive_pipeline.pcdc.model import Model
from archive_pipeline.pcdc.transforms import (
    TransformCodec,
    TransformConfig,
    expand_blocks,
    scale_of,
    step_size,
)

VALIDATION_SHARE = 25  # every 25th image is held out
FIELDS = ["step", "minutes", "lr", "loss", "bpp", "psnr", "grad"]
VALIDATION_STEPS = (16, 24, 32, 40, 48)
BORDER_WEIGHTS = (6.0, 1.25)  # the outermost pixels, and the seven next to them


class Crops:
    """Random training crops from a file packed by `pack_crops.py`."""

    def __init__(self, path: Path, size: int, seed: int) -> None:
        self.pixels = np.load(path, mmap_mode="r")
        index = [e for e in json.loads(path.with_suffix(".json").read_text()) if min(e[2:]) >= size]
        self.train = [e for i, e in enumerate(index) if i % VALIDATION_SHARE]
        self.held_out = [e for i, e in enumerate(index) if i % VALIDATION_SHARE == 0]
        # between per-image and per-pixel sampling, so that flights of small frames do not rule
        weight = np.sqrt([e[2] * e[3] for e in self.train])
        self.weight = weight / weight.sum()
        self.size = size
        self.rng = np.random.default_rng(seed)

    def _cut(self, entry: list, top: int, left: int, size: int) -> np.ndarray:
        _, offset, height, width = entry
        frame = self.pixels[offset : offset + height * width * 3].reshape(height, width, 3)
        return np.ascontiguousarray(frame[top : top + size, left : left + size])

    def batch(self, count: int) -> Tensor:
        """Return (count, 3, size, size) uint8: random place, scale 0.5..1, flips, rotations."""
        out = []
        for k in self.rng.choice(len(self.train), count, p=self.weight):
            entry = self.train[k]
            limit = min(2 * self.size, *entry[2:])
            size = self.size
            if self.rng.random() < 0.5:
                size = int(self.rng.integers(self.size, limit + 1))
            top = int(self.rng.integers(entry[2] - size + 1))
            left = int(self.rng.integers(entry[3] - size + 1))
            crop = self._cut(entry, top, left, size)
            if size != self.size:
                crop = cv2.resize(crop, (self.size, self.size), interpolation=cv2.INTER_AREA)
            crop = np.rot90(crop, int(self.rng.integers(4)))
            out.append(crop[:, ::-1] if self.rng.random() < 0.5 else crop)
        return torch.from_numpy(np.stack(out).transpose(0, 3, 1, 2).copy())

    def validation(self, count: int) -> Tensor:
        """The same (count, 3, size, size) uint8 crops of held-out images on every call."""
        rng = np.random.default_rng(1)
        out = []
        for i in range(count):
            entry = self.held_out[i % len(self.held_out)]
            top = int(rng.integers(entry[2] - self.size + 1))
            left = int(rng.integers(entry[3] - self.size + 1))
            out.append(self._cut(entry, top, left, self.size))
        return torch.from_numpy(np.stack(out).transpose(0, 3, 1, 2).copy())


def principal_axes(samples: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (d,), leading axes (d, count) and their standard deviations of samples (n, d)."""
    mean = samples.mean(0)
    variance, axes = torch.linalg.eigh(torch.cov(samples.T))
    order = torch.arange(samples.shape[1] - 1, samples.shape[1] - 1 - count, -1)
    return mean, axes[:, order], variance[order].clamp_min(0).sqrt()


@torch.no_grad()
def klt_start(codec: TransformCodec, crops: Tensor) -> None:
    """Set the transforms to the Karhunen-Loeve transform of training patches.

    Residual blocks start as the identity, so analysis and synthesis are then a linear transform
    coder, and training starts where classical codecs stand instead of far below.
    """
    config = codec.config
    patches = F.pixel_unshuffle(crops.float() / 127.5 - 1, 8)
    mean, axes, _ = principal_axes(patches.permute(0, 2, 3, 1).flatten(0, 2), config.width_8)
    fine = F.conv2d(patches, axes.T[..., None, None], -(axes.T @ mean))
    coarse = F.pixel_unshuffle(fine, 2)
    width = min(config.width_16, config.latents)
    shift, joint, deviation = principal_axes(coarse.permute(0, 2, 3, 1).flatten(0, 2), width)

    analysis, synthesis = (
        [m for m in n if isinstance(m, nn.Conv2d)] for n in (codec.g_a.net, codec.g_s.net)
    )
    for conv in (*analysis, *synthesis):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    centre = config.edge_kernel // 2
    analysis[0].weight[:, :, centre, centre] = axes.T
    analysis[0].bias[:] = -(axes.T @ mean)
    analysis[1].weight[:width, :, 0, 0] = joint.T
    analysis[1].bias[:width] = -(joint.T @ shift)
    analysis[2].weight[:width, :width, 0, 0] = torch.eye(width)
    synthesis[0].weight[:width, :width, 0, 0] = torch.eye(width)
    synthesis[1].weight[:, :width, 0, 0] = joint
    synthesis[1].bias[:] = shift
    synthesis[2].weight[:, :, centre, centre] = axes
    synthesis[2].bias[:] = mean

    last = codec.h_scale.layers[-1]
    last.weight *= 0.05
    deviation = (LATENT_GAIN * deviation).clamp_min(1e-3)
    index = SCALE_ZERO + STEPS_PER_OCTAVE * torch.log2(deviation / FINEST_STEP)
    last.bias[:width] = index / 2**codec.h_scale.GAIN_BITS


def load_released(codec: TransformCodec, released: TransformCodec) -> None:
    """Take over released weights; kernels that were smaller are set into the middle of theirs."""
    state = codec.state_dict()
    for name, value in released.state_dict().items():
        grown = (state[name].shape[-1] - value.shape[-1]) // 2 if value.dim() == 4 else 0
        state[name] = F.pad(value, [grown] * 4) if grown else value
    codec.load_state_dict(state)


def gaussian_bits(v: Tensor, scale: Tensor) -> Tensor:
    """Bits of integer-binned Gaussian symbols: -log2(Phi((v+.5)/s) - Phi((v-.5)/s))."""
    v = v.abs()
    upper = torch.special.ndtr((0.5 - v) / scale)
    lower = torch.special.ndtr((-0.5 - v) / scale)
    return -torch.log2((upper - lower).clamp_min(2.0**-16))


def rate_distortion(
    codec: TransformCodec, x: Tensor, image_step: Tensor, offsets: Tensor, *, noise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return bits a sample (N,), reconstruction (N, 3, H, W) in -1..1 and the step map.

    x is (N, 3, H, W) in -1..1; offsets (N, 1, h, w) are the level offsets of the latents.
    noise=True measures bits with additive uniform noise (training), else with real rounding.
    """
    y = codec.g_a(x)
    z = codec.h_a(y, image_step).clamp(-HYPER_LIMIT, HYPER_LIMIT)
    z_hat = round_half_up(z)
    z_scale = scale_of(codec.prior(image_step))[:, :, None, None]
    index = codec.h_scale(z_hat, image_step) - offsets
    exponent = image_step.view(-1, 1, 1, 1) + offsets
    step = step_size(exponent)
    mean = codec.h_mean(z_hat, image_step)
    v = (y - mean) / step
    q = round_half_up(v)
    dither = (lambda t: torch.rand_like(t) - 0.5) if noise else torch.zeros_like
    y_bits = gaussian_bits(v + dither(v) if noise else q, scale_of(index.clamp(0, SCALE_COUNT - 1)))
    z_bits = gaussian_bits(z + dither(z) if noise else z_hat, z_scale)
    bits = y_bits.sum((1, 2, 3)) + z_bits.sum((1, 2, 3))
    x_bar = codec.g_s(mean + step * q, exponent)
    return bits, x_bar, step


def border_weights(size: int) -> Tensor:
    """Error weights (1, 1, size, size) that make up for a tile's border having neighbours on one
    side only: at the weight of the seven next to them, the outermost pixels keep more error."""
    weight = torch.full((1, 1, size, size), BORDER_WEIGHTS[0])
    weight[..., 1:-1, 1:-1] = BORDER_WEIGHTS[1]
    weight[..., 8:-8, 8:-8] = 1.0
    return weight


def random_steps(count: int, generator: torch.Generator) -> Tensor:
    """Image steps (count,) of a batch, spread evenly over a bell-shaped distribution.

    The rates users ask for are in the middle of the range, and a batch that always holds some of
    each has less noise in its gradient than independent draws.
    """
    share = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    tail = torch.minimum(share, 1 - share)
    bell = torch.where(share < 0.5, (tail / 2).sqrt(), 1 - (tail / 2).sqrt())
    span = MAX_IMAGE_STEP + 1 - MIN_IMAGE_STEP
    return (MIN_IMAGE_STEP + bell**0.65 * span).long().clamp(max=MAX_IMAGE_STEP)


def random_offsets(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Level offsets of a batch: none for half of the samples, random blocks for the others."""
    table = torch.tensor(LEVEL_OFFSETS)
    shape = (count, 1, -(-height // BLOCK), -(-width // BLOCK))
    levels = torch.randint(len(LEVEL_OFFSETS), shape, generator=generator)
    varied = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return expand_blocks(torch.where(varied, table[levels], 0), height, width)


@torch.no_grad()
def validate(codec: TransformCodec, crops: Tensor, device: str) -> list[tuple[int, float, float]]:
    """Mean (image step, bpp, PSNR) of `crops` at `VALIDATION_STEPS`."""
    codec.eval()
    rows = []
    for g in VALIDATION_STEPS:
        bpp, mse = [], []
        for part in crops.split(8):
            x = part.to(device).float() / 127.5 - 1
            step = torch.full((len(x),), g, device=device)
            zero = torch.zeros(len(x), 1, x.shape[2] // 16, x.shape[3] // 16, device=device)
            bits, x_bar, _ = rate_distortion(codec, x, step, zero.long(), noise=False)
            bpp.append(bits / x[0, 0].numel())
            mse.append((x_bar.clamp(-1, 1) - x).mul(127.5).square().mean((1, 2, 3)))
        psnr = 10 * torch.log10(255**2 / torch.cat(mse)).mean()
        rows.append((g, float(torch.cat(bpp).mean()), float(psnr)))
    codec.train()
    return rows


@click.command(help=__doc__)
@click.argument("crops", type=click.Path(exists=True, path_type=Path))
@click.option("--run", "folder", type=click.Path(path_type=Path), required=True)
@click.option("--minutes", type=float, default=120.0, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--size", default=256, show_default=True, help="Crop side in pixels, times 64.")
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=0, help="CPU threads, 0 = torch's default.")
@click.option(
    "--start",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Start from a released model's folder instead of the Karhunen-Loeve transform.",
)
@click.option("--resume", is_flag=True, help="Go on from the run's checkpoint.")
def main(
    crops: Path,
    folder: Path,
    minutes: float,
    device: str,
    batch: int,
    size: int,
    lr: float,
    seed: int,
    threads: int,
    start: Path | None,
    resume: bool,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    released = Model.from_folder(start).networks if start else None
    config = replace(released.config, edge_kernel=3) if released else TransformConfig()
    codec = TransformCodec(config).to(device)
    average = TransformCodec(codec.config).to(device)
    optimiser = SOAP(
        codec.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, max_precondition_dim=256
    )
    step, spent = 0, 0.0
    checkpoint = folder / "checkpoint.pt"
    if resume:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        codec.load_state_dict(state["codec"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent = state["step"], state["minutes"]
    source = Crops(crops, size, seed + step)
    generator = torch.Generator().manual_seed(seed + step)
    if not resume:
        if released:
            load_released(codec, released)
        else:
            klt_start(codec.cpu(), Crops(crops, size, seed).batch(256))
        average.load_state_dict(codec.to(device).state_dict())
    held_out = source.validation(32)
    weight = border_weights(size).to(device)

    log = (folder / "log.csv").open("a", newline="")
    writer = csv.writer(log)
    if not resume:
        writer.writerow(FIELDS)
    started, saved = time.monotonic() - 60 * spent, spent

    def save() -> None:
        part = checkpoint.with_suffix(".part")
        torch.save(
            {
                "codec": codec.state_dict(),
                "average": average.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step,
                "minutes": spent,
            },
            part,
        )
        part.replace(checkpoint)
        with (folder / "validation.csv").open("a", newline="") as file:
            rows = validate(average, held_out, device)
            csv.writer(file).writerows(
                [step, f"{spent:.1f}", g, f"{b:.4f}", f"{p:.3f}"] for g, b, p in rows
            )
        click.echo(
            f"{step} {spent:.1f} min " + " ".join(f"{b:.3f}/{p:.2f}" for _, b, p in rows), err=True
        )

    while spent < minutes:
        progress = spent / minutes
        rate = lr * min(1, (step + 1) / 200) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimiser.param_groups:
            group["lr"] = rate
        x = source.batch(batch).to(device).float() / 127.5 - 1
        image_step = random_steps(batch, generator)
        offsets = random_offsets(batch, size // 16, size // 16, generator).to(device)
        image_step = image_step.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device.startswith("cuda")):
            bits, x_bar, steps = rate_distortion(codec, x, image_step, offsets, noise=True)
        error = (x_bar.float() - x).mul(127.5).square()
        pixel_step = steps.repeat_interleave(16, -2).repeat_interleave(16, -1)
        distortion = (error * weight * 8.66 / pixel_step.square()).sum((1, 2, 3))
        # coarse steps cost few bits: weigh them up so that low rates are learned as well
        emphasis = (step_size(image_step) / 32) ** 1.2
        loss = ((bits + distortion) * emphasis).mean() / size**2
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(codec.parameters(), 2.0)
        if torch.isfinite(norm):
            optimiser.step()
        decay = min(0.9995, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(codec.parameters()), 1 - decay)
        step += 1
        spent = (time.monotonic() - started) / 60
        if step % 50 == 0:
            psnr = 10 * math.log10(255**2 / float(error.mean()))
            writer.writerow(
                [
                    step,
                    f"{spent:.2f}",
                    f"{rate:.2e}",
                    f"{float(loss):.4f}",
                    f"{float(bits.mean()) / size**2:.4f}",
                    f"{psnr:.2f}",
                    f"{float(norm):.3f}",
                ]
            )
            log.flush()
        if spent - saved >= 5:
            saved = spent
            save()
    save()


if __name__ == "__main__":
    main()
