"""What writers leave below an image that is no part of it, and how that is removed.

After a writer was killed: arrays of an image that was never committed, or of the generation that
was to replace a committed one. After an image was replaced: its old generation, which stays a
moment for readers that have just opened it.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Collection
from contextlib import suppress

from archive_pipeline.store.archive import Archive
from archive_pipeline.store.layout import (
    PLAN,
    STAGED,
    ArchiveError,
    ImageEntry,
    RecordError,
    array_generation,
    image_name,
    strays,
)

LINGER = 1.0  # seconds that the shards of a replaced image stay: readers have its arrays open
OLD_PLAN = "archive_pipeline_unfinished"  # attribute in which earlier releases kept a plan


def committed(archive: Archive, key: str) -> ImageEntry | None:
    """The image whose group is at `key`, None where none is for certain.

    Raises:
        RecordError: there is a group with a record that is damaged or lost.
        ArchiveError: the store fails.
    """
    entry = archive.entry(key)
    if entry is None:
        raw = archive.read_key(f"{key}/zarr.json")
        if raw is not None and json.loads(raw).get("attributes", {}).keys() != {OLD_PLAN}:
            raise RecordError(f"{image_name(key)}: damaged record: there is none")
    return entry


def may_be_whole(key: str, found: Collection[str]) -> bool:
    """Whether what is stored of an image without a record may be all of it.

    Its record may have been lost. An image that is written shard by shard has its plan meanwhile;
    of others the pixels are written last.

    Args:
        key: the image's group.
        found: all keys below it.
    """
    if f"{key}/zarr.json" in found or f"{key}/{PLAN}" in found:
        return False
    names = (stored.removeprefix(f"{key}/") for stored in found)
    shards = {n.partition("/")[0] for n in names if not n.endswith((".json", ".partial"))}
    return {"metadata", "pixels"} <= shards


def leftovers(archive: Archive, key: str, found: Collection[str]) -> list[str]:
    """Keys of `found`, all that are below an image, which are no part of it.

    Staged metadata count although readers need them until `settle` makes them the real ones.

    Raises:
        RecordError: the record is damaged; then nothing is known of the rest.
        ArchiveError: the store fails.
    """
    entry = committed(archive, key)
    if entry is None:
        return strays(key, found, None, None)
    return strays(key, found, entry.generation, entry.arrays)


def settle(archive: Archive, key: str, keep: Collection[str] = ()) -> list[str]:
    """Finish what a writer began after its commit, and remove all that is no part of the image.

    To be called by who holds the image's lock or its flight's lease. What is committed stays as
    it is, and so does everything where a record is damaged.

    Args:
        keep: keys that stay, too.

    Returns:
        The keys that were removed.

    Raises:
        RecordError: the record is damaged.
        ArchiveError: the store fails.
    """
    found = archive.stored(key)
    entry = committed(archive, key)
    if entry is not None:
        promote(archive, entry, found)
    other = [name for name in leftovers(archive, key, found) if name not in keep]
    discard(archive, key, other)
    return other


def promote(archive: Archive, entry: ImageEntry, found: Collection[str]) -> None:
    """Make staged metadata of a committed image the arrays' own: plain Zarr readers see those.

    Raises:
        ArchiveError: the store fails.
    """
    for name in entry.arrays:
        real, staged = (f"{entry.key}/{name}/{part}" for part in ("zarr.json", STAGED))
        if staged not in found:
            continue
        content, standing = archive.read_key(staged), archive.read_key(real)
        if content is None or array_generation(content) != entry.generation:
            continue  # of a writer that did not come to its commit
        if standing is None or array_generation(standing) != entry.generation:
            archive.write_key(real, content)


def discard(archive: Archive, key: str, keys: Collection[str]) -> None:
    """Remove keys below an image, a plan first: what is half removed is not gone on with.

    Raises:
        ArchiveError: the store fails.
    """
    plan = f"{key}/{PLAN}"
    if plan in keys:
        archive.delete([plan])
    rest = [name for name in keys if name != plan]
    if rest:
        archive.delete(rest)
    if keys:
        archive.prune(key)


class Replaced:
    """Images that were replaced a moment ago; their old generations are removed in time."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._waiting: deque[tuple[float, str]] = deque()

    def add(self, key: str) -> None:
        self._waiting.append((time.monotonic() + LINGER, key))

    def collect(self, wait: bool = False) -> None:
        """Remove what has stayed long enough; all of it if `wait`. What fails is left."""
        while self._waiting:
            due, key = self._waiting[0]
            left = due - time.monotonic()
            if left > 0 and not wait:
                return
            time.sleep(max(0.0, left))
            self._waiting.popleft()
            with self._archive.exclusive(key), suppress(ArchiveError):  # `check` tells of it
                settle(self._archive, key)
