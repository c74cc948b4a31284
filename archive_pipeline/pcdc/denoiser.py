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

import json
from collections.abc import Sequence
from functools import cache

import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from archive_pipeline.pcdc.constants import LATENT_GAIN, MAX_EXPONENT
from archive_pipeline.pcdc.layers import luma, zero
from archive_pipeline.pcdc.model_files import check_header

NOISE_LEVELS = 100  # timesteps of the forward process
NORM_GROUPS = 16
MAX_WIDTH = 512
MAX_LAYERS = 4
MAX_GRAIN = 4
CELL = 8  # pixels a side
PIXELS = 3 * CELL**2  # values of a cell's pixels
# of white noise of unit variance in its octaves, brought back to full size
DEVIATIONS = (0.9034, 0.2531, 0.1107, 0.0540)
LAST_BETA = 0.014  # linear betas up to this leave half of the signal's power at the last level


def scheduler() -> DDIMScheduler:
    """The forward process and its deterministic sampler (DDIM, eta 0)."""
    return DDIMScheduler(
        num_train_timesteps=NOISE_LEVELS,
        beta_start=1e-4,
        beta_end=LAST_BETA,
        beta_schedule="linear",
        prediction_type="sample",
        clip_sample=False,
        timestep_spacing="trailing",
    )


@cache
def signal_powers() -> list[float]:
    """Share of the signal's power that is left at each noise level."""
    powers: list[float] = scheduler().alphas_cumprod.tolist()
    return powers


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
            in_channels=2 * PIXELS + features,
            out_channels=PIXELS + 2 * grain,
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
        x_0 = x_bar + F.pixel_shuffle(out[:, :PIXELS], CELL)
        if self.grain:
            power = x_bar.new_tensor(signal_powers())[timestep].view(-1, 1, 1, 1)
            noise = (x_t - power.sqrt() * x_bar) / (1 - power).sqrt()
            x_0 = x_0 + grain_of(noise, out[:, PIXELS:].to(x_bar))
        return x_0


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

    The noise comes from a CPU generator, so a tile's seed means the same picture on every device.
    """
    process = scheduler()
    process.set_timesteps(steps)
    noise = torch.cat(
        [
            torch.randn(x_bar[:1].shape, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
    ).to(x_bar)
    x = process.add_noise(x_bar, noise, process.timesteps[:1])
    for t in process.timesteps:
        x_0 = denoiser(x, t.to(x.device), y_hat, exponent, x_bar)
        x = process.step(x_0, t, x).prev_sample
    return x


def load_denoiser(config: bytes, weights: bytes, latents: int) -> Denoiser:
    """Build a denoiser from its files' contents, for a codec of so many latents.

    Raises:
        ValueError: they are damaged or out of range.
    """
    try:
        # names with an underscore are diffusers' notes on class and version
        settings = {k: v for k, v in json.loads(config).items() if not k.startswith("_")}
        for name, value in settings.items():
            limit = {"layers": MAX_LAYERS, "grain": MAX_GRAIN}.get(name, MAX_WIDTH)
            if type(value) is not int or not (name != "grain") <= value <= limit:
                raise ValueError(f"{name}={value!r} is out of range")
            if name.startswith("width") and value % (2 * NORM_GROUPS):
                raise ValueError(f"{name}={value} is no multiple of {2 * NORM_GROUPS}")
        if settings.get("latents") != latents:
            raise ValueError(f"latents={settings.get('latents')}, but the codec has {latents}")
        check_header(weights)
        tensors = load_tensors(weights)
        if any(t.dtype not in (torch.float16, torch.float32) for t in tensors.values()):
            raise ValueError("weights are neither float16 nor float32")
        if any(not t.isfinite().all() for t in tensors.values()):
            raise ValueError("weights are not finite")
        with torch.device("meta"):
            denoiser = Denoiser(**settings)
        denoiser.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    except ValueError:
        raise
    except (TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot be read: {error}") from error
    return denoiser.eval().requires_grad_(False)
