"""A released model, ready for coding with PyTorch; `model_files` has what its files are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as save_tensors
from torch import Tensor

from archive_pipeline.pcdc import model_files
from archive_pipeline.pcdc.constants import (
    ACTIVATION_BITS,
    LEVEL_OFFSETS,
    SCALE_COUNT,
    WEIGHT_BITS,
)
from archive_pipeline.pcdc.entropy import (
    frequencies_of,
    gaussian_shares,
    level_frequencies,
    symbol_limit,
)
from archive_pipeline.pcdc.layers import IntegerConv2d
from archive_pipeline.pcdc.model_files import (
    CONFIG,
    DENOISER_CONFIG,
    FORMAT,
    KNOT_BITS,
    WEIGHTS,
    denoiser_reported,
    read,
    read_denoiser,
    read_folder,
    reported,
)
from archive_pipeline.pcdc.precision import Precision, chosen
from archive_pipeline.pcdc.transforms import TransformCodec, scale_of

if TYPE_CHECKING:
    from archive_pipeline.pcdc.denoiser import Denoiser

# shares of blocks whose level repeats its neighbour's, one frequency table each
LEVEL_STAY = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 0.999)


class Model:
    """Networks and tables ready for coding.

    Attributes:
        networks: the `TransformCodec`, in evaluation mode.
        tables: scale tables 0..79, then one table a level-map statistic.
        files: the files that define the model, by name: `FILES`, perhaps `DENOISER_FILES`.
        sha256: its identity.
        multiplies_in: type in which its large networks multiply.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        device: str | torch.device = "cpu",
        precision: Precision = "float32",
    ) -> None:
        """Build a model from its files' contents.

        Args:
            precision: of the large networks, see `pcdc.precision`.

        Raises:
            ModelError: they are damaged or of an unknown kind.
        """
        self.files = files
        self._denoiser: Denoiser | None = None
        contents = read(files)
        with reported(contents.sha256):
            with torch.device("meta"):
                networks = TransformCodec(contents.config)
            tensors = {name: torch.from_numpy(array) for name, array in contents.tensors.items()}
            networks.load_state_dict(tensors, assign=True)
        self.sha256, self.tables = contents.sha256, contents.tables
        self.level_tables = contents.level_tables
        self.device = torch.device(device)
        self.networks = networks.eval().requires_grad_(False).to(device)
        self.multiplies_in = chosen(precision, self.device)
        self.networks.multiply_in(self.multiplies_in)

    @property
    def has_denoiser(self) -> bool:
        """Whether the model can decode with `steps` >= 1."""
        return DENOISER_CONFIG in self.files

    def denoiser(self) -> Denoiser:
        """The diffusion decoder, loaded when first asked for.

        Raises:
            ModelError: there is none, or its files are damaged.
        """
        if self._denoiser is None:
            config, tensors = read_denoiser(self.files, self.networks.config.latents, self.sha256)
            from archive_pipeline.pcdc.denoiser import load_denoiser  # diffusers takes seconds

            with denoiser_reported(self.sha256):
                loaded = load_denoiser(config, tensors)
            self._denoiser = loaded.to(self.device, memory_format=torch.channels_last)
        return self._denoiser

    @classmethod
    def from_folder(cls, folder: Path, device: str | torch.device = "cpu") -> Model:
        """Load a model folder.

        Raises:
            ModelError: a file is missing, too large or damaged.
        """
        return cls(read_folder(folder), device)


def stored_as(name: str, kind: str) -> torch.dtype:
    """The type of a tensor of this name in a model of this format, see `model_files`."""
    dtype: torch.dtype = getattr(torch, model_files.stored_as(name, kind))
    return dtype


def gaussian_tables(wider: float = 1.0) -> list[NDArray[np.float64]]:
    """Probabilities of symbols -Q..Q at each scale index, Gaussian as training takes them to be.

    `wider` makes their scales larger, but not Q.
    """
    scales = [float(scale_of(torch.tensor(float(i)))) for i in range(SCALE_COUNT)]
    return [gaussian_shares(wider * scale, symbol_limit(scale)) for scale in scales]


def build_files(
    networks: TransformCodec, shares: list[NDArray[np.float64]] | None = None
) -> dict[str, bytes]:
    """Return the files of a released model made of trained networks.

    Args:
        shares: probabilities of symbols -Q..Q at each scale index; `gaussian_tables` if left out.

    What the entropy decoder depends on is snapped to the grid that `forward` rounds it to, so
    that reading it back involves no rounding at all. All else is rounded to half precision.
    """
    tensors: dict[str, Tensor] = {
        k: v.detach().cpu().float().contiguous().clone() for k, v in networks.state_dict().items()
    }
    for name, module in networks.named_modules():
        if isinstance(module, IntegerConv2d):
            weight, bias = module._integers()
            weight_unit = 2.0**-WEIGHT_BITS
            bias_unit = weight_unit * 2.0**-ACTIVATION_BITS
            tensors[f"{name}.weight"] = (weight * weight_unit).detach().cpu().float()
            tensors[f"{name}.bias"] = (bias * bias_unit).detach().cpu().float()
    tensors["prior.knots"] = torch.round(tensors["prior.knots"] * 2**KNOT_BITS) / 2**KNOT_BITS
    tensors = {name: tensor.to(stored_as(name, FORMAT)) for name, tensor in tensors.items()}
    rows = [frequencies_of(row) for row in shares or gaussian_tables()]
    zero = [len(r) // 2 for r in rows] + [0] * len(LEVEL_STAY)
    rows += [level_frequencies(p, len(LEVEL_OFFSETS)) for p in LEVEL_STAY]
    tensors["tables.frequency"] = torch.from_numpy(np.concatenate(rows)).int()
    tensors["tables.size"] = torch.tensor([len(r) for r in rows]).int()
    tensors["tables.zero"] = torch.tensor(zero).int()
    config = {"format": FORMAT, **networks.config.to_json()}
    return {
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        WEIGHTS: save_tensors(tensors),
    }
