"""Bit allocation by the policy beside least squared error (greedy) and equal steps (uniform).

    python workflows/benchmarks/benchmark_allocation.py OUT --set flight=FLIGHT_DIR --crops 8

Crops at places that the seed fixes are coded as an image of several tiles at the same budgets by
every rule; what is judged was decoded from the bytes that are counted.

\b
Writes to OUT:
    points.csv    a row for each crop, rule and budget: bytes, share of the budget, all metrics,
                  bits of the level maps, CPU seconds of encoding
    summary.md    bytes of the other rules over the policy's at equal quality, with 95 % intervals
    maps/         a crop, its high-pass residual and the policy's levels, side by side

`--adapt N` adds the policy after N updates on each crop, `--policy FILE` takes another policy.
`--oracle` adds what no policy can know: levels chosen by what each one did to each block's utility,
all others being at the same level. It tells how much there is to gain.
A run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import benchmark_summary as summary
import click
import metrics
import numpy as np
from benchmark import parse_sets
from benchmark_crops import Crop, choose_crops
from benchmark_rows import read_rows, write_rows
from metrics import METRICS
from numpy.typing import NDArray
from PIL import Image
from rate_distortion import Curve, compare, rate_ratio
from torch import Tensor

from archive_pipeline.codec.models import DEFAULT_MODEL
from archive_pipeline.pcdc.allocation import ALLOCATIONS, BlockCosts
from archive_pipeline.pcdc.decoding import Symbols
from archive_pipeline.pcdc.encoding import Encoding, Worth, encode_tiles
from archive_pipeline.pcdc.policy import Policy, residual_statistics
from archive_pipeline.pcdc.training.adaptation import encode_adapted, to_signal
from archive_pipeline.pcdc.training.judge import Judge, UtilityWeights
from archive_pipeline.store.layout import TILE

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
from coding import Coder, Pixels, join, level_terms, split

RATES = (0.06, 0.1, 0.15, 0.25, 0.4, 0.7)  # bits a pixel
RANGE = (0.06, 0.7)
JUDGED = ("lpips", "ssimulacra2", "ms_ssim", "psnr")
FIELDS = ["set", "scale", "crop", "codec", "rate", "bytes", "bpp", "used", "map_bpp", "encode_s"]
LEVEL_COLOURS = ((49, 54, 149), (116, 173, 209), (255, 255, 191), (253, 174, 97), (165, 0, 38))


class Bench:
    """A codec, its policy and the measures."""

    def __init__(self, coder: Coder, policy: Policy, adapt: int, oracle: bool, steps: int) -> None:
        self.coder, self.codec, self.policy = coder, coder.codec, policy
        self.adapt, self.steps = adapt, steps
        more = [rule for rule, wanted in (("adapted", adapt), ("oracle", oracle)) if wanted]
        self.rules = (*ALLOCATIONS, *more)
        self.measures, self.missing = metrics.load(JUDGED)

    def encode(self, rule: str, tiles: list[Pixels], budget: int) -> list[bytes]:
        """Encode by a rule."""
        if rule == "adapted":
            return encode_adapted(self.codec, tiles, budget, self.policy, self.adapt)
        if rule == "oracle":
            return encode_tiles(self.codec, tiles, budget, self.known_worth(tiles, budget))
        return self.coder.encode(tiles, budget, rule)

    def known_worth(self, tiles: list[Pixels], budget: int) -> Worth:
        """Worth of levels as measured at the image steps of a uniform plan, or one beside them."""
        job, weights = Encoding(self.codec, tiles), UtilityWeights()
        steps = {plan.image_step for plan in job.allocator.plan(budget)}
        known = {
            (id(tile), step): -weights.of(level_terms(job, t, step)).double().numpy()
            for t, tile in enumerate(tiles)
            for step in steps
        }

        def worth(
            tile: Pixels, latents: Tensor, costs: BlockCosts, image_step: int
        ) -> NDArray[np.float64]:
            return known[id(tile), min(steps, key=lambda step: abs(step - image_step))]

        return worth

    def measure(self, crop: Crop, rule: str, rate: float) -> dict[str, Any]:
        """A row of points.csv."""
        pixels = crop.read()
        area, budget = crop.width * crop.height, int(rate * crop.width * crop.height / 8)
        tiles = split(pixels)
        started = time.process_time()
        streams = self.encode(rule, tiles, budget)
        seconds = time.process_time() - started
        size = sum(map(len, streams))
        decoded = self.coder.decode(streams, pixels.shape[:2], self.steps)
        row = dict(zip(("set", "scale", "crop"), crop.key, strict=True))
        row |= {"codec": rule, "rate": rate, "bytes": size, "bpp": 8 * size / area}
        row |= {"used": size / budget, "map_bpp": self.map_bits(streams) / area}
        row |= {"encode_s": seconds, "loss": self.loss(pixels, decoded)}
        return row | {name: f(pixels, decoded) for name, f in self.measures.items()}

    def loss(self, pixels: Pixels, decoded: Pixels) -> float:
        """-U of equation (5)."""
        return float(Judge(to_signal(pixels)).loss(to_signal(decoded)).mean())

    def map_bits(self, streams: list[bytes]) -> float:
        """Bits that the level maps of streams take."""
        job_maps = [s.levels for s in self.symbols(streams) if s.levels.size]
        return sum(self.codec.level_map_bits(levels) for levels in job_maps)

    def symbols(self, streams: list[bytes]) -> list[Symbols]:
        """Decoded symbols of streams that were just made."""
        return [s for s in self.codec.decode_symbols(streams, TILE, TILE) if isinstance(s, Symbols)]

    def draw(self, crop: Crop, rate: float, path: Path) -> None:
        """Draw a crop, its residual and the levels that the policy gives it."""
        pixels = crop.read()
        budget = int(rate * crop.width * crop.height / 8)
        streams = self.encode("policy", split(pixels), budget)
        side = TILE // 32
        shape = (-(-pixels.shape[0] // 32), -(-pixels.shape[1] // 32))
        levels = join([s.levels for s in self.symbols(streams)], shape, side)
        residual = residual_statistics(pixels)[0]
        residual = np.clip(residual / max(residual.max(), 1e-6) * 255, 0, 255).astype(np.uint8)
        decoded = self.coder.decode(streams, pixels.shape[:2], self.steps)
        panels = [
            pixels,
            *(
                np.kron(plane, np.ones((32, 32, 1), np.uint8))[: pixels.shape[0], : pixels.shape[1]]
                for plane in (
                    np.repeat(residual[..., None], 3, 2),
                    np.array(LEVEL_COLOURS, np.uint8)[levels.astype(int) - 1],
                )
            ),
            decoded,
        ]
        Image.fromarray(np.concatenate(panels, 1)).save(path, optimize=True)


def report(points: list[dict], rules: tuple[str, ...], seed: int, notes: list[str]) -> list[str]:
    """The tables of summary.md."""
    curves: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
    for row in points:
        for name in (*JUDGED, "loss"):
            if name in row:
                value = -row[name] if name == "loss" else METRICS[name].quality(row[name])
                key = (row["set"], row["scale"], name, row["codec"], row["crop"])
                curves[key].append((row["bpp"], value))
    lines = []
    labels = {name: METRICS[name].label for name in JUDGED} | {"loss": "utility (5)"}
    for group in summary.groups_of(points):
        crops = dict.fromkeys(r["crop"] for r in points if (r["set"], r["scale"]) == group)
        rows = []
        for rule in rules[1:]:
            cells = []
            for name in labels:
                pairs = [
                    [Curve.of(curves[(*group, name, r, crop)]) for r in ("policy", rule)]
                    for crop in crops
                ]
                ratios = [rate_ratio(a, b, *RANGE) if a and b else None for a, b in pairs]
                cells.append(summary.cell(compare(ratios, seed)))
            rows.append([rule, *cells])
        lines += ["", f"## {group[0]}, {group[1]} size (crops: {len(crops)})", ""]
        lines += summary.table(["bytes over the policy's at equal", *labels.values()], rows)
    rows = []
    for rule in rules:
        of = [r for r in points if r["codec"] == rule]
        used, maps, seconds = ([r[k] for r in of] for k in ("used", "map_bpp", "encode_s"))
        limits = f"{100 * min(used):.2f}-{100 * max(used):.2f} %"
        rows.append([rule, limits, f"{np.mean(maps):.5f}", f"{np.mean(seconds):.2f}"])
    head = ["", "budget used", "level maps, bits a pixel", "CPU seconds to encode a crop"]
    lines += ["", "## Cost", "", *summary.table(head, rows), "", *(f"- {n}" for n in notes)]
    return lines


@click.command(help=__doc__)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--set", "sets", multiple=True, required=True, callback=parse_sets, help="NAME=DIR.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Name or folder.")
@click.option("--policy", "policy_file", type=click.Path(exists=True, path_type=Path))
@click.option("--crops", "count", type=click.IntRange(1), default=8, show_default=True)
@click.option("--size", type=click.IntRange(metrics.MIN_SIDE), default=2 * TILE, show_default=True)
@click.option("--steps", type=click.IntRange(0, 100), default=0, show_default=True)
@click.option("--adapt", type=click.IntRange(0), default=0, show_default=True)
@click.option("--oracle", is_flag=True)
@click.option("--rate", "rates", type=float, multiple=True, default=RATES, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(
    out: Path,
    sets: dict[str, Path],
    model: str,
    policy_file: Path | None,
    count: int,
    size: int,
    steps: int,
    adapt: int,
    oracle: bool,
    rates: tuple[float, ...],
    seed: int,
) -> None:
    coder = Coder(model, policy_file)
    if coder.policy is None:
        raise click.ClickException(f"{model} has no policy: name one with --policy")
    bench = Bench(coder, coder.policy, adapt, oracle, steps)
    crops = [
        crop
        for name, folder in sets.items()
        for crop in choose_crops(name, folder, count, size, seed)
        if crop.divisor == 1
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "maps").mkdir(exist_ok=True)
    fields = [*FIELDS, "loss", *bench.measures]
    points = read_rows(out / "points.csv")
    done = {(r["set"], r["crop"], r["codec"], r["rate"]) for r in points}
    for crop in crops:
        for rate in rates:
            for rule in bench.rules:
                if (crop.set, crop.id, rule, rate) not in done:
                    points.append(bench.measure(crop, rule, rate))
                    write_rows(out / "points.csv", fields, points)
        bench.draw(crop, 0.25, out / "maps" / f"{crop.set}-{crop.id}.png")
        click.echo(f"{crop.set} {crop.id}", err=True)
    lines = report(points, bench.rules, seed, list(bench.missing.values()))
    command = f"--crops {count} --size {size} --steps {steps} --adapt {adapt} --seed {seed}"
    command += " --oracle" * oracle + "".join(f" --rate {rate:g}" for rate in rates)
    command = f"python workflows/benchmarks/benchmark_allocation.py {command}"
    head = f"Model {bench.codec.model.sha256[:12]}, `{command}`."
    text = "\n".join(["# Bit allocation", "", head, *lines]) + "\n"
    (out / "summary.md").write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main()
