"""A released model: networks and frequency tables in one folder, named by its SHA-256.

A folder holds `config.json` and `model.safetensors`, the transform codec; where it has a diffusion
decoder, `denoiser/` in diffusers' layout; and a model card. The hash covers all but the card;
archives carry these files and decode with them for ever.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.pcdc.constants import LEVEL_OFFSETS, SCALE_COUNT
from archive_pipeline.pcdc.entropy import (
    Tables,
    frequencies_of,
    gaussian_shares,
    level_frequencies,
    symbol_limit,
)
from archive_pipeline.pcdc.layers import IntegerConv2d
from archive_pipeline.pcdc.precision import Precision, chosen
from archive_pipeline.pcdc.transforms import TransformCodec, TransformConfig, scale_of

if TYPE_CHECKING:
    from archive_pipeline.pcdc.denoiser import Denoiser

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FILES = (CONFIG, WEIGHTS)
DENOISER_CONFIG = "denoiser/config.json"
DENOISER_WEIGHTS = "denoiser/diffusion_pytorch_model.safetensors"
DENOISER_FILES = (DENOISER_CONFIG, DENOISER_WEIGHTS)
FORMAT = "pcdc-transform-5"
# fields that a format's config.json does not name, and their values
FORMATS: dict[str, dict[str, int]] = {
    "pcdc-transform-1": {"edge_kernel": 1, "shortcut": 0, "extra_depth_16": 0},
    "pcdc-transform-2": {"shortcut": 0, "extra_depth_16": 0},
    "pcdc-transform-3": {"extra_depth_16": 0},
    "pcdc-transform-4": {"extra_depth_16": 0},
    FORMAT: {},
}
FULL_PRECISION = ("pcdc-transform-1", "pcdc-transform-2", "pcdc-transform-3")
EXACT = ("h_scale.", "prior.")  # networks that entropy decoding depends on, in any format
MAX_BYTES = {
    CONFIG: 64 << 10,
    WEIGHTS: 256 << 20,
    DENOISER_CONFIG: 64 << 10,
    DENOISER_WEIGHTS: 256 << 20,
}
MAX_HEADER = 1 << 20  # bytes of a safetensors header: names, types and places of the tensors
MAX_WIDTH = 1024
MAX_DEPTH = 32
CHOICES = {"edge_kernel": (1, 3), "shortcut": (0, 1), "extra_depth_16": range(MAX_DEPTH + 1)}
KNOT_BITS = 10  # the prior's knots are multiples of 2^-10: interpolating eighths is exact
MAX_KNOT = 1 << 6
MAX_INTEGER_BIAS = 1 << 22  # float32 still rounds halves exactly

# shares of blocks whose level repeats its neighbour's, one frequency table each
LEVEL_STAY = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 0.999)


class ModelError(ArchivePipelineError, ValueError):
    """A model folder is damaged or of a kind this version does not know."""


def digest(files: dict[str, bytes]) -> str:
    """SHA-256 of a model: over the names and SHA-256 of its files, in name order."""
    total = hashlib.sha256()
    for name in sorted({*FILES, *(files.keys() & {*DENOISER_FILES})}):
        total.update(f"{name}\0{hashlib.sha256(files[name]).hexdigest()}\n".encode())
    return total.hexdigest()


def transform_digest(files: dict[str, bytes]) -> str:
    """SHA-256 of a model's transform codec alone: what its denoiser was trained for."""
    return digest({name: files[name] for name in FILES})


class Model:
    """Networks and tables ready for coding.

    Attributes:
        networks: the `TransformCodec`, in evaluation mode.
        tables: scale tables 0..79, then one table a level-map statistic.
        files: the files that define the model, by name: `FILES`, perhaps `DENOISER_FILES`.
        sha256: its identity.
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
        self.sha256 = digest(files)
        self._denoiser: Denoiser | None = None
        try:
            config = json.loads(files[CONFIG])
            kind = config.pop("format")
            implied = FORMATS.get(kind)
            if implied is None:
                raise ModelError(f"model {self.sha256[:12]} is of an unknown format")
            widths = TransformConfig(**config, **implied)
            # defaults may change, a model may not
            if config.keys() | implied.keys() != widths.to_json().keys():
                raise ModelError(f"model {self.sha256[:12]}: its configuration is incomplete")
            for name, value in widths.to_json().items():
                limit = MAX_DEPTH if name.startswith("depth") else MAX_WIDTH
                if type(value) is not int or value not in CHOICES.get(name, range(1, limit + 1)):
                    raise ModelError(f"model {self.sha256[:12]}: {name}={value!r} is out of range")
            check_header(files[WEIGHTS])
            tensors = load_tensors(files[WEIGHTS])
            tables = [tensors.pop(f"tables.{n}").numpy() for n in ("frequency", "size", "zero")]
            for name, tensor in tensors.items():
                if tensor.dtype != stored_as(name, kind):
                    raise ModelError(
                        f"model {self.sha256[:12]}: {name} is {_short(tensor.dtype)}, "
                        f"not {_short(stored_as(name, kind))}"
                    )
            tensors = {name: tensor.float() for name, tensor in tensors.items()}
            with torch.device("meta"):
                networks = TransformCodec(widths)
            networks.load_state_dict(tensors, assign=True)
            if any(not t.isfinite().all() for t in tensors.values()):
                raise ModelError(f"model {self.sha256[:12]} holds values that are not finite")
            if not _exact(networks):
                raise ModelError(f"model {self.sha256[:12]} has scale weights off their grid")
            self.tables = Tables(*tables)
        except ModelError:
            raise
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RuntimeError,
            SafetensorError,
        ) as error:
            raise ModelError(f"model {self.sha256[:12]} cannot be read: {error}") from error
        if len(self.tables.sizes) <= SCALE_COUNT + 1 or len(self.tables.sizes) > SCALE_COUNT + 17:
            raise ModelError(f"model {self.sha256[:12]} has the wrong number of tables")
        sizes, zero = self.tables.sizes[:-1], self.tables.zero[:-1]
        if (sizes[:SCALE_COUNT] != 2 * zero[:SCALE_COUNT] + 1).any() or (
            (sizes[SCALE_COUNT:] != len(LEVEL_OFFSETS)) | (zero[SCALE_COUNT:] != 0)
        ).any():
            raise ModelError(f"model {self.sha256[:12]} has tables of the wrong sizes")
        self.device = torch.device(device)
        self.networks = networks.eval().requires_grad_(False).to(device)
        self.networks.multiply_in(chosen(precision, self.device))
        self.level_tables = len(self.tables.sizes) - 1 - SCALE_COUNT

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
            if not self.has_denoiser:
                raise ModelError(f"model {self.sha256[:12]} has no denoiser: decode with steps 0")
            from archive_pipeline.pcdc.denoiser import load_denoiser  # diffusers takes seconds

            config, weights = (self.files[name] for name in DENOISER_FILES)
            try:
                loaded = load_denoiser(config, weights, self.networks.config.latents)
            except ValueError as error:
                raise ModelError(f"model {self.sha256[:12]}: its denoiser: {error}") from error
            self._denoiser = loaded.to(self.device)
        return self._denoiser

    @classmethod
    def from_folder(cls, folder: Path, device: str | torch.device = "cpu") -> Model:
        """Load a model folder.

        Raises:
            ModelError: a file is missing, too large or damaged.
        """
        return cls(read_folder(folder), device)


def read_folder(folder: Path) -> dict[str, bytes]:
    """Read the files that make up a model.

    Raises:
        ModelError: a file is missing, unreadable or too large.
    """
    files = {}
    complete = (folder / DENOISER_CONFIG).is_file()
    for name in FILES + (DENOISER_FILES if complete else ()):
        path = folder / name
        try:
            if path.stat().st_size > MAX_BYTES[name]:
                raise ModelError(f"{path}: larger than a model may be")
            files[name] = path.read_bytes()
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror}") from error
    return files


def check_header(weights: bytes) -> None:
    """Refuse safetensors of so many tensors that to name them takes longer than all else.

    Raises:
        ValueError: the header is larger than that of any model or policy.
    """
    size = int.from_bytes(weights[:8], "little")
    if size > MAX_HEADER:
        raise ValueError(f"a header of {size} bytes is larger than allowed")


def stored_as(name: str, kind: str) -> torch.dtype:
    """The type of a tensor of this name in a model of this format; all compute in float32."""
    full = kind in FULL_PRECISION or name.startswith(EXACT)
    return torch.float32 if full else torch.float16


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _exact(networks: TransformCodec) -> bool:
    """Whether all that scale indices come from lies on its grid, small enough for exact sums."""

    def on_grid(values: Tensor, bits: int, limit: float) -> bool:
        scaled = values.double() * 2**bits
        return bool(((scaled == scaled.round()) & (scaled.abs() <= limit)).all())

    weight, bias = (
        IntegerConv2d.WEIGHT_BITS,
        IntegerConv2d.WEIGHT_BITS + IntegerConv2d.ACTIVATION_BITS,
    )
    return on_grid(networks.prior.knots, KNOT_BITS, MAX_KNOT << KNOT_BITS) and all(
        on_grid(layer.weight, weight, IntegerConv2d.WEIGHT_LIMIT)
        and on_grid(layer.bias, bias, MAX_INTEGER_BIAS)
        for layer in networks.modules()
        if isinstance(layer, IntegerConv2d)
    )


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
            weight_unit = 2.0**-IntegerConv2d.WEIGHT_BITS
            bias_unit = weight_unit * 2.0**-IntegerConv2d.ACTIVATION_BITS
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
