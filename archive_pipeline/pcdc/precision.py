"""In which numbers the large networks multiply: float32, or bfloat16 where that is fast.

That concerns what stands before the entropy coder and behind the decoder, g_a and g_s. Whatever the
entropy decoder depends on is computed in integers, so streams of one machine decode on any other.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("auto", "float32", "bfloat16")


def chosen(precision: Precision, device: torch.device) -> torch.dtype:
    """The type to multiply in on a device; "auto" is bfloat16 where the device is made for it."""
    import torch  # only with networks to run: options name precisions, too

    if precision == "auto":
        return torch.bfloat16 if _has_matrix_units(device) else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 faster than those of float32.

    CPUs do so with AMX alone: AVX-512's instructions for bfloat16 are used where they save nothing.
    """
    # oneDNN's own switch, by which other CPUs are tried out
    held = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return (held in ("", "ALL", "DEFAULT") or "AMX" in held) and _has_amx()


@cache
def _has_amx() -> bool:
    try:
        return " amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux, where alone programs may use it
        return False


def _has_matrix_units(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 faster than those of float32."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bfloat16_is_fast()
