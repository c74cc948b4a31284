"""Files that appear whole, and never in place of another that is not meant to be replaced."""

from __future__ import annotations

import filecmp
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError

from archive_pipeline.errors import root_cause
from archive_pipeline.gdal import local_env
from archive_pipeline.locks import is_locked, locked
from archive_pipeline.outputs.paths import DiskError, OutputError

Stamps = Mapping[Path, tuple[int, int]]
"""Files by what tells whether they changed: bytes and time of modification in nanoseconds."""

NOTHING: Stamps = {}

PREFIX = ".restore-"
LOCK = "archive-restore.lock"  # no folder of somebody else's has one
ROOM = 4 << 20  # bytes that a disk which is not full has room for


@contextmanager
def workdir(path: Path) -> Iterator[Path]:
    """Make a hidden folder beside ``path``, removed afterwards; failures become `DiskError`.

    A file in it is locked meanwhile, by which `sweep` tells it from one whose process has died.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=PREFIX, dir=path.parent) as folder,
            _in_use(Path(folder)),
            local_env(GDAL_TIFF_INTERNAL_MASK=True),
        ):
            try:
                yield Path(folder)
            except (RasterioError, CPLE_BaseError):
                _raise_if_full(Path(folder))
                raise
    except (OSError, RasterioError, CPLE_BaseError) as error:
        cause = root_cause(error)
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        raise DiskError(f"{path}: {' '.join(reason.split())}") from error


def _raise_if_full(folder: Path) -> None:
    """Raise the `OSError` of a disk without room; GDAL's errors name a scanline instead."""
    with open(folder / "room", "wb", buffering=0) as file:
        data = memoryview(bytes(ROOM))
        while data:
            data = data[file.write(data) :]


@contextmanager
def _in_use(folder: Path) -> Iterator[None]:
    new = folder / f"{LOCK}.new"
    new.touch()
    with locked(new, 0) as held:
        if held:
            new.rename(folder / LOCK)  # so that no lock file was ever there unlocked
        yield


def sweep(folder: Path) -> None:
    """Remove the hidden folders in one that processes left behind which have died.

    Where file systems know no locks nobody can tell, and all stay.
    """
    with suppress(OSError):
        for left in folder.glob(f"{PREFIX}*"):
            if (left / LOCK).is_file() and not is_locked(left / LOCK, 0):
                shutil.rmtree(left, ignore_errors=True)


def existing(path: Path) -> dict[Path, tuple[int, int]]:
    """The file at ``path`` and its sidecars, as far as there are any, links not followed.

    Raises:
        OutputError: something is there that is no file, such as a folder.
        OSError: it cannot be told what is there.
    """
    world = path.suffix.lower() in (".jpg", ".jpeg")
    found = {}
    for place in (path, *_sidecars(path, world)):
        stamp = _stamp(place)
        if stamp is None:
            continue
        # A link that leads nowhere can be replaced, too.
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(place.stat().st_mode):
                raise OutputError(f"{place} is there and is no file")
        found[place] = stamp
    return found


def publish(final: Path, path: Path, replace: Stamps = NOTHING) -> None:
    """Move a finished file and its sidecars into place, the file itself last.

    A sidecar of an earlier file that the new one does not have goes: it would lie about it.

    Args:
        final: the finished file, in a folder of its own on the same file system.
        path: where it shall be.
        replace: what `existing` found there and may be replaced, as long as it is as it was.

    Raises:
        OutputError: something else is there, unless it holds the same bytes already; nothing has
            changed then.
        OSError: a file cannot be moved.
    """
    world = final.suffix == ".jpg"
    pairs = [
        *zip(_sidecars(final, world), _sidecars(path, world), strict=True),
        (final, path),
    ]
    for new, old in pairs:
        if _stamp(old) is not None and not (_may_go(old, replace) or _same(new, old)):
            raise _taken(old)
    made: list[Path] = []
    try:
        for new, old in pairs:
            if _place(new, old, replace):
                made.append(old)
    except BaseException:
        for old in made:
            old.unlink(missing_ok=True)
        raise


def publish_document(data: bytes, path: Path) -> None:
    """Write a file of these bytes whole, unless one with the same bytes is there.

    Raises:
        OutputError: another is there, which stays, or it cannot be written.
    """
    with workdir(path) as work:
        final = work / "document"
        final.write_bytes(data)
        try:
            _put_new(final, path)
        except FileExistsError:
            if not _same(final, path):
                raise OutputError(f"{path} is already there and differs; it stays") from None


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies below it, links and letter case being what they are there.

    Raises:
        OSError: the folder cannot be looked at.
    """
    there = folder.stat()
    real = Path(os.path.realpath(path))
    for part in (real, *real.parents):
        with suppress(OSError):
            if os.path.samestat(part.stat(), there):
                return True
    return False


def _sidecars(path: Path, world: bool) -> list[Path]:
    """GDAL's file of metadata, and a JPEG's world file."""
    return [Path(f"{path}.aux.xml"), *([world_file(path)] if world else [])]


def world_file(path: Path) -> Path:
    """A JPEG's world file: `a.JGW` beside `a.JPG`, which may have an `a.jpg` beside it, too."""
    extension = path.suffix[1:]
    if len(extension) != 3:
        return Path(f"{path}w")
    letter = "W" if extension.isupper() else "w"
    return path.with_suffix(f".{extension[0]}{extension[2]}{letter}")


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def _may_go(old: Path, replace: Stamps) -> bool:
    stamp = _stamp(old)
    return stamp is not None and stamp == replace.get(old)


def _same(new: Path, old: Path) -> bool:
    """Whether the same bytes are there: this very run's, by a worker that then died, say."""
    return new.exists() and old.is_file() and filecmp.cmp(new, old, shallow=False)


def _place(new: Path, old: Path, replace: Stamps) -> bool:
    """Put a file, or its absence, at a place; whether a file is there where none was."""
    if not new.exists():
        if _may_go(old, replace):
            old.unlink()
        return False
    try:
        _put_new(new, old)
    except FileExistsError:
        if _may_go(old, replace):
            os.replace(new, old)
        elif not _same(new, old):
            raise _taken(old) from None
        return False
    return True


def _put_new(new: Path, old: Path) -> None:
    """Move a file to where none is, in one step even if others try the same.

    Raises:
        FileExistsError: something is there.
    """
    try:
        os.link(new, old)
    except FileExistsError:
        raise
    except OSError:  # a file system without links, such as FAT: then an empty file keeps the place
        os.close(os.open(old, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(new, old)
        except OSError:
            old.unlink(missing_ok=True)
            raise


def _taken(path: Path) -> OutputError:
    return OutputError(f"{path} is already there and was not replaced")
