"""Detectors on archived images at several ratios, beside HEVC intra and JPEG of the same budgets.

\b
    python workflows/detection/detection_table.py OUT_DIR FLIGHT_DIR --model yolo11s.pt
        [--labels DIR] [--source-ratio 10 --source-ratio 21.2 --source-ratio 40]
        [--allocation uniform --allocation policy] [--objects yolo11s.pt]
        [--peer hevc --peer jpeg] [--steps 0 --steps 1] [--image NAME ...]

Every frame goes through `archive ingest` and comes back from the archive's bytes, metadata and
index included. Peers get the same budget: the bytes of the frame's file over the ratio. What a
codec takes is what counts (a peer's lowest quality may take more than the budget). With --objects
`--allocation objects` joins, with that detector's finds. An allocation's images decoded with one
denoising step are named uniform-1. The numbers are those of `archive verify-detection`: labels
are the reference, without them the originals' detections are.

Writes to OUT_DIR

\b
  detection.csv   a row for each ratio, codec, detector, class group and metric
  bd_rates.csv    bytes at equal metrics over all ratios, against the first codec and HEVC
  detection.md    both as tables, with the paper's table for one ratio
  detection.svg   metrics against bytes; also as .png

Intervals are of 95 %, by a bootstrap over frames; those of differences and of bytes are paired.
What was coded and found stays in OUT_DIR: run again, the same command goes on where it was
stopped, and with further ratios, codecs or detectors only these are made.
Needs `pip install 'archive-pipeline[verify,benchmark]'`; peers are those of `peers.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
from detection_codecs import Codec, Original, PeerCodec, archived, chosen
from detection_figure import Panel, draw
from detection_judge import Setting, judge
from detection_rates import Sampled
from detection_run import Run
from detection_tables import (
    RATE_METRICS,
    change_table,
    interval_table,
    paper_table,
    rate_rows,
    rate_table,
    rows,
    write_csv,
)
from peers import FRAME_PEERS as PEERS

from archive_pipeline.codec.models import DEFAULT_MODEL
from archive_pipeline.detection.detectors import find_detectors, load_detector
from archive_pipeline.detection.labels import find_labels, parse_groups
from archive_pipeline.detection.metrics import RESAMPLES
from archive_pipeline.detection.verification import VerifyOptions, choose_groups
from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.pcdc.allocation import ALLOCATIONS

RATIOS = (10, 15, 21.2, 30, 40, 60)
PARTLY_FAILED = 3


def write(run: Run, setting: Setting, codecs: list[Codec], ratios: list[float]) -> str:
    """Write all files; returns the tables."""
    if not run.images:
        raise click.ClickException("no image could be compared")
    judged = judge(run, setting, codecs, ratios)
    found = rows(judged, "originals" if setting.labels is None else "labels")
    others = dict.fromkeys([codecs[0].name, *(c.name for c in codecs if c.name == "hevc")])
    rates = [] if len(ratios) < 2 else [r for name in others for r in rate_rows(judged, name)]
    parts = [f"Bytes at equal metrics:\n\n{rate_table(rates)}"] if rates else []
    parts.append(f"From the originals to the restored images:\n\n{change_table(found)}")
    if (ratio := setting.paper_ratio) in ratios:
        parts.append(f"At source ratio {ratio:g}:\n\n{paper_table(judged, ratio)}")
    text = "\n\n".join(parts) + "\n"
    write_csv(run.out / "detection.csv", found)
    write_csv(run.out / "bd_rates.csv", rates)
    (run.out / "detection.md").write_text(f"{text}\n{interval_table(found)}\n")
    panels = [
        Panel(
            f"{one.model}, {one.group}",
            _first(one.original),
            {
                name: [(float(s.bytes[0]), _first(s)) for s in own.values()]
                for name, own in one.codecs.items()
            },
        )
        for one in judged
    ]
    labels = {c.name: PEERS[c.name].label if c.name in PEERS else c.name for c in codecs}
    draw(panels, labels, [*RATE_METRICS[:2]], run.out / "detection")
    return text


def _first(sampled: Sampled) -> dict[str, float]:
    """Values of all images, each once."""
    return {name: float(values[0]) for name, values in sampled.values.items()}


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("flight", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", "models", multiple=True, required=True, help="Detector; repeatable.")
@click.option("--labels", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--classes", multiple=True, metavar="GROUP[=NAME,...]")
@click.option(
    "--source-ratio",
    "ratios",
    type=click.FloatRange(0, min_open=True),
    multiple=True,
    default=RATIOS,
    show_default=True,
)
@click.option("--codec-model", default=DEFAULT_MODEL, show_default=True)
@click.option(
    "--allocation",
    "allocations",
    type=click.Choice(ALLOCATIONS),
    multiple=True,
    default=("uniform",),
    show_default=True,
    help="Of archives; repeatable. The policy is that of --codec-model.",
)
@click.option("--objects", metavar="MODEL", help="Detector for `--allocation objects` as well.")
@click.option(
    "--peer", "peers", type=click.Choice(list(PEERS)), multiple=True, default=("hevc", "jpeg")
)
@click.option(
    "--steps", "decoders", type=click.IntRange(0), multiple=True, default=(0,), show_default=True
)
@click.option("--image", "images", multiple=True, help="File name in the flight; default: all.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option(
    "--paper-ratio",
    type=float,
    default=21.2,
    show_default=True,
    help="The paper's table is written if this is among the source ratios.",
)
@click.option(
    "--resamples",
    type=click.IntRange(2),
    default=RESAMPLES,
    show_default=True,
    help="Of the bootstrap.",
)
def main(
    out: Path,
    flight: Path,
    models: tuple[str, ...],
    labels: Path | None,
    classes: tuple[str, ...],
    ratios: tuple[float, ...],
    codec_model: str,
    allocations: tuple[str, ...],
    objects: str | None,
    peers: tuple[str, ...],
    decoders: tuple[int, ...],
    images: tuple[str, ...],
    device: str,
    paper_ratio: float,
    resamples: int,
) -> None:
    for name in peers:
        try:
            PEERS[name].library()
        except ImportError as error:
            raise click.ClickException(f"{PEERS[name].label} cannot run: {error}") from error
    try:
        groups = parse_groups(classes)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    try:
        options = VerifyOptions(models, groups, device=device)
        found = None if labels is None else find_labels(labels)
        loaded = [load_detector(file, device) for file in find_detectors(models)]
        detectors, warnings = choose_groups(loaded, options.groups, found)
        for line in warnings:
            click.echo(line, err=True)
        out.mkdir(parents=True, exist_ok=True)
        setting = Setting(detectors, found, options, resamples, paper_ratio)
        codecs = archived(out, allocations, objects, codec_model, device, decoders)
        codecs += [PeerCodec(out, name) for name in dict.fromkeys(peers)]
        with chosen(flight, images, found, say) as own:
            run = Run(out, own, tuple(f for f, _ in detectors), device, say)
            text = compare_all(run, setting, codecs, sorted({*ratios}))
    except ArchivePipelineError as error:
        raise click.ClickException(str(error)) from error
    click.echo(text)
    for line in run.failed.values():
        click.echo(line, err=True)
    if run.failed:
        sys.exit(PARTLY_FAILED)


def say(line: str) -> None:
    click.echo(line, err=True)


def compare_all(run: Run, setting: Setting, codecs: list[Codec], ratios: list[float]) -> str:
    """Fill what is missing and write all files; returns the tables."""
    setting.check_labels(run)
    run.fill(Original(), 0)
    for ratio in ratios:
        for codec in codecs:
            run.fill(codec, ratio)
    return write(run, setting, codecs, ratios)


if __name__ == "__main__":
    main()
