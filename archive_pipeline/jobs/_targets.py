"""Which paths a restore may write to: none that holds something, an original or the archive."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from pathlib import Path

from archive_pipeline.flight.find import IMAGE_SUFFIXES
from archive_pipeline.flight.locations import sha256
from archive_pipeline.flight.restored_tag import is_restored
from archive_pipeline.outputs.paths import OutputError
from archive_pipeline.outputs.publish import Stamps, existing, is_inside
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.index import read_images


class Targets:
    """The places below an output folder that an archive's images may be written to.

    Attributes:
        output: the folder.
    """

    def __init__(self, archive: Archive, output: Path, overwrite: bool) -> None:
        """Take a folder, which need not exist.

        Args:
            overwrite: files that `restore` wrote may be replaced.

        Raises:
            OutputError: the folder is the archive's, or inside it.
        """
        self.output = output
        self._archive = archive
        self._overwrite = overwrite
        self._folders: dict[Path, bool] = {}
        if self._is_in_archive(output):
            raise OutputError(f"{output} is inside the archive {archive.url}; choose another -o")

    def claim(self, path: Path, content: str | None = None) -> Stamps:
        """What is at a path and its sidecars' that may be replaced, for `outputs.publish`.

        Args:
            content: SHA-256 of what shall be there; if it is already, it may stay.

        Raises:
            OutputError: it must not be written there.
        """
        self.check_folder(path.parent)
        try:
            there = existing(path)
            if content is not None and path in there and path.exists() and sha256(path) == content:
                del there[path]
            if there and not self._overwrite:
                raise OutputError(f"{min(there)} is already there (--overwrite replaces it)")
            for place in there:
                self._check(place)
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror or error}") from error
        return there

    def check_folder(self, folder: Path) -> None:
        """Refuse to write into a folder of the archive.

        Raises:
            OutputError: it is one.
        """
        if self._is_in_archive(folder):
            raise OutputError(f"{folder} is inside the archive")

    def _is_in_archive(self, folder: Path) -> bool:
        if folder not in self._folders:
            home = self._archive.folder
            self._folders[folder] = home is not None and is_inside(folder, home)
        return self._folders[folder]

    def _check(self, place: Path) -> None:
        """Refuse to replace an archived original, and any image that is not of `restore`'s making.

        What was edited since it was archived is nowhere else.
        """
        if not place.exists():  # a link that leads nowhere
            return
        names = self._originals.get(place.stat().st_size)
        name = names.get(sha256(place)) if names else None
        if name is not None:
            raise OutputError(f"{place} is the original of {name}, which is never replaced")
        if place.suffix.lower() in IMAGE_SUFFIXES and not is_restored(place):
            raise OutputError(
                f"{place} was not written by archive restore, and is never replaced: move it away"
            )

    @cached_property
    def _originals(self) -> dict[int, dict[str, str]]:
        """All archived images' names by their originals' size and SHA-256."""
        found: dict[int, dict[str, str]] = defaultdict(dict)
        for entry in read_images(self._archive, None, lambda name, error: None):
            record = entry.record
            found[record["source_bytes"]][record["sha256"]] = f"{entry.flight}/{entry.id}"
        return found
