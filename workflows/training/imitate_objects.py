"""Stage 3, before PPO: teach the policy to see the blocks that `--allocation objects` would raise.

    python workflows/training/pack_crops.py crops.npy FLIGHTS...
    python workflows/training/find_objects.py crops.json objects.json --detector MODEL FLIGHTS...
    python workflows/training/imitate_objects.py crops.npy objects.json --model MODEL_FOLDER \
        --run runs/imitation
    python workflows/training/train_allocation.py ... --start runs/imitation/allocation.safetensors

What a block with an object is worth, log importance log 4, makes two levels of it, an octave; all
others are worth log 1. The policy learns the mean, so a block that may be an object is raised a
little; --strength multiplies what it has learned. Crops are coded once, into a table of the
policy's states that fills first.

Writes allocation.safetensors, that of the epoch that was best on crops of held-out images, and
log.csv.
"""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from policy_setup import SIZE, Setup, normalise_by, random_step, setup_options
from torch import Tensor
from torch.nn import functional as F

from archive_pipeline.pcdc.constants import BLOCK_SIDE
from archive_pipeline.pcdc.encoding import Encoding
from archive_pipeline.pcdc.policy import (
    POLICY,
    Policy,
    PolicyConfig,
    block_state,
    load_policy,
    pack_policy,
    state_groups,
)

IMPORTANT = math.log(4)  # an octave finer: level 5 beside level 3
MISSED = 4.0  # times as bad is it to miss an object's block as to raise another one
BATCH = 32
DROPOUT = 0.3  # of the state's channels: there are more of them than objects
HELD_OUT = 8  # every so many-th crop of the table is of held-out images


class Table:
    """States and objects of crops, kept in files that an interrupted run goes on from.

    Attributes:
        states: float16 (n, C, B_h, B_w).
        known: int8 (n, B_h, B_w): 1 objects, 0 none, -1 unsure.
    """

    def __init__(self, folder: Path, latents: int, count: int) -> None:
        channels = state_groups(latents)["place"].stop
        blocks = SIZE // BLOCK_SIDE
        self.count = count
        self.states = _mapped(folder / "states.npy", np.float16, (count, channels, blocks, blocks))
        self.known = _mapped(folder / "known.npy", np.int8, (count, blocks, blocks))
        self.progress = folder / "filled"

    def fill(self, setup: Setup) -> None:
        """Code crops to train on, and every `HELD_OUT`-th time one of a held-out image."""
        first = int(self.progress.read_text()) if self.progress.is_file() else 0
        sources = [setup.source(held_out) for held_out in (False, True)]
        rng = setup.generator(first)
        for k in range(first, self.count):
            crop = sources[k % HELD_OUT == 0].crop(rng)
            job, step = Encoding(setup.codec, [crop.pixels]), random_step(rng)
            costs = job.block_costs(0, step)
            self.states[k] = block_state(crop.pixels, job.latents_of(0), costs, step).numpy()
            self.known[k] = np.where(crop.unsure, -1, crop.objects)
            if (k + 1) % 50 == 0 or k + 1 == self.count:
                self.progress.write_text(str(k + 1))
                click.echo(f"table: {k + 1} of {self.count} crops", err=True)


def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> NDArray:
    if path.is_file():
        found: NDArray = np.load(path, mmap_mode="r+")
        if found.shape == shape:
            return found
        raise click.ClickException(f"{path}: of another size of table; use another --run")
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def error(importance: Tensor, known: Tensor) -> Tensor:
    """Weighted squared error of log importance (N, B_h, B_w); blocks unsure of do not count."""
    weight = torch.where(known > 0, MISSED, (known == 0).float())
    wanted = IMPORTANT * (known > 0)
    return (weight * (importance - wanted).square()).sum() / weight.sum()


@torch.no_grad()
def validate(policy: Policy, states: NDArray, known: NDArray) -> tuple[float, float, float]:
    """Error, and the mean importance of blocks with objects and of others, in log 4."""
    policy.eval()
    said = torch.cat([policy.importance(torch.from_numpy(s).float()[None]) for s in states])
    truth = torch.from_numpy(known)
    loss = float(error(said, truth))
    return loss, *(float(said[truth == k].mean()) / IMPORTANT for k in (1, 0))


@click.command(help=__doc__)
@setup_options
@click.option("--count", default=2000, show_default=True, help="Crops in the table.")
@click.option("--epochs", default=30, show_default=True)
@click.option("--lr", default=1e-3, show_default=True, help="AdamW's, falling along a cosine.")
@click.option("--strength", default=1.6, show_default=True, help="Of importances, in the end.")
def main(setup: Setup, count: int, epochs: int, lr: float, strength: float) -> None:
    folder, latents, seed = setup.folder, setup.latents, setup.seed
    table = Table(folder, latents, count)
    table.fill(setup)
    policy = Policy(PolicyConfig(latents=latents))
    held = np.arange(count) % HELD_OUT == 0
    train, test = np.flatnonzero(~held), np.flatnonzero(held)
    normalise_by(policy, torch.from_numpy(table.states[train[:200]]))
    setup.leave_out(policy)
    fit(policy, table, train, test, folder, epochs, lr, seed)
    policy = load_policy((folder / POLICY).read_bytes(), latents)
    policy.importance_of.weight.mul_(strength)
    policy.importance_of.bias.mul_(strength)
    (folder / POLICY).write_bytes(pack_policy(policy))


def fit(
    policy: Policy,
    table: Table,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    folder: Path,
    epochs: int,
    lr: float,
    seed: int,
) -> None:
    """Train the actor; leaves the best policy and a log."""
    actor = [*policy.actor.parameters(), *policy.importance_of.parameters()]
    adam = torch.optim.AdamW(actor, lr=lr, weight_decay=0.05)
    rng, best, started = np.random.default_rng(seed), math.inf, time.monotonic()
    batches = len(train) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, epochs * batches)
    with (folder / "log.csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["epoch", "minutes", "loss", "held_out", "objects", "others"])
        for epoch in range(epochs):
            policy.train()
            total = 0.0
            for part in rng.permutation(train)[: batches * BATCH].reshape(batches, BATCH):
                state = torch.from_numpy(table.states[np.sort(part)]).float()
                keep = F.dropout2d(torch.ones(BATCH, state.shape[1], 1, 1), DROPOUT)
                mean = policy.mean[:, None, None]
                said = policy.importance(mean + keep * (state - mean))
                loss = error(said, torch.from_numpy(table.known[np.sort(part)]))
                adam.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(actor, 1.0)
                adam.step()
                schedule.step()
                total += float(loss.detach())
            seen = validate(policy, table.states[test], table.known[test])
            minutes = (time.monotonic() - started) / 60
            log.writerow([epoch + 1, *(f"{v:.4g}" for v in (minutes, total / batches, *seen))])
            file.flush()
            if seen[0] < best:
                best = seen[0]
                (folder / POLICY).write_bytes(pack_policy(policy))


if __name__ == "__main__":
    main()
