"""The conditional diffusion decoder: a U-Net that predicts the image, sampled in a few steps.

Data flow of one step, after CDC (Yang and Mandt 2023, the paper's reference 12: the network
predicts the image, "x-prediction", not the noise)::

    y_hat, step exponents --features--+
    x_bar (steps = 0 decoder) --------+--> U-Net on 8 px cells --> residual --> x_0 = x_bar + it
    x_t (noisy image) ----------------+

Sampling starts from noise added to x_bar, not from noise alone, so few steps are enough. This
module imports diffusers, which takes seconds: import it only where steps >= 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from archive_pipeline.pcdc.constants import LATENT_GAIN, MAX_EXPONENT
from archive_pipeline.pcdc.layers import zero
from archive_pipeline.pcdc.model_files import check_header

NOISE_LEVELS = 100  # timesteps of the forward process
NORM_GROUPS = 16
MAX_WIDTH = 512
MAX_LAYERS = 4
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


class Denoiser(ModelMixin, ConfigMixin):
    """Predicts the image from a noisy one, the latents and the deterministic decoder's output.

    Args:
        latents: channels M of y_hat.
        features: channels that y_hat is reduced to on the grid of 8 px cells.
        width_8, width_16: the U-Net's widths at 1/8 and 1/16 of the resolution, multiples of 32:
            a group of channels must have a variance even in a tile of one pixel.
        layers: residual layers a resolution.
    """

    @register_to_config
    def __init__(
        self,
        latents: int = 192,
        features: int = 32,
        width_8: int = 64,
        width_16: int = 128,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Conv2d(latents + 1, 4 * features, 1), nn.PixelShuffle(2), nn.SiLU()
        )
        self.unet = UNet2DModel(
            in_channels=2 * 192 + features,
            out_channels=192,
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
        cells = F.pixel_unshuffle(torch.cat([x_t, x_bar], 1), 8)
        residual = self.unet(torch.cat([cells, features], 1), timestep).sample
        return x_bar + F.pixel_shuffle(residual, 8)


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
            limit = MAX_LAYERS if name == "layers" else MAX_WIDTH
            if type(value) is not int or not 1 <= value <= limit:
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
