"""Entropy coding: integer frequency tables and an interleaved rANS coder over many tiles.

Everything here is integer arithmetic, so a stream decodes to the same symbols on any machine.
The coder follows Duda's range ANS (arXiv:1311.2540) with Giesen's interleaving
(arXiv:1402.3392): each tile has a power of two of lanes that share one word sequence. Loops are
compiled by Numba (`kernels`). For decoding without it, and where little is decoded, NumPy steps all
lanes of all tiles at once, which makes Python's overhead a cost per step, not per symbol.

Parameters, part of the bitstream format: frequencies sum to 2^14, states lie in [2^24, 2^40),
words are 16 bits, a lane's symbols are every L-th of the tile's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.errors import ArchivePipelineError, importable
from archive_pipeline.stages import stage

PRECISION = 14
TOTAL = 1 << PRECISION
LOW = 1 << 24  # lower end of the state interval, also every encoder's first state
WORD_BITS = 16
STATE_BYTES = 5
STEPS_PER_LANE = 8192  # lanes are doubled until no lane has more symbols than this
MAX_LANES_LOG2 = 7
LEAST_LIMIT = 4  # of tables when a model is made: an escape takes a byte more than its symbol
# a phase of fewer than all lanes is never longer: the level map, which the choice of lanes does
# not count, has at most this many symbols
MAX_STEPS = 2 * STEPS_PER_LANE
CHECK_EVERY = 1024  # steps between looks at whether a stream has run dry
WORTH_COMPILED = 1 << 19  # symbols of a phase from which on loading Numba pays


class CorruptStream(ArchivePipelineError, ValueError):
    """A tile's bytes are not a valid PCDC stream."""


def symbol_limit(scale: float) -> int:
    """The largest symbol magnitude Q of a table for symbols of `scale` steps; it is the escape."""
    return max(LEAST_LIMIT, math.ceil(6 * scale))


def gaussian_shares(scale: float, limit: int) -> NDArray[np.float64]:
    """Probabilities of symbols -limit..limit of a Gaussian of `scale` steps, tails at the ends."""
    edges = [-math.inf, *(k + 0.5 for k in range(-limit, limit)), math.inf]
    return np.diff([0.5 * math.erfc(-edge / scale / math.sqrt(2)) for edge in edges])


def frequencies_of(shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Frequencies, all at least 1 and summing to 2^14, of symbols -Q..Q of these probabilities.

    Called when a model is made; readers use the stored tables.
    """
    frequencies = 1 + np.floor(shares * (TOTAL - len(shares))).astype(np.int64)
    frequencies[len(shares) // 2] += TOTAL - frequencies.sum()
    return frequencies


def level_frequencies(stay: float, levels: int) -> NDArray[np.int64]:
    """Return frequencies of level residuals (mod `levels`), `stay` being that of residual 0."""
    others = max(1, round((1 - stay) * TOTAL / (levels - 1)))
    return np.array([TOTAL - (levels - 1) * others] + [others] * (levels - 1), np.int64)


class Tables:
    """Frequency tables, looked up by table index and symbol.

    Args:
        frequencies: all tables end to end, integers >= 1.
        sizes: number of symbols of each table; each table sums to 2^14.
        zero: position of symbol 0 in each table.

    Raises:
        ValueError: the tables are inconsistent.
    """

    def __init__(
        self, frequencies: NDArray[np.int64], sizes: NDArray[np.int64], zero: NDArray[np.int64]
    ) -> None:
        frequencies, sizes, zero = (np.asarray(a, np.int64) for a in (frequencies, sizes, zero))
        start = np.concatenate([[0], np.cumsum(sizes)])
        if (
            frequencies.ndim != 1
            or sizes.ndim != 1
            or sizes.shape != zero.shape
            or not 1 <= len(sizes) <= 1 << 12
            or len(frequencies) >= 1 << 16
            # bounds before sums: neither may wrap around
            or (sizes < 1).any()
            or (sizes > len(frequencies)).any()
            or start[-1] != len(frequencies)
            or (frequencies < 1).any()
            or (frequencies > TOTAL).any()
            or (zero < 0).any()
            or (zero >= sizes).any()
            or (np.add.reduceat(frequencies, start[:-1]) != TOTAL).any()
        ):
            raise ValueError("inconsistent frequency tables")
        # one more table with a single certain symbol: coding it leaves the state as it is
        self.null = len(sizes)
        self.sizes = np.append(sizes, 1)
        self.zero = np.append(zero, 0)
        self.start = start
        self.frequency = np.append(frequencies, TOTAL).astype(np.int64)
        before = np.concatenate([np.cumsum(frequencies) - frequencies, [0]])
        before[:-1] -= np.repeat(before[start[:-1]], sizes)
        self.cumulative = before.astype(np.int64)
        self.entry = np.repeat(np.arange(len(self.frequency), dtype=np.uint16), self.frequency)
        self.middle = (start + self.zero).astype(np.int32)  # entry of symbol 0
        self.limits = self.zero.astype(np.int16)  # as `limit`
        self.bits = PRECISION - np.log2(self.frequency.astype(np.float64))

    def limit(self, index: NDArray[np.integer]) -> NDArray[np.int64]:
        """Largest symbol magnitude of symmetric tables, the escape."""
        return self.zero[index]


def lanes_log2(symbols: int) -> int:
    """Logarithm of the number of lanes for so many symbols in a tile."""
    lanes = 0
    while symbols > STEPS_PER_LANE << lanes and lanes < MAX_LANES_LOG2:
        lanes += 1
    return lanes


def _interleave(rows: list[NDArray], lanes: int, fill: int, dtype: type) -> NDArray:
    """Lay one sequence a tile out as (steps, tiles, lanes), filled up with `fill`."""
    steps = max((-(-len(r) // lanes) for r in rows), default=0)
    out: NDArray = np.full((len(rows), steps * lanes), fill, dtype)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return np.ascontiguousarray(out.reshape(len(rows), steps, lanes).transpose(1, 0, 2))


@stage("entropy")
def encode(tables: Tables, phases: list[list[tuple[NDArray, NDArray]]], lanes: int) -> list[bytes]:
    """Encode tiles that share a lane count.

    Args:
        phases: in decoding order; each lists, a tile, (table indices, symbols), both (n,)
            integers, symbols within their tables.
        lanes: lanes of every tile.

    Returns:
        a tile's states (5 bytes a lane) and words, little endian.
    """
    from archive_pipeline.pcdc import kernels

    payloads = []
    for t in range(len(phases[0])):
        tile = [phase[t] for phase in phases]
        words = np.empty(sum(len(symbols) for _, symbols in tile), np.uint16)
        state, left = np.full(lanes, LOW, np.int64), len(words)
        for index, symbols in reversed(tile):  # the last symbol first
            entries = (tables.middle[index] + symbols).astype(np.uint16)
            left = kernels.encode(state, entries, tables.frequency, tables.cumulative, words, left)
        head = state.astype("<u8").view(np.uint8).reshape(lanes, 8)[:, :STATE_BYTES]
        payloads.append(head.tobytes() + words[left:].astype("<u2").tobytes())
    return payloads


def one_by_one(function: Callable[[int], Any], items: Iterable[int]) -> list[Any]:
    """Results of a function for all items, in order."""
    return [function(item) for item in items]


def _is_worth_compiling(symbols: int) -> bool:
    loaded = "archive_pipeline.pcdc.kernels" in sys.modules
    return loaded or (symbols >= WORTH_COMPILED and importable("numba"))


class Decoder:
    """Decodes tiles that share a lane count, phase by phase.

    Args:
        payloads: a tile's bytes as `encode` made them, followed by anything.
        lanes: lanes of every tile.
        each: results of a function for every item; it may run them side by side.

    Raises:
        CorruptStream: a payload is shorter than its states, or a state is out of range.
    """

    def __init__(
        self,
        tables: Tables,
        payloads: list[bytes],
        lanes: int,
        each: Callable[[Callable[[int], Any], Iterable[int]], list[Any]] = one_by_one,
    ) -> None:
        self.tables = tables
        self._each = each
        self.lanes = lanes
        head = lanes * STATE_BYTES
        if any(len(p) < head for p in payloads):
            raise CorruptStream("stream ends inside the coder's states")
        raw = np.zeros((len(payloads), lanes, 8), np.uint8)
        for t, payload in enumerate(payloads):
            part = np.frombuffer(payload, np.uint8, head)
            raw[t, :, :STATE_BYTES] = part.reshape(lanes, STATE_BYTES)
        self.state = raw.view("<i8")[..., 0].astype(np.int64)
        if (self.state < LOW).any():
            raise CorruptStream("coder state out of range")
        self.available = np.array([(len(p) - head) // 2 for p in payloads], np.int64)
        # padded, so that reads past the end stay inside until they are noticed
        longest = int(self.available.max(initial=0)) + CHECK_EVERY * lanes
        self.words = np.zeros((len(payloads), longest), np.uint16)
        for t, payload in enumerate(payloads):
            n = int(self.available[t])
            self.words[t, :n] = np.frombuffer(payload, "<u2", n, head)
        self.position = np.zeros(len(payloads), np.int64)

    @stage("entropy")
    def decode(self, indices: list[NDArray]) -> list[NDArray[np.int64]]:
        """Decode a phase: a tile's table indices (n,) to its symbols (n,) int64.

        Raises:
            CorruptStream: a stream ended early, or has fewer lanes than encoders use.
        """
        tables, lanes = self.tables, self.lanes
        if lanes < 1 << MAX_LANES_LOG2 and any(len(i) > MAX_STEPS * lanes for i in indices):
            raise CorruptStream("too few lanes for so many symbols")
        if _is_worth_compiling(sum(map(len, indices))):
            return self._decode_compiled(indices)
        grid = _interleave(indices, lanes, tables.null, np.uint16)
        steps, count, _ = grid.shape
        base = grid.reshape(steps, count * lanes).astype(np.int64) << PRECISION
        entries = np.empty(base.shape, np.uint16)
        state, position = self.state.reshape(-1), self.position
        words = self.words.reshape(-1)
        rows = np.arange(count) * self.words.shape[1]
        slot, at, gathered = (np.empty_like(state) for _ in range(3))
        short = np.empty(state.shape, np.bool_)
        numbers = np.arange(len(state))
        tile_of = numbers // lanes
        # rows of one number each: NumPy takes longer over scalars
        mask, shift, low = (np.full_like(state, n) for n in (TOTAL - 1, PRECISION, LOW))
        for t, (table, entry) in enumerate(zip(base, entries, strict=True)):
            np.bitwise_and(state, mask, slot)
            np.bitwise_or(table, slot, at)
            tables.entry.take(at, out=entry, mode="clip")
            at[:] = entry
            tables.frequency.take(at, out=gathered, mode="clip")
            np.right_shift(state, shift, state)
            np.multiply(state, gathered, state)
            np.add(state, slot, state)
            tables.cumulative.take(at, out=gathered, mode="clip")
            np.subtract(state, gathered, state)
            np.less(state, low, short)
            [lane] = short.nonzero()
            if len(lane):
                tile = tile_of[lane]
                read = np.bincount(tile, minlength=count)
                # each tile's lanes take its words in order
                place = (rows + position - read.cumsum() + read)[tile] + numbers[: len(lane)]
                state[lane] = state[lane] << WORD_BITS | words[place]
                position = position + read
            if t % CHECK_EVERY == CHECK_EVERY - 1 and (position > self.available).any():
                raise CorruptStream("stream ends early")
        self.state, self.position = state.reshape(count, lanes), position
        if (position > self.available).any():
            raise CorruptStream("stream ends early")
        flat = entries.reshape(steps, count, lanes).transpose(1, 0, 2).reshape(count, steps * lanes)
        return [
            flat[t, : len(i)].astype(np.int64) - tables.start[i] - tables.zero[i]
            for t, i in enumerate(indices)
        ]

    def _decode_compiled(self, indices: list[NDArray]) -> list[NDArray[np.int64]]:
        from archive_pipeline.pcdc import kernels

        tables = self.tables
        arrays = tables.entry, tables.frequency, tables.cumulative, tables.middle

        def tile(t: int) -> NDArray[np.int64]:
            symbols = np.empty(len(indices[t]), np.int64)
            words, index = self.words[t, : self.available[t]], indices[t].astype(np.uint16)
            state, position = self.state[t], int(self.position[t])
            self.position[t] = kernels.decode(state, words, position, index, *arrays, symbols)
            return symbols

        symbols = self._each(tile, range(len(indices)))
        if (self.position < 0).any():
            raise CorruptStream("stream ends early")
        return symbols

    def finish(self) -> list[int]:
        """Return the bytes used of each payload.

        Raises:
            CorruptStream: the states are not where every encoder starts.
        """
        if (self.state != LOW).any():
            raise CorruptStream("checksum of the coder's state fails")
        return [self.lanes * STATE_BYTES + 2 * int(p) for p in self.position]


def pack_escapes(magnitudes: NDArray[np.integer]) -> bytes:
    """Pack how far escaped symbols lie beyond their tables, as LEB128."""
    out = bytearray()
    for value in magnitudes.tolist():
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out)


def unpack_escapes(data: bytes, count: int) -> NDArray[np.int64]:
    """Reverse `pack_escapes`; the data must hold `count` values and nothing else.

    Raises:
        CorruptStream: it does not.
    """
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 128)
    if len(ends) != count or (count and ends[-1] != len(raw) - 1) or (not count and len(raw)):
        raise CorruptStream("escape values do not match the symbols")
    if not count:
        return np.zeros(0, np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts > 2).any():
        raise CorruptStream("escape value out of range")
    shift = 7 * (np.arange(len(raw)) - np.repeat(starts, ends - starts + 1))
    return np.add.reduceat((raw & 127).astype(np.int64) << shift, starts)
