"""What verifications share: originals, scratch space, errors in one line, memory taken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.flight.locations import Location
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.jobs.originals import find_original
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.retired import retired_at

DAY = 10  # characters of a time that tell its day


class OriginalRetired(ArchivePipelineError):
    """An image that cannot be compared, as `archive retire` has deleted its original."""


def original_of(
    archive: Archive, image: ArchivedImage, places: tuple[Location, ...], missing: str | None
) -> tuple[SourceImage | None, str, bool, bool]:
    """An image's original; see `find_original`.

    Returns:
        What `find_original` does, and whether it is not there since `archive retire` deleted it.

    Raises:
        ArchiveError: the store fails.
    """
    original, problem, other = find_original(image, places, missing)
    at = retired_at(archive, image.entry) if original is None else None
    if at is not None:
        problem = f"its original was deleted by archive retire{f' on {at[:DAY]}' if at else ''}"
    return original, problem, other, at is not None


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
