"""The original files of archived images: where they are now, told apart by their SHA-256."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from archive_pipeline.detection.detectors import Read
from archive_pipeline.flight.find import FlightError, ImageFile, find_images
from archive_pipeline.flight.locations import Location, local_file, sha256
from archive_pipeline.flight.pixels import SourcePixels
from archive_pipeline.flight.source_image import SourceError, SourceImage
from archive_pipeline.jobs.ingested import noted_sources
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.layout import ImageEntry

Named = dict[str, list[ImageFile]]
"""Files by their names, letter case aside."""


def by_name(folder: Location) -> Named:
    """Images of a folder or below a URL by their names.

    Raises:
        FlightError: there are none.
    """
    found: Named = {}
    for file in find_images(folder):
        found.setdefault(_parts(file.path)[-1].casefold(), []).append(file)
    return found


def folders_of(archive_url: str, given: Location | None, flight: str) -> list[Location]:
    """Places in which `Originals` looks for those of a flight."""
    return [given] if given is not None else noted_sources(archive_url).get(flight, [])


class Originals:
    """Where originals are looked for: only in places that this user has named.

    Those are the folder or URL that is given; without one, the folders that this user archived from
    on this machine (`ingested`). Where an archive says that its images came from is never followed.

    Args:
        strict: whether it is an error if the folder that is given holds no images.

    Raises:
        FlightError: it does not.
    """

    def __init__(self, archive_url: str, given: Location | None, strict: bool = True) -> None:
        self._given = None
        if given is not None:
            with suppress(*(() if strict else (FlightError,))):
                self._given = by_name(given)
            self._given = self._given or {}
        self._noted = {} if given is not None else noted_sources(archive_url)
        self._found: dict[str, Named] = {}

    def candidates(self, entry: ImageEntry) -> tuple[Location, ...]:
        """Files that may be an image's original, the likeliest first; their SHA-256 decides."""
        places = [file.path for file in self._files(entry)]
        parts = PurePosixPath(entry.flight, entry.id).parts

        def alike(place: Location) -> int:
            ends = zip(reversed(_parts(place)), reversed(parts), strict=False)
            return next((i for i, (a, b) in enumerate(ends) if a != b), len(parts))

        return tuple(sorted(places, key=alike, reverse=True))

    def beside(self, entry: ImageEntry, place: Location) -> dict[str, Location]:
        """Sidecars of one of the candidates, by what their names have behind its stem."""
        own = next((file for file in self._files(entry) if file.path == place), None)
        return {} if own is None else {sidecar.ending: sidecar.path for sidecar in own.sidecars}

    def problem(self, entry: ImageEntry) -> str | None:
        """What to say of an image that has no candidate; None where nobody has named a place."""
        if self._given is not None:
            return "no file of its name is among the originals"
        places = self._noted.get(entry.flight)
        if not places:
            return None
        some = " or ".join(map(str, places[:3])) + (" or ..." if len(places) > 3 else "")
        return f"the original is not in {some} (see --originals)"

    def _files(self, entry: ImageEntry) -> list[ImageFile]:
        named = self._given if self._given is not None else self._of_flight(entry.flight)
        return named.get(entry.id.rpartition("/")[2].casefold(), [])

    def _of_flight(self, flight: str) -> Named:
        if flight not in self._found:
            found = self._found[flight] = Named()
            for place in self._noted.get(flight, ()):
                with suppress(FlightError):  # moved or deleted since
                    for name, files in by_name(place).items():
                        found.setdefault(name, []).extend(files)
        return self._found[flight]


def find_original(
    image: ArchivedImage, places: tuple[Location, ...], problem: str | None = None
) -> tuple[SourceImage | None, str, bool]:
    """The original of an archived image, by its SHA-256.

    Args:
        places: files that may be it.
        problem: what to say where none is there; None: where it was archived from, and to name it.

    Returns:
        A source to read pixels from; or None, what became of it, and whether another file is there.
    """
    source = image.source
    if problem is None:
        problem = (
            f"the original was archived from {source.path}; to look for it there or elsewhere, "
            "name the folder: --originals"
        )
    other = False
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


def _parts(place: Location) -> tuple[str, ...]:
    return place.parts if isinstance(place, Path) else PurePosixPath(place).parts


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
