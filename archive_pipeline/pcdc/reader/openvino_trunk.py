"""The trunk of g_s by OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openvino
from openvino import opset13 as op

from archive_pipeline.pcdc.constants import CELL_SAMPLES
from archive_pipeline.pcdc.model_files import TransformConfig
from archive_pipeline.pcdc.reader.layers import Array
from archive_pipeline.pcdc.reader.openvino_graph import Graph, Runner


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
        self._run = Runner(lambda: _trunk(Graph(tensors), config), bfloat16, threads)

    def __call__(self, x: Array) -> Array:
        """Features (h, w, width_16) to cells of pixels (2 h, 2 w, CELL_SAMPLES)."""
        out = self._run(np.ascontiguousarray(x.transpose(2, 0, 1))[None])
        cells: Array = out[0].transpose(1, 2, 0)
        return cells


def _trunk(graph: Graph, config: TransformConfig) -> openvino.Model:
    name, deep, fine = "g_s.net", config.depth_16, config.depth_8
    given = op.parameter([1, config.width_16, -1, -1], np.float32)
    x = graph.blocks(given, [f"{name}.{1 + i}" for i in range(deep)], config.width_16)
    x = graph.conv(x, f"{name}.{deep + 1}", config.width_16, 4 * config.width_8)
    x = op.depth_to_space(x, "depth_first", 2)
    x = graph.blocks(x, [f"{name}.{deep + 3 + i}" for i in range(fine)], config.width_8)
    last = f"{name}.{deep + 3 + fine}"
    x = graph.conv(x, last, config.width_8, CELL_SAMPLES, config.edge_kernel)
    return openvino.Model([x], [given], "trunk")
