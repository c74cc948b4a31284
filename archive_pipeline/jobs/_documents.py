"""A flight's documents into an archive and back: files that are kept as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from archive_pipeline.flight.documents import MAX_BYTES, Document
from archive_pipeline.flight.find import Flight
from archive_pipeline.flight.locations import Location, read_bytes
from archive_pipeline.flight.restored_tag import is_restored
from archive_pipeline.jobs._targets import Targets
from archive_pipeline.jobs.known_images import RESTORED
from archive_pipeline.outputs.paths import OutputError, document_path
from archive_pipeline.outputs.publish import publish_document
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.documents import (
    document_at,
    document_keys,
    document_name,
    document_strays,
    documents,
    read_document,
    settle_document,
    write_document,
)
from archive_pipeline.store.layout import (
    ArchiveError,
    RecordError,
    document_key,
    unquote_name,
)
from archive_pipeline.store.leases import LeaseHeld, leased

FRAME = (
    "its format is not decoded: kept byte for byte as a document, outside the budget, and no image "
    "of the flight"
)
THREADS = 4  # whose documents are in memory at once


@dataclass(frozen=True)
class DocumentOutcome:
    """What became of a file that is no image.

    Attributes:
        flight: its flight.
        document: its path below the flight's directory.
        path: where it was.
        status: "ingested", "skipped" or "failed".
        error: why it failed, one line.
        warning: what a user should know of it.
        source_bytes, archive_bytes: of the file, and stored for it.
    """

    flight: str
    document: str
    path: str
    status: str
    error: str | None = None
    warning: str | None = None
    source_bytes: int = 0
    archive_bytes: int = 0


def ingest_documents(
    archive: Archive, flights: Iterable[tuple[str, Location, Flight]], overwrite: bool
) -> list[DocumentOutcome]:
    """Archive the documents of flights, a file that cannot be read being an outcome.

    Args:
        flights: their ids, directories and files.
        overwrite: documents that have changed since replace those that are archived.

    Raises:
        ArchiveError: the archive cannot be written.
    """
    outcomes: list[DocumentOutcome] = []
    with ThreadPoolExecutor(THREADS) as threads:
        for id, directory, flight in flights:
            restored = _restored_folders(flight)

            def ingest(
                document: Document,
                id: str = id,
                directory: Location = directory,
                restored: frozenset[str] = restored,
            ) -> DocumentOutcome:
                path = f"{directory}/{document.below}"
                outcome = DocumentOutcome(id, document.below, path, "skipped")
                folders = map(str, PurePosixPath(document.below).parents)
                if not restored.isdisjoint(folders):
                    return replace(outcome, warning=f"skipped: beside it lies what {RESTORED}")
                return _ingest(archive, outcome, document, overwrite)

            outcomes += threads.map(ingest, flight.documents)
    return outcomes


def _restored_folders(flight: Flight) -> frozenset[str]:
    """Folders below a flight's directory whose first image was written by `restore`."""
    first: dict[str, Path] = {}
    for image in flight.images if flight.documents else ():
        if isinstance(image.path, Path):
            first.setdefault(str(PurePosixPath(image.below).parent), image.path)
    return frozenset(folder for folder, path in first.items() if is_restored(path))


def _ingest(
    archive: Archive, outcome: DocumentOutcome, document: Document, overwrite: bool
) -> DocumentOutcome:
    try:
        data = read_bytes(document.path, MAX_BYTES)
    except OSError as error:
        return replace(outcome, status="failed", error=error.strerror or str(error))
    key = document_key(outcome.flight, document.below)
    with archive.exclusive(key):
        try:
            known = document_at(archive, key)
            if known is not None and known.sha256 == hashlib.sha256(data).hexdigest():
                return outcome
            if known is not None and not overwrite:
                changed = "has changed since it was archived; use --overwrite to replace it"
                return replace(outcome, status="failed", error=changed)
        except RecordError:
            pass  # it is written anew
        entry = write_document(archive, outcome.flight, document.below, data)
    return replace(
        outcome,
        status="ingested",
        warning=FRAME if document.is_frame else None,
        source_bytes=entry.size,
        archive_bytes=entry.archive_bytes,
    )


def restore_documents(
    archive: Archive, flight: str | None, output: Path, targets: Targets
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Write a flight's documents, or those of all, below `output`/flight.

    A file that is there stays; where it has the same bytes, that is as good.

    Returns:
        What was written, and what could not be, as `RestoreReport` has them.

    Raises:
        ArchiveError: the store fails.
    """
    files: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []

    def fail(name: str, error: Exception) -> None:
        text = f"{name}: {str(error).removeprefix(f'{name}: ')}"
        failed.append({"image": name, "error": text})

    for entry in documents(archive, flight, fail):
        path = document_path(output, entry.flight, entry.path)
        try:
            targets.check_folder(path.parent)
            publish_document(read_document(archive, entry), path)
        except (ArchiveError, OutputError) as error:
            fail(f"{entry.flight}/{entry.path}", error)
            continue
        files.append({"path": str(path), "flight": entry.flight, "document": entry.path})
    return files, failed


def check_documents(
    archive: Archive, repair: bool, count: Callable[[], None]
) -> tuple[list[str], list[str], int]:
    """Read every document and compare it with its digest.

    Args:
        repair: remove what interrupted ingests left.
        count: called for each document that is whole or damaged.

    Returns:
        Problems, notes, and bytes that interrupted ingests left.

    Raises:
        ArchiveError: the store fails.
    """
    problems: list[str] = []
    notes: list[str] = []
    left = 0
    for key in document_keys(archive):
        try:
            entry = document_at(archive, key)
            if entry is not None:
                count()
                read_document(archive, entry)
        except ArchiveError as error:
            problems.append(str(error))
        if archive.is_written():
            continue  # it may be the one that is being written
        size = sum(stored.size for stored in document_strays(archive, key).values())
        if size:
            removed = repair and _settled(archive, key)
            left += 0 if removed else size
            done = "were removed" if removed else "stay; --repair removes them"
            notes.append(f"{document_name(key)}: {size} bytes of an interrupted ingest {done}")
    return problems, notes, left


def _settled(archive: Archive, key: str) -> bool:
    """Remove what is no part of a document, unless its flight may be written meanwhile."""
    try:
        with (
            leased(archive, [unquote_name(key.split("/")[1])], patient=False) as leases,
            archive.exclusive(key) as held,
        ):
            if held or leases.held:
                settle_document(archive, key)
                return True
    except LeaseHeld:
        pass
    return False
