"""Tiles in batches, as other devices than CPUs take them; here the CPU does."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from golden import reference as ref
from numpy.typing import NDArray

from archive_pipeline.codec.models import DEFAULT_MODEL, load_named
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.decoding import Symbols
from archive_pipeline.pcdc.encoding import Encoding, Worth, encode_tiles, least_error
from archive_pipeline.pcdc.parallel import each

BUDGET = 4500
FINE = 40000  # at image steps whose latents are corrected


@pytest.fixture(scope="module")
def tiles() -> list[NDArray[np.uint8]]:
    odd = [ref.texture(70, 96, 9), ref.constant(0, 0), ref.noise(33, 70)]
    return [ref.texture(128, 96, seed) for seed in range(5)] + odd


@pytest.fixture(scope="module")
def singly() -> Codec:
    return Codec(load_named(DEFAULT_MODEL))


@pytest.fixture
def batched(singly: Codec) -> Codec:
    codec = Codec(singly.model)
    codec.batch_pixels = 3 * 128 * 96
    return codec


@pytest.mark.parametrize("allowed", [BUDGET, FINE])
@pytest.mark.parametrize("worth", [None, least_error], ids=["uniform", "greedy"])
def test_batches_code_as_single_tiles_do(
    tiles: list[NDArray[np.uint8]], singly: Codec, batched: Codec, allowed: int, worth: Worth | None
) -> None:
    streams = encode_tiles(batched, tiles, allowed, worth)
    alone = encode_tiles(singly, tiles, allowed, worth)
    total = sum(map(len, streams))
    assert 0.97 * allowed <= total <= allowed
    assert abs(total - sum(map(len, alone))) < 0.01 * allowed  # last bits of latents may differ
    symbols = batched.decode_symbols(streams, 128, 128)
    for found, expected in zip(symbols, singly.decode_symbols(streams, 128, 128), strict=True):
        assert isinstance(found, Symbols)
        assert isinstance(expected, Symbols)
        assert ref.same(found, expected)
    for steps in (0, 1):
        pixels = batched.decode(streams, 128, 128, steps, seed=3)
        again = singly.decode(streams, 128, 128, steps, seed=3)
        for a, b, tile in zip(pixels, again, tiles, strict=True):
            assert a.shape == b.shape == tile.shape
            assert np.abs(a.astype(int) - b).max(initial=0) <= 1
            assert not a.size or (a != b).mean() < 0.002


def test_tiles_of_one_size_share_a_batch_of_so_many_pixels(
    tiles: list[NDArray[np.uint8]], batched: Codec
) -> None:
    shapes: dict[str, list[tuple[int, ...]]] = {"g_a": [], "h_a": [], "g_s": []}
    with ExitStack() as hooks:
        for name, seen in shapes.items():
            network = getattr(batched.model.networks, name)
            hook = network.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(tuple(args[0].shape))
            )
            hooks.callback(hook.remove)
        streams = Encoding(batched, tiles).within(BUDGET)
        assert sorted(shapes["g_a"]) == [
            (1, 3, 48, 80), (1, 3, 80, 96), (2, 3, 128, 96), (3, 3, 128, 96),
        ]  # fmt: skip
        assert max(shape[0] for shape in shapes["h_a"]) > 1
        assert not shapes["g_s"]
        batched.decode(streams, 128, 128)
        assert sorted(shape[0] for shape in shapes["g_s"]) == [1, 1, 2, 3]


def test_threads_feed_other_devices() -> None:
    """The device named here has no arithmetic; what is run is the threads' own."""
    meeting = threading.Barrier(2)

    def work(k: int) -> tuple[int, int]:
        if k < 2:
            meeting.wait(60)  # both are at it
        return k, threading.get_ident()

    found = each(work, range(6), torch.device("meta"))
    assert [k for k, _ in found] == list(range(6))
    assert len({ident for _, ident in found[:2]}) == 2
    with pytest.raises(ZeroDivisionError):
        each(lambda k: 1 / k, [1, 0, 2], torch.device("meta"))
