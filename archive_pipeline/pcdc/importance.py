"""Levels by importance: how much more than usual the bits of a block are worth.

At high rate the error of a quantiser falls with the square of its step, so a bit that takes a
block from level k to k + 1, half an octave finer, buys half of what the last one bought. The worth
of a level is the sum of what its bits buy, times the block's importance. Where all blocks are
equally important, all levels are alike at any price: what the transform was trained for.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor
from torch.nn import functional as F

from archive_pipeline.pcdc.allocation import BASE_LEVEL
from archive_pipeline.pcdc.constants import LEVEL_OFFSETS, STEPS_PER_OCTAVE

# what a bit buys from each level to the next: 1 around the base level
SLOPES = [2.0 ** ((coarse + fine) / STEPS_PER_OCTAVE) for coarse, fine in pairwise(LEVEL_OFFSETS)]


def level_worth(bits: Tensor, importance: Tensor) -> Tensor:
    """Worth (..., K, B_h, B_w) of each level beyond the base level's, in the unit of `bits`.

    Args:
        bits: (..., K, B_h, B_w) that the levels of blocks take.
        importance: (..., B_h, B_w) logarithm of each block's importance, 0 as usual.
    """
    bought = bits.diff(dim=-3) * bits.new_tensor(SLOPES).view(-1, 1, 1)
    worth = F.pad(bought, (0, 0, 0, 0, 1, 0)).cumsum(-3)
    base = worth[..., BASE_LEVEL - 1 : BASE_LEVEL, :, :]
    return (worth - base) * importance.exp().unsqueeze(-3)
