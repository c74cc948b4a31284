"""Where the work runs: in this process, on worker processes of this machine, or on a scheduler."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from distributed import Client

T = TypeVar("T")
QUEUED_PER_THREAD = 4  # tasks handed to the scheduler ahead of time, for each thread


def local_workers(tasks: int) -> int:
    """Worker processes for so many image tasks: a core each, as PCDC scales best that way."""
    return max(1, min(tasks, len(os.sched_getaffinity(0))))


@contextmanager
def connect(scheduler: str | None, workers: int | None, tasks: int) -> Iterator[Client | None]:
    """Yield a Dask client for `tasks` image tasks, or None to run them in this process.

    Args:
        scheduler: address of a running scheduler; a local cluster otherwise.
        workers: local worker processes; 0 is this process; by default one a core, but this
            process for a single task, which then has all cores.
        tasks: number of image tasks.

    Raises:
        OSError: no scheduler answers at the address.
    """
    if scheduler is None and (workers == 0 or (workers is None and tasks <= 1)):
        yield None
        return
    import dask
    from distributed import Client, LocalCluster

    if scheduler is not None:
        with Client(scheduler, timeout="20s") as client:
            yield client
        return
    count = workers or local_workers(tasks)
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    env = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    # A frame takes seconds, so Dask's logs of long-running event loops say nothing new.
    quiet = {"logging.distributed": "error", "distributed.nanny.environ": env}
    with (
        dask.config.set(quiet),
        LocalCluster(
            n_workers=count, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def run(
    client: Client | None, function: Callable[[Any], T], items: list[Any]
) -> Iterator[tuple[Any, T | BaseException]]:
    """Yield (item, result or exception) as tasks finish, few of them queued at a time."""
    if client is None:
        for item in items:
            try:
                yield item, function(item)
            except Exception as error:
                yield item, error
        return
    from distributed import as_completed

    waiting = list(reversed(items))
    of: dict[Any, Any] = {}
    threads = max(1, sum(client.nthreads().values()))

    def submit() -> Any:
        item = waiting.pop()
        future = client.submit(function, item, pure=False)
        of[future.key] = item
        return future

    done = as_completed([submit() for _ in range(min(len(waiting), threads * QUEUED_PER_THREAD))])
    for future in done:
        item = of.pop(future.key)
        error = future.exception()
        yield item, future.result() if error is None else error
        future.release()
        if waiting:
            done.add(submit())
