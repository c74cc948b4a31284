"""The cores of this machine."""

from __future__ import annotations


def cpu_count() -> int:
    """Cores that this process may use, by affinity and container limits."""
    from dask.system import CPU_COUNT

    return int(CPU_COUNT)
