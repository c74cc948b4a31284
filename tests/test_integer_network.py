"""The integers that entropy decoding depends on, in float32 as in float64 and in plain integers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from golden import reference as ref
from numpy.typing import NDArray

from archive_pipeline.codec.models import DEFAULT_MODEL, load_named
from archive_pipeline.pcdc.layers import IntegerConv2d
from archive_pipeline.pcdc.transforms import HyperScale

Integers = NDArray[np.int64]


@pytest.fixture(scope="module")
def network() -> HyperScale:
    """The released model's."""
    return load_named(DEFAULT_MODEL).networks.h_scale


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """The types that layers multiplied in."""
    seen: list[torch.dtype] = []
    multiply = IntegerConv2d._multiply

    def spy(layer: IntegerConv2d, x: torch.Tensor, *args: object) -> object:
        seen.append(x.dtype)
        return multiply(layer, x, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(IntegerConv2d, "_multiply", spy)
    with ref.threads(1):
        yield seen


def layer_in_integers(layer: IntegerConv2d, x: Integers) -> Integers:
    """The layer's documented arithmetic in 64-bit integers, (cin, H, W) to (cout, H, W)."""
    weight = np.rint(layer.weight.detach().numpy() * 256).astype(np.int64)
    bias = np.rint(layer.bias.detach().numpy() * 4096).astype(np.int64)
    k, (height, width) = weight.shape[-1], x.shape[1:]
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    total = np.broadcast_to(bias[:, None, None], (len(bias), height, width)).copy()
    for i in range(k):
        for j in range(k):
            shifted = padded[:, i : i + height, j : j + width].reshape(len(x), -1)
            total += (weight[:, :, i, j] @ shifted).reshape(total.shape)
    return ((total + (1 << layer.shift >> 1)) >> layer.shift).clip(0, layer.ceiling)


def indices_in_integers(network: HyperScale, z: Integers, image_step: int) -> Integers:
    """docs/format.md, section 6, in 64-bit integers."""
    x = np.concatenate([16 * z, np.full((1, *z.shape[1:]), 2 * image_step)])
    for i, layer in enumerate(network.layers):
        assert isinstance(layer, IntegerConv2d)
        x = layer_in_integers(layer, x)
        if i in (1, 3):
            c, h, w = x.shape
            x = x.reshape(c // 4, 2, 2, h, w).transpose(0, 3, 1, 4, 2).reshape(c // 4, 2 * h, 2 * w)
    return x - image_step


def indices(network: HyperScale, z: Integers, image_step: int) -> Integers:
    return network.indices(torch.from_numpy(z)[None], torch.tensor([image_step]))[0].numpy()


@pytest.mark.parametrize("image_step", [8, 31, 55])
@pytest.mark.parametrize("largest", [0, 3, 30, 127])
def test_indices_are_those_of_plain_integers(
    network: HyperScale, image_step: int, largest: int
) -> None:
    rng = np.random.default_rng(largest)
    shape = (network.layers[0].weight.shape[1] - 1, 3, 2)
    z = rng.integers(-largest, largest + 1, shape)
    extreme = np.where(rng.random(shape) < 0.5, -largest, largest)
    for symbols in (z, extreme, np.full(shape, largest), np.full(shape, -largest)):
        expected = indices_in_integers(network, symbols, image_step)
        np.testing.assert_array_equal(indices(network, symbols, image_step), expected)


def test_trained_weights_multiply_in_float32(network: HyperScale, used: list[torch.dtype]) -> None:
    rng = np.random.default_rng(0)
    indices(network, np.rint(rng.normal(size=(64, 10, 10)) * 4).astype(np.int64), 40)
    assert used == [torch.float32] * 6


def extreme_layer(cin: int) -> IntegerConv2d:
    layer = IntegerConv2d(cin, 2, 1).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1023.0, -1023.0]).view(2, 1, 1, 1) / 256)
        layer.bias.copy_(torch.tensor([1.0, -1.0]) / 4096)
    return layer


# 1023 * 4095 * cin + 129 is at most 2^24 up to four channels
@pytest.mark.parametrize(("cin", "kind"), [(4, torch.float32), (5, torch.float64)])
def test_sums_that_24_bits_do_not_hold_are_float64s(
    cin: int, kind: torch.dtype, used: list[torch.dtype]
) -> None:
    layer = extreme_layer(cin)
    layer.ceiling = 1 << 30
    x = np.random.default_rng(1).integers(4000, 4096, (cin, 5, 7))
    x[:, 0, 0] = 4095
    for sign in (1, -1):
        got = layer.integer_forward(torch.from_numpy(sign * x)[None].float())[0]
        assert used.pop() == kind
        np.testing.assert_array_equal(got.numpy(), layer_in_integers(layer, sign * x))


@pytest.mark.parametrize("mode", ["autocast", "medium"])
def test_a_machine_told_to_round_float32_still_gives_the_integers(
    network: HyperScale, mode: str, used: list[torch.dtype]
) -> None:
    """Where the setting does round, layers multiply again in float64."""
    z = np.random.default_rng(2).integers(-5, 6, (64, 6, 5))
    expected = indices(network, z, 40)
    used.clear()
    before = torch.get_float32_matmul_precision()
    try:
        if mode == "medium":
            torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            np.testing.assert_array_equal(indices(network, z, 40), expected)
    finally:
        torch.set_float32_matmul_precision(before)
    if mode == "autocast":
        assert used == [torch.float32, torch.float64] * 6
