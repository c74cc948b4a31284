"""`archive retire`: originals that their archive can stand in for are deleted.

Every file goes through all of this right before it goes, while nobody else may write its image:
its place, its bytes, verdicts that are asked for, the archived image read, decoded and compared, a
note in the archive, and its bytes once more. Whatever is odd keeps the file, and is told.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archive_pipeline.flight import objects
from archive_pipeline.flight.aside import Kept
from archive_pipeline.flight.locations import Location, local_file, sha256
from archive_pipeline.jobs._deleting import Deletion
from archive_pipeline.jobs._proof import why_not
from archive_pipeline.jobs.originals import Originals, folders_of
from archive_pipeline.outputs.publish import is_inside
from archive_pipeline.store.archive import Archive, in_process_only
from archive_pipeline.store.index import read_images
from archive_pipeline.store.layout import ArchiveError, ImageEntry
from archive_pipeline.store.leases import Leases, leased
from archive_pipeline.store.retired import has_retired
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
        originals: folder or URL below which they lie; by default those that this user archived
            from on this machine.
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
    if "::" in archive_url:
        text = "names a place through another, as caches do, which need not hold what they read"
        raise ArchiveError(f"{archive_url}: {text}: nothing is deleted")
    report = RetireReport(yes)
    stage("looking for originals")
    flights = archive.flights() if flight is None else [flight]
    folders = {f: folders_of(archive_url, originals, f) for f in flights}
    every = list(dict.fromkeys(place for places in folders.values() for place in places))
    _check_apart(archive, every)
    deletion = Deletion(archive, every, yes)
    report.notes = deletion.notes
    deletion.mend()
    found = Originals(archive_url, originals, strict=not has_retired(archive))
    entries = _entries(archive, flight, report)
    verdicts = {f: {kind: _verdicts(archive, f, kind) for kind in require} for f in flights}
    if yes and hasattr(os, "sync"):
        os.sync()  # what was archived is on the disk before anything goes
    with leased(archive, flights if yes else []) as leases:
        one = _One(archive, found, deletion, leases, report)
        for entry in entries:
            leases.check()
            one.retire(entry, folders[entry.flight], verdicts[entry.flight])
            progress(len(entries))
    return report


def _entries(archive: Archive, flight: str | None, report: RetireReport) -> list[ImageEntry]:
    """The images whose originals are meant; `report` is told of those with damaged records.

    Raises:
        ArchiveError: there are none.
    """

    def damaged(name: str, error: ArchiveError) -> None:
        report.kept.append({"image": name, "path": None, "reason": str(error)})

    entries = [*read_images(archive, flight, damaged)]
    if not entries and not report.kept:
        what = "" if flight is None else f" of flight {flight}"
        raise ArchiveError(f"{archive.url}: no images{what}")
    return entries


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
                one, two = (f"{objects.plain(url)}/" for url in (archive.url, text))
                near = one.startswith(two) or two.startswith(one)
        except OSError as error:
            raise ArchiveError(f"{text}: {error.strerror or error}") from error
        if near:
            raise ArchiveError(
                f"{archive.url}: lies in one folder with the originals in {text}: nothing is "
                "deleted where the only copy of it may be"
            )


def _verdicts(archive: Archive, flight: str, kind: str) -> list[Verdict]:
    """Verdicts of a kind, or of one that says more."""
    kinds = FULLER.get(kind, (kind,))
    return [verdict for one in kinds for verdict in read_verdicts(archive, flight, one)]


@dataclass(frozen=True)
class _One:
    """Deletes originals one by one, each with its reason where it stays."""

    archive: Archive
    found: Originals
    deletion: Deletion
    leases: Leases
    report: RetireReport

    def retire(
        self, entry: ImageEntry, folders: list[Location], verdicts: dict[str, list[Verdict]]
    ) -> None:
        """Delete an image's original, or tell why not."""
        name, place = f"{entry.flight}/{entry.id}", None
        try:
            with ExitStack() as stack:
                place, copy, reason = self._candidate(entry, folders, stack)
                if place is None and self.deletion.is_gone(entry):
                    self.report.already += 1
                    return
                if place is not None and copy is not None and reason is None:
                    stack.enter_context(self.archive.exclusive(entry.key))
                    unwritable = self.deletion.unwritable
                    reason = unwritable or self._unproven(entry, copy, verdicts)
                    if reason is None:
                        size = copy.stat().st_size
                        if self.report.done:
                            self.deletion.delete(entry, place, [*verdicts])
                        self.report.files.append({"image": name, "path": str(place), "bytes": size})
                        return
        except (ArchiveError, Kept, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        path = None if place is None else str(place)
        self.report.kept.append({"image": name, "path": path, "reason": reason})

    def _candidate(
        self, entry: ImageEntry, folders: list[Location], stack: ExitStack
    ) -> tuple[Location | None, Path | None, str | None]:
        """The file that is an image's original, itself or its copy on this machine while the stack
        lasts, and why it stays, as far as its place tells.

        Raises:
            OSError: it cannot be told where it lies.
        """
        other = None
        for place in self.found.candidates(entry):
            try:
                copy = stack.enter_context(local_file(place, self.found.beside(entry, place)))
                digest = sha256(copy)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                other = place, None, f"it cannot be read: {error.strerror or error}"
                continue
            if digest != entry.record["sha256"]:
                other = place, None, "it is not the file that was archived: its SHA-256 differs"
                continue
            return place, copy, _misplaced(place, folders)
        if other is not None:
            return other
        reason = self.found.problem(entry)
        return None, None, reason or "nobody has named where its original lies: --originals"

    def _unproven(
        self, entry: ImageEntry, copy: Path, verdicts: dict[str, list[Verdict]]
    ) -> str | None:
        """Why an image does not stand in for its original, of which there is a copy."""
        reason = self._outdated(entry) or _unverified(entry, verdicts)
        if reason is None:
            reason = why_not(self.archive, entry, copy)
            # where archives cannot be locked, a lease may have been lost meanwhile
            self.leases.check()
        return reason or self._outdated(entry)

    def _outdated(self, entry: ImageEntry) -> str | None:
        now = self.archive.entry(entry.key)
        if now is None or now.record != entry.record:
            return "its image was replaced or removed just now"
        return None


def _misplaced(place: Location, folders: list[Location]) -> str | None:
    """Why a file is not deleted for where it is.

    Raises:
        OSError: that cannot be told.
    """
    if isinstance(place, str):
        if not objects.in_bucket(place):
            return "it is at a URL: only files of this machine and objects at s3:// are deleted"
        near = (objects.plain(str(folder)) for folder in folders)
        if not any(objects.plain(place).startswith(f"{folder}/") for folder in near):
            return "it is not below the flight's URL"
        return None
    if place.is_symlink():
        return "it is a link"
    real = place.parent.resolve(strict=True)
    within = [f for f in folders if isinstance(f, Path) and place.is_relative_to(f)]
    if not any(real.is_relative_to(f.resolve(strict=True)) for f in within):
        return "a link leads to it from outside of the flight's folder"
    return None


def _unverified(entry: ImageEntry, verdicts: dict[str, list[Verdict]]) -> str | None:
    """Which verdict that is asked for an image lacks."""
    digest = record_digest(entry)
    for kind, some in verdicts.items():
        own = [verdict for verdict in some if verdict.images.get(entry.id) == digest]
        if not own:
            return f"it has no verdict of verify-{kind}"
        if not all(verdict.passed for verdict in own):
            return f"it failed verify-{kind}"
    return None
