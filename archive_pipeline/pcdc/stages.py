"""Where the seconds of a task go, by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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
