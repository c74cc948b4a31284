#!/usr/bin/env bash
# OpenCV, PyTorch: bicubic resampling makes waves of a straight slope; Pillow's and GDAL's bicubic do not.
#
# Cubic convolution has a free parameter. With -0.5, as GDAL and Pillow have it, a plane stays a plane. With
# -0.75, as OpenCV's INTER_CUBIC and PyTorch's "bicubic" have it (`interpolate` and `grid_sample`), values
# are at most 4 % of a pixel's step off, too little to see in a picture, but the slope between them swings
# by a third, with the period of the old pixels: an elevation model that was enlarged or warped that way gets
# terraces, and its slopes, aspects and contours are those of the filter. And `antialias=True`, which should
# do nothing when a picture is enlarged, makes PyTorch take -0.5, so its two bicubics disagree there as
# well. PyTorch's page of `grid_sample` has the -0.75, that of `interpolate` neither; OpenCV's has none.
#
# Seen with torch 2.13.0, opencv-python-headless 5.0.0.93, Pillow 13.0.0, rasterio 1.4.4 (GDAL 3.10.3), numpy
# 2.4.6, Python 3.11, Linux x86-64: a slope of 1 enlarged four times has slopes
#   0.77 to 1.33   OpenCV, torch.interpolate, torch.grid_sample
#   1.00 to 1.00   torch.interpolate with antialias, Pillow, GDAL (read and warp)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.13.0" "opencv-python-headless==5.0.0.93" "pillow==13.0.0" "rasterio==1.4.4" "numpy==2.4.6"
cd "$folder"
venv/bin/python - <<'PYTHON'
import warnings

import cv2
import numpy as np
import rasterio
import torch
from PIL import Image
from rasterio.enums import Resampling
from rasterio.transform import Affine
from rasterio.warp import reproject
from torch.nn import functional as F

warnings.simplefilter("ignore")
SIDE, TIMES = 64, 4
LARGE = SIDE * TIMES
plane = np.tile(np.arange(SIDE, dtype=np.float32), (SIDE, 1))
tensor = torch.from_numpy(plane)[None, None]
grid = F.affine_grid(torch.eye(2, 3)[None], [1, 1, LARGE, LARGE], align_corners=False)
warped = np.zeros((LARGE, LARGE), np.float32)
reproject(
    plane, warped, src_transform=Affine.scale(TIMES), dst_transform=Affine.identity(),
    src_crs="EPSG:32615", dst_crs="EPSG:32615", resampling=Resampling.cubic,
)
with rasterio.MemoryFile() as memory:
    with memory.open(driver="GTiff", width=SIDE, height=SIDE, count=1, dtype="float32") as file:
        file.write(plane, 1)
    with memory.open() as file:
        read = file.read(1, out_shape=(LARGE, LARGE), resampling=Resampling.cubic)
waves = {
    "OpenCV resize": cv2.resize(plane, (LARGE, LARGE), interpolation=cv2.INTER_CUBIC),
    "torch interpolate": F.interpolate(tensor, scale_factor=TIMES, mode="bicubic")[0, 0].numpy(),
    "torch grid_sample": F.grid_sample(tensor, grid, "bicubic", align_corners=False)[0, 0].numpy(),
}
straight = {
    "torch interpolate, antialias": F.interpolate(
        tensor, scale_factor=TIMES, mode="bicubic", antialias=True
    )[0, 0].numpy(),
    "Pillow resize": np.asarray(
        Image.fromarray(plane).resize((LARGE, LARGE), Image.Resampling.BICUBIC)
    ),
    "GDAL read": read,
    "GDAL warp": warped,
}
print(f"torch {torch.__version__}, OpenCV {cv2.__version__}, GDAL {rasterio.__gdal_version__}")
true = (np.arange(LARGE) + 0.5) / TIMES - 0.5
inner = slice(10 * TIMES, -10 * TIMES)
for name, values in (waves | straight).items():
    row = values[LARGE // 2]
    off = np.abs(row - true)[inner].max()
    slopes = np.diff(row)[inner] * TIMES
    print(f"{name:28} slopes {slopes.min():.2f} to {slopes.max():.2f}, values off by {off:.3f}")
    if name in waves:
        assert slopes.min() < 0.8
        assert slopes.max() > 1.3
        assert off < 0.05
    else:
        assert np.abs(slopes - 1).max() < 1e-3
PYTHON
