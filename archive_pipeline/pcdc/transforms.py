"""The transform codec: analysis, synthesis and hyperprior networks.

Data flow (names as in Ballé et al. 2018; shapes for an image of height H and width W)::

    x (3,H,W) --g_a--> y (M,H/16,W/16) --------------- quantise with step --> q --+
                       |                                     ^   ^                |
                      h_a <-- image step g              mean |   | scale index    |
                       |                                     |   |                |
                       z (Z,H/64,W/64) --round--> z_hat --h_mean, h_scale         |
                                                   ^ image step g                 |
    x_bar (3,H,W) <--g_s-- y_hat = mean + step * q, log2(step) <------------------+

g_a and g_s are deep networks beside a shortcut, a linear transform of blocks of 16 x 16 pixels. The
networks are narrower than y: the shortcut carries the fine detail that only high rates can afford.

`h_scale` is an integer network: what the entropy decoder depends on is computed exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archive_pipeline.pcdc.constants import (
    BLOCK,
    FINEST_STEP,
    LAST_SCALE_CEILING,
    LAST_SCALE_SHIFT,
    LATENT_GAIN,
    MAX_EXPONENT,
    PRIOR_GAIN,
    PRIOR_KNOTS,
    SCALE_COUNT,
    SCALE_ZERO,
    STEPS_PER_OCTAVE,
    STRIDE,
)
from archive_pipeline.pcdc.layers import (
    IntegerConv2d,
    MixedSequential,
    blocks,
    round_half_up,
    zero,
)
from archive_pipeline.pcdc.model_files import TransformConfig

BLOCK_SAMPLES = 3 * STRIDE**2  # of the pixels behind a latent


def step_size(exponent: Tensor) -> Tensor:
    """Quantisation step of integer step exponents 0..63 (same shape, float32)."""
    return FINEST_STEP * torch.exp2(exponent.float() / STEPS_PER_OCTAVE)


def scale_of(index: Tensor) -> Tensor:
    """Standard deviation, in quantisation steps, of (possibly fractional) scale indices."""
    return torch.exp2((index - SCALE_ZERO) / STEPS_PER_OCTAVE)


def pad_to(x: Tensor, multiple: int) -> Tensor:
    """Replicate the lower and right border of (N, C, H, W) up to a multiple of `multiple`."""
    bottom, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x


def _with_plane(x: Tensor, value: Tensor) -> Tensor:
    """Append one constant plane a sample: (N, C, H, W) and (N,) to (N, C+1, H, W)."""
    plane = value.to(x.dtype).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[-2:])
    return torch.cat([x, plane], 1)


def _shortcut(samples: int, out: int) -> nn.Conv2d:
    """A linear transform of each latent's block; it starts as nothing."""
    layer = nn.Conv2d(samples, out, 1)
    zero(layer)
    return layer


class Analysis(nn.Module):
    """g_a: pixels (N, 3, H, W) in -1..1, H and W multiples of 16, to y (N, M, H/16, W/16)."""

    def __init__(self, c: TransformConfig) -> None:
        super().__init__()
        self.net = MixedSequential(
            nn.PixelUnshuffle(8),
            # outside the image, cells repeat: grey ones would look like an edge
            nn.Conv2d(
                192, c.width_8, c.edge_kernel, padding=c.edge_kernel // 2, padding_mode="replicate"
            ),
            *blocks(c.width_8, c.depth_8),
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * c.width_8, c.width_16, 1),
            *blocks(c.width_16, c.depth_16 + c.extra_depth_16),
            nn.Conv2d(c.width_16, c.latents, 1),
        )
        self.shortcut = _shortcut(BLOCK_SAMPLES, c.latents) if c.shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        if self.shortcut is not None:
            y = y + self.shortcut(F.pixel_unshuffle(x, STRIDE))
        return y * LATENT_GAIN


class Synthesis(nn.Module):
    """g_s: y_hat (N, M, h, w) and step exponents (N, 1, h, w) to pixels (N, 3, 16h, 16w)."""

    def __init__(self, c: TransformConfig) -> None:
        super().__init__()
        self.net = MixedSequential(
            nn.Conv2d(c.latents + 1, c.width_16, 1),
            *blocks(c.width_16, c.depth_16),
            nn.Conv2d(c.width_16, 4 * c.width_8, 1),
            nn.PixelShuffle(2),
            *blocks(c.width_8, c.depth_8),
            nn.Conv2d(c.width_8, 192, c.edge_kernel, padding=c.edge_kernel // 2),
            nn.PixelShuffle(8),
        )
        self.shortcut = _shortcut(c.latents, BLOCK_SAMPLES) if c.shortcut else None

    def forward(self, y_hat: Tensor, exponent: Tensor) -> Tensor:
        y_hat = y_hat / LATENT_GAIN
        x = self.net(torch.cat([y_hat, exponent.to(y_hat.dtype) / MAX_EXPONENT], 1))
        if self.shortcut is not None:
            x = x + F.pixel_shuffle(self.shortcut(y_hat), STRIDE)
        return x


class HyperAnalysis(nn.Module):
    """h_a: y (N, M, h, w), h and w multiples of 4, and image steps (N,) to z (N, Z, h/4, w/4)."""

    def __init__(self, c: TransformConfig) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(c.latents + 1, c.width_8, 1),
            *blocks(c.width_8, 1),
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * c.width_8, c.width_8, 1),
            *blocks(c.width_8, 1),
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * c.width_8, c.hyper_latents, 1),
        )

    def forward(self, y: Tensor, image_step: Tensor) -> Tensor:
        return self.net(_with_plane(y / LATENT_GAIN, image_step / MAX_EXPONENT)) * 4


class HyperMean(nn.Module):
    """h_mean: z_hat (N, Z, h/4, w/4) and image steps (N,) to means (N, M, h, w)."""

    def __init__(self, c: TransformConfig) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(c.hyper_latents + 1, c.width_8, 1),
            nn.Conv2d(c.width_8, 4 * c.width_8, 1),
            nn.PixelShuffle(2),
            *blocks(c.width_8, 1),
            nn.Conv2d(c.width_8, 4 * c.width_8, 1),
            nn.PixelShuffle(2),
            *blocks(c.width_8, 1),
            nn.Conv2d(c.width_8, c.latents, 1),
        )
        zero(self.net[-1])

    def forward(self, z_hat: Tensor, image_step: Tensor) -> Tensor:
        return self.net(_with_plane(z_hat / 4, image_step / MAX_EXPONENT)) * LATENT_GAIN


class HyperScale(nn.Module):
    """h_scale: z_hat and image step to scale indices, in exact integer arithmetic.

    Output (N, M, h, w) integers -63..255: `scale_of(index)` is the standard deviation of
    (y - mean) / step(g), g being the image step. The network predicts the scale of y itself and
    g is subtracted, since steps and scales share one spacing; likewise a block at level offset
    delta is coded with index - delta. What is coded is clamped to the tables 0..79.
    """

    def __init__(self, c: TransformConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                IntegerConv2d(c.hyper_latents + 1, 192, 3),
                IntegerConv2d(192, 256),
                IntegerConv2d(64, 128, 3),
                IntegerConv2d(128, 256),
                IntegerConv2d(64, 128, 3),
                IntegerConv2d(128, c.latents, shift=LAST_SCALE_SHIFT, ceiling=LAST_SCALE_CEILING),
            ]
        )

    def _run(self, z_hat: Tensor, image_step: Tensor, method: str) -> Tensor:
        # hyper-latents at the activations' scale 2^-4; the image step counted in octaves
        x = _with_plane(z_hat * 16, image_step * (16 // STEPS_PER_OCTAVE))
        for i, layer in enumerate(self.layers):
            x = getattr(layer, method)(x)
            if i in (1, 3):
                x = F.pixel_shuffle(x, 2)
        return x - image_step.view(-1, 1, 1, 1)

    def forward(self, z_hat: Tensor, image_step: Tensor) -> Tensor:
        """Training path, float32 with straight-through gradients."""
        return self._run(z_hat, image_step.float(), "forward")

    @torch.no_grad()
    def indices(self, z_hat: Tensor, image_step: Tensor) -> Tensor:
        """Coding path: exact; returns int16 (N, M, h, w)."""
        out = self._run(z_hat.float(), image_step.float(), "integer_forward")
        return out.to(torch.int16)


class HyperPrior(nn.Module):
    """Scale indices of the hyper-latents: a factorised Gaussian a channel and image step."""

    def __init__(self, c: TransformConfig) -> None:
        super().__init__()
        self.knots = nn.Parameter(
            torch.full((c.hyper_latents, PRIOR_KNOTS), SCALE_ZERO / PRIOR_GAIN)
        )

    def forward(self, image_step: Tensor) -> Tensor:
        """Image steps (N,) integers to scale indices (N, Z) in 0..79, linear between knots."""
        low = torch.div(image_step, STEPS_PER_OCTAVE, rounding_mode="floor").long()
        part = (image_step - low * STEPS_PER_OCTAVE).to(self.knots.dtype) / STEPS_PER_OCTAVE
        index = torch.lerp(self.knots[:, low], self.knots[:, low + 1], part).T * PRIOR_GAIN
        return round_half_up(index).clamp(0, SCALE_COUNT - 1)


class TransformCodec(nn.Module):
    """All networks of the transform codec."""

    def __init__(self, config: TransformConfig | None = None) -> None:
        super().__init__()
        self.config = config or TransformConfig()
        self.g_a = Analysis(self.config)
        self.g_s = Synthesis(self.config)
        self.h_a = HyperAnalysis(self.config)
        self.h_mean = HyperMean(self.config)
        self.h_scale = HyperScale(self.config)
        self.prior = HyperPrior(self.config)

    def multiply_in(self, kind: torch.dtype) -> None:
        """Convert the weights of g_a and g_s to a type, for inference.

        Not of their layers at the latents, which have more digits than bfloat16 and cost little,
        nor of the shortcuts. Sums of residual branches keep their type.
        """
        if kind != self.prior.knots.dtype:
            for layer in (*self.g_a.net[:-1], *self.g_s.net[1:]):
                layer.to(kind, memory_format=torch.channels_last)


def expand_blocks(levels: Tensor, height: int, width: int) -> Tensor:
    """Spread a per-block map (N, 1, B_h, B_w) over latents (N, 1, height, width)."""
    spread = levels.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return spread[..., :height, :width]
