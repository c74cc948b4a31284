"""Measure how fast this checkout codes, beside another commit and beside other codecs.

    python workflows/benchmarks/benchmark_speed.py OUT IMAGE... [--against COMMIT]
        [--ratio 24 --ratio 100] [--size 1824] [--runs 5]

Crops from the middles of the images go through the codec with one thread and with as many as there
are cores, each checkout in a process of its own, in turn: what else a machine does then slows both
alike. The other commit runs from a worktree of its own in the same environment. AVIF (speed 6),
JPEG XL (effort 7), JPEG 2000 and x265 (preset slow) get as many bytes as this checkout took (their
coarsest setting may take more), and one thread.

Processor seconds (user and system, of all threads of the process) tell more than wall seconds
where a machine is shared: the table has these for one core, and wall seconds for all cores. Each
number is the median of the runs, after one that does not count. Writes OUT/speed.json (all runs),
OUT/speed.csv and OUT/speed.md.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
from peers import PEERS, Peer, avif_peer, hevc_peer, jpegxl_peer, search

ROOT = Path(__file__).resolve().parents[2]
HERE = "this checkout"
PEER_CODECS = {
    "AVIF, speed 6": avif_peer(6),
    "JPEG XL, effort 7": jpegxl_peer(7),
    "JPEG 2000": PEERS["jpeg2000"],
    "x265, preset slow": hevc_peer("HEVC intra", "ssim", "slow"),
}
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Sample:
    """One run: seconds of a task on all crops."""

    codec: str
    task: str
    ratio: float
    threads: int
    run: int
    cpu: float
    wall: float
    bytes: int
    psnr: float | None = None


class Worker:
    """A checkout's codec in a process of its own; see `speed_worker.py`."""

    def __init__(self, checkout: Path, pictures: Path, threads: int) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "OMP_NUM_THREADS": str(threads),
            "ARCHIVE_MODEL_PATH": str(checkout / "models"),
        }
        script = Path(__file__).with_name("speed_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(pictures), str(threads)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = self._answer()
        if Path(found) != checkout:
            raise click.ClickException(f"measured {found}, not {checkout}")

    def ask(self, task: str, name: str, ratio: float) -> dict[str, Any]:
        """Seconds, bytes and PSNR of a task on one picture."""
        assert self._process.stdin is not None
        print(task, name, ratio, file=self._process.stdin, flush=True)
        answer: dict[str, Any] = self._answer()
        return answer

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException(f"a measuring process ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A checkout of a commit, for as long as it is measured.

    Raises:
        click.ClickException: git cannot make it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder).resolve() / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        made = subprocess.run(
            [*git, "add", "--detach", str(path), commit], capture_output=True, text=True
        )
        if made.returncode:
            raise click.ClickException(f"{commit}: {made.stderr.strip()}")
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True)


def middle(path: Path, size: int) -> Pixels:
    """A square from the middle of an image, or as much of it as there is.

    Raises:
        click.ClickException: the file is no image.
    """
    try:
        pixels = np.asarray(Image.open(path).convert("RGB"))
    except OSError as error:
        raise click.ClickException(f"{path}: {error}") from error
    top, left = (max(0, (n - size) // 2) for n in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def measure_checkouts(
    checkouts: dict[str, Path], crops: dict[str, Pixels], ratios: list[float], runs: int
) -> list[Sample]:
    """All runs of the checkouts, in turn."""
    samples = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    plan = [(threads, ratio) for threads in sorted({1, cores or 1}) for ratio in ratios]
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(plan) * (runs + 1)) as bar:
        pictures = Path(folder) / "crops.npz"
        np.savez(pictures, allow_pickle=False, **crops)  # type: ignore[arg-type]
        for threads, ratio in plan:
            with ExitStack() as stack:
                workers = {}
                for name, path in checkouts.items():
                    workers[name] = Worker(path, pictures, threads)
                    stack.callback(workers[name].close)
                for run in range(-1, runs):  # the first loads what is loaded once
                    for name, worker in workers.items():
                        for task in ("encode", "decode"):
                            found = [worker.ask(task, crop, ratio) for crop in crops]
                            sums = [sum(f[key] for f in found) for key in ("cpu", "wall", "bytes")]
                            psnr = [f["psnr"] for f in found if "psnr" in f]
                            mean = float(np.mean(psnr)) if psnr else None
                            if run >= 0:
                                samples.append(
                                    Sample(name, task, ratio, threads, run, *sums, psnr=mean)
                                )
                    bar.update()
    return samples


def measure_peer(
    name: str, peer: Peer, crops: list[Pixels], ratio: float, budgets: list[int], runs: int
) -> list[Sample]:
    """All runs of a peer that gets at most so many bytes for each crop, or its coarsest setting."""
    settings = []
    for pixels, budget in zip(crops, budgets, strict=True):
        found = search(peer, pixels, budget, at_most=True)
        settings.append(found[0] if found else peer.settings[0])
    samples = []
    for run in range(runs):
        files = [b""] * len(crops)
        for task in ("encode", "decode"):
            wall, cpu = time.perf_counter(), time.process_time()
            for k, pixels in enumerate(crops):
                if task == "encode":
                    files[k] = peer.encode(pixels, settings[k])
                else:
                    peer.decode(files[k])
            spent = time.process_time() - cpu, time.perf_counter() - wall
            samples.append(Sample(name, task, ratio, 1, run, *spent, sum(map(peer.size, files))))
    return samples


def summary(samples: list[Sample], megapixels: float) -> list[dict[str, Any]]:
    """A row for each codec, ratio and number of threads: medians, a megapixel."""
    rows: dict[tuple[str, float, int], dict[str, Any]] = {}
    for s in samples:
        key = s.codec, s.ratio, s.threads
        row = rows.setdefault(key, dict(zip(("codec", "ratio", "threads"), key, strict=True)))
        same = [o for o in samples if (o.codec, o.ratio, o.threads, o.task) == (*key, s.task)]
        for kind in ("cpu", "wall"):
            value = median(getattr(o, kind) for o in same) / megapixels
            row[f"{s.task}_{kind}_s_per_mp"] = round(value, 4)
        row["bits_per_pixel"] = round(8e-6 * s.bytes / megapixels, 4)
        if s.psnr is not None:
            row["psnr"] = round(s.psnr, 3)
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    cores = max(row["threads"] for row in rows)
    lines = [
        "| ratio | codec | encoding, core seconds a megapixel | decoding |"
        f" encoding, MP/s on {cores} cores | decoding |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["threads"] != 1:
            continue
        cells = [f"{row['ratio']:g}", row["codec"]]
        cells += [f"{row[f'{task}_cpu_s_per_mp']:.3f}" for task in ("encode", "decode")]
        whole = [
            r
            for r in rows
            if (r["codec"], r["ratio"], r["threads"]) == (row["codec"], row["ratio"], cores)
        ]
        for task in ("encode", "decode"):
            cells += [f"{1 / whole[0][f'{task}_wall_s_per_mp']:.1f}" if whole else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write(out: Path, samples: list[Sample], rows: list[dict[str, Any]], machine: str) -> None:
    """Write all runs, their medians, and the table."""
    out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "samples": [asdict(s) for s in samples]}
    (out / "speed.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "speed.md").write_text(table(rows))
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with (out / "speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def _ours(samples: list[Sample], ratio: float) -> int:
    return next(s.bytes for s in samples if s.codec == HERE and s.ratio == ratio)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--against", metavar="COMMIT", help="Measure another commit, too.")
@click.option("--ratio", "ratios", multiple=True, type=click.FloatRange(min=1), default=(24, 100))
@click.option("--size", default=1824, show_default=True, help="Side of the crops in pixels.")
@click.option("--runs", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--peers/--no-peers", default=True, show_default=True)
def main(
    out: Path,
    images: tuple[Path, ...],
    against: str | None,
    ratios: tuple[float, ...],
    size: int,
    runs: int,
    peers: bool,
) -> None:
    crops = {f"crop{k}": middle(path, size) for k, path in enumerate(images)}
    megapixels = sum(c.shape[0] * c.shape[1] for c in crops.values()) / 1e6
    checkouts = {HERE: ROOT}
    with ExitStack() as stack:
        if against:
            checkouts[against] = stack.enter_context(worktree(against))
        samples = measure_checkouts(checkouts, crops, list(ratios), runs)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    write(out, samples, summary(samples, megapixels), machine)
    for ratio in ratios:
        # shares of the bytes that this checkout took for all crops
        share = _ours(samples, ratio) / (megapixels * 1e6)
        budgets = [int(share * c.shape[0] * c.shape[1]) for c in crops.values()]
        for name, peer in PEER_CODECS.items() if peers else ():
            samples += measure_peer(name, peer, list(crops.values()), ratio, budgets, runs)
            write(out, samples, summary(samples, megapixels), machine)
    click.echo((out / "speed.md").read_text())


if __name__ == "__main__":
    main()
