"""Pictures in formats that rasterio's GDAL does not have, HEIC and JPEG XL, as datasets."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import rasterio

from archive_pipeline.errors import NotInstalled, require
from archive_pipeline.flight import _decoder
from archive_pipeline.flight._beside import beside
from archive_pipeline.flight.locations import open_file, read_bytes
from archive_pipeline.flight.sidecars import MAX_TEXT, world_files
from archive_pipeline.flight.source_image import SourceError

# GDAL's names of the formats, and the packages that read them here
DECODERS = {"HEIF": "pi_heif", "JPEGXL": "imagecodecs"}
MAX_BYTES = 256 << 20  # of a file
MAX_PIXEL_BYTES = 512 << 20
MEMORY = 4 << 30  # of the process that decodes; only Linux keeps to it
SECONDS = 300


def open_decoded(path: Path, driver: str) -> rasterio.DatasetReader:
    """Open a picture, decoded, as a dataset in memory.

    World file, `.aux.xml` and `.msk` beside it count as beside a TIFF. Its attribute `blocks` has
    the file's metadata blocks, `notes` what is odd about it.

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
    folder = uuid.uuid4().hex
    memory = rasterio.MemoryFile(dirname=folder, filename="picture.tif")
    form = {"width": width, "height": height, "count": bands, "dtype": head["dtype"]}
    photometric = "RGB" if bands in (3, 4) else "MINISBLACK"
    alpha = "YES" if bands in (2, 4) else "UNSPECIFIED"
    with memory.open(driver="GTiff", photometric=photometric, alpha=alpha, **form) as made:
        made.write(np.moveaxis(pixels, 2, 0))
    sidecars = _beside_in_memory(path, folder)
    dataset = memory.open(driver="GTiff")
    dataset.driver, dataset.blocks, dataset.notes = driver, blocks, head["notes"]
    dataset.memory = memory, sidecars  # as long as the dataset
    return dataset


def _beside_in_memory(path: Path, folder: str) -> list[rasterio.MemoryFile]:
    """What belongs to a picture, where GDAL looks for it beside `picture.tif`."""
    stem, suffix = path.stem.casefold(), path.suffix.casefold()
    there = dict(beside(path.parent, ()).starting(stem))
    wanted = [
        (f"{suffix}.aux.xml", ".tif.aux.xml", MAX_TEXT),
        (f"{suffix}.msk", ".tif.msk", MAX_BYTES),
    ]
    world = [ending for ending in world_files(suffix) if stem + ending in there]
    wanted += [(ending, ".tfw", MAX_TEXT) for ending in world[:1]]
    found = []
    for ending, name, most in wanted:
        if stem + ending in there:
            other = there[stem + ending]
            try:
                data = read_bytes(path.with_name(other), most)
            except OSError as error:
                reason = f"{other} beside it cannot be read: {error.strerror or error}"
                raise SourceError(path, reason) from error
            found.append(rasterio.MemoryFile(data, dirname=folder, filename=f"picture{name}"))
    return found


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
