"""How numbers are written, also those that NumPy has no type for: fewer bits, complex integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from archive_pipeline.flight.raster import Pixels
from archive_pipeline.flight.source_image import COMPLEX_INTEGERS, SourceImage
from archive_pipeline.outputs._blocks import block_side

UNPACKED_BYTES = 256 << 20  # of a temporary file


def sample_options(source: SourceImage, alpha: bool) -> dict[str, Any]:
    """Options of rasterio's creation profile for a source's numbers.

    Args:
        alpha: the file has it as a band, which takes all bits.
    """
    dtype = COMPLEX_INTEGERS if source.complex_integers else source.dtype
    few = source.bits is not None and not alpha
    return {"dtype": dtype, **({"nbits": source.bits} if few else {})}


def stored_blocks(profile: dict[str, Any]) -> int:
    """Pixels a side of a file's blocks."""
    return block_side(profile["count"], _numpy_type(profile).name)


def packing(profile: dict[str, Any], palette: bool) -> dict[str, Any]:
    """Options of GDAL's COG driver for numbers as a creation profile has them.

    Args:
        palette: they are classes.
    """
    bits = {"nbits": profile["nbits"]} if "nbits" in profile else {}
    plain = palette or bits or _numpy_type(profile).kind not in "uif"
    level = {"level": 1} if is_photograph(profile) else {}
    return {**bits, **level, "predictor": "NO" if plain else "YES"}


def is_photograph(profile: dict[str, Any]) -> bool:
    """Whether it is 8-bit RGB, whose noise packing harder makes little smaller."""
    return profile["photometric"] == "RGB" and _numpy_type(profile) == np.uint8


def staging(profile: dict[str, Any]) -> dict[str, Any]:
    """Options of a temporary GeoTIFF: what is large is packed, as disks are small."""
    pixel = profile["count"] * _numpy_type(profile).itemsize
    small = profile["width"] * profile["height"] * pixel <= UNPACKED_BYTES
    return {} if small else {"compress": "ZSTD", "zstd_level": 1}


def as_shown(source: SourceImage, pixels: Pixels) -> Pixels:
    """Unsigned pixels as formats have them that know no white zero."""
    white = np.iinfo(pixels.dtype).max if source.bits is None else (1 << source.bits) - 1
    return white - pixels if source.white_is_zero else pixels


def _numpy_type(profile: dict[str, Any]) -> np.dtype[Any]:
    dtype = profile["dtype"]
    return np.dtype("complex64" if dtype == COMPLEX_INTEGERS else dtype)
