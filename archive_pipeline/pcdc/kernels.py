"""Loops over symbols, compiled by Numba: the same integers as `entropy`'s NumPy has, several times
as fast.

Importing this takes Numba half a second, and compiling, once on a machine, seconds; what was
compiled is kept beside this file or in the user's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from archive_pipeline.pcdc.entropy import LOW, PRECISION, TOTAL, WORD_BITS


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # nowhere may what was compiled be kept
        return njit(nogil=True)(function)


@_compiled
def decode(
    state: NDArray[np.int64],
    words: NDArray[np.uint16],
    position: int,
    index: NDArray[np.uint8],
    entry: NDArray[np.uint16],
    frequency: NDArray[np.int64],
    cumulative: NDArray[np.int64],
    middle: NDArray[np.int32],
    symbols: NDArray[np.int64],
) -> int:
    """Decode a tile's symbols of a phase.

    Args:
        state: of its lanes, changed in place.
        words: all that it has; position: of the next one.
        index: (n,) tables; symbols: (n,) what is found.
        entry, frequency, cumulative, middle: `Tables`' arrays.

    Returns:
        The position afterwards; -1 where words have run out.
    """
    lanes = len(state)
    for k in range(len(index)):
        lane = k % lanes
        x = state[lane]
        slot = x & (TOTAL - 1)
        at = np.int64(entry[(np.int64(index[k]) << PRECISION) | slot])
        x = (x >> PRECISION) * frequency[at] + slot - cumulative[at]
        if x < LOW:
            if position >= len(words):
                return -1
            x = x << WORD_BITS | words[position]
            position += 1
        state[lane] = x
        symbols[k] = at - middle[index[k]]
    return position


@_compiled
def encode(
    state: NDArray[np.int64],
    entries: NDArray[np.uint16],
    frequency: NDArray[np.int64],
    cumulative: NDArray[np.int64],
    words: NDArray[np.uint16],
    left: int,
) -> int:
    """Encode a tile's symbols of a phase, the last one first.

    Args:
        state: of its lanes, changed in place.
        entries: (n,) of the symbols in their tables.
        words: filled from the end; left: how many are still free.

    Returns:
        How many are free afterwards.
    """
    lanes = len(state)
    for k in range(len(entries) - 1, -1, -1):
        lane = k % lanes
        x, at = state[lane], entries[k]
        often = frequency[at]
        if x >= often << (24 - PRECISION + WORD_BITS):
            left -= 1
            words[left] = x & 0xFFFF
            x >>= WORD_BITS
        quotient = x // often
        state[lane] = (quotient << PRECISION) + x - quotient * often + cumulative[at]
    return left


@_compiled
def _rounded(
    exact: np.float32,
    table: int,
    limits: NDArray[np.int16],
    middle: NDArray[np.int32],
    least_kept: NDArray[np.float32],
    table_bits: NDArray[np.float64],
    largest: int,
) -> tuple[np.int64, float, float]:
    """The symbol that `Rounding` makes of a latent in its level's steps, its bits by the table, and
    those of its escape."""
    size = abs(exact)
    limit = np.int64(limits[table])
    symbol = np.int64(min(np.rint(size), np.float32(largest)))
    at = middle[table]
    if 0 < symbol < limit and size < least_kept[at + symbol]:
        symbol -= 1
    beyond = symbol - limit
    signed = -symbol if exact < 0 else symbol
    escape = 8.0 * (1 + (beyond > 127) + (beyond > 16383)) if beyond >= 0 else 0.0
    return signed, table_bits[at + max(-limit, min(limit, signed))], escape


@_compiled
def round_symbols(
    index: NDArray[np.int16],
    v: NDArray[np.float32],
    offset: NDArray[np.int64],
    step: NDArray[np.float32],
    first: int,
    last: int,
    limits: NDArray[np.int16],
    middle: NDArray[np.int32],
    least_kept: NDArray[np.float32],
    table_bits: NDArray[np.float64],
    place: NDArray[np.int32],
    tables: NDArray[np.uint8],
    q: NDArray[np.int16],
    largest: int,
) -> tuple[int, float]:
    """What `Rounding.symbols` and `.bits` make of latents (M, h, w), in one pass.

    Args:
        index, v: see `quantiser.Quantised`.
        offset, step: of levels (h, w): what they shift indices by, and their steps.
        first, last: scale indices from the first on are coded, those above the last by its table.
        limits, middle, table_bits: `Tables`' arrays; least_kept: `Rounding`'s.
        place, tables, q: filled with where (in M, h, w), with which table and what is coded.
        largest: symbol there may be.

    Returns:
        How many are coded, and their bits.
    """
    count, bits = 0, 0.0
    channels, height, width = index.shape
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                table = index[c, i, j] - offset[i, j]
                if table < first:
                    continue
                table = min(table, last)
                exact = v[c, i, j] / step[i, j]
                signed, inside, escape = _rounded(
                    exact, table, limits, middle, least_kept, table_bits, largest
                )
                bits += inside
                bits += escape
                place[count] = (c * height + i) * width + j
                tables[count] = table
                q[count] = signed
                count += 1
    return count, bits


@_compiled
def level_costs(
    index: NDArray[np.int16],
    v: NDArray[np.float32],
    offset: NDArray[np.int64],
    step: NDArray[np.float32],
    first: int,
    last: int,
    limits: NDArray[np.int16],
    middle: NDArray[np.int32],
    least_kept: NDArray[np.float32],
    table_bits: NDArray[np.float64],
    side: int,
    bits: NDArray[np.float64],
    change: NDArray[np.float64],
    largest: int,
) -> None:
    """What the symbols of latents (M, h, w) cost at each level, by blocks of side x side latents.

    Args:
        offset, step: of the levels (K,).
        bits, change: (K, B_h, B_w), added to: bits of the symbols; their squared errors less those
            of no symbols at all, in image steps.
        others: as for `round_symbols`.
    """
    channels, height, width = index.shape
    for k in range(len(offset)):
        area = np.float64(step[k]) ** 2
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    table = index[c, i, j] - offset[k]
                    if table < first:
                        continue
                    table = min(table, last)
                    exact = v[c, i, j] / step[k]
                    signed, inside, escape = _rounded(
                        exact, table, limits, middle, least_kept, table_bits, largest
                    )
                    row, column = i // side, j // side
                    bits[k, row, column] += inside + escape
                    change[k, row, column] += signed * (signed - 2.0 * np.float64(exact)) * area
