"""Proximal policy optimisation of the allocation policy: equations (6) to (10) of the paper.

Written out rather than taken from a library: actions are masked by what is left of a budget,
thousands of blocks are decided at once, and `ingest --adapt` runs it inside the encoder, where a
reinforcement-learning framework would be a heavy guest. The shape is CleanRL's `ppo.py`.

The utility is credited where it arises: a block's return is what its choice changed around it,
less the price of its bits, and not the whole picture's terminal reward (6). Both have the same
gradient in expectation as far as a decision acts within that neighbourhood, but the noise of
some 250 other decisions is gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from archive_pipeline.pcdc.allocation import BASE_LEVEL
from archive_pipeline.pcdc.policy import Policy

EPSILON = 1e-6


@dataclass(frozen=True)
class PPOConfig:
    """Constants of section III-A.

    Attributes:
        clip: gamma of equation (10).
        entropy: kappa of equation (10).
        actor_rate, critic_rate: learning rates of Adam.
        dual_step: rho of equation (8), a percent of R_max being the unit of rate.
        epochs, minibatch: passes over an update's tiles, and tiles at a time.
    """

    clip: float = 0.2
    entropy: float = 0.01
    actor_rate: float = 3e-4
    critic_rate: float = 1e-3
    dual_step: float = 1e-3
    epochs: int = 4
    minibatch: int = 16


@dataclass
class Rollout:
    """Decisions of N tiles, of the same number of blocks.

    Attributes:
        state: (N, C, B_h, B_w); bits: (N, K, B_h, B_w) in usual bits; price: (N,).
        levels: (N, B_h, B_w) int64, 0..K-1.
        feasible: (N, K, B_h, B_w) bool, what the budget left to choose from.
        log_prob: (N, B_h, B_w), of the levels when they were drawn.
        returns: (N, B_h, B_w), in usual bits; filled in once the reconstruction is judged.
    """

    state: Tensor
    bits: Tensor
    price: Tensor
    levels: Tensor
    feasible: Tensor
    log_prob: Tensor
    returns: Tensor


@torch.no_grad()
def roll_out(
    policy: Policy,
    state: Tensor,
    bits: Tensor,
    price: Tensor,
    budget: Tensor,
    generator: torch.Generator,
) -> Rollout:
    """Draw the levels of all tiles, block after block, none beyond its budget.

    A level is feasible if the blocks after it can still all take their cheapest.

    Args:
        state: (N, C, B_h, B_w); bits: (N, K, B_h, B_w) in usual bits; price: (N,).
        budget: (N,) in usual bits; less than the cheapest levels take leaves only those.
    """
    logits = policy.logits(state, bits, price).flatten(2)
    uniform = torch.rand(logits.shape, generator=generator).clamp_min(1e-20)
    noisy = logits - torch.log(-torch.log(uniform))  # Gumbel: the argmax is a draw
    cheapest = bits.flatten(2).amin(1)
    extra = bits.flatten(2) - cheapest[:, None]
    slack = budget - cheapest.sum(1)
    feasible = torch.empty(logits.shape, dtype=torch.bool)
    levels = torch.empty(cheapest.shape, dtype=torch.int64)
    for b in range(levels.shape[1]):
        feasible[:, :, b] = extra[:, :, b] <= slack.clamp_min(0)[:, None]
        levels[:, b] = noisy[:, :, b].masked_fill(~feasible[:, :, b], -torch.inf).argmax(1)
        slack = slack - extra[:, :, b].gather(1, levels[:, b : b + 1])[:, 0]
    shape = (-1, *state.shape[2:])
    levels = levels.view(shape)
    feasible = feasible.view(bits.shape)
    log_prob, _ = _log_prob(logits.view(bits.shape), feasible, levels)
    return Rollout(state, bits, price, levels, feasible, log_prob, torch.zeros_like(log_prob))


def _log_prob(logits: Tensor, feasible: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Log probability of the levels and entropy of the distribution, (N, B_h, B_w) each."""
    logs = logits.masked_fill(~feasible, -1e9).log_softmax(1)
    entropy = -(logs.exp() * logs).sum(1)
    return logs.gather(1, levels[:, None])[:, 0], entropy


def gather_levels(table: Tensor, levels: Tensor) -> Tensor:
    """Pick from (N, K, B_h, B_w) what belongs to levels (N, B_h, B_w)."""
    return table.gather(1, levels[:, None])[:, 0]


def block_returns(rollout: Rollout, gained: Tensor) -> Tensor:
    """Returns of a rollout's decisions, (N, B_h, B_w): utility gained less the price of bits.

    Args:
        gained: (N, B_h, B_w), utility gained over the base level throughout, in usual bits.
    """
    # what a block changes shows in its neighbours as well
    around = F.avg_pool2d(gained, 3, 1, 1, divisor_override=1)
    base = rollout.bits[:, BASE_LEVEL - 1]
    extra = gather_levels(rollout.bits, rollout.levels) - base
    return around - rollout.price.view(-1, 1, 1) * extra


class Optimiser:
    """Adam for the actor and for the critic."""

    def __init__(self, policy: Policy, config: PPOConfig) -> None:
        self.policy = policy
        self.config = config
        critic = [*policy.critic.parameters(), *policy.value_of.parameters()]
        held = {id(p) for p in critic}
        actor = [p for p in policy.parameters() if id(p) not in held]
        self.adam = torch.optim.Adam(
            [
                {"params": actor, "lr": config.actor_rate},
                {"params": critic, "lr": config.critic_rate},
            ]
        )

    def update(self, rollout: Rollout, generator: torch.Generator) -> dict[str, float]:
        """Equation (10) over a rollout; returns means of `entropy`, `value_loss` and `clipped`."""
        policy, config = self.policy, self.config
        with torch.no_grad():
            advantage = rollout.returns - policy.value(rollout.state, rollout.price)
            advantage = (advantage - advantage.mean()) / (advantage.std() + EPSILON)
        seen = {"entropy": 0.0, "value_loss": 0.0, "clipped": 0.0}
        count = 0
        for _ in range(config.epochs):
            order = torch.randperm(len(rollout.levels), generator=generator)
            for part in order.split(config.minibatch):
                state, price = rollout.state[part], rollout.price[part]
                logits = policy.logits(state, rollout.bits[part], price)
                log_prob, entropy = _log_prob(logits, rollout.feasible[part], rollout.levels[part])
                ratio = (log_prob - rollout.log_prob[part]).exp()
                gain = advantage[part]
                surrogate = torch.minimum(
                    ratio * gain, ratio.clamp(1 - config.clip, 1 + config.clip) * gain
                )
                value_loss = F.smooth_l1_loss(policy.value(state, price), rollout.returns[part])
                loss = value_loss - surrogate.mean() - config.entropy * entropy.mean()
                self.adam.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                self.adam.step()
                count += 1
                seen["entropy"] += float(entropy.detach().mean())
                seen["value_loss"] += float(value_loss.detach())
                seen["clipped"] += float(((ratio.detach() - 1).abs() > config.clip).float().mean())
        return {name: value / count for name, value in seen.items()}


def dual_ascent(price: float, rate: float, allowed: float, config: PPOConfig) -> float:
    """Equation (8): the price after a mean rate was met with an allowed one, in any one unit."""
    return max(0.0, price + config.dual_step * 100 * (rate - allowed) / allowed)
