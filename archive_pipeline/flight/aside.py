"""Files that are deleted only if they hold the bytes that they should.

A file is first moved into a hidden folder beside it, where nobody looks for it by its name, then
read, and only then deleted. Whatever takes its place meanwhile is another file, and stays. A run
that is killed leaves the folder, and `put_back` undoes that. On a full disk, which has no room for
a folder, the file itself is hidden beside where it was.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PREFIX = ".archive-retire-"
FULL = (errno.ENOSPC, errno.EDQUOT)


class Kept(Exception):
    """A file that was not deleted; one line that says why."""


def delete_if(path: Path, sha256: str) -> None:
    """Delete a file whose bytes have this SHA-256.

    Raises:
        Kept: it has others, it is a link or no file, or it cannot be moved, read or deleted. Then
            it is where it was, or, if another file is there by now, where the error says.
    """
    folder = None
    try:
        try:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=path.parent))
            aside = folder / path.name
        except OSError as error:
            if error.errno not in FULL:
                raise
            aside = path.with_name(f"{PREFIX}{secrets.token_hex(8)}-{path.name}")
        os.rename(path, aside)
        _delete_aside(aside, path, sha256)
    except OSError as error:
        raise Kept(error.strerror or str(error)) from error
    finally:
        if folder is not None:
            with suppress(OSError):  # what could not go back is in it
                os.rmdir(folder)


def _delete_aside(aside: Path, path: Path, sha256: str) -> None:
    """Delete a file that was moved aside, or move it back; see `delete_if`."""
    try:
        if _digest(aside) == sha256:
            os.unlink(aside)
            return
        reason = "it was changed since it was archived"
    except OSError as error:
        reason = error.strerror or str(error)
    except BaseException:  # Ctrl-C, say
        _return(aside, path)
        raise
    raise Kept(f"{reason}{_return(aside, path)}")


def _digest(path: Path) -> str:
    """SHA-256 of a file that is no link.

    Raises:
        OSError: it cannot be read, or is none.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(0, "it is a link, or no file")
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _return(aside: Path, path: Path) -> str:
    """Move a file back to where it was; says where it is if that cannot be."""
    try:
        try:
            os.link(aside, path, follow_symlinks=False)
            os.unlink(aside)
        except FileExistsError:
            raise
        except OSError:  # no links, as on FAT: then an empty file keeps the place
            os.lstat(aside)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.replace(aside, path)
    except FileExistsError:
        return f"; another file has its name by now, and it is {aside}"
    except OSError as error:
        return f"; it is {aside}: {error.strerror or error}"
    return ""


def left_aside(folder: Path) -> Iterator[Path]:
    """Files below a folder that killed runs left hidden."""
    for above, folders, files in os.walk(folder):
        for name in sorted(files):
            if name.startswith(PREFIX) and name.removeprefix(PREFIX).partition("-")[2]:
                yield Path(above, name)
        for name in sorted(folders):
            if name.startswith(PREFIX) and not os.path.islink(os.path.join(above, name)):
                with suppress(OSError):
                    yield from sorted(Path(above, name).iterdir())
        folders[:] = [name for name in folders if not name.startswith(PREFIX)]


def origin(aside: Path) -> Path:
    """Where a file was that a killed run left hidden."""
    if aside.parent.name.startswith(PREFIX):
        return aside.parent.parent / aside.name
    return aside.with_name(aside.name.removeprefix(PREFIX).partition("-")[2])


def put_back(aside: Path) -> str | None:
    """Move what a killed run left aside to where it was; why it could not be, if it could not."""
    told = _return(aside, origin(aside))
    if aside.parent.name.startswith(PREFIX):
        with suppress(OSError):
            os.rmdir(aside.parent)
    return f"{aside} stays{told}" if told else None
