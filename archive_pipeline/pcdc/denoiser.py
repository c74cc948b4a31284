"""The conditional diffusion decoder: a U-Net that predicts the image, sampled in a few steps.

Data flow of one step, after CDC (Yang and Mandt 2023, the paper's reference 12: the network
predicts the image, "x-prediction", not the noise)::

    y_hat, step exponents --features--+
    x_bar (steps = 0 decoder) --------+--> U-Net on 8 px cells --+--> residual
    x_t (noisy image) ----+-----------+                          +--> gains
                          +--> its noise, by octaves, times the gains --> grain

    x_0 = x_bar + residual + grain

Grain is how detail that nobody knows looks like detail: a network that is to give texture the
energy it had otherwise learns patterns, which are cheaper to draw than chance.

Sampling starts from noise added to x_bar, not from noise alone, so few steps are enough. This
module imports diffusers, which takes seconds: import it only where steps >= 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from archive_pipeline.pcdc.constants import CELL, CELL_SAMPLES, LATENT_GAIN, MAX_EXPONENT, STRIDE
from archive_pipeline.pcdc.diffusion import (
    DEVIATIONS,
    FIRST_BETA,
    LAST_BETA,
    NOISE_LEVELS,
    NORM_GROUPS,
    mirrored,
    signal_powers,
    timesteps,
    white_noise,
)
from archive_pipeline.pcdc.layers import luma, zero
from archive_pipeline.pcdc.model_files import DenoiserConfig


def scheduler() -> DDIMScheduler:
    """The forward process."""
    return DDIMScheduler(
        num_train_timesteps=NOISE_LEVELS,
        beta_start=FIRST_BETA,
        beta_end=LAST_BETA,
        beta_schedule="linear",
        prediction_type="sample",
        clip_sample=False,
        timestep_spacing="trailing",
    )


class Denoiser(ModelMixin, ConfigMixin):
    """Predicts the image from a noisy one, the latents and the deterministic decoder's output.

    Args:
        latents: channels M of y_hat.
        features: channels that y_hat is reduced to on the grid of 8 px cells.
        width_8, width_16: the U-Net's widths at 1/8 and 1/16 of the resolution, multiples of 32:
            a group of channels must have a variance even in a tile of one pixel.
        layers: residual layers a resolution.
        grain: octaves of the noise that have gains, for luma and colours each, from the finest on.
    """

    @register_to_config
    def __init__(
        self,
        latents: int = 192,
        features: int = 32,
        width_8: int = 64,
        width_16: int = 128,
        layers: int = 2,
        grain: int = 0,
    ) -> None:
        super().__init__()
        self.grain = grain
        self.reduce = nn.Sequential(
            nn.Conv2d(latents + 1, 4 * features, 1), nn.PixelShuffle(2), nn.SiLU()
        )
        self.unet = UNet2DModel(
            in_channels=2 * CELL_SAMPLES + features,
            out_channels=CELL_SAMPLES + 2 * grain,
            block_out_channels=(width_8, width_16),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=layers,
            norm_num_groups=NORM_GROUPS,
            add_attention=False,
        )
        zero(self.unet.conv_out)  # starts as the deterministic decoder

    def forward(
        self, x_t: Tensor, timestep: Tensor, y_hat: Tensor, exponent: Tensor, x_bar: Tensor
    ) -> Tensor:
        """Return x_0 (N, 3, 16h, 16w) in -1..1.

        Args:
            x_t, x_bar: (N, 3, 16h, 16w) float.
            timestep: (N,) or scalar integers 0..99.
            y_hat: (N, M, h, w) float; exponent: its step exponents (N, 1, h, w).
        """
        plane = exponent.to(y_hat.dtype) / MAX_EXPONENT
        features = self.reduce(torch.cat([y_hat / LATENT_GAIN, plane], 1))
        cells = F.pixel_unshuffle(torch.cat([x_t, x_bar], 1), CELL)
        out = self.unet(torch.cat([cells, features], 1), timestep).sample
        x_0 = x_bar + F.pixel_shuffle(out[:, :CELL_SAMPLES], CELL)
        if self.grain:
            noise = noise_in(x_t, x_bar, timestep)
            x_0 = x_0 + grain_of(noise, out[:, CELL_SAMPLES:].to(x_bar))
        return x_0


def noise_in(x_t: Tensor, x_0: Tensor, timestep: Tensor) -> Tensor:
    """The noise of unit variance in x_t (N, C, H, W) at timesteps (N,) or (), if it shows x_0."""
    power = x_t.new_tensor(signal_powers())[timestep].view(-1, 1, 1, 1)
    return (x_t - power.sqrt() * x_0) / (1 - power).sqrt()


def grain_of(noise: Tensor, gains: Tensor) -> Tensor:
    """Noise (N, 3, 8h, 8w) of unit variance by octaves, each times its gains; of the same shape.

    Args:
        gains: (N, 2 k, h, w), of luma and of colours for k octaves, the finest first.
    """
    octaves = gains.shape[1] // 2
    grey = luma(noise)
    bands = octaves_of(torch.cat([grey, noise - grey], 1), octaves)
    total = torch.zeros_like(bands[-1][:, 1:])
    for octave in reversed(range(octaves)):
        band = bands[octave]
        own = gains[:, 2 * octave : 2 * octave + 2] / DEVIATIONS[octave]
        own = F.interpolate(own, band.shape[2:], mode="bilinear")
        if octave < octaves - 1:
            total = doubled(total)
        total = total + own[:, :1] * band[:, :1] + own[:, 1:] * band[:, 1:]
    return total


def octaves_of(x: Tensor, octaves: int) -> list[Tensor]:
    """Differences of (N, C, H, W) from its means of 2 x 2, at full size, of these at half size, ...

    H and W are multiples of 2 to the power of `octaves`.
    """
    bands = []
    for _ in range(octaves):
        means = F.avg_pool2d(x, 2)
        bands.append(x - doubled(means))
        x = means
    return bands


def doubled(x: Tensor) -> Tensor:
    """Twice the height and width of (N, C, H, W), bilinear."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear")


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    y_hat: Tensor,
    exponent: Tensor,
    x_bar: Tensor,
    steps: int,
    seeds: Sequence[int],
) -> Tensor:
    """Decode N tiles with `steps` >= 1 DDIM steps; shapes as in `Denoiser.forward`.

    Small tiles are denoised with what `mirrored` adds to them.

    The noise is `white_noise`, so a tile's seed means the same picture on every device.
    """
    height, width = x_bar.shape[2:]
    y_hat, exponent, x_bar = (
        with_mirrored(x, scale) for x, scale in ((y_hat, 1), (exponent, 1), (x_bar, STRIDE))
    )
    process = scheduler()
    drawn = np.concatenate([white_noise(seed, x_bar[:1].shape) for seed in seeds])
    noise, x_0 = torch.from_numpy(drawn).to(x_bar), x_bar
    # not the scheduler's `step`: where steps do not divide the levels, it leaves another level
    # of noise than its next timestep says
    for t in torch.tensor(timesteps(steps), device=x_bar.device):
        x_t = process.add_noise(x_0, noise, t)
        x_0 = denoiser(x_t, t, y_hat, exponent, x_bar)
        noise = noise_in(x_t, x_0, t)
    return x_0[:, :, :height, :width]


def with_mirrored(x: Tensor, scale: int) -> Tensor:
    """(N, C, h, w), of so many places a latent, with the rows and columns that `mirrored` adds."""
    for axis in (2, 3):
        places = torch.from_numpy(mirrored(x.shape[axis], scale))
        x = x.index_select(axis, places.to(x.device))
    return x


def load_denoiser(config: DenoiserConfig, tensors: Mapping[str, NDArray[np.float32]]) -> Denoiser:
    """Build a denoiser from what `model_files.read_denoiser` found.

    Raises:
        KeyError, RuntimeError: weights are missing, or of another shape.
    """
    with torch.device("meta"):
        denoiser = Denoiser(**asdict(config))
    weights = {name: torch.from_numpy(array) for name, array in tensors.items()}
    # what else is there was of no use to the reader either
    missing = denoiser.load_state_dict(weights, strict=False, assign=True).missing_keys
    if missing:
        raise KeyError(missing[0])
    return denoiser.eval().requires_grad_(False)
