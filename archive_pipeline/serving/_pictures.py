"""Pixels of any kind as pictures: 8-bit RGB with validity, as PNG, JPEG or WebP."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

JPEG_QUALITY, WEBP_QUALITY = 85, 85
WHITE = 255


def encoded(rgb: NDArray[np.uint8], alpha: NDArray[np.uint8] | None, kind: str) -> bytes:
    """A picture as a file.

    Args:
        rgb: (height, width, 3).
        alpha: (height, width), 0 is transparent; None: opaque. JPEGs have white there.
        kind: "png", "jpg" or "webp".
    """
    if alpha is not None and alpha.min() == 255:
        alpha = None
    into = io.BytesIO()
    if kind == "jpg":
        if alpha is not None:
            share = alpha[..., None].astype(np.float32) / 255
            rgb = np.rint(rgb * share + WHITE * (1 - share)).astype(np.uint8)
        Image.fromarray(rgb).save(into, "JPEG", quality=JPEG_QUALITY)
        return into.getvalue()
    pixels = rgb if alpha is None else np.dstack([rgb, alpha])
    picture = Image.fromarray(pixels)
    if kind == "webp":
        picture.save(into, "WEBP", quality=WEBP_QUALITY, method=2)
    else:
        picture.save(into, "PNG", compress_level=3)
    return into.getvalue()
