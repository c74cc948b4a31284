"""The search for the image step: within the budget, close to it, with few looks at tiles."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from golden import reference as ref
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from archive_pipeline.codec.models import DEFAULT_MODEL, load_named
from archive_pipeline.pcdc import encoding
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.ladder import EXPONENTS, RUNGS, Ladder


class Costs:
    """Bytes of tiles on each rung, and how often they were asked for."""

    def __init__(self, table: NDArray[np.float64]) -> None:
        self.table = table  # (rungs, n)
        self.looks = 0

    def __call__(self, tiles: list[tuple[int, int, int]]) -> list[float]:
        self.looks += len(tiles)
        return [float(self.table[RUNGS.index((step, level)), t]) for t, step, level in tiles]


def ladder(costs: Costs, expected: NDArray[np.float64]) -> Ladder:
    return Ladder(costs, expected, np.arange(expected.shape[1]))


def smooth(rng: np.random.Generator, count: int, fall: float, spread: float) -> NDArray[np.float64]:
    size = 30000 * 2.0 ** rng.normal(0, spread, count)
    falls = fall * 2.0 ** rng.normal(0, 0.1, count)
    return 40 + size * np.exp2(-EXPONENTS[:, None] * falls)


def test_rungs_get_coarser_one_by_one() -> None:
    assert (np.diff(EXPONENTS) > 0).all()
    places = ladder(Costs(np.ones((len(RUNGS), 3))), np.ones((len(RUNGS), 3)))
    seen = [[RUNGS.index(rung) for rung in places.rungs(p)] for p in range(places.last + 1)]
    assert seen[0] == [0, 0, 0]
    assert seen[-1] == [len(RUNGS) - 1] * 3
    assert all(sum(b) - sum(a) == 1 for a, b in pairwise(seen))


@pytest.mark.parametrize("count", [1, 12, 60])
def test_few_looks_come_close(count: int) -> None:
    """Where what is expected is up to a third off, and falls a tenth too slowly."""
    looks = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        costs = Costs(smooth(rng, count, 0.15, 0.6))
        expected = costs.table**0.9
        expected *= costs.table[30].sum() / expected[30].sum() * rng.uniform(0.7, 1.4)
        budget = float(costs.table[rng.integers(8, 45)].sum()) * 1.02
        found = ladder(costs, expected)
        place = found.finest(budget)
        assert place is not None
        assert found.total(place) <= budget
        looks.append(costs.looks / count)
        # a tile more would not fit, or hardly
        assert found.total(place - 1) > 0.997 * budget
    assert np.mean(looks) < (4.5 if count == 1 else 1.8)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.2, 40))
def test_whatever_tiles_cost_the_budget_holds(seed: int, wealth: float) -> None:
    """Costs in leaps, and expectations that have nothing to do with them."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 30))
    leaps = rng.exponential(1, (len(RUNGS), count)) * (rng.random((len(RUNGS), count)) < 0.1)
    costs = Costs(13 + 100 * leaps[::-1].cumsum(0)[::-1])
    expected = smooth(rng, count, float(rng.uniform(0.01, 0.5)), 1)
    least = float(costs.table[-1].sum())
    budget = least * wealth
    found = ladder(costs, expected)
    place = found.finest(budget)
    if budget < least:
        assert place is None
        return
    assert place is not None
    assert found.total(place) <= budget
    assert found.finest(budget) == place


def test_tiles_are_quantised_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames about once and a half; these textures are odder to the model."""
    codec = Codec(load_named(DEFAULT_MODEL))
    tiles = [ref.texture(96, 128, seed) for seed in range(10)] + [ref.noise(64, 96)] * 2
    looks: list[int] = []
    quantise = encoding.quantise

    def spy(*args: object) -> object:
        looks.append(1)
        return quantise(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(encoding, "quantise", spy)
    with ref.threads(1):
        for budget in (2000, 4000, 8000):
            encoding.encode_tiles(codec, tiles, budget)
    assert len(looks) / len(tiles) / 3 < 3
