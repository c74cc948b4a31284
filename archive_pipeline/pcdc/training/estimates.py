"""Bits of symbols as training estimates them: of Gaussians, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from archive_pipeline.pcdc.constants import ERROR_WEIGHT

LEAST_SHARE = 2.0**-16


def gaussian_bits(v: Tensor, scale: Tensor) -> Tensor:
    """Bits of integer-binned Gaussian symbols: -log2(Phi((v+.5)/s) - Phi((v-.5)/s))."""
    v = v.abs()
    upper = torch.special.ndtr((0.5 - v) / scale)
    lower = torch.special.ndtr((-0.5 - v) / scale)
    return -torch.log2((upper - lower).clamp_min(LEAST_SHARE))


def cheaper(v: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Symbols q of v, one nearer to zero where that saves more bits than its error is worth."""
    with torch.no_grad():
        lower = q - q.sign()
        saved = gaussian_bits(q, scale) - gaussian_bits(lower, scale)
        lost = ERROR_WEIGHT * ((v - lower).square() - (v - q).square())
        change = torch.where(saved > lost, lower - q, 0)
    return q + change
