"""Quantisation, rate and error of the transform codec, as training sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from archive_pipeline.pcdc.constants import HYPER_LIMIT, SCALE_COUNT
from archive_pipeline.pcdc.layers import luma, round_half_up
from archive_pipeline.pcdc.training.estimates import cheaper, gaussian_bits
from archive_pipeline.pcdc.training.judge import UtilityWeights, lpips, similarity
from archive_pipeline.pcdc.transforms import TransformCodec, scale_of, step_size

if TYPE_CHECKING:
    from detector_features import DetectorFeatures

BORDER_WEIGHTS = (9.0, 1.4)  # the outermost pixels, and the seven next to them
SSIM_SCALES = 3
CHROMA_WEIGHT = 0.5  # of what is left of an error without luma's
# of the squared error at half and quarter size beside that at full size
COARSE_WEIGHTS = (0.5, 0.5)
# in the utility's units; at its 0.5, LPIPS lost beside coarse squared errors, which buy bits
LPIPS_WEIGHT = 0.65
DETECTOR_WEIGHT = 0.15  # in the utility's units: as much as LPIPS then takes part


def trained_bits(exact: Tensor, symbols: Tensor, scale: Tensor) -> Tensor:
    """Bits of the symbols that are coded, with a gradient that training can use.

    Scales learn from the symbols as the encoder makes them, or they would be too wide: it rounds
    many down. Rounding tells `exact` nothing, so it learns from uniform noise in its place
    (Ballé et al. 2017).
    """
    real = gaussian_bits(symbols.detach(), scale)
    noisy = gaussian_bits(exact + (torch.rand_like(exact) - 0.5), scale.detach())
    return real + noisy - noisy.detach()


class Latents(NamedTuple):
    """A batch of quantised latents, float32, on the grids of y (h, w) and z (h/4, w/4).

    Attributes:
        z, z_hat: hyper-latents (N, Z, h/4, w/4) and the same rounded.
        mean: predicted means of y (N, M, h, w).
        exponent, step: step exponents, integers, and steps (N, 1, h, w).
        scale: standard deviations of the symbols (N, M, h, w), in steps.
        v, q: (y - mean) / step (N, M, h, w) and the symbols made of it, as the encoder does.
    """

    z: Tensor
    z_hat: Tensor
    mean: Tensor
    exponent: Tensor
    step: Tensor
    scale: Tensor
    v: Tensor
    q: Tensor

    @property
    def y_hat(self) -> Tensor:
        """What the decoder gets (N, M, h, w)."""
        return self.mean + self.step * self.q


def quantise(codec: TransformCodec, x: Tensor, image_step: Tensor, offsets: Tensor) -> Latents:
    """Quantise pixels x (N, 3, H, W) in -1..1 at image steps (N,), gradients passing straight on.

    offsets (N, 1, h, w) are the level offsets of the latents.
    """
    y = codec.g_a(x).float()  # under autocast, only the networks inside work in bfloat16
    z = codec.h_a(y, image_step).float().clamp(-HYPER_LIMIT, HYPER_LIMIT)
    z_hat = round_half_up(z)
    exponent = image_step.view(-1, 1, 1, 1) + offsets
    step = step_size(exponent)
    with torch.autocast(x.device.type, enabled=False):  # its integers need more than 8 bits
        index = codec.h_scale(z_hat, image_step) - offsets
    scale = scale_of(index.clamp(0, SCALE_COUNT - 1))
    mean = codec.h_mean(z_hat, image_step).float()
    v = (y - mean) / step
    return Latents(z, z_hat, mean, exponent, step, scale, v, cheaper(v, round_half_up(v), scale))


def rate_distortion(
    codec: TransformCodec, x: Tensor, image_step: Tensor, offsets: Tensor, *, noise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return bits a sample (N,), reconstruction (N, 3, H, W) in -1..1 and the step map.

    Arguments as for `quantise`. Bits are those of real symbols; with noise=True (training) their
    gradient is that of `trained_bits`.
    """
    latents = quantise(codec, x, image_step, offsets)
    z_scale = scale_of(codec.prior(image_step))[:, :, None, None]

    def coded(exact: Tensor, symbols: Tensor, scale: Tensor) -> Tensor:
        return trained_bits(exact, symbols, scale) if noise else gaussian_bits(symbols, scale)

    y_bits = coded(latents.v, latents.q, latents.scale)
    z_bits = coded(latents.z, latents.z_hat, z_scale)
    bits = y_bits.sum((1, 2, 3)) + z_bits.sum((1, 2, 3))
    return bits, codec.g_s(latents.y_hat, latents.exponent), latents.step


def border_weights(size: int) -> Tensor:
    """Error weights (1, 1, size, size) that make up for a tile's border having neighbours on one
    side only: at the weight of the seven next to them, the outermost pixels keep more error."""
    weight = torch.full((1, 1, size, size), BORDER_WEIGHTS[0])
    weight[..., 1:-1, 1:-1] = BORDER_WEIGHTS[1]
    weight[..., 8:-8, 8:-8] = 1.0
    return weight


def squared_error(x_bar: Tensor, x: Tensor) -> Tensor:
    """Squared errors (N, 3, H, W) of 8-bit pixels, given in -1..1, with less weight on colour.

    Eyes, and judges made after them, see less of it; in RGB it would count as much as luma.
    """
    error = (x_bar - x).mul(127.5)
    grey = luma(error)
    return grey.square() + CHROMA_WEIGHT * (error - grey).square()


def multiscale_squared_error(x_bar: Tensor, x: Tensor) -> Tensor:
    """Squared errors as `squared_error` gives, and beside them those at half and quarter size.

    Who looks at a reduced picture, as photogrammetry and most eyes do, sees low frequencies only.
    A pixel (N, 3, H, W), H and W multiples of 4, also bears the error of the larger ones it is in.
    """
    total = squared_error(x_bar, x)
    for k, weight in enumerate(COARSE_WEIGHTS, 1):
        x_bar, x = F.avg_pool2d(x_bar, 2), F.avg_pool2d(x, 2)
        coarse = F.interpolate(squared_error(x_bar, x), scale_factor=2**k, mode="nearest")
        total = total + weight * coarse
    return total


def structural_error(a: Tensor, b: Tensor) -> Tensor:
    """1 - SSIM of (N, 3, H, W) in -1..1, (N,): its mean at full, half and quarter size.

    At full size alone, fine texture that only many bits could keep would outweigh all else. The
    windows are squares of 8 x 8 every 4 pixels, far cheaper than Gaussian ones at every pixel.
    """
    a, b = a / 2 + 0.5, b / 2 + 0.5
    total = torch.zeros(len(a), device=a.device)
    for scale in range(SSIM_SCALES):
        if scale:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        total = total + 1 - similarity(a, b, lambda x: F.avg_pool2d(x, 8, 4)).mean((1, 2, 3))
    return total / SSIM_SCALES


def perceptual_error(x_bar: Tensor, x: Tensor, seen: DetectorFeatures | None = None) -> Tensor:
    """What is held against x_bar beside its squared error, (N,).

    SSIM and LPIPS as in the utility (equation 5), LPIPS at `LPIPS_WEIGHT`, and how differently a
    detector sees it. In units of squared errors of 8-bit pixels. Both (N, 3, H, W) in -1..1.
    """
    weights = UtilityWeights(lpips=LPIPS_WEIGHT)
    error = weights.ssim * structural_error(x_bar, x) + weights.lpips * lpips(x_bar, x)
    if seen is not None:
        error = error + DETECTOR_WEIGHT * seen.distance(x_bar, x)
    return error * (255**2 / weights.squared_error)
