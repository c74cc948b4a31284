"""Building blocks of the transforms: float blocks for pixels, exact integer ones for scales."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archive_pipeline.pcdc.constants import (
    ACTIVATION_BITS,
    ACTIVATION_LIMIT,
    LUMA,
    WEIGHT_BITS,
    WEIGHT_LIMIT,
)


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


def luma(x: Tensor) -> Tensor:
    """Luma (N, 1, H, W) of red, green and blue (N, 3, H, W)."""
    return (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def round_half_up(x: Tensor) -> Tensor:
    """Round to nearest, halves upwards, with the gradient of the identity."""
    return x + (torch.floor(x.detach() + 0.5) - x.detach())


class _Matrix(NamedTuple):
    """An integer convolution as a matrix product, divided by 2^shift, which rounds nothing.

    Attributes:
        weight: (cout, kernel^2 cin).
        bias: (cout, 1), with the half that rounds.
        probe: (kernel^2 cin,) a column whose product is known.
        probed: (cout,) its product, and the bias.
        gain, offset: |sum| <= gain * |activations| + offset, before the division.
    """

    weight: Tensor
    bias: Tensor
    probe: Tensor
    probed: Tensor
    gain: float
    offset: float


class IntegerConv2d(nn.Module):
    """A convolution whose arithmetic is exact integer arithmetic on every device.

    Weights are multiples of 2^-8 with at most 11 bits, activations multiples of 2^-4 with 12
    bits, so every partial sum is an integer: far below 2^53, so that float64 holds it, and with
    trained weights below 2^24, so that float32 does. Then `integer_forward` is exact in whatever
    order a device adds. `forward` is the same map with straight-through gradients in float32, for
    training.

    Args:
        cin, cout: channels.
        kernel: odd kernel size; the border is zero-padded.
        shift: right shift of the sum. 8 keeps the activations' scale 2^-4; 12 makes the output
            plain integers, and less than 12 multiplies these by a gain.
        ceiling: outputs are clamped to the integers 0..ceiling.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int = 1,
        *,
        shift: int = WEIGHT_BITS,
        ceiling: int = ACTIVATION_LIMIT,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cout, cin, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(cout))
        if not self.weight.is_meta:  # a model about to be loaded: drawing would be wasted
            nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        self.shift = shift
        self.ceiling = ceiling
        self._matrices: dict[tuple[torch.device, torch.dtype], _Matrix] = {}

    def _integers(self) -> tuple[Tensor, Tensor]:
        weight = round_half_up(self.weight * 2**WEIGHT_BITS)
        bias = round_half_up(self.bias * 2 ** (WEIGHT_BITS + ACTIVATION_BITS))
        return weight.clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT), bias

    def forward(self, x: Tensor) -> Tensor:
        """Training path: (N, cin, H, W) integers in float32 to (N, cout, H, W) likewise."""
        weight, bias = self._integers()
        pad = self.weight.shape[-1] // 2
        total = F.conv2d(x, weight / 2**self.shift, bias / 2**self.shift, padding=pad)
        return round_half_up(total).clamp(0, self.ceiling)

    def integer_forward(self, x: Tensor) -> Tensor:
        """Coding path: (N, cin, H, W) floats holding integers, to (N, cout, H, W) likewise.

        On CPUs float32 multiplies where its 24 bits hold every partial sum, else float64. What
        comes out is the same integers.
        """
        if x.device.type == "cpu":
            matrix = self._matrix(x.device, torch.float32)
            largest = max(float(-x.amin()), float(x.amax()))
            if matrix.gain * largest + matrix.offset <= 2**24:
                out, exact = self._multiply(x.float(), matrix)
                if exact:
                    return out
        return self._multiply(x.double(), self._matrix(x.device, torch.float64))[0]

    def _multiply(self, x: Tensor, matrix: _Matrix) -> tuple[Tensor, bool]:
        """Outputs, and whether the matrix product was exact.

        One product over the shifted inputs of a kernel: no convolution algorithm (Winograd, FFT)
        that leaves the integers can be chosen behind our back. Libraries can be told to multiply
        float32 as TF32 or bfloat16: they would round the largest activation, which the last
        column holds.
        """
        n, cin, height, width = x.shape
        k = self.weight.shape[-1]
        padded = F.pad(x, [k // 2] * 4) if k > 1 else x
        columns = x.new_empty(n, k * k * cin, height * width + 1)
        columns[..., -1] = matrix.probe
        places = columns[..., :-1].unflatten(-1, (height, width)).unflatten(1, (k * k, cin))
        for at in range(k * k):
            i, j = divmod(at, k)
            places[:, at] = padded[:, :, i : i + height, j : j + width]
        total = torch.bmm(matrix.weight.expand(n, -1, -1), columns).add_(matrix.bias)
        exact = bool((total[..., -1] == matrix.probed).all())
        out = total[..., :-1].floor_().clamp_(0, self.ceiling)
        return out.unflatten(-1, (height, width)), exact

    def _matrix(self, device: torch.device, kind: torch.dtype) -> _Matrix:
        """The layer as a matrix on a device, computed once."""
        if (device, kind) not in self._matrices:
            weight, bias = (t.detach().to(device, torch.float64) for t in self._integers())
            weight = weight.permute(0, 2, 3, 1).flatten(1)
            bias = bias + 2 ** (self.shift - 1)
            probe = torch.zeros_like(weight[0])
            at = int(weight.abs().sum(0).argmax())
            probe[at] = ACTIVATION_LIMIT
            scaled = weight / 2**self.shift, bias / 2**self.shift
            self._matrices[device, kind] = _Matrix(
                scaled[0].to(kind).contiguous(),
                scaled[1].to(kind)[:, None],
                probe.to(kind),
                (scaled[0][:, at] * ACTIVATION_LIMIT + scaled[1]).to(kind),
                float(weight.abs().sum(1).max()),
                float(bias.abs().max()),
            )
        return self._matrices[device, kind]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._matrices = {}
        super()._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> IntegerConv2d:
        self._matrices = {}  # weights may be about to change
        return super().train(mode)
