"""What the denoiser is trained for: the texture of the original rather than its pixels.

Wasserstein distortion (Qiu et al. 2023; as the loss of a codec with noise for its decoder, Ballé et
al. 2024, arXiv 2412.00505): features of both pictures are compared by their means and standard
deviations in windows around each place. In a window of one place that is a squared distance of
features; in larger ones, of two pictures of the same texture, it is nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transform_loss import structural_error

from archive_pipeline.pcdc.training.judge import lpips_of, perceptual_layers

WINDOW = 16  # pixels a side; features of coarser grids have windows of as many pixels
LEAST_VARIANCE = 1e-6  # gradients of roots stay finite
FLAT = 1e-2  # of the mean variance of a layer's channels: what hardly ever varies counts little
CODED, GENERATED = 28, 38  # image steps up to which detail is coded, and from which it cannot be
SQUARED_ERROR = (0.003, 0.0002)  # weights where detail is coded and where it cannot be
SYSTEMATIC_ERROR = (0.0, 0.006)
LOW_SQUARED_ERROR = (0.0, 0.01)  # at a quarter of the size
STRUCTURE = (1.0, 0.0)
LIKENESS = (1.0, 1.1)  # LPIPS
TEXTURE = (0.0, 8.0)
LAYERS = 2  # of SqueezeNet beside the pixels: deeper ones see things rather than texture


def moments(features: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of (N, C, h, w) in windows, every half of one."""
    if window == 1:
        return features, torch.zeros_like(features)

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, window, max(1, window // 2), ceil_mode=True)

    first = mean(features)
    variance = mean(features.square()) - first.square()
    return first, (variance.clamp(min=0) + LEAST_VARIANCE).sqrt()


def texture_distance(a: list[Tensor], b: list[Tensor], side: int) -> Tensor:
    """Wasserstein distortion of pictures, (N,), mean over layers.

    Args:
        a, b: layers (N, C, h, w) of both, `b` of the original, in whose variance units are.
        side: pixels a side of the pictures.
    """
    total = a[0].new_zeros(len(a[0]))
    for x, y in zip(a, b, strict=True):
        window = max(1, round(WINDOW * y.shape[3] / side))
        variance = y.var((0, 2, 3), keepdim=True)
        unit = variance + FLAT * variance.mean() + LEAST_VARIANCE
        (m, s), (n, t) = moments(x, window), moments(y, window)
        total = total + (((m - n).square() + (s - t).square()) / unit).mean((1, 2, 3))
    return total / len(a)


def realism_loss(x_0: Tensor, x: Tensor, image_step: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Loss of each sample, its LPIPS and its texture distance, all (N,).

    Statistics of features are as good in a pattern as in grain. So what two predictions from
    different noise have wrong alike weighs more than what only one has wrong: detail that nobody
    knows shall come from the noise.

    Args:
        x_0: predicted pictures (N, 3, H, W) in -1..1, H and W multiples of 4; the second half are
            those of the first half again, from other noise.
        x: the originals.
        image_step: (N,), which decides between coded and generated detail.
        weight: of squared errors, see `transform_loss.border_weights`.

    Raises:
        UtilityError: SqueezeNet's weights, or the packages it needs, cannot be had.
    """
    share = ((image_step - CODED) / (GENERATED - CODED)).clamp(0, 1)

    def between(ends: tuple[float, float]) -> Tensor:
        return ends[0] + share * (ends[1] - ends[0])

    def squared(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).mul(127.5).square()

    with torch.no_grad():
        wanted = perceptual_layers(x)
    seen = perceptual_layers(x_0.clamp(-1, 1))
    likeness = lpips_of(seen, wanted)
    texture = texture_distance([x_0, *seen[:LAYERS]], [x, *wanted[:LAYERS]], x.shape[3])
    first, second = (x_0 - x).mul(127.5).chunk(2)
    systematic = (first * second * weight).mean((1, 2, 3)).repeat(2)
    low = squared(F.avg_pool2d(x_0, 4), F.avg_pool2d(x, 4)).mean((1, 2, 3))
    loss = (
        between(LIKENESS) * likeness
        + between(TEXTURE) * texture
        + between(STRUCTURE) * structural_error(x_0, x)
        + between(SQUARED_ERROR) * (squared(x_0, x) * weight).mean((1, 2, 3))
        + between(SYSTEMATIC_ERROR) * systematic
        + between(LOW_SQUARED_ERROR) * low
    )
    return loss, likeness, texture
