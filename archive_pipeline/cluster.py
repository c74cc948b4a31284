"""Where the work runs: in this process, on worker processes of this machine, or on a scheduler."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from distributed import Client

T = TypeVar("T")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
START_UP_TASKS = 1  # for each core; starting a worker takes about as long as an image
FRAME_MEMORY = 2 << 30  # bytes a worker takes at most with a 20-megapixel frame
QUEUED_PER_THREAD = 4  # tasks handed to the scheduler ahead of time, for each thread


def local_workers(tasks: int) -> int:
    """Worker processes for so many image tasks: a core each, as PCDC scales best that way.

    0, that is this process, for a few: it has done them when workers would have started.
    """
    cores = cpu_count()
    return 0 if tasks <= START_UP_TASKS * cores else cores


def cpu_count() -> int:
    """Cores that this process may use, by affinity and container limits."""
    from dask.system import CPU_COUNT

    return int(CPU_COUNT)


@contextmanager
def connect(scheduler: str | None, workers: int | None, tasks: int) -> Iterator[Client | None]:
    """Yield a Dask client for `tasks` image tasks, or None to run them in this process.

    Args:
        scheduler: address of a running scheduler; a local cluster otherwise.
        workers: local worker processes; 0 is this process; by default see `local_workers`.
        tasks: number of image tasks.

    Raises:
        OSError: no scheduler answers at the address.
    """
    if scheduler is not None:
        from distributed import Client

        with Client(scheduler, timeout="10s") as client:
            yield client
        return
    count = local_workers(tasks) if workers is None else min(workers, tasks)
    if count == 0:
        yield None
        return
    import dask
    from distributed import Client, LocalCluster
    from distributed.system import MEMORY_LIMIT

    if workers is None:
        count = max(1, min(count, MEMORY_LIMIT // FRAME_MEMORY))
    environ = {name: str(max(1, cpu_count() // count)) for name in THREAD_VARIABLES}
    settings = {
        # A frame takes seconds, so Dask's logs of long-running event loops say nothing new.
        "logging.distributed": "critical",
        # Read when a worker starts and imports NumPy and PyTorch.
        **{f"distributed.nanny.pre-spawn-environ.{n}": v for n, v in environ.items()},
        # Dask's own value gives memory back after every tensor: half the time goes into that.
        "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
    }
    with _restored(THREAD_VARIABLES), dask.config.set(settings), ExitStack() as stack:
        with _interrupts_held():
            started = LocalCluster(
                n_workers=count,
                threads_per_worker=1,
                processes=True,
                memory_limit=0,  # a worker at its limit would be killed, with other memory to spare
                dashboard_address=None,
                silence_logs="CRITICAL",
            )
            stack.enter_context(started)
        yield stack.enter_context(Client(started))


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back; threads and processes started meanwhile never see it.

    A terminal sends it to all processes, but this one alone should react, by ending the others.
    Threads inherit that it is blocked, processes that it is ignored.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    main = threading.current_thread() is threading.main_thread()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _restored(names: tuple[str, ...]) -> Iterator[None]:
    """Take the variables out of the environment, and put them back: Dask leaves its own there."""
    before = {name: os.environ.pop(name, None) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


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
        failure = future.exception()
        yield item, future.result() if failure is None else failure
        future.release()
        if waiting:
            done.add(submit())
