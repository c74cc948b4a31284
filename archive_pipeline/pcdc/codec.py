"""Coding of tiles with PyTorch, on any device: what encoder and decoder both compute of a model.

Everything before the entropy coder is float32 and may differ in the last bits between devices;
everything that the entropy *decoder* depends on is integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from archive_pipeline.pcdc.constants import SCALE_COUNT
from archive_pipeline.pcdc.decoding import (
    R,
    Symbols,
    T,
    TileDecoder,
    residuals_from_levels,
)
from archive_pipeline.pcdc.model import Model
from archive_pipeline.pcdc.parallel import each
from archive_pipeline.pcdc.transforms import step_size


class Codec(TileDecoder):
    """Decodes tiles of one model; `encoding` makes them."""

    def __init__(self, model: Model) -> None:
        config = model.networks.config
        super().__init__(model.sha256, model.tables, model.level_tables, config.latents)
        self.model = model
        self.dtype = model.networks.prior.knots.dtype

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`parallel.each` on the model's device."""
        return each(function, items, self.model.device)

    @torch.no_grad()
    def prior_index(self, image_step: int) -> NDArray[np.int64]:
        """Scale indices (Z,) of the channels of hyper-latents, 0..79."""
        index = self.model.networks.prior(torch.tensor([image_step], device=self.model.device))
        return index[0].cpu().numpy().astype(np.int64)

    def scale_index(self, z: NDArray[np.int64], image_step: int) -> NDArray[np.int64]:
        """Scale indices (M, 4 z_h, 4 z_w) of latents, exact, neither shifted nor clamped."""
        device = self.model.device
        index = self.model.networks.h_scale.indices(
            torch.from_numpy(np.ascontiguousarray(z))[None].to(device),
            torch.tensor([image_step], device=device),
        )
        return index[0].cpu().numpy().astype(np.int64)

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
    def _synthesise(self, symbols: Symbols, steps: int, seed: int) -> NDArray[np.uint8]:
        networks, device = self.model.networks, self.model.device
        h, w = symbols.q.shape[1:]
        z = torch.from_numpy(symbols.z)[None].to(device, self.dtype)
        step = torch.tensor([symbols.image_step], device=device)
        mean = networks.h_mean(z, step)[:, :, :h, :w]
        exponent = torch.from_numpy(self.exponents(symbols.image_step, symbols.levels, h, w))
        exponent = exponent.to(device)[None]
        q = torch.from_numpy(symbols.q)[None].to(device, self.dtype)
        y_hat = mean + step_size(exponent).to(self.dtype) * q
        x = networks.g_s(y_hat, exponent)
        if steps:
            from archive_pipeline.pcdc.denoiser import sample  # diffusers takes seconds

            x = sample(self.model.denoiser(), y_hat, exponent, x, steps, seed)
        x = x[0, :, : symbols.height, : symbols.width]
        pixels = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)  # + 127.5, and halves round up
        return pixels.permute(1, 2, 0).contiguous().cpu().numpy()
