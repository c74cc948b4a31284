"""GDAL for files of this machine."""

from __future__ import annotations

import rasterio
from rasterio.session import DummySession


def local_env(**options: object) -> rasterio.Env:
    """Settings of GDAL for files of this machine, in a `with` statement.

    Where there are keys for S3 in the environment, rasterio would take 10 ms each time to hand
    them to GDAL, which needs none.
    """
    return rasterio.Env(session=DummySession(), **options)
