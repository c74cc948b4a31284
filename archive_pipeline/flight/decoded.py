"""Pictures in formats that rasterio's GDAL does not have, HEIC and JPEG XL, as datasets."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import rasterio

from archive_pipeline.errors import NotInstalled, require
from archive_pipeline.flight import _decoder
from archive_pipeline.flight.locations import open_file
from archive_pipeline.flight.source_image import SourceError

# GDAL's names of the formats, and the packages that read them here
DECODERS = {"HEIF": "pi_heif", "JPEGXL": "imagecodecs"}
MAX_BYTES = 256 << 20  # of a file
MAX_PIXEL_BYTES = 512 << 20
MEMORY = 4 << 30  # of the process that decodes; only Linux keeps to it
SECONDS = 300


def open_decoded(path: Path, driver: str) -> rasterio.DatasetReader:
    """Open a picture, decoded, as a dataset in memory; sidecars do not count.

    Its attribute `blocks` has the file's metadata blocks, `notes` what is odd about it.

    Args:
        driver: one of `DECODERS`, which is the dataset's then.

    Raises:
        SourceError: it is damaged or too large, or what decodes it is not installed.
        OSError: it cannot be read.
    """
    with open_file(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise SourceError(path, f"larger than {MAX_BYTES >> 20} MiB")
    try:
        require(DECODERS[driver], f"reading {driver}")
    except NotInstalled as error:
        raise SourceError(path, str(error)) from error
    head, rest = _decode(path, driver, data)
    shape = tuple(head["shape"])
    size = int(np.prod(shape)) * np.dtype(head["dtype"]).itemsize
    pixels = np.frombuffer(rest[:size], head["dtype"]).reshape(*shape[:2], -1)
    blocks, at = [], size
    for name, length in head["blocks"]:
        blocks.append((name, bytes(rest[at : at + length])))
        at += length
    height, width, bands = pixels.shape
    memory = rasterio.MemoryFile()
    form = {"width": width, "height": height, "count": bands, "dtype": head["dtype"]}
    photometric = "RGB" if bands in (3, 4) else "MINISBLACK"
    alpha = "UNSPECIFIED" if bands in (1, 3) else "YES"
    with memory.open(driver="GTiff", photometric=photometric, alpha=alpha, **form) as made:
        made.write(np.moveaxis(pixels, 2, 0))
    dataset = memory.open(driver="GTiff")
    dataset.driver, dataset.blocks, dataset.notes = driver, blocks, head["notes"]
    dataset.memory = memory  # as long as the dataset
    return dataset


def _decode(path: Path, driver: str, data: bytes) -> tuple[dict[str, Any], memoryview]:
    script = str(Path(_decoder.__file__))
    command = [sys.executable, "-P", script, driver, str(MAX_PIXEL_BYTES)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        with suppress(ImportError, AttributeError, OSError):
            import resource

            for what, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS)):
                resource.prlimit(process.pid, what, (most, most))
        out, said = process.communicate(data)
    if process.returncode > 0 and said:
        raise SourceError(path, said.decode(errors="replace").strip().splitlines()[-1])
    if process.returncode:
        raise SourceError(path, f"{driver}: its decoder crashed, or takes more than it may")
    line, _, _ = out.partition(b"\n")
    return json.loads(line), memoryview(out)[len(line) + 1 :]
