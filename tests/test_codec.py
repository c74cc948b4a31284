"""Codec: what the encoder means arrives, within the budget, whatever the company and device."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import cache
from threading import get_ident

import numpy as np
import pytest
import torch
from golden import reference as ref
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from transform_start import klt_start

from archive_pipeline.codec.models import DEFAULT_MODEL, codec_for, load_named, read_policy
from archive_pipeline.pcdc import encoding, entropy
from archive_pipeline.pcdc.allocation import Allocator, BlockCosts, BudgetTooSmall
from archive_pipeline.pcdc.bitstream import HEADER_BYTES, MODEL_BYTES, Header, UnknownModel
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.constants import (
    ERROR_WEIGHT,
    FIRST_CODED_SCALE,
    HYPER_LIMIT,
    LEVEL_OFFSETS,
    MAX_IMAGE_STEP,
    MIN_IMAGE_STEP,
    SCALE_COUNT,
)
from archive_pipeline.pcdc.decoding import Symbols, levels_from_residuals, residuals_from_levels
from archive_pipeline.pcdc.encoding import Encoding, encode_tiles, least_error
from archive_pipeline.pcdc.entropy import CorruptStream, one_by_one
from archive_pipeline.pcdc.model import Model, build_files
from archive_pipeline.pcdc.parallel import each
from archive_pipeline.pcdc.policy import load_policy
from archive_pipeline.pcdc.quantiser import Quantised, relative_step
from archive_pipeline.pcdc.transforms import TransformCodec, TransformConfig

CPU = torch.device("cpu")
Tiles = list[NDArray[np.uint8]]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with ref.threads(1):  # small tiles wait for a second thread longer than they work
        yield


@pytest.fixture(scope="module")
def tiles() -> Tiles:
    return [
        ref.texture(128, 128, 1),
        ref.texture(128, 96, 2),
        ref.texture(1, 1),
        ref.constant(0, 0),
        ref.noise(33, 70),
        ref.constant(64, 64),
        ref.spots(50, 128),
        ref.texture(17, 128, 3),
    ]


@pytest.fixture(scope="module")
def streams(tiles: Tiles) -> list[bytes]:
    with ref.threads(1):
        return encode_tiles(ref.tiny_codec(), tiles, budget(tiles, 1.0))


def budget(tiles: Tiles, bits_per_pixel: float) -> int:
    return int(sum(t.shape[0] * t.shape[1] for t in tiles) * bits_per_pixel / 8)


def encode(codec: Codec, tiles: Tiles, allowed: int) -> list[bytes] | BudgetTooSmall:
    try:
        return encode_tiles(codec, tiles, allowed)
    except BudgetTooSmall as error:
        return error


def symbols_of(codec: Codec, streams: list[bytes]) -> list[Symbols]:
    out = codec.decode_symbols(streams, 4096, 4096)
    for symbols in out:
        assert isinstance(symbols, Symbols), symbols
    return out  # type: ignore[return-value]


# ------------------------------------------------------------------------ meaning


@DTYPES
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "together"])
def test_streams_say_what_the_encoder_meant(
    tiles: Tiles, dtype: torch.dtype, threads: int, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    meant: set[tuple[bytes, ...]] = set()
    coder = entropy.encode

    def spy(tables: entropy.Tables, phases: list, lanes: int) -> list[bytes]:
        for t in range(len(phases[0])):
            meant.add(tuple(np.asarray(p[t][1], "<i4").tobytes() for p in phases))
        return coder(tables, phases, lanes)

    monkeypatch.setattr(entropy, "encode", spy)
    encoder, decoder = ref.tiny_codec(dtype), ref.tiny_codec()
    chosen = tiles[:1] if alone else tiles if threads == 1 else tiles[1:5]
    with ref.threads(threads):
        streams = encode_tiles(encoder, chosen, budget(chosen, 1.0))
    tables = decoder.model.tables
    for tile, symbols in zip(chosen, symbols_of(decoder, streams), strict=True):
        assert (symbols.height, symbols.width) == tile.shape[:2]
        if not tile.size:
            continue
        z_index, q_index = ref.scale_indices(decoder.model, symbols)
        coded, z_coded = q_index >= FIRST_CODED_SCALE, z_index >= FIRST_CODED_SCALE
        limit = tables.limit(q_index[coded])
        residuals = residuals_from_levels(symbols.levels).reshape(-1)
        said = (residuals, symbols.z[z_coded], np.clip(symbols.q[coded], -limit, limit))
        assert tuple(np.asarray(s, "<i4").tobytes() for s in said) in meant
        assert not symbols.z[~z_coded].any()
        assert not symbols.q[~coded].any()


@cache
def wide_files() -> dict[str, bytes]:
    """An untrained model with a shortcut, and more latents than its networks are wide."""
    torch.manual_seed(0)
    networks = TransformCodec(TransformConfig(40, 8, 16, 24, 1, 1))
    crops = np.stack([ref.texture(64, 64, seed) for seed in range(24)])
    klt_start(networks, torch.from_numpy(crops).permute(0, 3, 1, 2))
    with torch.no_grad():
        networks.h_mean.net[-1].weight.normal_(0, 0.01)
    return build_files(networks)


@pytest.mark.parametrize("files", [ref.tiny_files, wide_files], ids=["tiny", "wide"])
def test_symbols_are_the_quantised_latents(
    tiles: Tiles, files: Callable[[], dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the definition, q ~ (y - mean) / step, worked out apart in float64.

    An encoder may take the integer next to the nearest, towards zero, where that saves bits.
    """
    monkeypatch.setattr(encoding, "CORRECTED_UP_TO", -1)  # y is what g_a says
    codec = Codec(Model(files()))
    streams = encode_tiles(codec, tiles, budget(tiles, 1.5))
    networks = Model(files()).networks.double()
    for tile, symbols in zip(tiles, symbols_of(codec, streams), strict=True):
        if not tile.size:
            continue
        h, w = symbols.q.shape[1:]
        padded = np.pad(
            tile, ((0, 16 * h - tile.shape[0]), (0, 16 * w - tile.shape[1]), (0, 0)), "edge"
        )
        x = torch.from_numpy(padded).permute(2, 0, 1)[None].double() / 127.5 - 1
        step = torch.tensor([symbols.image_step])
        z = torch.from_numpy(symbols.z)[None].double()
        with torch.no_grad():
            y = networks.g_a(x)
            wide = torch.nn.functional.pad(y, (0, -w % 4, 0, -h % 4), mode="replicate")
            z_float = networks.h_a(wide, step)[0].numpy()
            mean = networks.h_mean(z, step)[..., :h, :w]
        z_index, q_index = ref.scale_indices(codec.model, symbols)
        inside = (np.abs(z_float) < 2 ** ((z_index - 32) / 8) * 5) & (
            abs(z_float) < HYPER_LIMIT - 1
        )
        inside &= z_index >= FIRST_CODED_SCALE
        assert np.abs(symbols.z - z_float)[inside].max(initial=0) < 0.501
        offsets = np.array(LEVEL_OFFSETS)[symbols.levels.astype(int) - 1]
        offsets = np.kron(offsets, np.ones((2, 2)))[:h, :w]
        v = (y - mean)[0].numpy() / (4 * 2 ** ((symbols.image_step + offsets) / 8))
        q, v = (a[q_index >= FIRST_CODED_SCALE] for a in (symbols.q, v))
        assert (np.abs(q) <= np.abs(v) + 0.502).all()
        assert (np.abs(q) >= np.abs(v) - 1.502).all()
        assert (q * v >= 0).all()


def _coded(
    quantised: Quantised, offset: int | NDArray[np.int64]
) -> tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.float32]]:
    """Places (n,) in (M, h, w), scale indices (n,), and v (n,) in the steps of a level's offset,
    or of those of a plane (h, w)."""
    shifted = (quantised.index - np.asarray(offset, np.int16)).reshape(-1)
    place = np.flatnonzero(shifted >= FIRST_CODED_SCALE)
    steps = np.broadcast_to(relative_step(offset), quantised.v.shape).reshape(-1)
    v = quantised.v.reshape(-1)[place] / steps[place]
    return place, np.minimum(shifted[place], SCALE_COUNT - 1), v


@pytest.mark.parametrize("spread", [0.4, 30.0, 3e5])
def test_the_compiled_loop_rounds_as_numpy_does(spread: float) -> None:
    rng = np.random.default_rng(5)
    rounding = Encoding(ref.tiny_codec(), []).rounding
    shape = 7, 6, 5
    index = rng.integers(-63, 256, shape).astype(np.int16)
    v = rng.normal(0, spread, shape).astype(np.float32)
    v.ravel()[::9] = np.rint(v.ravel()[::9]) + 0.5
    nothing = np.zeros((0, 0, 0), np.int64)
    for layout in (v, np.asfortranarray(v)):
        quantised = Quantised(nothing, nothing, 3.0, index, layout)
        for offset in (*LEVEL_OFFSETS, rng.choice(LEVEL_OFFSETS, shape[1:])):
            coded = quantised.symbols(rounding, offset)
            place, tables, exact = _coded(quantised, offset)
            q = rounding.symbols(exact, tables)
            np.testing.assert_array_equal(coded.place, place)
            np.testing.assert_array_equal(coded.index, tables)
            np.testing.assert_array_equal(coded.q, q)
            assert coded.bits == pytest.approx(rounding.bits(q, tables).sum() + 3.0)
        costs = quantised.block_costs(rounding)
        assert costs.bits.shape == costs.error.shape == (len(LEVEL_OFFSETS), 3, 3)
        for level, offset in enumerate(LEVEL_OFFSETS):
            place, tables, exact = _coded(quantised, offset)
            q = rounding.symbols(exact, tables)
            bits, error = np.zeros(shape), np.square(v, dtype=np.float64)
            bits.ravel()[place] = rounding.bits(q, tables)
            step = np.float64(relative_step(offset))
            error.ravel()[place] = np.square((exact.astype(np.float64) - q) * step)
            whole = np.pad(np.stack([bits, error]).sum(1), ((0, 0), (0, 0), (0, 1)))
            blocks = whole.reshape(2, 3, 2, 3, 2).sum((2, 4))
            np.testing.assert_allclose(costs.bits[level], blocks[0])
            np.testing.assert_allclose(costs.error[level], blocks[1], rtol=1e-5, atol=1e-4)


def test_symbols_are_worth_their_bits() -> None:
    """No coded symbol would cost less, bits and error together, as the nearest integer or as the
    one below it."""
    codec = ref.tiny_codec()
    job = Encoding(codec, [ref.texture(160, 128)])
    [quantised] = job.quantised([(0, 24)])
    _, index, exact = _coded(quantised, 0)
    q = job.rounding.symbols(exact, index)
    tables, v = codec.model.tables, exact.astype(np.float64)
    nearest = np.rint(v).astype(np.int64)
    coded = (index >= FIRST_CODED_SCALE) & (np.abs(nearest) < tables.limit(index))

    def cost(symbols: NDArray[np.int64]) -> NDArray[np.float64]:
        entry = (tables.start[index] + tables.limit(index) + symbols)[coded]
        return tables.bits[entry] + ERROR_WEIGHT * np.square((v - symbols)[coded])

    assert (cost(q) <= cost(nearest) + 1e-4).all()
    assert (cost(q) <= cost(nearest - np.sign(nearest)) + 1e-4).all()
    assert (q != nearest)[coded].any()


def test_pixels_come_back(tiles: Tiles) -> None:
    """Not a measure of quality, only that all parts fit together: far better than the mean."""
    codec = ref.tiny_codec()
    tile = ref.texture(192, 160, 9)
    errors = []
    for rate in (0.3, 1.0, 3.0):
        [out] = codec.decode(encode_tiles(codec, [tile], budget([tile], rate)), 192, 160)
        errors.append(float(np.square(out.astype(float) - tile).mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.25 * tile.astype(float).var(axis=(0, 1)).mean()


def test_latents_beyond_the_width_of_the_networks_hold_detail() -> None:
    codec = Codec(Model(wide_files()))
    tile = ref.texture(96, 80, 9)
    [stream] = encode_tiles(codec, [tile], budget([tile], 4.0))
    [symbols] = symbols_of(codec, [stream])
    assert symbols.q[24:].any()
    symbols.q[24:] = 0
    [out], [without] = codec.decode([stream], 96, 80), codec.synthesise([symbols])
    error, left = (float(np.square(o.astype(float) - tile).mean()) for o in (out, without))
    assert error < 0.8 * left


@pytest.mark.parametrize(("rate", "fine"), [(3.0, True), (0.3, False)])
def test_fine_steps_are_corrected_for_the_networks_own_error(
    rate: float, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = Codec(load_named(DEFAULT_MODEL))
    tiles = [ref.texture(128, 96, 9), ref.constant(0, 0), ref.spots(70, 120)]
    allowed = budget(tiles, rate)

    def coded() -> tuple[list[bytes], float]:
        streams = encode_tiles(codec, tiles, allowed)
        assert sum(map(len, streams)) <= allowed
        assert (symbols_of(codec, streams)[0].image_step <= encoding.CORRECTED_UP_TO) == fine
        pairs = zip(codec.decode(streams, 128, 120), tiles, strict=True)
        return streams, sum(float(np.square(a.astype(float) - b).sum()) for a, b in pairs)

    corrected, error = coded()
    monkeypatch.setattr(
        encoding.Encoding, "_correct", lambda job, tiles, plans: [job.latents[t] for t in tiles]
    )
    plain, plain_error = coded()
    if fine:
        assert error < 0.95 * plain_error
    else:
        assert corrected == plain


def test_encoding_leaves_the_tiles_alone_and_takes_views() -> None:
    big = ref.texture(80, 90, 4)
    view = big[::-1, 5:70][:64]
    view.flags.writeable = False
    codec = ref.tiny_codec()
    [a] = encode_tiles(codec, [view], budget([view], 1.0))
    [b] = encode_tiles(codec, [view.copy()], budget([view], 1.0))
    assert a == b


# ------------------------------------------------------------------------- budget


@pytest.mark.parametrize("rate", [0.15, 0.5, 2.0])
@pytest.mark.parametrize(
    ("kind", "count", "size"),
    [
        ("texture", 6, (160, 160)),
        ("texture", 1, (416, 400)),
        ("mixed", 6, (128, 128)),
        ("noise", 3, (128, 96)),
        ("flat", 4, (128, 128)),
        ("black", 2, (128, 128)),
    ],
)
def test_budget_is_kept_and_used(kind: str, count: int, size: tuple[int, int], rate: float) -> None:
    makers = {
        "texture": lambda s: ref.texture(*size, s),
        "noise": lambda s: ref.noise(*size, s),
        "flat": lambda s: ref.constant(*size, 60 + s),
        "black": lambda s: ref.constant(*size, 0),
        "mixed": lambda s: ref.texture(*size, s) if s % 2 else ref.constant(*size),
    }
    tiles = [makers[kind](s) for s in range(count)]
    codec = ref.tiny_codec()
    allowed = budget(tiles, rate)
    streams = encode(codec, tiles, allowed)
    if isinstance(streams, BudgetTooSmall):
        assert kind in ("flat", "black", "noise")
        assert rate < 0.5
        assert streams.needed > allowed
        # the number that the error names suffices but for the coder's rounding
        allowed = streams.needed + 2 * count
        streams = encode_tiles(codec, tiles, allowed)
    total = len(b"".join(streams))
    assert total <= allowed
    symbols = symbols_of(codec, streams)
    if not all(s.image_step == MIN_IMAGE_STEP and (s.levels == 5).all() for s in symbols):
        # all of a flat picture's symbols change together, so its sizes come in leaps
        assert total >= (0.9 if kind in ("flat", "black") else 0.97) * allowed


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (16, 16), (17, 33), (31, 64)])
def test_budget_of_tiny_frames(size: tuple[int, int]) -> None:
    tile, codec = ref.texture(*size, 3), ref.tiny_codec()
    with pytest.raises(BudgetTooSmall) as caught:
        encode_tiles(codec, [tile], 12)
    # every budget from there on works; a byte more or less is the coder's rounding
    for allowed in itertools.chain(
        range(caught.value.needed + 3, caught.value.needed + 60, 7), [200, 500, 10000]
    ):
        [stream] = encode_tiles(codec, [tile], allowed)
        assert len(stream) <= allowed
        [symbols] = symbols_of(codec, [stream])
        assert (symbols.height, symbols.width) == size
    assert symbols.image_step == MIN_IMAGE_STEP
    assert (symbols.levels == 5).all()


@pytest.mark.parametrize("allowed", [-5, 0, 1, 60])
def test_impossible_budget(tiles: Tiles, allowed: int) -> None:
    with pytest.raises(BudgetTooSmall, match=r"needs [0-9]+ bytes") as caught:
        encode_tiles(ref.tiny_codec(), tiles, allowed)
    assert caught.value.needed > allowed


@pytest.mark.parametrize("model", ["tiny", "released"])
def test_below_the_coarsest_step_symbols_are_spared(model: str) -> None:
    codec = ref.tiny_codec() if model == "tiny" else codec_for(load_named(DEFAULT_MODEL).sha256)
    tiles = [ref.texture(200, 136, 1), ref.constant(0, 0), ref.texture(70, 64, 2)]
    with pytest.raises(BudgetTooSmall) as caught:
        Encoding(codec, tiles).within(60)
    at_the_coarsest_step = caught.value.needed
    with pytest.raises(BudgetTooSmall) as caught:
        encode_tiles(codec, tiles, 60)
    least = caught.value.needed
    assert least < (0.8 if model == "released" else 1) * at_the_coarsest_step
    fewest = encode_tiles(codec, tiles, 60, strict=False)
    assert len(b"".join(fewest)) == least
    for allowed in np.linspace(least, at_the_coarsest_step + 20, 5).astype(int).tolist():
        streams = encode_tiles(codec, tiles, allowed)
        assert len(b"".join(streams)) <= allowed
        assert [t.shape for t in codec.decode(streams, 200, 200)] == [t.shape for t in tiles]
    assert encode_tiles(codec, tiles, 60, least_error, strict=False) == fewest
    raised = [np.ones((7, 5), np.uint8), np.zeros((0, 0), np.uint8), np.zeros((3, 2), np.uint8)]
    with pytest.raises(BudgetTooSmall):  # blocks are lowered before symbols are spared
        encode_tiles(codec, tiles, least, raised=raised)


def test_nothing_to_encode() -> None:
    codec = ref.tiny_codec()
    assert encode_tiles(codec, [], 0) == []
    assert codec.decode([], 64, 64) == []
    empty = encode_tiles(codec, [ref.constant(0, 0)] * 3, 39)
    assert [t.shape for t in codec.decode(empty, 64, 64)] == [(0, 0, 3)] * 3


def test_any_budget_is_kept(tiles: Tiles) -> None:
    """A ladder of budgets, from about the coarsest coding to the finest."""
    codec, least = ref.tiny_codec(), 400
    few = [tiles[i] for i in (1, 3, 4, 5)]
    for allowed in np.geomspace(least, 20000, 9).astype(int).tolist():
        streams = encode(codec, few, allowed)
        if isinstance(streams, BudgetTooSmall):
            assert streams.needed > allowed
        else:
            assert len(b"".join(streams)) <= allowed


@given(data=st.data())
def test_allocator_never_overspends(data: st.DataObject) -> None:
    """Any costs that fall with the step and rise with the level, even absurdly spread ones."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    count = data.draw(st.integers(1, 9))
    grids = [(int(rng.integers(0, 5)), int(rng.integers(1, 5))) for _ in range(count)]
    grids = [g if g[0] else (0, 0) for g in grids]
    scale = [rng.exponential(100, (h, w)) ** rng.choice([0.2, 1.0, 1.5]) for h, w in grids]

    def bits(t: int, step: int, level: int) -> NDArray[np.float64]:
        return scale[t] * 2.0 ** (-(step + LEVEL_OFFSETS[level - 1]) / rng_slope)

    rng_slope = float(rng.uniform(4, 30))

    def of_one(t: int, step: int, level: int) -> float:
        return 20 + float(bits(t, step, level).sum()) / 8 if grids[t][0] else 13.0

    def tile_bytes(tiles: list[tuple[int, int, int]]) -> list[float]:
        return [of_one(*tile) for tile in tiles]

    def block_costs(t: int, step: int) -> BlockCosts:
        rows = [bits(t, step, level) for level in range(1, 6)]
        errors = [4.0 ** (offset / 8) * scale[t] for offset in LEVEL_OFFSETS]
        return BlockCosts(np.stack(rows), np.stack(errors))

    allocator = Allocator(grids, tile_bytes, block_costs, lambda levels: 0.0, None, one_by_one)
    least = sum(tile_bytes([(t, MAX_IMAGE_STEP, 1) for t in range(count)]))
    allowed = least * float(rng.uniform(0.8, 30))
    if allowed < least:
        with pytest.raises(BudgetTooSmall) as caught:
            allocator.plan(allowed)
        assert caught.value.needed >= least
        return
    plans = allocator.plan(allowed)
    spent = 0.0
    for t, plan in enumerate(plans):
        assert MIN_IMAGE_STEP <= plan.image_step <= MAX_IMAGE_STEP
        assert plan.levels.shape == grids[t]
        if not grids[t][0]:
            spent += 13
            continue
        assert plan.levels.min() >= 1
        assert plan.levels.max() <= 5
        rows = np.stack([bits(t, plan.image_step, level) for level in range(1, 6)])
        index = plan.levels[None].astype(int) - 1
        spent += 20 + float(np.take_along_axis(rows, index, 0).sum()) / 8
    assert spent <= allowed * (1 + 1e-9)


# ------------------------------------------------------------------------ company


@pytest.mark.parametrize("threads", [1, 2])
def test_a_tile_decodes_alike_alone_and_in_company(
    tiles: Tiles, streams: list[bytes], threads: int
) -> None:
    codec = ref.tiny_codec()
    first = 0 if threads == 1 else 4
    with ref.threads(threads):
        together = codec.decode(streams[1:2] * (8 - first) + streams[first:], 128, 128)
        alone = [codec.decode([s], 128, 128)[0] for s in streams[first:]]
    for tile, a, b in zip(tiles[first:], together[8 - first :], alone, strict=True):
        assert a.shape == tile.shape
        assert a.dtype == np.uint8
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rule", ["policy", "greedy", "uniform"])
def test_bytes_and_pixels_do_not_depend_on_threads(rule: str) -> None:
    """With the released networks, whose sums two threads would add up in another order."""
    model = load_named(DEFAULT_MODEL)
    codec = Codec(model)
    policy = read_policy(DEFAULT_MODEL, model.networks.config.latents)
    assert policy is not None
    worth = {
        "policy": load_policy(policy, model.networks.config.latents).block_worth,
        "greedy": least_error,
        "uniform": None,
    }[rule]
    image = [ref.texture(320, 288, 1), ref.noise(160, 320), ref.texture(272, 320, 4)]
    found = []
    for threads in (1, 2, 3):
        with ref.threads(threads):
            found.append(encode_tiles(codec, image, budget(image, 0.5), worth))
    assert found[0] == found[1] == found[2]
    if rule != "policy":
        return  # decoding knows nothing of rules
    pixels = []
    for threads in (2, 3):
        with ref.threads(threads):
            pixels.append(codec.decode(found[0], 320, 320, steps=1))
    for a, b in zip(*pixels, strict=True):
        np.testing.assert_array_equal(a, b)


def test_tiles_are_run_by_one_thread_each() -> None:
    with ref.threads(2):
        seen = each(lambda k: (k, torch.get_num_threads(), get_ident()), range(8), CPU)
        assert torch.get_num_threads() == 2
    assert [k for k, _, _ in seen] == list(range(8))
    assert {threads for _, threads, _ in seen} == {1}
    assert 1 <= len({ident for _, _, ident in seen}) <= 2


def test_an_error_in_a_tile_is_raised_and_nothing_else_lost() -> None:
    with ref.threads(2):
        with pytest.raises(ZeroDivisionError):
            each(lambda k: 1 / k, [1, 0, 2], CPU)
        assert torch.get_num_threads() == 2
        assert each(lambda k: 1 / k, [2], CPU) == [0.5]


def test_decoding_is_repeatable(streams: list[bytes]) -> None:
    codec = ref.tiny_codec()
    for a, b in zip(*(codec.decode(streams, 128, 128) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------- levels


@given(
    hnp.arrays(
        np.uint8, st.tuples(st.integers(1, 19), st.integers(1, 19)), elements=st.integers(1, 5)
    )
)
def test_level_residuals_round_trip(levels: NDArray[np.uint8]) -> None:
    residuals = residuals_from_levels(levels)
    assert ((residuals >= 0) & (residuals < 5)).all()
    np.testing.assert_array_equal(levels_from_residuals(residuals), levels)


def test_base_level_everywhere_costs_no_residuals() -> None:
    assert not residuals_from_levels(np.full((7, 3), 3, np.uint8)).any()


@pytest.mark.parametrize("step", [MIN_IMAGE_STEP, 31, MAX_IMAGE_STEP])
def test_any_symbols_and_levels_decode(step: int) -> None:
    codec = ref.tiny_codec()
    for seed, (h, w) in enumerate([(1, 1), (16, 17), (65, 64), (130, 70)]):
        symbols = ref.random_symbols(codec.model, h, w, step, seed, spread=1 + 20 * (seed % 2))
        for lanes in (0, 7):
            stream = ref.write_stream(codec.model, symbols, seed, lanes)
            [decoded] = symbols_of(codec, [stream])
            assert ref.same(decoded, symbols)
        assert codec.synthesise([decoded])[0].shape == (h, w, 3)


# ------------------------------------------------------------------------- damage


def test_a_corrupt_tile_is_named_and_hides_no_other(tiles: Tiles, streams: list[bytes]) -> None:
    codec = ref.tiny_codec()
    bad = list(streams)
    bad[1] = bad[1][:40] + bytes([bad[1][40] ^ 16]) + bad[1][41:]
    bad[4] = bad[4][:-1]
    with pytest.raises(CorruptStream, match="tile 1 of 8"):
        codec.decode(bad, 128, 128)
    results = codec.decode_symbols(bad, 128, 128)
    good = symbols_of(codec, streams)
    for t, result in enumerate(results):
        if t in (1, 4):
            assert isinstance(result, CorruptStream)
        else:
            assert isinstance(result, Symbols)
            assert ref.same(result, good[t])


def test_stream_of_another_model(streams: list[bytes]) -> None:
    codec = ref.tiny_codec()
    foreign = streams[0][:1] + bytes(MODEL_BYTES) + streams[0][1 + MODEL_BYTES :]
    with pytest.raises(UnknownModel, match="0000000000000000"):
        codec.decode([streams[1], foreign], 128, 128)


def check_damaged(codec: Codec, stream: bytes, limit: tuple[int, int]) -> bool:
    """Decode what may be damaged: symbols within bounds, or an error of ours."""
    try:
        [result] = codec.decode_symbols([stream], *limit)
    except UnknownModel:
        return False
    if isinstance(result, CorruptStream):
        return False
    assert isinstance(result, Symbols)
    assert result.height <= limit[0]
    assert result.width <= limit[1]
    assert np.isin(result.levels, range(1, 6)).all()
    return True


def test_damaged_streams_end_in_an_error(streams: list[bytes]) -> None:
    codec = ref.tiny_codec()
    rng = np.random.default_rng(3)
    accepted = 0
    started = time.process_time()
    for k in range(320):
        stream = bytearray(streams[(0, 2, 4, 7)[k % 4]])
        kind = k // 4 % 5
        if kind == 0:  # anywhere
            stream[rng.integers(len(stream))] ^= 1 << rng.integers(8)
        elif kind == 1:  # the header past the model's name
            at = int(rng.integers(9, 20))
            stream[at] = int(rng.integers(256))
        elif kind == 2:
            del stream[int(rng.integers(len(stream))) :]
        elif kind == 3:
            stream += rng.bytes(int(rng.integers(1, 9)))
        else:
            at = int(rng.integers(15, len(stream)))
            stream[at:] = rng.bytes(len(stream) - at)
        if bytes(stream) not in streams:
            accepted += check_damaged(codec, bytes(stream), (128, 128))
    # a changed width within the same latents, say, is a stream as good as any
    assert accepted <= 20
    assert time.process_time() - started < 60


def test_escape_bytes_are_all_accounted_for(streams: list[bytes]) -> None:
    codec = ref.tiny_codec()
    for stream in streams:
        for tail in (b"\0", b"\x80", b"\x80\x80\x80\x80\x01", b"\0" * 100):
            assert not check_damaged(codec, stream + tail, (128, 128))


@pytest.mark.parametrize("lanes", range(8))
def test_headers_that_promise_much_are_refused_soon(lanes: int) -> None:
    """A few bytes cannot make a reader work for long, even where the size is allowed."""
    codec = ref.tiny_codec()
    rng = np.random.default_rng(lanes)
    for body in (b"\0", b"\xff", None):
        header = Header(codec.prefix, 4096, 4096, 30, lanes, int(rng.integers(8)))
        tail = rng.bytes(1000) if body is None else body * 1000
        started = time.process_time()
        assert not check_damaged(codec, header.pack() + tail, (608, 608))
        assert time.process_time() - started < 0.1
        assert not check_damaged(codec, header.pack() + tail, (4096, 4096))
        assert time.process_time() - started < 10


def test_cheap_symbols_do_not_make_a_stream_endless() -> None:
    """Symbols that take next to no bits need next to no bytes, but lanes bound the steps."""
    codec = ref.tiny_codec()
    symbols = ref.random_symbols(codec.model, 1600, 1600, MAX_IMAGE_STEP, 0)
    symbols.q[:] = 0
    stream = ref.write_stream(codec.model, symbols, 0, 7)
    assert stream[HEADER_BYTES - 1] & 15 == 7
    [decoded] = symbols_of(codec, [stream])
    assert ref.same(decoded, symbols)
    _, index = ref.scale_indices(codec.model, symbols)
    assert (index >= FIRST_CODED_SCALE).sum() > 2 * 8192
    started = time.process_time()
    assert not check_damaged(codec, ref.write_stream(codec.model, symbols), (1600, 1600))
    assert time.process_time() - started < 5
