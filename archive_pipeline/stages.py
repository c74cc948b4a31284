"""Where the seconds of a task go, by stage."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

# "start" is importing libraries and loading the model, once a worker; "encode" and "decode" the
# networks, the former with the allocation of the budget; "entropy" coding or decoding the symbols;
# "write" all the rest.
STAGES = ("start", "read", "detect", "encode", "decode", "entropy", "write")

# Threads that work for a task share its dictionary: asyncio hands its context on to them.
_spent: ContextVar[dict[str, float] | None] = ContextVar("spent", default=None)


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Yield what becomes {stage: seconds} of the stages entered meanwhile."""
    spent: dict[str, float] = {}
    token = _spent.set(spent)
    try:
        yield spent
    finally:
        _spent.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Count the time spent here, but not in stages inside it; also a decorator."""
    spent = _spent.get()
    if spent is None:
        yield
        return
    inside, started = sum(spent.values()), time.perf_counter()
    try:
        yield
    finally:
        elapsed = time.perf_counter() - started - (sum(spent.values()) - inside)
        spent[name] = spent.get(name, 0.0) + elapsed


def summed(spent: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Seconds of several tasks by stage, to the millisecond, in the order of `STAGES`."""
    tasks = list(spent)
    sums = {name: round(sum(task.get(name, 0.0) for task in tasks), 3) for name in STAGES}
    return {name: seconds for name, seconds in sums.items() if seconds}
