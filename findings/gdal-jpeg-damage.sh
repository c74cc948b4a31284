#!/usr/bin/env bash
# GDAL: GDAL_ERROR_ON_LIBJPEG_WARNING=YES does not notice bytes that changed inside a JPEG's pixels.
#
# The option is for finding damaged JPEGs, and a file that ends early is an error with it. But forty bytes
# overwritten inside the scan mostly decode, to other coefficients: everything behind them is shifted and
# has wrong colours. libjpeg can know of it at the end alone, where bytes are left over that no pixel needed
# ("extraneous bytes before marker 0xd9"), and says so when it is asked to finish. GDAL has its last row by
# then and does not ask, so nothing is ever raised. Pillow is silent, too. libjpeg-turbo's own
# decompressor, told to take warnings for errors, notices most of it (here by simplejpeg; an eighth of the
# size, in grey, is enough and takes a fraction of the time).
#
# Seen with rasterio 1.4.4 (GDAL 3.10.3), Pillow 13.0.0, simplejpeg 1.9.0, numpy 2.4.6, Python 3.11, Linux
# x86-64: of 38 damaged pictures GDAL and Pillow complain of none, simplejpeg of 33.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "rasterio==1.4.4" "pillow==13.0.0" "simplejpeg==1.9.0" "numpy==2.4.6"
cd "$folder"
venv/bin/python - <<'PYTHON'
import io
import warnings

import numpy as np
import rasterio
import simplejpeg
from PIL import Image

warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
rng = np.random.default_rng(0)
rough = Image.fromarray(rng.integers(0, 256, (50, 75, 3), np.uint8))
picture = rough.resize((600, 400), Image.Resampling.BICUBIC)
coded = io.BytesIO()
picture.save(coded, "JPEG", quality=90)
good = coded.getvalue()
changed = []
for at in range(2000, len(good) - 2000, len(good) // 40):
    noise = rng.integers(0, 255, 40, np.uint8).tobytes()  # no byte 255: no marker
    changed.append(good[:at] + noise + good[at + 40 :])


def by_gdal(data: bytes) -> np.ndarray:
    with rasterio.Env(GDAL_ERROR_ON_LIBJPEG_WARNING="YES"):
        with rasterio.MemoryFile(data, ext=".jpg") as file, file.open() as opened:
            return opened.read()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def by_simplejpeg(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, strict=True)


def complaints(data: list[bytes]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for reader in (by_gdal, by_pillow, by_simplejpeg):
        found[reader.__name__] = []
        for one in data:
            try:
                reader(one)
            except Exception as error:
                found[reader.__name__].append(str(error.__cause__ or error))
    return found


print("good:", complaints([good]))
print("ends early:", complaints([good[: len(good) // 2]]))
found = complaints(changed)
print(f"of {len(changed)} changed:", {name: len(texts) for name, texts in found.items()})
wrong = [(np.abs(by_gdal(good).astype(int) - by_gdal(one)).max(0) > 20).mean() for one in changed]
print(f"pixels off by more than 20 levels: {np.median(wrong):.0%} (median)")
assert not any(complaints([good]).values())
assert all(complaints([good[: len(good) // 2]]).values())
assert found["by_gdal"] == found["by_pillow"] == []
assert len(found["by_simplejpeg"]) > len(changed) / 2
assert all("extraneous bytes before marker" in text for text in found["by_simplejpeg"])
assert min(wrong) > 0
PYTHON
