"""Giving overviews to an image that is in an archive."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.image_writer import ImageWriter
from archive_pipeline.store.layout import (
    ATTRIBUTE,
    MAX_DOCUMENT,
    ArchiveError,
    ImageEntry,
    check_size,
    sized_record_json,
)


class OverviewWriter(ImageWriter):
    """Writes overviews beside what an image has; nothing that is there changes until `add`.

    To be made by who holds the image's lock or its flight's lease. What is written and not added is
    a leftover.
    """

    def __init__(self, archive: Archive, entry: ImageEntry, source: SourceImage) -> None:
        self.archive, self.flight, self.source, self.key = archive, entry.flight, source, entry.key
        self.replaces, self._resumed = False, False
        self._generation, self._entry = entry.generation, entry
        self._arrays, self._kept = {}, {}

    def add(
        self, factors: list[int], described: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> None:
        """Have the image's record name the overviews that were written.

        Args:
            described: makes of the other attributes of the image's group those that it shall have.

        Raises:
            ArchiveError: the record is another one by now, or the store fails.
        """
        path = self._path("zarr.json")
        before = self.archive.read_key(path)
        conventions = {} if before is None else json.loads(before)["attributes"]
        record = conventions.pop(ATTRIBUTE, None)
        if before is None or record != self._entry.record:
            raise ArchiveError(f"{self.flight}/{self.source.id}: was written just now")
        others = record["archive_bytes"] - len(before) + self._stored()
        record["overviews"] = factors
        content, _ = sized_record_json(record, described(conventions), others)
        check_size("its record", len(content), MAX_DOCUMENT)
        self.archive.write_key(path, content)
