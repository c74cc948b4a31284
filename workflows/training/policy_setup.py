"""What imitation and PPO of the allocation policy have in common: options, crops, states."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from checkpoints import read_release
from object_crops import ObjectCrops
from torch import Tensor

from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.policy import Policy, state_groups

SIZE = 512  # pixels a side of crops: the paper's 16 x 16 blocks
STEPS = (10, 55)  # image steps of tables, first and last


@dataclass(frozen=True)
class Setup:
    """What is trained on, for which model, and where.

    Attributes:
        crops, objects: packed images, and the file with their objects.
        folder: of the run.
        holdout: patterns of names of images that are not trained on.
        without: parts of the state that are left out.
    """

    crops: Path
    objects: Path
    codec: Codec
    folder: Path
    holdout: tuple[str, ...]
    without: tuple[str, ...]
    seed: int

    @property
    def latents(self) -> int:
        """Channels of the codec's y."""
        return self.codec.model.networks.config.latents

    def source(self, held_out: bool = False) -> ObjectCrops:
        """Crops to train on, or those of the images that are held out.

        Raises:
            click.ClickException: there is no image to draw from.
        """
        return ObjectCrops(self.crops, self.objects, SIZE, self.holdout, held_out)

    def generator(self, first: int) -> np.random.Generator:
        """What draws a table's crops from the `first` on: a run that goes on draws others."""
        return np.random.default_rng([self.seed, first])

    def leave_out(self, policy: Policy) -> None:
        """Blind a policy for the parts of the state that are left out."""
        for group in self.without:
            policy.scale[state_groups(self.latents)[group]] = 0


def setup_options(command: Callable[..., None]) -> Callable[..., None]:
    """Arguments and options of which a command gets a `Setup`."""

    @click.argument("crops", type=click.Path(exists=True, path_type=Path))
    @click.argument("objects", type=click.Path(exists=True, path_type=Path))
    @click.option("--model", type=click.Path(exists=True, path_type=Path), required=True)
    @click.option("--run", "folder", type=click.Path(path_type=Path), required=True)
    @click.option("--holdout", multiple=True, metavar="PATTERN", help="Images to leave out.")
    @click.option(
        "--without",
        type=click.Choice(["residual", "features", "costs", "place"]),
        multiple=True,
        help="Leave a part of the state out, to see what it is good for.",
    )
    @click.option("--seed", default=0, show_default=True)
    @click.option("--threads", default=0, help="CPU threads, 0 = torch's default.")
    @functools.wraps(command)
    def wrapped(
        crops: Path,
        objects: Path,
        model: Path,
        folder: Path,
        holdout: tuple[str, ...],
        without: tuple[str, ...],
        seed: int,
        threads: int,
        **others: Any,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        torch.manual_seed(seed)
        folder.mkdir(parents=True, exist_ok=True)
        codec = Codec(read_release(model))
        command(Setup(crops, objects, codec, folder, holdout, without, seed), **others)

    return wrapped


def random_step(rng: np.random.Generator) -> int:
    """An image step; more of the coarse ones: archives are mostly made at low rates."""
    return STEPS[0] + int((STEPS[1] + 1 - STEPS[0]) * math.sqrt(rng.random()))


def normalise_by(policy: Policy, states: Tensor) -> None:
    """Set what a policy takes off its state (n, C, B_h, B_w), and divides it by."""
    states = states.float()
    policy.mean[:] = states.mean((0, 2, 3))
    policy.scale[:] = 1 / states.std((0, 2, 3)).clamp_min(1e-3)
