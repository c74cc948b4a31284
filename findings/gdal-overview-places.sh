#!/usr/bin/env bash
# GDAL: overviews made by nearest or gauss lie beside those made by average, by half of their pixel.
#
# A pixel of an overview covers the same ground whatever made it, so its value should be that of the middle.
# `average`, `bilinear` and `cubic` keep to that. `nearest` takes the upper left corner: at 1/16 what is seen
# lies 7.5 pixels of the full raster too far right and down. `gauss` errs to the other side. Labels over the
# picture that they were drawn on are apart as soon as one zooms out, and a count or an area at a reduced
# scale is taken beside where the full raster has it. Reading the same file reduced by nearest, but without
# overviews, is right. Nearest is the default of `gdaladdo` and of rasterio's `build_overviews`, and what
# GDAL's COG driver takes for palettes. gdaladdo's page says what each method computes, nothing of where.
#
# Seen with rasterio 1.4.4 (GDAL 3.10.3), numpy 2.4.6, Python 3.11, Linux x86-64, a raster whose values are
# column numbers; columns from the middle of an overview's pixel to its value, at 1/2, 1/4, 1/16:
#   average, bilinear, cubic 0, 0, 0   nearest -0.5, -1.5, -7.5   gauss +0.5, +1.5, +3.5
#   reduced while reading by nearest, no overviews: +0.5 at 1/16
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "rasterio==1.4.4" "numpy==2.4.6"
cd "$folder"
venv/bin/python - <<'PYTHON'
import numpy as np
import rasterio
from rasterio.enums import Resampling
from rasterio.transform import Affine

SIDE = 512
FACTORS = 2, 4, 16
columns = np.tile(np.arange(SIDE, dtype=np.float32), (SIDE, 1))
profile = {
    "driver": "GTiff", "width": SIDE, "height": SIDE, "count": 1, "dtype": "float32",
    "crs": "EPSG:32615", "transform": Affine(1, 0, 0, 0, -1, SIDE),
}


def off(values: np.ndarray, factor: int) -> float:
    """How far right of its own pixels' middles a reduced raster takes its values."""
    middles = factor * np.arange(values.shape[1]) + (factor - 1) / 2
    return float(np.median((values - middles)[2:-2, 2:-2]))


print("GDAL", rasterio.__gdal_version__)
seen = {}
for method in ("average", "bilinear", "cubic", "nearest", "gauss"):
    with rasterio.open("columns.tif", "w", **profile) as file:
        file.write(columns, 1)
    with rasterio.open("columns.tif", "r+") as file:
        file.build_overviews(FACTORS, Resampling[method])
    seen[method] = []
    for level, factor in enumerate(FACTORS):
        with rasterio.open("columns.tif", overview_level=level) as file:
            assert file.transform.a == factor
            seen[method].append(off(file.read(1), factor))
    print(f"{method:8} {seen[method]}")
with rasterio.open("columns.tif", "w", **profile) as file:
    file.write(columns, 1)
with rasterio.open("columns.tif") as file:
    reduced = off(file.read(1, out_shape=(SIDE // 16, SIDE // 16)), 16)
print("no overviews, read at 1/16 by nearest:", reduced)
for method in ("average", "bilinear", "cubic"):
    assert np.abs(seen[method]).max() < 0.01
assert seen["nearest"] == [-0.5, -1.5, -7.5]
assert min(seen["gauss"]) > 0.4
assert seen["gauss"][2] > 3
assert abs(reduced) <= 0.5
PYTHON
