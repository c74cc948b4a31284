"""Stage 1: train the transform codec (transforms, hyperprior, scales) for all rates at once.

    python workflows/training/pack_crops.py crops.npy FLIGHTS...
    python workflows/training/train_transform.py crops.npy --run runs/transform --minutes 120

Every crop draws an image step g and, half the time, random per-block levels, so one model serves
all rates. The loss is bits + lambda(step) * error with lambda = 8.66 / step^2, the slope of
squared error at a uniform quantiser at high rate (dD/dR = -2 ln 2 * step^2 / 12), so a block
coded with a finer step also weighs its error more, as the allocation means it to. The error is
the allocation's utility (paper, equation 5): squared error, here with less weight on colour and
also at half and quarter size, 1 - SSIM (at three scales) and LPIPS, which weighs more; with
--detector also the distance of that detector's features, so that it sees what it saw before.

LPIPS needs torchvision's SqueezeNet 1.1 features; they are downloaded, or found under $TORCH_HOME.

The learning rate follows a cosine over --minutes of training time; --resume continues a run from
its checkpoint, along a new cosine where --minutes is another; --start goes on from released
weights with a new optimiser. Networks run in bfloat16 where the machine has matrix units for it
(--precision); weights, loss and entropy model stay float32. CUDA runs are compiled.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import click
import torch
from checkpoints import read_checkpoint, read_release
from detector_features import load_features
from torch import Tensor
from training import Run, Settings, common_options
from training_samples import Crops, emphasis, random_offsets, random_steps
from transform_loss import (
    border_weights,
    multiscale_squared_error,
    perceptual_error,
    rate_distortion,
    structural_error,
)
from transform_start import config_of, klt_start, load_released

from archive_pipeline.pcdc.training.judge import lpips
from archive_pipeline.pcdc.transforms import TransformCodec, TransformConfig

VALIDATION_STEPS = (16, 24, 32, 40, 48)
HELD_OUT = 32  # crops
ARCHITECTURES = {
    "small": TransformConfig(depth_8=8, depth_16=12, extra_depth_16=0),
    "fast": TransformConfig(),
}


@torch.no_grad()
def validate(
    codec: TransformCodec, crops: Tensor, settings: Settings
) -> list[tuple[int, float, float, float, float]]:
    """Mean (image step, bpp, PSNR, 1 - SSIM, LPIPS) of `crops` at `VALIDATION_STEPS`."""
    codec.eval()
    device, rows = settings.device, []
    for g in VALIDATION_STEPS:
        bpp, mse, structure, perceived = [], [], [], []
        for part in crops.split(8):
            x = part.to(device).float() / 127.5 - 1
            step = torch.full((len(x),), g, device=device)
            zero = torch.zeros(len(x), 1, x.shape[2] // 16, x.shape[3] // 16, device=device)
            with settings.autocast():
                bits, x_bar, _ = rate_distortion(codec, x, step, zero.long(), noise=False)
            bpp.append(bits / x[0, 0].numel())
            x_bar = x_bar.float().clamp(-1, 1)
            mse.append((x_bar - x).mul(127.5).square().mean((1, 2, 3)))
            structure.append(structural_error(x_bar, x))
            perceived.append(lpips(x_bar, x))
        psnr = 10 * torch.log10(255**2 / torch.cat(mse))
        columns = (torch.cat(bpp), psnr, torch.cat(structure), torch.cat(perceived))
        rows.append((g, *(float(column.mean()) for column in columns)))
    codec.train()
    return rows


def klt_codec(config: TransformConfig, crops: Tensor) -> TransformCodec:
    """A codec that is the Karhunen-Loeve transform of crops uint8 (n, 3, H, W)."""
    codec = TransformCodec(config)
    klt_start(codec, crops)
    return codec


def grown(config: TransformConfig, folder: Path, crops: Tensor) -> TransformCodec:
    """A released model's codec with what it lacks of `config`; what it has more of, it keeps.

    Raises:
        click.ClickException: the folder holds none.
    """
    released = read_release(folder).networks
    before, wanted = released.config.to_json(), config.to_json()
    larger = {name: max(n, before[name]) for name, n in wanted.items()}
    # g_a's own blocks are counted from g_s's on, so there are fewer of them where those grow
    deepest = max(c["depth_16"] + c["extra_depth_16"] for c in (before, wanted))
    larger["extra_depth_16"] = deepest - larger["depth_16"]
    codec = TransformCodec(TransformConfig(**larger))
    load_released(codec, released, crops)
    return codec


@click.command(help=__doc__)
@common_options(
    batch=8,
    lr=1e-3,
    start="Start from a released model's folder instead of the Karhunen-Loeve transform.",
)
@click.option(
    "--detector",
    metavar="MODEL",
    help="YOLO detector (.pt, OpenVINO folder) of which reconstructions shall keep the features.",
)
@click.option(
    "--architecture",
    type=click.Choice(list(ARCHITECTURES)),
    default="small",
    show_default=True,
    help="Depth: that of the release, or of those before it. A --start that has less grows to it.",
)
def main(settings: Settings, detector: str | None, architecture: str) -> None:
    device, size, batch = settings.device, settings.size, settings.batch
    before = read_checkpoint(settings.checkpoint, device) if settings.resume else None
    if before:
        codec = TransformCodec(config_of(before["average"]))
    else:
        first = Crops(settings.crops, size, settings.seed).batch(256)
        config = ARCHITECTURES[architecture]
        codec = grown(config, settings.start, first) if settings.start else klt_codec(config, first)
    codec = settings.place(codec)
    run = Run(settings, "codec", codec, deepcopy(codec), clip=2.0, measure="bpp")
    if before:
        run.restore(before)
    source = Crops(settings.crops, size, settings.own_seed + run.step)
    generator = torch.Generator().manual_seed(settings.own_seed + run.step)
    held_out = source.validation(HELD_OUT)
    weight = border_weights(size).to(device)
    seen = load_features(detector, held_out).to(device) if detector else None
    forward = settings.compiled(rate_distortion)

    def save() -> None:
        run.save()
        if not run.leads:
            return
        rows = validate(run.average, held_out, settings)
        run.report(
            [(g, f"{b:.4f}", f"{p:.3f}", f"{s:.4f}", f"{d:.4f}") for g, b, p, s, d in rows],
            " ".join(f"{b:.3f}/{p:.2f}/{s:.3f}/{d:.3f}" for _, b, p, s, d in rows),
        )

    run.begin()
    while not run.finished:
        x = settings.place(source.batch(batch)).float() / 127.5 - 1
        image_step = random_steps(batch, generator).to(device)
        offsets = random_offsets(batch, size // 16, size // 16, generator).to(device)
        with settings.autocast():
            bits, x_bar, steps = forward(codec, x, image_step, offsets, noise=True)
        error = multiscale_squared_error(x_bar.float(), x)
        pixel_step = steps.repeat_interleave(16, -2).repeat_interleave(16, -1)
        slope = 8.66 / pixel_step.square()
        perceptual = perceptual_error(x_bar.float(), x, seen) * slope.mean((1, 2, 3))
        distortion = (error * weight * slope).sum((1, 2, 3)) + 3 * size**2 * perceptual
        loss = ((bits + distortion) * emphasis(image_step)).mean() / size**2
        run.update(loss)
        if run.log_due:
            plain = (x_bar.float() - x).mul(127.5).square().mean()
            run.log(loss.item(), bits.mean().item() / size**2, plain.item())
        if run.save_due:
            save()
    save()


if __name__ == "__main__":
    main()
