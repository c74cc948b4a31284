"""Test-time adaptation of the allocation policy to one image: Algorithm 1 of the paper."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from archive_pipeline.pcdc.allocation import BASE_LEVEL, BudgetTooSmall, TilePlan
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.encoding import Encoding
from archive_pipeline.pcdc.policy import Policy, block_state
from archive_pipeline.pcdc.training.ppo import Optimiser, PPOConfig, block_returns, roll_out

if TYPE_CHECKING:
    from archive_pipeline.pcdc.training.judge import Task

SAMPLE_TILES = 6  # of the image, spread evenly, that are decoded for every update


def to_signal(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Pixels uint8 (H, W, 3) to (1, 3, H, W) in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / 127.5 - 1


def encode_adapted(
    codec: Codec,
    tiles: list[NDArray[np.uint8]],
    budget: int,
    policy: Policy,
    updates: int,
    strict: bool = True,
    task_of: Callable[[NDArray[np.uint8]], Task] | None = None,
) -> list[bytes]:
    """Encode an image as `encode_tiles` does, after so many PPO updates of the policy on it.

    Where the coarsest step does not fit there is nothing to allocate, and no update is made.

    Args:
        task_of: of a tile, uint8 (H, W, 3), the task that the utility counts as well.

    Raises:
        BudgetTooSmall: even the coarsest coding takes more.
        UtilityError: LPIPS' weights cannot be had.
    """
    job = Encoding(codec, tiles, policy.block_worth)
    try:
        plans = job.plan(budget)
    except BudgetTooSmall:
        return job.sparing(budget, strict)
    price = job.allocator.price
    if price is not None:
        step = Counter(plan.image_step for plan in plans).most_common(1)[0][0]
        in_bits = price / policy.config.usual_slope(step)
        job.worth = adapt(job, policy, step, in_bits, updates, task_of).block_worth
    return job.sparing(budget, strict)


def adapt(
    job: Encoding,
    policy: Policy,
    image_step: int,
    price: float,
    updates: int,
    task_of: Callable[[NDArray[np.uint8]], Task] | None = None,
) -> Policy:
    """Return what allocates some of an image's tiles best after PPO updates on them.

    A few updates on one image are noisy: what they made of a copy is kept if, without chance, it
    chooses better for those tiles than the policy itself does, and than a policy to which all
    blocks are equally important.

    Args:
        image_step, price: at which the unadapted policy met the image's budget; in the unit of
            `Policy.logits`.
        task_of: as for `encode_adapted`.
    """
    from archive_pipeline.pcdc.training.judge import Judge

    adapted = copy.deepcopy(policy).train().requires_grad_(True)
    config = policy.config
    chosen = _sample(job)
    costs = job.each(lambda t: job.block_costs(t, image_step), chosen)
    state = torch.stack(
        job.each(
            lambda k: block_state(
                job.tiles[chosen[k]], job.latents_of(chosen[k]), costs[k], image_step
            ),
            range(len(chosen)),
        )
    )
    bits = torch.from_numpy(np.stack([c.bits for c in costs])).float()
    bits /= config.usual_bits(image_step)
    scale = config.usual_slope(image_step) * config.usual_bits(image_step)
    tasks = {t: task_of(job.tiles[t]) if task_of else None for t in chosen}
    judges = job.each(lambda t: Judge(to_signal(job.tiles[t]), task=tasks[t]), chosen)

    def losses(levels: NDArray[np.uint8]) -> torch.Tensor:
        """-U around the blocks of all chosen tiles."""
        plans = [(t, TilePlan(image_step, part)) for t, part in zip(chosen, levels, strict=True)]
        pixels = job.codec.synthesise(job.each(lambda plan: job.reconstruct(*plan), plans))
        judged = list(zip(judges, pixels, strict=True))
        return torch.stack(job.each(lambda pair: pair[0].loss(to_signal(pair[1])), judged))

    base = losses(np.full((len(chosen), *bits.shape[2:]), BASE_LEVEL, np.uint8))
    generator = torch.Generator().manual_seed(0)
    optimiser = Optimiser(adapted, PPOConfig())
    prices = torch.full((len(chosen),), price)
    unlimited = bits.amax(1).sum((1, 2))  # the budget is the image's; its price stands for it

    def gained(levels: torch.Tensor) -> torch.Tensor:
        """Utility that levels - 1 (N, B_h, B_w) gain over the base level, in usual bits."""
        return (base - losses((levels + 1).numpy().astype(np.uint8))) / scale

    for _ in range(updates):
        # by one thread each, so that the result does not depend on their number either
        [rollout] = job.each(
            lambda s: roll_out(adapted, s, bits, prices, unlimited, generator), [state]
        )
        rollout.returns = block_returns(rollout, gained(rollout.levels))
        job.each(lambda r: optimiser.update(r, generator), [rollout])
    adapted.eval().requires_grad_(False)

    def net(candidate: Policy) -> float:
        """What the levels worth most at the image's price gain beyond what their bits cost."""
        [logits] = job.each(lambda s: candidate.logits(s, bits, prices), [state])
        levels = logits.argmax(1)
        return float(gained(levels).sum() - price * bits.gather(1, levels[:, None]).sum())

    alike = copy.deepcopy(policy)
    for parameter in alike.importance_of.parameters():
        torch.nn.init.zeros_(parameter)
    return max((policy, alike, adapted), key=net)


def _sample(job: Encoding) -> list[int]:
    """Tiles of the commonest size, spread evenly over the image."""
    grids = job.allocator.grids
    size = Counter(g for g in grids if g[0]).most_common(1)[0][0]
    same = [t for t, g in enumerate(grids) if g == size]
    places = np.linspace(0, len(same) - 1, min(SAMPLE_TILES, len(same)))
    return [same[round(float(place))] for place in places]
