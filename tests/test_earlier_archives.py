"""Archives that earlier releases made: they open, restore to the same pixels, and are whole.

Each release's is packed in golden/archives: `archive.zarr`, made with the test model, and
`expected.npz`, what that release restored of it: lossless pixels and masks as they were, decoded
ones as means of squares of 4 x 4 (a digest would hold the last bit of every processor's floats).
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from golden.reference import GOLDEN
from numpy.typing import NDArray

from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage

PACKED = sorted((GOLDEN / "archives").glob("*.tar.xz"))
SQUARE = 4


@pytest.fixture(params=PACKED, ids=lambda path: path.name.removesuffix(".tar.xz"))
def earlier(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """An unpacked archive, and what was restored from it by "flight|image"."""
    with tarfile.open(request.param) as packed:
        packed.extractall(tmp_path, filter="data")
    with np.load(tmp_path / "expected.npz") as expected:
        return tmp_path / "archive.zarr", dict(expected)


def means(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Means of whole squares of pixels (h, w, bands)."""
    height, width = (n // SQUARE * SQUARE for n in pixels.shape[:2])
    squares = pixels[:height, :width].reshape(height // SQUARE, SQUARE, width // SQUARE, SQUARE, -1)
    return squares.mean((1, 3))


def test_an_earlier_archive_restores_to_the_same_pixels(
    earlier: tuple[Path, dict[str, NDArray[Any]]],
) -> None:
    url, expected = earlier
    archive = Archive.open(url)
    assert archive.written_by is None
    seen = set()
    for entry in archive.images():
        image = ArchivedImage(archive, entry)
        key = f"{entry.flight}|{entry.id}"
        everything = (0, 0, entry.record["width"], entry.record["height"])
        pixels = image.read(everything)
        if entry.record["codec"] == "pcdc":
            # rounded to whole numbers, of pixels that may differ by one between processors, and by
            # two in bfloat16
            np.testing.assert_allclose(means(pixels), expected[key], rtol=0, atol=2)
        else:
            np.testing.assert_array_equal(pixels, expected[key])
        seen.add(key)
        if entry.record["mask"] == "alpha":
            np.testing.assert_array_equal(image.read_mask(everything), expected[f"{key}|mask"])
            seen.add(f"{key}|mask")
    assert seen == expected.keys()


def test_an_earlier_archive_is_whole_and_takes_more(
    earlier: tuple[Path, dict[str, NDArray[Any]]], run: Run, flight: Path, tmp_path: Path
) -> None:
    url, expected = earlier
    checked = run("check", "--archive", url, "--json")
    assert checked.code == 0, checked.err
    images = checked.json["images"]
    assert images == sum(not key.endswith("|mask") for key in expected)
    more = run(
        "ingest", flight, "--archive", url, "--flight", "more", "--ratio", 16, "--workers", 0, "-q"
    )
    assert more.code == 0, more.err
    checked = run("check", "--archive", url, "--json")
    assert checked.code == 0, checked.err
    assert checked.json["images"] == images + len(list(flight.iterdir()))
    restored = run("restore", "--archive", url, "-o", tmp_path / "out", "--workers", 0, "--json")
    assert len(restored.json["files"]) == checked.json["images"]
