"""Which files of a flight its archive has already, and under which ids the new ones are archived.

A file is known by its bytes and those of its sidecars, whatever its name is by now. Files are read
to be told apart only where sizes agree.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from archive_pipeline.flight import locations as sources
from archive_pipeline.flight.find import ImageFile
from archive_pipeline.flight.locations import Location
from archive_pipeline.flight.restored_tag import is_restored
from archive_pipeline.flight.sidecars import digest
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.layout import ArchiveError, ImageEntry, image_key
from archive_pipeline.store.retired import is_retired

ANY = "any version"
RESTORED = "was written by archive restore and is no original"


@dataclass(frozen=True)
class Place:
    """What becomes of a file.

    Attributes:
        id: of the image that it is or becomes.
        known: the image that it is; it is then passed over, as it is with a reason.
        replaces: SHA-256 of the file whose image it replaces.
        reason: why it is passed over, where the image's id does not say it.
        error: why it cannot be archived.
    """

    id: str
    known: ImageEntry | None = None
    replaces: str | None = None
    reason: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class _Look:
    """A file as it was found, and the images that have its bytes, the likeliest first."""

    file: ImageFile
    matches: tuple[ImageEntry, ...] = ()
    size: int | None = None
    sha256: str | None = None
    error: str | None = None
    restored: bool = False


def keys_of(flight: str, file: ImageFile) -> tuple[str, ...]:
    """Groups of the images that a file may have become when other files were there."""
    ids = (file.id, file.below, file.name, _below_folder(file))
    return tuple(dict.fromkeys(image_key(flight, id) for id in ids))


def _below_folder(file: ImageFile) -> str:
    """A file's path from its flight's folder on, for files right in that whose name is taken."""
    parts = _parts(_place_of(file))
    depth = len(PurePosixPath(file.below).parts)
    return "/".join([*parts[-depth - 1 : -depth], file.below])


def _place_of(file: ImageFile) -> Location:
    """A file's place as records are read: fsspec lists local files as URLs."""
    return sources.location(str(sources.absolute(file.path)))


def is_of(entry: ImageEntry, flight: str, file: ImageFile, sha256: str, sidecars: str) -> bool:
    """Whether an image is made of these bytes, and of these sidecars (`sidecars.digest`)."""
    if entry.record["sha256"] != sha256:
        return False
    recorded = entry.record.get("sidecars")
    if recorded is None:  # of an earlier release: its sidecars are not known
        return not sidecars or entry.key in keys_of(flight, file)
    return bool(recorded == sidecars)


def _same_bytes(flight: str, id: str) -> str:
    """Why a file is passed over that is archived under another id, or twice in its flight."""
    return f"has the same bytes as {flight}/{id}"


def held_by_another(flight: str, id: str, replaceable: bool) -> str:
    """Why a file is not archived under its id."""
    remedy = "use --overwrite to replace it or " if replaceable else "rename the file or use "
    return (
        f"the archive holds another image as {flight}/{id}; {remedy}--flight to archive under "
        "another name"
    )


def held_for_retired(flight: str, id: str) -> str:
    """Why an image is not replaced by another file's."""
    return (
        f"the archive holds another image as {flight}/{id}, whose original was deleted by archive "
        "retire: it is the only copy; rename the file or use --flight to archive under another name"
    )


def find_places(
    archive: Archive,
    flight: str,
    files: list[ImageFile],
    entries: Iterable[ImageEntry],
    replaceable: Collection[str],
    threads: Executor,
) -> list[Place]:
    """Say for each file of a flight what becomes of it, in the order of the files.

    Args:
        entries: images of the flight that are committed.
        replaceable: files, by their paths below the flight, that may replace an image: one with the
            file's bytes, or one that was made of an earlier file at the same place, never another.
        threads: read files.
    """
    known = _Flight(archive, flight, entries, replaceable)
    looks = known.look_at(files, threads)
    known.claim(looks)
    new = [i for i, k in enumerate(looks) if not (k.matches or k.restored or k.error)]
    first_of = _repeated(looks, new, threads)
    places: list[Place] = []
    for index, look in enumerate(looks):
        first = first_of.get(index)
        if first is None:
            places.append(known.place(look))
        else:  # what becomes of that one is said of it
            same = _same_bytes(flight, places[first].id)
            places.append(Place(places[first].id, reason=same))
    return places


class _Flight:
    """A flight's images by what files are compared with."""

    def __init__(
        self,
        archive: Archive,
        flight: str,
        entries: Iterable[ImageEntry],
        replaceable: Collection[str],
    ) -> None:
        self.archive = archive
        self.flight = flight
        self.replaceable = replaceable
        self.by_key = {entry.key: entry for entry in entries}
        self.by_sha256: dict[str, list[ImageEntry]] = defaultdict(list)
        self.sizes: set[tuple[int, str | None]] = set()  # with versions, where they have them
        for entry in self.by_key.values():
            self.by_sha256[entry.record["sha256"]].append(entry)
            size = entry.record["source_bytes"]
            self.sizes |= {(size, entry.record.get("source_version")), (size, ANY)}
        self.claimed: dict[str, ImageFile] = {}

    def look_at(self, files: list[ImageFile], threads: Executor) -> list[_Look]:
        """Find the images of all files."""
        looks = list(threads.map(self.look, files))
        # versions need not differ between files, as they do between contents of one file
        counts = Counter(look.matches[0].key for look in looks if look.matches)
        unsure = {
            index: look.file
            for index, look in enumerate(looks)
            if look.matches and look.sha256 is None and counts[look.matches[0].key] > 1
        }
        sure = threads.map(partial(self.look, trusting=False), unsure.values())
        for index, look in zip(unsure, sure, strict=True):
            looks[index] = look
        return looks

    def look(self, file: ImageFile, trusting: bool = True) -> _Look:
        """Find the images of a file, which is read only if one may be of it.

        Args:
            trusting: whether a version tells that a file is the one that was archived.
        """
        try:
            size = sources.size(file.path) if file.size is None else file.size
        except OSError as error:
            if any(key in self.by_key for key in keys_of(self.flight, file)):
                return _Look(file, error=error.strerror or str(error))
            return _Look(file)  # the task that reads it says what is wrong
        own = [self.by_key[key] for key in keys_of(self.flight, file) if key in self.by_key]
        own = [entry for entry in own if entry.record["source_bytes"] == size]
        version = file.version
        if trusting and version is not None:
            for entry in own:
                if entry.record.get("source_version") == version:
                    return _Look(file, (entry,), size)
        # what has another version under another id is not read to make sure
        kinds = {(size, ANY)} if version is None else {(size, None), (size, version)}
        try:
            if own or kinds & self.sizes:
                return self._compare(file, size, own)
            return _Look(file, size=size, restored=_is_restored(file))
        except OSError as error:
            return _Look(file, error=error.strerror or str(error))

    def _compare(self, file: ImageFile, size: int, own: list[ImageEntry]) -> _Look:
        sha256 = sources.sha256(file.path)
        alike = list(self.by_sha256.get(sha256, ()))
        if alike:
            sidecars = digest(file.sidecars)
            alike = [e for e in alike if is_of(e, self.flight, file, sha256, sidecars)]
        alike.sort(key=lambda entry: (entry not in own, entry.key))
        return _Look(file, tuple(alike), size, sha256, restored=not alike and _is_restored(file))

    def claim(self, looks: list[_Look]) -> None:
        """Note which file each image is of; files under an id of their own come first."""
        for look in looks:
            own = keys_of(self.flight, look.file)
            free = (e for e in look.matches if e.key in own and e.key not in self.claimed)
            if entry := next(free, None):
                self.claimed[entry.key] = look.file
        taken = {id(file) for file in self.claimed.values()}
        for look in looks:
            free = (e for e in look.matches if e.key not in self.claimed)
            if id(look.file) not in taken and (entry := next(free, None)):
                self.claimed[entry.key] = look.file

    def place(self, look: _Look) -> Place:
        """What becomes of a file that no other file of the run is the same as."""
        file = look.file
        if look.error is not None:
            return Place(file.id, error=look.error)
        if not _is_text(str(file.path)):
            return Place(file.id, error="its path is not UTF-8; rename it")
        if look.restored:
            return Place(file.id, reason=RESTORED)
        if look.matches:
            return self._place_known(look)
        for name in dict.fromkeys((file.id, file.below)):
            holder = self.by_key.get(image_key(self.flight, name))
            if holder is None:
                return Place(name)
            if holder.key in self.claimed:
                continue
            # of a file elsewhere, an image is not to be replaced
            overwrite = file.below in self.replaceable
            matters = overwrite or file.id != file.below
            if matters and not _was_at(self.archive, holder, file):
                continue
            same = look.sha256 == holder.record["sha256"]
            if not same and is_retired(self.archive, holder):
                return Place(name, error=held_for_retired(self.flight, name))
            if overwrite:
                return Place(name, replaces=holder.record["sha256"])
            if same:
                changed = ", ".join(PurePosixPath(s.path).name for s in file.sidecars) or "none"
                error = (
                    f"its sidecar files have changed since it was archived (there are: {changed}); "
                    "use --overwrite to archive it with them"
                )
                return Place(name, error=error)
            return Place(name, error=held_by_another(self.flight, name, True))
        apart = image_key(self.flight, _below_folder(file))
        if image_key(self.flight, file.below) in self.claimed and apart not in self.by_key:
            return Place(_below_folder(file))
        return Place(file.id, error=held_by_another(self.flight, file.id, False))

    def _place_known(self, look: _Look) -> Place:
        mine = (e for e in look.matches if self.claimed.get(e.key) is look.file)
        entry = next(mine, None)
        if entry is None:
            entry = look.matches[0]
            return Place(entry.id, reason=_same_bytes(self.flight, entry.id))
        if look.file.below in self.replaceable:
            return Place(entry.id, replaces=entry.record["sha256"])
        own = entry.key in keys_of(self.flight, look.file)
        return Place(entry.id, entry, reason=None if own else _same_bytes(self.flight, entry.id))


def _repeated(looks: list[_Look], new: list[int], threads: Executor) -> dict[int, int]:
    """Files that are the same as an earlier new one of the run: their indices, and its."""
    groups: dict[tuple[int, str | None], list[int]] = defaultdict(list)
    for index in new:
        look = looks[index]
        if look.size:
            # a store's versions of equal files are equal, as a rule: nothing is read for the others
            groups[look.size, look.file.version].append(index)
    candidates = [index for group in groups.values() if len(group) > 1 for index in group]
    identities = threads.map(_identity, [looks[index] for index in candidates])
    first_of: dict[int, int] = {}
    seen: dict[tuple[str, str], int] = {}
    for index, identity in zip(candidates, identities, strict=True):
        if identity is not None and seen.setdefault(identity, index) != index:
            first_of[index] = seen[identity]
    return first_of


def _is_restored(file: ImageFile) -> bool:
    """Whether a file of this machine was written by `restore`; others are not looked into yet."""
    return isinstance(file.path, Path) and is_restored(file.path)


def _identity(look: _Look) -> tuple[str, str] | None:
    """SHA-256 of a file and the digest of its sidecars; None if one cannot be read."""
    try:
        return look.sha256 or sources.sha256(look.file.path), digest(look.file.sidecars)
    except OSError:
        return None


def _is_text(path: str) -> bool:
    """Whether a path can be recorded: Python has bytes that are no UTF-8 as lone surrogates."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _was_at(archive: Archive, entry: ImageEntry, file: ImageFile) -> bool:
    """Whether an image was made of a file at this place of the flight, wherever that was then."""
    try:
        recorded = ArchivedImage(archive, entry).source.path
    except ArchiveError:  # nobody knows; it is damaged, and may be replaced
        return True
    below = PurePosixPath(file.below).parts
    if isinstance(recorded, Path):  # as ingest was told it, perhaps from this very directory
        recorded = recorded.absolute()
    mine, theirs = _parts(_place_of(file)), _parts(recorded)
    root = mine[: -len(below)]
    if theirs[: len(root)] == root:
        return theirs == mine
    if isinstance(recorded, Path) and recorded.exists():
        return False  # another folder's file of the same name
    # the flight's directory has moved, or is named in another way
    common = min(len(below), len(theirs))
    return theirs[-common:] == below[-common:]


def _parts(place: Location) -> tuple[str, ...]:
    return place.parts if isinstance(place, Path) else PurePosixPath(place).parts
