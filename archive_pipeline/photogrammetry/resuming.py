"""What an interrupted verification had found already, kept on this machine for the next one.

Files `$XDG_CACHE_HOME/archive-pipeline/photogrammetry/<digest of all that it depends on>`: a digest
of what follows, then NumPy's npz. One that is damaged, or answers another question, counts as none.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from archive_pipeline._version import __version__

Arrays = dict[str, NDArray[Any]]

MOST_BYTES = 4 << 30  # of all: features of some 1800 frames
ROOM = 2 << 30  # bytes that stay free on the disk
OLDEST = 14 * 86400.0  # seconds
MOST_OF_ONE = 1 << 30
DIGEST = 32  # bytes
# no link is followed, and no pipe waited for
OPENED = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
QUESTION = "question"  # the array that holds what is answered


class Results:
    """Results by what they depend on. Nothing that goes wrong with them is an error.

    Args:
        nowhere: whether to keep none.

    Attributes:
        names: of those that were used or kept.
    """

    def __init__(self, *, nowhere: bool = False) -> None:
        self.names: set[str] = set()
        self._folder = None if nowhere else _own_folder()

    def get(self, question: Mapping[str, Any]) -> Arrays | None:
        """What was found, if it is there and whole."""
        if self._folder is None:
            return None
        text = _text(question)
        path = self._folder / _name(text)
        try:
            with open(os.open(path, OPENED), "rb") as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_OF_ONE:
                    raise ValueError("it is none of ours")
                data = file.read()
            if hashlib.sha256(data[DIGEST:]).digest() != data[:DIGEST]:
                raise ValueError("it is damaged")
            with np.load(io.BytesIO(data[DIGEST:]), allow_pickle=False) as arrays:
                result = {name: arrays[name] for name in arrays.files}
            if result.pop(QUESTION).tobytes() != text:
                raise ValueError("it is the answer to something else")
        except FileNotFoundError:
            return None
        except Exception:  # whatever zip and npz make of it
            with suppress(OSError):
                os.unlink(path)
            return None
        self.names.add(path.name)
        return result

    def put(self, question: Mapping[str, Any], result: Arrays) -> None:
        """Keep a result, if there is room for it."""
        if self._folder is None:
            return
        text = _text(question)
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **{**result, QUESTION: np.frombuffer(text, np.uint8)})
        data = buffer.getvalue()
        name = _name(text)
        with suppress(OSError):
            taken = sum(size for _, size, _ in _listed(self._folder))
            free = shutil.disk_usage(self._folder).free
            if taken + len(data) > MOST_BYTES or free < ROOM + len(data):
                return
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", delete=False) as file:
                file.write(hashlib.sha256(data).digest() + data)
            os.replace(file.name, self._folder / name)
            self.names.add(name)

    def tidy(self) -> None:
        """Remove what is old: nobody went on with it."""
        if self._folder is None:
            return
        with suppress(OSError):
            for path, _, modified in _listed(self._folder):
                if time.time() - modified > OLDEST:
                    path.unlink(missing_ok=True)

    def forget(self, names: Iterable[str] = ()) -> None:
        """Remove those that were used or kept, and others of these names: they have served."""
        if self._folder is None:
            return
        for name in {*self.names, *names}:
            with suppress(OSError):
                (self._folder / Path(name).name).unlink(missing_ok=True)
        self.names.clear()


def versions() -> dict[str, str]:
    """What any result depends on: releases, and the machine, whose arithmetic may differ."""
    found = {"archive-pipeline": __version__, "machine": platform.node()}
    for package in ("pycolmap", "opencv-python-headless", "numpy"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def digest(*parts: Any) -> str:
    """Tells arrays, and things of JSON types, from all others."""
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            part = np.ascontiguousarray(part)
            whole.update(f"{part.dtype} {part.shape} ".encode())
            whole.update(part.tobytes())
        else:
            whole.update(_text(part) + b"\n")
    return whole.hexdigest()


def _text(question: Any) -> bytes:
    return json.dumps(question, sort_keys=True, default=str).encode("utf-8", "surrogatepass")


def _name(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _listed(folder: Path) -> list[tuple[Path, int, float]]:
    """Files, their bytes and times."""
    listed = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                listed.append((Path(entry.path), found.st_size, found.st_mtime))
    return listed


def _own_folder() -> Path | None:
    """The folder of this user's results; None where there is none that only the user writes to."""
    try:
        given = os.environ.get("XDG_CACHE_HOME", "")
        above = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
        folder = above / "archive-pipeline" / "photogrammetry"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.lstat(folder)
    except (OSError, RuntimeError):
        return None
    own = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
    closed = os.name == "nt" or not found.st_mode & 0o022
    return folder if stat.S_ISDIR(found.st_mode) and own and closed else None
