"""Rate and distortion of the codec beside JPEG, JPEG 2000, WebP, AVIF, JPEG XL and HEVC intra.

    python workflows/benchmarks/benchmark.py OUT --set flight=FLIGHT_DIR --set kodak=KODAK_DIR \
        --crops 24

Every codec gets the same uint8 pixels: crops at places that the seed fixes, from the images at
native size and from the images at half size (area-averaged), or whole images where they are not
larger than 1.5 crops. Peers run through their ladders of settings, ours at target rates; what is
judged was decoded from the bytes that are counted. Ours are self-contained streams of tiles as
the archive cuts them, every byte of them counted; what an archive adds for each image (index,
metadata) is measured by benchmark_frames.py.

\b
Writes to OUT:
    points.csv    a row for each crop, codec and setting: bytes, bits a pixel, all metrics,
                  CPU seconds of encoding and decoding
    ratios.csv    bytes of each peer over ours at equal quality, with 95 % intervals
    summary.md    the same as a table, with versions, settings and speeds
    curves.png    mean rate-distortion curves; curves.svg the same
    crops/        original, ours, HEVC, AVIF and JPEG XL side by side at equal bytes
    tie_points.csv, tie_frames.csv    with --tie-points: as benchmark_tie_points.py has them
    failures.csv  what a codec refused, if anything

--record FOLDER keeps the rows of our codec and of the peers in benchmark.csv and tie_points.csv
beside a model's card; compare_releases.py compares releases by them.

A run that was stopped goes on where it stopped when it is started again with the same options.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import benchmark_figures as figures
import benchmark_summary as summary
import click
import metrics
import numpy as np
import releases
import tie_points
import torch
from benchmark_crops import Crop, CropError, choose_crops
from benchmark_rows import Row, read_rows, resume, write_rows
from metrics import METRICS
from numpy.typing import NDArray

from archive_pipeline.codec.models import DEFAULT_MODEL
from archive_pipeline.pcdc.allocation import ALLOCATIONS

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
from coding import Coder, split
from peers import FLIGHT_PEERS, PEERS, Peer, search
from zoo_peers import ALL_PEERS

OURS = summary.OURS
OUR_RATES = (0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.42, 0.6, 0.85, 1.2)  # bits a pixel
LOWEST, HIGHEST = 0.05, 1.2  # bits a pixel that the peers' ladders cover where they can
NO_PEERS = "none"
SHEET_RATES = (0.15, 0.3, 0.6)  # bits a pixel of the pictures side by side
SHEET_CROPS = 2  # of each set and scale
SHEET_PEERS = ("hevc", "avif", "jpegxl")
SHEET_SLACK = 0.98  # of our bytes, which a peer gets at least
WHERE = ["set", "scale", "crop"]
POINT_FIELDS = [
    *WHERE,
    *["width", "height", "codec", "setting", "bytes", "file_bytes", "bpp"],
    *METRICS,
    *["encode_s", "decode_s"],
]
FAILURE_FIELDS = [*WHERE, "codec", "setting", "error"]

Pixels = NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What a process needs to know to measure a crop."""

    model: str
    allocation: str
    steps: tuple[int, ...]
    peers: tuple[str, ...]
    metrics: tuple[str, ...]
    threads: int


@dataclass
class Measured:
    """Rows of points.csv and failures.csv about one crop."""

    crop: Crop
    points: list[Row] = field(default_factory=list)
    failures: list[Row] = field(default_factory=list)

    @contextmanager
    def guard(self, codec: str, setting: float) -> Iterator[None]:
        """Note what a codec raises, and go on."""
        try:
            yield
        except Exception as error:  # codecs raise anything
            where = dict(zip(WHERE, self.crop.key, strict=True))
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self.failures.append({**where, "codec": codec, "setting": setting, "error": text})


def timed(function: Callable[..., T], *args: Any) -> tuple[T, float]:
    """Return a call's result and the CPU seconds it took, those of all threads together."""
    started = time.process_time()
    result = function(*args)
    return result, time.process_time() - started


class Bench:
    """Codecs and measures, loaded once a process."""

    def __init__(self, plan: Plan) -> None:
        torch.set_num_threads(plan.threads)
        warnings.filterwarnings("ignore", module="torch(metrics|vision)?")
        self.coder, self.plan = Coder(plan.model), plan
        self.peers = {name: ALL_PEERS[name] for name in plan.peers}
        for peer in self.peers.values():
            peer.library()  # imports it, so that the first file's time is that of coding
        self.measures, _ = metrics.load(plan.metrics)

    def encode(self, pixels: Pixels, bpp: float) -> list[bytes]:
        """Encode with our codec into at most `bpp` bits a pixel."""
        height, width = pixels.shape[:2]
        budget = int(bpp * height * width / 8)
        return self.coder.encode(split(pixels), budget, self.plan.allocation)

    def decoders(self, streams: list[bytes], shape: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
        """Names and functions of our decoders, of what `encode` made of pixels of this shape."""
        for steps in self.plan.steps:
            name = summary.ours(steps, self.plan.steps[0])
            yield name, partial(self.coder.decode, streams, (shape[0], shape[1]), steps)

    def quality(self, original: Pixels, decoded: Pixels) -> dict[str, float]:
        """All metrics of decoded pixels."""
        if decoded.shape != original.shape:
            raise ValueError(f"decoded to shape {decoded.shape}")
        return {name: measure(original, decoded) for name, measure in self.measures.items()}

    def measure(self, crop: Crop) -> Measured:
        """Run all codecs over a crop."""
        pixels, done = crop.read(), Measured(crop)

        def judge(codec: str, setting: float, sizes: tuple[int, int], seconds: float, decode: Any):
            decoded, decode_s = timed(decode)
            size = {"width": crop.width, "height": crop.height, "codec": codec, "setting": setting}
            row = {**dict(zip(WHERE, crop.key, strict=True)), **size}
            row |= {"bytes": sizes[0], "file_bytes": sizes[1]}
            row |= {"bpp": 8 * sizes[0] / (crop.width * crop.height)}
            row |= {**self.quality(pixels, decoded), "encode_s": seconds, "decode_s": decode_s}
            done.points.append(row)

        for bpp in OUR_RATES:
            with done.guard(OURS, bpp):
                streams, seconds = timed(self.encode, pixels, bpp)
                size = sum(map(len, streams))
                for name, decode in self.decoders(streams, pixels.shape):
                    judge(name, bpp, (size, size), seconds, decode)
        for name, peer in self.peers.items():
            for setting, data, seconds in climb(name, peer, pixels, done):
                with done.guard(name, setting):
                    sizes = peer.size(data), len(data)
                    judge(name, setting, sizes, seconds, partial(peer.decode, data))
        return done

    def sheets(self, crop: Crop) -> list[tuple[str, figures.Sheet]]:
        """Pictures at equal bytes: a file name and its panels for each rate."""
        pixels, done = crop.read(), []
        for bpp in SHEET_RATES:
            streams = self.encode(pixels, bpp)
            size = sum(map(len, streams))
            panels = [figures.Panel(None, pixels, None, {})]
            for name, decode in self.decoders(streams, pixels.shape):
                decoded = decode()
                panels.append(figures.Panel(name, decoded, size, self.quality(pixels, decoded)))
            for name in SHEET_PEERS:
                peer = self.peers.get(name)
                least = int(np.ceil(SHEET_SLACK * size))
                found = peer and search(peer, pixels, least, at_most=False)
                if found:
                    decoded = peer.decode(found[1])
                    quality = self.quality(pixels, decoded)
                    panels.append(figures.Panel(name, decoded, peer.size(found[1]), quality))
            title = f"{crop.set}, {crop.scale} size, {crop.id}: {bpp:g} bits a pixel"
            name = "-".join([*crop.key, f"{bpp:.2f}bpp.png"])
            done.append((name, figures.Sheet(title, panels)))
        return done


def climb(
    name: str, peer: Peer, pixels: Pixels, done: Measured
) -> list[tuple[float, bytes, float]]:
    """Encode up a peer's ladder: settings, files and seconds, one rate beyond each end."""
    taken: list[tuple[float, bytes, float]] = []
    for setting in peer.ladder:
        with done.guard(name, setting):
            data, seconds = timed(peer.encode, pixels, setting)
            bpp = 8 * peer.size(data) / (pixels.size / 3)
            if bpp <= LOWEST:
                taken.clear()
            taken.append((setting, data, seconds))
            if bpp >= HIGHEST:
                break
    return taken


# ------------------------------------------------------------------ the run and its files


_bench: Bench


def _start(plan: Plan) -> None:
    global _bench
    _bench = Bench(plan)


def _measure(crop: Crop) -> Measured:
    return _bench.measure(crop)


def _draw(crop: Crop, folder: Path) -> None:
    for name, sheet in _bench.sheets(crop):
        figures.draw_sheet(sheet).save(folder / name, optimize=True)


@contextmanager
def workers(plan: Plan, jobs: int) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """Yield a `map` that runs in so many processes, or in this one."""
    if jobs == 1:
        _start(plan)
        yield map
    else:
        context = multiprocessing.get_context("spawn")  # PyTorch's threads do not survive a fork
        with ProcessPoolExecutor(jobs, context, _start, (plan,)) as pool:
            try:
                yield pool.map
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def count_ties(
    out: Path,
    sets: dict[str, Path],
    ratios: tuple[float, ...],
    coder: Coder,
    plan: Plan,
    seed: int,
) -> tuple[tie_points.Measured, list[str]]:
    """Tie points of the sets whose frames overlap, and notes on the others."""
    peers = tuple(name for name in plan.peers if name in FLIGHT_PEERS)
    threads = torch.get_num_threads()
    told = tie_points.Plan(coder, plan.allocation, plan.steps[0], peers, seed, threads)
    return tie_points.run(out, sets, ratios, told, partial(click.echo, err=True))


def parse_sets(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    """Read NAME=DIR options."""
    sets = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not (equals and name.replace("-", "").replace("_", "").isalnum()):
            raise click.BadParameter(f"{value!r} is not NAME=DIR")
        if name in sets:
            raise click.BadParameter(f"{name} is given twice")
        if not Path(folder).is_dir():
            raise click.BadParameter(f"{folder} is not a directory")
        sets[name] = Path(folder)
    return sets


@click.command(help=__doc__)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--set", "sets", multiple=True, required=True, callback=parse_sets, help="NAME=DIR.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Name or folder.")
@click.option(
    "--steps",
    type=click.IntRange(0, 100),
    multiple=True,
    default=(0,),
    show_default=True,
    help="Denoising steps; others are compared with those given first.",
)
@click.option(
    "--allocation",
    type=click.Choice(ALLOCATIONS),
    default="uniform",
    show_default=True,
    help="Of our bits.",
)
@click.option(
    "--codec",
    "codecs",
    type=click.Choice([*ALL_PEERS, NO_PEERS]),
    multiple=True,
    help="Peers, or none; all but those of CompressAI's zoo, whose weights must be at hand.",
)
@click.option(
    "--crops",
    "count",
    type=click.IntRange(1),
    default=24,
    show_default=True,
    help="Of each set and scale.",
)
@click.option(
    "--size", type=click.IntRange(metrics.MIN_SIDE), default=512, show_default=True, help="Pixels."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes that measure."
)
@click.option(
    "--tie-points",
    "ratios",
    type=click.FloatRange(1, 1000),
    multiple=True,
    help="Ratio of raw bytes to ours at which tie points of overlapping frames are counted, too.",
)
@click.option(
    "--record",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A model's folder, to keep the rows in.",
)
def main(
    out: Path,
    sets: dict[str, Path],
    model: str,
    steps: tuple[int, ...],
    allocation: str,
    codecs: tuple[str, ...],
    count: int,
    size: int,
    seed: int,
    jobs: int,
    ratios: tuple[float, ...],
    folder: Path | None,
) -> None:
    coder = Coder(model)
    coder.worth(allocation)  # refused here, not crop by crop
    if ratios:
        tie_points.check_installed()
    if folder is not None and allocation != "uniform":
        raise click.UsageError("--record keeps what --allocation uniform, the default, gives")
    sha256 = coder.codec.model.sha256
    try:
        crops = [c for n, d in sets.items() for c in choose_crops(n, d, count, size, seed)]
    except CropError as error:
        raise click.ClickException(str(error)) from error
    versions, notes = {}, []
    for name in [] if NO_PEERS in codecs else codecs or PEERS:
        try:
            versions[name] = ALL_PEERS[name].library()
        except ImportError as error:
            notes.append(f"{ALL_PEERS[name].label} is left out: {error}")
    measures, missing = metrics.load(METRICS)
    notes += missing.values()
    for note in notes:
        click.echo(note, err=True)
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": sha256,
        "allocation": allocation,
        "steps": steps,
        "crops": [c.key for c in crops],
        "size": size,
        "seed": seed,
        "libraries": versions,
        "peers": {name: ALL_PEERS[name].note for name in versions},
        "metrics": list(measures),
    }
    resume(out, settings)
    points, failures = read_rows(out / "points.csv"), read_rows(out / "failures.csv")
    threads = max(1, torch.get_num_threads() // jobs)
    plan = Plan(model, allocation, steps, tuple(versions), tuple(measures), threads)
    with workers(plan, jobs) as run:
        done = {tuple(r[k] for k in WHERE) for r in points + failures}
        left = [c for c in crops if c.key not in done]
        for n, measured in enumerate(run(_measure, left), len(crops) - len(left) + 1):
            points += measured.points
            failures += measured.failures
            if failures:
                write_rows(out / "failures.csv", FAILURE_FIELDS, failures)
            write_rows(out / "points.csv", POINT_FIELDS, points)
            failed = f", {len(measured.failures)} failed" if measured.failures else ""
            crop = " ".join(measured.crop.key)
            click.echo(f"{n}/{len(crops)} {crop}: {len(measured.points)} points{failed}", err=True)
        names = [*versions, *(summary.ours(n, steps[0]) for n in steps[1:])]
        comparisons = summary.compare_all(points, names, list(measures), seed)
        summary.write_ratios(out / "ratios.csv", comparisons)
        counts = " ".join(f"--steps {n}" for n in steps)
        options = f"--allocation {allocation} {counts} --crops {count} --size {size} --seed {seed}"
        ties, page = tie_points.Measured([], []), []
        if ratios:
            options += "".join(f" --tie-points {ratio:g}" for ratio in ratios)
            ties, more = count_ties(out, sets, ratios, coder, plan, seed)
            notes += more
            page = ["", tie_points.EXPLAINED, *tie_points.lines(ties.pairs, ties.frames, seed), ""]
        text = summary.markdown(
            summary.Run(Path(model).name, sha256, options, steps, versions, notes),
            points,
            failures,
            comparisons,
        )
        text += "\n".join(page)
        (out / "summary.md").write_text(text)
        figures.draw_curves(points, names, list(measures), out / "curves")
        click.echo(text)
        if folder is not None:
            named = {summary.ours(n, steps[0]): summary.ours(n, 0) for n in steps}
            kept = [{**r, "codec": named.get(r["codec"], r["codec"])} for r in points]
            releases.record(folder, sha256, kept, [] if steps[0] else ties.pairs)
        (out / "crops").mkdir(exist_ok=True)
        chosen = summary.first_of_each(crops, SHEET_CROPS)
        for n, _ in enumerate(run(partial(_draw, folder=out / "crops"), chosen), 1):
            click.echo(f"side by side {n}/{len(chosen)}", err=True)


if __name__ == "__main__":
    main()
