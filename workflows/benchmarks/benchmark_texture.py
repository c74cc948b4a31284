"""Texture that comes back at low rates, with and without the diffusion decoder.

\b
    python workflows/benchmarks/benchmark_texture.py OUT --set flight=FLIGHT_DIR
        --decoder 0 --decoder 1 --decoder 1:0.5 --codec hevc

Every crop (as benchmark.py chooses them) is coded by our codec at each rate. Decoders are denoising
steps and, behind a colon, --realism. Other codecs get as many bytes at most; where even their
coarsest setting takes more, they are left out. At the rates of --peer-rate they are alone: they
need more bytes for as much texture, and a table says how many times as many.

\b
Texture, orientation     see workflows/_shared/texture.py: nobody trains on these
KID, FID                 of patches of 64 x 64 pixels, every 32, of all crops of a set and scale
PSNR / 4                 of both pictures at a quarter of their size

\b
Writes to OUT:
    texture.csv   a row for each crop, rate and codec
    texture.md    means as a table for each set and scale, with settings
    crops/        original and codecs side by side

A run that was stopped goes on where it stopped when it is started again with the same options.
"""

from __future__ import annotations

import datetime
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import benchmark_figures as figures
import click
import metrics
import numpy as np
import patch_distances
from benchmark import parse_sets
from benchmark_crops import Crop, CropError, choose_crops
from benchmark_rows import Row, read_rows, resume, write_rows
from benchmark_summary import (
    OURS,
    cell,
    compare_crops,
    curves_of,
    first_of_each,
    groups_of,
    label,
    table,
)
from PIL import Image

from archive_pipeline.codec.models import DEFAULT_MODEL

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
import texture
from coding import Coder, split
from peers import PEERS, search

RATES = (0.03, 0.06, 0.12, 0.24)  # bits a pixel
PEER_RATES = (0.48, 0.96)
COMPARED = (0.05, 0.13)  # bits a pixel of ours over which bytes at equal texture are compared
QUALITIES = ("texture", "orientation", "lpips", "ssimulacra2", "dists", "psnr")
OCTAVES = ("octave_1", "octave_2", "octave_3")
QUARTER = "psnr_quarter"
FIELDS = ["set", "scale", "crop", "rate", "codec", "bytes", "bpp", *OCTAVES, *QUALITIES, QUARTER]
SHEET_CROPS = 2  # of each set and scale
LABELS = {
    "bpp": "bits a pixel",
    "texture": "texture",
    **dict(zip(OCTAVES, ("finest octave", "second", "third"), strict=True)),
    "orientation": "orientation",
    "lpips": "LPIPS",
    "ssimulacra2": "SSIMULACRA 2",
    "dists": "DISTS",
    "psnr": "PSNR",
    QUARTER: "PSNR / 4",
    **patch_distances.LABELS,
}
DECIMALS = {"bpp": 3, "lpips": 3, "dists": 3, "kid": 4, "orientation": 1, "ssimulacra2": 1}

Decoder = tuple[int, float]  # steps, realism
Decoded = tuple[str, metrics.Pixels, int]  # codec, pixels, bytes


def parse_decoders(
    _: click.Context, __: click.Parameter, values: tuple[str, ...]
) -> dict[str, Decoder]:
    """Read STEPS[:REALISM] options to our codec's names in rows."""
    found = {}
    for value in values:
        steps, colon, realism = value.partition(":")
        try:
            decoder = int(steps), float(realism) if colon else 1.0
        except ValueError:
            raise click.BadParameter(f"{value!r} is not STEPS[:REALISM]") from None
        if not (0 <= decoder[0] <= 100 and 0 <= decoder[1] <= 1):
            raise click.BadParameter(f"{value!r}: steps are 0 to 100, realism is 0 to 1")
        name = OURS if not decoder[0] else f"{OURS}-{decoder[0]}"
        found[name + (f"-{decoder[1]:g}" if decoder[1] != 1 else "")] = decoder
    return found


def quarter(pixels: metrics.Pixels) -> metrics.Pixels:
    return np.asarray(Image.fromarray(pixels).reduce(4))


class Bench:
    """Codecs and measures.

    Raises:
        click.ClickException: the model cannot be had.
    """

    def __init__(self, model: str, decoders: dict[str, Decoder], peers: list[str]) -> None:
        self.coder, self.decoders = Coder(model), decoders
        self.peers = {name: PEERS[name] for name in peers}
        self.measures, missing = metrics.load(QUALITIES)
        self.notes = list(missing.values())

    def decoded(self, pixels: metrics.Pixels, rate: float, by_ours: bool) -> Iterator[Decoded]:
        """What all codecs make of a crop in as many bytes as ours takes, or the others alone."""
        height, width = pixels.shape[:2]
        size = int(rate * height * width / 8)
        if by_ours:
            streams = self.coder.encode(split(pixels), size, "uniform")
            size = sum(map(len, streams))
            for name, (steps, realism) in self.decoders.items():
                yield name, self.coder.decode(streams, (height, width), steps, realism), size
        for name, peer in self.peers.items():
            found = search(peer, pixels, size, at_most=True)
            if found is not None:
                yield name, peer.decode(found[1]), peer.size(found[1])

    def row(self, crop: Crop, rate: float, original: metrics.Pixels, decoded: Decoded) -> Row:
        """A row of texture.csv."""
        codec, pixels, size = decoded
        bpp = 8 * size / (crop.width * crop.height)
        where = dict(zip(("set", "scale", "crop"), crop.key, strict=True))
        return {
            **where,
            **{"rate": rate, "codec": codec, "bytes": size, "bpp": bpp},
            **dict(zip(OCTAVES, texture.texture_errors(original, pixels), strict=True)),
            **{name: measure(original, pixels) for name, measure in self.measures.items()},
            QUARTER: metrics.psnr(quarter(original), quarter(pixels)),
        }


def draw(
    crop: Crop, rate: float, original: metrics.Pixels, panels: list[figures.Panel]
) -> Image.Image:
    """A crop and what all codecs make of it, side by side."""
    title = f"{crop.set}, {crop.scale} size, {crop.id}: {rate:g} bits a pixel"
    first = figures.Panel(None, original, None, {})
    return figures.draw_sheet(figures.Sheet(title, [first, *panels]))


def tables(rows: list[Row], crowds: dict[tuple, dict[str, float]]) -> list[str]:
    """Means over crops, a table for each set and scale."""
    lines: list[str] = []
    shown = [name for name in LABELS if any(name in row for row in [*rows, *crowds.values()])]
    for group in groups_of(rows):
        here = [row for row in rows if (row["set"], row["scale"]) == group]
        crops = len({row["crop"] for row in here})
        lines += ["", f"## {group[0]}, {group[1]} size (crops: {crops})", ""]
        cells = []
        for rate, codec in dict.fromkeys((row["rate"], row["codec"]) for row in here):
            some = [row for row in here if (row["rate"], row["codec"]) == (rate, codec)]
            of_all = crowds.get((group, rate, codec), {})
            means = {
                name: np.mean([row[name] for row in some]) for name in shown if name in some[0]
            }
            values = [
                f"{(means | of_all)[name]:.{DECIMALS.get(name, 2)}f}"
                if name in means or name in of_all
                else ""
                for name in shown
            ]
            few = f" ({len(some)} crops)" if len(some) < crops else ""
            cells.append([f"{rate:g}", label(codec) + few, *values])
        lines += table(["rate", "codec", *(LABELS[name] for name in shown)], cells)
    return lines


def at_equal_texture(rows: list[Row], seed: int) -> list[str]:
    """Tables of other codecs' bytes over ours, a column for each of our decoders."""
    curves = curves_of(rows, "texture")
    codecs = dict.fromkeys(row["codec"] for row in rows)
    decoders = [name for name in codecs if name.partition("-")[0] == OURS]
    lines: list[str] = []
    for group in groups_of(rows):
        crops = dict.fromkeys(r["crop"] for r in rows if (r["set"], r["scale"]) == group)
        cells = []
        for peer in (name for name in codecs if name not in decoders):
            found = [
                compare_crops(curves, group, crops, (decoder, peer), COMPARED, seed)
                for decoder in decoders
            ]
            cells.append([label(peer), *map(cell, found)])
        head = [f"{group[0]}, {group[1]} size", *map(label, decoders)]
        lines += ["", *table(head, cells)] if cells else []
    if lines:
        low, high = COMPARED
        lines[:0] = [
            *("", "## Bytes of other codecs over ours at equal texture", ""),
            f"Where ours takes {low:g} to {high:g} bits a pixel, as by benchmark.py.",
        ]
    return lines


@click.command(help=__doc__)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--set", "sets", multiple=True, required=True, callback=parse_sets, help="NAME=DIR.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Name or folder.")
@click.option(
    "--decoder",
    "decoders",
    multiple=True,
    default=("0", "1"),
    show_default=True,
    callback=parse_decoders,
    metavar="STEPS[:REALISM]",
    help="Denoising steps, and how much of what they generate is shown.",
)
@click.option("--rate", "rates", type=click.FloatRange(0.01, 8), multiple=True, default=RATES)
@click.option(
    "--peer-rate",
    "peer_rates",
    type=click.FloatRange(0.01, 8),
    multiple=True,
    default=PEER_RATES,
    show_default=True,
    help="Bits a pixel, of other codecs alone.",
)
@click.option(
    "--codec",
    "peers",
    type=click.Choice(list(PEERS)),
    multiple=True,
    default=("hevc", "avif", "jpegxl"),
    show_default=True,
)
@click.option("--crops", "count", type=click.IntRange(1), default=6, help="Of each set and scale.")
@click.option("--size", type=click.IntRange(metrics.MIN_SIDE), default=384, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(
    out: Path,
    sets: dict[str, Path],
    model: str,
    decoders: dict[str, Decoder],
    rates: tuple[float, ...],
    peer_rates: tuple[float, ...],
    peers: tuple[str, ...],
    count: int,
    size: int,
    seed: int,
) -> None:
    bench = Bench(model, decoders, list(peers))
    try:
        crops = [c for n, d in sets.items() for c in choose_crops(n, d, count, size, seed)]
    except CropError as error:
        raise click.ClickException(str(error)) from error
    judge, note = patch_distances.load()
    notes = [*bench.notes, *([note] if note else [])]
    for note in notes:
        click.echo(note, err=True)
    (out / "crops").mkdir(parents=True, exist_ok=True)
    shown = first_of_each(crops, SHEET_CROPS)
    sha256 = bench.coder.codec.model.sha256
    settings = {
        **{"model": sha256, "decoders": decoders, "rates": rates, "size": size, "seed": seed},
        "peer_rates": peer_rates,
        **{
            "crops": [c.key for c in crops],
            "measures": list(bench.measures),
            "crowds": bool(judge),
        },
        "libraries": {name: PEERS[name].library() for name in peers},
    }
    resume(out, settings)
    rows = read_rows(out / "texture.csv")
    done = {(row["set"], row["scale"], row["crop"]) for row in rows}
    pictures: dict[tuple, list[tuple[metrics.Pixels, metrics.Pixels]]] = defaultdict(list)
    for n, crop in enumerate(crops, 1):
        if crop.key in done and judge is None:
            continue
        original, fresh = crop.read(), []
        for rate in sorted({*rates, *peer_rates}):
            panels = []
            for decoded in bench.decoded(original, rate, rate in rates):
                row = bench.row(crop, rate, original, decoded)
                fresh.append(row)
                panels.append(figures.Panel(*decoded, row))
                if judge is not None:
                    key = (crop.set, crop.scale), rate, decoded[0]
                    pictures[key].append((original, decoded[1]))
            if crop in shown and rate in rates:
                name = f"{'-'.join(crop.key)}-{rate:.2f}bpp.png"
                draw(crop, rate, original, panels).save(out / "crops" / name, optimize=True)
        if crop.key not in done:
            rows += fresh
            write_rows(out / "texture.csv", FIELDS, rows)
        click.echo(f"{n}/{len(crops)} {' '.join(crop.key)}", err=True)
    crowds = {}
    if judge is not None:
        crowds = {key: judge(*zip(*pairs, strict=True)) for key, pairs in pictures.items()}
    told = " ".join(f"--decoder {steps}:{share:g}" for steps, share in decoders.values())
    lines = [
        "# Texture",
        "",
        f"{datetime.date.today().isoformat()}, model {Path(model).name} (SHA-256 {sha256[:12]}), "
        f"`python workflows/benchmarks/benchmark_texture.py {told} --crops {count} --size {size} "
        f"--seed {seed}`. Texture: mean absolute log2 ratio of the energies of blocks of 32 pixels "
        "in the finest two octaves of a Laplacian pyramid, 0 is the original's. Orientation: angle "
        "between gradients in degrees, 45 is chance.",
        *tables(rows, crowds),
        *at_equal_texture(rows, seed),
        "",
        *(f"- {note}" for note in notes),
    ]
    (out / "texture.md").write_text("\n".join(lines).rstrip() + "\n")
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
