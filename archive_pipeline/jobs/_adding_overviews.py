"""`archive check --repair --overviews`: overviews for images that were archived without."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

from archive_pipeline.errors import require
from archive_pipeline.jobs._overviews import add_overviews, lacks_overviews
from archive_pipeline.jobs.decoding import Decoding
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.layout import ArchiveError, ImageEntry
from archive_pipeline.store.leases import LeaseHeld, leased


def add_missing(
    archive: Archive, entries: Iterable[ImageEntry], progress: Callable[[int], None]
) -> tuple[int, list[str]]:
    """Add overviews to images that lack them, beside whatever else is at work.

    Args:
        progress: called after each of these images with their number.

    Returns:
        How many were given some, and why others were not, a line each.

    Raises:
        NotInstalled: PyTorch is not, which encoding needs.
    """
    todo = sorted(filter(lacks_overviews, entries), key=lambda entry: entry.key)
    added, notes = 0, []
    if not todo:
        return 0, []
    require("torch", "archive check --overviews")
    settings = Decoding("auto", 0, 0, "auto").settings()
    for flight, some in groupby(todo, key=lambda entry: entry.flight):
        try:
            with leased(archive, [flight], patient=False) as leases, archive.writing():
                for entry in some:
                    leases.check()
                    try:
                        with archive.exclusive(entry.key):
                            added += add_overviews(archive, entry, settings)
                    except ArchiveError as error:
                        notes.append(f"no overview was added: {error}")
                    progress(len(todo))
        except LeaseHeld:
            notes.append(f"{flight}: no overviews were added: an ingest of it is running")
    return added, notes
