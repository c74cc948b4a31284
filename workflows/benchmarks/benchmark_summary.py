"""From the points of a benchmark to rates at equal quality, and to a page that says so."""

from __future__ import annotations

import csv
import datetime
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_crops import Crop
from metrics import METRICS
from rate_distortion import Comparison, Curve, compare, rate_ratio

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
from zoo_peers import ALL_PEERS

OURS = "pcdc"
RANGE = (0.1, 0.6)  # bits a pixel of ours over which rates are compared
NO_CURVE = Curve.of([])
MOSTLY = 0.9  # share of our range below which the table says how much was compared

Row = dict[str, Any]
Group = tuple[str, str]  # set, scale


def ours(steps: int, first: int) -> str:
    """Our codec's name in the points, by denoising steps; `OURS` at the first number asked for."""
    return OURS if steps == first else f"{OURS}-{steps}"


def label(codec: str) -> str:
    """A codec's name for people."""
    if codec == OURS:
        return "PCDC (ours)"
    if codec.startswith(f"{OURS}-"):
        _, steps, *realism = codec.split("-")
        return ", ".join([f"PCDC, steps {steps}", *(f"realism {share}" for share in realism)])
    return ALL_PEERS[codec].label


@dataclass(frozen=True)
class Run:
    """What the page says about how the points came to be.

    Attributes:
        steps: numbers of denoising steps, of which the first is compared with all else.
    """

    model: str
    sha256: str
    options: str
    steps: tuple[int, ...]
    versions: dict[str, str]
    notes: list[str]


@dataclass(frozen=True)
class Result:
    """A peer against ours on one set and scale, at equal values of one metric."""

    group: Group
    peer: str
    metric: str
    comparison: Comparison


def first_of_each(crops: list[Crop], count: int) -> list[Crop]:
    """Return the first crops of each set and scale."""
    seen: Counter[Group] = Counter()
    chosen = []
    for crop in crops:
        seen[crop.set, crop.scale] += 1
        if seen[crop.set, crop.scale] <= count:
            chosen.append(crop)
    return chosen


def curves_of(points: Iterable[Row], metric: str) -> dict[tuple[Group, str, str], Curve]:
    """Rate-distortion curves (bits a pixel, quality) by (set, scale), crop and codec."""
    found = defaultdict(list)
    for row in points:
        if metric in row:
            key = (row["set"], row["scale"]), row["crop"], row["codec"]
            found[key].append((row["bpp"], METRICS[metric].quality(row[metric])))
    return {key: Curve.of(values) for key, values in found.items()}


def groups_of(points: Iterable[Row]) -> list[Group]:
    """Sets and scales in the order of the points, native size first."""
    names = dict.fromkeys((row["set"], row["scale"]) for row in points)
    sets = list(dict.fromkeys(name for name, _ in names))
    return sorted(names, key=lambda g: (sets.index(g[0]), g[1] != "native"))


def compare_all(points: list[Row], peers: list[str], metrics: list[str], seed: int) -> list[Result]:
    """Rates of all peers over ours, for every set, scale and headline metric.

    A crop on which either codec has no curve counts as one that cannot be compared.
    """
    results = []
    for metric in metrics:
        if not METRICS[metric].headline:
            continue
        curves = curves_of(points, metric)
        for group in groups_of(points):
            crops = dict.fromkeys(r["crop"] for r in points if (r["set"], r["scale"]) == group)
            for peer in peers:
                found = compare_crops(curves, group, crops, (OURS, peer), RANGE, seed)
                results.append(Result(group, peer, metric, found))
    return results


def compare_crops(
    curves: dict[tuple[Group, str, str], Curve],
    group: Group,
    crops: Iterable[str],
    codecs: tuple[str, str],
    ends: tuple[float, float],
    seed: int,
) -> Comparison:
    """The second codec against the first over the crops of one set and scale.

    Args:
        ends: bits a pixel of the first over which rates are compared.
    """
    pairs = [[curves.get((group, c, name), NO_CURVE) for name in codecs] for c in crops]
    return compare([rate_ratio(*pair, *ends) for pair in pairs], seed)


def write_ratios(path: Path, results: list[Result]) -> None:
    """Write ratios.csv."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            [
                *["set", "scale", "peer", "metric", "ratio", "low", "high"],
                *["crops_compared", "crops", "share_of_range"],
            ]
        )
        for r in results:
            c = r.comparison
            numbers = [f"{v:.4f}" for v in (c.ratio, c.low, c.high)]
            row = [*r.group, r.peer, r.metric, *numbers, c.compared, c.pictures, f"{c.share:.4f}"]
            writer.writerow(row)


def cell(comparison: Comparison) -> str:
    """Ratio and interval, and how little it rests on if it does."""
    c = comparison
    if not c.compared:
        return f"none of {c.pictures}"
    text = f"**{c.ratio:.2f}**"
    if np.isfinite(c.low):
        text += f" [{c.low:.2f}, {c.high:.2f}]"
    limits = []
    if c.compared < c.pictures:
        limits.append(f"{c.compared} of {c.pictures}")
    if c.share < MOSTLY:
        limits.append(f"{100 * c.share:.0f} %")
    return text + (f" ({', '.join(limits)})" if limits else "")


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def headline(results: list[Result], group: Group) -> list[str]:
    """Table of one set and scale: a row for each peer, a column for each metric."""
    here = {(r.peer, r.metric): r.comparison for r in results if r.group == group}
    peers = list(dict.fromkeys(peer for peer, _ in here))
    metrics = list(dict.fromkeys(metric for _, metric in here))
    return table(
        ["bytes over ours at equal", *(METRICS[m].label for m in metrics)],
        [[label(p), *(cell(here[p, m]) for m in metrics)] for p in reversed(peers)],
    )


def speeds(points: list[Row], codec: str) -> tuple[str, str]:
    """Megapixels per CPU second of encoding and decoding, over all points."""
    rows = [r for r in points if r["codec"] == codec]
    pixels = sum(r["width"] * r["height"] for r in rows) / 1e6
    totals = (sum(r[k] for r in rows) for k in ("encode_s", "decode_s"))
    encode, decode = (f"{pixels / t:.3g}" if t else "" for t in totals)
    return encode, decode


def markdown(run: Run, points: list[Row], failures: list[Row], results: list[Result]) -> str:
    """The page."""
    low, high = RANGE
    lines = [
        "# Rate and distortion",
        "",
        f"{datetime.date.today().isoformat()}, model {run.model} (SHA-256 {run.sha256[:12]}), "
        f"`python workflows/benchmarks/benchmark.py {run.options}`.",
        "",
        "Bytes of each codec over ours at equal quality: above 1, ours is the smaller. Geometric "
        "mean over crops of the ratio averaged over the qualities that ours reaches at "
        f"{low:g} to {high:g} bits a pixel, and its 95 % bootstrap interval over crops. Nothing is "
        'extrapolated: "n of m" counts the crops whose curves overlap where not all do, and a '
        "percentage is the share of our range that both curves cover where it is less than "
        f"{100 * MOSTLY:.0f} %. MS-SSIM is compared in decibels.",
    ]
    for group in groups_of(points):
        crops = len({r["crop"] for r in points if (r["set"], r["scale"]) == group})
        lines += ["", f"## {group[0]}, {group[1]} size (crops: {crops})", ""]
        lines += headline(results, group)
    rows = []
    for steps in run.steps:
        name = ours(steps, run.steps[0])
        note = f"tiles as in the archive, steps {steps}"
        rows.append([label(name), note, "", *speeds(points, name)])
    for name, version in run.versions.items():
        rows.append([ALL_PEERS[name].label, ALL_PEERS[name].note, version, *speeds(points, name)])
    lines += ["", "## Codecs", ""]
    lines += table(["", "settings", "library", "encode MP/s", "decode MP/s"], rows)
    lines += [
        "",
        f"Megapixels per CPU second of one process (this machine has {os.cpu_count()} cores), all "
        "threads counted; ours encodes to a target size. HEVC and AVIF are counted without the "
        "boxes of their files, as a bare bitstream; `file_bytes` in points.csv has them. "
        "curves.png shows means over crops where every crop has a value.",
    ]
    counts = Counter((f["codec"], f["error"]) for f in failures)
    notes = run.notes + [f"{codec}: {error} ({n} times)" for (codec, error), n in counts.items()]
    if notes:
        lines += ["", "## Left out", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"
