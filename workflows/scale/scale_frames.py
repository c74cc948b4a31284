"""Does an ingest take time in a straight line with its frames, and how much beside the codec?

    python workflows/scale/scale_frames.py OUT 64 --workers 2
    python workflows/scale/scale_frames.py OUT 16 --workers 1

Invents frames in OUT (8 different ones under as many names as are asked for), archives them anew
by so many worker processes and reads from the archive when each frame was committed. Prints
seconds until 1/8, 1/4, 1/2 and all of the frames were, what a straight line through these says,
and the seconds of a worker that a frame took: its codec's (networks, allocation, entropy coding;
from the run's report) and all others, start-up left out. Meant for an idle machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from make_flight import make_flight

DIFFERENT = 8  # frames; more would take longer to invent than to archive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("frames", type=int, help="a multiple of 8")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--size", type=int, nargs=2, default=(5472, 3648), metavar=("W", "H"))
    parser.add_argument("--ratio", type=float, default=100)
    options = parser.parse_args()
    flight = _flight(options.out, options.frames, *options.size)
    url = options.out / "archive.zarr"
    shutil.rmtree(url, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "archive_pipeline.commands.cli",
        "ingest",
        flight,
        "--archive",
        url,
    ]
    command += ["--ratio", options.ratio, "--workers", options.workers, "--json"]
    started, since = time.time(), time.monotonic()
    done = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True)
    seconds = time.monotonic() - since
    report = json.loads(done.stdout)
    committed = sorted(p.stat().st_mtime - started for p in url.glob("flights/*/*/zarr.json"))
    counts = [options.frames // part for part in (8, 4, 2, 1)]
    until = np.array([committed[count - 1] for count in counts])
    slope, start = np.polyfit(counts, until, 1)
    off = until / (start + slope * np.array(counts)) - 1
    print(f"{options.workers} workers, {options.frames} frames: {seconds:.1f} s in all")
    print(
        "committed: " + ", ".join(f"{c} in {s:.1f} s" for c, s in zip(counts, until, strict=True))
    )
    print(f"a line: {start:.1f} s to start, {slope:.2f} s a frame; off by", end=" ")
    print(", ".join(f"{share:+.1%}" for share in off))
    stages = report["stages"]
    codec = (stages["encode"] + stages["entropy"]) / options.frames
    busy = (seconds * options.workers - stages["start"]) / options.frames
    print(f"a worker's seconds a frame: {busy:.2f}, of the codec {codec:.2f}", end="")
    print(f", so {busy / codec - 1:+.1%} beside it")


def _flight(out: Path, count: int, width: int, height: int) -> Path:
    """A folder of so many frames, links to a few different ones."""
    made = out / f"frames_{width}x{height}"
    if not made.is_dir():
        *_, ortho = make_flight(made, DIFFERENT, width, height)
        ortho.unlink()
    frames = sorted(made.iterdir())
    flight = out / "flight"
    shutil.rmtree(flight, ignore_errors=True)
    flight.mkdir()
    for number in range(count):
        frame = frames[number % len(frames)]
        (flight / f"{number:05}_{frame.name}").symlink_to(frame.resolve())
    return flight


if __name__ == "__main__":
    main()
