"""Turn a training checkpoint into a released model folder.

    python workflows/release_model.py runs/transform/checkpoint.pt models/pcdc-drone-small

Writes config.json and model.safetensors (the averaged weights) and prints the model's SHA-256.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from archive_pipeline.pcdc.model import Model, build_files
from archive_pipeline.pcdc.transforms import TransformCodec


@click.command(help=__doc__)
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def main(checkpoint: Path, folder: Path) -> None:
    networks = TransformCodec()
    networks.load_state_dict(
        torch.load(checkpoint, map_location="cpu", weights_only=True)["average"]
    )
    files = build_files(networks)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    click.echo(Model(files).sha256)


if __name__ == "__main__":
    main()
