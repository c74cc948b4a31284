"""What Dask costs a campaign: many tasks that do nothing, handed out as those of images are.

    python workflows/scale/scale_simulation.py 1000 10000 100000

For each number of tasks it prints the seconds in all and for each task, the processor time that
the scheduler's and client's process takes for one, and that process's memory afterwards.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import psutil

from archive_pipeline.jobs import cluster
from archive_pipeline.jobs.ingest_task import IngestOptions, IngestTask


def nothing(task: IngestTask) -> str:
    """An image's task without the image."""
    return task.id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", type=int, nargs="+")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    process = psutil.Process()
    print(f"{'tasks':>8} {'seconds':>9} {'ms a task':>10} {'CPU ms a task':>14} {'MB':>6}")
    with cluster.connect(None, options.workers, max(options.tasks)) as pool:
        list(pool.run(nothing, [_task(i) for i in range(100)]))  # workers import what they need
        for count in options.tasks:
            tasks = [_task(i) for i in range(count)]
            started, used = time.perf_counter(), sum(process.cpu_times()[:2])
            done = sum(1 for _ in pool.run(nothing, tasks))
            seconds = time.perf_counter() - started
            used = sum(process.cpu_times()[:2]) - used
            assert done == count
            memory = process.memory_info().rss / 1e6
            print(
                f"{count:8} {seconds:9.1f} {1e3 * seconds / count:10.3f} "
                f"{1e3 * used / count:14.3f} {memory:6.0f}",
                flush=True,
            )


def _task(number: int) -> IngestTask:
    name = f"DJI_{number:06}.JPG"
    return IngestTask("/archive.zarr", "flight", name, Path("/flight") / name, IngestOptions())


if __name__ == "__main__":
    main()
