#!/usr/bin/env bash
# zarr: saving two arrays into a folder deletes all else that was there; saving one array does not.
#
# `zarr.save(folder, one)` adds the array's files to the folder. `zarr.save(folder, one, two)`, or
# `zarr.save(folder, name=one)`, makes a group, and first removes everything below the folder, whatever it
# is: a flight's photographs, its sidecars, folders in it. There is no `overwrite` to say no with, and no
# error. The docstrings of `save` and `save_group` do not speak of what is there; the latter calls itself
# similar to NumPy's `savez`. With `path=` the same arrays become a group below the folder, and other files
# stay. Where one does ask to overwrite (`mode="w"`, xarray's `to_zarr` too), other files go as well, not
# only what was Zarr; xarray's default refuses a folder with any file in it.
#
# Seen with zarr 3.1.6, xarray 2026.9.0, numpy 2.4.6, Python 3.11, Linux x86-64; of two photographs remain
#   2  zarr.save(folder, one)   zarr.save(folder, one=one, path="arrays")   xarray's to_zarr(folder)
#   0  zarr.save(folder, one, two)   zarr.save(folder, one=one)   xarray's to_zarr(folder, mode="w")
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "zarr==3.1.6" "xarray==2026.9.0" "numpy==2.4.6"
cd "$folder"
venv/bin/python - <<'PYTHON'
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr
import zarr

warnings.simplefilter("ignore")
one = np.ones(3)
dataset = xr.Dataset({"one": ("x", one)})
writes: dict[str, Callable[[str], object]] = {
    "zarr.save, an array": lambda flight: zarr.save(flight, one),
    "zarr.save, two arrays": lambda flight: zarr.save(flight, one, one),
    "zarr.save, a named array": lambda flight: zarr.save(flight, one=one),
    "zarr.save, a named array, path": lambda flight: zarr.save(flight, one=one, path="arrays"),
    "xarray to_zarr": lambda flight: dataset.to_zarr(flight),
    "xarray to_zarr, mode w": lambda flight: dataset.to_zarr(flight, mode="w"),
}
seen = {}
for name, write in writes.items():
    shutil.rmtree("flight", ignore_errors=True)
    photographs = Path("flight/DJI_0001.JPG"), Path("flight/lane/DJI_0002.JPG")
    photographs[1].parent.mkdir(parents=True)
    for photograph in photographs:
        photograph.write_bytes(b"pixels")
    error = ""
    try:
        write("flight")
    except FileExistsError:
        error = ", refused"
    seen[name] = sum(photograph.exists() for photograph in photographs)
    print(f"{name:31} {seen[name]} of 2 photographs are left{error}")
    assert bool(error) == (name == "xarray to_zarr")
assert list(seen.values()) == [2, 0, 0, 2, 2, 0]
PYTHON
