"""How benchmarks code a picture with our codec: tiles as the archive cuts them."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archive_pipeline.codec.models import load_named, read_policy
from archive_pipeline.pcdc.allocation import LEVELS, TilePlan
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.encoding import Encoding, Worth, encode_tiles, least_error
from archive_pipeline.pcdc.model_files import ModelError
from archive_pipeline.pcdc.policy import Policy, PolicyError, load_policy
from archive_pipeline.pcdc.training.adaptation import to_signal
from archive_pipeline.pcdc.training.judge import Judge, Task
from archive_pipeline.store.layout import TILE

Pixels = NDArray[np.uint8]


def split(pixels: Pixels) -> list[Pixels]:
    """The tiles of an image."""
    rows, columns = range(0, pixels.shape[0], TILE), range(0, pixels.shape[1], TILE)
    return [np.ascontiguousarray(pixels[r : r + TILE, c : c + TILE]) for r in rows for c in columns]


def join(tiles: list[NDArray], shape: tuple[int, int], side: int = TILE) -> NDArray:
    """Put tiles of so many samples a side together."""
    out = np.empty((*shape, *tiles[0].shape[2:]), tiles[0].dtype)
    left = iter(tiles)
    for r in range(0, shape[0], side):
        for c in range(0, shape[1], side):
            out[r : r + side, c : c + side] = next(left)
    return out


def level_terms(job: Encoding, tile: int, image_step: int, task: Task | None = None) -> Tensor:
    """The utility's terms (K, 4, B_h, B_w) around a tile's blocks, by coding, decoding and judging
    it at each level throughout."""
    pixels = job.tiles[tile]
    judge = Judge(to_signal(pixels), task=task)
    terms = []
    for level in range(1, LEVELS + 1):
        levels = np.full(job.allocator.grids[tile], level, np.uint8)
        [decoded] = job.codec.synthesise([job.reconstruct(tile, TilePlan(image_step, levels))])
        terms.append(judge.terms(to_signal(decoded)))
    return torch.stack(terms)


class Coder:
    """A model, and the policy beside it or in a file.

    Raises:
        click.ClickException: either cannot be had.
    """

    def __init__(self, model: str, policy_file: Path | None = None) -> None:
        try:
            self.codec = Codec(load_named(model))
            latents = self.codec.model.networks.config.latents
            data = policy_file.read_bytes() if policy_file else read_policy(model, latents)
            self.policy: Policy | None = None if data is None else load_policy(data, latents)
        except (ModelError, PolicyError, OSError) as error:
            raise click.ClickException(str(error)) from error

    def worth(self, allocation: str) -> Worth | None:
        """What decides between levels by "policy" or "greedy"; None by "uniform".

        Raises:
            click.ClickException: there is no policy.
        """
        if allocation == "policy":
            if self.policy is None:
                raise click.ClickException("--allocation policy: this model has no policy")
            return self.policy.block_worth
        return least_error if allocation == "greedy" else None

    def encode(self, tiles: list[Pixels], budget: int, allocation: str) -> list[bytes]:
        """Encode into at most `budget` bytes, allocated as `worth` says."""
        return encode_tiles(self.codec, tiles, budget, self.worth(allocation))

    def decode(
        self, streams: list[bytes], shape: tuple[int, int], steps: int, realism: float = 1.0
    ) -> Pixels:
        """Decode what `encode` made of the tiles of an image of this height and width."""
        return join(self.codec.decode(streams, TILE, TILE, steps, 0, realism), shape)
