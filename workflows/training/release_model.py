"""Turn training checkpoints into a released model.

    python workflows/training/release_model.py runs/transform/checkpoint.pt models/NAME \
        --crops crops.npy
    python workflows/training/release_model.py runs/denoiser/checkpoint.pt models/NAME

Either stage's checkpoint is told by its contents. The averaged weights are taken, what the
entropy decoder depends on is snapped to its integer grid, and `config.json` and
`model.safetensors` are written; of the denoiser `denoiser/`, its weights in half precision. The
frequency tables are of Gaussian symbols, or with --crops fitted to those that training crops
give. With --blend the weights lie between those of an earlier release, which training started
from, and the checkpoint's, at --share of the way: much of what training gained on some measures
stays, and more of what it lost on others comes back (Wortsman et al., arXiv:2109.01903).
Releasing a transform removes a denoiser and an allocation policy that were trained for the one
before. The model card, README.md, is written by hand beside them. Prints the model's SHA-256.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import click
import torch
from checkpoints import read_checkpoint, read_release
from safetensors.torch import save as save_tensors
from symbol_tables import fitted_tables
from torch import Tensor
from transform_start import config_of, take_over

from archive_pipeline.pcdc.constants import CELL_SAMPLES
from archive_pipeline.pcdc.layers import DepthConvBlock
from archive_pipeline.pcdc.model import Model, build_files
from archive_pipeline.pcdc.model_files import DENOISER_CONFIG, DENOISER_WEIGHTS, transform_digest
from archive_pipeline.pcdc.policy import POLICY
from archive_pipeline.pcdc.transforms import TransformCodec

COUNT = 240  # crops that frequency tables are fitted to
SIDE = 256  # their side in pixels
DEPTHS = ("depth_8", "depth_16", "extra_depth_16")


def blended(average: dict[str, Tensor], release: Path, share: float) -> dict[str, Tensor]:
    """Weights at `share` (0..1) of the way from an earlier release's transform to `average`.

    Blocks that training put behind the earlier release's are made the identity there by their last
    layers alone: between it and a block of other inner weights lies nothing of use.

    Raises:
        click.ClickException: the folder holds no model, or one of another architecture.
    """
    before, config = read_release(release).networks, config_of(average)
    deeper = replace(before.config, **{name: getattr(config, name) for name in DEPTHS})
    # the blocks at 1/8, those of g_s at 1/16, and those of g_a
    depths = [
        (c.depth_8, c.depth_16, c.depth_16 + c.extra_depth_16) for c in (before.config, config)
    ]
    if deeper != config or any(new < old for old, new in zip(*depths, strict=True)):
        raise click.ClickException(f"{release} is of another architecture than the checkpoint")
    start = TransformCodec(config)
    start.load_state_dict(average)
    for module in start.modules():
        if isinstance(module, DepthConvBlock):
            module.become_identity()
    take_over(start, before)
    return {k: torch.lerp(v, average[k], share) for k, v in start.state_dict().items()}


def release_transform(state: dict, folder: Path, crops: Path | None) -> None:
    """Write the transform codec's files.

    Raises:
        click.ClickException: the crops are too few.
    """
    networks = TransformCodec(config_of(state["average"]))
    networks.load_state_dict(state["average"])
    shares = fitted_tables(networks, crops, SIDE, COUNT) if crops else None
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in build_files(networks, shares).items():
        (folder / name).write_bytes(content)
    shutil.rmtree((folder / DENOISER_CONFIG).parent, ignore_errors=True)
    (folder / POLICY).unlink(missing_ok=True)


def release_denoiser(state: dict, folder: Path) -> None:
    """Write the denoiser's files.

    Raises:
        click.ClickException: the folder holds no model, or not the transform it was trained for.
    """
    model = read_release(folder)
    transform = transform_digest(model.files)
    if transform != state["model"]:
        raise click.ClickException(
            f"this denoiser was trained for transform {state['model'][:12]}, "
            f"{folder} holds {transform[:12]}"
        )
    from archive_pipeline.pcdc.denoiser import Denoiser

    channels = len(state["average"]["unet.conv_out.bias"])
    denoiser = Denoiser(latents=model.networks.config.latents, grain=(channels - CELL_SAMPLES) // 2)
    denoiser.load_state_dict(state["average"])
    (folder / DENOISER_CONFIG).parent.mkdir(exist_ok=True)
    config = {"_class_name": "Denoiser", **denoiser.config}
    kept = {k: v for k, v in config.items() if k == "_class_name" or not k.startswith("_")}
    (folder / DENOISER_CONFIG).write_text(json.dumps(kept, indent=2) + "\n")
    tensors = {k: v.half().contiguous() for k, v in denoiser.state_dict().items()}
    (folder / DENOISER_WEIGHTS).write_bytes(save_tensors(tensors))


@click.command(help=__doc__)
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--crops",
    type=click.Path(exists=True, path_type=Path),
    help="Fit a transform's frequency tables to crops packed by pack_crops.py.",
)
@click.option(
    "--blend",
    metavar="FOLDER",
    type=click.Path(exists=True, path_type=Path),
    help="Release weights between those of this earlier release and the checkpoint's.",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1),
    default=0.75,
    show_default=True,
    help="How far towards the checkpoint, with --blend.",
)
def main(
    checkpoint: Path, folder: Path, crops: Path | None, blend: Path | None, share: float
) -> None:
    state = read_checkpoint(checkpoint)
    if "denoiser" in state:
        if blend:
            raise click.UsageError("--blend is for a transform's checkpoint, this is a denoiser's")
        release_denoiser(state, folder)
    else:
        if blend:
            state["average"] = blended(state["average"], blend, share)
        release_transform(state, folder, crops)
    model = Model.from_folder(folder)
    if model.has_denoiser:
        model.denoiser()
    click.echo(model.sha256)


if __name__ == "__main__":
    main()
