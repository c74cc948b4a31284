"""The decoder on a CPU, without PyTorch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.errors import importable
from archive_pipeline.pcdc.decoding import R, Symbols, T, TileDecoder
from archive_pipeline.pcdc.model_files import (
    ENCODER,
    Contents,
    DenoiserConfig,
    ModelError,
    denoiser_reported,
    read,
    read_denoiser,
    reported,
)
from archive_pipeline.pcdc.precision import Precision, bfloat16_is_fast
from archive_pipeline.pcdc.reader.layers import Array
from archive_pipeline.pcdc.reader.scales import Prior, ScaleNetwork
from archive_pipeline.pcdc.reader.synthesis import (
    HyperMean,
    Synthesis,
    Trunk,
    latents,
    numpy_trunk,
    to_pixels,
    with_exponents,
)

# latents with exponents, what g_s makes of them, steps and seed to pixels -1..1
Denoiser = Callable[[Array, Array, int, int], Array]

# how many threads a matrix product of NumPy's takes is the process's
_lock = threading.Lock()


class Reader(TileDecoder):
    """Decodes tiles of one model.

    The large layers are run by OpenVINO where it is installed, else by NumPy: the same pixels but
    for some that differ by one level. Denoising steps need OpenVINO.
    """

    def __init__(
        self, files: dict[str, bytes], precision: Precision = "auto", sha256: str | None = None
    ) -> None:
        """Build the decoder from a model's files.

        Args:
            precision: of the large layers, see `pcdc.precision`; NumPy multiplies in float32.
            sha256: the model's, where it is known.

        Raises:
            ModelError: the files are damaged or of an unknown kind.
        """
        contents = read(files, sha256, without=ENCODER)
        config, tensors = contents.config, contents.tensors
        super().__init__(contents.sha256, contents.tables, contents.level_tables, config.latents)
        self._files, self._sha256, self._precision = files, contents.sha256, precision
        self._denoiser: Denoiser | None = None
        self._failure: str | None = None
        self._loading = threading.Lock()
        with reported(contents.sha256):
            self._prior = Prior(tensors, config.hyper_latents)
            self._scales = ScaleNetwork(tensors, config)
            self._mean = HyperMean(tensors, config)
            self._g_s = Synthesis(tensors, config, _trunk(contents, precision))

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Results of a function for all items, in order.

        As many run at once as `thread_count` says, each by one thread: threads that share a matrix
        product might add numbers up in another order. The first error is raised.
        """
        todo = list(items)
        threads = min(thread_count(), len(todo))
        with _lock, _one_thread_a_product():
            if threads < 2:
                return [function(item) for item in todo]
            # threads of its own for each call: kept ones would not survive a fork
            with ThreadPoolExecutor(threads, "tiles") as pool:
                return list(pool.map(function, todo))

    def prior_index(self, image_step: int) -> NDArray[np.int64]:
        """Scale indices (Z,) of the channels of hyper-latents, 0..79."""
        return self._prior.index(image_step)

    def scale_indices(
        self, z: Sequence[NDArray[np.int64]], image_steps: Sequence[int]
    ) -> list[NDArray[np.int64]]:
        """Scale indices (M, 4 z_h, 4 z_w) of tiles' latents, exact, neither shifted nor clamped."""
        return [self._scales.index(one, step) for one, step in zip(z, image_steps, strict=True)]

    def _prepare(self, steps: int) -> None:
        if not steps or self._denoiser is not None:
            return
        with self._loading:
            if self._failure is not None:  # or every tile would read it once more
                raise ModelError(self._failure)
            if self._denoiser is None:
                try:
                    config, tensors = read_denoiser(self._files, self._latents, self._sha256)
                    with denoiser_reported(self._sha256):
                        self._denoiser = _denoiser(config, tensors, self._precision)
                except ModelError as error:
                    self._failure = str(error)
                    raise

    def _synthesise(
        self, tiles: Sequence[Symbols], steps: int, seeds: Sequence[int], realism: float
    ) -> list[NDArray[np.uint8]]:
        return [
            self._pixels(tile, steps, seed, realism)
            for tile, seed in zip(tiles, seeds, strict=True)
        ]

    def _pixels(self, symbols: Symbols, steps: int, seed: int, realism: float) -> NDArray[np.uint8]:
        h, w = symbols.q.shape[1:]
        mean = self._mean(symbols.z, symbols.image_step)[:h, :w]
        exponent = self.exponents(symbols.image_step, symbols.levels, h, w)
        plane = exponent[0, ..., None].astype(np.float32)
        y = latents(mean, plane, symbols.q)
        x = self._g_s(y, plane)
        if steps and self._denoiser is not None:
            with np.errstate(over="ignore", invalid="ignore"):  # told below
                looks = self._denoiser(with_exponents(y, plane), x, steps, seed)
                x = x + np.float32(realism) * (looks - x)
            self.require_numbers(float(np.abs(x).max()))
        return to_pixels(x, symbols.height, symbols.width)


def thread_count() -> int:
    """Threads that decode at once: $OMP_NUM_THREADS, or one a core that the process may use."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdecimal() and int(said):
        return int(said)
    return core_count()


def core_count() -> int:
    """Cores that this process may use, by affinity."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _trunk(contents: Contents, precision: Precision) -> Trunk:
    if not importable("openvino"):
        return numpy_trunk(contents.tensors, contents.config)
    from archive_pipeline.pcdc.reader.openvino_trunk import OpenVINOTrunk

    return OpenVINOTrunk(contents.tensors, contents.config, _in_bfloat16(precision), thread_count())


def _denoiser(config: DenoiserConfig, tensors: dict[str, Array], precision: Precision) -> Denoiser:
    from archive_pipeline.pcdc.reader.openvino_denoiser import OpenVINODenoiser

    return OpenVINODenoiser(config, tensors, _in_bfloat16(precision), thread_count())


def _in_bfloat16(precision: Precision) -> bool:
    return precision == "bfloat16" or (precision == "auto" and bfloat16_is_fast())


def _one_thread_a_product() -> AbstractContextManager[Any]:
    """Within it, NumPy multiplies matrices by the calling thread alone."""
    limited: AbstractContextManager[Any] = _libraries().limit(limits=1, user_api="blas")
    return limited


@cache
def _libraries() -> Any:
    """What multiplies matrices in this process."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
