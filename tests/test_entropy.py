"""Entropy coder: exact round trips, sizes near the ideal, no surprises from damaged streams."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archive_pipeline.pcdc import entropy
from archive_pipeline.pcdc.entropy import TOTAL, CorruptStream, Decoder, Tables

Phases = list[list[tuple[np.ndarray, np.ndarray]]]


@pytest.fixture(params=["numpy", "compiled"], scope="module", autouse=True)
def _loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """Decoding with and without Numba; encoding always takes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entropy, "_is_worth_compiling", lambda _: request.param == "compiled")
        yield


def gaussian_tables(scales: list[float]) -> Tables:
    rows = [
        entropy.frequencies_of(entropy.gaussian_shares(s, entropy.symbol_limit(s))) for s in scales
    ]
    return Tables(
        np.concatenate(rows),
        np.array([len(r) for r in rows]),
        np.array([len(r) // 2 for r in rows]),
    )


def random_tables(rng: np.random.Generator, count: int) -> Tables:
    """Tables of any shape: flat, skewed, of a single symbol, of thousands."""
    rows = []
    for _ in range(count):
        size = int(rng.choice([1, 2, 3, 17, 300, 2000]))
        weight = rng.random(size) ** rng.choice([1, 8])
        row = 1 + np.floor(weight / weight.sum() * (TOTAL - size)).astype(np.int64)
        row[rng.integers(size)] += TOTAL - row.sum()
        rows.append(row)
    sizes = np.array([len(r) for r in rows])
    return Tables(np.concatenate(rows), sizes, rng.integers(0, sizes))


def draw(
    rng: np.random.Generator, tables: Tables, count: int, *, by_frequency: bool
) -> tuple[np.ndarray, np.ndarray]:
    index = rng.integers(0, tables.null, count)
    if by_frequency:
        slot = rng.integers(0, TOTAL, count)
        entry = tables.entry[index * TOTAL + slot].astype(np.int64)
    else:
        entry = tables.start[index] + rng.integers(0, tables.sizes[index])
    return index, entry - tables.start[index] - tables.zero[index]


def decode(tables: Tables, payloads: list[bytes], phases: Phases, lanes: int) -> list[int]:
    """Decode all phases, compare them, and return the bytes used."""
    decoder = Decoder(tables, payloads, lanes)
    for phase in phases:
        for got, (_, expected) in zip(decoder.decode([i for i, _ in phase]), phase, strict=True):
            np.testing.assert_array_equal(got, expected)
    return decoder.finish()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tables=st.integers(1, 6),
    lanes=st.integers(0, 7),
    by_frequency=st.booleans(),
    sizes=st.lists(
        st.lists(st.sampled_from([0, 1, 2, 63, 64, 65, 400]), min_size=3, max_size=3),
        min_size=1,
        max_size=5,
    ),
)
def test_round_trip(
    seed: int, tables: int, lanes: int, by_frequency: bool, sizes: list[list[int]]
) -> None:
    rng = np.random.default_rng(seed)
    table = random_tables(rng, tables)
    phases = [
        [draw(rng, table, n, by_frequency=by_frequency) for n in row] for row in np.array(sizes).T
    ]
    payloads = entropy.encode(table, phases, 1 << lanes)
    used = decode(table, [p + b"tail" for p in payloads], phases, 1 << lanes)
    assert used == [len(p) for p in payloads]
    # company changes neither bytes nor symbols
    for t, payload in enumerate(payloads):
        alone = [[phase[t]] for phase in phases]
        assert entropy.encode(table, alone, 1 << lanes) == [payload]
        decode(table, [payload], alone, 1 << lanes)


@pytest.mark.parametrize("lanes", [1, 8, 128])
@pytest.mark.parametrize("scale", [0.15, 0.6, 1.0, 7.3, 58.7])
def test_size_is_near_the_ideal(scale: float, lanes: int) -> None:
    rng = np.random.default_rng(1)
    tables = gaussian_tables([scale])
    index, symbols = np.zeros(30000, np.int64), np.rint(rng.normal(size=30000) * scale)
    limit = tables.limit(index)
    symbols = symbols.astype(np.int64).clip(-limit, limit)
    [payload] = entropy.encode(tables, [[(index, symbols)]], lanes)
    ideal = tables.bits[tables.zero[0] + symbols].sum() / 8
    # a lane's final state and its first word carry up to 5 bytes, of which 3 say nothing
    assert ideal <= len(payload) <= 1.005 * ideal + 5 * lanes


@pytest.mark.parametrize("scale", [0.15, 0.5, 2.0, 20.0, 58.7])
def test_gaussian_tables_are_near_the_true_entropy(scale: float) -> None:
    frequencies = entropy.frequencies_of(
        entropy.gaussian_shares(scale, entropy.symbol_limit(scale))
    )
    assert frequencies.sum() == TOTAL
    assert frequencies.min() >= 1
    np.testing.assert_array_equal(frequencies, frequencies[::-1])
    edges = np.arange(len(frequencies) - 1) - len(frequencies) // 2 + 0.5
    inner = [0.5 * math.erfc(-edge / scale / math.sqrt(2)) for edge in edges]
    true = np.diff([0.0, *inner, 1.0])
    excess = -(true * np.log2(frequencies / TOTAL / np.maximum(true, 1e-300))).sum()
    # floors of one 2^14th for up to 707 symbols cost most where there are many
    assert 0 <= excess < 0.01 + 0.0011 * scale


def test_certain_symbols_cost_nothing() -> None:
    tables = Tables(np.array([TOTAL]), np.array([1]), np.array([0]))
    zeros = np.zeros(100_000, np.int64)
    assert entropy.encode(tables, [[(zeros, zeros)]], 1) == [entropy.LOW.to_bytes(5, "little")]


def test_empty_phases_and_no_tiles() -> None:
    tables = gaussian_tables([1.0])
    nothing = np.zeros(0, np.int64)
    phases: Phases = [[(nothing, nothing)] * 2] * 3
    payloads = entropy.encode(tables, phases, 4)
    assert [len(p) for p in payloads] == [20, 20]
    assert decode(tables, payloads, phases, 4) == [20, 20]
    assert entropy.encode(tables, [[], [], []], 4) == []
    assert Decoder(tables, [], 4).decode([]) == []


def test_lanes() -> None:
    assert [entropy.lanes_log2(n) for n in (0, 8192, 8193, 16384, 16385)] == [0, 0, 1, 1, 2]
    assert entropy.lanes_log2(10**9) == entropy.MAX_LANES_LOG2


# ------------------------------------------------------------------------ escapes


@given(st.lists(st.integers(0, (1 << 21) - 1)))
def test_escapes_round_trip(values: list[int]) -> None:
    packed = entropy.pack_escapes(np.array(values, np.int64))
    assert entropy.unpack_escapes(packed, len(values)).tolist() == values
    for wrong in (packed + b"\0", packed + b"\x80", packed[:-1]):
        if wrong != packed:
            with pytest.raises(CorruptStream):
                entropy.unpack_escapes(wrong, len(values))


def test_overlong_escape() -> None:
    with pytest.raises(CorruptStream):
        entropy.unpack_escapes(b"\xff\xff\xff\x01", 1)


@given(st.binary(max_size=40), st.integers(0, 40))
def test_any_escape_bytes(data: bytes, count: int) -> None:
    try:
        values = entropy.unpack_escapes(data, count)
    except CorruptStream:
        return
    assert len(values) == count
    assert ((values >= 0) & (values < 1 << 21)).all()


# ------------------------------------------------------------------------- damage


def sample() -> tuple[Tables, Phases, bytes]:
    rng = np.random.default_rng(5)
    tables = gaussian_tables([0.3, 1.0, 9.0])
    phases: Phases = [[draw(rng, tables, n, by_frequency=True)] for n in (30, 0, 900)]
    [payload] = entropy.encode(tables, phases, 4)
    return tables, phases, payload


def attempt(tables: Tables, payload: bytes, phases: Phases, lanes: int = 4) -> bool:
    """Decode what may be damaged; whether the coder accepts it."""
    try:
        decoder = Decoder(tables, [payload], lanes)
        for phase in phases:
            [(index, _)] = phase
            [symbols] = decoder.decode([index])
            position = symbols + tables.zero[index]
            assert ((position >= 0) & (position < tables.sizes[index])).all()
        return decoder.finish() == [len(payload)]
    except CorruptStream:
        return False


def test_every_truncation_is_refused() -> None:
    tables, phases, payload = sample()
    assert attempt(tables, payload, phases)
    assert not any(attempt(tables, payload[:n], phases) for n in range(len(payload)))


def test_mutations_are_refused_or_harmless() -> None:
    tables, phases, payload = sample()
    rng = np.random.default_rng(0)
    accepted = 0
    for _ in range(400):
        damaged = bytearray(payload)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        if bytes(damaged) != payload:
            accepted += attempt(tables, bytes(damaged), phases)
    # the final states are a checksum of 24 bits a lane: luck would be astonishing
    assert accepted == 0


def test_foreign_bytes_are_refused() -> None:
    tables, phases, payload = sample()
    rng = np.random.default_rng(0)
    for size in (0, 5, 19, 20, 21, 400, len(payload), 4000):
        assert not attempt(tables, rng.bytes(size), phases)
        assert not attempt(tables, b"\xff" * size, phases)


def test_one_bad_tile_is_told_from_good_ones_by_decoding_it_alone() -> None:
    tables, phases, payload = sample()
    double = [[row, row] for [row] in phases]
    decode(tables, [payload, payload], double, 4)
    with pytest.raises(CorruptStream):
        decode(tables, [payload, payload[:-2]], double, 4)


def test_too_few_lanes_are_refused_before_the_work() -> None:
    """A corrupt header must not turn megapixels of parallel work into a serial loop."""
    tables = gaussian_tables([0.2])
    index = np.zeros(10_000_000, np.int64)
    decoder = Decoder(tables, [entropy.LOW.to_bytes(5, "little")], 1)
    start = time.process_time()
    with pytest.raises(CorruptStream, match="lanes"):
        decoder.decode([index])
    assert time.process_time() - start < 1


def test_stream_that_ran_dry_is_refused_early() -> None:
    tables = gaussian_tables([58.0])
    index = np.zeros(128 * 100_000, np.uint8)
    decoder = Decoder(tables, [entropy.LOW.to_bytes(5, "little") * 128], 128)
    start = time.process_time()
    with pytest.raises(CorruptStream, match="ends early"):
        decoder.decode([index])
    assert time.process_time() - start < 3


# ------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("frequencies", "sizes", "zero"),
    [
        ([TOTAL - 1, 1], [1, 1], [0, 0]),  # not one sum each
        ([TOTAL, 0], [2], [0]),  # no code for a symbol
        ([TOTAL + 1, -1], [2], [0]),
        ([TOTAL], [2], [0]),  # sizes and frequencies differ
        ([TOTAL], [1], [1]),
        ([TOTAL], [1], [-1]),
        ([TOTAL], [1], [0, 0]),
        ([TOTAL, TOTAL], [3, -1], [0, 0]),
        ([], [], []),
        ([[TOTAL // 2, TOTAL // 2]], [1], [0]),
        # sums and sizes that wrap around in 64 bits
        ([1 << 62, 1 << 62, 1 << 62, (1 << 62) - 1, TOTAL + 1], [5], [0]),
        ([TOTAL], [1 << 62] * 4 + [1], [0] * 5),
        ([1] * (1 << 16), [TOTAL] * 4, [0] * 4),  # more entries than 16 bits can name
    ],
)
def test_inconsistent_tables(frequencies: list, sizes: list, zero: list) -> None:
    with pytest.raises(ValueError, match="inconsistent"):
        Tables(np.array(frequencies, np.int64), np.array(sizes, np.int64), np.array(zero, np.int64))
