"""Locks between processes, on single bytes of a file.

They need no files of their own, reach other hosts where a network file system knows locks, and
end with their process, however that ends. Where there are none (other systems than Linux, files
that may not be written, some file systems), nothing is locked.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, process


@contextmanager
def locked(path: Path, byte: int, shared: bool = False) -> Iterator[bool]:
    """Hold one byte of a file, waiting for others who do; `shared` holders let each other.

    Yields whether it is held: it is not where there are no locks.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY if shared else os.O_RDWR)
    except OSError:
        yield False
        return
    try:
        yield _lock(descriptor, byte, shared)
    finally:
        os.close(descriptor)


def is_locked(path: Path, byte: int) -> bool:
    """Whether anybody holds one byte of a file, shared or not."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _is_held(descriptor, byte)
    finally:
        os.close(descriptor)


if sys.platform == "linux":
    import fcntl

    # locks of the open file, not of the process: its threads exclude each other, too

    def _lock(descriptor: int, byte: int, shared: bool) -> bool:
        kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
        return _control(descriptor, fcntl.F_OFD_SETLKW, kind, byte) is not None

    def _is_held(descriptor: int, byte: int) -> bool:
        found = _control(descriptor, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte)
        return found not in (None, fcntl.F_UNLCK)

    def _control(descriptor: int, command: int, kind: int, byte: int) -> int | None:
        """The kind of lock the system answers with, None where it knows no such locks."""
        request = struct.pack(FLOCK, kind, os.SEEK_SET, byte, 1, 0)
        try:
            found: int = struct.unpack(FLOCK, fcntl.fcntl(descriptor, command, request))[0]
        except OSError:
            return None
        return found

else:

    def _lock(descriptor: int, byte: int, shared: bool) -> bool:
        return False

    def _is_held(descriptor: int, byte: int) -> bool:
        return False
