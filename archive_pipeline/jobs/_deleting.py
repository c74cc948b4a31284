"""How an original goes: noted in the archive, deleted if it still is what it was, noted as gone."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from archive_pipeline._version import __version__
from archive_pipeline.flight import objects
from archive_pipeline.flight.aside import Kept, delete_if, left_aside, origin, put_back
from archive_pipeline.flight.locations import Location, location
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.layout import ArchiveError, ImageEntry
from archive_pipeline.store.retired import forget_path, read_retired, write_retired
from archive_pipeline.store.verdicts import record_digest


class Deletion:
    """Deletes originals, and mends what a killed run left.

    Args:
        folders: those that originals may lie in.
        done: whether anything may be changed.

    Attributes:
        notes: what is to be told besides, a line each.
        unwritable: why a local archive keeps no more notes; None where it does.
    """

    def __init__(self, archive: Archive, folders: list[Location], done: bool) -> None:
        self._archive, self._folders, self._done = archive, folders, done
        self._ways: dict[str, objects.Way] = {}
        self.notes: list[str] = []
        self.unwritable: str | None = None

    def mend(self) -> None:
        """Put back what a killed run left aside in folders; where nothing may change, tell of it.

        What one left in a bucket `is_gone` sees to.
        """
        for folder in self._folders:
            for aside in left_aside(folder) if isinstance(folder, Path) else ():
                place = origin(aside)
                if self._done:
                    told = put_back(aside) or f"{place}: a killed run had moved it; back"
                else:
                    told = f"{place}: a killed run has left it as {aside}; --yes mends it"
                self.notes.append(told)
        buckets = {objects.bucket_of(str(f)) for f in self._folders if objects.in_bucket(f)}
        for bucket in () if self._done else sorted(buckets):
            self.notes.append(f"{bucket}: whether it deletes safely is tried with --yes")

    def delete(self, entry: ImageEntry, place: Location, kinds: list[str]) -> None:
        """Note a file in the archive, delete it, and note that it is gone.

        Args:
            kinds: of verdicts that its image has passed.

        Raises:
            ArchiveError: the archive cannot be written; then the file stays.
            Kept: the file stays; then so does no note of it.
            OSError: nobody knows whether it is there; the note stays.
        """
        archive, sha256 = self._archive, entry.record["sha256"]
        note: dict[str, Any] = {
            "path": str(place.absolute() if isinstance(place, Path) else place),
            "sha256": sha256,
            "bytes": entry.record["source_bytes"],
            "record": record_digest(entry),
            "date": _now(),
            "version": __version__,
            "verdicts": kinds,
            "deleted": None,
        }
        held = None
        if isinstance(place, str):
            way = self._way(place)
            held = objects.read(place, sha256)
            note["object"] = {"etag": held.etag, "version": held.version, **vars(way)}
        try:
            write_retired(archive, entry.flight, entry.id, note)
        except ArchiveError as error:
            if archive.folder is not None:  # a full disk, say: no other note is tried
                self.unwritable = str(error)
            raise
        if read_retired(archive, entry.flight, entry.id)[-1:] != [note]:
            raise ArchiveError(f"{archive.url}: does not keep what is written to it")
        try:
            if held is not None:
                objects.delete(held, way)
            elif isinstance(place, Path):
                delete_if(place, sha256)
        except Kept:
            forget_path(archive, entry.flight, entry.id, note["path"])
            raise
        try:
            write_retired(archive, entry.flight, entry.id, {**note, "deleted": _now()})
        except ArchiveError as error:  # the next run sees that it is gone
            self.notes.append(f"{place}: is deleted, which the archive could not note: {error}")

    def _way(self, url: str) -> objects.Way:
        """How the bucket of an original deletes.

        Raises:
            Kept: that cannot be found out, or it does so in no way that is safe.
        """
        bucket = objects.bucket_of(url)
        if bucket not in self._ways:
            self._ways[bucket] = way = objects.way_of(self._around(url)[0])
            if way.versioned:
                self.notes.append(
                    f"{bucket}: keeps versions: what is deleted there takes its space until the "
                    "bucket's own rules let earlier versions go"
                )
        way = self._ways[bucket]
        if not way.conditional and not way.versioned:
            raise Kept(objects.NO_WAY)
        return way

    def _around(self, url: str) -> list[str]:
        """Folders in buckets that an object lies in."""
        some = [objects.plain(f) for f in self._folders if isinstance(f, str)]
        return [f for f in some if objects.plain(url).startswith(f"{f}/")]

    def is_gone(self, entry: ImageEntry) -> bool:
        """Whether an image's originals were deleted by an earlier run, which may have been killed.

        Raises:
            ArchiveError: the store fails.
            OSError: that cannot be told.
        """
        gone = False
        for file in read_retired(self._archive, entry.flight, entry.id):
            if self._went(file):
                gone = True
                if self._done and file.get("deleted") is None:
                    now = {**file, "deleted": _now()}
                    write_retired(self._archive, entry.flight, entry.id, now)
        return gone

    def _went(self, file: dict[str, Any]) -> bool:
        """Whether a noted file is gone; a deletion that hid another file is taken back."""
        place, settled = location(file["path"]), file.get("deleted") is not None
        if isinstance(place, Path):
            return not os.path.lexists(place)
        # whoever can write the archive can name any URL: none is asked that the user has not named
        if not objects.in_bucket(place) or not self._around(place):
            return settled
        if objects.is_there(place):
            return False
        way = file.get("object")
        way = way if isinstance(way, dict) else {}
        version = way.get("version") if way.get("conditional") is False else None
        if settled or not self._done or not isinstance(version, str):
            return True
        if objects.take_back(place, version):
            self.notes.append(f"{place}: a killed run had hidden a later version; it shows again")
            return False
        return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
