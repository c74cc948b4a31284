"""Allocation: budgets kept and used by every rule, policies that learn, untrusted files."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import reference as ref
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save as save_tensors

from archive_pipeline.codec import models
from archive_pipeline.codec.zarr_codec import trim
from archive_pipeline.detection.object_blocks import RaisedBlocks
from archive_pipeline.pcdc.allocation import (
    ALLOCATIONS,
    BASE_LEVEL,
    LEVELS,
    Allocator,
    BlockCosts,
    BudgetTooSmall,
)
from archive_pipeline.pcdc.decoding import Symbols
from archive_pipeline.pcdc.encoding import Encoding, Worth, encode_tiles, least_error
from archive_pipeline.pcdc.entropy import one_by_one
from archive_pipeline.pcdc.policy import (
    Policy,
    PolicyConfig,
    PolicyError,
    block_state,
    load_policy,
    pack_policy,
    policy_digest,
    residual_statistics,
    state_groups,
)
from archive_pipeline.pcdc.training.ppo import (
    Optimiser,
    PPOConfig,
    dual_ascent,
    gather_levels,
    roll_out,
)

LATENTS = ref.tiny_codec().model.networks.config.latents
MAP_LIMIT = 0.005  # bits a pixel


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with ref.threads(1):
        yield


def rule(name: str) -> Worth | None:
    return {"policy": ref.tiny_policy().block_worth, "greedy": least_error, "uniform": None}[name]


# --------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("bits_per_pixel", [0.15, 0.3, 0.5])
def test_budgets_are_kept_and_used(name: str, bits_per_pixel: float) -> None:
    codec = ref.tiny_codec()
    tiles = [ref.texture(256, 256, k) for k in range(3)] + [ref.texture(256, 70, 9)]
    pixels = sum(t.shape[0] * t.shape[1] for t in tiles)
    budget = int(pixels * bits_per_pixel / 8)
    streams = encode_tiles(codec, tiles, budget, rule(name))
    assert 0.97 * budget <= sum(map(len, streams)) <= budget
    symbols = codec.decode_symbols(streams, 256, 256)
    assert all(isinstance(s, Symbols) for s in symbols)
    maps = [s.levels for s in symbols if isinstance(s, Symbols)]
    assert sum(codec.level_map_bits(m) for m in maps) / pixels <= MAP_LIMIT
    if name == "policy":
        assert len(np.unique(np.concatenate([m.ravel() for m in maps]))) > 2


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize(
    "tile",
    [
        ref.constant(128, 128),
        np.zeros((128, 128, 3), np.uint8),
        ref.noise(64, 96),
        ref.texture(1, 1),
        ref.texture(5, 120),
        ref.constant(0, 0),
    ],
    ids=["flat", "black", "noise", "pixel", "strip", "empty"],
)
def test_odd_images_keep_any_budget(name: str, tile: NDArray[np.uint8]) -> None:
    codec, tiles = ref.tiny_codec(), [tile, ref.texture(64, 64, 2)]
    for budget in (60, 150, 400, 2000, 50000):
        try:
            streams = encode_tiles(codec, tiles, budget, rule(name))
        except BudgetTooSmall:
            continue
        assert sum(map(len, streams)) <= budget
        decoded = codec.decode(streams, 128, 128)
        assert [d.shape for d in decoded] == [t.shape for t in tiles]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.3, 30))
def test_priced_plans_never_overspend(seed: int, wealth: float) -> None:
    """Any costs and any worth, not even rising with the level."""
    rng = np.random.default_rng(seed)
    grids = [(int(rng.integers(0, 5)), 4) for _ in range(5)]
    grids = [g if g[0] else (0, 0) for g in grids]
    scale = [rng.exponential(60, g) for g in grids]

    def bits(t: int, step: int) -> NDArray[np.float64]:
        offsets = np.array([8, 4, 0, -4, -8])[:, None, None]
        return scale[t] * 2.0 ** (-(step + offsets) / 16)

    def of_one(t: int, step: int, level: int) -> float:
        return 20 + float(bits(t, step)[level - 1].sum()) / 8 if grids[t][0] else 13.0

    def tile_bytes(tiles: list[tuple[int, int, int]]) -> list[float]:
        return [of_one(*tile) for tile in tiles]

    def map_bits(levels: NDArray[np.uint8]) -> float:
        return 0.0 if (levels == levels[0, 0]).all() else 2.3 * levels.size

    allocator = Allocator(
        grids,
        tile_bytes,
        lambda t, step: BlockCosts(bits(t, step), bits(t, step)),
        map_bits,
        lambda t, step, costs: rng.normal(0, 50, costs.bits.shape),
        one_by_one,
    )
    budget = wealth * 300
    try:
        plans = allocator.plan(budget)
    except BudgetTooSmall:
        return
    spent = 0.0
    for t, plan in enumerate(plans):
        assert plan.levels.shape == grids[t]
        if not grids[t][0]:
            spent += 13
            continue
        index = plan.levels[None].astype(int) - 1
        spent += 20 + float(np.take_along_axis(bits(t, plan.image_step), index, 0).sum()) / 8
        spent += map_bits(plan.levels) / 8
    assert spent <= budget + 1e-6


@pytest.mark.parametrize("budget", [2000, 3100, 6500])
def test_a_policy_that_knows_nothing_allocates_as_uniform_does(budget: int) -> None:
    """But for the few blocks that what is left over goes to."""
    codec, policy = ref.tiny_codec(), copy.deepcopy(ref.tiny_policy())
    with torch.no_grad():
        policy.importance_of.weight.zero_()
    tiles = [ref.texture(256, 256, 1), ref.spots(256, 256), ref.texture(256, 70, 3)]
    uniform, valued = (
        Encoding(codec, tiles, worth).allocator.plan(budget) for worth in (None, policy.block_worth)
    )
    assert [p.image_step for p in valued] == [p.image_step for p in uniform]
    levels = np.concatenate([p.levels.ravel() for p in valued])
    assert (levels == BASE_LEVEL).mean() > 0.8


def test_greedy_leaves_less_error_than_uniform() -> None:
    """Of the latents, whose error it minimises, at the same estimated bits."""
    codec = ref.tiny_codec()
    tiles = [ref.texture(256, 256, 1), ref.spots(256, 256)]
    errors = {}
    for name in ("greedy", "uniform"):
        job = Encoding(codec, tiles, rule(name))
        total = 0.0
        for t, plan in enumerate(job.allocator.plan(4000)):
            costs = job.block_costs(t, plan.image_step)
            index = plan.levels[None].astype(int) - 1
            step = 2.0 ** (plan.image_step / 8)
            total += float(np.take_along_axis(costs.error, index, 0).sum()) * step**2
        errors[name] = total
    assert errors["greedy"] < errors["uniform"]


def test_block_costs_are_those_of_the_tables() -> None:
    """Beside a plain sum over symbols, with every block at one level."""
    codec = ref.tiny_codec()
    job = Encoding(codec, [ref.texture(120, 200, 4)])
    for step in (10, 30):
        costs = job.block_costs(0, step)
        for level in range(1, LEVELS + 1):
            [fixed] = job.tile_bytes([(0, step, level)])
            taken = job.tile_bytes([(0, step, other) for other in range(1, LEVELS + 1)])
            others = {
                other: taken[other - 1] - costs.bits[other - 1].sum() / 8 * 1.0005
                for other in range(1, LEVELS + 1)
            }
            # what is not in the blocks hardly depends on the level: lanes alone may differ
            assert abs(fixed - costs.bits[level - 1].sum() / 8 * 1.0005 - others[3]) < 80


# -------------------------------------------------------------------------- objects


def test_raised_blocks_are_finer_within_the_budget() -> None:
    codec = ref.tiny_codec()
    tiles = [ref.texture(256, 256, k) for k in range(3)] + [ref.constant(0, 0)]
    raised = [np.zeros((8, 8), np.uint8) for _ in range(3)] + [np.zeros((0, 0), np.uint8)]
    raised[1][2:5, 3:6] = 2
    budget = 3 * 256 * 256 // 32
    streams = encode_tiles(codec, tiles, budget, raised=raised)
    assert 0.97 * budget <= sum(map(len, streams)) <= budget
    symbols = codec.decode_symbols(streams, 256, 256)
    levels = [s.levels.astype(int) for s in symbols[:3] if isinstance(s, Symbols)]
    apart = levels[1][raised[1] == 2], levels[1][raised[1] == 0]
    assert apart[0].min() == apart[0].max() == BASE_LEVEL + 2
    assert apart[1].max() <= BASE_LEVEL + 1
    decoded = codec.decode(streams, 256, 256)[1].astype(float)
    plain = codec.decode(encode_tiles(codec, tiles, budget), 256, 256)[1].astype(float)
    place = np.s_[64:160, 96:192]
    error = [np.square(pixels - tiles[1])[place].mean() for pixels in (decoded, plain)]
    assert error[0] < error[1]


def test_raised_blocks_are_known_by_their_pixels() -> None:
    pixels = np.zeros((150, 140, 3), np.uint8)
    pixels[:140, :131] = ref.texture(140, 131)
    boxes = np.array([[70.0, 10.0, 85.0, 20.0], [-30.0, 138.0, -12.0, 200.0]])
    blocks = RaisedBlocks(pixels, boxes, tile=64)
    tiles = [
        trim(pixels[row : row + 64, col : col + 64], 0)
        for row in (0, 64, 128)
        for col in (0, 64, 128)
    ]
    found = blocks.of([*tiles, ref.noise(64, 64)])
    grids = [(-(-t.shape[0] // 32), -(-t.shape[1] // 32)) for t in tiles]
    assert [f.shape for f in found] == [*grids, (2, 2)]
    whole = np.zeros((5, 5), int)
    for k, block in enumerate(found[:9]):
        rows, columns = block.shape
        at = 2 * (k // 3), 2 * (k % 3)
        whole[at[0] : at[0] + rows, at[1] : at[1] + columns] = block
    expected = np.zeros((5, 5), int)
    expected[0, 1:3] = 2  # the first box from 62 to 93, with its margin
    # the second one ends left of the picture, margin and all
    np.testing.assert_array_equal(whole, expected)
    assert not found[9].any()


# ---------------------------------------------------------------------------- policies


def test_policy_files_come_back() -> None:
    data = pack_policy(ref.tiny_policy())
    again = load_policy(data, LATENTS)
    assert again.config == ref.tiny_policy().config
    assert policy_digest(pack_policy(again)) == policy_digest(data)
    codec, tile = ref.tiny_codec(), ref.texture(96, 96, 1)
    job = Encoding(codec, [tile])
    costs = job.block_costs(0, 20)
    state = block_state(tile, job.latents_of(0), costs, 20)
    assert torch.equal(again.importance(state[None]), ref.tiny_policy().importance(state[None]))


def _header(data: bytes) -> dict:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _with_config(**changes: object) -> bytes:
    config = json.loads(_header(pack_policy(ref.tiny_policy()))["__metadata__"]["config"]) | changes
    return save_tensors(ref.tiny_policy().state_dict(), metadata={"config": json.dumps(config)})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cannot be read"),
        (b"\x80\x04N.", "cannot be read"),
        (pack_policy(ref.tiny_policy())[:-7], "cannot be read"),
        (save_tensors(ref.tiny_policy().state_dict()), "cannot be read"),
        (_with_config(format="pcdc-allocation-9"), "unknown format"),
        (_with_config(width=1 << 40), "out of range"),
        (_with_config(width=True), "out of range"),
        (_with_config(width=17), "cannot be read"),
        (_with_config(rate=[float("nan"), 0.0]), "out of range"),
        (_with_config(rate=[1e9, 0.0]), "out of range"),
        (_with_config(slope=[]), "cannot be read"),
        (_with_config(latents=LATENTS + 1), "but the codec has"),
    ],
)
def test_bad_policy_files_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        load_policy(data, LATENTS)


def test_policies_with_infinite_weights_are_refused() -> None:
    state = {k: v.clone() for k, v in ref.tiny_policy().state_dict().items()}
    state["importance_of.bias"][0] = torch.inf
    config = {"config": _header(pack_policy(ref.tiny_policy()))["__metadata__"]["config"]}
    with pytest.raises(PolicyError, match="finite"):
        load_policy(save_tensors(state, metadata=config), LATENTS)


def test_residual_statistics_tell_texture_from_flatness() -> None:
    tile = np.concatenate([ref.constant(64, 64), ref.noise(64, 64)], 1)
    statistics = residual_statistics(tile)
    assert statistics.shape == (8, 2, 4)
    assert (statistics[:4, :, 0] < 1e-6).all()
    assert (statistics[:4, :, 3] > 1).all()
    assert residual_statistics(ref.noise(33, 65)).shape == (8, 2, 3)


def test_the_state_has_its_groups() -> None:
    job = Encoding(ref.tiny_codec(), [tile := ref.texture(128, 96, 1)])
    state = block_state(tile, job.latents_of(0), job.block_costs(0, 24), 24)
    groups = state_groups(LATENTS)
    size = sum(g.stop - g.start for g in groups.values())
    assert size == len(state) == len(ref.tiny_policy().mean)
    assert state.shape[1:] == (4, 3)
    assert torch.isfinite(state).all()
    bits = torch.from_numpy(job.block_costs(0, 24).bits).float()
    torch.testing.assert_close(state[groups["costs"]][:LEVELS], torch.log1p(bits))


# ------------------------------------------------------------------------------- PPO


def _problem(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, bits and the gain of each level: blocks whose first channel is high want bits."""
    generator = torch.Generator().manual_seed(seed)
    channels = len(ref.tiny_policy().mean)
    state = torch.randn(count, channels, 4, 4, generator=generator)
    bits = torch.tensor([0.3, 0.6, 1.0, 1.6, 2.4]).view(1, -1, 1, 1).expand(count, -1, 4, 4)
    wants = torch.where(state[:, :1] > 0, 2.5, 0.2)
    return state, bits.contiguous(), wants * (bits - bits[:, BASE_LEVEL - 1 : BASE_LEVEL])


def test_ppo_learns_where_bits_pay() -> None:
    torch.manual_seed(0)
    policy = Policy(PolicyConfig(LATENTS, 8, 16))
    optimiser = Optimiser(policy, dataclasses.replace(PPOConfig(), actor_rate=3e-3))
    generator = torch.Generator().manual_seed(1)
    price = torch.ones(32)
    shares = []
    for update in range(25):
        state, bits, gain = _problem(32, update)
        rollout = roll_out(policy, state, bits, price, torch.full((32,), 100.0), generator)
        extra = gather_levels(bits, rollout.levels) - 1
        rollout.returns = gather_levels(gain, rollout.levels) - extra
        shares.append(float(rollout.returns.mean()))
        seen = optimiser.update(rollout, generator)
    assert np.mean(shares[-3:]) > np.mean(shares[:3]) + 0.3
    assert seen["entropy"] < np.log(LEVELS)
    state, bits, _ = _problem(64, 99)
    chosen = policy.worth(state, bits).sub(bits).argmax(1)
    high = state[:, 0] > 0
    assert chosen[high].float().mean() > chosen[~high].float().mean() + 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.5, 3))
def test_draws_never_exceed_their_budget(seed: int, wealth: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.rand(5, LEVELS, 3, 4, generator=generator) * 4
    state = torch.randn(5, len(ref.tiny_policy().mean), 3, 4, generator=generator)
    cheapest = bits.amin(1).sum((1, 2))
    budget = cheapest * wealth
    rollout = roll_out(ref.tiny_policy(), state, bits, torch.ones(5), budget, generator)
    spent = gather_levels(bits, rollout.levels).sum((1, 2))
    assert (spent <= torch.maximum(budget, cheapest) + 1e-4).all()
    assert gather_levels(rollout.feasible.long(), rollout.levels).all()
    assert torch.isfinite(rollout.log_prob).all()


def test_dual_ascent_settles_where_the_rate_is_met() -> None:
    price, config = 0.0, PPOConfig()
    for _ in range(3000):
        price = dual_ascent(price, 2 / (1 + price), 1.0, config)  # dearer bits, fewer of them
    assert price == pytest.approx(1, abs=0.05)
    assert dual_ascent(0.01, 0.1, 1.0, config) == 0


# ------------------------------------------------------------------------- adapting


def test_adapting_keeps_the_budget(lpips_weights: None) -> None:
    from archive_pipeline.pcdc.training.adaptation import encode_adapted

    codec = ref.tiny_codec()
    tiles = [ref.texture(128, 128, k) for k in range(3)]
    budget = sum(t.shape[0] * t.shape[1] for t in tiles) // 16
    before = pack_policy(ref.tiny_policy())
    adapted = encode_adapted(codec, tiles, budget, ref.tiny_policy(), 2)
    assert 0.97 * budget <= sum(map(len, adapted)) <= budget
    assert adapted == encode_adapted(codec, tiles, budget, ref.tiny_policy(), 2)
    assert pack_policy(ref.tiny_policy()) == before


def test_adapting_ends_no_worse_than_it_began_or_than_blocks_alike(
    lpips_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from archive_pipeline.pcdc.training import adaptation

    codec = ref.tiny_codec()
    # to the first all blocks are equally important
    good, bad = copy.deepcopy(ref.tiny_policy()), copy.deepcopy(ref.tiny_policy())
    with torch.no_grad():
        good.importance_of.weight.zero_()
        bad.importance_of.weight.normal_(std=5, generator=torch.Generator().manual_seed(1))
    tiles = [ref.texture(128, 128, k) for k in range(3)]
    budget = sum(t.shape[0] * t.shape[1] for t in tiles) // 16
    expected = encode_tiles(codec, tiles, budget, good.block_worth)
    assert encode_tiles(codec, tiles, budget, bad.block_worth) != expected
    for start, end in ((good, bad), (bad, bad), (bad, good)):

        def update(optimiser: adaptation.Optimiser, *_: object, end: Policy = end) -> None:
            optimiser.policy.load_state_dict(end.state_dict())

        monkeypatch.setattr(adaptation.Optimiser, "update", update)
        adapted = adaptation.encode_adapted(codec, tiles, budget, start, 1)
        assert adapted == expected


def test_utility_is_the_mean_of_its_map(lpips_weights: None) -> None:
    from torchmetrics.functional.image import (
        learned_perceptual_image_patch_similarity,
        structural_similarity_index_measure,
    )

    from archive_pipeline.pcdc.training.adaptation import to_signal
    from archive_pipeline.pcdc.training.judge import Judge

    original = ref.texture(128, 96, 1)
    worse = np.clip(original.astype(int) + ref.noise(128, 96) // 6 - 20, 0, 255).astype(np.uint8)
    a, b = to_signal(original), to_signal(worse)
    terms = Judge(a).terms(b)
    assert terms.shape == (4, 4, 3)
    error, structure, perceived, lost = terms.mean((1, 2)).tolist()
    assert error == pytest.approx(float(((a - b) / 2).square().mean()), rel=1e-5)
    same = float(structural_similarity_index_measure(b / 2 + 0.5, a / 2 + 0.5, data_range=1.0))
    assert structure == pytest.approx(1 - same, abs=0.02)  # borders are padded another way
    whole = learned_perceptual_image_patch_similarity(b, a, net_type="squeeze")
    assert perceived == pytest.approx(float(whole), rel=0.02)  # its maps do not fill whole blocks
    assert lost == 0  # without a task
    assert float(Judge(a).loss(a).abs().max()) == pytest.approx(0, abs=1e-6)


def test_a_task_counts_with_its_weight(lpips_weights: None) -> None:
    from archive_pipeline.pcdc.training.adaptation import to_signal
    from archive_pipeline.pcdc.training.judge import Judge, UtilityWeights

    original = ref.texture(64, 96, 1)
    worse = original // 2 + 40

    def task(pixels: np.ndarray) -> np.ndarray:
        assert (pixels == worse).all()  # what was decoded, in 8 bits
        return np.arange(6, dtype=np.float32).reshape(2, 3)

    a, b = to_signal(original), to_signal(worse)
    plain, weights = Judge(a).loss(b), UtilityWeights(task=0.5)
    with_task = Judge(a, weights, task).loss(b)
    torch.testing.assert_close(with_task - plain, torch.arange(6.0).view(2, 3) / 2)
    paper = Judge(a, dataclasses.replace(weights, task=0.0), task).loss(b)
    torch.testing.assert_close(paper, plain)


def test_missing_lpips_weights_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from archive_pipeline.pcdc.training import judge

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("offline"))
    )
    judge._lpips.cache_clear()
    try:
        with pytest.raises(judge.UtilityError, match="SqueezeNet"):
            judge.require_lpips()
    finally:
        judge._lpips.cache_clear()


def test_the_shipped_model_has_a_policy() -> None:
    model = models.load_named(models.DEFAULT_MODEL)
    latents = model.networks.config.latents
    data = models.read_policy(models.DEFAULT_MODEL, latents)
    assert data is not None
    config = load_policy(data, latents).config
    bits = [config.usual_bits(step) for step in (10, 30, 50)]
    assert bits[0] > bits[1] > bits[2] > 1  # a block's bits at fine, middle and coarse steps
