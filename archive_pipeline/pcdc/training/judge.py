"""Utility of a reconstruction, equation (5) of the paper, and where in the picture it is lost.

    U = -lambda_p MSE - lambda_s (1 - SSIM) - lambda_l LPIPS - lambda_t T

T, which the paper does not have, is what a task loses: `Task`. Every term is a mean over pixels, so
it is the mean of a map of blocks, and a block's decision can be credited with what happened around
it. DISTS, the paper's fourth term, has no public weights that this package could bring along; its
weight is left out.

Imports torchmetrics and needs torchvision's SqueezeNet weights: import it only where the decoder's
output is judged, in training and for `--adapt`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.pcdc.constants import BLOCK_SIDE

# What a task loses in a reconstruction uint8 (H, W, 3) of a tile around each block, (B_h, B_w).
Task = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

SSIM_SIGMA = 1.5
SSIM_RADIUS = 5
SSIM_CONSTANTS = (0.01**2, 0.03**2)  # of a range of one


class UtilityError(ArchivePipelineError, RuntimeError):
    """What judges reconstructions cannot be had."""


@dataclass(frozen=True)
class UtilityWeights:
    """Weights of equation (5).

    The paper has lambda_p = 1 and leaves the units of D open. Of pixels in 0..1 squared errors
    would count for nothing next to the other terms. At 100, on training images, they are hardly
    larger than with all blocks alike, and most of what structure and likeness gain is kept.
    Of a trained codec's loss of utility at middle rates LPIPS at 0.5 makes up about a quarter. At
    0.2 it was an eighth, and a little of the other terms would have bought much of it. On blocks
    with vehicles at middle rates, a level finer then saves about three times as much of what a
    detector loses as of all other terms, so bits there are worth about four times as much: what
    makes two levels of difference. Without a task, or with a weight of 0 for it, the utility is the
    paper's.
    """

    squared_error: float = 100.0
    ssim: float = 0.5
    lpips: float = 0.5
    task: float = 20.0

    def of(self, terms: Tensor) -> Tensor:
        """-U of squared error, 1 - SSIM, LPIPS and T (..., 4, B_h, B_w); (..., B_h, B_w)."""
        weights = torch.tensor([self.squared_error, self.ssim, self.lpips, self.task])
        return (terms * weights.to(terms)[:, None, None]).sum(-3)


@cache
def _lpips() -> Any:
    try:
        from torchmetrics.functional.image.lpips import _LPIPS
    except ImportError as error:
        raise UtilityError(
            "LPIPS needs torchmetrics and torchvision: pip install 'archive-pipeline[train]'"
        ) from error
    try:
        network = _LPIPS(pretrained=True, net="squeeze", use_dropout=True)
    except OSError as error:
        raise UtilityError(
            "LPIPS needs torchvision's weights of SqueezeNet 1.1, which are neither at hand nor "
            f"to be downloaded: {error}"
        ) from error
    return network.eval().requires_grad_(False)


def require_lpips() -> None:
    """Load LPIPS.

    Raises:
        UtilityError: its weights, or the packages it needs, cannot be had.
    """
    _lpips()


def perceptual_layers(x: Tensor) -> list[Tensor]:
    """What SqueezeNet makes of (N, 3, H, W) in -1..1 in the seven layers that LPIPS looks at.

    Raises:
        UtilityError: its weights, or the packages it needs, cannot be had.
    """
    network = _lpips().to(x.device)
    return list(network.net(network.scaling_layer(x)))


def _features(layers: list[Tensor]) -> list[Tensor]:
    """LPIPS' features: what the layers hold, of unit length at every place."""
    return [F.normalize(f, dim=1, eps=1e-8) for f in layers]


def _distances(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """LPIPS' weighted distances of features, a map (N, 1, h, w) for each layer."""
    lines = _lpips().lins
    return [line((x - y).square()) for line, x, y in zip(lines, a, b, strict=True)]


def lpips(a: Tensor, b: Tensor) -> Tensor:
    """LPIPS (Zhang et al. 2018, SqueezeNet) of (N, 3, H, W) in -1..1, (N,); differentiable in both.

    Raises:
        UtilityError: its weights, or the packages it needs, cannot be had.
    """
    return lpips_of(perceptual_layers(a), perceptual_layers(b))


def lpips_of(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """LPIPS of pictures by their `perceptual_layers`, (N,)."""
    maps = _distances(_features(a), _features(b))
    return torch.stack([distance.mean((1, 2, 3)) for distance in maps]).sum(0)


def _pool(values: Tensor, blocks: tuple[int, int]) -> Tensor:
    return F.adaptive_avg_pool2d(values, blocks)


def similarity(a: Tensor, b: Tensor, window: Callable[[Tensor], Tensor]) -> Tensor:
    """SSIM of a and b in 0..1 with the local means that `window` makes, of its result's shape."""
    mean_a, mean_b = window(a), window(b)
    var_a = window(a * a) - mean_a.square()
    var_b = window(b * b) - mean_b.square()
    covariance = window(a * b) - mean_a * mean_b
    c1, c2 = SSIM_CONSTANTS
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return likeness / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2))


def _ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004) at every pixel of (N, 3, H, W) in 0..1; (N, 1, H, W)."""
    at = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, device=a.device, dtype=a.dtype)
    line = torch.exp(-at.square() / (2 * SSIM_SIGMA**2))
    line = (line / line.sum()).view(1, 1, 1, -1)

    def blur(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = F.pad(x, (SSIM_RADIUS,) * 4, mode="reflect").view(n * c, 1, h + 10, w + 10)
        return F.conv2d(F.conv2d(x, line), line.transpose(2, 3)).view(n, c, h, w)

    return similarity(a, b, blur).mean(1, keepdim=True)


class Judge:
    """Compares reconstructions with one original.

    Args:
        original: (1, 3, H, W) float in -1..1, sides of at least 32 pixels.
        task: what is done with the picture; nothing is lost without one.

    Raises:
        UtilityError: LPIPS' weights cannot be had.
    """

    def __init__(
        self, original: Tensor, weights: UtilityWeights | None = None, task: Task | None = None
    ) -> None:
        self.original = original
        self.weights = weights or UtilityWeights()
        self.task = task
        self.blocks = (-(-original.shape[2] // BLOCK_SIDE), -(-original.shape[3] // BLOCK_SIDE))
        with torch.no_grad():
            self._reference = _features(perceptual_layers(original))

    @torch.no_grad()
    def terms(self, reconstruction: Tensor) -> Tensor:
        """Squared error, 1 - SSIM, LPIPS and T around each block, (4, B_h, B_w).

        Args:
            reconstruction: (1, 3, H, W) float in -1..1.
        """
        a, b = self.original / 2 + 0.5, reconstruction / 2 + 0.5
        error = _pool((a - b).square().mean(1, keepdim=True), self.blocks)
        structure = _pool(1 - _ssim_map(a, b), self.blocks)
        perceived = torch.zeros_like(error)
        for distance in _distances(self._reference, _features(perceptual_layers(reconstruction))):
            perceived += _pool(distance, self.blocks)
        lost = torch.zeros_like(error)
        if self.task is not None:
            pixels = reconstruction[0].add(1).mul(127.5).round().clamp(0, 255).byte()
            found = self.task(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
            lost[0, 0] = torch.from_numpy(found)
        return torch.cat([error, structure, perceived, lost], 1)[0]

    def loss(self, reconstruction: Tensor) -> Tensor:
        """-U around each block, (B_h, B_w); its mean is the image's."""
        return self.weights.of(self.terms(reconstruction))
