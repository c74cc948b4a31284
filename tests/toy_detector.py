"""A deterministic detector in a format that Ultralytics runs: finds red and blue rectangles.

Connected patches of strong red are "car", of strong blue "person"; the confidence is how pure the
colour is, so blur lowers it. Patches closer than 16 pixels may be taken for one.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

NAMES = {0: "car", 1: "person"}


class ColourPatches(nn.Module):
    """(batch, 3, height, width) of 0 to 1 -> (batch, 4 + classes, 64): centre, size, scores."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = 8  # pixels of the grid on which patches are joined
        self.longest = 90  # cells of a patch

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], 6, 64)
        for k in range(x.shape[0]):
            red, green, blue = x[k, 0], x[k, 1], x[k, 2]
            found = 0
            for kind in range(2):
                if kind == 0:
                    strength = red - torch.maximum(green, blue)
                else:
                    strength = blue - torch.maximum(green, red)
                mask = strength > 0.5
                if not bool(mask.any()):
                    continue
                coarse = torch.max_pool2d(mask[None, None].float(), self.cell)
                count = coarse.numel()
                ids = torch.arange(1, count + 1).reshape(coarse.shape).float() * coarse
                for _ in range(self.longest):
                    ids = torch.max_pool2d(ids, 3, 1, 1) * coarse
                full = ids[0, 0].repeat_interleave(self.cell, 0).repeat_interleave(self.cell, 1)
                for value in torch.unique(ids):
                    patch = (full == value) & mask
                    area = int(patch.sum())
                    if float(value) == 0 or area < 64 or found == 64:
                        continue
                    rows, cols = torch.where(patch)
                    top, bottom = float(rows.min()), float(rows.max()) + 1
                    left, right = float(cols.min()), float(cols.max()) + 1
                    out[k, 0, found] = (left + right) / 2
                    out[k, 1, found] = (top + bottom) / 2
                    out[k, 2, found] = right - left
                    out[k, 3, found] = bottom - top
                    out[k, 4 + kind, found] = float(strength[patch].mean())
                    found += 1
        return out


def save_toy_detector(path: Path, size: int = 640) -> Path:
    """Write it as a TorchScript export with Ultralytics' metadata; returns the path."""
    about = {"task": "detect", "batch": 1, "imgsz": [size, size], "stride": 32, "names": NAMES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and what Ultralytics exports
        script = torch.jit.script(ColourPatches())
        torch.jit.save(script, str(path), _extra_files={"config.txt": json.dumps(about)})
    return path


COLOURS = {"car": (225, 25, 25), "person": (25, 25, 225)}
Objects = list[tuple[str, int, int, int, int]]  # name, left, top, width, height


def paint(pixels: NDArray[np.uint8], objects: Objects) -> NDArray[np.uint8]:
    """A copy of uint8 RGB pixels with rectangles that the detector finds."""
    painted = pixels.copy()
    for name, left, top, width, height in objects:
        painted[top : top + height, left : left + width] = COLOURS[name]
    return painted


def paint_frame(path: Path, objects: Objects, target: Path) -> Path:
    """Paint a JPEG frame and keep its EXIF and XMP."""
    with Image.open(path) as image:
        kept = {name: image.info[name] for name in ("exif", "xmp") if name in image.info}
        painted = Image.fromarray(paint(np.asarray(image), objects))
    target.parent.mkdir(parents=True, exist_ok=True)
    painted.save(target, quality=95, subsampling=0, **kept)
    return target


def write_labels(path: Path, objects: Objects, width: int, height: int) -> None:
    """Write a YOLO label file with the detector's class numbers."""
    numbers = {name: number for number, name in NAMES.items()}
    lines = [
        f"{numbers[name]} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}\n"
        for name, x, y, w, h in objects
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
