#!/usr/bin/env bash
# rasterio and Pillow: the same JPEG has other pixels, by dozens of levels, where chroma is subsampled.
#
# Pillow's wheels carry libjpeg-turbo, rasterio's carry the IJG's libjpeg 9. Both enlarge halved chroma, the
# former by a triangle filter between neighbours, the latter by a larger inverse DCT of each block by
# itself; both are within the standard. Of 4:4:4 pictures they agree within one level. So an original read
# by one and a copy read by the other differ by more than what moderate compression does to them, and a
# test for equal pixels, or a network trained with one and run with the other, must keep to one reader.
#
# Seen with rasterio 1.4.4, Pillow 13.0.0 (libjpeg-turbo 3.2.0), numpy 2.4.6, Python 3.11, Linux x86-64,
# quality 92: 4:4:4 at most 1 level apart, 4:2:0 up to 6 on a smooth picture (mean 0.4) and up to 79 on a
# noisy one (mean 6.2; 70 % of the values are more than 2 apart).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "rasterio==1.4.4" "pillow==13.0.0" "numpy==2.4.6"
cd "$folder"
venv/bin/python - <<'PYTHON'
import io
import warnings

import numpy as np
import rasterio
from PIL import Image, features

warnings.simplefilter("ignore")
rows, cols = np.mgrid[0:256, 0:256]
waves = np.sin(cols / 17), np.sin(rows / 23), np.cos((cols + rows) / 31)
smooth = 128 + 100 * np.stack(waves, 2)
noisy = smooth + np.random.default_rng(0).normal(0, 40, smooth.shape)


def apart(picture: np.ndarray, subsampling: str) -> np.ndarray:
    """How far both readers' values lie apart."""
    file = io.BytesIO()
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    image.save(file, "JPEG", quality=92, subsampling=subsampling)
    one = np.asarray(Image.open(file)).astype(int)
    with rasterio.MemoryFile(file.getvalue()) as memory, memory.open() as opened:
        other = opened.read().transpose(1, 2, 0).astype(int)
    return np.abs(one - other)


print("libjpeg-turbo of Pillow:", features.version("libjpeg_turbo"))
for name, picture in (("smooth", smooth), ("noisy", noisy)):
    full, halved = apart(picture, "4:4:4"), apart(picture, "4:2:0")
    print(
        f"{name}: 4:4:4 at most {full.max()} apart, 4:2:0 at most {halved.max()}, "
        f"mean {halved.mean():.2f}, {(halved > 2).mean():.0%} more than 2"
    )
    assert full.max() <= 1
    assert halved.max() >= 5
assert halved.max() > 50
assert halved.mean() > 4
PYTHON
