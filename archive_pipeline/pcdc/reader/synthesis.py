"""From symbols to pixels in NumPy; what takes longest, the trunk of g_s, may run elsewhere.

`transforms.HyperMean` and `transforms.Synthesis` are the same for PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.pcdc.constants import (
    CELL,
    CELL_SAMPLES,
    FINEST_STEP,
    LATENT_GAIN,
    MAX_EXPONENT,
    STEPS_PER_OCTAVE,
    STRIDE,
)
from archive_pipeline.pcdc.model_files import TransformConfig
from archive_pipeline.pcdc.reader.layers import (
    Array,
    Block,
    Conv,
    Layer,
    Shuffle,
    run,
    with_plane,
)

# Features (h, w, width_16) of latents to cells of pixels (2 h, 2 w, CELL_SAMPLES).
Trunk = Callable[[Array], Array]


class HyperMean:
    """Means of latents, from hyper-latents and image step.

    Raises:
        ValueError, KeyError: its weights are missing or of another shape.
    """

    def __init__(self, tensors: Mapping[str, Array], config: TransformConfig) -> None:
        width, name = config.width_8, "h_mean.net"
        self.layers: tuple[Layer, ...] = (
            Conv(tensors, f"{name}.0", config.hyper_latents + 1, width),
            Conv(tensors, f"{name}.1", width, 4 * width),
            Shuffle(2),
            Block(tensors, f"{name}.3", width),
            Conv(tensors, f"{name}.4", width, 4 * width),
            Shuffle(2),
            Block(tensors, f"{name}.6", width),
            Conv(tensors, f"{name}.7", width, config.latents),
        )

    def __call__(self, z: NDArray[np.int64], image_step: int) -> Array:
        """Hyper-latents (Z, h, w) to means (4 h, 4 w, M), divided by `LATENT_GAIN`."""
        x = z.transpose(1, 2, 0).astype(np.float32) * np.float32(0.25)
        return run(self.layers, with_plane(x, image_step / MAX_EXPONENT))


class Synthesis:
    """g_s: latents to pixels. Its first layer and its shortcut, which have many digits, are here.

    Args:
        trunk: runs its other layers.

    Raises:
        ValueError, KeyError: its weights are missing or of another shape.
    """

    def __init__(self, tensors: Mapping[str, Array], config: TransformConfig, trunk: Trunk) -> None:
        self.first = Conv(tensors, "g_s.net.0", config.latents + 1, config.width_16)
        self.shortcut = (
            Conv(tensors, "g_s.shortcut", config.latents, 3 * STRIDE**2)
            if config.shortcut
            else None
        )
        self.trunk = trunk

    def __call__(self, y: Array, exponent: Array) -> Array:
        """Latents (h, w, M), divided by `LATENT_GAIN`, and step exponents (h, w, 1) to pixels.

        Returns:
            (16 h, 16 w, 3), -1..1 and a little beyond.
        """
        features = self.first(with_exponents(y, exponent))
        pixels = Shuffle(CELL)(self.trunk(features))
        if self.shortcut is not None:
            pixels += Shuffle(STRIDE)(self.shortcut(y))
        return pixels


def numpy_trunk(tensors: Mapping[str, Array], config: TransformConfig) -> Trunk:
    """The layers of g_s between its first and the pixel shuffle at its end, by NumPy.

    Raises:
        ValueError, KeyError: its weights are missing or of another shape.
    """
    name, deep, fine = "g_s.net", config.depth_16, config.depth_8
    layers: tuple[Layer, ...] = (
        *(Block(tensors, f"{name}.{1 + i}", config.width_16) for i in range(deep)),
        Conv(tensors, f"{name}.{deep + 1}", config.width_16, 4 * config.width_8),
        Shuffle(2),
        *(Block(tensors, f"{name}.{deep + 3 + i}", config.width_8) for i in range(fine)),
        Conv(
            tensors, f"{name}.{deep + 3 + fine}", config.width_8, CELL_SAMPLES, config.edge_kernel
        ),
    )
    return lambda x: run(layers, x)


def with_exponents(y: Array, exponent: Array) -> Array:
    """Latents (h, w, M) and, as one channel more, their step exponents (h, w, 1), in 0..1."""
    return np.concatenate([y, exponent / MAX_EXPONENT], 2)


def latents(mean: Array, exponent: Array, q: NDArray[np.int64]) -> Array:
    """Latents (h, w, M), divided by `LATENT_GAIN`: means and symbols q (M, h, w) of their steps."""
    step = FINEST_STEP / LATENT_GAIN * np.exp2(exponent / STEPS_PER_OCTAVE)
    y = step.astype(np.float32) * q.transpose(1, 2, 0).astype(np.float32)
    y += mean
    return y


def to_pixels(x: Array, height: int, width: int) -> NDArray[np.uint8]:
    """Pixels uint8 (height, width, 3) of values -1..1 (at least height, at least width, 3)."""
    x = x[:height, :width] * np.float32(127.5)
    x += 128  # + 127.5, and halves round up
    return np.clip(x, 0, 255, out=x).astype(np.uint8)
