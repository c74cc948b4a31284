"""KID and FID: how alike the patches of originals and of decoded pictures are as two crowds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from metrics import Pixels, impatient
from torch import Tensor

PATCH, STRIDE = 64, 32  # pixels
BATCH = 32
SUBSET = 100  # patches that KID compares at a time
LABELS = {"kid": "KID", "fid": "FID"}

Distances = Callable[[Iterable[Pixels], Iterable[Pixels]], dict[str, float]]


def patches(pictures: Iterable[Pixels]) -> Tensor:
    """All patches of pictures uint8 (height, width, 3): uint8 (n, 3, 64, 64)."""
    cut = []
    for pixels in pictures:
        picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        grid = picture.unfold(1, PATCH, STRIDE).unfold(2, PATCH, STRIDE)
        cut.append(grid.permute(1, 2, 0, 3, 4).reshape(-1, 3, PATCH, PATCH))
    return torch.cat(cut)


def load() -> tuple[Distances | None, str]:
    """What measures both (torchmetrics, Inception v3), or None and a line that says why not."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        with impatient():
            judges: dict[str, Any] = {
                "kid": KernelInceptionDistance(subset_size=SUBSET),
                "fid": FrechetInceptionDistance(),
            }
    except ImportError as error:
        return None, f"KID and FID are left out: {error}"
    except Exception as error:  # torch.hub promises no particular ones
        reason = " ".join(str(error).split())
        return None, f"KID and FID are left out: Inception's weights could not be loaded ({reason})"

    @torch.inference_mode()
    def measure(originals: Iterable[Pixels], decoded: Iterable[Pixels]) -> dict[str, float]:
        first, second = patches(originals), patches(decoded)
        if len(first) < SUBSET:
            return {}
        found = {}
        for name, judge in judges.items():
            judge.reset()
            for crowd, real in ((first, True), (second, False)):
                for part in crowd.split(BATCH):
                    judge.update(part, real=real)
            value = judge.compute()
            found[name] = float(value[0] if isinstance(value, tuple) else value)
        return found

    return measure, ""
