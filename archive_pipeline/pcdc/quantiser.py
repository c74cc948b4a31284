"""A tile at an image step: what its latents are coded against, their symbols, and what these cost.

Symbols are rounded with an eye on their bits (rate-distortion optimised quantisation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from archive_pipeline.pcdc import entropy
from archive_pipeline.pcdc.allocation import BlockCosts
from archive_pipeline.pcdc.codec import Codec, joined
from archive_pipeline.pcdc.constants import (
    BLOCK,
    ERROR_WEIGHT,
    FIRST_CODED_SCALE,
    HYPER_LIMIT,
    HYPER_STRIDE,
    LEVEL_OFFSETS,
    SCALE_COUNT,
    STEPS_PER_OCTAVE,
)
from archive_pipeline.pcdc.transforms import pad_to, step_size

SYMBOL_LIMIT = (1 << 15) - 1

# of `expected_bytes`: one of so many latents is looked at, in both directions; and bytes that
# log(1 + (2 y / step)^2) stands for, on aerial frames at 2 to 0.1 bits a pixel
EVERY = 3
BYTES_EACH = 0.18


class Rounding:
    """How numbers become symbols: to the nearest integers, or those below where that saves enough.

    Args:
        error_weight: bits that the squared error of a symbol is worth, in steps.
    """

    def __init__(self, tables: entropy.Tables, error_weight: float = ERROR_WEIGHT) -> None:
        self.tables = tables
        self.error_weight = error_weight
        self.least_kept = least_kept(tables, error_weight)

    @property
    def rules(self) -> tuple[int, int, NDArray, NDArray, NDArray, NDArray]:
        """First and last scale index, and arrays of the tables, as `kernels` take them."""
        tables = self.tables
        arrays = tables.limits, tables.middle, self.least_kept, tables.bits
        return FIRST_CODED_SCALE, SCALE_COUNT - 1, *arrays

    def symbols(self, v: NDArray[np.float32], index: NDArray[np.integer]) -> NDArray[np.int16]:
        """Symbols of v, in steps, by the tables of their scale indices; all of one shape."""
        magnitude = np.abs(v)
        size = np.minimum(np.rint(magnitude), np.float32(SYMBOL_LIMIT)).astype(np.int16)
        limit = self.tables.limits.take(index)
        entry = self.tables.middle.take(index)
        entry += np.minimum(size, limit)
        lower = magnitude < self.least_kept.take(entry)
        lower &= size < limit  # an escape's bits depend on more than its table
        lower &= size > 0
        size -= lower
        return np.where(v < 0, -size, size)

    def bits(self, symbols: NDArray[np.integer], index: NDArray[np.integer]) -> NDArray[np.float64]:
        """Bits of symbols (n,) by the tables of their scale indices (n,), escapes included."""
        limit = self.tables.limits.take(index)
        entry = self.tables.middle.take(index)
        entry += np.clip(symbols, -limit, limit)
        bits = self.tables.bits.take(entry)
        size = np.abs(symbols)
        escaped = np.flatnonzero(size >= limit)
        if len(escaped):
            beyond = size[escaped] - limit[escaped]
            bits[escaped] += 8 * (1 + (beyond > 127) + (beyond > 16383).astype(np.int64))
        return bits


def least_kept(tables: entropy.Tables, error_weight: float) -> NDArray[np.float32]:
    """For every entry of the tables the least magnitude that is coded as its symbol.

    A symbol s > 0 costs bits(s) + w (v - s)^2 with w = `error_weight`; below this v, s - 1 costs
    less. Entries of symbols <= 0 are not asked for.
    """
    count = len(tables.bits)
    table = np.searchsorted(tables.start[1:], np.arange(count), side="right")
    symbol = np.arange(count) - tables.start[table] - tables.zero[table]
    dearer = np.diff(tables.bits, prepend=tables.bits[0])
    return (symbol - 0.5 + dearer / (2 * error_weight)).astype(np.float32)


@dataclass
class Coded:
    """A tile's symbols at some levels, all but those of the level map.

    Attributes:
        z, z_index: (Z, h / 4, w / 4) int64.
        place: (n,) which latents are coded, of (M, h, w) in this order.
        index: (n,) their scale indices.
        q: (n,) their symbols.
        bits: of z and q.
    """

    z: NDArray[np.int64]
    z_index: NDArray[np.int64]
    place: NDArray[np.int32]
    index: NDArray[np.uint8]
    q: NDArray[np.int16]
    bits: float


@dataclass
class Quantised:
    """A tile at one image step: hyper-latents, and what latents are coded against.

    Attributes:
        z, z_index: (Z, h / 4, w / 4) int64, hyper-latents and their scale indices.
        z_bits: their bits.
        index: (M, h, w) int16 scale indices, not yet shifted by a level nor clamped.
        v: (M, h, w) float32, (y - mean) / step(g).
    """

    z: NDArray[np.int64]
    z_index: NDArray[np.int64]
    z_bits: float
    index: NDArray[np.int16]
    v: NDArray[np.float32]

    def symbols(self, rounding: Rounding, offset: int | NDArray[np.int64]) -> Coded:
        """The tile's symbols at a level's offset, or at those of a plane (h, w)."""
        from archive_pipeline.pcdc import kernels

        offsets = np.broadcast_to(np.asarray(offset, np.int64), self.v.shape[1:])
        place = np.empty(self.v.size, np.int32)
        index, q = np.empty(self.v.size, np.uint8), np.empty(self.v.size, np.int16)
        count, bits = kernels.round_symbols(
            self.index,
            self.v,
            offsets,
            relative_step(offsets),
            *rounding.rules,
            place,
            index,
            q,
            SYMBOL_LIMIT,
        )
        found = place[:count].copy(), index[:count].copy(), q[:count].copy()
        return Coded(self.z, self.z_index, *found, bits + self.z_bits)

    def block_costs(self, rounding: Rounding) -> BlockCosts:
        """Exact costs of the tile's blocks at every level."""
        from archive_pipeline.pcdc import kernels

        h, w = self.v.shape[1:]
        rows, columns = -(-h // BLOCK), -(-w // BLOCK)
        block = (np.arange(h)[:, None] // BLOCK * columns + np.arange(w) // BLOCK).reshape(-1)
        square = np.square(self.v, dtype=np.float64).sum(0).reshape(-1)
        nothing = np.bincount(block, square, rows * columns).reshape(rows, columns)
        bits = np.zeros((len(LEVEL_OFFSETS), rows, columns))
        change = np.zeros_like(bits)  # (v - q)^2 - v^2
        offsets = np.array(LEVEL_OFFSETS, np.int64)
        kernels.level_costs(
            self.index,
            self.v,
            offsets,
            relative_step(offsets),
            *rounding.rules,
            BLOCK,
            bits,
            change,
            SYMBOL_LIMIT,
        )
        return BlockCosts(bits, np.maximum(nothing + change, 0))


def relative_step(offset: int | NDArray[np.int64]) -> NDArray[np.float32]:
    """The step of a level in image steps, from its offset."""
    return np.exp2(np.divide(offset, STEPS_PER_OCTAVE)).astype(np.float32)


@torch.no_grad()
def quantise(
    codec: Codec, latents: Sequence[Tensor], image_steps: Sequence[int], rounding: Rounding
) -> list[Quantised]:
    """Hyper-latents of tiles, and their latents against what these predict.

    Args:
        latents: y (1, M, h, w) of every tile, all of one shape.
        image_steps: of every tile.
    """
    networks = codec.model.networks
    y = joined(latents)
    step = torch.tensor(image_steps, device=y.device)
    h, w = y.shape[-2:]
    exact = codec.to_host(networks.h_a(pad_to(y, HYPER_STRIDE), step))
    z_index = [codec.z_index(g, *exact.shape[2:]) for g in image_steps]
    z = [hyper_symbols(rounding, *each) for each in zip(exact, z_index, strict=True)]
    z_hat = codec.to_device(z)
    mean = networks.h_mean(z_hat.to(codec.dtype), step)[..., :h, :w]
    v = codec.to_host(y.sub(mean).div_(step_size(step).view(-1, 1, 1, 1)).float())
    index = codec.to_host(networks.h_scale.indices(z_hat, step)[..., :h, :w])
    made = zip(z, z_index, index, v, strict=True)
    return [Quantised(a, b, hyper_bits(rounding, a, b), i, x) for a, b, i, x in made]


def hyper_symbols(
    rounding: Rounding, exact: NDArray[np.floating], index: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Symbols (Z, h, w) of hyper-latents, by the tables of their scale indices."""
    # hyper-latents never escape: they stay one inside their table's ends
    bound = np.minimum(rounding.tables.limit(index) - 1, HYPER_LIMIT)
    bound = np.where(index < FIRST_CODED_SCALE, 0, bound)
    if rounding.error_weight < ERROR_WEIGHT:
        z = rounding.symbols(exact.astype(np.float32), index).astype(np.int64)
    else:
        z = np.rint(exact).astype(np.int64)
    return np.clip(z, -bound, bound)


def hyper_bits(rounding: Rounding, z: NDArray[np.int64], index: NDArray[np.int64]) -> float:
    """Bits of hyper-latents (Z, h, w) by the tables of their scale indices."""
    coded = index >= FIRST_CODED_SCALE
    return float(rounding.bits(z[coded], index[coded]).sum())


def expected_bytes(y: Tensor, exponents: NDArray[np.int64]) -> NDArray[np.float64]:
    """About how many bytes latents y (1, M, h, w) take at steps of these exponents (k,), float64.

    It is known without quantising, from how far latents lie off the mean of those around them, as
    hyper-latents tell it. Where tiles are compared, it is some hundredths of an octave off.
    """
    rows, columns = (torch.arange(0, n, EVERY, device=y.device) for n in y.shape[-2:])
    around = F.avg_pool2d(y, HYPER_STRIDE, ceil_mode=True)[0]
    around = around[:, rows // HYPER_STRIDE][..., columns // HYPER_STRIDE]
    some = (y[0, :, ::EVERY, ::EVERY] - around).float().square()
    scale = y[0].numel() / some.numel() * BYTES_EACH
    knots = np.arange(0, exponents.max() + STEPS_PER_OCTAVE, STEPS_PER_OCTAVE)
    curve = [
        math.log1p(scale * float((some * (4 / step**2)).log1p_().sum()))
        for step in step_size(torch.from_numpy(knots)).tolist()
    ]
    return np.expm1(np.interp(exponents, knots, curve))
