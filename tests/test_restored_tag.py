"""The mark on restored files: every writer leaves it, originals have none, reading is bounded."""

from __future__ import annotations

import dataclasses
import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from PIL import Image
from test_mosaic import frame
from test_outputs import camera_jpeg, gcps, palette, rgba, whole

from archive_pipeline.flight.raster import Raster
from archive_pipeline.flight.read import read_source
from archive_pipeline.flight.restored_tag import MARK, TIFF_ITEM, is_restored, mark
from archive_pipeline.jobs.mosaic import write_mosaic
from archive_pipeline.outputs.writers import write_gtiff, write_jpeg, write_png

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

Write = Callable[[Path, Raster], None]
WRITERS: dict[str, Write] = {".jpg": write_jpeg, ".png": write_png, ".tif": write_gtiff}


def test_every_writer_leaves_the_mark(tmp_path: Path) -> None:
    source = camera_jpeg(tmp_path / "DJI_0001.JPG")
    assert not is_restored(tmp_path / "DJI_0001.JPG")
    for suffix, write in WRITERS.items():
        path = tmp_path / f"a{suffix}"
        write(path, whole(source))
        assert is_restored(path)
        # Names do not matter; a restored copy of a restored file has the mark once.
        twice = tmp_path / f"twice as {suffix[1:]}"
        write(twice, whole(read_source(path, "a")))
        assert is_restored(twice)
        assert twice.read_bytes().count(MARK) == 1
    for make in (rgba, palette, gcps):
        source = make(tmp_path)
        assert not is_restored(Path(source.path))
        for write in (write_gtiff, write_png):
            path = tmp_path / f"{source.id} by {write.__name__}"
            write(path, whole(source))
            assert is_restored(path)
    write_mosaic(tmp_path / "mosaic.tif", [frame("a")])
    assert is_restored(tmp_path / "mosaic.tif")


def test_the_mark_says_what_made_the_pixels(tmp_path: Path) -> None:
    """Generated detail never passes as measured, not even in a mosaic with other pixels."""
    source = camera_jpeg(tmp_path / "DJI_0001.JPG")
    raster = whole(source)
    assert raster.decoder.endswith("realism 0.5, seed 7")
    for suffix, write in WRITERS.items():
        write(tmp_path / f"a{suffix}", raster)
        assert (tmp_path / f"a{suffix}").read_bytes().count(raster.decoder.encode()) == 1
        # restored from what was restored before: only the last one made these pixels
        again = whole(read_source(tmp_path / f"a{suffix}", "a"), decoder="new")
        write(tmp_path / f"b{suffix}", again)
        data = (tmp_path / f"b{suffix}").read_bytes()
        assert raster.decoder.encode() not in data
        assert b"pixels: new" in data
    plain, looks = frame("a"), dataclasses.replace(frame("b", east=5.0), decoder="generated")
    write_mosaic(tmp_path / "mosaic.tif", [looks, plain])
    with rasterio.open(tmp_path / "mosaic.tif") as file:
        assert file.tags()[TIFF_ITEM] == mark(f"generated; {plain.decoder}")


def test_copies_made_by_gdal_keep_it(tmp_path: Path) -> None:
    write_gtiff(tmp_path / "a.tif", whole(camera_jpeg(tmp_path / "DJI_0001.JPG")))
    rasterio.shutil.copy(tmp_path / "a.tif", tmp_path / "b.tif", driver="GTiff", bigtiff="YES")
    assert is_restored(tmp_path / "b.tif")


def test_originals_have_none(tmp_path: Path) -> None:
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    for name in ("a.jpg", "a.png", "a.tif", "a.webp", "a.gif"):
        picture.save(tmp_path / name)
        assert not is_restored(tmp_path / name)
    # What somebody writes about the mark is not the mark.
    picture.save(tmp_path / "b.jpg", comment=b"not " + MARK)
    with rasterio.open(tmp_path / "a.tif", "r+") as out:
        out.update_tags(note=MARK.decode(), ARCHIVE_PIPELINE="no")
    assert not is_restored(tmp_path / "b.jpg")
    assert not is_restored(tmp_path / "a.tif")


def test_what_is_no_file_has_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (tmp_path / "link.jpg").symlink_to("link.jpg")
    for name in ("pipe.jpg", "empty.jpg", "dangling.jpg", "link.jpg", "none.jpg", "."):
        assert not is_restored(tmp_path / name)


def test_damaged_files_do_no_harm(tmp_path: Path) -> None:
    source = camera_jpeg(tmp_path / "DJI_0001.JPG")
    rng = random.Random(1)
    for suffix, write in WRITERS.items():
        path = tmp_path / f"a{suffix}"
        write(path, whole(source))
        data = path.read_bytes()
        for _ in range(200):
            broken = bytearray(data[: rng.randrange(len(data))])
            for _ in range(rng.randrange(1, 20)):
                if broken:
                    broken[rng.randrange(min(len(broken), 4000))] = rng.randrange(256)
            path.write_bytes(broken)
            assert is_restored(path) in (True, False)


HUGE = [
    b"\xff\xd8" + b"\xff\xe1\xff\xff" + bytes(65533) * 2,
    b"\xff\xd8" + b"\xff" * 2_000_000,
    b"\xff\xd8" + b"\xff\xfe\0\0" * 500_000,
    b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 2**32 - 1, b"tEXt"),
    b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sI", 0, b"tEXt", 0) * 200_000,
    b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 42112, 2, 2**32 - 1, 8),
    b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0" + struct.pack("<QHHQQ", 1, 42112, 2, 2**63, 2**63),
    b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0" + struct.pack("<Q", 2**63),
]


@pytest.mark.parametrize("number", range(len(HUGE)))
def test_reading_is_bounded(number: int, tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with open(path, "wb") as file:
        file.write(HUGE[number])
        file.truncate(1 << 33)  # a hole
    tracemalloc.start()
    try:
        assert not is_restored(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
