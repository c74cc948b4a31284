"""Measure one checkout's codec: a process that `benchmark_speed.py` starts and tells what to do.

    PYTHONPATH=CHECKOUT python workflows/benchmarks/speed_worker.py PICTURES.npz THREADS

Each line of input is "encode NAME RATIO" or "decode NAME RATIO", of pictures in the file; each is
answered by a line of JSON: processor and wall seconds, bytes, and of decoding PSNR. Pixels go
through the `pcdc` codec of Zarr, the interface that all commits share.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import zarr
from zarr.storage import MemoryStore

TILE = 608  # as the archive cuts them


def either(*names: str) -> ModuleType:
    """The first of some modules that there is: they have moved over time."""
    for name in names[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    return importlib.import_module(names[-1])


def array_of(shape: tuple[int, ...], ratio: float) -> zarr.Array:
    """An array in memory whose streams take a budget of raw bytes over `ratio`."""
    models = either("archive_pipeline.codec.models", "archive_pipeline.models")
    codec = either("archive_pipeline.codec.zarr_codec", "archive_pipeline.zarr_codec").PCDCCodec
    model = models.load_named(models.DEFAULT_MODEL).sha256
    return zarr.create_array(
        MemoryStore(),
        shape=shape,
        dtype=np.uint8,
        chunks=(min(TILE, shape[0]), min(TILE, shape[1]), 3),
        serializer=codec(model, 24 / ratio),
        compressors=None,
        filters=None,
        fill_value=0,
    )


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(np.float32) - b).mean()))


def main() -> None:
    pictures = np.load(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    zarr.config.set({"codec_pipeline.batch_size": 1 << 16})
    package = importlib.import_module("archive_pipeline")
    print(json.dumps(str(Path(package.__file__ or "").parents[1])), flush=True)
    arrays: dict[tuple[str, float], tuple[zarr.Array, int]] = {}
    for line in sys.stdin:
        task, name, number = line.split()
        ratio, pixels = float(number), pictures[name]
        if (name, ratio) not in arrays:
            array = array_of(pixels.shape, ratio)
            arrays[name, ratio] = array, array.nbytes_stored()
        array, metadata = arrays[name, ratio]
        wall, cpu = time.perf_counter(), time.process_time()
        out = None
        if task == "encode":
            array[:] = pixels
        else:
            out = np.asarray(array[:])
        found: dict[str, Any] = {
            "cpu": time.process_time() - cpu,
            "wall": time.perf_counter() - wall,
            "bytes": array.nbytes_stored() - metadata,
        }
        if out is not None:
            found["psnr"] = psnr(pixels, out)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
