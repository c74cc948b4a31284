"""`archive retire`: originals that their archive can stand in for are deleted.

Every file goes through all of this right before it goes, while nobody else may write its image:
its place, its bytes, verdicts that are asked for, the archived image read, decoded and compared, a
note in the archive, and its bytes once more. Whatever is odd keeps the file, and is told.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from archive_pipeline._version import __version__
from archive_pipeline.flight.aside import Kept, delete_if, left_aside, put_back
from archive_pipeline.flight.locations import Location, location, sha256
from archive_pipeline.jobs._proof import why_not
from archive_pipeline.jobs.originals import Originals, folders_of
from archive_pipeline.outputs.publish import is_inside
from archive_pipeline.store.archive import Archive, in_process_only
from archive_pipeline.store.index import read_images
from archive_pipeline.store.layout import ArchiveError, ImageEntry
from archive_pipeline.store.leases import leased
from archive_pipeline.store.retired import ROOT as RETIRED
from archive_pipeline.store.retired import forget_path, read_retired, write_retired
from archive_pipeline.store.verdicts import Verdict, read_verdicts, record_digest

FULLER = {"photogrammetry-quick": ("photogrammetry-quick", "photogrammetry")}


@dataclass
class RetireReport:
    """What was deleted, or would be.

    Attributes:
        done: whether it was.
        files: {"image", "path", "bytes"} of each.
        kept: {"image", "path", "reason"} of each image whose original stays; "path" may be None.
        already: images whose originals earlier runs have deleted.
        notes: what an interrupted run had left, and what became of it.
    """

    done: bool
    files: list[dict[str, Any]] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    already: int = 0
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The contract of `archive retire --json`."""
        return {
            "deleted": self.done,
            "files": self.files,
            "kept": self.kept,
            "already": self.already,
            "bytes": sum(file["bytes"] for file in self.files),
            "notes": self.notes,
        }


def retire(
    archive_url: str,
    flight: str | None = None,
    *,
    originals: Location | None = None,
    require: tuple[str, ...] = (),
    yes: bool = False,
    progress: Callable[[int], None] = lambda total: None,
    stage: Callable[[str], None] = lambda name: None,
) -> RetireReport:
    """Delete originals of a flight, or of all; sidecars, documents and everything else stay.

    Interrupted, it can be run again.

    Args:
        originals: folder in which they lie; by default those that this user archived from on this
            machine.
        require: kinds of verdicts (`verdicts.KINDS`) that each image must have passed.
        yes: delete; else only find out what would go.
        progress: called after each image with the number of images.
        stage: called with what is done before the first.

    Raises:
        ArchiveError: there is no such archive or flight, it cannot be written, or it lies with the
            originals.
        FlightError: the folder of originals holds no images.
    """
    archive = Archive.open(archive_url, writable=yes)
    if in_process_only(archive_url):
        raise ArchiveError(f"{archive_url}: is gone when this process ends: nothing is deleted")
    report = RetireReport(yes)
    stage("looking for originals")
    flights = archive.flights() if flight is None else [flight]
    folders = {f: folders_of(archive_url, originals, f) for f in flights}
    every = list(dict.fromkeys(place for places in folders.values() for place in places))
    _check_apart(archive, every)
    _mend(every, report)
    # a folder of which all images went is empty
    found = Originals(archive_url, originals, strict=not archive.list_names(RETIRED))

    def damaged(name: str, error: ArchiveError) -> None:
        report.kept.append({"image": name, "path": None, "reason": str(error)})

    entries = [*read_images(archive, flight, damaged)]
    if not entries and not report.kept:
        what = "" if flight is None else f" of flight {flight}"
        raise ArchiveError(f"{archive_url}: no images{what}")
    verdicts = {f: {kind: _verdicts(archive, f, kind) for kind in require} for f in flights}
    if yes and hasattr(os, "sync"):
        os.sync()  # what was archived is on the disk before anything goes
    with leased(archive, flights if yes else []) as leases:
        for entry in entries:
            leases.check()
            places = folders[entry.flight]
            _retire_one(archive, entry, found, places, verdicts[entry.flight], report)
            progress(len(entries))
    return report


def _check_apart(archive: Archive, folders: list[Location]) -> None:
    """Refuse to delete where the archive is.

    Raises:
        ArchiveError: it lies with the originals, or that cannot be told.
    """
    for place in folders:
        text = str(place)
        try:
            if isinstance(place, Path) and archive.folder is not None:
                near = place.exists() and (
                    is_inside(archive.folder, place) or is_inside(place, archive.folder)
                )
            else:
                one, two = (f"{url.rstrip('/')}/" for url in (archive.url, text))
                near = one.startswith(two) or two.startswith(one)
        except OSError as error:
            raise ArchiveError(f"{text}: {error.strerror or error}") from error
        if near:
            raise ArchiveError(
                f"{archive.url}: lies in one folder with the originals in {text}: nothing is "
                "deleted where the only copy of it may be"
            )


def _mend(folders: list[Location], report: RetireReport) -> None:
    """Put back what a killed run left aside; without `yes`, tell of it."""
    for folder in folders:
        for aside in left_aside(folder) if isinstance(folder, Path) else ():
            place = aside.parent.parent / aside.name
            if not report.done:
                report.notes.append(f"{place}: a killed run has left it as {aside}; --yes mends it")
            else:
                report.notes.append(put_back(aside) or f"{place}: a killed run had moved it; back")


def _verdicts(archive: Archive, flight: str, kind: str) -> list[Verdict]:
    """Verdicts of a kind, or of one that says more."""
    kinds = FULLER.get(kind, (kind,))
    return [verdict for one in kinds for verdict in read_verdicts(archive, flight, one)]


def _retire_one(
    archive: Archive,
    entry: ImageEntry,
    found: Originals,
    folders: list[Location],
    verdicts: dict[str, list[Verdict]],
    report: RetireReport,
) -> None:
    """Delete an image's original, or tell why not."""
    path: Location | None = None
    try:
        path, reason = _candidate(entry, found, folders)
        if path is None and _settle(archive, entry, report.done):
            report.already += 1
            return
        if isinstance(path, Path) and reason is None:
            with archive.exclusive(entry.key):
                reason = _unproven(archive, entry, path, verdicts)
                if reason is None:
                    size = path.stat().st_size
                    if report.done:
                        _delete(archive, entry, path, verdicts)
                    item = {"image": f"{entry.flight}/{entry.id}", "path": str(path), "bytes": size}
                    report.files.append(item)
                    return
    except (ArchiveError, Kept, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    report.kept.append(
        {
            "image": f"{entry.flight}/{entry.id}",
            "path": None if path is None else str(path),
            "reason": reason,
        }
    )


def _candidate(
    entry: ImageEntry, found: Originals, folders: list[Location]
) -> tuple[Location | None, str | None]:
    """The file that is an image's original, and why it stays, as far as its place tells.

    Raises:
        OSError: it cannot be told where it lies.
    """
    places = found.candidates(entry)
    other = None
    for place in places:
        try:
            digest = sha256(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            other = place, f"it cannot be read: {error.strerror or error}"
            continue
        if digest != entry.record["sha256"]:
            other = place, "it is not the file that was archived: its SHA-256 differs"
            continue
        return place, _misplaced(place, folders)
    if other is not None:
        return other
    return None, found.problem(entry) or "nobody has named where its original lies: --originals"


def _misplaced(place: Location, folders: list[Location]) -> str | None:
    """Why a file is not deleted for where it is.

    Raises:
        OSError: that cannot be told.
    """
    if not isinstance(place, Path):
        return "it is at a URL: only files on file systems of this machine are deleted"
    if place.is_symlink():
        return "it is a link"
    real = place.parent.resolve(strict=True)
    within = [f for f in folders if isinstance(f, Path) and place.is_relative_to(f)]
    if not any(real.is_relative_to(f.resolve(strict=True)) for f in within):
        return "a link leads to it from outside of the flight's folder"
    return None


def _unproven(
    archive: Archive, entry: ImageEntry, path: Path, verdicts: dict[str, list[Verdict]]
) -> str | None:
    """Why an image does not stand in for its original; to be called while nobody may write it."""
    now = archive.entry(entry.key)
    if now is None or now.record != entry.record:
        return "its image was replaced or removed just now"
    digest = record_digest(entry)
    for kind, some in verdicts.items():
        own = [verdict for verdict in some if verdict.images.get(entry.id) == digest]
        if not own:
            return f"it has no verdict of verify-{kind}"
        if not all(verdict.passed for verdict in own):
            return f"it failed verify-{kind}"
    return why_not(archive, entry, path)


def _delete(
    archive: Archive, entry: ImageEntry, path: Path, verdicts: dict[str, list[Verdict]]
) -> None:
    """Note a file in the archive, delete it, and note that it is gone.

    Raises:
        ArchiveError: the archive cannot be written; then the file stays.
        Kept: the file stays; then so does no note of it.
    """
    note = {
        "path": str(path.absolute()),
        "sha256": entry.record["sha256"],
        "bytes": entry.record["source_bytes"],
        "record": record_digest(entry),
        "date": _now(),
        "version": __version__,
        "verdicts": [*verdicts],
        "deleted": None,
    }
    write_retired(archive, entry.flight, entry.id, note)
    if read_retired(archive, entry.flight, entry.id)[-1:] != [note]:
        raise ArchiveError(f"{archive.url}: does not keep what is written to it")
    try:
        delete_if(path, entry.record["sha256"])
    except Kept:
        forget_path(archive, entry.flight, entry.id, note["path"])
        raise
    write_retired(archive, entry.flight, entry.id, {**note, "deleted": _now()})


def _settle(archive: Archive, entry: ImageEntry, mend: bool) -> bool:
    """Whether an image's originals were deleted by an earlier run, which may have been killed.

    Raises:
        ArchiveError: the store fails.
    """
    files = read_retired(archive, entry.flight, entry.id)
    gone = [file for file in files if not os.path.lexists(location(file["path"]))]
    for file in gone:
        if mend and file.get("deleted") is None:
            write_retired(archive, entry.flight, entry.id, {**file, "deleted": _now()})
    return bool(gone)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
