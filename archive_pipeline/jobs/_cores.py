"""The cores of this machine."""

from __future__ import annotations


def cpu_count() -> int:
    """Cores that this process may use, by affinity and container limits."""
    try:
        from dask.system import CPU_COUNT
    except ModuleNotFoundError:  # an install that only reads
        from archive_pipeline.pcdc.reader.decoder import core_count

        return core_count()
    return int(CPU_COUNT)
