"""The released model as one of CompressAI's, for those who compare codecs with it.

Importing this module registers `pcdc-drone-small` with CompressAI's registry and its zoo::

    import compressai.zoo
    import archive_pipeline.codec.compressai_model

    net = compressai.zoo.image_models["pcdc-drone-small"](quality=4, pretrained=True)
    out = net.compress(x)                                # x (N, 3, H, W) in 0..1
    x_hat = net.decompress(**out)["x_hat"]

What `compress` returns are whole PCDC streams, headers included, one an image: the bytes that an
archive stores for a tile. A quality is an image step; blocks all have the base level.

CompressAI 1.2.8 asks for numpy below 2 and runs with later ones: where both are wanted, install it
with `pip install --no-deps`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from compressai.models import CompressionModel
from compressai.registry import register_model
from compressai.zoo import image_models
from torch import Tensor

from archive_pipeline.codec.models import DEFAULT_MODEL, find_folder
from archive_pipeline.pcdc.bitstream import MAX_SIDE
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.constants import SCALE_COUNT, STRIDE
from archive_pipeline.pcdc.encoding import Encoding
from archive_pipeline.pcdc.layers import round_half_up
from archive_pipeline.pcdc.model import Model, build_files
from archive_pipeline.pcdc.model_files import read_folder
from archive_pipeline.pcdc.training.estimates import cheaper, gaussian_bits
from archive_pipeline.pcdc.transforms import pad_to, scale_of, step_size

IMAGE_STEPS = {quality: 52 - 4 * quality for quality in range(1, 9)}
"""Image steps of CompressAI's qualities 1 (fewest bits) to 8."""


@register_model(DEFAULT_MODEL)
class PCDC(CompressionModel):
    """A PCDC model at one image step.

    Attributes:
        networks: the `TransformCodec`, whose weights may be trained on.
        image_step: 8 (finest) to 55.
    """

    def __init__(self, files: dict[str, bytes], image_step: int) -> None:
        """Take a model's files and the step to code at.

        Raises:
            ModelError: the files are damaged or of an unknown kind.
            ValueError: there is no such image step.
        """
        super().__init__()
        if not 8 <= image_step <= 55:
            raise ValueError(f"image step {image_step} is not within 8..55")
        self.image_step = image_step
        self._codec = Codec(Model(files))
        self.networks = Model(files).networks.requires_grad_(True)

    @classmethod
    def released(cls, quality: int = 4, name: str = DEFAULT_MODEL) -> PCDC:
        """A released model, by name or folder, at one of the qualities 1..8.

        Raises:
            ModelError: there is none of that name, or it is damaged.
            ValueError: there is no such quality.
        """
        if quality not in IMAGE_STEPS:
            raise ValueError(f"quality {quality} is not within 1..8")
        return cls(read_folder(find_folder(name)), IMAGE_STEPS[quality]).eval()

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Pixels (N, 3, H, W) in 0..1 to `x_hat` alike, and likelihoods of y (N, M, h, w) and z.

        Rounding passes gradients straight on. Likelihoods are those of Gaussians; a release's
        tables are fitted to its symbols.
        """
        networks, height, width = self.networks, x.shape[-2], x.shape[-1]
        step = torch.full((len(x),), self.image_step, device=x.device)
        y = networks.g_a(pad_to(x * 2 - 1, STRIDE))
        h, w = y.shape[-2:]
        z = round_half_up(networks.h_a(pad_to(y, 4), step))
        z_scale = scale_of(networks.prior(step))[:, :, None, None].expand_as(z)
        mean = networks.h_mean(z, step)[..., :h, :w]
        scale = scale_of(networks.h_scale(z, step)[..., :h, :w].clamp(0, SCALE_COUNT - 1))
        size = step_size(step).view(-1, 1, 1, 1)
        v = (y - mean) / size
        q = cheaper(v, round_half_up(v), scale)  # as the encoder makes them
        exponent = step.view(-1, 1, 1, 1).expand(-1, 1, h, w)
        x_hat = networks.g_s(mean + size * q, exponent)[..., :height, :width]
        likelihoods = {
            "y": torch.exp2(-gaussian_bits(q, scale)),
            "z": torch.exp2(-gaussian_bits(z, z_scale)),
        }
        return {"x_hat": x_hat / 2 + 0.5, "likelihoods": likelihoods}

    @torch.no_grad()
    def compress(self, x: Tensor) -> dict[str, Any]:
        """Pixels (N, 3, H, W) in 0..1, as 8-bit ones, to `strings` [[stream, ...]] and `shape`.

        Raises:
            ValueError: they are wider or higher than 4096.
        """
        if max(x.shape[-2:]) > MAX_SIDE:
            raise ValueError(f"{tuple(x.shape[-2:])} pixels: PCDC codes at most {MAX_SIDE} a side")
        pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        tiles = [np.ascontiguousarray(tile) for tile in pixels.cpu().numpy()]
        streams = Encoding(self._codec, tiles).streams_at(self.image_step)
        return {"strings": [streams], "shape": x.shape[-2:]}

    @torch.no_grad()
    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int]) -> dict[str, Tensor]:
        """What `compress` returned, to `x_hat` (N, 3, H, W) in 0..1.

        Raises:
            CorruptStream: a stream is damaged, or larger than `shape`.
        """
        tiles = self._codec.decode(strings[0], *shape)
        x_hat = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 255
        return {"x_hat": x_hat.to(next(self.parameters()).device)}

    def update(self, scale_table: Tensor | None = None, force: bool = False, **_: Any) -> bool:
        """Code with the networks as they are now; whether they had changed.

        A model that was trained on gets Gaussian frequency tables and an identity of its own.
        """
        device = next(self.parameters()).device
        if not self._changed():
            if self._codec.model.device != device:
                self._codec = Codec(Model(self._codec.model.files, device))
            return False
        self._codec = Codec(Model(build_files(self.networks), device))
        return True

    def _changed(self) -> bool:
        coded = self._codec.model.networks.state_dict()
        present = self.networks.state_dict()
        return any(not torch.equal(present[k].cpu(), t.cpu()) for k, t in coded.items())


def pcdc_drone_small(
    quality: int, metric: str = "mse", pretrained: bool = True, progress: bool = True
) -> PCDC:
    """The model as CompressAI's zoo wants one: it has one metric, and needs no download.

    Raises:
        ValueError: `pretrained` is False, for what is registered are released weights.
    """
    if not pretrained:
        raise ValueError(f"{DEFAULT_MODEL} comes with its weights: pretrained=True")
    return PCDC.released(quality)


image_models[DEFAULT_MODEL] = pcdc_drone_small
