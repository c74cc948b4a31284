"""How much fine texture a decoded picture has, judged without any network.

Nothing here is trained on. Pictures are uint8 (height, width, 3) RGB, of at least 32 pixels a side.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from archive_pipeline.pcdc.constants import LUMA

BLOCK = 32  # pixels of the picture a side
OCTAVES = 3
ROUNDING = 1 / 12  # the variance that rounding to whole levels makes: less energy is none


def _luma(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Luma of the whole blocks of a picture."""
    height, width = (n // BLOCK * BLOCK for n in pixels.shape[:2])
    return np.ascontiguousarray(pixels[:height, :width].astype(np.float32) @ np.float32(LUMA))


def octave_energies(pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Mean square of each block's band-pass in the finest octaves, the finest first.

    The bands are those of a Laplacian pyramid (Burt and Adelson 1983) with the five-tap binomial.

    Returns:
        `OCTAVES` arrays (height // 32, width // 32), squared 8-bit levels.
    """
    picture, energies = _luma(pixels), []
    for octave in range(OCTAVES):
        smaller = cv2.pyrDown(picture)
        band = picture - cv2.pyrUp(smaller, dstsize=picture.shape[::-1])
        side = BLOCK >> octave
        rows, columns = (n // side for n in band.shape)
        blocks = np.square(band).reshape(rows, side, columns, side)
        energies.append(blocks.mean((1, 3)))
        picture = smaller
    return energies


def texture_errors(
    original: NDArray[np.uint8], decoded: NDArray[np.uint8]
) -> tuple[float, float, float]:
    """Mean absolute log2 ratio of the energies of blocks, by octave, the finest first.

    0 is the original's texture, 1 half or twice its energy.
    """
    first, second, third = (
        float(np.abs(np.log2((b + ROUNDING) / (a + ROUNDING))).mean())
        for a, b in zip(octave_energies(original), octave_energies(decoded), strict=True)
    )
    return first, second, third


def texture_error(original: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> float:
    """Mean of the finest two octaves' `texture_errors`."""
    return float(np.mean(texture_errors(original, decoded)[:2]))


def orientation_error(original: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> float:
    """Mean angle in degrees, 0..90, between the pictures' gradients, regardless of their sign.

    Places count as much as the original's gradient is long. Between unrelated pictures it is 45.
    """
    (ax, ay), (bx, by) = (
        [cv2.Sobel(picture, cv2.CV_32F, dx, 1 - dx) for dx in (1, 0)]
        for picture in (_luma(original), _luma(decoded))
    )
    turn = np.arctan2(np.abs(ax * by - ay * bx), np.abs(ax * bx + ay * by))
    weight = np.hypot(ax, ay)
    flat = np.hypot(bx, by) == 0  # no direction at all is as wrong as any
    turn[flat] = np.pi / 4
    total = float(weight.sum(dtype=np.float64))
    return float(np.degrees((turn * weight).sum(dtype=np.float64) / total)) if total else 0.0
