"""The original files of archived images: where they are now, told apart by their SHA-256."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from archive_pipeline.detection.detectors import Read
from archive_pipeline.flight.find import find_images
from archive_pipeline.flight.locations import Location, local_file, sha256
from archive_pipeline.flight.pixels import SourcePixels
from archive_pipeline.flight.source_image import SourceError, SourceImage
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.layout import ImageEntry


def by_name(folder: Path) -> dict[str, list[Path]]:
    """Images of a folder by their names, letter case aside.

    Raises:
        FlightError: there are none.
    """
    found: dict[str, list[Path]] = {}
    for file in find_images(folder):
        path = Path(file.path)
        found.setdefault(path.name.casefold(), []).append(path)
    return found


def candidates(found: dict[str, list[Path]], entry: ImageEntry) -> tuple[Path, ...]:
    """Files that may be an image's original, the likeliest first; their SHA-256 decides."""
    paths = found.get(entry.id.rpartition("/")[2].casefold(), [])
    parts = Path(entry.flight, entry.id).parts

    def alike(path: Path) -> int:
        ends = zip(reversed(path.parts), reversed(parts), strict=False)
        return next((i for i, (a, b) in enumerate(ends) if a != b), len(parts))

    return tuple(sorted(paths, key=alike, reverse=True))


def find_original(
    image: ArchivedImage, paths: tuple[Path, ...] | None
) -> tuple[SourceImage | None, str, bool]:
    """The original of an archived image, by its SHA-256.

    Args:
        paths: files that may be it; None for the path that it was archived from.

    Returns:
        A source to read pixels from; or None, what became of it, and whether another file is there.
    """
    source = image.source
    problem = f"the original is not at {source.path} (see --originals)"
    if paths is not None:
        problem = "no file of its name is among the originals"
    other = False
    places: tuple[Location, ...] = (source.path,) if paths is None else paths
    for path in places:
        try:
            found = sha256(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            problem = f"the original {path} cannot be read: {error.strerror or error}"
            continue
        if found == source.sha256:
            return replace(source, path=path), "", False
        problem, other = f"{path} is not the file that was archived (its SHA-256 differs)", True
    return None, problem, other


@contextmanager
def original_pixels(source: SourceImage | None) -> Iterator[Read | None]:
    """What reads windows of an original, uint8 (height, width, 3) pixels; None where there is none.

    Its file is on this machine meanwhile (one at a URL is copied) and is decoded once. Reading
    raises SourceError where the file is gone or damaged.

    Raises:
        SourceError: it cannot be copied.
    """
    if source is None:
        yield None
        return
    with ExitStack() as stack:
        try:
            path = stack.enter_context(local_file(source.path))
        except OSError as error:
            raise SourceError(source.path, error.strerror or str(error)) from error
        pixels = stack.enter_context(SourcePixels(replace(source, path=path)))
        yield lambda window: pixels.read(window)[0]
