"""The trunk of g_s as a graph of OpenVINO's, made of a model's weights when it is loaded.

On CPUs with matrix units for bfloat16 it multiplies in that. OpenVINO then keeps all that is
between layers in bfloat16, too, and so would round what residual blocks add up again and again. But
what they add is small: it is added up by itself, and to what the first of them was given only where
a layer needs both.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as op

from archive_pipeline.pcdc.model_files import TransformConfig
from archive_pipeline.pcdc.reader.layers import SLOPE, Array, shaped
from archive_pipeline.pcdc.reader.synthesis import CELL_SAMPLES


class OpenVINOTrunk:
    """The layers of g_s between its first and the pixel shuffle at its end; a `Trunk`.

    Args:
        bfloat16: whether to multiply in that, else in float32.
        threads: how many may call it at once; each call is run by one thread.

    Raises:
        ValueError, KeyError: its weights are missing or of another shape.
    """

    def __init__(
        self, tensors: Mapping[str, Array], config: TransformConfig, bfloat16: bool, threads: int
    ) -> None:
        self._tensors = tensors
        self._config = config
        self._settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            "ENABLE_CPU_PINNING": False,  # other processes would be pinned to the same cores
        }
        self._lock = threading.Lock()
        self._here = self._compile()

    def __call__(self, x: Array) -> Array:
        """Features (h, w, width_16) to cells of pixels (2 h, 2 w, CELL_SAMPLES)."""
        with self._lock:
            if self._here.process != os.getpid():
                _of_parents.append(self._here)
                self._here = self._compile()
            here = self._here
        try:
            request = here.idle.pop()
        except IndexError:
            request = here.compiled.create_infer_request()
        [out] = request.infer([np.ascontiguousarray(x.transpose(2, 0, 1))[None]]).values()
        cells: Array = out[0].transpose(1, 2, 0)
        here.idle.append(request)
        return cells

    def _compile(self) -> _Compiled:
        model = _Graph(self._tensors).trunk(self._config)
        compiled = openvino.Core().compile_model(model, "CPU", self._settings)
        return _Compiled(os.getpid(), compiled, deque())


@dataclass(frozen=True)
class _Compiled:
    """A graph made ready in one process, and its requests that nobody waits for."""

    process: int
    compiled: openvino.CompiledModel
    idle: deque[openvino.InferRequest]


# OpenVINO's threads do not survive a fork, and without them nothing of it can be freed
_of_parents: list[_Compiled] = []


class _Graph:
    """Layers of a model as nodes (1, channels, rows, columns), by the names of their weights."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self.tensors = tensors

    def trunk(self, config: TransformConfig) -> openvino.Model:
        """All layers of the trunk."""
        name, deep, fine = "g_s.net", config.depth_16, config.depth_8
        given = op.parameter([1, config.width_16, -1, -1], np.float32)
        x = self.blocks(given, [f"{name}.{1 + i}" for i in range(deep)], config.width_16)
        x = self.conv(x, f"{name}.{deep + 1}", config.width_16, 4 * config.width_8)
        x = op.depth_to_space(x, "depth_first", 2)
        x = self.blocks(x, [f"{name}.{deep + 3 + i}" for i in range(fine)], config.width_8)
        last = f"{name}.{deep + 3 + fine}"
        x = self.conv(x, last, config.width_8, CELL_SAMPLES, config.edge_kernel)
        return openvino.Model([x], [given], "trunk")

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

    def conv(self, x: Any, name: str, cin: int, cout: int, kernel: int = 1) -> Any:
        weight = shaped(self.tensors, f"{name}.weight", (cout, cin, kernel, kernel))
        x = op.convolution(x, op.constant(weight), [1, 1], *2 * [2 * [kernel // 2]], [1, 1])
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
