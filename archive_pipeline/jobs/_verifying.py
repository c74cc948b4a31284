"""What verifications share: scratch space, errors in one line, how much memory they took."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for temporary files, of Dask's local workers, too, which leave theirs in /tmp."""
    import dask

    with (
        TemporaryDirectory(prefix="archive-verify-") as folder,
        dask.config.set({"temporary-directory": folder}),
    ):
        yield Path(folder)


def one_line(name: str, error: BaseException, expected: tuple[type[BaseException], ...]) -> str:
    """An error in one line that names the image.

    Args:
        expected: errors that say all there is to say; others need their type's name.
    """
    text = str(error) if isinstance(error, expected) else f"{type(error).__name__}: {error}"
    return " ".join((text if name in text else f"{name}: {text}").split())


def peak_memory() -> int | None:
    """Most bytes of memory that this process has held so far; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
