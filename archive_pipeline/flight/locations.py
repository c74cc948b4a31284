"""Where source files lie: on this machine, or at fsspec URLs, of which copies are made here."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

Location = Path | str
"""A path of this machine, or an fsspec URL as text."""
MAX_NAME, MAX_SUFFIX = 200, 10  # bytes of a copy's name; file systems take 255


# By fsspec's protocol. Listings that are cached in one process would hide what others write;
# without concurrency s3fs does not ask for an object's size before it reads the object.
_OPTIONS: dict[str, dict[str, Any]] = {
    protocol: {"use_listings_cache": False, "max_concurrency": 1} for protocol in ("s3", "s3a")
}


def remote_options(url: str) -> dict[str, Any]:
    """What fsspec is told for this kind of URL, of flights and of archives."""
    return _OPTIONS.get(url.partition("://")[0], {})


def location(text: str) -> Location:
    """A file's or folder's place from what a user or a record says."""
    if text.startswith("file://"):
        return Path(url2pathname(urlsplit(text).path))
    return text if "://" in text else Path(text)


def absolute(place: Location) -> Location:
    """The same place for processes with another working directory."""
    return place.absolute() if isinstance(place, Path) else place


def name_of(place: Location) -> str:
    """The last part of a place's path; of `.` and the like, what they stand for."""
    return place.resolve().name if isinstance(place, Path) else PurePosixPath(place).name


@dataclass(frozen=True)
class RemoteFile:
    """What a listing says of a file at a URL.

    Attributes:
        url: its URL.
        size: bytes, where the store tells.
        version: its ETag, which changes with its contents, where the store has them.
    """

    url: str
    size: int | None = None
    version: str | None = None


def list_remote(url: str) -> list[tuple[tuple[str, ...], RemoteFile]]:
    """All files below a URL: the parts of their paths below it, and what is known of them.

    Raises:
        OSError: they cannot be listed; its text is one line.
    """
    with _one_line():
        fs, root = _filesystem(url)
        depth = len(PurePosixPath(root).parts)
        listed = []
        for path, info in fs.find(root, detail=True).items():
            size, tag = info.get("size"), info.get("ETag")
            listed.append(
                (
                    PurePosixPath(path).parts[depth:],
                    RemoteFile(
                        str(fs.unstrip_protocol(path)),
                        None if size is None else int(size),
                        None if tag is None else str(tag),
                    ),
                )
            )
        return listed


def open_file(path: Path) -> BufferedReader:
    """Open a regular file to read its bytes; pipes, sockets and devices are not opened at all.

    Raises:
        OSError: it cannot be read, or is no regular file; `strerror` says which.
    """
    return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    _require_regular(os.stat(path), path)
    # Should a pipe take the file's place now, opening it does not wait for somebody to write.
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        _require_regular(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(found: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise OSError(errno.EINVAL, f"not a file but {kind}", path)


def size(place: Location) -> int:
    """Bytes of a file.

    Raises:
        OSError: there is no such file; its text is one line.
    """
    if isinstance(place, Path):
        return place.stat().st_size
    with _one_line():
        fs, path = _filesystem(place)
        return int(fs.info(path)["size"])


def sha256(place: Location) -> str:
    """Hex digest of a file's bytes, read piece by piece.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(place, Path):
        with open_file(place) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    with _one_line():
        fs, path = _filesystem(place)
        with fs.open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(place: Location, most: int) -> bytes:
    """A file's bytes.

    Raises:
        OSError: it cannot be read, or has more than `most`.
    """
    if isinstance(place, Path):
        with open_file(place) as file:
            data = file.read(most + 1)
    else:
        with _one_line():
            fs, path = _filesystem(place)
            with fs.open(path, "rb") as file:
                data = file.read(most + 1)
    if len(data) > most:
        raise OSError(f"larger than the {most} bytes that are archived of such a file")
    return data


@contextmanager
def local_file(place: Location, beside: Mapping[str, Location] | None = None) -> Iterator[Path]:
    """A file on this machine: the file itself, or a copy of a URL's while the body runs.

    The copy keeps its name, which GDAL looks for sidecars by, unless that is overlong.

    Args:
        place: the file.
        beside: files that are copied with it, by what their names have behind its stem.

    Raises:
        OSError: one cannot be copied; its text is one line.
    """
    if isinstance(place, Path):
        yield place
        return
    name = PurePosixPath(place)
    with tempfile.TemporaryDirectory(prefix="archive-source-") as folder:
        stem, suffix = name.stem, name.suffix
        if len(os.fsencode(name.name)) > MAX_NAME or stem.startswith("."):
            stem, suffix = "source", suffix[:MAX_SUFFIX]
        copy = Path(folder, stem + suffix)
        copies = {Path(folder, stem + ending): other for ending, other in (beside or {}).items()}
        for target, source in {**copies, copy: place}.items():
            with _one_line():
                fs, path = _filesystem(str(source))
                fs.get_file(path, str(target))
        yield copy


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    fs, path = fsspec.url_to_fs(url, **remote_options(url))
    return fs, path


@contextmanager
def _one_line() -> Iterator[None]:
    """Turn what file systems raise, which depends on their kind, into an OSError of one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError("no such file") from error
    except Exception as error:
        line = " ".join(str(error).split()) or type(error).__name__
        raise OSError(line) from error
