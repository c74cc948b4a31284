"""What the diffusion decoder is given, the same whatever runs it: noise, how much of it, and when.

The forward process is that of DDPM (Ho et al. 2020) with linear betas; its steps backwards are
DDIM's (Song et al. 2021) with eta 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

NOISE_LEVELS = 100  # timesteps of the forward process
FIRST_BETA, LAST_BETA = 1e-4, 0.014  # half of the signal's power is left at the last level
# of white noise of variance one in its octaves, brought back to full size
DEVIATIONS = (0.9034, 0.2531, 0.1107, 0.0540)
NORM_GROUPS = 16  # of channels, which the U-Net normalises together
CHUNK = 16  # normal numbers that come of 16 uniform ones
LEAST_SIDE = 16  # latents; denoisers were trained on as many, and few have no statistics


@cache
def signal_powers() -> list[float]:
    """Share of the signal's power that is left at each noise level."""
    betas = np.linspace(FIRST_BETA, LAST_BETA, NOISE_LEVELS)
    powers: list[float] = np.cumprod(1 - betas).tolist()
    return powers


def timesteps(steps: int) -> list[int]:
    """Noise levels of so many steps, from the last one down, evenly."""
    return [round((i + 1) * NOISE_LEVELS / steps) - 1 for i in reversed(range(steps))]


def mirrored(count: int, scale: int = 1) -> NDArray[np.int64]:
    """Places 0..count - 1 along a side, mirrored at its end until there are `LEAST_SIDE` latents.

    So a denoiser is given the rows and columns of tiles that are smaller.

    Args:
        scale: places a latent.
    """
    return np.pad(np.arange(count), (0, max(0, LEAST_SIDE * scale - count)), "symmetric")


def white_noise(seed: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Normal numbers of variance one, float32, the same for a seed for ever.

    docs/format.md, section 8, says how. PyTorch's generator for CPUs does the same, so that
    pictures made with it stay the same.

    Args:
        shape: of a multiple of 16 values.
    """
    count = int(np.prod(shape))
    bits = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 1 << 32, count, np.uint32)
    uniform = (bits & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
    radius, angle = uniform.reshape(-1, 2, CHUNK // 2).transpose(1, 0, 2)
    radius = np.sqrt(np.float32(-2) * np.log(1 - radius))
    angle = np.float32(2 * np.pi) * angle
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    return normal.reshape(tuple(shape))
