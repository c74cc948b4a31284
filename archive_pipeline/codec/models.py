"""Where models are found: folders shipped with the package, given by a user, or in an archive."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.pcdc.adaptation import encode_adapted
from archive_pipeline.pcdc.allocation import BudgetTooSmall
from archive_pipeline.pcdc.bitstream import UnknownModel
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.encoding import encode_tiles, least_error
from archive_pipeline.pcdc.model import CONFIG, Model, ModelError, digest, read_folder
from archive_pipeline.pcdc.policy import (
    MAX_FILE_BYTES,
    POLICY,
    Policy,
    PolicyError,
    load_policy,
    policy_digest,
)

DEFAULT_MODEL = "pcdc-drone-small"
SEARCH_PATH = "ARCHIVE_MODEL_PATH"

_lock = threading.RLock()
_files: dict[str, dict[str, bytes]] = {}
_codecs: dict[tuple[str, str], Codec] = {}
_device = "cpu"
_decoder = (0, 0)  # denoising steps, seed
_policies: dict[str, Policy] = {}
_allocation = ("uniform", "", 0)  # rule, policy's SHA-256, updates an image
# levels by which a write's blocks are above the others, from its tiles
Raise = Callable[[list[NDArray[np.uint8]]], list[NDArray[np.uint8]]]
_raise: Raise | None = None


def use_device(device: str, steps: int = 0, seed: int = 0) -> None:
    """Run codecs like this from now on.

    Args:
        device: torch device: "cpu", "cuda", or "auto" for what is there.
        steps: denoising steps of the decoder; 0 is deterministic.
        seed: of the denoiser's noise.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    import torch

    global _device, _decoder
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available")
    _device, _decoder = device, (steps, seed)


@contextmanager
def allocation(rule: str, policy: str = "", adapt: int = 0) -> Iterator[None]:
    """Spread the bits of what this process encodes meanwhile by one of `ALLOCATIONS`.

    "objects" is "uniform" with blocks that `raising` names.

    Outside, arrays that are written through zarr alone are allocated uniformly.

    Args:
        policy: SHA-256 of a registered policy, where the rule is "policy".
        adapt: updates that the policy is given on every image.
    """
    global _allocation
    before, _allocation = _allocation, (rule, policy, adapt)
    try:
        yield
    finally:
        _allocation = before


@contextmanager
def raising(blocks: Raise) -> Iterator[None]:
    """Code some blocks of what is encoded meanwhile finer than the others, which are alike."""
    global _raise
    before, _raise = _raise, blocks
    try:
        yield
    finally:
        _raise = before


def decoder() -> tuple[int, int]:
    """Denoising steps and seed that pixels are decoded with."""
    return _decoder


def shipped() -> Path:
    """The folder of models shipped with the package, or of the checkout it runs from."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_models"
    return installed if installed.is_dir() else package.parent / "models"


def _folders() -> list[Path]:
    """Model folders in search order: $ARCHIVE_MODEL_PATH entries and their children, shipped."""
    roots = [Path(p) for p in os.environ.get(SEARCH_PATH, "").split(os.pathsep) if p]
    found = []
    for root in [*roots, shipped()]:
        children = sorted(root.iterdir()) if root.is_dir() else []
        found += [f for f in [root, *children] if (f / CONFIG).is_file()]
    return found


@cache
def _folder_digest(folder: Path) -> str:
    return digest(read_folder(folder))


def register(files: dict[str, bytes]) -> str:
    """Make a model known by its files' contents; returns its SHA-256."""
    sha256 = digest(files)
    with _lock:
        _files.setdefault(sha256, files)
    return sha256


def find_folder(name: str) -> Path:
    """The folder of a model, by shipped name or path.

    Raises:
        ModelError: there is none.
    """
    for folder in (Path(name), shipped() / name):
        if (folder / CONFIG).is_file():
            return folder
    known = ", ".join(f.name for f in _folders()) or "none"
    raise ModelError(f"{name}: no such model (shipped: {known})")


def load_named(name: str) -> Model:
    """Load a model by shipped name or folder path.

    Raises:
        ModelError: there is none of that name, or it is damaged.
    """
    model = Model.from_folder(find_folder(name))
    register(model.files)
    return model


def read_policy(name: str, latents: int) -> bytes | None:
    """Read the allocation policy beside a model, None where there is none.

    Raises:
        ModelError: it is damaged, or for another number of latents.
    """
    path = find_folder(name) / POLICY
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ModelError(f"{path}: larger than a policy may be")
        data = path.read_bytes()
        load_policy(data, latents)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except PolicyError as error:
        raise ModelError(f"{path}: {error}") from error
    return data


def register_policy(data: bytes, latents: int) -> str:
    """Make a policy known by its file's contents; returns its SHA-256.

    Raises:
        PolicyError: it is damaged, or for another number of latents.
    """
    sha256 = policy_digest(data)
    with _lock:
        if sha256 not in _policies:
            _policies[sha256] = load_policy(data, latents)
    return sha256


def is_known_policy(sha256: str) -> bool:
    """Whether a policy was registered in this process."""
    with _lock:
        return sha256 in _policies


def codec_for(sha256: str) -> Codec:
    """Return the process-wide codec of a model.

    Raises:
        UnknownModel: the model is neither registered nor in a search folder.
        ModelError: its files are damaged.
    """
    with _lock:
        key = (sha256, _device)
        if key not in _codecs:
            if not is_known(sha256):
                raise UnknownModel(
                    f"model {sha256[:12]} is not at hand: open the archive with "
                    f"archive_pipeline.store.archive, or set {SEARCH_PATH} to its models folder"
                )
            _codecs[key] = Codec(Model(_files[sha256], _device))
        return _codecs[key]


def encode(sha256: str, tiles: list[NDArray[np.uint8]], budget: int) -> list[bytes]:
    """Encode an image's tiles as `encode_tiles` does, its bits spread as `allocation` and
    `raising` say.

    Raises:
        BudgetTooSmall: even the coarsest coding takes more.
    """
    codec, (rule, policy, adapt) = codec_for(sha256), _allocation
    if rule == "policy":
        if adapt:
            return encode_adapted(codec, tiles, budget, _policies[policy], adapt)
        return encode_tiles(codec, tiles, budget, _policies[policy].block_worth)
    if rule == "greedy":
        return encode_tiles(codec, tiles, budget, least_error)
    raised = None if _raise is None else _raise(tiles)
    while raised is not None and any(blocks.any() for blocks in raised):
        try:
            return encode_tiles(codec, tiles, budget, raised=raised)
        except BudgetTooSmall:  # for finer blocks, not always for the image
            raised = [blocks - (blocks > 0) for blocks in raised]
    return encode_tiles(codec, tiles, budget)


def has_denoiser(sha256: str) -> bool:
    """Whether a model can decode with steps; raises what `codec_for` does."""
    return codec_for(sha256).model.has_denoiser


def is_known(sha256: str) -> bool:
    """Whether a model's files are at hand: registered in this process, or in a search folder."""
    with _lock:
        if sha256 in _files:
            return True
        for folder in _folders():
            with suppress(ModelError):
                # read again: the folder may have changed since it was first looked at
                if _folder_digest(folder) == sha256 and register(read_folder(folder)) == sha256:
                    return True
        return False
