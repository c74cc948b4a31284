"""Where models are found: folders shipped with the package, given by a user, or in an archive."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

from archive_pipeline.pcdc.bitstream import UnknownModel
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.model import CONFIG, Model, ModelError, digest, read_folder

DEFAULT_MODEL = "pcdc-drone-small"
SEARCH_PATH = "ARCHIVE_MODEL_PATH"

_lock = threading.RLock()
_files: dict[str, dict[str, bytes]] = {}
_codecs: dict[tuple[str, str], Codec] = {}
_device = "cpu"
_decoder = (0, 0)  # denoising steps, seed


def use_device(device: str) -> None:
    """Run codecs on this torch device from now on: "cpu", "cuda", or "auto" for what is there.

    Pixels are then those of the deterministic decoder until `use_steps` says otherwise.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    import torch

    global _device, _decoder
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available")
    _device, _decoder = device, (0, 0)


def use_steps(steps: int, seed: int) -> None:
    """Decode with so many denoising steps and this seed from now on; 0 is deterministic."""
    global _decoder
    _decoder = (steps, seed)


def decoder() -> tuple[int, int]:
    """Denoising steps and seed that pixels are decoded with."""
    return _decoder


def shipped() -> Path:
    """The folder of models shipped with the package, or of the checkout it runs from."""
    here = Path(__file__).resolve().parent
    installed = here / "_models"
    return installed if installed.is_dir() else here.parent / "models"


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


def load_named(name: str) -> Model:
    """Load a model by shipped name or folder path.

    Raises:
        ModelError: there is none of that name, or it is damaged.
    """
    for folder in (Path(name), shipped() / name):
        if (folder / CONFIG).is_file():
            model = Model.from_folder(folder)
            register(model.files)
            return model
    known = ", ".join(f.name for f in _folders()) or "none"
    raise ModelError(f"{name}: no such model (shipped: {known})")


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
                    f"archive_pipeline.store, or set {SEARCH_PATH} to its models folder"
                )
            _codecs[key] = Codec(Model(_files[sha256], _device))
        return _codecs[key]


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
