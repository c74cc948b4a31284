"""Training crops that know where their objects are, from `pack_crops.py` and `find_objects.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import click
import cv2
import numpy as np
from numpy.typing import NDArray
from training_samples import recolour

from archive_pipeline.detection.boxes import Boxes
from archive_pipeline.detection.object_blocks import object_blocks

SCALES = (0.5, 1.4)  # of crops; objects are seen from many heights
RECOLOURED = 0.3  # share of crops whose colours change
CENTRED = 0.6  # share of crops with an object in them


@dataclass(frozen=True)
class ObjectCrop:
    """A crop with its objects.

    Attributes:
        pixels: uint8 (size, size, 3).
        objects, unsure: bool (B_h, B_w), blocks with objects, and with what may be objects.
    """

    pixels: NDArray[np.uint8]
    objects: NDArray[np.bool_]
    unsure: NDArray[np.bool_]


class ObjectCrops:
    """Random crops.

    Args:
        path: of the packed images.
        objects: of the file with their objects.
        holdout: patterns of names of images that are not trained on.
        held_out: whether to draw from those images instead.

    Raises:
        click.ClickException: there is no image to draw from.
    """

    def __init__(
        self,
        path: Path,
        objects: Path,
        size: int,
        holdout: tuple[str, ...] = (),
        held_out: bool = False,
    ) -> None:
        self.pixels = np.load(path, mmap_mode="r")
        known = json.loads(objects.read_text())
        index = [
            e
            for e in json.loads(path.with_suffix(".json").read_text())
            if e[0] in known and any(fnmatch(e[0], p) for p in holdout) == held_out
        ]
        self.size = size
        self.images = [e for e in index if min(e[2:]) >= size]
        if not self.images:
            raise click.ClickException(f"{objects}: no image of {size} pixels to draw from")
        self.boxes: list[dict[str, Boxes]] = [
            {kind: np.reshape(boxes, (-1, 4)) for kind, boxes in known[e[0]].items()}
            for e in self.images
        ]
        counts = np.sqrt([len(found["sure"]) for found in self.boxes])
        areas = np.sqrt([e[2] * e[3] for e in self.images])
        self.by_objects = counts / counts.sum() if counts.any() else None
        self.by_area = areas / areas.sum()

    def crop(self, rng: np.random.Generator) -> ObjectCrop:
        """A crop, random in place, scale, colours, flips and rotations."""
        centred = self.by_objects is not None and rng.random() < CENTRED
        i = int(rng.choice(len(self.images), p=self.by_objects if centred else self.by_area))
        _, offset, height, width = self.images[i]
        scale = np.exp(rng.uniform(*np.log(SCALES)))
        side = min(round(self.size / scale), height, width)
        top, left = (float(rng.uniform(0, whole - side)) for whole in (height, width))
        if centred:
            box = self.boxes[i]["sure"][rng.integers(len(self.boxes[i]["sure"]))]
            x, y = rng.uniform(box[:2], box[2:])
            top, left = y - side * rng.uniform(0.05, 0.95), x - side * rng.uniform(0.05, 0.95)
        top = int(np.clip(top, 0, height - side))
        left = int(np.clip(left, 0, width - side))
        frame = self.pixels[offset : offset + height * width * 3].reshape(height, width, 3)
        pixels = np.ascontiguousarray(frame[top : top + side, left : left + side])
        method = cv2.INTER_AREA if side > self.size else cv2.INTER_CUBIC
        pixels = cv2.resize(pixels, (self.size, self.size), interpolation=method)
        if rng.random() < RECOLOURED:
            pixels = recolour(pixels, rng)
        shift = np.array([left, top, left, top])
        turns, flipped = int(rng.integers(4)), rng.random() < 0.5
        factor = self.size / side
        parts = [
            self._turned((self.boxes[i][kind] - shift) * factor, turns, flipped)
            for kind in ("sure", "unsure")
        ]
        pixels = np.rot90(pixels, turns)
        pixels = np.ascontiguousarray(pixels[:, ::-1] if flipped else pixels)
        sure, unsure = (object_blocks(boxes, *pixels.shape[:2]) for boxes in parts)
        return ObjectCrop(pixels, sure, unsure & ~sure)

    def _turned(self, boxes: Boxes, turns: int, flipped: bool) -> Boxes:
        """Boxes after np.rot90 and a flip from left to right."""
        for _ in range(turns):  # to the left: (x, y) comes to lie at (y, size - x)
            x0, y0, x1, y1 = boxes.T
            boxes = np.stack([y0, self.size - x1, y1, self.size - x0], 1)
        if flipped:
            x0, y0, x1, y1 = boxes.T
            boxes = np.stack([self.size - x1, y0, self.size - x0, y1], 1)
        return boxes
