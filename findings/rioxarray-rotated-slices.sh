#!/usr/bin/env bash
# rioxarray: what is cut from a rotated raster is written at the place of the whole.
#
# A north-up raster opens with coordinates x and y, and a slice's transform comes from its own. A rotated
# one (an aerial frame with a yaw) opens with xc and yc of two dimensions, which are right and are sliced
# along. But `rio.transform()` and `rio.to_raster` do not look at them: they take the whole raster's
# transform, which slices, steps and `coarsen` leave as it was. So a window is saved at the whole's corner,
# and a raster reduced by half with pixels of the old size. to_raster warns that it is "unable to
# recalculate", in the same words where the whole is written, which is right. `rio.bounds()` multiplies the
# size of the first row and column as if nothing were turned, without a warning, so that most of the ground
# of the whole raster, too, is outside. Cut with `rio.isel_window`, which keeps the transform, or write it
# anew: `rio.write_transform(transform @ Affine.translation(col, row))`. Issue 847 is about the bounds.
#
# Seen with rioxarray 0.19.0, xarray 2026.9.0, rasterio 1.4.4, affine 3.0.1, Python 3.11, Linux x86-64: pixels
# of 0.5 m, a window 20 m and 10 m off the corner. Of the raster turned by 30 degrees its file is 22.4 m from
# where it belongs, of the same raster north-up 0.0 m; reduced by half 0.50 m a pixel, and 1.00; the bounds
# hold 32 % of the raster's ground, and 100 %. rioxarray 0.23.0, for newer Pythons, does the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "rioxarray==0.19.0" "xarray==2026.9.0" "rasterio==1.4.4" "affine==3.0.1" "numpy==2.4.6"
cd "$folder"
venv/bin/python - <<'PYTHON'
import math
import warnings

import numpy as np
import rasterio
import rioxarray
import xarray as xr
from rasterio.transform import Affine
from rasterio.windows import Window

warnings.simplefilter("ignore")
WIDTH, HEIGHT, COL, ROW = 120, 100, 40, 20
pixels = np.random.default_rng(0).integers(1, 255, (1, HEIGHT, WIDTH), dtype=np.uint8)


def written(array: xr.DataArray) -> Affine:
    array.rio.to_raster("part.tif")
    with rasterio.open("part.tif") as file:
        return file.transform


seen = {}
for degrees in (0, 30):
    place = (
        Affine.translation(500_000, 5_000_000) @ Affine.rotation(degrees) @ Affine.scale(0.5, -0.5)
    )
    with rasterio.open(
        "whole.tif", "w", driver="GTiff", width=WIDTH, height=HEIGHT, count=1, dtype="uint8",
        crs="EPSG:32615", transform=place,
    ) as file:
        file.write(pixels)
    whole = rioxarray.open_rasterio("whole.tif")
    window = whole.isel(x=slice(COL, None), y=slice(ROW, None))
    found, belongs = written(window), place @ Affine.translation(COL, ROW)
    away = math.hypot(found.c - belongs.c, found.f - belongs.f)
    own = written(whole.rio.isel_window(Window(COL, ROW, WIDTH - COL, HEIGHT - ROW)))
    assert own.almost_equals(belongs, 1e-6)
    half = written(whole.coarsen(x=2, y=2).mean())
    left, bottom, right, top = whole.rio.bounds()
    cols, rows = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    x, y = place.a * cols + place.b * rows + place.c, place.d * cols + place.e * rows + place.f
    inside = ((x > left) & (x < right) & (y > bottom) & (y < top)).mean()
    seen[degrees] = away, math.hypot(half.a, half.d), inside
    print(
        f"turned by {degrees}: coordinates {sorted(set(whole.coords) - {'band', 'spatial_ref'})}, "
        f"window {away:.1f} m off, {seen[degrees][1]:.2f} m a pixel after halving, "
        f"bounds hold {inside:.0%} of the ground"
    )
    if degrees:  # the coordinates themselves are right
        corner = belongs @ (0.5, 0.5)
        assert abs(float(window.xc[0, 0]) - corner[0]) < 1e-6
        assert abs(float(window.yc[0, 0]) - corner[1]) < 1e-6
assert np.allclose(seen[0], (0, 1, 1))
assert seen[30][0] > 20
assert abs(seen[30][1] - 0.5) < 1e-6
assert seen[30][2] < 0.7
PYTHON
