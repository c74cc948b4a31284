"""What the training stages begin with: checkpoints and released models.

Checkpoints of both stages hold `average` (averaged weights), `optimiser`, `step` and `minutes`, and
the weights in training: `codec` (stage 1) or `denoiser` (stage 2, with `model`, the SHA-256 of its
transform).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from archive_pipeline.pcdc.model import Model
from archive_pipeline.pcdc.model_files import ModelError


def read_checkpoint(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        click.ClickException: it is none.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # pickle, zipfile and torch raise what they like
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise click.ClickException(f"{path} is no checkpoint: {reason}") from error
    if not isinstance(state, dict) or "average" not in state:
        raise click.ClickException(f"{path} is no checkpoint of a training stage")
    return state


def read_release(folder: Path) -> Model:
    """Read a released model's folder.

    Raises:
        click.ClickException: it holds none.
    """
    try:
        return Model.from_folder(folder)
    except ModelError as error:
        raise click.ClickException(str(error)) from error


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; a run that is killed meanwhile keeps the one before."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)
