"""The cores of this machine."""

from __future__ import annotations

import os


def cpu_count() -> int:
    """Cores that this process may use, by affinity and container limits."""
    try:
        from dask.system import CPU_COUNT
    except ModuleNotFoundError:  # an install that only reads
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    return int(CPU_COUNT)
