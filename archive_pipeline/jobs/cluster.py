"""Where the work runs: in this process, on worker processes of this machine, or on a scheduler."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from archive_pipeline.errors import ArchivePipelineError, require
from archive_pipeline.jobs._cores import cpu_count
from archive_pipeline.store.archive import in_process_only
from archive_pipeline.store.layout import ArchiveError

if TYPE_CHECKING:
    from distributed import Client

T = TypeVar("T")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
SCHEDULER_ANSWERS = 10  # seconds, at most
START_UP_TASKS = 1  # for each core; starting a worker takes about as long as an image
FRAME_MEMORY = 2 << 30  # bytes a worker takes at most with a 20-megapixel frame
QUEUED_PER_THREAD = 4  # tasks handed to the scheduler ahead of time, for each thread
QUEUED_LEAST = 64  # a cluster that grows with its tasks must see some
CENSUS_SECONDS = 5  # workers come and go: counted anew so often
DEATHS = 3  # of its worker, after which a task is suspected, and then blamed (local clusters)
UNPICKLED = "Error during deserialization of the task graph"  # what Dask then says
GPU = "GPU"  # the workers' resource that tasks on a GPU ask for, as dask-cuda's users name it

logger = logging.getLogger(__name__)


class ClusterError(ArchivePipelineError):
    """A scheduler that cannot be reached or was lost; one line that names it."""


class WorkerDied(ArchivePipelineError):
    """A task whose workers die of it; one line."""


def local_workers(tasks: int) -> int:
    """Worker processes for so many image tasks: a core each, as PCDC scales best that way.

    0, that is this process, for a few: it has done them when workers would have started. And
    where Dask is not installed: this process decodes on all cores, too.
    """
    cores = cpu_count()
    return 0 if tasks <= START_UP_TASKS * cores or find_spec("distributed") is None else cores


def workers_in_reach(archive_url: str, scheduler: str | None, workers: int | None) -> int | None:
    """Local worker processes for an archive: as many as asked for, none if they cannot see it.

    Raises:
        ArchiveError: a scheduler's workers cannot see it.
    """
    if not in_process_only(archive_url):
        return workers
    if scheduler is not None:
        raise ArchiveError(f"{archive_url}: only this process sees it; leave out --scheduler")
    return 0


def check_device(device: str, scheduler: str | None) -> None:
    """Make sure that this machine has the device that its own workers shall compute on.

    Raises:
        ValueError: it has not.
    """
    if scheduler is None and device.startswith("cuda"):
        from archive_pipeline.codec.models import find_device

        find_device(device)


@contextmanager
def connect(
    scheduler: str | None, workers: int | None, tasks: int, device: str = "cpu"
) -> Iterator[Pool]:
    """Yield the workers for `tasks` image tasks: this process where that is quickest.

    Args:
        scheduler: address of a running scheduler; a local cluster otherwise.
        workers: local worker processes; 0 is this process; by default one a GPU if the device may
            be one, else see `local_workers`.
        tasks: number of image tasks.
        device: "auto", "cpu" or "cuda", where the tasks compute.

    Raises:
        ClusterError: no scheduler answers at the address, or local workers do not start.
        NotInstalled: Dask is not.
    """
    if scheduler is not None or workers:
        require("distributed", "--scheduler" if scheduler is not None else "--workers")
    if scheduler is not None:
        from distributed import Client
        from distributed.utils import silence_logging_cmgr

        with silence_logging_cmgr(logging.CRITICAL), ExitStack() as stack:
            try:
                client = stack.enter_context(Client(scheduler, timeout=SCHEDULER_ANSWERS))
            except (OSError, ValueError, TypeError) as error:
                reason = "no Dask scheduler answers there"
                if scheduler.startswith("tls:"):  # one that does not know us keeps silent as well
                    reason += " that takes the certificates of Dask's setting distributed.comm.tls"
                raise ClusterError(f"{scheduler}: {reason}") from error
            logger.info("Dask dashboard: %s", client.dashboard_link)
            if not client.nthreads():
                logger.warning("%s has no workers yet; waiting for them", scheduler)
            with Pool(client, gpu=device != "cpu", scheduler=scheduler) as pool:
                yield pool
        return
    count = local_workers(tasks) if workers is None else min(workers, tasks)
    if count == 0:
        with Pool(None) as pool:
            yield pool
        return
    from archive_pipeline.codec.models import find_device

    gpus = 0 if find_device(device) == "cpu" else gpu_count()
    if workers is None and gpus:
        count = min(gpus, tasks)
    with (
        _local_cluster(count, gpus, limited=workers is None) as client,
        Pool(client, gpu=gpus > 0) as pool,
    ):
        yield pool


def gpu_count() -> int:
    """CUDA devices that this process may use."""
    import torch

    return torch.cuda.device_count()


@contextmanager
def _local_cluster(count: int, gpus: int, limited: bool) -> Iterator[Client]:
    """Worker processes on this machine, as many as its memory allows if `limited`.

    Any user of the machine can connect to its ports, and who can talk to Dask can run code. So
    scheduler, workers and their nannies talk by TLS, with a key that is made here and that only
    these processes get; they serve nothing by HTTP, as Dask's dashboard knows no password.
    """
    import dask
    from distributed import Client, LocalCluster
    from distributed.security import Security
    from distributed.system import MEMORY_LIMIT

    if limited:
        count = max(1, min(count, MEMORY_LIMIT // FRAME_MEMORY))
    environ = {name: str(max(1, cpu_count() // count)) for name in THREAD_VARIABLES}
    settings: dict[str, Any] = {
        # A frame takes seconds, so Dask's logs of long-running event loops say nothing new.
        "logging.distributed": "critical",
        "distributed.scheduler.allowed-failures": DEATHS - 1,
        # Dask gives workers up that take 15 s to come back, as they may on a busy machine.
        "distributed.deploy.lost-worker-timeout": "1 hour",
        # Read when a worker starts and imports NumPy and PyTorch.
        **{f"distributed.nanny.pre-spawn-environ.{n}": v for n, v in environ.items()},
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
        # Dask's own value gives memory back after every tensor: half the time goes into that.
        "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
    }
    with _restored(THREAD_VARIABLES), dask.config.set(settings), ExitStack() as stack:
        with _interrupts_held():
            try:
                started = LocalCluster(
                    n_workers=count,
                    threads_per_worker=1,
                    processes=True,
                    # a worker at its limit would be killed, with other memory to spare
                    memory_limit=0,
                    dashboard_address="127.0.0.1:0",
                    scheduler_kwargs={"dashboard": False},
                    security=Security.temporary(),
                    protocol="tls",
                    silence_logs="CRITICAL",
                    resources={GPU: 1} if gpus else None,
                )
            except RuntimeError as error:
                raise ClusterError(f"local worker processes do not start: {error}") from error
            stack.enter_context(started)
        stack.enter_context(_replaced(started, count))
        client = stack.enter_context(Client(started))
        client.register_plugin(_serve_nothing())
        scheduler: Any = started.scheduler
        scheduler.loop.add_callback(scheduler.http_server.stop)
        if gpus:
            client.register_plugin(_pin_to_gpu(gpus))
        yield client


@contextmanager
def _replaced(cluster: Any, count: int) -> Iterator[None]:
    """Start new workers for those that Dask gives up: it does if one dies while it starts."""
    from distributed import Status
    from tornado.ioloop import PeriodicCallback

    def replace() -> None:
        for name, nanny in list(cluster.workers.items()):
            if nanny.status in (Status.closed, Status.failed):
                del cluster.workers[name]
        if len(cluster.workers) < count:
            cluster.scale(count)

    regularly = PeriodicCallback(replace, 1000 * CENSUS_SECONDS)
    cluster.loop.add_callback(regularly.start)
    try:
        yield
    finally:
        cluster.loop.add_callback(regularly.stop)


def _serve_nothing() -> Any:
    """A plugin that closes the port at which each worker tells the world how it is."""
    from distributed import WorkerPlugin

    class ServeNothing(WorkerPlugin):
        name = "serve-nothing"

        def setup(self, worker: Any) -> None:
            worker.http_server.stop()

    return ServeNothing()


def _pin_to_gpu(gpus: int) -> Any:
    """A plugin that shows each worker one GPU, in turn; CUDA looks when it is first used."""
    from distributed import WorkerPlugin

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(i) for i in range(gpus)]

    class PinToGPU(WorkerPlugin):
        name = "pin-to-gpu"

        def setup(self, worker: Any) -> None:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(worker.name) % len(devices)]

    return PinToGPU()


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


def _result_or_error(function: Callable[[Any], T], item: Any) -> T | Exception:
    """What a task returns or raises (runs on a worker).

    Raised, an exception travels with its traceback, and Dask's client waits for ever for one that
    cannot be unpickled there.
    """
    try:
        return function(item)
    except Exception as error:
        plain = error.with_traceback(None)
        try:
            pickle.loads(pickle.dumps(plain))
        except Exception:  # whatever an exception's own constructor does
            return RuntimeError(f"{type(error).__name__}: {error}")
        return plain


class Pool:
    """Workers that tasks are given to, or this process.

    Attributes:
        client: Dask's, None for this process.
        retries: tasks that were handed to another worker since theirs had died.
        lost: workers that died.
    """

    def __init__(self, client: Client | None, gpu: bool = False, scheduler: str = "") -> None:
        self.client = client
        self.retries = 0
        self.lost = 0
        self._scheduler = scheduler
        self._may_use_gpu = gpu
        self._threads, self._counted = 1, -float(CENSUS_SECONDS)
        self._resources: dict[str, int] | None = None
        self._of: dict[Any, Any] = {}  # items by the key of their task
        if client is not None:
            client.subscribe_topic("all", self._note)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        if self.client is not None:  # else the scheduler complains that nobody listens
            self.client.unsubscribe_topic("all")

    @property
    def size(self) -> int:
        """Threads that tasks run on."""
        if self.client is not None:
            self._count_workers()
        return self._threads

    def run(
        self, function: Callable[[Any], T], items: list[Any], gpu: bool = True
    ) -> Iterator[tuple[Any, T | BaseException]]:
        """Yield (item, result or exception) as tasks finish, few of them queued at a time.

        A task whose worker dies is run on another. When a worker dies, all tasks it had are
        suspected; after a few deaths a task runs again alone, after all others, and if its
        workers still die its result is `WorkerDied`.

        Args:
            function: of the module level, as Dask sends it by name.
            items: its arguments; small, as they pass through the scheduler.
            gpu: whether the tasks want a GPU, where workers have that resource.

        Raises:
            ClusterError: the scheduler was lost.
        """
        if self.client is None:
            for item in items:
                try:
                    yield item, function(item)
                except Exception as error:
                    yield item, error
            return
        from distributed import KilledWorker

        suspects = []
        for item, result in self._run(function, items, gpu):
            if isinstance(result, KilledWorker):
                suspects.append(item)
            else:
                yield item, result
        for suspect in suspects:
            for item, result in self._run(function, [suspect], gpu):
                if isinstance(result, KilledWorker):
                    result = WorkerDied(
                        f"its worker died {result.allowed_failures + 1} times while it worked on "
                        "nothing else; out of memory, or a library crashes on this file"
                    )
                yield item, result

    def _run(
        self, function: Callable[[Any], T], items: list[Any], gpu: bool
    ) -> Iterator[tuple[Any, T | BaseException]]:
        from distributed import as_completed

        waiting = list(reversed(items))
        done = as_completed()
        self._submit(function, waiting, done, gpu)
        for future in done:
            try:
                failure = future.exception()
                result = future.result() if failure is None else failure
            except Exception as error:  # where a result cannot be fetched, the scheduler is gone
                raise self._scheduler_lost() from error
            if future.cancelled():
                raise self._scheduler_lost()
            if isinstance(failure, RuntimeError) and UNPICKLED in str(failure):
                where = self._scheduler or "the local cluster"
                raise ClusterError(f"{where}: it needs the same packages that this process has")
            yield self._of.pop(future.key), result
            future.release()
            self._submit(function, waiting, done, gpu)

    def _submit(
        self, function: Callable[[Any], T], waiting: list[Any], done: Any, gpu: bool
    ) -> None:
        """Hand as many tasks over as keep the workers busy."""
        assert self.client is not None
        if not waiting:
            return
        self._count_workers()
        most = max(self._threads * QUEUED_PER_THREAD, QUEUED_LEAST)
        if len(self._of) > most // 2:  # many at once cost the scheduler less than one by one
            return
        items = [waiting.pop() for _ in range(min(len(waiting), most - len(self._of)))]
        resources = self._resources if gpu else None
        futures = self.client.map(
            partial(_result_or_error, function),
            items,
            key=function.__name__,
            pure=False,
            resources=resources,
        )
        for item, future in zip(items, futures, strict=True):
            self._of[future.key] = item
        done.update(futures)

    def _count_workers(self) -> None:
        assert self.client is not None
        if time.monotonic() - self._counted < CENSUS_SECONDS:
            return
        self._counted = time.monotonic()
        workers = self.client.scheduler_info()["workers"].values()
        self._threads = max(1, sum(worker["nthreads"] for worker in workers))
        has_gpu = any(worker["resources"].get(GPU) for worker in workers)
        self._resources = {GPU: 1} if has_gpu and self._may_use_gpu else None

    def _note(self, event: tuple[float, Any]) -> None:
        """Count what a worker's death costs (called by the client's own thread)."""
        _, message = event
        if isinstance(message, dict) and message.get("action") == "remove-worker":
            if message["expected"]:
                return
            tasks = {*message["processing-tasks"], *message["lost-computed-tasks"]}
            again = len(tasks & self._of.keys())
            self.lost += 1
            self.retries += again
            logger.info("worker %s died; %d tasks run again", message["worker"], again)

    def _scheduler_lost(self) -> ClusterError:
        where = f"{self._scheduler}: the Dask scheduler" if self._scheduler else "Dask's scheduler"
        return ClusterError(f"{where} was lost; run the command again to continue")
