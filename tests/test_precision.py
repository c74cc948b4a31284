"""Large networks in bfloat16: nearly the same pixels, and the same symbols in the decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import BRIGHTON, Run
from golden import reference as ref
from numpy.typing import NDArray
from PIL import Image

from archive_pipeline.codec.models import DEFAULT_MODEL, shipped
from archive_pipeline.pcdc.allocation import BudgetTooSmall
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.encoding import encode_tiles
from archive_pipeline.pcdc.model import Model
from archive_pipeline.pcdc.model_files import read_folder

SIDE = 304


@pytest.fixture(scope="module")
def codecs() -> dict[str, Codec]:
    files = read_folder(shipped() / DEFAULT_MODEL)
    return {
        "float32": Codec(Model(files, precision="float32")),
        "bfloat16": Codec(Model(files, precision="bfloat16")),
    }


def photograph() -> NDArray[np.uint8]:
    if not BRIGHTON.is_dir():
        return ref.texture(SIDE, SIDE)
    with Image.open(sorted(BRIGHTON.iterdir())[0]) as image:
        return np.asarray(image.crop((1000, 700, 1000 + SIDE, 700 + SIDE)))


TILES = {
    "photograph": photograph,
    "black": lambda: ref.constant(SIDE, SIDE),
    "noise": lambda: np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8),
    "pixel": lambda: np.full((1, 1, 3), 200, np.uint8),
}


@pytest.mark.parametrize("ratio", [24, 160])
@pytest.mark.parametrize("kind", TILES)
def test_pixels_are_as_good_whatever_multiplied_where(
    codecs: dict[str, Codec], kind: str, ratio: int
) -> None:
    """Encoded and decoded in either precision: at most 0.02 dB below float32's."""
    tile = TILES[kind]()
    budget = max(tile.size // ratio, 64)

    def error(coded: str, decoded: str) -> float:
        try:
            streams = encode_tiles(codecs[coded], [tile], budget)
        except BudgetTooSmall:
            streams = encode_tiles(codecs[coded], [tile], budget, strict=False)
        (pixels,) = codecs[decoded].decode(streams, *tile.shape[:2])
        return float(np.square(pixels.astype(float) - tile).mean())

    least = error("float32", "float32")
    for pair in (("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")):
        # an error of hardly a level, and that of one pixel, have no decibels to speak of
        slack = 0.1 if kind != "pixel" else 4.0
        assert error(*pair) <= least * 10**0.002 + slack, pair


def test_symbols_and_pixels_of_one_precision_are_the_same_in_any_company(
    codecs: dict[str, Codec],
) -> None:
    tiles = [ref.texture(96, 128, seed) for seed in range(4)]
    codec = codecs["bfloat16"]
    streams = encode_tiles(codec, tiles, 4000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert encode_tiles(codec, tiles, 4000) == streams
        together = codec.decode(streams, 96, 128)
    finally:
        torch.set_num_threads(threads)
    for stream, pixels in zip(streams, together, strict=True):
        (alone,) = codec.decode([stream], 96, 128)
        np.testing.assert_array_equal(alone, pixels)
    for ours, theirs in zip(
        codec.decode_symbols(streams, 96, 128),
        codecs["float32"].decode_symbols(streams, 96, 128),
        strict=True,
    ):
        np.testing.assert_array_equal(ours.q, theirs.q)
        np.testing.assert_array_equal(ours.z, theirs.z)


def test_the_commands_take_a_precision(run: Run, archive, flight, tmp_path) -> None:  # type: ignore[no-untyped-def]
    made = {}
    for precision in ("float32", "bfloat16"):
        url, out = tmp_path / f"{precision}.zarr", tmp_path / precision
        args = ("--workers", 0, "--precision", precision)
        assert run("ingest", flight, "--archive", url, "--ratio", 16, *args).code == 0
        more = ("--archive", archive, "--image", "DJI_0001.JPG", "-o", out, "--format", "png")
        assert run("restore", *more, *args).code == 0
        with Image.open(next(out.rglob("*.png"))) as image:
            made[precision] = np.asarray(image).astype(int)
    difference = np.abs(made["float32"] - made["bfloat16"])
    assert 0 < difference.max() <= 3
