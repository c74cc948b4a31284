"""Graphs of OpenVINO's, made of a model's weights when it is loaded.

On CPUs with matrix units for bfloat16 they multiply in that. OpenVINO then keeps all that is
between layers in bfloat16, too, and so would round what residual blocks add up again and again. But
what they add is small: it is added up by itself, and to what the first of them was given only where
a layer needs both.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as op

from archive_pipeline.pcdc.reader.layers import SLOPE, Array, shaped


class Runner:
    """Runs a graph of one output; that and its inputs are (1, channels, rows, columns) float32.

    Args:
        build: makes the graph.
        bfloat16: whether to multiply in that, else in float32.
        threads: how many may call it at once; each call is run by one thread.

    Raises:
        ValueError, KeyError: the weights are missing or of another shape.
    """

    def __init__(self, build: Callable[[], openvino.Model], bfloat16: bool, threads: int) -> None:
        self._build = build
        self._settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            "ENABLE_CPU_PINNING": False,  # other processes would be pinned to the same cores
        }
        self._lock = threading.Lock()
        self._here = self._compile()

    def __call__(self, *inputs: Array) -> Array:
        """What the graph makes of its inputs."""
        with self._lock:
            if self._here.process != os.getpid():
                _of_parents.append(self._here)
                self._here = self._compile()
            here = self._here
        try:
            request = here.idle.pop()
        except IndexError:
            request = here.compiled.create_infer_request()
        [out] = request.infer([*inputs]).values()
        here.idle.append(request)
        return out

    def _compile(self) -> _Compiled:
        compiled = openvino.Core().compile_model(self._build(), "CPU", self._settings)
        return _Compiled(os.getpid(), compiled, deque())


@dataclass(frozen=True)
class _Compiled:
    """A graph made ready in one process, and its requests that nobody waits for."""

    process: int
    compiled: openvino.CompiledModel
    idle: deque[openvino.InferRequest]


# OpenVINO's threads do not survive a fork, and without them nothing of it can be freed
_of_parents: list[_Compiled] = []


class Graph:
    """Layers of a model as nodes (1, channels, rows, columns), by the names of their weights."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self.tensors = tensors

    def blocks(self, given: Any, names: list[str], channels: int) -> Any:
        """Residual blocks, one after another."""
        added = None
        for name in names:
            for branch in (self.spatial, self.mix):
                x = given if added is None else op.add(given, added)
                out = branch(x, name, channels)
                added = out if added is None else op.add(added, out)
        return op.add(given, added)

    def spatial(self, x: Any, name: str, channels: int) -> Any:
        x = self.leaky_relu(self.conv(x, f"{name}.spatial.0", channels, channels))
        x = self.depthwise(x, f"{name}.spatial.2", channels)
        return self.conv(x, f"{name}.spatial.3", channels, channels)

    def mix(self, x: Any, name: str, channels: int) -> Any:
        x = self.leaky_relu(self.conv(x, f"{name}.mix.0", channels, 2 * channels))
        return self.conv(x, f"{name}.mix.2", 2 * channels, channels)

    def conv(
        self, x: Any, name: str, cin: int, cout: int, kernel: int = 1, pad: bool = True
    ) -> Any:
        weight = shaped(self.tensors, f"{name}.weight", (cout, cin, kernel, kernel))
        border = [kernel // 2 if pad else 0] * 2
        x = op.convolution(x, op.constant(weight), [1, 1], border, border, [1, 1])
        return self.with_bias(x, name, cout)

    def conv_of_cells(self, x: Any, name: str, cin: int, cout: int, side: int) -> Any:
        """A layer of kernel 1 over what a pixel unshuffle by `side` makes of x."""
        weight = shaped(self.tensors, f"{name}.weight", (cout, cin * side**2, 1, 1))
        cells = op.constant(weight.reshape(cout, cin, side, side))
        x = op.convolution(x, cells, [side, side], [0, 0], [0, 0], [1, 1])
        return self.with_bias(x, name, cout)

    def depthwise(self, x: Any, name: str, channels: int) -> Any:
        weight = shaped(self.tensors, f"{name}.weight", (channels, 1, 3, 3))
        weights = op.constant(np.ascontiguousarray(weight[:, None]))
        x = op.group_convolution(x, weights, [1, 1], [1, 1], [1, 1], [1, 1])
        return self.with_bias(x, name, channels)

    def with_bias(self, x: Any, name: str, channels: int) -> Any:
        bias = shaped(self.tensors, f"{name}.bias", (channels,))
        return op.add(x, op.constant(bias.reshape(1, channels, 1, 1)))

    def leaky_relu(self, x: Any) -> Any:
        return op.prelu(x, op.constant(np.array([SLOPE])))
