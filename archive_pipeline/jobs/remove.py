"""Images taken out of an archive for good, with what is there for them alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from archive_pipeline.errors import did_you_mean
from archive_pipeline.jobs.ingested import forget_sources
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.documents import document_keys, document_name
from archive_pipeline.store.index import read_images, read_index, settle_index, write_index
from archive_pipeline.store.layout import (
    ArchiveError,
    RecordError,
    image_key,
    image_name,
    quote_name,
)
from archive_pipeline.store.leases import leased
from archive_pipeline.store.leftovers import committed, may_be_whole
from archive_pipeline.store.retired import count_retired, forget_retired
from archive_pipeline.store.verdicts import void_verdicts


@dataclass
class RemoveReport:
    """What was removed, or would be.

    Attributes:
        done: whether it was.
        images, documents: names ("flight/id", "flight/path") with their bytes.
        models: keys of models and policies that nothing used any more.
        bytes: of all that.
        notes: what stays although nothing uses it, and why.
    """

    done: bool
    images: dict[str, int] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The contract of `archive remove --json`."""
        return {
            "removed": self.done,
            "images": [{"image": name, "bytes": size} for name, size in self.images.items()],
            "documents": [{"document": n, "bytes": size} for n, size in self.documents.items()],
            "models": self.models,
            "bytes": self.bytes,
            "notes": self.notes,
        }


def remove(
    archive_url: str,
    flight: str,
    images: Collection[str] = (),
    *,
    yes: bool = False,
    progress: Callable[[int], None] = lambda total: None,
    stage: Callable[[str], None] = lambda name: None,
) -> RemoveReport:
    """Remove images of a flight, or the flight with its documents; what is damaged, too.

    Each image goes record first, so that readers see all of it or nothing. Interrupted, it can be
    run again. Models and policies that no image uses any more go as well, unless an ingest is
    running.

    Args:
        flight: its id.
        images: ids; the whole flight without any.
        yes: remove them; else only tell what would go.
        progress: called after each image and document with their number.
        stage: called with what is done before the first and after the last.

    Raises:
        ArchiveError: there is no such archive, flight or image; or the store fails.
    """
    archive = Archive.open(archive_url, writable=yes)
    stage("listing images")
    keys = _images(archive, flight, images)
    documents = [] if images else document_keys(archive, flight)
    report = RemoveReport(yes)
    report.images = {image_name(key): archive.size_of(key) for key in keys}
    report.documents = {document_name(key): archive.size_of(key) for key in documents}
    report.bytes = sum((*report.images.values(), *report.documents.values()))
    lost = count_retired(archive, flight, [image_name(key).partition("/")[2] for key in keys])
    if lost:
        report.notes.append(f"the originals of {lost} of them were deleted by archive retire")
    if not yes:
        return report
    ids = [image_name(key).partition("/")[2] for key in keys] if images else None
    with leased(archive, [flight]) as leases, archive.writing():
        with suppress(ArchiveError):  # a full disk has room for what is left of them below
            void_verdicts(archive, flight, ids)
        gone = [image_name(key).partition("/")[2] for key in keys]
        forget_retired(archive, flight, gone)
        for key in (*keys, *documents):
            leases.check()
            with archive.exclusive(key):
                archive.delete(list(archive.stored(key)))
                archive.prune(key)
            progress(len(keys) + len(documents))
        void_verdicts(archive, flight, ids)
        _remove_groups(archive, flight)
        if not images:
            forget_sources(archive_url, flight)
        stage("writing the index")
        write_index(archive)
        settle_index(archive)
    stage("looking for models that nothing uses")
    _remove_models(archive, report)
    return report


def _images(archive: Archive, flight: str, images: Collection[str]) -> list[str]:
    """Group paths of the images that are meant: committed, damaged, or left by a removal.

    Raises:
        ArchiveError: one is not there.
    """
    prefix = f"flights/{quote_name(flight)}/"
    there = {*archive.keys(flight), *(key for key in _indexed(archive) if key.startswith(prefix))}
    if not images:
        flights = archive.flights()
        if not there and flight not in flights and not document_keys(archive, flight):
            hint = did_you_mean(flight, flights)
            raise ArchiveError(f"{archive.url}: no flight {flight}{hint}")
        return sorted(there)
    wanted = {image_key(flight, id): id for id in images}
    missing = sorted(id for key, id in wanted.items() if key not in there)
    if missing:
        known = [image_name(key).partition("/")[2] for key in there]
        hints = [f"no image {id} in {flight}{did_you_mean(id, known)}" for id in missing]
        raise ArchiveError(f"{archive.url}: {', '.join(hints)}")
    return sorted(wanted)


def _indexed(archive: Archive) -> Collection[str]:
    """Images that the index has, as far as it can be read: it is written anew."""
    try:
        return read_index(archive) or ()
    except ArchiveError:
        return ()


def _remove_groups(archive: Archive, flight: str) -> None:
    """Remove a flight's groups, unless an ingest has put something in them meanwhile."""
    for root in ("flights", "documents"):
        key = f"{root}/{quote_name(flight)}"
        if archive.list_names(key) in ([], ["zarr.json"]):
            archive.delete(list(archive.stored(key)))
            archive.prune(key)


def _remove_models(archive: Archive, report: RemoveReport) -> None:
    """Remove models that no image is coded with, and policies, which serve ingests alone."""
    unused = _unused(archive, report)
    if not unused:
        return
    if archive.is_written() or archive.list_names("leases"):
        report.notes.append("models that nothing uses stay: an ingest is running")
        return
    with archive.alone():
        for key in _unused(archive, report):  # an ingest may have ended just now
            report.bytes += archive.size_of(key)
            archive.delete(list(archive.stored(key)) or [key])
            archive.prune(key)
            report.models.append(key)


def _unused(archive: Archive, report: RemoveReport) -> list[str]:
    """Keys of models and policies that nothing uses; none where that is not known of an image."""
    found = {e.key: e for e in read_images(archive, None, lambda name, error: None)}
    used = {image.record.get("model") for image in found.values()}
    models = [sha256 for sha256 in archive.list_names("models") if sha256 not in used]
    policies = [] if used else archive.list_names("policies")
    if not models and not policies:
        return []
    for key in archive.keys(None):
        if key not in found and _may_be_image(archive, key):
            note = f"models stay that {image_name(key)} may need, whose record is damaged"
            report.notes += [note] if note not in report.notes else []
            return []
    return [*(f"models/{name}" for name in models), *(f"policies/{name}" for name in policies)]


def _may_be_image(archive: Archive, key: str) -> bool:
    """Whether something that is no committed image may be one that was."""
    try:
        return committed(archive, key) is not None or may_be_whole(key, archive.stored(key))
    except RecordError:
        return True
