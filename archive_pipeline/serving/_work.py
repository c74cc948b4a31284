"""The work of requests in threads: so much at a time, so much waiting, no more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from archive_pipeline.serving._errors import Gone, Unavailable

T = TypeVar("T")


@dataclass
class _Job:
    """Something that is made, and how many requests wait for it."""

    future: Future[Any]
    waiting: int = 0


class Workers:
    """Threads that work for requests, and a queue that is not longer than it may be.

    All methods are called by the event loop's thread.

    Args:
        threads: that work at a time.
        most: jobs that are worked on or wait.
    """

    def __init__(self, name: str, threads: int, most: int) -> None:
        self._pool = ThreadPoolExecutor(threads, name)
        self._most = most
        self._pending = 0
        self._shared: dict[str, _Job] = {}

    async def run(self, request: Request, function: Callable[[], T], name: str | None = None) -> T:
        """What a function gives.

        Args:
            name: requests for the same name at the same time share one run.

        Raises:
            Unavailable: too much is waiting already.
            Gone: the client left; what has not begun by then is not done.
        """
        loop = asyncio.get_running_loop()
        job = self._shared.get(name) if name is not None else None
        if job is None:
            if self._pending >= self._most:
                raise Unavailable("the server is busy")
            self._pending += 1
            job = _Job(self._pool.submit(function))
            if name is not None:
                self._shared[name] = job
            done = self._done(job, name)
            job.future.add_done_callback(lambda _: loop.call_soon_threadsafe(done))
        job.waiting += 1
        try:
            return await _while_there(request, job.future)
        finally:
            job.waiting -= 1
            if not job.waiting and job.future.cancel() and name is not None:
                self._forget(job, name)

    def _done(self, job: _Job, name: str | None) -> Callable[[], None]:
        def done() -> None:
            self._pending -= 1
            if name is not None:
                self._forget(job, name)

        return done

    def _forget(self, job: _Job, name: str) -> None:
        if self._shared.get(name) is job:
            del self._shared[name]

    def close(self) -> None:
        """Do nothing more but what is being done."""
        self._pool.shutdown(wait=False, cancel_futures=True)


async def _while_there(request: Request, future: Future[T]) -> T:
    """A future's result, unless the client leaves before."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(ready.set))
    waiters = {asyncio.ensure_future(wait) for wait in (ready.wait(), _until_gone(request))}
    try:
        await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for waiter in waiters:
            waiter.cancel()
    if not future.done():
        raise Gone
    return future.result()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
