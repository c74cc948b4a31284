#!/usr/bin/env bash
# pillow-heif: HEVC has 51 qualities, not 101, and a step between two of them is a tenth of the bytes.
#
# libheif hands x265 a whole constant rate factor, (100 - quality) / 2 without its remainder, so qualities 31
# and 32 give the same file to the byte, and so do all such pairs. Nor does `crf` as an encoder parameter
# help: x265 would take 34.5, libheif passes 34. A search for a file of a given size thus ends up to a step
# below it, and a comparison of codecs at equal bytes, tuned picture by picture, robs HEVC of half a step on
# average: pass what one picture leaves on to the next.
#
# Seen with pillow-heif 1.8.1 (libheif 1.23.6, x265 4.3), numpy 2.4.6, Pillow 13.0.0, Python 3.11, Linux x86-64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "pillow-heif==1.8.1" "pillow==13.0.0" "numpy==2.4.6"
cd "$folder"
venv/bin/python - <<'PYTHON'
import io

import numpy as np
import pillow_heif
from PIL import Image

pillow_heif.register_heif_opener()
rows, cols = np.mgrid[0:256, 0:256]
waves = np.stack([np.sin(cols / 17), np.sin(rows / 23), np.cos((cols + rows) / 31)], 2)
grain = np.random.default_rng(0).normal(0, 12, waves.shape)
picture = Image.fromarray(np.clip(128 + 90 * waves + grain, 0, 255).astype(np.uint8))


def coded(quality: int, **parameters: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, "HEIF", quality=quality, enc_params=parameters)
    return file.getvalue()


files = {quality: coded(quality) for quality in range(20, 71)}
pairs = [(q, q + 1) for q in range(20, 70) if files[q] == files[q + 1]]
sizes = [len(files[q]) for q in range(20, 71, 2)]
steps = [after / before for before, after in zip(sizes, sizes[1:])]
print("libheif", pillow_heif.libheif_info()["libheif"], pillow_heif.libheif_info()["HEIF"])
print(f"{len(set(files.values()))} files of {len(files)} qualities; pairs:", pairs[:3], "...")
print(f"a step is {np.median(steps) - 1:.0%} of the bytes (median)")
assert len(set(files.values())) == 26
assert all(files[q] == files[q + 1] for q in range(21, 70, 2))
assert np.median(steps) > 1.08
halves = coded(50, **{"x265:crf": "34.5"}), coded(50, **{"x265:crf": "34"}), coded(50, **{"x265:crf": "35"})
print("crf 34.5 is that of 34:", halves[0] == halves[1], "of 35:", halves[0] == halves[2])
assert halves[0] == halves[1] != halves[2]
PYTHON
