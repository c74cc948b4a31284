"""Stage 3: train the allocation policy, with transform and entropy model frozen.

    python workflows/training/pack_crops.py crops.npy FLIGHTS...
    python workflows/training/find_objects.py crops.json objects.json --detector MODEL FLIGHTS...
    python workflows/training/train_allocation.py crops.npy objects.json --detector MODEL \
        --model MODEL_FOLDER --run runs/allocation --start runs/imitation/allocation.safetensors

The reward is the utility of equation (5) with a term for what the detector then loses; with
--task-weight 0 it is the paper's. --start goes on from what `imitate_objects.py` made, without it
PPO begins with a policy that knows nothing; with --updates 0 --decoder-updates 0 a start only gets
the units that bits are priced in. Three parts, each resumed where it stopped:

1. A table: crops are coded at each of the five levels throughout, decoded and judged, so what
   every level of every block does to bits and utility is known.
2. PPO on the table: millions of decisions a minute, as nothing needs decoding. A block's return
   supposes that its neighbours matter little.
3. PPO with the decoder: the drawn levels are coded, decoded and judged, neighbours and all.

The price of bits follows dual ascent, equation (8), so that the mean rate is that of the base
level; around it each tile draws its own price, as one policy is to serve every budget.
"""

from __future__ import annotations

import csv
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import click
import numpy as np
import torch
from object_crops import ObjectCrop
from policy_setup import Setup, normalise_by, random_step, setup_options
from torch import Tensor

from archive_pipeline.detection.detectors import Detector, find_detectors, load_detector
from archive_pipeline.detection.task_loss import TaskLoss
from archive_pipeline.pcdc.allocation import BASE_LEVEL, LEVELS, TilePlan
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.encoding import Encoding
from archive_pipeline.pcdc.policy import (
    POLICY,
    Policy,
    PolicyConfig,
    block_state,
    load_policy,
    pack_policy,
)
from archive_pipeline.pcdc.training.adaptation import to_signal
from archive_pipeline.pcdc.training.judge import Judge, UtilityWeights
from archive_pipeline.pcdc.training.ppo import (
    Optimiser,
    PPOConfig,
    Rollout,
    block_returns,
    dual_ascent,
    gather_levels,
    roll_out,
)

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
from coding import level_terms

BASE = BASE_LEVEL - 1
PRICE_SPREAD = 0.7  # tiles draw prices up to e^0.7 above and below the mean
BUDGET = 2.0  # bits that a tile may take at most, in terms of the base level's
TABLE_BATCH = 64
DECODER_BATCH = 8
LOG_EVERY = 10
FIELDS = ["update", "minutes", "part", "gain", "rate", "price", "entropy", "value_loss", "clipped"]
LEVEL_FIELDS = [f"level_{k}" for k in range(1, LEVELS + 1)]


def look_up(
    crop: ObjectCrop, codec: Codec, image_step: int, detector: Detector | None
) -> dict[str, Tensor]:
    """State, bits and losses of a crop's blocks at every level, by coding it at each throughout."""
    job = Encoding(codec, [crop.pixels])
    costs = job.block_costs(0, image_step)
    task = None if detector is None else TaskLoss.of(detector, crop.pixels)
    return {
        "pixels": torch.from_numpy(crop.pixels),
        "step": torch.tensor(image_step),
        "state": block_state(crop.pixels, job.latents_of(0), costs, image_step).half(),
        "bits": torch.from_numpy(costs.bits).float(),
        "terms": level_terms(job, 0, image_step, task),
        "objects": torch.from_numpy(crop.objects),
    }


def fill_table(setup: Setup, detector: Detector | None, count: int) -> dict[str, Tensor]:
    """Return a table of `count` crops, kept in a file that an interrupted run goes on from."""
    path = setup.folder / "table.pt"
    rows: list[dict[str, Tensor]] = torch.load(path, weights_only=True) if path.is_file() else []
    source, rng = setup.source(), setup.generator(len(rows))
    saved = time.monotonic()
    while len(rows) < count:
        rows.append(look_up(source.crop(rng), setup.codec, random_step(rng), detector))
        if time.monotonic() - saved > 60 or len(rows) == count:
            torch.save(rows, part := path.with_suffix(".part"))
            part.replace(path)
            saved = time.monotonic()
            click.echo(f"table: {len(rows)} of {count} crops", err=True)
    return {name: torch.stack([row[name] for row in rows[:count]]) for name in rows[0]}


def fit_units(
    table: dict[str, Tensor], config: PolicyConfig, weights: UtilityWeights
) -> PolicyConfig:
    """Fit how usual bits and slopes of the utility depend on the image step, over bins of it."""
    losses = weights.of(table["terms"])
    order = table["step"].argsort()
    at, rate, slope = [], [], []
    bins = max(2, min(8, len(order) // 8))  # a crop by itself may lose nothing
    for part in order.tensor_split(bins):
        bits = table["bits"][part].sum((0, 2, 3))
        loss = losses[part].sum((0, 2, 3))
        at.append(float(table["step"][part].float().mean()))
        rate.append(math.log(float(bits[BASE]) / table["bits"][part, BASE].numel()))
        bought = float(loss[BASE - 1] - loss[BASE + 1])
        slope.append(math.log(bought / float(bits[BASE + 1] - bits[BASE - 1])))

    def line(values: list[float]) -> tuple[float, float]:
        gradient, offset = np.polyfit(at, values, 1)
        return float(offset), float(gradient)

    return replace(config, rate=line(rate), slope=line(slope))


class Environment:
    """Tiles of the table in the units of a policy: bits and utility as usual at their step."""

    def __init__(
        self,
        table: dict[str, Tensor],
        config: PolicyConfig,
        weights: UtilityWeights,
        detector: Detector | None,
    ) -> None:
        steps = table["step"].tolist()
        usual = torch.tensor([config.usual_bits(g) for g in steps]).view(-1, 1, 1, 1)
        worth = torch.tensor([config.usual_slope(g) for g in steps]).view(-1, 1, 1, 1) * usual
        self.table = table
        self.weights = weights
        self.detector = detector
        self.state = table["state"]
        self.bits = table["bits"] / usual
        self.loss = weights.of(table["terms"])
        self.gain = (self.loss[:, BASE : BASE + 1] - self.loss) / worth
        self.worth = worth[:, 0]

    def judge(self, rollout: Rollout, chosen: Tensor, codec: Codec) -> Tensor:
        """Utility gained over the base level around every block, (N, B_h, B_w)."""
        gains = []
        for k, levels in zip(chosen.tolist(), rollout.levels, strict=True):
            crop = self.table["pixels"][k].numpy()
            plan = TilePlan(int(self.table["step"][k]), (levels + 1).numpy().astype(np.uint8))
            [pixels] = codec.synthesise([Encoding(codec, [crop]).reconstruct(0, plan)])
            task = None if self.detector is None else TaskLoss.of(self.detector, crop)
            loss = Judge(to_signal(crop), self.weights, task).loss(to_signal(pixels))
            gains.append((self.loss[k, BASE] - loss) / self.worth[k])
        return torch.stack(gains)


@click.command(help=__doc__)
@setup_options
@click.option("--tiles", default=200, show_default=True, help="Crops in the table.")
@click.option("--updates", default=600, show_default=True, help="PPO updates on the table.")
@click.option("--decoder-updates", default=60, show_default=True, help="With the decoder.")
@click.option("--detector", metavar="MODEL", help="YOLO detector that is the task.")
@click.option(
    "--task-weight",
    default=UtilityWeights.task,
    show_default=True,
    help="Of what it loses, beside equation (5).",
)
@click.option("--start", type=click.Path(exists=True, path_type=Path), help="A policy's file.")
def main(
    setup: Setup,
    tiles: int,
    updates: int,
    decoder_updates: int,
    detector: str | None,
    task_weight: float,
    start: Path | None,
) -> None:
    task = None if detector is None else load_detector(*find_detectors([detector]))
    table = fill_table(setup, task, tiles)
    weights = UtilityWeights(task=task_weight)
    config = fit_units(table, PolicyConfig(latents=setup.latents), weights)
    policy = begun(config, start, table["state"])
    setup.leave_out(policy)
    environment = Environment(table, config, weights, task)
    train(policy, environment, setup, updates, decoder_updates)


def begun(config: PolicyConfig, start: Path | None, states: Tensor) -> Policy:
    """A policy that knows nothing, or that of a file, in the units of a configuration."""
    policy = Policy(config)
    if start is None:
        normalise_by(policy, states)
    else:
        policy.load_state_dict(load_policy(start.read_bytes(), config.latents).state_dict())
    return policy


def train(
    policy: Policy,
    environment: Environment,
    setup: Setup,
    updates: int,
    decoder_updates: int,
) -> None:
    """Run PPO, on the table and then with the decoder; leaves policy, log and checkpoint."""
    folder, seed = setup.folder, setup.seed
    config = PPOConfig()
    optimiser = Optimiser(policy, config)
    generator = torch.Generator().manual_seed(seed)
    checkpoint = folder / "checkpoint.pt"
    first, price, spent = 0, 1.0, 0.0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        policy.load_state_dict(state["policy"])
        optimiser.adam.load_state_dict(state["adam"])
        first, price, spent = state["update"], state["price"], state["minutes"]
        generator.manual_seed(seed + first)
    started = time.monotonic() - 60 * spent
    with (folder / "log.csv").open("a", newline="") as file:
        log = csv.DictWriter(file, FIELDS + LEVEL_FIELDS)
        if not first:
            log.writeheader()
        for update in range(first, updates + decoder_updates):
            decoding = update >= updates
            count = DECODER_BATCH if decoding else TABLE_BATCH
            chosen = torch.randperm(len(environment.state), generator=generator)[:count]
            bits = environment.bits[chosen]
            spread = torch.rand(len(chosen), generator=generator) * 2 - 1
            prices = max(price, 0.05) * torch.exp(PRICE_SPREAD * spread)
            allowed = bits[:, BASE].sum((1, 2))
            state = environment.state[chosen].float()
            rollout = roll_out(policy, state, bits, prices, BUDGET * allowed, generator)
            extra = gather_levels(bits, rollout.levels) - bits[:, BASE]
            if decoding:
                gain = environment.judge(rollout, chosen, setup.codec)
                rollout.returns = block_returns(rollout, gain)
            else:
                gain = gather_levels(environment.gain[chosen], rollout.levels)
                rollout.returns = gain - prices.view(-1, 1, 1) * extra
            seen = optimiser.update(rollout, generator)
            rate = float((allowed + extra.sum((1, 2))).sum() / allowed.sum())
            price = dual_ascent(price, rate, 1.0, config)
            if (update + 1) % (1 if decoding else LOG_EVERY) == 0:
                minutes = (time.monotonic() - started) / 60
                shares = torch.bincount(rollout.levels.flatten(), minlength=LEVELS).double()
                shares = shares / shares.sum()
                row = [update + 1, minutes, "decoder" if decoding else "table"]
                row += [float(gain.mean()), rate, price, *seen.values(), *shares.tolist()]
                log.writerow(
                    {
                        name: f"{value:.5g}" if isinstance(value, float) else value
                        for name, value in zip(FIELDS + LEVEL_FIELDS, row, strict=True)
                    }
                )
                file.flush()
            last = update + 1 == updates + decoder_updates
            if last or (update + 1) % (10 if decoding else 100) == 0:
                save = {
                    "policy": policy.state_dict(),
                    "adam": optimiser.adam.state_dict(),
                    "update": update + 1,
                    "price": price,
                    "minutes": (time.monotonic() - started) / 60,
                }
                torch.save(save, part := checkpoint.with_suffix(".part"))
                part.replace(checkpoint)
                click.echo(f"{update + 1} rate {rate:.3f} price {price:.3f} {seen}", err=True)
    (folder / POLICY).write_bytes(pack_policy(policy))
    click.echo(f"{folder / POLICY}: {asdict(policy.config)}", err=True)


if __name__ == "__main__":
    main()
