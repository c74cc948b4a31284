"""How the codec runs: what no archive stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.pcdc.precision import Precision

if TYPE_CHECKING:
    from archive_pipeline.pcdc.training.judge import Task

# levels by which a write's blocks are above the others, from its tiles
Raise = Callable[[list[NDArray[np.uint8]]], list[NDArray[np.uint8]]]


@dataclass(frozen=True)
class Settings:
    """How one array's pixels are decoded and encoded (see `zarr_codec.with_settings`).

    Attributes:
        device: torch device, see `models.find_device`.
        precision: of the codec's large networks, see `pcdc.precision`.
        steps: denoising steps of the decoder; 0 is deterministic.
        seed: of the denoiser's noise.
        realism: how much of the detail that denoising generates is in the pixels, 0..1. With none
            of it there are no steps to take.
        allocation: how an image's bits are spread, one of `ALLOCATIONS`; "objects" is "uniform"
            with blocks that `raised` names.
        policy: SHA-256 of a registered policy, where the allocation is "policy".
        adapt: updates that the policy is given on every image.
        task_of: of a tile, what the policy's updates shall keep for a task.
        raised: makes some blocks finer than the others, which are alike.
        overspent: told of a write that takes more than its array's bits_per_pixel even at the
            coarsest: how many bits a coded pixel it takes. Without it that is an error.
    """

    device: str = "cpu"
    steps: int = 0
    seed: int = 0
    allocation: str = "uniform"
    policy: str = ""
    adapt: int = 0
    task_of: Callable[[NDArray[np.uint8]], Task] | None = None
    raised: Raise | None = None
    overspent: Callable[[float], None] | None = None
    precision: Precision = "auto"
    realism: float = 1.0

    def __post_init__(self) -> None:
        if not self.realism:
            object.__setattr__(self, "steps", 0)


DEFAULT = Settings()
