"""Whether an archived image can stand in for its original: it is restored once, and compared."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.flight.pixels import SourcePixels
from archive_pipeline.flight.read import read_source
from archive_pipeline.flight.source_image import SourceError, SourceImage
from archive_pipeline.geo.georef import Window
from archive_pipeline.jobs.check import check_image
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.layout import ArchiveError, ImageEntry
from archive_pipeline.store.stored_models import read_model

SAME = ("width", "height", "bands", "dtype", "mask", "nodata", "driver", "size_bytes")
# Lossy pixels that differ by more are not the original's: two pictures that have nothing to do with
# each other differ by 10 to 14 dB, and the codec at its coarsest by far less.
LEAST_PSNR = 16.0
ROWS = 512  # compared at a time


def why_not(archive: Archive, entry: ImageEntry, path: Path) -> str | None:
    """Why an image cannot stand in for its original; None where it can.

    All that is stored of it is read and decoded, and its pixels, mask and size are compared with
    the file's: lossless ones must be equal, lossy ones alike.

    Args:
        path: the original, whose SHA-256 is the record's.
    """
    name = f"{entry.flight}/{entry.id}"
    try:
        stored = ArchivedImage(archive, entry).source
        original = read_source(path, entry.id)
        reason = _unlike(stored, original)
        if reason is not None:
            return reason
        model = entry.record.get("model")
        if model is not None:
            read_model(archive, model)
        with SourcePixels(replace(original, path=path)) as pixels:
            comparison = _Comparison(entry, pixels)
            problems = check_image(archive, entry, comparison.see)
        if problems:
            return f"the archived image is damaged: {problems[0].removeprefix(f'{name}: ')}"
        return comparison.verdict() or _other_file(archive, entry)
    except (ArchiveError, SourceError) as error:
        return str(error)


def _unlike(stored: SourceImage, original: SourceImage) -> str | None:
    """What of an original's properties is not what was archived."""
    if stored.salvaged:
        return "it is damaged, and archived only as far as it could be decoded"
    for field in SAME:
        one, two = getattr(stored, field), getattr(original, field)
        if one != two and not (_is_nan(one) and _is_nan(two)):
            return f"the archive has another {field} of it: {one!r}, not {two!r}"
    return None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _other_file(archive: Archive, entry: ImageEntry) -> str | None:
    """Why a file that is kept as it is would not come back byte for byte."""
    if entry.record["codec"] != "jpeg":
        return None
    data = ArchivedImage(archive, entry).original()
    if data is None or hashlib.sha256(data).hexdigest() != entry.record["sha256"]:
        return "the archived file is another"
    return None


class _Comparison:
    """Compares what is decoded with the original's pixels, window by window."""

    def __init__(self, entry: ImageEntry, original: SourcePixels) -> None:
        self._entry = entry
        self._original = original
        self._squares, self._count = 0.0, 0
        self._seen = {"pixels": 0, "mask": 0}

    def see(self, name: str, window: Window, restored: NDArray[Any]) -> None:
        """Compare a window of "pixels" or "mask".

        Raises:
            ArchiveError: it differs where it may not.
        """
        pixels, mask = self._original.read(window)
        self._seen[name] += window[2] * window[3]
        if name == "mask":
            if mask is None or not np.array_equal(mask, restored):
                raise ArchiveError("its mask is not the original's")
            return
        if restored.shape != pixels.shape or restored.dtype != pixels.dtype:
            raise ArchiveError("its pixels are of another kind than the original's")
        if self._entry.record["codec"] == "lossless":
            if restored.tobytes() != pixels.tobytes():  # of NaN, too
                raise ArchiveError("its pixels are not the original's")
        elif self._entry.record["codec"] == "pcdc":
            for row in range(0, len(pixels), ROWS):
                some = slice(row, row + ROWS)
                apart = restored[some].astype(np.float32) - pixels[some]
                shown = apart if mask is None else apart[mask[some] > 0]
                self._squares += float(np.square(shown).sum(dtype=np.float64))
                self._count += shown.size

    def verdict(self) -> str | None:
        """What is wrong with the whole."""
        record = self._entry.record
        wanted = record["width"] * record["height"]
        if self._seen["pixels"] != wanted:
            return "not all of its pixels could be compared"
        if record["mask"] != "none" and self._seen["mask"] != wanted:
            return "not all of its mask could be compared"
        error = self._squares / self._count if self._count else 0.0
        if error and 10 * math.log10(255**2 / error) < LEAST_PSNR:
            return "its pixels have nothing to do with the original's"
        return None
