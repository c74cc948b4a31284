"""Coding of tiles with PyTorch, on any device: what encoder and decoder both compute of a model.

Everything before the entropy coder is float32 and may differ in the last bits between devices;
everything that the entropy *decoder* depends on is integer arithmetic.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from archive_pipeline.errors import importable
from archive_pipeline.pcdc.constants import SCALE_COUNT
from archive_pipeline.pcdc.decoding import (
    R,
    Symbols,
    T,
    TileDecoder,
    residuals_from_levels,
)
from archive_pipeline.pcdc.model import Model
from archive_pipeline.pcdc.model_files import read
from archive_pipeline.pcdc.parallel import BATCH_PIXELS, each
from archive_pipeline.pcdc.reader.decoder import core_count
from archive_pipeline.pcdc.transforms import step_size

if TYPE_CHECKING:
    from archive_pipeline.pcdc.openvino_analysis import OpenVINOAnalysis


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (1, ...) of tiles as a batch; one alone stays as it lies in memory."""
    return torch.cat([*parts]) if len(parts) > 1 else parts[0]


def _openvino_analysis(model: Model) -> OpenVINOAnalysis:
    from archive_pipeline.pcdc.openvino_analysis import OpenVINOAnalysis

    contents = read(model.files, model.sha256, without=("g_s.", "h_", "prior."))
    g_a = model.networks.g_a
    bfloat16 = next(g_a.net[1].parameters()).dtype == torch.bfloat16
    return OpenVINOAnalysis(g_a, contents.tensors, contents.config, bfloat16, core_count())


class Codec(TileDecoder):
    """Decodes tiles of one model; `encoding` makes them."""

    def __init__(self, model: Model) -> None:
        config = model.networks.config
        super().__init__(model.sha256, model.tables, model.level_tables, config.latents)
        self.model = model
        self.dtype = model.networks.prior.knots.dtype
        self._prior: dict[int, NDArray[np.int64]] = {}  # by image step
        self._analysis: OpenVINOAnalysis | None = None
        self._lock = threading.Lock()
        if model.device.type != "cpu":
            self.batch_pixels = BATCH_PIXELS

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`parallel.each` on the model's device."""
        return each(function, items, self.model.device)

    def to_device(self, arrays: Sequence[NDArray]) -> Tensor:
        """Arrays of one shape as a batch (n, ...) on the model's device."""
        batch = torch.from_numpy(np.stack(arrays))
        if self.model.device.type != "cuda":
            return batch.to(self.model.device)
        return batch.pin_memory().to(self.model.device, non_blocking=True)

    def to_host(self, batch: Tensor) -> NDArray:
        """A batch as an array."""
        if batch.device.type != "cuda":
            return batch.cpu().numpy()
        host = torch.empty_like(batch, device="cpu", pin_memory=True)
        host.copy_(batch, non_blocking=True)
        torch.cuda.current_stream(batch.device).synchronize()
        return host.numpy()

    @torch.no_grad()
    def analyse(self, x: Tensor) -> Tensor:
        """g_a: pixels (N, 3, H, W) in -1..1, sides multiples of 16, to y (N, M, H/16, W/16)."""
        if self.batch_pixels > 1 or x.dtype != torch.float32:
            return self.model.networks.g_a(x)
        with self._lock:
            if self._analysis is None and importable("openvino"):
                self._analysis = _openvino_analysis(self.model)
        return self.model.networks.g_a(x) if self._analysis is None else self._analysis(x)

    @torch.no_grad()
    def prior_index(self, image_step: int) -> NDArray[np.int64]:
        """Scale indices (Z,) of the channels of hyper-latents, 0..79."""
        if image_step not in self._prior:
            index = self.model.networks.prior(torch.tensor([image_step], device=self.model.device))
            self._prior[image_step] = index[0].cpu().numpy().astype(np.int64)
        return self._prior[image_step]

    def scale_indices(
        self, z: Sequence[NDArray[np.int64]], image_steps: Sequence[int]
    ) -> list[NDArray[np.int64]]:
        """Scale indices (M, 4 z_h, 4 z_w) of tiles' latents, exact, neither shifted nor clamped."""
        steps = torch.tensor(image_steps, device=self.model.device)
        return [*self.to_host(self.model.networks.h_scale.indices(self.to_device(z), steps))]

    def level_map_bits(self, levels: NDArray[np.uint8]) -> float:
        """Bits that a tile's levels (B_h, B_w) take in its stream."""
        return float(self.level_table_bits(residuals_from_levels(levels).reshape(-1)).min())

    def level_table_bits(self, residuals: NDArray[np.int64]) -> NDArray[np.float64]:
        """Bits that residuals of levels (n,) take under each of the model's level tables."""
        tables = self.model.tables
        start = tables.start[SCALE_COUNT : SCALE_COUNT + self.model.level_tables]
        bits: NDArray[np.float64] = tables.bits[start[:, None] + residuals].sum(1)
        return bits

    def _prepare(self, steps: int) -> None:
        if steps:
            self.model.denoiser()

    @torch.no_grad()
    def _synthesise(
        self, tiles: Sequence[Symbols], steps: int, seeds: Sequence[int], realism: float
    ) -> list[NDArray[np.uint8]]:
        networks = self.model.networks
        h, w = tiles[0].q.shape[1:]
        z = self.to_device([tile.z for tile in tiles]).to(self.dtype)
        step = torch.tensor([tile.image_step for tile in tiles], device=z.device)
        mean = networks.h_mean(z, step)[:, :, :h, :w]
        exponent = self.to_device([self.exponents(t.image_step, t.levels, h, w) for t in tiles])
        q = self.to_device([tile.q.astype(np.int32) for tile in tiles]).to(self.dtype)
        y_hat = mean + step_size(exponent).to(self.dtype) * q
        x = networks.g_s(y_hat, exponent)
        if steps:
            from archive_pipeline.pcdc.denoiser import sample  # diffusers takes seconds

            kind = self.model.multiplies_in
            with torch.autocast(x.device.type, torch.bfloat16, enabled=kind == torch.bfloat16):
                looks = sample(self.model.denoiser(), y_hat, exponent, x, steps, seeds)
            x = x + realism * (looks - x)
        x = x[:, :, : tiles[0].height, : tiles[0].width]
        if steps:
            self.require_numbers(float(x.abs().max()))
        pixels = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)  # + 127.5, and halves round up
        return [*self.to_host(pixels.permute(0, 2, 3, 1).contiguous())]
