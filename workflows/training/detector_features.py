"""What a detector makes of pixels: distances between its features, as a term of stage 1's loss."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
from openvino_weights import load_network

STAGES = (2, 4, 6)  # layers of YOLO11 and YOLO12 that end the backbone's stages at 1/4, 1/8, 1/16


class DetectorFeatures(nn.Module):
    """The first stages of a YOLO detector's backbone."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.layers = detector.model[: STAGES[-1] + 1].float().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of (N, 3, H, W) in -1..1, of unit length at every place."""
        x, found = x / 2 + 0.5, []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in STAGES:
                found.append(F.normalize(x, dim=1, eps=1e-6))
        return found

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean squared distance of the features of (N, 3, H, W), (N,); differentiable in both."""
        pairs = zip(self(a), self(b), strict=True)
        return torch.stack([(x - y).square().sum(1).mean((1, 2)) for x, y in pairs]).mean(0)


def load_features(detector: str, crops: Tensor) -> DetectorFeatures:
    """Features of a YOLO11 or YOLO12 detector, as `load_network` takes it.

    Args:
        crops: uint8 (N, 3, H, W), any images of the kind it is used for: an export's batch
            normalisation is made anew from them.

    Raises:
        click.ClickException: there is no such detector.
    """
    return DetectorFeatures(load_network(detector, [crops.float() / 255]))
