"""Where models are found: folders shipped with the package, given by a user, or in an archive."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from ctypes import CDLL
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.codec.settings import Settings
from archive_pipeline.errors import importable, require, require_denoising, require_encoding
from archive_pipeline.pcdc.allocation import BudgetTooSmall
from archive_pipeline.pcdc.bitstream import UnknownModel
from archive_pipeline.pcdc.decoding import TileDecoder
from archive_pipeline.pcdc.model_files import (
    CONFIG,
    DENOISER_CONFIG,
    ModelError,
    digest,
    read_denoiser,
    read_folder,
)
from archive_pipeline.pcdc.precision import Precision
from archive_pipeline.pcdc.reader.decoder import Reader

# what computes with PyTorch is imported where it is needed: reading does without
if TYPE_CHECKING:
    from archive_pipeline.pcdc.codec import Codec
    from archive_pipeline.pcdc.model import Model
    from archive_pipeline.pcdc.policy import Policy

DEFAULT_MODEL = "pcdc-drone-small"
SEARCH_PATH = "ARCHIVE_MODEL_PATH"

MAX_KEPT = 1 << 29  # bytes of models that are kept for their next use

_lock = threading.RLock()
_files: dict[str, dict[str, bytes]] = {}  # the least recently used first
_codecs: dict[tuple[str, str, Precision], Codec] = {}
_readers: dict[tuple[str, Precision], Reader] = {}
_digests: dict[Path, str] = {}  # of the models in folders that were looked at
_policies: dict[str, Policy] = {}


def find_device(device: str) -> str:
    """The torch device that "cpu", "cuda" or "auto" means here.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if _may_have_gpu() else "cpu"
        wanted = False
    else:
        wanted = device.startswith("cuda")
    if not device.startswith("cuda"):
        return device
    if wanted:
        require("torch", "--device cuda")
    import torch

    if torch.cuda.is_available():
        return device
    if wanted:
        raise ValueError("--device cuda: no CUDA device is available")
    return "cpu"


def _may_have_gpu() -> bool:
    """Whether to ask PyTorch for a GPU; without a driver there is none, and it is not loaded."""
    if find_spec("torch") is None:
        return False
    if Path("/dev/kfd").exists():  # AMD's, which PyTorch calls "cuda", too
        return True
    try:
        CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


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


def register(files: dict[str, bytes]) -> str:
    """Make a model known by its files' contents; returns its SHA-256.

    Of many models those that were not used for long are forgotten: an archive may hold any number.
    """
    sha256 = digest(files)
    _keep(sha256, files)
    return sha256


def _keep(sha256: str, files: dict[str, bytes]) -> None:
    with _lock:
        _files[sha256] = _files.pop(sha256, files)
        while len(_files) > 1 and sum(map(_size, _files.values())) > MAX_KEPT:
            oldest = next(iter(_files))
            del _files[oldest]
            for kept in cast(tuple[dict[Any, Any], ...], (_codecs, _readers)):
                for key in [key for key in kept if key[0] == oldest]:
                    del kept[key]


def _size(files: dict[str, bytes]) -> int:
    return sum(map(len, files.values()))


def files_of(sha256: str) -> dict[str, bytes] | None:
    """The files of a model that is at hand (`is_known`), else None."""
    with _lock:
        return _files[sha256] if is_known(sha256) else None


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
        NotInstalled: PyTorch or Numba is not.
    """
    require_encoding()
    from archive_pipeline.pcdc.model import Model

    model = Model.from_folder(find_folder(name))
    if model.has_denoiser:  # archives would carry it, and only a restore would tell
        read_denoiser(model.files, model.networks.config.latents, model.sha256)
    _keep(model.sha256, model.files)
    return model


def read_policy(name: str, latents: int) -> bytes | None:
    """Read the allocation policy beside a model, None where there is none.

    Raises:
        ModelError: it is damaged, or for another number of latents.
    """
    from archive_pipeline.pcdc.policy import MAX_FILE_BYTES, POLICY, PolicyError, load_policy

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
    from archive_pipeline.pcdc.policy import load_policy, policy_digest

    sha256 = policy_digest(data)
    with _lock:
        if sha256 not in _policies:
            _policies[sha256] = load_policy(data, latents)
    return sha256


def is_known_policy(sha256: str) -> bool:
    """Whether a policy was registered in this process."""
    with _lock:
        return sha256 in _policies


def codec_for(sha256: str, device: str = "cpu", precision: Precision = "auto") -> Codec:
    """The codec of a model on a torch device; one for all that use it in this process.

    Args:
        precision: of its large networks.

    Raises:
        UnknownModel: the model is neither registered nor in a search folder.
        ModelError: its files are damaged.
        NotInstalled: PyTorch or Numba is not.
    """
    require_encoding()
    return _torch_codec(sha256, device, precision)


def decoder_for(sha256: str, settings: Settings) -> TileDecoder:
    """What decodes with a model; one for all that use it in this process.

    On CPUs that is `Reader`, whether PyTorch is installed or not: what a machine decodes does not
    depend on what else a process does. Denoising steps without OpenVINO are PyTorch's.

    Raises:
        UnknownModel: the model is neither registered nor in a search folder.
        ModelError: its files are damaged.
        NotInstalled: PyTorch is not, and is needed for these settings.
    """
    steps_by_torch = settings.steps and not importable("openvino")
    if steps_by_torch or settings.device != "cpu":
        if settings.device != "cpu":
            require("torch", f"--device {settings.device}")
        else:
            require_denoising()
        return _torch_codec(sha256, settings.device, settings.precision)
    with _lock:
        _require(sha256)
        key = (sha256, settings.precision)
        if key not in _readers:
            _readers[key] = Reader(_files[sha256], settings.precision, sha256)
        return _readers[key]


def _torch_codec(sha256: str, device: str, precision: Precision) -> Codec:
    from archive_pipeline.pcdc.codec import Codec
    from archive_pipeline.pcdc.model import Model

    with _lock:
        _require(sha256)
        key = (sha256, device, precision)
        if key not in _codecs:
            _codecs[key] = Codec(Model(_files[sha256], device, precision))
        return _codecs[key]


def encode(
    sha256: str, tiles: list[NDArray[np.uint8]], budget: int, settings: Settings
) -> list[bytes]:
    """Encode an image's tiles as `encode_tiles` does, its bits spread as the settings say.

    Raises:
        BudgetTooSmall: even the coarsest coding takes more, and the settings do not allow that.
        NotInstalled: PyTorch is not.
    """
    from archive_pipeline.pcdc.encoding import encode_tiles, least_error

    codec = codec_for(sha256, settings.device, settings.precision)
    strict = settings.overspent is None
    if settings.allocation == "policy":
        policy = _policies[settings.policy]
        if settings.adapt:
            from archive_pipeline.pcdc.training.adaptation import encode_adapted

            updates, task_of = settings.adapt, settings.task_of
            return encode_adapted(codec, tiles, budget, policy, updates, strict, task_of)
        return encode_tiles(codec, tiles, budget, policy.block_worth, strict=strict)
    if settings.allocation == "greedy":
        return encode_tiles(codec, tiles, budget, least_error, strict=strict)
    raised = None if settings.raised is None else settings.raised(tiles)
    while raised is not None and any(blocks.any() for blocks in raised):
        try:
            return encode_tiles(codec, tiles, budget, raised=raised)
        except BudgetTooSmall:  # for finer blocks, not always for the image
            raised = [blocks - (blocks > 0) for blocks in raised]
    return encode_tiles(codec, tiles, budget, strict=strict)


def has_denoiser(sha256: str) -> bool:
    """Whether a model can decode with steps.

    Raises:
        UnknownModel: the model is neither registered nor in a search folder.
    """
    with _lock:
        _require(sha256)
        return DENOISER_CONFIG in _files[sha256]


def _require(sha256: str) -> None:
    if not is_known(sha256):
        raise UnknownModel(
            f"model {sha256[:12]} is not at hand: open the archive with "
            f"archive_pipeline.store.archive, or set {SEARCH_PATH} to its models folder"
        )


def is_known(sha256: str) -> bool:
    """Whether a model's files are at hand: registered in this process, or in a search folder."""
    with _lock:
        if sha256 in _files:
            _files[sha256] = _files.pop(sha256)
            return True
        for folder in _folders():
            with suppress(ModelError):
                if _digests.get(folder, sha256) != sha256:
                    continue
                # read again, even if it was seen before: the folder may have changed since
                files = read_folder(folder)
                _digests[folder] = digest(files)
                if _digests[folder] == sha256:
                    _keep(sha256, files)
                    return True
        return False
