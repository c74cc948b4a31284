"""Detectors on archived images at several ratios, beside HEVC intra and JPEG at the same bytes.

    python workflows/detection/detection_table.py OUT_DIR FLIGHT_DIR --model yolo11s.pt
        [--labels DIR] [--source-ratio 10 --source-ratio 21.2 --source-ratio 40]
        [--peer hevc --peer jpeg] [--steps 0 --steps 1] [--objects yolo11s.pt] [--image NAME ...]

Every frame goes through `archive ingest` and comes back from the archive's bytes, decoded with
each number of denoising steps (pcdc-1 is pcdc with one); each peer then gets as many bytes as the
archive took for that frame, metadata and index included. (A peer's lowest quality may take more:
the column `bytes` says what was used.) With --objects a second archive of the same budgets joins,
"objects", made with `--allocation objects` and that detector's finds. The numbers are those of
`archive verify-detection`: labels are the reference, without them the originals' detections are.

Writes OUT_DIR/detection.csv (a row for each ratio, codec, detector, class group and metric, with
95 % bootstrap intervals over frames) and OUT_DIR/detection.md.
Needs `pip install 'archive-pipeline[verify,benchmark]'`; peers are those of `peers.py`.
"""

from __future__ import annotations

import csv
import shutil
import sys
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from archive_pipeline.codec.models import DEFAULT_MODEL
from archive_pipeline.detection.boxes import Boxes, Detections
from archive_pipeline.detection.detectors import (
    Detector,
    Read,
    detect,
    find_detectors,
    load_detector,
    whole,
)
from archive_pipeline.detection.labels import Labels, find_labels, parse_groups, read_labels
from archive_pipeline.detection.metrics import METRICS
from archive_pipeline.detection.verdict import GroupResult, ModelReport, judge
from archive_pipeline.detection.verification import (
    DetectorGroups,
    VerifyOptions,
    choose_groups,
    compare,
)
from archive_pipeline.jobs.ingest import ingest
from archive_pipeline.jobs.ingest_task import Budget, IngestOptions
from archive_pipeline.jobs.originals import Originals, find_original, original_pixels
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.layout import ImageEntry

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
from peers import FRAME_PEERS as PEERS
from peers import within

Pixels = NDArray[np.uint8]
FIELDS = [
    "source_ratio", "codec", "bytes", "images", "model", "reference", "class", "objects", "metric",
    "original", "restored", "delta", "low", "high",
]  # fmt: skip


@dataclass
class Codec:
    """What was found in one codec's images at one ratio."""

    bytes: list[int] = field(default_factory=list)
    results: dict[tuple[str, str], dict[str, GroupResult]] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """Detectors with their groups, the reference, and how archived images are decoded."""

    detectors: DetectorGroups
    labels: Labels | None
    options: VerifyOptions
    decoders: tuple[int, ...]  # numbers of steps

    def labelled(self, entry: ImageEntry, detector: Detector) -> dict[str, Boxes] | None:
        """Boxes of an image's labels by class, if labels are the reference."""
        label = None if self.labels is None else self.labels.find(entry.flight, entry.id)
        if self.labels is None or label is None:
            return None
        names = detector.classes if self.labels.names is None else self.labels.names
        return read_labels(label, entry.record["width"], entry.record["height"], names)


def decoded_as(name: str, steps: int) -> str:
    """An archive's images, decoded with so many steps, in the table."""
    return name if steps == 0 else f"{name}-{steps}"


def run_image(
    archives: dict[str, Archive], key: str, setting: Setting, codecs: dict[str, Codec]
) -> None:
    """Compare one frame of each archive, and the peers at the first one's bytes, with its
    original."""
    images = {}
    for name, archive in archives.items():
        entry = archive.entry(key)
        if entry is None:
            raise click.ClickException(f"{key}: could not be archived as {name}")
        images[name] = ArchivedImage(archive, entry)
    first, image = next(iter(archives.values())), next(iter(images.values()))
    entry = image.entry
    places = Originals(first.url, None).candidates(entry)  # where this run archived it from
    source, problem, _ = find_original(image, places)
    if source is None:
        raise click.ClickException(problem)
    width, height = source.width, source.height
    everything = (0, 0, width, height)
    with original_pixels(source) as read:
        assert read is not None
        original = whole(read, width, height)
        size = first.size_of(key)
        versions: dict[str, Read] = {}
        for name, archive in archives.items():
            for steps in setting.decoders:
                decoded = replace(setting.options, steps=steps).settings()
                restored = ArchivedImage(archive, images[name].entry, decoded)
                versions[decoded_as(name, steps)] = whole(restored.read, width, height)
                codecs[decoded_as(name, steps)].bytes.append(archive.size_of(key))
        for name in (codec for codec in codecs if codec in PEERS):
            peer = PEERS[name]
            data = within(peer, original(everything), size)
            versions[name] = partial(crop, peer.decode(data))
            codecs[name].bytes.append(peer.size(data))
        for file, groups in setting.detectors:
            detector: Detector = load_detector(file, setting.options.device)
            side = setting.options.slice or detector.input_size
            readers = [original, *versions.values()]
            found: list[Detections] = detect(detector, readers, width, height, side, height)
            labelled = setting.labelled(entry, detector)
            for name, after in zip(versions, found[1:], strict=True):
                results = compare(detector, groups, found[0], after, labelled, setting.options)
                for group, result in results.items():
                    own = codecs[name].results.setdefault((file.sha256, group), {})
                    own[f"{entry.flight}/{entry.id}"] = result


def crop(pixels: Pixels, window: tuple[int, int, int, int]) -> Pixels:
    col, row, width, height = window
    return pixels[row : row + height, col : col + width]


def rows_of(ratio: float, name: str, codec: Codec, setting: Setting) -> list[dict]:
    """Rows of the CSV for one codec at one ratio."""
    rows = []
    reference = "originals" if setting.labels is None else "labels"
    options = setting.options
    for file, groups in setting.detectors:
        report = ModelReport(file.name, file.sha256, reference, len(codec.bytes), 0)
        for group in groups:
            results = codec.results[file.sha256, group]
            judge(report, group, results, options.confidence, options.tolerance)
            for metric in METRICS:
                low, high = report.intervals[group][metric] or (None, None)
                rows.append(
                    {
                        "source_ratio": ratio,
                        "codec": name,
                        "bytes": sum(codec.bytes),
                        "images": len(codec.bytes),
                        "model": file.name,
                        "reference": reference,
                        "class": group,
                        "objects": report.objects[group],
                        "metric": metric,
                        "original": report.original[group][metric],
                        "restored": report.restored[group][metric],
                        "delta": report.delta[group][metric],
                        "low": low,
                        "high": high,
                    }
                )
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: a row for each ratio, codec, detector and class, differences with intervals."""
    lines = [
        "| source ratio | codec | bytes | detector | class | " + " | ".join(METRICS) + " |",
        "|---|---|---|---|---|" + "---|" * len(METRICS),
    ]
    keys = ("source_ratio", "codec", "bytes", "model", "class")
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        cells = []
        for row in rows:
            if tuple(row[k] for k in keys) == key:
                cells.append(
                    "-"
                    if row["delta"] is None
                    else f"{row['restored']:.3f} ({row['delta']:+.3f}; "
                    f"{row['low']:+.3f} to {row['high']:+.3f})"
                )
        lines.append("| " + " | ".join([*(str(k) for k in key), *cells]) + " |")
    return "\n".join(lines) + "\n"


def write(rows: list[dict], out: Path) -> None:
    """Write both files; called after each ratio, as all of them take long."""
    with (out / "detection.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    (out / "detection.md").write_text(table(rows))


def chosen(flight: Path, images: tuple[str, ...], work: Path) -> Path:
    """The flight's folder, or one with links to some of its images."""
    if not images:
        return flight
    folder = work / flight.name
    folder.mkdir()
    for name in images:
        if not (flight / name).is_file():
            raise click.ClickException(f"{flight / name}: no such file")
        (folder / name).symlink_to((flight / name).absolute())
    return folder


def archived(path: Path, flight: Path, options: IngestOptions) -> Archive:
    """A flight's archive, made anew; what failed is named."""
    for outcome in ingest(str(path), [(flight.name, flight)], options).outcomes:
        if outcome.error:
            click.echo(f"{outcome.path}: {outcome.error}", err=True)
    return Archive.open(str(path))


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("flight", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", "models", multiple=True, required=True, help="Detector; repeatable.")
@click.option("--labels", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--classes", multiple=True, metavar="GROUP[=NAME,...]")
@click.option(
    "--source-ratio", "ratios", type=float, multiple=True, default=(10, 21.2, 40), show_default=True
)
@click.option("--codec-model", default=DEFAULT_MODEL, show_default=True)
@click.option(
    "--peer", "peers", type=click.Choice(list(PEERS)), multiple=True, default=("hevc", "jpeg")
)
@click.option(
    "--steps", "decoders", type=click.IntRange(0), multiple=True, default=(0,), show_default=True
)
@click.option("--objects", metavar="MODEL", help="Detector for a second archive of objects first.")
@click.option("--image", "images", multiple=True, help="File name in the flight; default: all.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
def main(
    out: Path,
    flight: Path,
    models: tuple[str, ...],
    labels: Path | None,
    classes: tuple[str, ...],
    ratios: tuple[float, ...],
    codec_model: str,
    peers: tuple[str, ...],
    decoders: tuple[int, ...],
    objects: str | None,
    images: tuple[str, ...],
    device: str,
) -> None:
    for name in peers:
        try:
            PEERS[name].library()
        except ImportError as error:
            raise click.ClickException(f"{PEERS[name].label} cannot run: {error}") from error
    out.mkdir(parents=True, exist_ok=True)
    options = VerifyOptions(models, parse_groups(classes), device=device)
    found = None if labels is None else find_labels(labels)
    loaded = [load_detector(file, device) for file in find_detectors(models)]
    detectors, warnings = choose_groups(loaded, options.groups, found)
    for line in warnings:
        click.echo(line, err=True)
    setting = Setting(detectors, found, options, decoders)
    rows: list[dict] = []
    work = Path(tempfile.mkdtemp(dir=out))
    try:
        flight = chosen(flight, images, work)
        for ratio in ratios:
            plain = IngestOptions(Budget(source_ratio=ratio), codec_model, device)
            made = {"pcdc": plain}
            if objects:
                made["objects"] = replace(plain, detect=(objects,), allocation="objects")
            archives = {
                name: archived(work / f"{name}-{ratio:g}.zarr", flight, how)
                for name, how in made.items()
            }
            names = [decoded_as(name, n) for name in archives for n in decoders]
            codecs = {name: Codec() for name in (*names, *peers)}
            for entry in archives["pcdc"].images():
                if found is None or found.find(entry.flight, entry.id) is not None:
                    run_image(archives, entry.key, setting, codecs)
                    click.echo(f"{ratio:g} {entry.id}", err=True)
            for name, codec in codecs.items():
                rows += rows_of(ratio, name, codec, setting)
            write(rows, out)
    finally:
        shutil.rmtree(work)
    click.echo(table(rows))


if __name__ == "__main__":
    main()
