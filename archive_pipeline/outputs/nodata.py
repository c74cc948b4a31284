"""Nodata values of pixels that are written: which can be, and which pixels must not have them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from archive_pipeline.flight.raster import Pixels


def avoid_nodata(pixels: Pixels, valid: npt.NDArray[np.bool_], nodata: float) -> None:
    """Move valid pixels that equal nodata in every band by one level in the last, in place.

    Args:
        pixels: integers (height, width, bands).
        valid: bool (height, width).
        nodata: a value that the pixels' type can hold.
    """
    level = pixels.dtype.type(nodata)
    collides = valid & (pixels == level).all(axis=2)
    step = -1 if level == np.iinfo(pixels.dtype).max else 1
    pixels[..., -1][collides] = int(level) + step


def storable_nodata(nodata: float | None, dtype: str) -> float | int | None:
    """Return ``nodata`` if pixels of ``dtype`` can have that value, else ``None``.

    GDAL takes a nodata value outside the range of the type to match nothing; rasterio refuses it.

    Args:
        nodata: the value, may be NaN.
        dtype: numpy name of the pixel type.
    """
    if nodata is None or np.dtype(dtype).kind not in "iu":
        return nodata
    info = np.iinfo(dtype)
    if not math.isfinite(nodata) or nodata != int(nodata) or not info.min <= nodata <= info.max:
        return None
    return int(nodata)
