"""What interrupted ingests left: `archive check` tells of it, and with `--repair` removes it."""

from __future__ import annotations

from itertools import groupby

from archive_pipeline.store.archive import Archive
from archive_pipeline.store.layout import PLAN, ArchiveError, image_name, unquote_name
from archive_pipeline.store.leases import LeaseHeld, lease_key, leased
from archive_pipeline.store.leftovers import leftovers, may_be_whole, settle


def leftover_bytes(archive: Archive, key: str) -> int:
    """Bytes below an image that are no part of it; none of what may have lost its record."""
    return stored_bytes(archive, key)[1]


def stored_bytes(archive: Archive, key: str) -> tuple[int, int]:
    """Bytes below an image, and `leftover_bytes` of them; none where its record is damaged."""
    try:
        found = archive.stored(key)
        names = leftovers(archive, key, found)
    except ArchiveError:  # a problem of its own
        return 0, 0
    left = () if may_be_whole(key, found) else names
    return sum(one.size for one in found.values()), sum(found[name].size for name in left)


def told(archive: Archive, key: str, size: int) -> str:
    """A note of an image's leftovers."""
    if archive.read_key(lease_key(unquote_name(key.split("/")[1]))) is not None:
        return _stays(key, size, "an ingest of its flight is running, or was killed")
    return f"{image_name(key)}: {size} bytes left by an interrupted ingest; --repair removes them"


def remove(archive: Archive, sizes: dict[str, int]) -> dict[str, str]:
    """Remove leftovers beside whatever else is at work; only where nobody writes the image.

    Args:
        sizes: bytes of the leftovers by image.

    Returns:
        What became of them, a note each.

    Raises:
        ArchiveError: the store fails.
    """
    notes: dict[str, str] = {}
    for flight, some in groupby(sorted(sizes), key=lambda key: key.split("/")[1]):
        keys = list(some)
        try:
            with leased(archive, [unquote_name(flight)], patient=False) as leases:
                for key in keys:
                    leases.check()
                    notes[key] = _remove(archive, key, leased=bool(leases.held))
        except LeaseHeld:
            for key in keys:
                notes[key] = _stays(key, sizes[key], "an ingest of its flight is running")
    return notes


def _remove(archive: Archive, key: str, leased: bool) -> str:
    if archive.is_exclusive(key):  # not worth waiting for
        return _stays(key, leftover_bytes(archive, key), "it is being written")
    with archive.exclusive(key) as held:
        size = leftover_bytes(archive, key)  # as it is now
        if not size:
            return f"{image_name(key)}: an ingest has removed its leftovers"
        if not held and not leased:
            return _stays(key, size, "nothing here tells whether an ingest is running")
        if archive.is_written() and archive.read_key(f"{key}/{PLAN}") is not None:
            return _stays(key, size, "an ingest is running, which may go on with it")
        settle(archive, key)
    return f"{image_name(key)}: {size} bytes left by an interrupted ingest were removed"


def _stays(key: str, size: int, reason: str) -> str:
    return f"{image_name(key)}: {size} bytes that are not committed stay: {reason}"
