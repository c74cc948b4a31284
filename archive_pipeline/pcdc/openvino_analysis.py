"""g_a by OpenVINO, which runs it on CPUs in less time than PyTorch does.

Its last layer and its shortcut, which have many digits, stay PyTorch's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openvino
import torch
from openvino import opset13 as op
from torch import Tensor
from torch.nn import functional as F

from archive_pipeline.pcdc.constants import CELL, CELL_SAMPLES, LATENT_GAIN, STRIDE
from archive_pipeline.pcdc.model_files import TransformConfig
from archive_pipeline.pcdc.reader.layers import Array
from archive_pipeline.pcdc.reader.openvino_graph import Graph, Runner
from archive_pipeline.pcdc.transforms import Analysis


class OpenVINOAnalysis:
    """g_a of one model, without gradients.

    Args:
        g_a: the same network, whose last layer and shortcut are run.
        tensors: the model's weights by name, float32.
        bfloat16: whether to multiply in that, else in float32.
        threads: how many may call it at once; each call is run by one thread.
    """

    def __init__(
        self,
        g_a: Analysis,
        tensors: Mapping[str, Array],
        config: TransformConfig,
        bfloat16: bool,
        threads: int,
    ) -> None:
        self._g_a = g_a
        self._border = [config.edge_kernel // 2] * 4
        self._run = Runner(lambda: _analysis(Graph(tensors), config), bfloat16, threads)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Pixels (1, 3, H, W) in -1..1, H and W multiples of 16, to y (1, M, H/16, W/16)."""
        cells = F.pixel_unshuffle(x, CELL)
        if any(self._border):
            cells = F.pad(cells, self._border, mode="replicate")
        features = torch.from_numpy(self._run(cells.contiguous().numpy()))
        y = self._g_a.net[-1](features)
        if self._g_a.shortcut is not None:
            y = y + self._g_a.shortcut(F.pixel_unshuffle(x, STRIDE))
        return y * LATENT_GAIN


def _analysis(graph: Graph, config: TransformConfig) -> openvino.Model:
    """Padded cells (1, CELL_SAMPLES, rows, columns) to features of latents."""
    name, fine, coarse = "g_a.net", config.width_8, config.width_16
    given = op.parameter([1, CELL_SAMPLES, -1, -1], np.float32)
    x = graph.conv(given, f"{name}.1", CELL_SAMPLES, fine, config.edge_kernel, pad=False)
    at = 2 + config.depth_8
    x = graph.blocks(x, [f"{name}.{i}" for i in range(2, at)], fine)
    # space to depth and what follows it are one convolution
    x = graph.conv_of_cells(x, f"{name}.{at + 1}", fine, coarse, 2)
    deep = config.depth_16 + config.extra_depth_16
    x = graph.blocks(x, [f"{name}.{at + 2 + i}" for i in range(deep)], coarse)
    return openvino.Model([x], [given], "analysis")
