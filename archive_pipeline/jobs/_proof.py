"""Whether an archived image can stand in for its original: it is restored once, and compared."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.flight.pixels import SourcePixels
from archive_pipeline.flight.read import read_source
from archive_pipeline.flight.source_image import SourceError, SourceImage
from archive_pipeline.geo.georef import Window
from archive_pipeline.jobs._alike import Alike
from archive_pipeline.jobs._jpeg_files import slim, without_previews
from archive_pipeline.jobs.check import check_image
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.layout import ArchiveError, ImageEntry
from archive_pipeline.store.stored_models import read_model

# What a file says of its pixels. Not where they lie, unless that is its own word, nor how its
# format keeps them.
SAME = (
    *("width", "height", "bands", "dtype", "mask", "nodata", "driver", "size_bytes"),
    *("colorinterp", "descriptions", "units", "scales", "offsets", "colormap", "tags", "band_tags"),
)
OWN_PLACE = ("transform", "gcps", "rpcs")  # methods of georeferences that are the file's
SHOWN = 60  # characters of a value that are told


def why_not(archive: Archive, entry: ImageEntry, path: Path) -> str | None:
    """Why an image cannot stand in for its original; None where it can.

    All that is stored of it is read and decoded, and its pixels, mask and metadata are compared
    with the file's: lossless pixels must be equal, lossy ones alike, metadata the same.

    Args:
        path: the original, whose SHA-256 is the record's.
    """
    name = f"{entry.flight}/{entry.id}"
    try:
        stored = ArchivedImage(archive, entry).source
        original = read_source(path, entry.id)
        reason = _unlike(stored, original, entry.record["codec"] == "jpeg")
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


def _unlike(stored: SourceImage, original: SourceImage, as_file: bool) -> str | None:
    """What of an original is not what was archived.

    Args:
        as_file: its bytes are, which are compared.
    """
    if stored.salvaged:
        return "it is damaged, and archived only as far as it could be decoded"
    if original.left_out and not as_file:
        return f"not all of it is archived: {'; '.join(original.left_out)}"
    one, two = stored.to_json(), original.to_json()
    for field in SAME:
        if one[field] != two[field]:
            values = " and ".join(repr(value) for value in (one[field], two[field]))
            told = f": {values}" if len(values) <= SHOWN else ""
            return f"the archive has another {field} of it{told}"
    if original.georef.method in OWN_PLACE:
        for field in ("crs", "transform", "gcps", "rpcs"):
            if one["georef"][field] != two["georef"][field]:
                return f"the archive has another {field} of it"
    kept = without_previews(slim(original) if as_file else original)
    if without_previews(stored).metadata != kept.metadata:
        return "the archive has other metadata of it"
    return None


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
        self._alike = Alike()
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
            self._alike.add(window, restored, pixels, mask)

    def verdict(self) -> str | None:
        """What is wrong with the whole."""
        record = self._entry.record
        wanted = record["width"] * record["height"]
        if self._seen["pixels"] != wanted:
            return "not all of its pixels could be compared"
        if record["mask"] != "none" and self._seen["mask"] != wanted:
            return "not all of its mask could be compared"
        return self._alike.problem()
