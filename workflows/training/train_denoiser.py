"""Stage 2: train the diffusion decoder of a released transform codec, which stays as it is.

    python workflows/training/pack_crops.py crops.npy FLIGHTS...
    python workflows/training/train_denoiser.py crops.npy --model pcdc-drone-small \
        --run runs/denoiser

The loss is LPIPS (SqueezeNet) + 1 - SSIM (at three scales) + k * squared error of 8-bit pixels of
the predicted image: structure keeps LPIPS from textures that only it likes. Half of the samples
are what sampling starts from, noise added to the deterministic decoder's output; the others are
noisy originals at any noise level, for the later steps of several.

A denoiser belongs to one transform. When that was trained further, --start takes the weights of
the denoiser before, with a new optimiser; --resume continues a run for the same transform.

LPIPS needs torchvision's SqueezeNet 1.1 features; they are downloaded, or found under $TORCH_HOME.
"""

from __future__ import annotations

import math
from pathlib import Path

import click
import torch
from checkpoints import read_checkpoint
from torch import Tensor
from training import Run, Settings, common_options
from training_samples import Crops, random_offsets, random_steps
from transform_loss import border_weights, quantise, structural_error
from transform_start import with_more_latents

from archive_pipeline.codec.models import load_named
from archive_pipeline.pcdc.denoiser import NOISE_LEVELS, Denoiser, sample, scheduler
from archive_pipeline.pcdc.model import Model
from archive_pipeline.pcdc.model_files import ModelError, transform_digest
from archive_pipeline.pcdc.training.judge import lpips
from archive_pipeline.pcdc.transforms import TransformCodec

SQUARED_ERROR_WEIGHT = 0.003  # beside LPIPS; HiFiC (Mentzer et al. 2020) has 0.0023
HELD_OUT = 8  # crops
VALIDATION_STEPS = (24, 32, 40, 48)


@torch.no_grad()
def decode(
    codec: TransformCodec, x: Tensor, image_step: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents y_hat, their step exponents and x_bar of pixels x (N, 3, H, W) in -1..1."""
    latents = quantise(codec, x, image_step, offsets)
    y_hat, exponent = latents.y_hat, latents.exponent
    return y_hat, exponent, codec.g_s(y_hat, exponent)


@torch.no_grad()
def validate(
    denoiser: Denoiser,
    codec: TransformCodec,
    crops: Tensor,
    counts: tuple[int, ...],
) -> list[tuple[int, int, float, float]]:
    """Mean (image step, denoising steps, LPIPS, PSNR) of `crops` at numbers of steps `counts`."""
    device = denoiser.device
    denoiser.eval()
    rows = []
    for g in VALIDATION_STEPS:
        results: dict[int, list[tuple[float, float]]] = {n: [] for n in counts}
        for i, crop in enumerate(crops):
            x = crop[None].to(device).float() / 127.5 - 1
            offsets = torch.zeros(1, 1, x.shape[2] // 16, x.shape[3] // 16, device=device).long()
            y_hat, exponent, x_bar = decode(codec, x, torch.tensor([g], device=device), offsets)
            for steps, found in results.items():
                out = sample(denoiser, y_hat, exponent, x_bar, steps, [i]) if steps else x_bar
                out = out.clamp(-1, 1)
                mse = float((out - x).mul(127.5).square().mean())
                found.append((lpips(out, x).item(), 10 * math.log10(255**2 / mse)))
        for steps, found in results.items():
            mean = torch.tensor(found).mean(0)
            rows.append((g, steps, float(mean[0]), float(mean[1])))
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
    """Take over the weights that `start_weights` finds, also those for fewer latents.

    Raises:
        click.ClickException: there are none, or they are of other widths.
    """
    weights = start_weights(path)
    first = weights["reduce.0.weight"]
    shape = denoiser.state_dict()["reduce.0.weight"].shape
    try:
        weights["reduce.0.weight"] = with_more_latents(first, shape, first.shape[1] - 1)
        denoiser.load_state_dict(weights)
    except RuntimeError as error:
        raise click.ClickException(f"{path} holds a denoiser of other widths") from error


@click.command(help=__doc__)
@common_options(
    batch=4,
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
    denoiser = settings.place(Denoiser(latents=codec.config.latents))
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
            [(g, n, f"{d:.4f}", f"{p:.3f}") for g, n, d, p in rows],
            " ".join(f"g{g}/{n}: {d:.3f}/{p:.2f}" for g, n, d, p in rows if n < 2),
        )

    run.begin()
    while not run.finished:
        x = settings.place(source.batch(batch)).float() / 127.5 - 1
        image_step = random_steps(batch, generator).to(device)
        offsets = random_offsets(batch, size // 16, size // 16, generator).to(device)
        y_hat, exponent, x_bar = decode(codec, x, image_step, offsets)
        timestep = torch.randint(NOISE_LEVELS, (batch,), generator=generator).to(device)
        first = (torch.rand(batch, generator=generator) < 0.5).to(device)
        timestep = torch.where(first, NOISE_LEVELS - 1, timestep)
        origin = torch.where(first.view(-1, 1, 1, 1), x_bar, x)
        noise = torch.randn(x.shape, generator=generator).to(device)
        x_t = process.add_noise(origin, noise, timestep)
        with settings.autocast():
            x_0 = predict(x_t, timestep, y_hat, exponent, x_bar).float()
        error = (x_0 - x).mul(127.5).square()
        perceptual = lpips(x_0.clamp(-1, 1), x).mean()
        loss = perceptual + structural_error(x_0, x).mean()
        loss = loss + SQUARED_ERROR_WEIGHT * (error * weight).mean()
        run.update(loss)
        if run.log_due:
            run.log(loss.item(), perceptual.item(), error.mean().item())
        if run.save_due:
            save()
    save((0, 1, 2, 4, 8))


if __name__ == "__main__":
    main()
