"""What verifications found, kept in the archive; what `info` and `check` tell of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from archive_pipeline._version import __version__
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.layout import ArchiveError, ImageEntry, RecordError
from archive_pipeline.store.retired import retired_at
from archive_pipeline.store.verdicts import (
    KINDS,
    Verdict,
    add_verdict,
    read_verdicts,
    record_digest,
    standing,
    verdict_keys,
)


def keep_verdict(
    archive_url: str, kind: str, passed: bool, how: dict[str, Any], entries: Iterable[ImageEntry]
) -> list[str]:
    """Store what a verification said of images; returns why it could not, a line a flight.

    An archive that is read-only is a reason, no error: it was verified all the same.
    """
    date = datetime.now(UTC).isoformat(timespec="seconds")
    flights: dict[str, dict[str, str]] = {}
    for entry in entries:
        flights.setdefault(entry.flight, {})[entry.id] = record_digest(entry)
    warnings = []
    for flight, images in flights.items():
        verdict = Verdict(flight, kind, passed, how, __version__, date, images)
        try:
            add_verdict(Archive.open(archive_url, writable=True), verdict)
        except ArchiveError as error:
            warnings.append(f"{flight}: the verdict is not kept in the archive: {error}")
    return warnings


def tell_verdicts(
    archive: Archive,
    entries_of: Callable[[str], list[ImageEntry]],
    damaged: Callable[[str, ArchiveError], None],
) -> dict[str, list[dict[str, Any]]]:
    """Verdicts by flight, as `archive info --json` has them.

    Args:
        entries_of: a flight's images.
        damaged: called with the flight and the error of each that is damaged.
    """
    told: dict[str, list[dict[str, Any]]] = {}
    entries: dict[str, list[ImageEntry]] = {}
    for flight, kind in verdict_keys(archive):
        try:
            found = read_verdicts(archive, flight, kind)
        except ArchiveError as error:
            damaged(flight, error)
            continue
        if flight not in entries:
            entries[flight] = entries_of(flight)
        for before, now in zip(found, standing(found, entries[flight]), strict=True):
            told.setdefault(flight, []).append(
                {
                    "kind": kind,
                    "passed": now.passed,
                    "images": sorted(now.images),
                    "void": len(before.images) - len(now.images),
                    "date": now.date,
                    "version": now.version,
                    "how": now.how,
                }
            )
    return told


def tell_retired(archive: Archive, entries: Iterable[ImageEntry]) -> list[dict[str, Any]]:
    """Images whose originals `archive retire` has deleted, and the verdicts that stand of them.

    Args:
        entries: images whose originals are noted as deleted.

    Returns:
        {"flight", "image", "deleted": when, "verdicts": [{"kind", "passed", "date"}]} of each.

    Raises:
        ArchiveError: the store fails.
    """
    known: dict[tuple[str, str], list[Verdict]] = {}
    told = []
    for entry in entries:
        digest, own = record_digest(entry), []
        for kind in KINDS:
            of = entry.flight, kind
            if of not in known:
                known[of] = []
                with suppress(RecordError):  # `info` and `check` tell of damaged ones
                    known[of] = read_verdicts(archive, *of)
            own += [v for v in known[of] if v.images.get(entry.id) == digest]
        verdicts = [{"kind": v.kind, "passed": v.passed, "date": v.date} for v in own]
        name, at = f"{entry.flight}/{entry.id}", retired_at(archive, entry)
        of_it = {"flight": entry.flight, "image": name, "deleted": at}
        told.append({**of_it, "verdicts": verdicts})
    return told


def check_verdicts(archive: Archive) -> list[str]:
    """Verdicts that are damaged, a line each.

    Raises:
        ArchiveError: the store fails.
    """
    problems = []
    for flight, kind in verdict_keys(archive):
        try:
            read_verdicts(archive, flight, kind)
        except ArchiveError as error:
            problems.append(str(error))
    return problems
