"""The images of a flight directory, by their names."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import splitext
from pathlib import Path

from archive_pipeline.errors import ArchivePipelineError, did_you_mean
from archive_pipeline.flight.documents import MAX_BYTES, Document, is_document
from archive_pipeline.flight.formats import IMAGE_SUFFIXES
from archive_pipeline.flight.locations import Location, list_remote
from archive_pipeline.flight.sidecars import Sidecar, endings

ZARR = "zarr.json"  # of an archive or another Zarr hierarchy, whose files are not the flight's


class FlightError(ArchivePipelineError):
    """A flight directory that cannot be used; the message is one line."""


@dataclass(frozen=True)
class ImageFile:
    """An image of a flight, and the files beside it that belong to it.

    Attributes:
        id: its name, or `below` where names repeat in the flight (letter case aside).
        below: its path below the flight's directory, with forward slashes.
        path: where it is.
        sidecars: what GDAL reads with it.
        size: bytes, of a file at a URL, where the store tells.
        version: changes with the contents of the file at a URL or of its sidecars, where the
            store has versions.
    """

    id: str
    below: str
    path: Location
    sidecars: tuple[Sidecar, ...] = ()
    size: int | None = None
    version: str | None = None

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.below.rpartition("/")[2]


@dataclass(frozen=True)
class _Listed:
    """A file of the directory, whatever it is."""

    parts: tuple[str, ...]
    path: Location
    size: int | None = None
    version: str | None = None
    is_folder: bool = False  # a link to one


@dataclass(frozen=True)
class Flight:
    """What a flight's directory holds.

    Attributes:
        images: sorted by path.
        documents: files that are archived as they are, sorted by path.
        others: paths below the directory of all other files that are no sidecars of an image, and
            of links to folders, which end in a slash; sorted. Hidden files are not among them.
    """

    images: list[ImageFile]
    documents: list[Document]
    others: list[str]


def find_images(directory: Location) -> list[ImageFile]:
    """The images of `find_flight`."""
    return find_flight(directory).images


def find_flight(directory: Location) -> Flight:
    """List the images of a flight directory and of the folders in it, and what else is there.

    Hidden files and folders, and folders that are Zarr groups or arrays (archives) are passed over.
    Links to files are followed, links to folders are not: they may lead in circles or out of the
    flight.

    Args:
        directory: the flight, a folder or an fsspec URL.

    Raises:
        FlightError: the directory does not exist, cannot be listed, or holds no image.
    """
    found: list[tuple[_Listed, dict[str, _Listed]]] = []
    documents: list[Document] = []
    others: list[str] = []
    for files in _folders(directory):
        images = [f for f in files if _is_image(f)]
        names = {file.parts[-1].casefold(): file for file in files} if images else {}
        found += ((image, names) for image in images)
        for file in _others(files, images):
            document = _document(file)
            if document is None:
                others.append("/".join(file.parts) + "/" * file.is_folder)
            else:
                documents.append(document)
    if not found:
        raise FlightError(f"{directory}: no images there, nor in the folders below it")
    found.sort(key=lambda item: item[0].parts)
    repeats = Counter(image.parts[-1].casefold() for image, _ in found)
    images_found = [_image_file(*f, repeats[f[0].parts[-1].casefold()] > 1) for f in found]
    return Flight(images_found, sorted(documents, key=lambda d: d.below), sorted(others))


def _is_image(file: _Listed) -> bool:
    return not file.is_folder and splitext(file.parts[-1])[1].lower() in IMAGE_SUFFIXES


def _document(file: _Listed) -> Document | None:
    """The document that a file is; None of others, and of what is too large or no file."""
    if file.is_folder or not is_document(file.parts[-1]):
        return None
    size = file.size
    if isinstance(file.path, Path):
        try:
            found = file.path.stat()
        except OSError:  # reading it will tell why
            found = None
        if found is not None and not stat.S_ISREG(found.st_mode):
            return None
        size = None if found is None else found.st_size
    if size is not None and size > MAX_BYTES:
        return None
    return Document("/".join(file.parts), file.path, size)


def _others(files: list[_Listed], images: list[_Listed]) -> list[_Listed]:
    """A folder's files that are neither images nor belong to one."""
    taken = {image.parts for image in images}
    beside: set[str] = set()
    for image in images:
        name = image.parts[-1].casefold()
        stem = splitext(name)[0]
        beside |= {stem + ending for ending in endings(name)}
        # overviews are no part of what is archived, and are made again
        beside |= {f"{name}.ovr", f"{name}.msk.ovr"}
    return [f for f in files if f.parts not in taken and f.parts[-1].casefold() not in beside]


def _image_file(image: _Listed, siblings: dict[str, _Listed], repeated: bool) -> ImageFile:
    name, below = image.parts[-1], "/".join(image.parts)
    stem = splitext(name)[0].casefold()
    version, sidecars = image.version, []
    for ending in endings(name):
        file = siblings.get(stem + ending)
        if file is None:
            continue
        # endings are ASCII: as long as in the name as it is written
        sidecars.append(Sidecar(file.parts[-1][-len(ending) :], file.path, file.size))
        if version is not None:
            version = file.version and _joined(version, ending, file.version)
    id = below if repeated else name
    return ImageFile(id, below, image.path, tuple(sidecars), image.size, version)


def _joined(version: str, ending: str, other: str) -> str:
    return hashlib.sha256(f"{version} {ending} {other}".encode()).hexdigest()


def _folders(directory: Location) -> Iterator[list[_Listed]]:
    """Yield the files of each folder of a flight that is not hidden and no Zarr hierarchy."""
    if isinstance(directory, str):
        yield from _remote_folders(directory)
        return
    if not directory.exists():
        hint = did_you_mean(directory.name, _folders_beside(directory))
        raise FlightError(f"{directory}: no such directory{hint}")
    if not directory.is_dir():
        raise FlightError(f"{directory}: a file; a flight is the folder that its images are in")

    def refuse(error: OSError) -> None:
        raise FlightError(f"{error.filename}: {error.strerror}")

    for folder, subfolders, names in os.walk(directory, onerror=refuse):
        place = Path(folder)
        above = place.relative_to(directory).parts
        if ZARR in names:
            _refuse_zarr(directory, above)
            subfolders.clear()
            continue
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        linked = [name for name in subfolders if (place / name).is_symlink()]
        yield [
            *(_Listed((*above, n), place / n) for n in names if not n.startswith(".")),
            *(_Listed((*above, n), place / n, is_folder=True) for n in linked),
        ]


def _folders_beside(directory: Path) -> list[str]:
    """Names of the folders where a missing one was looked for, as far as they can be seen."""
    try:
        with os.scandir(directory.parent) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return []


def _remote_folders(url: str) -> Iterator[list[_Listed]]:
    try:
        listed = list_remote(url)
    except OSError as error:
        raise FlightError(f"{url}: {error}") from error
    folders: dict[tuple[str, ...], list[_Listed]] = defaultdict(list)
    for parts, file in listed:
        if parts and not any(part.startswith(".") for part in parts):
            folders[parts[:-1]].append(_Listed(parts, file.url, file.size, file.version))
    zarr = {above for above, files in folders.items() if any(f.parts[-1] == ZARR for f in files)}
    if () in zarr:
        _refuse_zarr(url, ())
    for above, files in folders.items():
        if not any(above[:depth] in zarr for depth in range(1, len(above) + 1)):
            yield files


def _refuse_zarr(directory: Location, above: tuple[str, ...]) -> None:
    if not above:
        raise FlightError(f"{directory}: a Zarr hierarchy (an archive?), not a flight's directory")
