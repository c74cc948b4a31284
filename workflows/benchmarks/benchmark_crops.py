"""Crops of images that a benchmark judges: the same ones for the same seed, everywhere."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from metrics import MIN_SIDE
from numpy.typing import NDArray
from PIL import Image

WHOLE = 1.5  # images of at most so many crops' sides are taken whole
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")

Pixels = NDArray[np.uint8]


class CropError(ValueError):
    """A folder cannot be cropped."""


@dataclass(frozen=True)
class Crop:
    """A rectangle of an image at native (scale 1) or half size (scale 2), in that size's pixels."""

    set: str
    path: Path
    divisor: int
    col: int
    row: int
    width: int
    height: int

    @property
    def scale(self) -> str:
        return "half" if self.divisor == 2 else "native"

    @property
    def id(self) -> str:
        return f"{self.path.stem}_x{self.col}_y{self.row}"

    @property
    def key(self) -> tuple[str, str, str]:
        return self.set, self.scale, self.id

    def read(self) -> Pixels:
        """Return the pixels, uint8 (height, width, 3)."""
        image = read_image(self.path, self.divisor)
        part = image[self.row : self.row + self.height, self.col : self.col + self.width]
        return part.copy()


@lru_cache(maxsize=1)
def read_image(path: Path, divisor: int) -> Pixels:
    """Return an image's RGB pixels, averaged over squares of `divisor` pixels."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").reduce(divisor))


def images_of(name: str, folder: Path) -> list[Path]:
    """A set's images, by name.

    Raises:
        CropError: there are none.
    """
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)
    if not files:
        raise CropError(f"{name}: no images in {folder}")
    return files


def choose_crops(name: str, folder: Path, count: int, size: int, seed: int) -> list[Crop]:
    """Choose at most `count` crops of each scale; a larger count keeps those of a smaller one.

    Raises:
        CropError: the folder holds no images, or one that is too small to judge.
    """
    files = images_of(name, folder)
    sizes = []
    for path in files:
        try:
            with Image.open(path) as image:
                sizes.append(image.size)
        except OSError as error:
            raise CropError(f"{name}: {path.name} cannot be read") from error
        if min(sizes[-1]) < MIN_SIDE:
            raise CropError(f"{name}: {path.name} is smaller than {MIN_SIDE} pixels")
    crops = []
    for divisor in (1, 2):
        rng = np.random.default_rng([seed, divisor, zlib.crc32(name.encode())])
        order = rng.permutation(len(files))
        for k in range(count):
            which = order[k % len(files)]
            width, height = sizes[which]
            if max(width, height) <= WHOLE * size:
                if divisor == 1:
                    crops.append(Crop(name, files[which], 1, 0, 0, width, height))
                continue
            # as Image.reduce rounds, less what it averages over fewer pixels
            width, height = width // divisor, height // divisor
            w, h = min(size, width), min(size, height)
            if min(w, h) >= MIN_SIDE:
                col, row = rng.integers(0, [width - w + 1, height - h + 1]).tolist()
                crops.append(Crop(name, files[which], divisor, col, row, w, h))
    return list(dict.fromkeys(crops))
