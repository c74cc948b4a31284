"""A source's pixels by windows: the same as whole, decoded once, in bounded memory."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image

from archive_pipeline.flight import pixels as module
from archive_pipeline.flight import read as reading
from archive_pipeline.flight.pixels import SourcePixels
from archive_pipeline.flight.read import read_pixels, read_source
from archive_pipeline.flight.source_image import SourceError
from archive_pipeline.store.layout import SHARD_BYTES, grid

WIDTH, HEIGHT, SHARD = 301, 203, 96
KINDS = ("jpeg", "png", "webp", "strips", "one_strip", "tiled", "uint16")


def make(folder: Path, kind: str) -> Path:
    """A small file of a kind; PNG, WebP and the TIFFs of 8 bits have a mask of some sort."""
    small = np.random.default_rng(0).integers(1, 255, (20, 30, 4), np.uint8)
    image = Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    path = folder / f"{kind}.tif"
    if kind == "jpeg":
        image.convert("RGB").save(path := folder / "a.jpg")
    elif kind in ("png", "webp"):
        image.save(path := folder / f"a.{kind}")
    else:
        options: dict[str, dict[str, Any]] = {
            "strips": {"nodata": 7, "compress": "lzw"},
            "one_strip": {"nodata": 7, "compress": "deflate", "blockysize": HEIGHT},
            "tiled": {"nodata": 7, "tiled": True, "blockxsize": 64, "blockysize": 64},
            "uint16": {"interleave": "band"},
        }
        dtype = "uint16" if kind == "uint16" else "uint8"
        form = {"driver": "GTiff", "width": WIDTH, "height": HEIGHT, "count": 3, "dtype": dtype}
        with rasterio.open(path, "w", **form, **options[kind]) as out:
            out.write(np.moveaxis(np.asarray(image)[..., :3], 2, 0).astype(dtype))
    return path


def windows() -> Iterator[tuple[int, int, int, int]]:
    for row in range(0, HEIGHT, SHARD):
        for col in range(0, WIDTH, SHARD):
            yield col, row, min(SHARD, WIDTH - col), min(SHARD, HEIGHT - row)


@pytest.fixture(params=["memory", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "file":
        monkeypatch.setattr(module, "HELD_BYTES", 0)
    monkeypatch.setattr(module, "CHUNK_BYTES", 16 * WIDTH * 4)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return str(request.param)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_the_image_and_each_row_is_decoded_once(
    kind: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = read_source(make(tmp_path, kind), "a")
    whole, mask = read_pixels(source)
    decoded: list[tuple[int, int, int, int]] = []
    plain = module.read_window

    def counts(dataset: Any, source: Any, window: tuple[int, int, int, int]) -> Any:
        decoded.append(window)
        return plain(dataset, source, window)

    for reads in (module, reading):
        monkeypatch.setattr(reads, "read_window", counts)
    with SourcePixels(source) as pixels:
        for _ in range(2):  # a mask's pass and that of the pixels
            for col, row, width, height in windows():
                part, valid = pixels.read((col, row, width, height))
                area = np.s_[row : row + height, col : col + width]
                np.testing.assert_array_equal(part, whole[area])
                assert (valid is None) == (mask is None)
                if valid is not None and mask is not None:
                    np.testing.assert_array_equal(valid, mask[area])
        assert pixels.held == (kind != "tiled" or place == "memory")
    if pixels.held:
        tops = [row for _, row, _, _ in decoded]
        assert tops == sorted(set(tops))
        assert sum(width * height for _, _, width, height in decoded) == WIDTH * HEIGHT
        assert len(decoded) == 1 if place == "memory" else len(decoded) >= HEIGHT // 48
    assert list(tmp_path.glob("archive-pixels-*")) == []


def test_a_file_that_was_truncated_meanwhile(place: str, tmp_path: Path) -> None:
    path = make(tmp_path, "jpeg")
    source = read_source(path, "a")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    with SourcePixels(source) as pixels:
        if place == "file":  # as far as windows ask
            assert pixels.read((0, 0, WIDTH, 40))[0].any()
        with pytest.raises(SourceError, match="damaged JPEG"):
            pixels.read((0, 0, WIDTH, HEIGHT))


def test_without_room_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = read_source(make(tmp_path, "png"), "a")
    monkeypatch.setattr(module, "HELD_BYTES", 0)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        with SourcePixels(source) as pixels:
            assert not pixels.held
            part, _ = pixels.read((10, 20, 30, 40))
    np.testing.assert_array_equal(part, read_pixels(source)[0][20:60, 10:40])

    class Full:
        def write(self, data: object) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr(module.tempfile, "TemporaryFile", lambda **_: Full())
        with SourcePixels(source) as pixels, pytest.raises(SourceError, match="No space left"):
            pixels.read((0, 0, 10, 10))


def test_another_file_in_its_place(tmp_path: Path) -> None:
    source = read_source(make(tmp_path, "png"), "a")
    Image.new("RGB", (5, 5)).save(source.path)
    with SourcePixels(source) as pixels, pytest.raises(SourceError, match="has changed"):
        pixels.read((0, 0, 5, 5))


def test_shards_of_many_bands_are_small_enough_to_hold() -> None:
    for shape in ((640, 700, 270), (256, 256, 3000), (3000, 4000, 40), (5000, 5000, 1)):
        for itemsize in (1, 2, 4):
            chunks, shards = grid(shape, itemsize)
            tile = itemsize * math.prod(chunks)
            assert itemsize * math.prod(shards) <= max(SHARD_BYTES, tile)
            assert all(outer % inner == 0 for outer, inner in zip(shards, chunks, strict=True))
    assert grid((3648, 5472, 3), 1)[1] == (3648, 5472, 3)  # a photograph is one, as ever
