"""An archived image as xarray has it: bands first, placed, decoded where it is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from xarray.backends import BackendArray
from xarray.core import indexing

from archive_pipeline.geo.georef import Affine6, Georef

if TYPE_CHECKING:
    import xarray

    from archive_pipeline.store.archived_image import ArchivedImage


class _Bands(BackendArray):
    """Pixels (band, y, x) of an image, read by window.

    Args:
        image: open for reading.
    """

    def __init__(self, image: ArchivedImage) -> None:
        record = image.entry.record
        self._image = image
        self.shape = (record["bands"], record["height"], record["width"])
        self.dtype = np.dtype(record["dtype"])

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        basic = indexing.IndexingSupport.BASIC
        return indexing.explicit_indexing_adapter(key, self.shape, basic, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        """What whole numbers and slices along all three axes choose."""
        (top, bottom, rows), (left, right, columns) = (
            _covering(part, size) for part, size in zip(key[1:], self.shape[1:], strict=True)
        )
        if top == bottom or left == right:
            return np.empty(self.shape, self.dtype)[key]
        pixels = self._image.read((left, top, right - left, bottom - top))
        return np.moveaxis(pixels, 2, 0)[(key[0], rows, columns)]


def _covering(part: int | slice, size: int) -> tuple[int, int, int | slice]:
    """First and last of what an index chooses along an axis, and the index within these."""
    chosen = range(size)[part]
    if isinstance(chosen, int):
        return chosen, chosen + 1, 0
    if not len(chosen):
        return 0, 0, slice(0, 0)
    first, last = min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1])
    return first, last + 1, slice(None, None, chosen.step)


def lazy_pixels(image: ArchivedImage) -> xarray.DataArray:
    """A DataArray (band, y, x) of an image; nothing is decoded before it is looked at."""
    import xarray

    bands = _Bands(image)
    georef = Georef.from_json(image.entry.record["georef"])
    variable = xarray.Variable(("band", "y", "x"), indexing.LazilyIndexedArray(bands))
    return xarray.DataArray(variable, coordinates(georef, *bands.shape))


def coordinates(georef: Georef, bands: int, height: int, width: int) -> dict[str, Any]:
    """Coordinates as rioxarray writes and reads them.

    Those of pixel centres, x and y, are there where rows and columns run along the CRS' axes.
    """
    import xarray
    from pyproj import CRS

    found: dict[str, Any] = {"band": np.arange(1, bands + 1)}
    if georef.crs is None or georef.transform is None:
        return found
    transform: Affine6 = georef.transform
    a, b, c, d, e, f = transform
    reference = {"crs_wkt": CRS.from_user_input(georef.crs).to_wkt()}
    reference["GeoTransform"] = " ".join(repr(n) for n in (c, a, b, f, d, e))
    found["spatial_ref"] = xarray.Variable((), 0, reference)
    if b == d == 0:
        found["x"] = c + a * (np.arange(width) + 0.5)
        found["y"] = f + e * (np.arange(height) + 0.5)
    return found
