"""The diffusion decoder by OpenVINO, without PyTorch; `pcdc.denoiser` says what it computes.

Names of layers are those of diffusers' `UNet2DModel`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13 as op

from archive_pipeline.pcdc.constants import CELL, CELL_SAMPLES, LUMA, STRIDE
from archive_pipeline.pcdc.diffusion import (
    DEVIATIONS,
    NORM_GROUPS,
    mirrored,
    signal_powers,
    timesteps,
    white_noise,
)
from archive_pipeline.pcdc.model_files import DenoiserConfig
from archive_pipeline.pcdc.reader.layers import Array, shaped
from archive_pipeline.pcdc.reader.openvino_graph import Graph, Runner

NORM_EPSILON = 1e-5
LONGEST_PERIOD = 10000  # of the waves that tell the timestep


class OpenVINODenoiser:
    """The diffusion decoder of one model.

    Args:
        config, tensors: of `model_files.read_denoiser`.
        bfloat16: whether to multiply in that, else in float32.
        threads: how many may call it at once; each call is run by one thread.

    Raises:
        ValueError, KeyError: its weights are missing or of another shape.
    """

    def __init__(
        self, config: DenoiserConfig, tensors: Mapping[str, Array], bfloat16: bool, threads: int
    ) -> None:
        self._width = config.width_8
        self._embedding = [
            (shaped(tensors, f"{name}.weight", shape), shaped(tensors, f"{name}.bias", shape[:1]))
            for name, shape in (
                ("unet.time_embedding.linear_1", (4 * config.width_8, config.width_8)),
                ("unet.time_embedding.linear_2", (4 * config.width_8, 4 * config.width_8)),
            )
        ]
        self._run = Runner(lambda: _DenoiserGraph(tensors, config).model(), bfloat16, threads)

    def __call__(self, y: Array, x_bar: Array, steps: int, seed: int) -> Array:
        """Take `steps` >= 1 DDIM steps, of small tiles with what `mirrored` adds to them.

        Args:
            y: latents (h, w, M + 1), divided by `LATENT_GAIN`, and their exponents in 0..1.
            x_bar: what g_s makes of them, (16 h, 16 w, 3).

        Returns:
            x_0 (16 h, 16 w, 3), -1..1 and beyond.
        """
        height, width = x_bar.shape[:2]
        features, x_bar = _with_mirrored(y, 1), _with_mirrored(x_bar, STRIDE)
        powers, noise = signal_powers(), white_noise(seed, x_bar.shape)
        x_t = x_0 = x_bar
        share = 1.0  # of the signal's power
        for i, t in enumerate(timesteps(steps)):
            # at the first step there is no x_0 yet but x_bar, and no noise but what was drawn
            noise = _noise_in(x_t, x_0, share) if i else noise
            share = powers[t]
            x_t = np.float32(share**0.5) * x_0 + np.float32((1 - share) ** 0.5) * noise
            seen = _noise_in(x_t, x_bar, share) if i else noise
            x_0 = x_bar + self._run(x_t, x_bar, seen, features, self._moment(t))
        result: Array = x_0[0, :, :height, :width].transpose(1, 2, 0)
        return result

    def _moment(self, timestep: int) -> Array:
        """What residual blocks are told of a timestep, (1, 4 width_8, 1, 1)."""
        half = self._width // 2
        rates = np.exp(-math.log(LONGEST_PERIOD) / half * np.arange(half))
        waves = np.concatenate([np.cos(timestep * rates), np.sin(timestep * rates)])
        (first, first_bias), (second, second_bias) = self._embedding
        x = _silu(first @ waves.astype(np.float32) + first_bias)
        return _silu(second @ x + second_bias)[None, :, None, None]


def _with_mirrored(x: Array, scale: int) -> Array:
    """(rows, columns, channels) as (1, channels, rows, columns), with what `mirrored` adds."""
    rows, columns = (mirrored(count, scale) for count in x.shape[:2])
    return np.ascontiguousarray(x.transpose(2, 0, 1)[:, rows[:, None], columns])[None]


def _noise_in(x_t: Array, x_0: Array, share: float) -> Array:
    """The noise of unit variance in x_t, if it shows x_0 with this share of its power."""
    return (x_t - np.float32(share**0.5) * x_0) * np.float32((1 - share) ** -0.5)


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


class _DenoiserGraph(Graph):
    """What the diffusion decoder adds to x_bar."""

    def __init__(self, tensors: Mapping[str, Array], config: DenoiserConfig) -> None:
        super().__init__(tensors)
        self.config = config

    def model(self) -> openvino.Model:
        """Inputs: x_t, x_bar and the noise in x_t, latents with exponents, the moment."""
        config = self.config
        x_t, x_bar, noise = (op.parameter([1, 3, -1, -1], np.float32) for _ in range(3))
        latents = op.parameter([1, config.latents + 1, -1, -1], np.float32)
        moment = op.parameter([1, 4 * config.width_8, 1, 1], np.float32)
        x = self.conv(latents, "reduce.0", config.latents + 1, 4 * config.features)
        features = op.swish(op.depth_to_space(x, "depth_first", 2))
        cells = [op.space_to_depth(x, "depth_first", CELL) for x in (x_t, x_bar)]
        out = self._unet(op.concat([*cells, features], 1), moment)
        added = op.depth_to_space(_channels(out, 0, CELL_SAMPLES), "depth_first", CELL)
        if config.grain:
            gains = _channels(out, CELL_SAMPLES, CELL_SAMPLES + 2 * config.grain)
            added = op.add(added, _grain(noise, gains, config.grain))
        return openvino.Model([added], [x_t, x_bar, noise, latents, moment], "denoiser")

    def _unet(self, x: Any, moment: Any) -> Any:
        config, name = self.config, "unet"
        fine, coarse, layers = config.width_8, config.width_16, config.layers
        x = self.conv(x, f"{name}.conv_in", 2 * CELL_SAMPLES + config.features, fine, 3)
        kept = [(x, fine)]
        for i, (cin, cout) in enumerate(((fine, fine), (fine, coarse))):
            down = f"{name}.down_blocks.{i}"
            for j in range(layers):
                x = self._residual(x, moment, f"{down}.resnets.{j}", cout if j else cin, cout)
                kept.append((x, cout))
            if not i:
                x = self._halved(x, f"{down}.downsamplers.0.conv", cout)
                kept.append((x, cout))
        for j in range(2):
            x = self._residual(x, moment, f"{name}.mid_block.resnets.{j}", coarse, coarse)
        width = coarse
        for i, cout in enumerate((coarse, fine)):
            up = f"{name}.up_blocks.{i}"
            for j in range(layers + 1):
                skipped, more = kept.pop()
                x = op.concat([x, skipped], 1)
                x = self._residual(x, moment, f"{up}.resnets.{j}", width + more, cout)
                width = cout
            if not i:
                doubled = _resized(x, 2, "nearest")
                x = self.conv(doubled, f"{up}.upsamplers.0.conv", cout, cout, 3)
        x = op.swish(self._normalised(x, f"{name}.conv_norm_out", fine))
        return self.conv(x, f"{name}.conv_out", fine, CELL_SAMPLES + 2 * config.grain, 3)

    def _residual(self, x: Any, moment: Any, name: str, cin: int, cout: int) -> Any:
        y = op.swish(self._normalised(x, f"{name}.norm1", cin))
        y = self.conv(y, f"{name}.conv1", cin, cout, 3)
        y = op.add(y, self._told(moment, f"{name}.time_emb_proj", cout))
        y = op.swish(self._normalised(y, f"{name}.norm2", cout))
        y = self.conv(y, f"{name}.conv2", cout, cout, 3)
        if cin != cout:
            x = self.conv(x, f"{name}.conv_shortcut", cin, cout)
        return op.add(x, y)

    def _told(self, moment: Any, name: str, cout: int) -> Any:
        cin = 4 * self.config.width_8
        weight = shaped(self.tensors, f"{name}.weight", (cout, cin)).reshape(cout, cin, 1, 1)
        x = op.convolution(moment, op.constant(weight), [1, 1], [0, 0], [0, 0], [1, 1])
        return self.with_bias(x, name, cout)

    def _halved(self, x: Any, name: str, channels: int) -> Any:
        weight = shaped(self.tensors, f"{name}.weight", (channels, channels, 3, 3))
        x = op.convolution(x, op.constant(weight), [2, 2], [1, 1], [1, 1], [1, 1])
        return self.with_bias(x, name, channels)

    def _normalised(self, x: Any, name: str, channels: int) -> Any:
        scale, bias = (
            op.constant(shaped(self.tensors, f"{name}.{part}", (channels,)))
            for part in ("weight", "bias")
        )
        return op.group_normalization(x, scale, bias, NORM_GROUPS, NORM_EPSILON)


def _grain(noise: Any, gains: Any, octaves: int) -> Any:
    """`denoiser.grain_of` of noise (1, 3, 8 h, 8 w) and gains (1, 2 octaves, h, w)."""
    weights = op.constant(np.array(LUMA, np.float32).reshape(1, 3, 1, 1))
    grey = op.convolution(noise, weights, [1, 1], [0, 0], [0, 0], [1, 1])
    x = op.concat([grey, op.subtract(noise, grey)], 1)
    bands = []
    for _ in range(octaves):
        means = op.avg_pool(x, [2, 2], [0, 0], [0, 0], [2, 2], False)
        bands.append(op.subtract(x, _resized(means, 2)))
        x = means
    total = None
    for octave in reversed(range(octaves)):
        own = _channels(gains, 2 * octave, 2 * octave + 2)
        own = op.divide(own, op.constant(np.float32(DEVIATIONS[octave])))
        own = _resized(own, CELL >> octave)
        band = bands[octave]
        luma, colours = (
            op.multiply(_channels(band, *part), _channels(own, *one))
            for part, one in (((0, 1), (0, 1)), ((1, 4), (1, 2)))
        )
        here = op.add(luma, colours)
        total = here if total is None else op.add(_resized(total, 2), here)
    return total


def _channels(x: Any, start: int, stop: int) -> Any:
    def constant(values: list[int]) -> Any:
        return op.constant(np.array(values, np.int64))

    return op.slice(x, constant([start]), constant([stop]), constant([1]), constant([1]))


def _resized(x: Any, factor: int, mode: str = "linear_onnx") -> Any:
    """x of so many times the height and width, as PyTorch's `interpolate` makes it."""
    scales: NDArray[np.float32] = np.array([factor, factor], np.float32)
    how = {"coordinate_transformation_mode": "half_pixel"}
    if mode == "nearest":
        how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    axes = op.constant(np.array([2, 3], np.int64))
    return op.interpolate(x, op.constant(scales), mode, "scales", axes=axes, **how)
