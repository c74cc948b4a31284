"""What lies beside an image. A flight's folder, of thousands of files, is listed once."""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# A listing is kept where the folder's times are older: some file systems count in steps of 2 s.
SETTLED = 3.0
KEPT = 8  # listings


@dataclass(frozen=True)
class Beside:
    """Names in a folder.

    Attributes:
        names: in small letters and as they are, sorted, without those of images.
        odd: of links, pipes, sockets and devices.
    """

    names: tuple[tuple[str, str], ...]
    odd: tuple[str, ...]

    def starting(self, start: str) -> Iterator[tuple[str, str]]:
        """The names that start with one in small letters."""
        for at in range(bisect_left(self.names, (start, "")), len(self.names)):
            if not self.names[at][0].startswith(start):
                return
            yield self.names[at]


def beside(folder: Path, images: Collection[str]) -> Beside:
    """What is in a folder, listed again only where that has changed.

    Args:
        images: suffixes of images, in small letters, whose names are left out.

    Raises:
        OSError: it cannot be listed.
    """
    found = os.stat(folder)
    version = found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns
    settled = max(found.st_mtime, found.st_ctime) + SETTLED < time.time()
    listed = _listed if settled else _listed.__wrapped__
    return listed(str(folder), frozenset(images), version)


@lru_cache(maxsize=KEPT)
def _listed(folder: str, images: frozenset[str], version: tuple[int, ...]) -> Beside:
    names, odd = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)):
                odd.append(entry.name)
            folded = entry.name.casefold()
            if os.path.splitext(folded)[1] not in images:
                names.append((folded, entry.name))
    return Beside(tuple(sorted(names)), tuple(odd))
