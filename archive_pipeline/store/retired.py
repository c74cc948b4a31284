"""Which originals were deleted since their images are archived, when, and by what right.

`retired/<flight>/<image>.json` is written before the file goes, and again when it is gone.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from archive_pipeline.store.archive import Archive
from archive_pipeline.store.layout import MAX_DOCUMENT, ImageEntry, image_key

ROOT = "retired"


def retired_key(flight: str, id: str) -> str:
    """Where the record of an image's original is."""
    return f"{ROOT}/{image_key(flight, id).removeprefix('flights/')}.json"


def read_retired(archive: Archive, flight: str, id: str) -> list[dict[str, Any]]:
    """The files of an image that were to be deleted: path, sha256, date, deleted, ...

    What is damaged counts as nothing.

    Raises:
        ArchiveError: the store fails.
    """
    raw = archive.read_key(retired_key(flight, id), MAX_DOCUMENT)
    try:
        files = json.loads(raw or b"{}").get("files", [])
        return [file for file in files if isinstance(file, dict) and isinstance(file["path"], str)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def has_retired(archive: Archive) -> bool:
    """Whether any originals are noted: then a folder of originals may well be empty.

    Raises:
        ArchiveError: the store fails.
    """
    return bool(archive.list_names(ROOT))


def is_retired(archive: Archive, entry: ImageEntry) -> bool:
    """Whether the original of an image may have been deleted, as the archive stands in for it.

    Raises:
        ArchiveError: the store fails.
    """
    return retired_at(archive, entry) is not None


def retired_at(archive: Archive, entry: ImageEntry) -> str | None:
    """When the original of an image was deleted, or was about to be; None where it was not.

    Returns:
        UTC, ISO 8601; empty where the note is damaged in that.

    Raises:
        ArchiveError: the store fails.
    """
    found = None
    for file in read_retired(archive, entry.flight, entry.id):
        if file.get("sha256") == entry.record["sha256"]:
            at = file.get("deleted") or file.get("date")
            found = max(found or "", at if isinstance(at, str) else "")
    return found


def write_retired(archive: Archive, flight: str, id: str, file: dict[str, Any]) -> None:
    """Note a file, in the place of what is noted of the same path.

    Raises:
        ArchiveError: the store fails, or is read-only.
    """
    files = [f for f in read_retired(archive, flight, id) if f["path"] != file["path"]]
    data = json.dumps({"image": f"{flight}/{id}", "files": [*files, file]}).encode()
    archive.write_key(retired_key(flight, id), data)


def forget_path(archive: Archive, flight: str, id: str, path: str) -> None:
    """Take back what was noted of a file that stays after all.

    Raises:
        ArchiveError: the store fails.
    """
    key, files = retired_key(flight, id), read_retired(archive, flight, id)
    left = [file for file in files if file["path"] != path]
    if left:
        archive.write_key(key, json.dumps({"image": f"{flight}/{id}", "files": left}).encode())
    elif archive.read_key(key) is not None:
        archive.delete([key])


def count_retired(archive: Archive, flight: str, ids: Collection[str]) -> int:
    """Of how many images originals are noted.

    Raises:
        ArchiveError: the store fails.
    """
    return len(_noted(archive, flight, ids))


def forget_retired(archive: Archive, flight: str, ids: Collection[str]) -> None:
    """Forget originals of images that are removed.

    Raises:
        ArchiveError: the store fails.
    """
    keys = _noted(archive, flight, ids)
    if keys:
        archive.delete(keys)
        archive.prune(ROOT)


def noted(archive: Archive) -> set[str]:
    """Keys (`retired_key`) of all images of which originals are noted, without reading the notes.

    Raises:
        ArchiveError: the store fails.
    """
    return set(archive.stored(ROOT)) if archive.list_names(ROOT) else set()


def _noted(archive: Archive, flight: str, ids: Collection[str]) -> list[str]:
    there = noted(archive)
    return [key for key in (retired_key(flight, id) for id in ids) if key in there]
