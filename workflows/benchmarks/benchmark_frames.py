"""Compare the archive with JPEG 2000 and AVIF: quality at equal bytes, and time.

    python workflows/benchmarks/benchmark_frames.py OUT FLIGHT_DIR [--ratio 24 --ratio 48 ...]
        [--model NAME]

Every frame goes through `archive ingest` and comes back from the archive's bytes; each peer then
gets as many bytes as the archive took for that frame, metadata and index included. Writes
OUT/frames.csv (one row a frame, ratio and codec), OUT/table.md (means) and the seam
measure: squared error of the columns and rows on both sides of tile borders over that of all
others. Times are of this machine in this run; ratios of them are what can be compared.
"""

from __future__ import annotations

import csv
import shutil
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from metrics import psnr
from numpy.typing import NDArray

from archive_pipeline.codec.models import DEFAULT_MODEL, find_device
from archive_pipeline.codec.settings import Settings
from archive_pipeline.flight.read import read_pixels
from archive_pipeline.jobs.ingest import ingest
from archive_pipeline.jobs.ingest_task import Budget, IngestOptions
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.layout import TILE

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
from peers import FRAME_PEERS, search

FIELDS = ["image", "ratio", "codec", "bytes", "budget", "psnr", "seam", "encode_s", "decode_s"]
Pixels = NDArray[np.uint8]


def seam_ratio(original: Pixels, restored: Pixels, tile: int = TILE) -> float:
    """Squared error beside inner tile borders over that of all other pixels."""
    error = ((original.astype(np.float32) - restored) ** 2).mean(2)
    beside = np.zeros(error.shape, bool)
    for edge in range(tile, error.shape[0], tile):
        beside[edge - 1 : edge + 1] = True
    for edge in range(tile, error.shape[1], tile):
        beside[:, edge - 1 : edge + 1] = True
    return float(error[beside].mean() / error[~beside].mean())


def jpeg2000(pixels: Pixels, size: int) -> bytes:
    """JPEG 2000 of at most `size` bytes.

    Raises:
        click.ClickException: the coarsest takes more.
    """
    target = size
    while target > 0:
        data = FRAME_PEERS["jpeg2000"].encode(pixels, 8 * target / (pixels.size / 3))
        if len(data) <= size:
            return data
        target -= max(1, len(data) - size)  # OpenJPEG may miss its rate by a few bytes
    raise click.ClickException(f"JPEG 2000 cannot code a frame in {size} bytes")


def avif(pixels: Pixels, size: int) -> bytes:
    """The best AVIF of at most `size` bytes.

    Raises:
        click.ClickException: the coarsest takes more.
    """
    found = search(FRAME_PEERS["avif"], pixels, size, at_most=True)
    if found is None:
        raise click.ClickException(f"AVIF cannot code a frame in {size} bytes")
    return found[1]


ENCODERS = {"jpeg2000": jpeg2000, "avif": avif}


def run_archive(
    flight: Path, ratio: float, model: str, counts: tuple[int, ...], work: Path
) -> list[dict]:
    """A row for each frame and number of denoising steps; rows carry the pixels for the peers."""
    url = str(work / f"ratio-{ratio:g}.zarr")
    rows = []
    started = time.perf_counter()
    report = ingest(url, [("flight", flight)], IngestOptions(Budget(ratio=ratio), model), workers=0)
    seconds = (time.perf_counter() - started) / max(len(report.outcomes), 1)
    archive = Archive.open(url)
    for entry in archive.images():
        source = ArchivedImage(archive, entry).source
        original, _ = read_pixels(source)
        for steps in counts:
            image = ArchivedImage(archive, entry, Settings(find_device("auto"), steps))
            started = time.perf_counter()
            restored = image.read((0, 0, source.width, source.height))
            decoded = time.perf_counter() - started
            rows.append(
                {
                    "image": source.id,
                    "ratio": ratio,
                    "codec": f"pcdc, steps {steps}",
                    "bytes": archive.size_of(entry.key),
                    "budget": int(original.size / ratio),
                    "psnr": psnr(original, restored),
                    "seam": seam_ratio(original, restored),
                    "encode_s": seconds,
                    "decode_s": decoded,
                    "original": original,
                }
            )
    return rows


def run_peer(name: str, row: dict) -> dict:
    """The peer's row for the frame and bytes of one of the archive's rows."""
    started = time.perf_counter()
    data = ENCODERS[name](row["original"], row["bytes"])
    encoded = time.perf_counter()
    restored = FRAME_PEERS[name].decode(data)
    decoded = time.perf_counter()
    return {
        **{k: row[k] for k in ("image", "ratio", "budget")},
        "codec": name,
        "bytes": len(data),
        "psnr": psnr(row["original"], restored),
        "seam": "",
        "encode_s": encoded - started,
        "decode_s": decoded - encoded,
    }


def table(rows: list[dict]) -> str:
    """Means over frames as a Markdown table."""
    lines = [
        "| ratio | codec | mean PSNR dB | bytes of budget | worst seam | encode s | decode s |",
        "|---|---|---|---|---|---|---|",
    ]
    for ratio in sorted({r["ratio"] for r in rows}):
        for codec in dict.fromkeys(r["codec"] for r in rows):
            group = [r for r in rows if r["ratio"] == ratio and r["codec"] == codec]
            mean = {k: np.mean([r[k] for r in group]) for k in ("psnr", "encode_s", "decode_s")}
            used = [r["bytes"] / r["budget"] for r in group]
            seams = [r["seam"] for r in group if r["seam"] != ""]
            lines.append(
                f"| {ratio:g} | {codec} | {mean['psnr']:.2f} | {min(used):.4f}-{max(used):.4f} | "
                f"{f'{max(seams):.3f}' if seams else ''} | {mean['encode_s']:.2f} | "
                f"{mean['decode_s']:.2f} |"
            )
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("flight", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--ratio", "ratios", type=float, multiple=True, default=(24, 48, 96, 160))
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option(
    "--steps",
    "counts",
    type=click.IntRange(0, 100),
    multiple=True,
    default=(0,),
    show_default=True,
    help="Denoising steps.",
)
@click.option(
    "--peer", "peers", type=click.Choice(list(ENCODERS)), multiple=True, default=("jpeg2000",)
)
def main(
    out: Path,
    flight: Path,
    ratios: tuple[float, ...],
    model: str,
    counts: tuple[int, ...],
    peers: tuple[str, ...],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    work = Path(tempfile.mkdtemp(dir=out))
    try:
        for ratio in ratios:
            for n, row in enumerate(run_archive(flight, ratio, model, counts, work)):
                rows.append(row)
                if n % len(counts) == 0:  # peers are the same for all numbers of steps
                    rows += [run_peer(name, row) for name in peers]
                del row["original"]
                click.echo(
                    f"{row['image']} {ratio:g}, {row['codec']}: {row['psnr']:.2f} dB", err=True
                )
    finally:
        shutil.rmtree(work)
    with (out / "frames.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    (out / "table.md").write_text(table(rows))
    click.echo(table(rows))


if __name__ == "__main__":
    main()
