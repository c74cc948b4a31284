"""Tie points that frames keep through our codec and through others at equal bytes.

    python workflows/benchmarks/benchmark_tie_points.py OUT --set flight=FLIGHT_DIR
        [--ratio 24 --ratio 48 --ratio 100] [--codec hevc --codec jpeg]

Of each set the first 12 frames by name: they should overlap. Needs the extras `photogrammetry` and
`benchmark`. `benchmark.py --tie-points 24` does the same beside its crops.

\b
Writes to OUT:
    tie_points.csv   a row for each ratio, codec and pair of frames: tie points of both versions
    tie_frames.csv   a row for each frame: setting, bytes, how far its points moved
    tie_points.md    the same as a table, with intervals, versions and settings

A run that was stopped goes on where it stopped when it is started again with the same options.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import click
import releases
import tie_points
import torch
from benchmark import parse_sets
from benchmark_crops import CropError
from benchmark_rows import resume
from benchmark_summary import OURS, label, table

from archive_pipeline.codec.models import DEFAULT_MODEL
from archive_pipeline.pcdc.allocation import ALLOCATIONS

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
from coding import Coder
from peers import FLIGHT_PEERS


@click.command(help=__doc__)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--set", "sets", multiple=True, required=True, callback=parse_sets, help="NAME=DIR.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Name or folder.")
@click.option("--steps", type=click.IntRange(0, 100), default=0, show_default=True)
@click.option("--allocation", type=click.Choice(ALLOCATIONS), default="uniform", show_default=True)
@click.option(
    "--ratio",
    "ratios",
    type=click.FloatRange(1, 1000),
    multiple=True,
    default=tie_points.RATIOS,
    show_default=True,
    help="Of raw bytes to ours.",
)
@click.option(
    "--codec", "codecs", type=click.Choice(list(FLIGHT_PEERS)), multiple=True, help="Peers; all."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--record",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A model's folder, to keep the rows in for compare_releases.py.",
)
def main(
    out: Path,
    sets: dict[str, Path],
    model: str,
    steps: int,
    allocation: str,
    ratios: tuple[float, ...],
    codecs: tuple[str, ...],
    seed: int,
    folder: Path | None,
) -> None:
    if folder is not None and (allocation, steps) != ("uniform", 0):
        raise click.UsageError("--record keeps what the defaults of --allocation and --steps give")
    tie_points.check_installed()
    coder = Coder(model)
    coder.worth(allocation)  # refused here, not frame by frame
    sha256 = coder.codec.model.sha256
    try:
        versions = {name: FLIGHT_PEERS[name].library() for name in codecs or FLIGHT_PEERS}
    except ImportError as error:
        raise click.ClickException(f"a codec cannot run: {error}") from error
    plan = tie_points.Plan(coder, allocation, steps, tuple(versions), seed, torch.get_num_threads())
    out.mkdir(parents=True, exist_ok=True)
    settings = {"model": sha256, "allocation": allocation, "steps": steps, "seed": seed}
    resume(out, {**settings, "libraries": versions, "sets": list(sets)})
    try:
        done, notes = tie_points.run(out, sets, ratios, plan, partial(click.echo, err=True))
    except CropError as error:
        raise click.ClickException(str(error)) from error
    codecs_used = [[label(OURS), f"tiles as in the archive, steps {steps}", sha256[:12]]]
    codecs_used += [[label(n), FLIGHT_PEERS[n].note, v] for n, v in versions.items()]
    text = "\n".join(
        [
            "# Tie points",
            "",
            tie_points.EXPLAINED,
            *tie_points.lines(done.pairs, done.frames, seed),
            "",
            *table(["", "settings", "library"], codecs_used),
            *(f"\n{note}" for note in notes),
        ]
    )
    (out / "tie_points.md").write_text(text + "\n")
    click.echo(text)
    if folder is not None:
        releases.record(folder, sha256, [], done.pairs)


if __name__ == "__main__":
    main()
