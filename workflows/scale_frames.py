"""Does the time of an ingest grow in a straight line with its frames?

    python workflows/scale_frames.py OUT 8 16 32 64

Invents that many frames of 608 x 608 pixels in OUT, archives each number of them anew as one
process, and prints processor time, what a straight line through all says, and the share of it that
is not the codec (networks, allocation, entropy coding) or start-up. Processor time, as a busy
machine stretches the other.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from make_flight import make_flight

SIDE = 608


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("frames", type=int, nargs="+")
    parser.add_argument("--ratio", type=float, default=48)
    options = parser.parse_args()
    *frames, ortho = make_flight(options.out / "all", max(options.frames), SIDE, SIDE)
    ortho.unlink()
    print(f"{'frames':>7} {'CPU s':>8} {'beside codec':>13}")
    used = []
    for count in options.frames:
        flight = options.out / f"flight_{count}"
        shutil.rmtree(flight, ignore_errors=True)
        flight.mkdir()
        for frame in frames[:count]:
            (flight / frame.name).symlink_to(frame.resolve())
        seconds, others = _ingest(flight, options.out / "archive.zarr", options.ratio)
        used.append(seconds)
        print(f"{count:7} {seconds:8.1f} {others:13.1%}", flush=True)
    slope, start = np.polyfit(options.frames, used, 1)
    off = np.array(used) / (start + slope * np.array(options.frames)) - 1
    print(f"a line: {start:.1f} s to start, {slope:.3f} s a frame; off by", end=" ")
    print(", ".join(f"{share:+.1%}" for share in off))


def _ingest(flight: Path, url: Path, ratio: float) -> tuple[float, float]:
    """Processor seconds of an ingest, and the share of its stages that is no codec's."""
    shutil.rmtree(url, ignore_errors=True)
    command = [sys.executable, "-m", "archive_pipeline.cli", "ingest", flight, "--archive", url]
    command += ["--ratio", ratio, "--workers", 0, "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    stages = json.loads(done.stdout)["stages"]
    codec = stages["encode"] + stages["entropy"]
    others = stages["read"] + stages["write"]
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, others / (codec + others)


if __name__ == "__main__":
    main()
