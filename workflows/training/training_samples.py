"""What a training batch is made of: crops of images, image steps and block levels."""

from __future__ import annotations

import json
from pathlib import Path

import click
import cv2
import numpy as np
import torch
from torch import Tensor

from archive_pipeline.pcdc.constants import BLOCK, LEVEL_OFFSETS, MAX_IMAGE_STEP, MIN_IMAGE_STEP
from archive_pipeline.pcdc.transforms import expand_blocks, step_size

VALIDATION_SHARE = 25  # every 25th image is held out
SHRUNK = 0.6  # share of crops that are made smaller
SMALLEST_SCALE = 0.25  # of these
RECOLOURED = 0.2  # share of crops whose colours change
SATURATION = (0.6, 2.0)  # factors on their colourfulness
CONTRAST = (0.7, 1.5)  # and on their contrast
COLLAGES = 0.15  # share of crops set before a blurred one
DEFOCUS = (0.5, 12.0)  # its blur's standard deviation in pixels
CORNERS = (3, 9)  # of what stands before it, the upper end excluded
STROKE = (1, 12)  # pixels, the same
EVEN = 0.35  # share of image steps from the whole range alike


class Crops:
    """Random training crops from a file packed by `pack_crops.py`.

    Raises:
        click.ClickException: it holds too few images of at least `size` pixels.
    """

    def __init__(self, path: Path, size: int, seed: int) -> None:
        self.pixels = np.load(path, mmap_mode="r")
        index = json.loads(path.with_suffix(".json").read_text())
        large = [(i, e) for i, e in enumerate(index) if min(e[2:]) >= size]
        if len(large) < 2:  # one to validate with, one to train on
            raise click.ClickException(f"{path}: fewer than 2 images of at least {size} pixels")
        # counted over all images: crops of any size are held out from the same ones
        held_out = [i for i, _ in large if i % VALIDATION_SHARE == 0] or [large[0][0]]
        self.train = [e for i, e in large if i not in held_out]
        self.held_out = [e for i, e in large if i in held_out]
        # between per-image and per-pixel sampling, so that flights of small frames do not rule
        weight = np.sqrt([e[2] * e[3] for e in self.train])
        self.weight = weight / weight.sum()
        self.size = size
        self.rng = np.random.default_rng(seed)

    def _cut(self, entry: list, top: int, left: int, size: int) -> np.ndarray:
        _, offset, height, width = entry
        frame = self.pixels[offset : offset + height * width * 3].reshape(height, width, 3)
        return np.ascontiguousarray(frame[top : top + size, left : left + size])

    def batch(self, count: int) -> Tensor:
        """Return (count, 3, size, size) uint8, random in place, size, colours, flips, rotations.

        Most crops are made smaller, which is sharper than frames are at full size. Some
        get other colours, and some stand with a sharp outline before another one out of focus:
        of strong colours, edges and smooth grounds flights over land show few.
        """
        out = []
        for _ in range(count):
            crop = self._crop()
            if self.rng.random() < COLLAGES:
                crop = self._collage(crop, self._crop())
            out.append(crop)
        return torch.from_numpy(np.stack(out).transpose(0, 3, 1, 2).copy())

    def _crop(self) -> np.ndarray:
        """A random crop (size, size, 3)."""
        entry = self.train[self.rng.choice(len(self.train), p=self.weight)]
        size = self.size
        if self.rng.random() < SHRUNK:
            limit = min(self.size / SMALLEST_SCALE, *entry[2:])
            size = int(self.size * (limit / self.size) ** self.rng.random())
        top = int(self.rng.integers(entry[2] - size + 1))
        left = int(self.rng.integers(entry[3] - size + 1))
        crop = self._cut(entry, top, left, size)
        if size != self.size:
            crop = cv2.resize(crop, (self.size, self.size), interpolation=cv2.INTER_AREA)
        if self.rng.random() < RECOLOURED:
            crop = recolour(crop, self.rng)
        crop = np.rot90(crop, int(self.rng.integers(4)))
        return np.ascontiguousarray(crop[:, ::-1] if self.rng.random() < 0.5 else crop)

    def _collage(self, front: np.ndarray, back: np.ndarray) -> np.ndarray:
        """Set a polygon of one crop, or a line through it, before a blurred other one."""
        corners = self.rng.uniform(-0.25, 1.25, (int(self.rng.integers(*CORNERS)), 2)) * self.size
        outline = [np.rint(corners).astype(np.int32)]
        mask = np.zeros((self.size, self.size), np.uint8)
        if self.rng.random() < 0.5:
            cv2.fillPoly(mask, outline, 255, cv2.LINE_AA)
        else:
            thickness = int(self.rng.integers(*STROKE))
            cv2.polylines(mask, outline, False, 255, thickness, cv2.LINE_AA)
        blurred = cv2.GaussianBlur(back, (0, 0), np.exp(self.rng.uniform(*np.log(DEFOCUS))))
        share = mask[..., None] / np.float32(255)
        return np.rint(blurred + share * (front - blurred.astype(np.float32))).astype(np.uint8)

    def validation(self, count: int) -> Tensor:
        """The same (count, 3, size, size) uint8 crops of held-out images on every call."""
        rng = np.random.default_rng(1)
        out = []
        for i in range(count):
            entry = self.held_out[i % len(self.held_out)]
            top = int(rng.integers(entry[2] - self.size + 1))
            left = int(rng.integers(entry[3] - self.size + 1))
            out.append(self._cut(entry, top, left, self.size))
        return torch.from_numpy(np.stack(out).transpose(0, 3, 1, 2).copy())


def recolour(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Swap the channels of a crop (H, W, 3) at random and change its saturation and contrast."""
    swapped = crop[..., rng.permutation(3)].astype(np.float32)
    grey = swapped.mean(2, keepdims=True)
    middle = grey.mean()
    contrast, saturation = rng.uniform(*CONTRAST), rng.uniform(*SATURATION)
    changed = middle + contrast * (grey - middle + saturation * (swapped - grey))
    return np.rint(changed).clip(0, 255).astype(np.uint8)


def random_steps(count: int, generator: torch.Generator) -> Tensor:
    """Image steps (count,) of a batch, mostly spread evenly over a bell-shaped distribution.

    The rates users ask for are in the middle of the range, and a batch that always holds some of
    each has less noise in its gradient than independent draws. Some are drawn from the whole
    range: at its fine end the networks' own errors show, which cost bits at coarser steps too.
    """
    share = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    tail = torch.minimum(share, 1 - share)
    bell = torch.where(share < 0.5, (tail / 2).sqrt(), 1 - (tail / 2).sqrt()) ** 0.65
    place = torch.where(torch.rand(count, generator=generator) < EVEN, share, bell)
    span = MAX_IMAGE_STEP + 1 - MIN_IMAGE_STEP
    return (MIN_IMAGE_STEP + place * span).long().clamp(max=MAX_IMAGE_STEP)


def emphasis(image_step: Tensor) -> Tensor:
    """Weights of image steps: coarse ones cost few bits and shall be learned as well."""
    return step_size(image_step) / 32


def random_offsets(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Level offsets of a batch: none for half of the samples, random blocks for the others."""
    table = torch.tensor(LEVEL_OFFSETS)
    shape = (count, 1, -(-height // BLOCK), -(-width // BLOCK))
    levels = torch.randint(len(LEVEL_OFFSETS), shape, generator=generator)
    varied = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return expand_blocks(torch.where(varied, table[levels], 0), height, width)
