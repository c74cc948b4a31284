"""Work on an image's tiles: on a CPU several tiles at once, each by one thread.

Threads that share a tile's convolutions add numbers up in another order, or take another kernel,
than one thread does. So the last bits of latents and pixels would depend on the number of cores.
Other devices take tiles in batches, while threads of the CPU do what is left to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

from archive_pipeline.pcdc.reader.decoder import core_count

T = TypeVar("T")
R = TypeVar("R")

BATCH_PIXELS = 6_000_000
"""Of a batch on other devices than CPUs: 16 tiles of 608 x 608."""
FEEDERS = 8
"""Threads that feed a device, at most."""

# torch's number of threads is in part the process's, in part the calling thread's
_lock = threading.Lock()


def each(function: Callable[[T], R], items: Iterable[T], device: torch.device) -> list[R]:
    """Results of `function` for all items, in order.

    On a CPU as many run at once as torch has threads, each of them with one thread; calls from
    several threads of a process wait for each other, and `function` must not call this again.
    On other devices threads take turns at the device, one working with the CPU while another waits
    for it. The first error is raised.
    """
    if device.type != "cpu":
        with ThreadPoolExecutor(min(core_count(), FEEDERS), "tiles") as pool:
            return list(pool.map(function, items))
    with _lock:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            wanted = list(items)
            if len(wanted) < 2:  # a thread costs more than a small tile
                return [function(item) for item in wanted]
            # threads of its own for each call: kept ones would not survive a fork
            one_thread = partial(torch.set_num_threads, 1)
            with ThreadPoolExecutor(threads, "tiles", one_thread) as pool:
                return list(pool.map(function, wanted))
        finally:
            torch.set_num_threads(threads)
