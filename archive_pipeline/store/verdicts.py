"""Verdicts of verifications: of which images, by what, with which tolerances, and what came out.

`verdicts/<flight>/<kind>.json` holds those of one kind, of each image the latest. An image's stands
while the record is there that was compared. Who replaces or removes an image voids its own first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from archive_pipeline.store.archive import Archive
from archive_pipeline.store.index import read_images
from archive_pipeline.store.layout import (
    MAX_JSON,
    ImageEntry,
    RecordError,
    check_size,
    quote_name,
    reason_of,
    unquote_name,
)

ROOT = "verdicts"
KINDS = ("detection", "photogrammetry", "photogrammetry-quick")
DIGEST = 32  # characters of a record's SHA-256


@dataclass(frozen=True)
class Verdict:
    """What a verification said of images of one flight.

    Attributes:
        flight, kind: its flight, and one of `KINDS`.
        passed: whether they passed.
        how: tolerances, models, seed and the like, of JSON types.
        version: of this package.
        date: UTC, ISO 8601.
        images: digests (`record_digest`) of the records that were compared, by the images' ids.
    """

    flight: str
    kind: str
    passed: bool
    how: dict[str, Any]
    version: str
    date: str
    images: dict[str, str]


def record_digest(entry: ImageEntry) -> str:
    """Tells an image's record from all others; pixels that are replaced change it."""
    text = json.dumps(entry.record, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:DIGEST]


def verdict_keys(archive: Archive) -> list[tuple[str, str]]:
    """(flight, kind) of all verdicts that are stored.

    Raises:
        ArchiveError: the store fails.
    """
    found = []
    for flight in archive.list_names(ROOT):
        for name in archive.list_names(f"{ROOT}/{flight}"):
            kind = name.removesuffix(".json")
            if kind in KINDS:
                found.append((unquote_name(flight), kind))
    return found


def read_verdicts(archive: Archive, flight: str, kind: str) -> list[Verdict]:
    """Verdicts of one kind, the latest last; no two have the same image.

    Raises:
        RecordError: they are damaged.
        ArchiveError: the store fails.
    """
    raw = archive.read_key(_key(flight, kind), MAX_JSON)
    if raw is None:
        return []
    try:
        return [_verdict(flight, kind, item) for item in json.loads(raw)["verdicts"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{flight}: damaged verdict of {kind}: {reason_of(error)}"
        raise RecordError(reason) from error


def standing(verdicts: Iterable[Verdict], entries: Collection[ImageEntry]) -> list[Verdict]:
    """Verdicts with only those images whose record is still the one that was compared."""
    now = {entry.id: record_digest(entry) for entry in entries}
    return [
        replace(v, images={id: d for id, d in v.images.items() if now.get(id) == d})
        for v in verdicts
    ]


def add_verdict(archive: Archive, verdict: Verdict) -> None:
    """Store a verdict; it takes the place of earlier ones of its kind of the same images.

    Images that were replaced since they were compared are left out.

    Raises:
        ArchiveError: the store fails, or is read-only.
    """
    key = _key(verdict.flight, verdict.kind)
    with archive.exclusive(key):
        now = {entry.id: record_digest(entry) for entry in _entries(archive, verdict)}
        images = {id: d for id, d in verdict.images.items() if now.get(id) == d}
        try:
            before = read_verdicts(archive, verdict.flight, verdict.kind)
        except RecordError:  # nothing of it can be kept
            before = []
        _write(archive, key, [*_without(before, verdict.images), replace(verdict, images=images)])


def void_verdicts(archive: Archive, flight: str, ids: Collection[str] | None = None) -> None:
    """Forget what was said of images, or of all of a flight where None.

    Raises:
        ArchiveError: the store fails.
    """
    there = archive.list_names(f"{ROOT}/{quote_name(flight)}")
    for kind in KINDS:
        key = _key(flight, kind)
        if f"{kind}.json" not in there:
            continue
        with archive.exclusive(key):
            try:
                before = [] if ids is None else read_verdicts(archive, flight, kind)
            except RecordError:
                before = []
            _write(archive, key, _without(before, ids or ()))
    if there:
        archive.prune(f"{ROOT}/{quote_name(flight)}")
        archive.prune(ROOT)


def _entries(archive: Archive, verdict: Verdict) -> list[ImageEntry]:
    found = read_images(archive, verdict.flight, lambda name, error: None)
    return [entry for entry in found if entry.id in verdict.images]


def _without(verdicts: Iterable[Verdict], ids: Collection[str]) -> list[Verdict]:
    gone = set(ids)
    left = [
        replace(v, images={id: d for id, d in v.images.items() if id not in gone}) for v in verdicts
    ]
    return [verdict for verdict in left if verdict.images]


def _write(archive: Archive, key: str, verdicts: list[Verdict]) -> None:
    left = [verdict for verdict in verdicts if verdict.images]
    if not left:
        if archive.read_key(key, MAX_JSON) is not None:
            archive.delete([key])
        return
    items = [
        {name: getattr(v, name) for name in ("passed", "how", "version", "date", "images")}
        for v in left
    ]
    data = json.dumps({"verdicts": items}, separators=(",", ":")).encode()
    check_size(f"{key}: a verdict", len(data), MAX_JSON)
    archive.write_key(key, data)


def _key(flight: str, kind: str) -> str:
    return f"{ROOT}/{quote_name(flight)}/{kind}.json"


def _verdict(flight: str, kind: str, item: Any) -> Verdict:
    images = item["images"]
    told = item["version"], item["date"]
    if not isinstance(item["passed"], bool) or not isinstance(item["how"], dict):
        raise ValueError("it says neither passed nor failed")
    if not isinstance(images, dict) or not all(isinstance(d, str) for d in images.values()):
        raise ValueError("its images are no records")
    if not all(isinstance(text, str) for text in told):
        raise ValueError("its version and date are no texts")
    return Verdict(flight, kind, item["passed"], item["how"], *told, images)
