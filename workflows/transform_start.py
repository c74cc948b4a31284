"""Where the training of a transform codec starts: a linear transform coder, or released weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archive_pipeline.pcdc.constants import (
    FINEST_STEP,
    LATENT_GAIN,
    SCALE_ZERO,
    STEPS_PER_OCTAVE,
)
from archive_pipeline.pcdc.transforms import TransformCodec


def principal_axes(samples: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (d,), leading axes (d, count) and their standard deviations of samples (n, d)."""
    mean = samples.mean(0)
    variance, axes = torch.linalg.eigh(torch.cov(samples.T))
    order = torch.arange(samples.shape[1] - 1, samples.shape[1] - 1 - count, -1)
    return mean, axes[:, order], variance[order].clamp_min(0).sqrt()


@torch.no_grad()
def klt_start(codec: TransformCodec, crops: Tensor) -> None:
    """Set the transforms to the Karhunen-Loeve transform of training patches.

    Residual blocks start as the identity, so analysis and synthesis are then a linear transform
    coder, and training starts where classical codecs stand instead of far below.
    """
    config = codec.config
    patches = F.pixel_unshuffle(crops.float() / 127.5 - 1, 8)
    mean, axes, _ = principal_axes(patches.permute(0, 2, 3, 1).flatten(0, 2), config.width_8)
    fine = F.conv2d(patches, axes.T[..., None, None], -(axes.T @ mean))
    coarse = F.pixel_unshuffle(fine, 2)
    width = min(config.width_16, config.latents)
    shift, joint, deviation = principal_axes(coarse.permute(0, 2, 3, 1).flatten(0, 2), width)

    analysis, synthesis = (
        [m for m in n if isinstance(m, nn.Conv2d)] for n in (codec.g_a.net, codec.g_s.net)
    )
    for conv in (*analysis, *synthesis):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    centre = config.edge_kernel // 2
    analysis[0].weight[:, :, centre, centre] = axes.T
    analysis[0].bias[:] = -(axes.T @ mean)
    analysis[1].weight[:width, :, 0, 0] = joint.T
    analysis[1].bias[:width] = -(joint.T @ shift)
    analysis[2].weight[:width, :width, 0, 0] = torch.eye(width)
    synthesis[0].weight[:width, :width, 0, 0] = torch.eye(width)
    synthesis[1].weight[:, :width, 0, 0] = joint
    synthesis[1].bias[:] = shift
    synthesis[2].weight[:, :, centre, centre] = axes
    synthesis[2].bias[:] = mean

    last = codec.h_scale.layers[-1]
    last.weight *= 0.05
    deviation = (LATENT_GAIN * deviation).clamp_min(1e-3)
    index = SCALE_ZERO + STEPS_PER_OCTAVE * torch.log2(deviation / FINEST_STEP)
    last.bias[:width] = index / 2**codec.h_scale.GAIN_BITS


def load_released(codec: TransformCodec, released: TransformCodec) -> None:
    """Take over released weights; kernels that were smaller are set into the middle of theirs."""
    state = codec.state_dict()
    for name, value in released.state_dict().items():
        grown = (state[name].shape[-1] - value.shape[-1]) // 2 if value.dim() == 4 else 0
        state[name] = F.pad(value, [grown] * 4) if grown else value
    codec.load_state_dict(state)
