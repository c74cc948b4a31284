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
from checkpoints import read_release
from object_crops import ObjectCrop, ObjectCrops
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
    state_groups,
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
SIZE = 512  # pixels a side: the paper's 16 x 16 blocks
STEPS = (10, 55)  # image steps of the table, first and last
PRICE_SPREAD = 0.7  # tiles draw prices up to e^0.7 above and below the mean
BUDGET = 2.0  # bits that a tile may take at most, in terms of the base level's
TABLE_BATCH = 64
DECODER_BATCH = 8
LOG_EVERY = 10
FIELDS = ["update", "minutes", "part", "gain", "rate", "price", "entropy", "value_loss", "clipped"]
LEVEL_FIELDS = [f"level_{k}" for k in range(1, LEVELS + 1)]


def random_step(rng: np.random.Generator) -> int:
    """An image step; more of the coarse ones: archives are mostly made at low rates."""
    return STEPS[0] + int((STEPS[1] + 1 - STEPS[0]) * math.sqrt(rng.random()))


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


def fill_table(
    path: Path, source: ObjectCrops, codec: Codec, detector: Detector | None, count: int, seed: int
) -> dict[str, Tensor]:
    """Return a table of `count` crops, kept in a file that an interrupted run goes on from."""
    rows: list[dict[str, Tensor]] = torch.load(path, weights_only=True) if path.is_file() else []
    rng = np.random.default_rng([seed, len(rows)])
    saved = time.monotonic()
    while len(rows) < count:
        rows.append(look_up(source.crop(), codec, random_step(rng), detector))
        if time.monotonic() - saved > 60 or len(rows) == count:
            torch.save(rows, part := path.with_suffix(".part"))
            part.replace(path)
            saved = time.monotonic()
            click.echo(f"table: {len(rows)} of {count} crops", err=True)
    return {name: torch.stack([row[name] for row in rows[:count]]) for name in rows[0]}


def fit_units(table: dict[str, Tensor], config: PolicyConfig) -> PolicyConfig:
    """Fit how usual bits and slopes depend on the image step, over bins of it.

    Usual is a block without a task: the paper's utility.
    """
    order = table["step"].argsort()
    at, rate, slope = [], [], []
    bins = max(2, min(8, len(order) // 8))  # a crop by itself may lose nothing
    for part in order.tensor_split(bins):
        bits = table["bits"][part].sum((0, 2, 3))
        loss = UtilityWeights().of(table["terms"][part]).sum((0, 2, 3))
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


without_option = click.option(
    "--without",
    type=click.Choice(["residual", "features", "costs", "place"]),
    multiple=True,
    help="Leave a part of the state out, to see what it is good for.",
)


@click.command(help=__doc__)
@click.argument("crops", type=click.Path(exists=True, path_type=Path))
@click.argument("objects", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--model", "model_folder", type=click.Path(exists=True, path_type=Path), required=True
)
@click.option("--run", "folder", type=click.Path(path_type=Path), required=True)
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
@click.option("--holdout", multiple=True, metavar="PATTERN", help="Images to leave out.")
@without_option
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=0, help="CPU threads, 0 = torch's default.")
def main(
    crops: Path,
    objects: Path,
    model_folder: Path,
    folder: Path,
    tiles: int,
    updates: int,
    decoder_updates: int,
    detector: str | None,
    task_weight: float,
    start: Path | None,
    holdout: tuple[str, ...],
    without: tuple[str, ...],
    seed: int,
    threads: int,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    codec = Codec(read_release(model_folder))
    latents = codec.model.networks.config.latents
    task = None if detector is None else load_detector(*find_detectors([detector]))
    source = ObjectCrops(crops, objects, SIZE, seed, holdout)
    table = fill_table(folder / "table.pt", source, codec, task, tiles, seed)
    weights = UtilityWeights(task=task_weight if task else 0.0)
    config = fit_units(table, PolicyConfig(latents=latents))
    policy = begun(config, start, table["state"])
    for group in without:
        policy.scale[state_groups(latents)[group]] = 0
    environment = Environment(table, config, weights, task)
    train(policy, environment, codec, folder, updates, decoder_updates, seed)


def begun(config: PolicyConfig, start: Path | None, states: Tensor) -> Policy:
    """A policy that knows nothing, or that of a file, in the units of a configuration."""
    policy = Policy(config)
    if start is None:
        policy.mean[:] = states.float().mean((0, 2, 3))
        policy.scale[:] = 1 / states.float().std((0, 2, 3)).clamp_min(1e-3)
    else:
        policy.load_state_dict(load_policy(start.read_bytes(), config.latents).state_dict())
    return policy


def train(
    policy: Policy,
    environment: Environment,
    codec: Codec,
    folder: Path,
    updates: int,
    decoder_updates: int,
    seed: int,
) -> None:
    """Run PPO, on the table and then with the decoder; leaves policy, log and checkpoint."""
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
                gain = environment.judge(rollout, chosen, codec)
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
