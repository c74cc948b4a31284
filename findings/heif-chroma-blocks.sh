#!/usr/bin/env bash
# pillow-heif: colours of a 4:2:0 picture come back in blocks of two by two pixels; JPEG and AVIF smooth them.
#
# Of the default 4:2:0 a decoder has one colour for four pixels and fills in the others. Pillow's JPEG, WebP
# and AVIF interpolate. libheif has a bilinear filter, its default by name, but picks the cheapest conversion
# unless told that only the preferred one will do, which pillow-heif has no option for: each colour is
# repeated four times. So part of what is measured as HEVC's loss is this decoder's: filling in the same
# decoded colours by a triangle gains decibels without a byte, more the higher the quality, and a comparison
# of codecs through pillow-heif does HEVC wrong by that. Frames of phones and drones in HEIC are read that
# way, too. `chroma=444` avoids it where one writes the file. libheif's issues 586 and 935 know of it.
#
# Seen with pillow-heif 1.8.1 (libheif 1.23.6), Pillow 13.0.0, numpy 2.4.6, Python 3.11, Linux x86-64, a picture
# of smooth colours and fine grey texture:
#   within pairs of columns colours differ by 0.0 of HEIC, by as much as between pairs of the others
#   HEIC 4:2:0 at qualities 50, 70, 90: 34.5, 36.5, 36.7 dB; smoothed 38.0, 45.2, 48.0; 4:4:4 36.4, 45.0, 50.9
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "pillow-heif==1.8.1" "pillow==13.0.0" "numpy==2.4.6"
cd "$folder"
venv/bin/python - <<'PYTHON'
import io
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image

pillow_heif.register_heif_opener()
SIDE = 256


def to_rgb(y: np.ndarray, cb: np.ndarray, cr: np.ndarray) -> np.ndarray:
    planes = y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb
    return np.clip(np.rint(np.stack(planes, 2)), 0, 255).astype(np.uint8)


def from_rgb(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r, g, b = pixels.astype(float).transpose(2, 0, 1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return y, (b - y) / 1.772, (r - y) / 1.402


rows, cols = np.mgrid[0:SIDE, 0:SIDE]
texture = 128 + np.random.default_rng(0).normal(0, 10, (SIDE, SIDE))
picture = to_rgb(texture, 40 * np.sin(cols / 5), 40 * np.cos(rows / 6))


def decoded(kind: str, quality: int, **options: Any) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, quality=quality, **options)
    return np.asarray(Image.open(file).convert("RGB"))


def psnr(pixels: np.ndarray) -> float:
    return 10 * np.log10(255**2 / ((pixels.astype(float) - picture) ** 2).mean())


def smoothed(pixels: np.ndarray) -> np.ndarray:
    """The same grey and, from one of each four pixels, the same colours, filled in by a triangle."""
    y, *colours = from_rgb(pixels)
    small = [Image.fromarray(colour[::2, ::2].astype(np.float32)) for colour in colours]
    large = [colour.resize((SIDE, SIDE), Image.Resampling.BILINEAR) for colour in small]
    return to_rgb(y, *map(np.asarray, large))


print("libheif", pillow_heif.libheif_info()["libheif"])
for kind, options in (
    ("JPEG", {"subsampling": "4:2:0"}), ("WEBP", {}), ("AVIF", {"subsampling": "4:2:0"}), ("HEIF", {})
):
    steps = np.abs(np.diff(from_rgb(decoded(kind, 70, **options))[1], axis=1))
    within, between = steps[:, ::2].mean(), steps[:, 1::2].mean()
    print(f"{kind} 4:2:0: colours differ by {within:.2f} within pairs, {between:.2f} between them")
    if kind == "HEIF":
        assert within < 0.01
    else:
        assert within > 0.8 * between
for quality in (50, 70, 90):
    plain, full = decoded("HEIF", quality), decoded("HEIF", quality, chroma=444)
    gained = psnr(smoothed(plain)) - psnr(plain)
    print(
        f"HEIC, quality {quality}: 4:2:0 {psnr(plain):.1f} dB, smoothed {psnr(smoothed(plain)):.1f}, "
        f"4:4:4 {psnr(full):.1f}"
    )
    assert gained > 3
assert gained > 10
PYTHON
