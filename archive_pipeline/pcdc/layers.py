"""Building blocks of the transforms: float blocks for pixels, exact integer ones for scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def zero(layer: nn.Module) -> None:
    """Set all parameters of a layer to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _sum(x: Tensor, branch: Tensor) -> Tensor:
    """x and a branch of it, in the precision of x; into x itself where no gradient needs it."""
    return x + branch if torch.is_grad_enabled() else x.add_(branch)


class DepthConvBlock(nn.Module):
    """Residual depthwise 3x3 and feed-forward pair, cheap on CPUs at 1/8 and 1/16 resolution.

    Maps (N, C, H, W) float to the same shape. The layout follows DCVC-RT's depthwise
    convolution block (Jia et al., CVPR 2025).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = nn.Sequential(
            nn.Conv2d(channels, channels, 1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.Conv2d(channels, channels, 1),
        )
        self.mix = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(2 * channels, channels, 1),
        )
        self.become_identity()  # for `klt_start`

    def become_identity(self) -> None:
        """Set the last layers of both branches to zero."""
        for branch in (self.spatial, self.mix):
            zero(branch[-1])

    def forward(self, x: Tensor) -> Tensor:
        kind = next(self.mix.parameters()).dtype
        x = _sum(x, self.spatial(x.to(kind)))
        return _sum(x, self.mix(x.to(kind)))


def blocks(channels: int, count: int) -> list[nn.Module]:
    """Return `count` `DepthConvBlock`s of one width."""
    return [DepthConvBlock(channels) for _ in range(count)]


class MixedSequential(nn.Sequential):
    """Layers one after another; each may have weights of less precision than what is between."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                x = layer(x.to(layer.weight.dtype)).to(x.dtype)
            else:
                x = layer(x)
        return x


def round_half_up(x: Tensor) -> Tensor:
    """Round to nearest, halves upwards, with the gradient of the identity."""
    return x + (torch.floor(x.detach() + 0.5) - x.detach())


class IntegerConv2d(nn.Module):
    """A convolution whose arithmetic is exact integer arithmetic on every device.

    Weights are multiples of 2^-8 with at most 11 bits, activations multiples of 2^-4 with 12
    bits, so every partial sum is an integer far below 2^53 and the float64 matrix products of
    `integer_forward` are exact whatever order a device adds them in. `forward` is the same map
    with straight-through gradients in float32, for training.

    Args:
        cin, cout: channels.
        kernel: odd kernel size; the border is zero-padded.
        shift: right shift of the sum. 8 keeps the activations' scale 2^-4; 12 makes the output
            plain integers, and less than 12 multiplies these by a gain.
        ceiling: outputs are clamped to the integers 0..ceiling.
    """

    WEIGHT_BITS = 8
    ACTIVATION_BITS = 4
    WEIGHT_LIMIT = 1023

    def __init__(
        self, cin: int, cout: int, kernel: int = 1, *, shift: int = 8, ceiling: int = 4095
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cout, cin, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(cout))
        if not self.weight.is_meta:  # a model about to be loaded: drawing would be wasted
            nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        self.shift = shift
        self.ceiling = ceiling
        self._exact: tuple[Tensor, Tensor] | None = None

    def _integers(self) -> tuple[Tensor, Tensor]:
        weight = round_half_up(self.weight * 2**self.WEIGHT_BITS)
        bias = round_half_up(self.bias * 2 ** (self.WEIGHT_BITS + self.ACTIVATION_BITS))
        return weight.clamp(-self.WEIGHT_LIMIT, self.WEIGHT_LIMIT), bias

    def forward(self, x: Tensor) -> Tensor:
        """Training path: (N, cin, H, W) integers in float32 to (N, cout, H, W) likewise."""
        weight, bias = self._integers()
        pad = self.weight.shape[-1] // 2
        total = F.conv2d(x, weight / 2**self.shift, bias / 2**self.shift, padding=pad)
        return round_half_up(total).clamp(0, self.ceiling)

    def integer_forward(self, x: Tensor) -> Tensor:
        """Coding path: (N, cin, H, W) float64 holding integers, to (N, cout, H, W) likewise.

        One matrix product over the shifted inputs of a kernel: no convolution algorithm
        (Winograd, FFT) that leaves the integers can be chosen behind our back.
        """
        if self._exact is None or self._exact[0].device != x.device:
            weight, bias = (t.detach().to(x.device, torch.float64) for t in self._integers())
            self._exact = weight.permute(0, 2, 3, 1).flatten(1).contiguous(), bias.view(-1, 1)
        weight, bias = self._exact
        n, _, height, width = x.shape
        k = self.weight.shape[-1]
        padded = F.pad(x, [k // 2] * 4)
        shifted = [padded[:, :, i : i + height, j : j + width] for i in range(k) for j in range(k)]
        total = weight @ torch.cat(shifted, 1).view(n, -1, height * width) + bias
        total = torch.floor((total + 2 ** (self.shift - 1)) / 2**self.shift)
        return total.clamp(0, self.ceiling).view(n, -1, height, width)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._exact = None
        super()._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> IntegerConv2d:
        self._exact = None  # weights may be about to change
        return super().train(mode)
