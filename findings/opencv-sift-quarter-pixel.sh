#!/usr/bin/env bash
# OpenCV: SIFT finds every point a quarter of a pixel too far right and too far down.
#
# Its first octave is the picture made twice as large. The enlarged grid begins half of its own pixels
# earlier, and `SIFT.create()` does not count that when it goes back to the picture's pixels. Matches
# between pictures of one size hide it, for all points move alike. It shows where points meet other
# coordinates: ground control, projections of a known camera, points of other detectors, or of a picture
# at half size, whose quarter of a pixel is half of one at full size. `enable_precise_upscale=True`, off by
# default in OpenCV 5, too, puts points where they are.
#
# Seen with opencv-python-headless 5.0.0.93, numpy 2.4.6, Python 3.11, Linux x86-64: 81 Gaussian spots at
# known places are found at +0.25, +0.25 px (medians), with the option at 0.00, 0.00.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "opencv-python-headless==5.0.0.93" "numpy==2.4.6"
cd "$folder"
venv/bin/python - <<'PYTHON'
import cv2
import numpy as np

SIDE = 400
rng = np.random.default_rng(0)
grid = np.stack(np.meshgrid(np.arange(40, 380, 40), np.arange(40, 380, 40)), -1).reshape(-1, 2)
places = grid + rng.uniform(-0.5, 0.5, grid.shape)  # pixel centres are whole numbers
rows, cols = np.mgrid[0:SIDE, 0:SIDE]
picture = np.full((SIDE, SIDE), 100.0)
for x, y in places:
    picture += 120 * np.exp(-((cols - x) ** 2 + (rows - y) ** 2) / (2 * 3.0**2))
picture = picture.astype(np.uint8)


def off(**options: bool) -> np.ndarray:
    """Median of how far points lie from the spots that they are of, x and y."""
    found = np.array([point.pt for point in cv2.SIFT.create(**options).detect(picture, None)])
    apart = found[None] - places[:, None]
    nearest = np.hypot(*apart.transpose(2, 0, 1)).argmin(1)
    own = apart[np.arange(len(places)), nearest]
    own = own[np.hypot(*own.T) < 1]
    assert len(own) == len(places)
    return np.median(own, axis=0)


plain, precise = off(), off(enable_precise_upscale=True)
print(f"OpenCV {cv2.__version__}: default {plain.round(3)}, precise {precise.round(3)}")
assert np.abs(plain - 0.25).max() < 0.02
assert np.abs(precise).max() < 0.02
PYTHON
