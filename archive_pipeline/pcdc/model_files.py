"""A model's files: their names, their identity, and what they hold, checked.

A folder holds `config.json` and `model.safetensors`, the transform codec; where it has a diffusion
decoder, `denoiser/` in diffusers' layout; and a model card. The hash covers all but the card;
archives carry these files and decode with them for ever.

What runs the networks is elsewhere: `model` with PyTorch, `reader` without.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays

from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.pcdc.constants import (
    ACTIVATION_BITS,
    LEVEL_OFFSETS,
    SCALE_COUNT,
    WEIGHT_BITS,
    WEIGHT_LIMIT,
)
from archive_pipeline.pcdc.diffusion import NORM_GROUPS
from archive_pipeline.pcdc.entropy import Tables

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
ENCODER = ("g_a.", "h_a.")  # networks that decoding does without
EXACT = ("h_scale.", "prior.")  # networks that entropy decoding depends on, in any format
MAX_BYTES = {
    CONFIG: 64 << 10,
    WEIGHTS: 256 << 20,
    DENOISER_CONFIG: 64 << 10,
    DENOISER_WEIGHTS: 256 << 20,
}
LONGEST_ERROR = 300  # characters
MAX_HEADER = 1 << 20  # bytes of a safetensors header: names, types and places of the tensors
MAX_WIDTH = 1024
MAX_DEPTH = 32
MAX_DENOISER = {"layers": 4, "grain": 4}
MAX_DENOISER_WIDTH = 512
CHOICES = {"edge_kernel": (1, 3), "shortcut": (0, 1), "extra_depth_16": range(MAX_DEPTH + 1)}
KNOT_BITS = 10  # the prior's knots are multiples of 2^-10: interpolating eighths is exact
MAX_KNOT = 1 << 6
MAX_INTEGER_BIAS = 1 << 22  # float32 still rounds halves exactly


class ModelError(ArchivePipelineError, ValueError):
    """A model folder is damaged or of a kind this version does not know."""


@dataclass(frozen=True)
class TransformConfig:
    """Widths and depths of the transform codec.

    `edge_kernel` is the kernel, on the grid of 8 px cells, of the first layer of g_a and the last
    of g_s: with 3 both are lapped transforms, with 1 (the first release) block transforms.
    `shortcut` is 1 where both have a linear shortcut, 0 (releases before it) where they have none.
    `extra_depth_16` counts the blocks that g_a has at 1/16 beyond g_s's: decoding does without.
    """

    latents: int = 320
    hyper_latents: int = 64
    width_8: int = 128
    width_16: int = 192
    depth_8: int = 4
    depth_16: int = 9
    edge_kernel: int = 3
    shortcut: int = 1
    extra_depth_16: int = 2

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class DenoiserConfig:
    """Widths and depths of the diffusion decoder, see `denoiser.Denoiser`.

    `grain`, the octaves of noise that it adds, is 0 in releases that do not name it.
    """

    latents: int
    features: int
    width_8: int
    width_16: int
    layers: int
    grain: int = 0


@dataclass(frozen=True)
class Contents:
    """What the files of a model hold.

    Attributes:
        sha256: the model's identity.
        config: of its networks.
        tensors: their weights by name, float32.
        tables: scale tables 0..79, then one table a level-map statistic.
    """

    sha256: str
    config: TransformConfig
    tensors: dict[str, NDArray[np.float32]]
    tables: Tables

    @property
    def level_tables(self) -> int:
        """Number of tables for level maps."""
        return len(self.tables.sizes) - 1 - SCALE_COUNT


def digest(files: dict[str, bytes]) -> str:
    """SHA-256 of a model: over the names and SHA-256 of its files, in name order."""
    total = hashlib.sha256()
    for name in sorted({*FILES, *(files.keys() & {*DENOISER_FILES})}):
        total.update(f"{name}\0{hashlib.sha256(files[name]).hexdigest()}\n".encode())
    return total.hexdigest()


def transform_digest(files: dict[str, bytes]) -> str:
    """SHA-256 of a model's transform codec alone: what its denoiser was trained for."""
    return digest({name: files[name] for name in FILES})


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


def stored_as(name: str, kind: str) -> str:
    """The type of a tensor of this name in a model of this format; all compute in float32."""
    full = kind in FULL_PRECISION or name.startswith(EXACT)
    return "float32" if full else "float16"


@contextmanager
def reported(sha256: str) -> Iterator[None]:
    """Raise `ModelError` for whatever networks cannot be made of."""
    try:
        yield
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
        raise ModelError(f"model {sha256[:12]} cannot be read: {error}") from error


def read(
    files: dict[str, bytes], sha256: str | None = None, without: tuple[str, ...] = ()
) -> Contents:
    """Read a model's files and check all that can be checked without its networks.

    Args:
        sha256: the files' `digest`, where it is known.
        without: networks that are not wanted, by the beginnings of their tensors' names.

    Raises:
        ModelError: they are damaged or of an unknown kind.
    """
    sha256 = sha256 or digest(files)
    with reported(sha256):
        contents = _read(files, sha256, without)
    _check_tables(contents)
    return contents


def _read(files: dict[str, bytes], sha256: str, without: tuple[str, ...]) -> Contents:
    config = json.loads(files[CONFIG])
    kind = config.pop("format")
    implied = FORMATS.get(kind)
    if implied is None:
        raise ModelError(f"model {sha256[:12]} is of an unknown format")
    widths = TransformConfig(**config, **implied)
    # defaults may change, a model may not
    if config.keys() | implied.keys() != widths.to_json().keys():
        raise ModelError(f"model {sha256[:12]}: its configuration is incomplete")
    for name, value in widths.to_json().items():
        limit = MAX_DEPTH if name.startswith("depth") else MAX_WIDTH
        if type(value) is not int or value not in CHOICES.get(name, range(1, limit + 1)):
            raise ModelError(f"model {sha256[:12]}: {name}={value!r} is out of range")
    check_header(files[WEIGHTS])
    arrays = load_arrays(files[WEIGHTS])
    arrays = {name: array for name, array in arrays.items() if not name.startswith(without)}
    tables = [arrays.pop(f"tables.{name}") for name in ("frequency", "size", "zero")]
    for name, array in arrays.items():
        if array.dtype.name != (expected := stored_as(name, kind)):
            raise ModelError(f"model {sha256[:12]}: {name} is {array.dtype.name}, not {expected}")
    tensors = {name: array.astype(np.float32) for name, array in arrays.items()}
    if not all(np.isfinite(array).all() for array in tensors.values()):
        raise ModelError(f"model {sha256[:12]} holds values that are not finite")
    if not all(_on_grid(name, array) for name, array in tensors.items()):
        raise ModelError(f"model {sha256[:12]} has scale weights off their grid")
    return Contents(sha256, widths, tensors, Tables(*tables))


def read_denoiser(
    files: dict[str, bytes], latents: int, sha256: str
) -> tuple[DenoiserConfig, dict[str, NDArray[np.float32]]]:
    """Read the files of a model's denoiser, for a codec of so many latents.

    Returns:
        Its configuration, and its weights by name.

    Raises:
        ModelError: there is none, or its files are damaged.
    """
    if DENOISER_CONFIG not in files:
        raise ModelError(f"model {sha256[:12]} has no denoiser: decode with steps 0")
    with denoiser_reported(sha256):
        if DENOISER_WEIGHTS not in files:
            raise ValueError("its weights are missing")
        return _denoiser_config(files[DENOISER_CONFIG], latents), _denoiser_weights(
            files[DENOISER_WEIGHTS]
        )


@contextmanager
def denoiser_reported(sha256: str) -> Iterator[None]:
    """Raise `ModelError` for whatever a denoiser cannot be made of."""
    try:
        yield
    except (TypeError, KeyError, RuntimeError, SafetensorError) as error:
        told = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise _denoiser_error(sha256, f" cannot be read: {told}") from error
    except ValueError as error:
        raise _denoiser_error(sha256, f": {error}") from error


def _denoiser_error(sha256: str, told: str) -> ModelError:
    # a stranger's configuration and PyTorch's lists of names are of any length
    return ModelError(shorten(f"model {sha256[:12]}: its denoiser{told}", LONGEST_ERROR))


def _denoiser_config(data: bytes, latents: int) -> DenoiserConfig:
    # names with an underscore are diffusers' notes on class and version
    content = json.loads(data)
    if not isinstance(content, dict):
        raise ValueError("its configuration is no object")
    settings = {k: v for k, v in content.items() if not k.startswith("_")}
    missing = DenoiserConfig.__annotations__.keys() - {"grain"} - settings.keys()
    if missing:
        raise ValueError(f"{min(missing)} is missing")
    config = DenoiserConfig(**settings)
    for name, value in settings.items():
        limit = MAX_DENOISER.get(name, MAX_DENOISER_WIDTH)
        if type(value) is not int or not (name != "grain") <= value <= limit:
            raise ValueError(f"{name}={value!r} is out of range")
        if name.startswith("width") and value % (2 * NORM_GROUPS):
            raise ValueError(f"{name}={value} is no multiple of {2 * NORM_GROUPS}")
    if config.latents != latents:
        raise ValueError(f"latents={config.latents}, but the codec has {latents}")
    return config


def _denoiser_weights(data: bytes) -> dict[str, NDArray[np.float32]]:
    check_header(data)
    try:
        tensors = load_arrays(data)
    except KeyError:  # a type that NumPy has not
        tensors = {}
    if {array.dtype.name for array in tensors.values()} - {"float16", "float32"} or not tensors:
        raise ValueError("weights are neither float16 nor float32")
    if not all(np.isfinite(array).all() for array in tensors.values()):
        raise ValueError("weights are not finite")
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def _on_grid(name: str, array: NDArray[np.float32]) -> bool:
    """Whether a tensor that scale indices come from is on its grid, small enough for exact sums."""
    if name == "prior.knots":
        bits, limit = KNOT_BITS, MAX_KNOT << KNOT_BITS
    elif re.fullmatch(r"h_scale\..*\.weight", name):
        bits, limit = WEIGHT_BITS, WEIGHT_LIMIT
    elif re.fullmatch(r"h_scale\..*\.bias", name):
        bits, limit = WEIGHT_BITS + ACTIVATION_BITS, MAX_INTEGER_BIAS
    else:
        return True
    scaled = array.astype(np.float64) * 2**bits
    return bool(((scaled == np.rint(scaled)) & (np.abs(scaled) <= limit)).all())


def _check_tables(contents: Contents) -> None:
    """Raise `ModelError` for frequency tables that are none of a model's."""
    tables, name = contents.tables, f"model {contents.sha256[:12]}"
    if len(tables.sizes) <= SCALE_COUNT + 1 or len(tables.sizes) > SCALE_COUNT + 17:
        raise ModelError(f"{name} has the wrong number of tables")
    sizes, zero = tables.sizes[:-1], tables.zero[:-1]
    if (sizes[:SCALE_COUNT] != 2 * zero[:SCALE_COUNT] + 1).any() or (
        (sizes[SCALE_COUNT:] != len(LEVEL_OFFSETS)) | (zero[SCALE_COUNT:] != 0)
    ).any():
        raise ModelError(f"{name} has tables of the wrong sizes")
