"""Stage 2: train the diffusion decoder of a released transform codec, which stays as it is.

    python workflows/training/pack_crops.py crops.npy FLIGHTS...
    python workflows/training/train_denoiser.py crops.npy --model pcdc-drone-small \
        --run runs/denoiser

A decoder that is paid for pixels blurs what few bits cannot tell. So where image steps are coarse
the loss asks for the original's texture instead, by the statistics of features (`texture_loss.py`),
and for its pixels at a quarter of the size; where they are fine, it is LPIPS (SqueezeNet)
+ 1 - SSIM (at three scales) + k * squared error of the predicted image. Most samples are what
sampling starts from, noise added to the deterministic decoder's output; the others are what its
later steps find, the network's own first prediction with less of the same noise: of noisy originals
it would learn to take detail that is there for true, and then add its own once more. Every sample
comes twice, with two noises.

A denoiser belongs to one transform. When that was trained further, --start takes the weights of
the denoiser before, with a new optimiser; --resume continues a run for the same transform.

LPIPS needs torchvision's SqueezeNet 1.1 features; they are downloaded, or found under $TORCH_HOME.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

import click
import torch
from checkpoints import read_checkpoint
from texture_loss import realism_loss
from torch import Tensor, nn
from torch.nn import functional as F
from training import Run, Settings, common_options
from training_samples import Crops, random_offsets, random_steps
from transform_loss import border_weights, quantise
from transform_start import with_more_latents

from archive_pipeline.codec.models import load_named
from archive_pipeline.pcdc.constants import CELL_SAMPLES
from archive_pipeline.pcdc.denoiser import Denoiser, noise_in, sample, scheduler
from archive_pipeline.pcdc.diffusion import NOISE_LEVELS
from archive_pipeline.pcdc.model import Model
from archive_pipeline.pcdc.model_files import ModelError, transform_digest
from archive_pipeline.pcdc.training.judge import lpips
from archive_pipeline.pcdc.transforms import TransformCodec

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
from texture import texture_error

HELD_OUT = 8  # crops
VALIDATION_STEPS = (24, 32, 40, 48)
GRAIN = 3  # octaves
FIRST_GAIN = 0.01  # of pixels in -1..1; without any, energy tells gains nothing
FIRST = 0.75  # share of samples that are what sampling starts from
COARSE = 0.75  # share of image steps from those where texture is generated
COARSEST = (32, 56)


def coarse_steps(count: int, generator: torch.Generator) -> Tensor:
    """Image steps (count,), most of them where the denoiser has something to do."""
    low, high = COARSEST
    coarse = torch.randint(low, high + 1, (count,), generator=generator)
    chosen = torch.rand(count, generator=generator) < COARSE
    return torch.where(chosen, coarse, random_steps(count, generator))


class Quality(NamedTuple):
    """What pictures are validated by, means over them; PSNRs in dB, the second at quarter size."""

    lpips: float
    psnr: float
    low_psnr: float
    texture: float


def quality(out: Tensor, x: Tensor) -> Quality:
    """Of a decoded picture and its original, both (1, 3, H, W) in -1..1."""

    def psnr(a: Tensor, b: Tensor) -> float:
        return 10 * math.log10(255**2 / float((a - b).mul(127.5).square().mean()))

    decoded, original = (
        p[0].mul(127.5).add(128).clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        for p in (out, x)
    )
    low = psnr(F.avg_pool2d(out, 4), F.avg_pool2d(x, 4))
    return Quality(lpips(out, x).item(), psnr(out, x), low, texture_error(original, decoded))


@torch.no_grad()
def decode(
    codec: TransformCodec, x: Tensor, image_step: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents y_hat, their step exponents and x_bar of pixels x (N, 3, H, W) in -1..1."""
    latents = quantise(codec, x, image_step, offsets)
    y_hat, exponent = latents.y_hat, latents.exponent
    return y_hat, exponent, codec.g_s(y_hat, exponent)


@torch.no_grad()
def found_later(first: Denoiser, x_t: Tensor, timestep: Tensor, *known: Tensor) -> Tensor:
    """What sampling (DDIM, eta 0) has made of x_t (N, 3, H, W), its start, at later timesteps (N,).

    Args:
        known: latents, exponents and x_bar, as in `Denoiser.forward`.
    """
    begin = torch.full_like(timestep, NOISE_LEVELS - 1)
    x_0 = first(x_t, begin, *known).float()
    return scheduler().add_noise(x_0, noise_in(x_t, x_0, begin), timestep)


@torch.no_grad()
def validate(
    denoiser: Denoiser,
    codec: TransformCodec,
    crops: Tensor,
    counts: tuple[int, ...],
) -> list[tuple[int, int, Quality]]:
    """Image step, denoising steps and mean quality of `crops` at numbers of steps `counts`."""
    device = denoiser.device
    denoiser.eval()
    rows = []
    for g in VALIDATION_STEPS:
        results: dict[int, list[Quality]] = {n: [] for n in counts}
        for i, crop in enumerate(crops):
            x = crop[None].to(device).float() / 127.5 - 1
            offsets = torch.zeros(1, 1, x.shape[2] // 16, x.shape[3] // 16, device=device).long()
            y_hat, exponent, x_bar = decode(codec, x, torch.tensor([g], device=device), offsets)
            for steps, found in results.items():
                out = sample(denoiser, y_hat, exponent, x_bar, steps, [i]) if steps else x_bar
                found.append(quality(out.clamp(-1, 1), x))
        for steps, found in results.items():
            rows.append((g, steps, Quality(*torch.tensor(found).mean(0).tolist())))
    denoiser.train()
    return rows


def start_weights(path: Path) -> dict[str, Tensor]:
    """Weights of a released model's denoiser (a folder), or the averages of a checkpoint.

    Raises:
        click.ClickException: there are none.
    """
    if not path.is_dir():
        state = read_checkpoint(path)
        if "denoiser" not in state:
            raise click.ClickException(f"{path} is no checkpoint of a denoiser")
        return state["average"]
    try:
        return Model.from_folder(path).denoiser().state_dict()
    except ModelError as error:
        raise click.ClickException(f"{path}: {error}") from error


def load_start(denoiser: Denoiser, path: Path) -> None:
    """Take over the weights that `start_weights` finds, also those for fewer latents or gains.

    Raises:
        click.ClickException: there are none, or they are of other widths.
    """
    weights = start_weights(path)
    first = weights["reduce.0.weight"]
    shape = denoiser.state_dict()["reduce.0.weight"].shape
    try:
        weights["reduce.0.weight"] = with_more_latents(first, shape, first.shape[1] - 1)
        for name in ("unet.conv_out.weight", "unet.conv_out.bias"):
            more = denoiser.state_dict()[name].clone()
            more[: len(weights[name])] = weights[name]
            weights[name] = more
        denoiser.load_state_dict(weights)
    except RuntimeError as error:
        raise click.ClickException(f"{path} holds a denoiser of other widths") from error


@click.command(help=__doc__)
@common_options(
    batch=2,
    lr=8e-4,
    start="Start from a released model's denoiser (its folder) or from a denoiser's checkpoint, "
    "also those for another transform.",
)
@click.option(
    "--model",
    "name",
    default="pcdc-drone-small",
    show_default=True,
    help="Transform codec: a released model's name or folder.",
)
def main(settings: Settings, name: str) -> None:
    device, size, batch = settings.device, settings.size, settings.batch
    try:
        model = load_named(name)
    except ModelError as error:
        raise click.ClickException(str(error)) from error
    transform = transform_digest(model.files)
    codec = settings.place(model.networks)
    denoiser = settings.place(Denoiser(latents=codec.config.latents, grain=GRAIN))
    nn.init.constant_(denoiser.unet.conv_out.bias[CELL_SAMPLES:], FIRST_GAIN)
    average = settings.place(Denoiser(**denoiser.config))
    notes = {"model": transform}
    run = Run(settings, "denoiser", denoiser, average, clip=1.0, measure="lpips", notes=notes)
    if settings.resume:
        state = read_checkpoint(settings.checkpoint, device)
        if state.get("model") != transform:
            raise click.ClickException(
                f"{settings.folder} is a run for transform {str(state.get('model'))[:12]}, {name} "
                f"has {transform[:12]}: --start {settings.checkpoint} with another --run"
            )
        run.restore(state)
    else:
        if settings.start:
            load_start(denoiser, settings.start)
        average.load_state_dict(denoiser.state_dict())
    source = Crops(settings.crops, size, settings.own_seed + run.step)
    generator = torch.Generator().manual_seed(settings.own_seed + run.step)
    held_out = source.validation(HELD_OUT)
    weight = border_weights(size).to(device)
    process = scheduler()
    predict = settings.compiled(denoiser)

    def save(counts: tuple[int, ...] = (0, 1)) -> None:
        run.save()
        if not run.leads:
            return
        rows = validate(average, codec, held_out, counts)
        run.report(
            [(g, n, *(f"{value:.4f}" for value in q)) for g, n, q in rows],
            " ".join(
                f"g{g}/{n}: {q.lpips:.3f}/{q.psnr:.2f}/{q.low_psnr:.2f}/{q.texture:.2f}"
                for g, n, q in rows
                if n < 2
            ),
        )

    run.begin()
    while not run.finished:
        x = settings.place(source.batch(batch)).float() / 127.5 - 1
        image_step = coarse_steps(batch, generator).to(device)
        offsets = random_offsets(batch, size // 16, size // 16, generator).to(device)
        y_hat, exponent, x_bar = decode(codec, x, image_step, offsets)
        timestep = torch.randint(NOISE_LEVELS - 1, (batch,), generator=generator).to(device)
        later = (torch.rand(batch, generator=generator) >= FIRST).to(device)
        x, y_hat, exponent, x_bar, later, timestep, image_step = (
            torch.cat([part, part])  # all of it twice, with two noises
            for part in (x, y_hat, exponent, x_bar, later, timestep, image_step)
        )
        noise = torch.randn(x.shape, generator=generator).to(device)
        begin = torch.full_like(timestep, NOISE_LEVELS - 1)
        x_t = process.add_noise(x_bar, noise, begin)
        with settings.autocast():
            if later.any():
                known = (part[later] for part in (y_hat, exponent, x_bar))
                x_t[later] = found_later(denoiser, x_t[later], timestep[later], *known)
            timestep = torch.where(later, timestep, begin)
            x_0 = predict(x_t, timestep, y_hat, exponent, x_bar).float()
        loss, likeness, _ = realism_loss(x_0, x, image_step, weight)
        loss = loss.mean()
        run.update(loss)
        if run.log_due:
            error = (x_0 - x).mul(127.5).square().mean()
            run.log(loss.item(), likeness.mean().item(), error.item())
        if run.save_due:
            save()
    save((0, 1, 2, 4, 8))


if __name__ == "__main__":
    main()
