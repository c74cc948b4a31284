"""Two releases of a model beside each other, and what other codecs took beside each.

    python workflows/benchmarks/compare_releases.py models/pcdc-drone-small [FOLDER ...]
        [--before HASH] [--after HASH]

Reads what `benchmark.py --record FOLDER` keeps beside models' cards; nothing is coded. Without
--before and --after the last two releases are compared, in the order in which they were recorded;
a release in no need of company is compared with other codecs. Only crops and pairs of frames count
that both releases were measured on.
"""

from __future__ import annotations

from pathlib import Path

import benchmark_summary as summary
import click
import releases
import tie_points
from benchmark_rows import Row
from metrics import METRICS

BEFORE = "before"


@click.command(help=__doc__)
@click.argument(
    "folders",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option("--before", help="First digits of the earlier release's SHA-256.")
@click.option("--after", help="Of the later one's.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(folders: tuple[Path, ...], before: str | None, after: str | None, seed: int) -> None:
    points, ties = [], []
    for folder in folders:
        found = releases.read(folder)
        points += found[0]
        ties += found[1]
    known = list(dict.fromkeys(r["release"] for r in points + ties if "release" in r))
    if not known:
        raise click.ClickException(f"{', '.join(map(str, folders))}: no release's rows")
    later = _named(known, after) if after else known[-1]
    others = [name for name in known if name != later]
    earlier = _named(known, before) if before else (others[-1] if others else None)
    title = f"# Release {later}" + (f" beside {earlier}" if earlier else "")
    text = [title, *_rates(points, earlier, later, seed), *_ties(ties, earlier, later, seed)]
    click.echo("\n".join(text))


def _named(known: list[str], digits: str) -> str:
    found = [name for name in known if name.startswith(digits[: releases.DIGITS])]
    if len(found) != 1:
        raise click.ClickException(f"{digits}: no single release of {', '.join(known)}")
    return found[0]


def _rates(points: list[Row], earlier: str | None, later: str, seed: int) -> list[str]:
    """Tables of bytes at equal quality, one for each set and scale."""
    rows = [_renamed(r, earlier, later) for r in points]
    measured = [{_crop(r) for r in rows if r["codec"] == name} for name in (summary.OURS, BEFORE)]
    common = measured[0] & measured[1] if earlier else measured[0]
    rows = [r for r in rows if _crop(r) in common]
    peers = list(dict.fromkeys(r["codec"] for r in rows if "release" not in r))
    metrics = [m for m in METRICS if any(m in r for r in rows)]
    beside = {}
    for name in (BEFORE, summary.OURS):  # each in turn as ours
        here = [r for r in rows if "release" not in r or r["codec"] in (summary.OURS, BEFORE)]
        other = BEFORE if name == summary.OURS else summary.OURS
        swap = {name: summary.OURS, other: BEFORE}
        here = [{**r, "codec": swap.get(r["codec"], r["codec"])} for r in here]
        beside[name] = summary.compare_all(here, [*peers, BEFORE], metrics, seed)
    text = []
    for group in summary.groups_of(rows):
        cells = {
            (name, r.peer, r.metric): r.comparison
            for name, results in beside.items()
            for r in results
            if r.group == group
        }
        heading = [m for m in metrics if METRICS[m].headline]
        table = []
        if earlier:
            found = [summary.cell(cells[summary.OURS, BEFORE, m]) for m in heading]
            table.append([f"bytes of {earlier} over {later}", *found])
        for peer in peers:
            both = [
                [cells[name, peer, m].ratio for name in (BEFORE, summary.OURS)] for m in heading
            ]
            shown = [f"{a:.2f} / {b:.2f}" if earlier else f"{b:.2f}" for a, b in both]
            beside_what = f"{earlier} / {later}" if earlier else later
            table.append([f"bytes of {summary.label(peer)} over {beside_what}", *shown])
        crops = len({c for c in common if c[:2] == group})
        text += ["", f"## {group[0]}, {group[1]} size (crops: {crops})", ""]
        text += summary.table(["at equal", *(METRICS[m].label for m in heading)], table)
    return text


def _crop(row: Row) -> tuple[str, str, str]:
    return row["set"], row["scale"], row["crop"]


def _renamed(row: Row, earlier: str | None, later: str) -> Row:
    """A row with its crop's size in the crop's name, and `BEFORE` for the earlier release."""
    codec = row["codec"]
    if "release" in row:
        known = {later: summary.OURS, earlier: BEFORE} if codec == summary.OURS else {}
        codec = known.get(row["release"], "")
    crop = f"{row['crop']}_{row['width']:g}x{row['height']:g}"
    return {**row, "codec": codec, "crop": crop}


def _ties(rows: list[Row], earlier: str | None, later: str, seed: int) -> list[str]:
    """A table of tie points that were kept, of each set."""
    text = []
    for name in dict.fromkeys(r["set"] for r in rows if r.get("release") == later):
        table = []
        for ratio in sorted({r["ratio"] for r in rows if r["set"] == name}):
            here = [r for r in rows if (r["set"], r["ratio"]) == (name, ratio)]
            of: dict[str, dict[tuple[str, str], Row]] = {}
            for r in here:
                of.setdefault(r.get("release") or r["codec"], {})[r["one"], r["two"]] = r
            if later not in of:
                continue
            for who, pairs in of.items():
                if who in (earlier, later) or "release" not in next(iter(pairs.values())):
                    cells = _kept(pairs, of[later], seed)
                    shown = who if who in (earlier, later) else summary.label(who)
                    table.append([f"{ratio:g}", shown, *cells])
        text += ["", f"## Tie points, {name}", ""]
        text += summary.table(["ratio", "", "tie points", "kept", f"more than {later}"], table)
    return text


def _kept(
    pairs: dict[tuple[str, str], Row], ours: dict[tuple[str, str], Row], seed: int
) -> list[str]:
    """Tie points kept of the pairs that both have, and how many more than ours."""
    both = [pair for pair in ours if pair in pairs]
    if not both:
        return ["none", "", ""]
    kept, whole = tie_points.columns([pairs[pair] for pair in both])
    more = kept - tie_points.columns([ours[pair] for pair in both])[0]
    return tie_points.shares(kept, whole, None if pairs is ours else more, seed)


if __name__ == "__main__":
    main()
