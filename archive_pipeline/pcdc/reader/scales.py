"""Scale indices in NumPy, exact: what entropy decoding depends on.

`transforms.HyperPrior` and `transforms.HyperScale` are the same for PyTorch; `docs/format.md`,
section 6, is what both compute.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.pcdc.constants import (
    ACTIVATION_BITS,
    ACTIVATION_LIMIT,
    LAST_SCALE_CEILING,
    LAST_SCALE_SHIFT,
    PRIOR_GAIN,
    PRIOR_KNOTS,
    SCALE_COUNT,
    STEPS_PER_OCTAVE,
    WEIGHT_BITS,
)
from archive_pipeline.pcdc.model_files import KNOT_BITS, TransformConfig
from archive_pipeline.pcdc.reader.layers import (
    Array,
    Layer,
    Shuffle,
    neighbourhoods,
    run,
    shaped,
    with_plane,
)

EXACT_FLOAT32 = 1 << 24  # integers up to here are float32


class Prior:
    """Scale indices of hyper-latents, by channel and image step.

    Raises:
        ValueError, KeyError: its weights are missing or of another shape.
    """

    def __init__(self, tensors: Mapping[str, Array], channels: int) -> None:
        values = shaped(tensors, "prior.knots", (channels, PRIOR_KNOTS))
        self.knots = np.rint(values.astype(np.float64) * 2**KNOT_BITS).astype(np.int64)

    def index(self, image_step: int) -> NDArray[np.int64]:
        """Scale indices (Z,) in 0..79, linear between knots, halves rounded up."""
        low, part = divmod(image_step, STEPS_PER_OCTAVE)
        total = (STEPS_PER_OCTAVE - part) * self.knots[:, low] + part * self.knots[:, low + 1]
        unit = (STEPS_PER_OCTAVE << KNOT_BITS) // PRIOR_GAIN
        return np.clip((total + unit // 2) // unit, 0, SCALE_COUNT - 1)


class IntegerConv:
    """A convolution of integers, see `layers.IntegerConv2d` of PyTorch's side.

    float32 multiplies where its 24 bits hold every partial sum, else float64: sums are then exact
    in whatever order they are added.

    Raises:
        ValueError, KeyError: its weights are missing or of another shape.
    """

    def __init__(
        self,
        tensors: Mapping[str, Array],
        name: str,
        shape: tuple[int, int, int],
        shift: int = WEIGHT_BITS,
        ceiling: int = ACTIVATION_LIMIT,
    ) -> None:
        cin, cout, self.kernel = shape
        weight = shaped(tensors, f"{name}.weight", (cout, cin, self.kernel, self.kernel))
        bias = shaped(tensors, f"{name}.bias", (cout,))
        # whole numbers already, multiplied by a power of two; divided by another
        flat = weight.transpose(2, 3, 1, 0).reshape(-1, cout).astype(np.float64) * 2**WEIGHT_BITS
        half = 2.0 ** (shift - 1)
        offset = bias.astype(np.float64) * 2 ** (WEIGHT_BITS + ACTIVATION_BITS) + half
        self.gain, self.offset = np.abs(flat).sum(0).max(), np.abs(offset).max()
        self.weight, self.bias = flat / 2**shift, offset / 2**shift
        self._float32 = self.weight.astype(np.float32), self.bias.astype(np.float32)
        self.ceiling = ceiling

    def __call__(self, x: Array) -> Array:
        """Integers (rows, columns, cin) to integers 0..ceiling (rows, columns, cout)."""
        edge = self.kernel // 2
        padded = np.pad(x, ((edge, edge), (edge, edge), (0, 0)))
        columns = neighbourhoods(padded, self.kernel)
        exact = self.gain * np.abs(x).max() + self.offset <= EXACT_FLOAT32
        weight, bias = self._float32 if exact else (self.weight, self.bias)
        total = columns.astype(weight.dtype, copy=False) @ weight
        total += bias
        np.floor(total, total)
        np.clip(total, 0, self.ceiling, total)
        return total.astype(np.float32, copy=False).reshape(*x.shape[:2], -1)


class ScaleNetwork:
    """Scale indices of latents, from hyper-latents and image step.

    Raises:
        ValueError, KeyError: its weights are missing or of another shape.
    """

    def __init__(self, tensors: Mapping[str, Array], config: TransformConfig) -> None:
        shapes = (
            (config.hyper_latents + 1, 192, 3),
            (192, 256, 1),
            (64, 128, 3),
            (128, 256, 1),
            (64, 128, 3),
        )
        names = [f"h_scale.layers.{i}" for i in range(6)]
        inner = [
            IntegerConv(tensors, name, shape) for name, shape in zip(names, shapes, strict=False)
        ]
        last = IntegerConv(
            tensors,
            names[-1],
            (128, config.latents, 1),
            shift=LAST_SCALE_SHIFT,
            ceiling=LAST_SCALE_CEILING,
        )
        shuffle = Shuffle(2)
        layers: tuple[Layer, ...] = (*inner[:2], shuffle, *inner[2:4], shuffle, *inner[4:], last)
        self.layers = layers

    def index(self, z: NDArray[np.int64], image_step: int) -> NDArray[np.int64]:
        """Hyper-latents (Z, h, w) to indices (M, 4 h, 4 w), -63..255."""
        x = z.transpose(1, 2, 0).astype(np.float32) * 2**ACTIVATION_BITS
        x = with_plane(x, image_step * (2**ACTIVATION_BITS // STEPS_PER_OCTAVE))
        x = run(self.layers, x)
        return np.ascontiguousarray(x.transpose(2, 0, 1)).astype(np.int64) - image_step
