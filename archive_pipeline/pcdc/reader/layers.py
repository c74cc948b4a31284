"""Layers of the transforms in NumPy: float32 arrays (rows, columns, channels), one image at a time.

`pcdc.layers` has the same for PyTorch; `docs/format.md`, section 8, says what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Layer = Callable[[Array], Array]

SLOPE = np.float32(0.1)  # of LeakyReLU below zero
STRIP = 1 << 17  # values that layers work on at once: they stay in a core's cache


class Conv:
    """A convolution with zeros outside, of a kernel of 1 or 3.

    Args:
        tensors: weights of a model, by name.
        name: of the layer.
        cin, cout: channels.

    Raises:
        ValueError, KeyError: its weights are missing or of another shape.
    """

    def __init__(
        self, tensors: Mapping[str, Array], name: str, cin: int, cout: int, kernel: int = 1
    ) -> None:
        weight = shaped(tensors, f"{name}.weight", (cout, cin, kernel, kernel))
        self.kernel = kernel
        self.bias = shaped(tensors, f"{name}.bias", (cout,))
        self.weight = np.ascontiguousarray(weight.transpose(2, 3, 1, 0).reshape(-1, cout))

    def __call__(self, x: Array) -> Array:
        rows, columns, _ = x.shape
        out = np.empty((rows, columns, len(self.bias)), np.float32)
        edge = self.kernel // 2
        padded = np.pad(x, ((edge, edge), (edge, edge), (0, 0))) if edge else x
        for top, stop in _strips(rows, columns * len(self.weight)):
            inputs = neighbourhoods(padded[top : stop + 2 * edge], self.kernel)
            part = out[top:stop].reshape(-1, len(self.bias))
            np.matmul(inputs, self.weight, out=part)
            part += self.bias
        return out


class Block:
    """Residual depthwise 3x3 and feed-forward pair, `DepthConvBlock`.

    Raises:
        ValueError, KeyError: its weights are missing or of another shape.
    """

    def __init__(self, tensors: Mapping[str, Array], name: str, channels: int) -> None:
        self.before = Conv(tensors, f"{name}.spatial.0", channels, channels)
        depthwise = shaped(tensors, f"{name}.spatial.2.weight", (channels, 1, 3, 3))
        self.depthwise = np.ascontiguousarray(depthwise[:, 0].transpose(1, 2, 0))
        self.depthwise_bias = shaped(tensors, f"{name}.spatial.2.bias", (channels,))
        self.after = Conv(tensors, f"{name}.spatial.3", channels, channels)
        self.mix = (
            Conv(tensors, f"{name}.mix.0", channels, 2 * channels),
            leaky_relu,
            Conv(tensors, f"{name}.mix.2", 2 * channels, channels),
        )

    def __call__(self, x: Array) -> Array:
        rows, columns, channels = x.shape
        padded = np.zeros((rows + 2, columns + 2, channels), np.float32)
        strips = _strips(rows, 2 * columns * channels)
        for top, stop in strips:
            padded[top + 1 : stop + 1, 1:-1] = leaky_relu(self.before(x[top:stop]))
        out = np.empty_like(x)
        for top, stop in strips:
            y = self.after(self._depthwise(padded[top : stop + 2]))
            y += x[top:stop]
            np.add(y, run(self.mix, y), out=out[top:stop])
        return out

    def _depthwise(self, padded: Array) -> Array:
        """The 3x3 convolution of each channel by itself, of rows and columns with a border."""
        rows, columns = padded.shape[0] - 2, padded.shape[1] - 2
        total = padded[:rows, :columns] * self.depthwise[0, 0]
        product = np.empty_like(total)
        for at in range(1, 9):
            i, j = divmod(at, 3)
            np.multiply(padded[i : i + rows, j : j + columns], self.depthwise[i, j], product)
            total += product
        total += self.depthwise_bias
        return total


class Shuffle:
    """Channels (c r r) to cells of r x r pixels of c channels."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, x: Array) -> Array:
        rows, columns, channels = x.shape
        r, left = self.factor, channels // self.factor**2
        cells = x.reshape(rows, columns, left, r, r).transpose(0, 3, 1, 4, 2)
        return cells.reshape(rows * r, columns * r, left)


def leaky_relu(x: Array) -> Array:
    """x where it is positive, else a tenth of it; into x itself."""
    return np.maximum(x, x * SLOPE, out=x)


def run(layers: tuple[Layer, ...], x: Array) -> Array:
    """What layers, one after another, make of x (rows, columns, channels)."""
    for layer in layers:
        x = layer(x)
    return x


def neighbourhoods(padded: Array, kernel: int) -> Array:
    """The kernel's inputs of each place, (rows * columns, kernel * kernel * channels).

    Args:
        padded: has a border of kernel // 2 rows and columns.
    """
    rows, columns = padded.shape[0] - kernel + 1, padded.shape[1] - kernel + 1
    if kernel == 1:
        return padded.reshape(rows * columns, -1)
    parts = [padded[i : i + rows, j : j + columns] for i in range(kernel) for j in range(kernel)]
    return np.concatenate(parts, 2).reshape(rows * columns, -1)


def _strips(rows: int, values: int) -> list[tuple[int, int]]:
    """First rows and ends of strips of an image whose rows take so many values each."""
    step = max(1, STRIP // values)
    return [(top, min(top + step, rows)) for top in range(0, rows, step)]


def with_plane(x: Array, value: float) -> Array:
    """x with one more channel, of the same value everywhere."""
    return np.concatenate([x, np.full((*x.shape[:2], 1), value, np.float32)], 2)


def shaped(tensors: Mapping[str, Array], name: str, shape: tuple[int, ...]) -> Array:
    """A tensor, which must have this shape.

    Raises:
        KeyError: there is none of that name.
        ValueError: it has another shape.
    """
    found = tensors[name]
    if found.shape != shape:
        raise ValueError(f"{name} is {found.shape}, not {shape}")
    return found
