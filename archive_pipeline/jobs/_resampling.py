"""Pixels, some of them unknown, at other places and sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def shrink(
    values: npt.NDArray[Any], known: npt.NDArray[np.bool_], factor: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Average the known pixels of squares of ``factor`` x ``factor``; known if half of them are."""
    height, width, bands = values.shape
    grow = ((0, -height % factor), (0, -width % factor))
    weights = np.pad(known, grow).astype(values.dtype)
    values = np.pad(np.where(known[..., None], values, 0), (*grow, (0, 0)))
    shape = (values.shape[0] // factor, factor, values.shape[1] // factor, factor)
    total = weights.reshape(shape).sum(axis=(1, 3))
    summed = values.reshape(*shape, bands).sum(axis=(1, 3))
    # Squares at the far edge are only partly inside the image.
    inside = np.pad(np.ones((height, width)), grow).reshape(shape).sum(axis=(1, 3))
    return summed / np.maximum(total, 1)[..., None], total * 2 >= inside


def catmull_rom(
    values: npt.NDArray[Any], known: npt.NDArray[np.bool_], cols: Array, rows: Array
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Interpolate (h, w, bands) values at n positions in pixel centres, edges replicated.

    Returns (bands, n) of the values' type, and which are known (n,).
    """
    height, width, bands = values.shape
    planes = np.ascontiguousarray(np.moveaxis(values, 2, 0)).reshape(bands, -1)
    flags = known.ravel()
    left, top = np.floor(cols).astype(np.intp), np.floor(rows).astype(np.intp)
    across = _cubic_weights((cols - left).astype(values.dtype))
    down = _cubic_weights((rows - top).astype(values.dtype))
    columns = [np.clip(left + n, 0, width - 1) for n in (-1, 0, 1, 2)]
    lines = [np.clip(top + n, 0, height - 1) * width for n in (-1, 0, 1, 2)]
    result = np.zeros((bands, len(cols)), values.dtype)
    whole = known.all()
    complete = np.ones(len(cols), bool)
    with np.errstate(invalid="ignore"):
        for line, vertical in zip(lines, down, strict=True):
            for column, horizontal in zip(columns, across, strict=True):
                index = line + column
                weight = vertical * horizontal
                for band, plane in zip(result, planes, strict=True):
                    band += plane.take(index) * weight
                if not whole:
                    complete &= flags[index]
    if whole:
        return result, complete
    nearest = np.where(rows - top < 0.5, lines[1], lines[2])
    nearest = nearest + np.where(cols - left < 0.5, columns[1], columns[2])
    result[:, ~complete] = planes[:, nearest[~complete]]
    return result, flags[nearest]


def _cubic_weights(t: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
    return (
        ((-0.5 * t + 1.0) * t - 0.5) * t,
        (1.5 * t - 2.5) * t * t + 1.0,
        ((-1.5 * t + 2.0) * t + 0.5) * t,
        (0.5 * t - 0.5) * t * t,
    )
