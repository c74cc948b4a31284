"""Stage 2: train the diffusion decoder of a released transform codec, which stays as it is.

    python workflows/pack_crops.py crops.npy FLIGHTS...
    python workflows/train_denoiser.py crops.npy --model pcdc-drone-small --run runs/denoiser

The loss is LPIPS (SqueezeNet) + k * squared error of 8-bit pixels of the predicted image. Half of
the samples are what sampling starts from, noise added to the deterministic decoder's output; the
others are noisy originals at any noise level, for the later steps of several.

LPIPS needs torchvision's SqueezeNet 1.1 features; they are downloaded, or found under $TORCH_HOME.
"""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path

import click
import torch
from pytorch_optimizer import SOAP
from torch import Tensor, nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from train_transform import Crops, border_weights, random_offsets, random_steps

from archive_pipeline.models import load_named
from archive_pipeline.pcdc.constants import HYPER_LIMIT
from archive_pipeline.pcdc.denoiser import NOISE_LEVELS, Denoiser, sample, scheduler
from archive_pipeline.pcdc.layers import round_half_up
from archive_pipeline.pcdc.model import FILES, digest
from archive_pipeline.pcdc.transforms import TransformCodec, step_size

SQUARED_ERROR_WEIGHT = 0.003  # beside LPIPS; HiFiC (Mentzer et al. 2020) has 0.0023
VALIDATION_STEPS = (24, 32, 40, 48)
FIELDS = ["step", "minutes", "lr", "loss", "lpips", "psnr", "grad"]


def lpips(device: str) -> nn.Module:
    """LPIPS with SqueezeNet features: (N, 3, H, W) pairs in -1..1 to distances a sample."""
    metric = LearnedPerceptualImagePatchSimilarity(net_type="squeeze").to(device)
    return metric.net.eval().requires_grad_(False)


@torch.no_grad()
def decode(
    codec: TransformCodec, x: Tensor, image_step: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents y_hat, their step exponents and x_bar of pixels x (N, 3, H, W) in -1..1."""
    y = codec.g_a(x)
    z_hat = round_half_up(codec.h_a(y, image_step)).clamp(-HYPER_LIMIT, HYPER_LIMIT)
    exponent = image_step.view(-1, 1, 1, 1) + offsets
    step = step_size(exponent)
    mean = codec.h_mean(z_hat, image_step)
    y_hat = mean + step * round_half_up((y - mean) / step)
    return y_hat, exponent, codec.g_s(y_hat, exponent)


@torch.no_grad()
def validate(
    denoiser: Denoiser,
    codec: TransformCodec,
    distance: nn.Module,
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
                out = sample(denoiser, y_hat, exponent, x_bar, steps, i) if steps else x_bar
                out = out.clamp(-1, 1)
                mse = float((out - x).mul(127.5).square().mean())
                found.append((float(distance(out, x)), 10 * math.log10(255**2 / mse)))
        for steps, found in results.items():
            mean = torch.tensor(found).mean(0)
            rows.append((g, steps, float(mean[0]), float(mean[1])))
    denoiser.train()
    return rows


@click.command(help=__doc__)
@click.argument("crops", type=click.Path(exists=True, path_type=Path))
@click.option("--model", "name", default="pcdc-drone-small", show_default=True)
@click.option("--run", "folder", type=click.Path(path_type=Path), required=True)
@click.option("--minutes", type=float, default=120.0, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--batch", default=4, show_default=True)
@click.option("--size", default=256, show_default=True, help="Crop side in pixels, times 64.")
@click.option("--lr", default=8e-4, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=0, help="CPU threads, 0 = torch's default.")
@click.option("--resume", is_flag=True, help="Go on from the run's checkpoint.")
def main(
    crops: Path,
    name: str,
    folder: Path,
    minutes: float,
    device: str,
    batch: int,
    size: int,
    lr: float,
    seed: int,
    threads: int,
    resume: bool,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    model = load_named(name)
    transform = digest({file: model.files[file] for file in FILES})
    codec = model.networks.to(device)
    denoiser = Denoiser(latents=codec.config.latents).to(device)
    average = Denoiser(**denoiser.config).to(device)
    average.load_state_dict(denoiser.state_dict())
    optimiser = SOAP(
        denoiser.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, max_precondition_dim=256
    )
    step, spent = 0, 0.0
    checkpoint = folder / "checkpoint.pt"
    if resume:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        denoiser.load_state_dict(state["denoiser"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent = state["step"], state["minutes"]
        if state["model"] != transform:
            raise click.ClickException(
                f"{folder} is a run for transform {state['model'][:12]}, "
                f"{name} has {transform[:12]}"
            )
    source = Crops(crops, size, seed + step)
    generator = torch.Generator().manual_seed(seed + step)
    held_out = source.validation(8)
    weight = border_weights(size).to(device)
    distance, process = lpips(device), scheduler()

    log = (folder / "log.csv").open("a", newline="")
    writer = csv.writer(log)
    if not resume:
        writer.writerow(FIELDS)
    started, saved = time.monotonic() - 60 * spent, spent

    def save(counts: tuple[int, ...] = (0, 1)) -> None:
        part = checkpoint.with_suffix(".part")
        torch.save(
            {
                "denoiser": denoiser.state_dict(),
                "average": average.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step,
                "minutes": spent,
                "model": transform,
            },
            part,
        )
        part.replace(checkpoint)
        rows = validate(average, codec, distance, held_out, counts)
        with (folder / "validation.csv").open("a", newline="") as file:
            csv.writer(file).writerows(
                [step, f"{spent:.1f}", g, n, f"{d:.4f}", f"{p:.3f}"] for g, n, d, p in rows
            )
        click.echo(
            f"{step} {spent:.1f} min "
            + " ".join(f"g{g}/{n}: {d:.3f}/{p:.2f}" for g, n, d, p in rows if n < 2),
            err=True,
        )

    while spent < minutes:
        progress = spent / minutes
        rate = lr * min(1, (step + 1) / 200) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimiser.param_groups:
            group["lr"] = rate
        x = source.batch(batch).to(device).float() / 127.5 - 1
        image_step = random_steps(batch, generator).to(device)
        offsets = random_offsets(batch, size // 16, size // 16, generator).to(device)
        y_hat, exponent, x_bar = decode(codec, x, image_step, offsets)
        timestep = torch.randint(NOISE_LEVELS, (batch,), generator=generator).to(device)
        first = (torch.rand(batch, generator=generator) < 0.5).to(device)
        timestep = torch.where(first, NOISE_LEVELS - 1, timestep)
        origin = torch.where(first.view(-1, 1, 1, 1), x_bar, x)
        noise = torch.randn(x.shape, generator=generator).to(device)
        x_t = process.add_noise(origin, noise, timestep)
        with torch.autocast(device, torch.bfloat16, enabled=device.startswith("cuda")):
            x_0 = denoiser(x_t, timestep, y_hat, exponent, x_bar)
        x_0 = x_0.float()
        error = (x_0 - x).mul(127.5).square()
        perceptual = distance(x_0.clamp(-1, 1), x)
        loss = perceptual.mean() + SQUARED_ERROR_WEIGHT * (error * weight).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        if torch.isfinite(norm):
            optimiser.step()
        decay = min(0.9995, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(denoiser.parameters()), 1 - decay)
        step += 1
        spent = (time.monotonic() - started) / 60
        if step % 50 == 0:
            psnr = 10 * math.log10(255**2 / error.detach().mean().item())
            values = (loss.item(), perceptual.detach().mean().item())
            writer.writerow(
                [step, f"{spent:.2f}", f"{rate:.2e}"]
                + [f"{v:.4f}" for v in values]
                + [f"{psnr:.2f}", f"{norm.item():.3f}"]
            )
            log.flush()
        if spent - saved >= 5:
            saved = spent
            save()
    save((0, 1, 2, 4, 8))


if __name__ == "__main__":
    main()
