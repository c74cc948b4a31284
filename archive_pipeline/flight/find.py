"""The images of a flight directory, by their names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.flight.formats import IMAGE_SUFFIXES
from archive_pipeline.flight.locations import Location, list_remote


class FlightError(ArchivePipelineError):
    """A flight directory that cannot be used; the message is one line."""


def find_images(directory: Location) -> list[tuple[str, Location]]:
    """List the images of a flight directory and of the folders in it.

    Hidden files and folders, and every file without an image's extension (sidecars, logs, video),
    are passed over.  Links to files are followed, links to folders are not: they may lead in
    circles or out of the flight.

    Args:
        directory: the flight, a folder or an fsspec URL.

    Returns:
        ``(id, path)`` sorted by path.  The id is the file's name, or its path below ``directory``
        with forward slashes where names repeat (letter case aside).

    Raises:
        FlightError: the directory does not exist, cannot be listed, or holds no image.
    """
    found = [
        (parts, place)
        for parts, place in _list_files(directory)
        if Path(parts[-1]).suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in parts)
    ]
    if not found:
        raise FlightError(f"{directory}: no images")
    found.sort()
    repeats = Counter(parts[-1].casefold() for parts, _ in found)
    return [
        (parts[-1] if repeats[parts[-1].casefold()] == 1 else "/".join(parts), place)
        for parts, place in found
    ]


def _list_files(directory: Location) -> Iterator[tuple[tuple[str, ...], Location]]:
    """Yield the parts of each file's path below a folder or URL, and its place."""
    if isinstance(directory, str):
        try:
            yield from (item for item in list_remote(directory) if item[0])
        except OSError as error:
            raise FlightError(f"{directory}: {error}") from error
        return
    if not directory.exists():
        raise FlightError(f"{directory}: no such directory")
    if not directory.is_dir():
        raise FlightError(f"{directory}: not a directory")

    def refuse(error: OSError) -> None:
        raise FlightError(f"{error.filename}: {error.strerror}")

    for folder, subfolders, names in os.walk(directory, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            yield path.relative_to(directory).parts, path
