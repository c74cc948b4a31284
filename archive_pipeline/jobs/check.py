"""`archive check`: is everything there, whole, decodable, and does the index agree?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from numpy.typing import NDArray

from archive_pipeline.errors import UsageError
from archive_pipeline.geo.georef import Window
from archive_pipeline.jobs._adding_overviews import add_missing
from archive_pipeline.jobs._documents import check_documents
from archive_pipeline.jobs._leftovers import leftover_bytes, remove, stored_bytes, told
from archive_pipeline.jobs._verdicts import check_verdicts
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.index import KEY, differences, is_outdated, read_index, write_index
from archive_pipeline.store.layout import (
    ArchiveError,
    ImageEntry,
    image_name,
    overview_name,
    shard_count,
    shard_windows,
)
from archive_pipeline.store.leftovers import committed, may_be_whole
from archive_pipeline.store.stored_models import read_model, read_policy

MAX_PROBLEMS = 100  # named for each array


@dataclass
class CheckReport:
    """What was checked, and one line for each thing that is broken."""

    images: int = 0
    documents: int = 0
    models: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was left out, left over or mended
    leftover_bytes: int = 0  # of interrupted ingests, still there

    def to_json(self) -> dict[str, Any]:
        """The contract of `archive check --json`."""
        return {
            "passed": not self.problems,
            "images": self.images,
            "documents": self.documents,
            "models": self.models,
            "problems": self.problems,
            "notes": self.notes,
            "leftover_bytes": self.leftover_bytes,
        }


def check(
    archive_url: str,
    progress: Callable[[int], None] = lambda total: None,
    stage: Callable[[str], None] = lambda name: None,
    *,
    repair: bool = False,
    overviews: bool = False,
) -> CheckReport:
    """Check every checksum, decode every tile, compare sizes and the index with the contents.

    Images that are written meanwhile are taken as they were or as they are then.

    Args:
        progress: called after each image with the number of images.
        stage: called with what is done before the first image and after the last.
        repair: write the index anew if it does not agree, and remove what interrupted ingests
            left.
        overviews: give overviews to whole images that have none and are so large that they would
            today; with `repair`.

    Raises:
        UsageError: overviews are asked for without repair.
        ArchiveError: there is no archive to check, or it cannot be repaired.
    """
    if overviews and not repair:
        raise UsageError("--overviews adds to the archive: it needs --repair")
    archive = Archive.open(archive_url, writable=repair)
    report = CheckReport()
    for sha256 in archive.list_names("models"):
        report.models += 1
        _try(report, partial(read_model, archive, sha256))
    for name in archive.list_names("policies"):
        _try(report, partial(read_policy, archive, name.removesuffix(".safetensors")))
    stage("listing images")
    keys = list(archive.keys())
    found: dict[str, ImageEntry] = {}
    left: dict[str, int] = {}
    broken: set[str] = set()
    listed = _listed(archive)
    for key in keys:
        entry, problems = _check_key(archive, key)
        if problems and (archive.is_written() or _now(archive, key) != entry):
            with archive.exclusive(key):  # a writer was at it, or still is
                entry, problems = _check_key(archive, key)
        if entry is not None:
            report.images += 1
            found[key] = entry
        report.problems += problems
        stored, left[key] = stored_bytes(archive, key)
        if entry is not None and not problems and not left[key] and not archive.is_written():
            problems = _compare_size(entry, stored)
            report.problems += problems
        if problems:
            broken.add(key)
        if entry is None and not problems and not archive.is_written():
            _see_to_lost(archive, report, key, key in listed)
        progress(len(keys))
    report.problems += _lacking_models(archive, found.values())
    stage("reading documents")
    lost = _check_documents(archive, report, repair)
    report.problems += check_verdicts(archive)
    if archive.is_written() and not repair:
        report.notes.append(
            f"{KEY} was not compared, nor leftovers looked for: an ingest is running"
        )
        return report
    stage("looking at what interrupted ingests left")
    _see_to_leftovers(archive, report, {k: n for k, n in left.items() if n}, repair)
    report.leftover_bytes += lost
    if overviews:
        stage("adding overviews")
        whole = [entry for key, entry in found.items() if key not in broken]
        added, notes = add_missing(archive, whole, progress)
        report.notes += [*notes, f"overviews were added to {added} images"]
        if added:
            write_index(archive)
            found = {key: entry for key in found if (entry := _now(archive, key)) is not None}
    stage("comparing the index")
    problems, note = _compare_index(archive, found)
    if repair and (problems or note):
        stage("writing the index")
        count = write_index(archive)
        report.notes += [f"was: {line}" for line in problems]
        report.notes.append(f"{KEY} was written anew: {count} images")
        problems, note = _compare_index(archive, found)
    report.problems += problems
    report.notes += note
    return report


def _check_documents(archive: Archive, report: CheckReport, repair: bool) -> int:
    """Check documents; returns the bytes of what interrupted ingests left of them."""

    def count() -> None:
        report.documents += 1

    problems, notes, left = check_documents(archive, repair, count)
    report.problems += problems
    report.notes += notes
    return left


def _lacking_models(archive: Archive, images: Iterable[ImageEntry]) -> list[str]:
    """Models that the archive lacks, even where this process has them from elsewhere."""
    needed = Counter(image.record.get("model") for image in images)
    there = {*archive.list_names("models"), None}
    return [
        f"models/{sha256} is missing: {count} image{'s' * (count > 1)} cannot be decoded without it"
        for sha256, count in needed.items()
        if sha256 not in there
    ]


def _listed(archive: Archive) -> frozenset[str]:
    """Images that the index has, as far as it can be read."""
    try:
        return frozenset(read_index(archive) or ())
    except ArchiveError:
        return frozenset()


def _see_to_lost(archive: Archive, report: CheckReport, key: str, listed: bool) -> None:
    """Tell of an image that may be whole and has no record; what the index has was committed."""
    if may_be_whole(key, archive.stored(key)):
        text = (
            f"{image_name(key)}: its record is missing; what is stored of it stays: ingest it again"
        )
        (report.problems if listed else report.notes).append(text)


def _see_to_leftovers(
    archive: Archive,
    report: CheckReport,
    left: dict[str, int],
    repair: bool,
) -> None:
    """Note what interrupted ingests left of images, or remove it."""
    if repair:
        notes = remove(archive, left)
        report.notes += notes.values()
        left = {key: leftover_bytes(archive, key) for key in left}
    else:
        report.notes += [told(archive, key, size) for key, size in left.items()]
    report.leftover_bytes = sum(left.values())


def _check_key(archive: Archive, key: str) -> tuple[ImageEntry | None, list[str]]:
    """The image at a key, None where none is committed, and what is wrong with it."""
    try:
        entry = committed(archive, key)
    except ArchiveError as error:
        return None, [str(error)]
    return entry, [] if entry is None else check_image(archive, entry)


def _compare_size(entry: ImageEntry, stored: int) -> list[str]:
    """Whether as many bytes are stored as were: others may have put whole shards there."""
    expected = entry.record["archive_bytes"]
    if stored == expected:
        return []
    return [f"{entry.flight}/{entry.id}: {stored} bytes are stored, and {expected} were written"]


def _now(archive: Archive, key: str) -> ImageEntry | None:
    """The image that is committed now, if one is."""
    try:
        return archive.entry(key)
    except ArchiveError:
        return None


def _try(report: CheckReport, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except ArchiveError as error:
        report.problems.append(str(error))
        return None


def check_image(
    archive: Archive,
    entry: ImageEntry,
    see: Callable[[str, Window, NDArray[Any]], None] = lambda name, window, read: None,
) -> list[str]:
    """Read and decode all that is stored of an image; what is wrong with it, a line each.

    Args:
        see: called with each window of "pixels" and "mask" and what was decoded of it; it may
            raise ArchiveError, which is then among the lines.
    """
    image = ArchivedImage(archive, entry)
    problems = []

    def seen(name: str, read: Callable[[Window], Any], window: Window) -> None:
        see(name, window, read(window))

    try:
        source = image.source
        if (source.sha256, source.width, source.height) != tuple(
            entry.record[name] for name in ("sha256", "width", "height")
        ):
            problems.append(f"{entry.flight}/{entry.id}: metadata contradict the record")
    except ArchiveError as error:
        problems.append(str(error))
    try:
        image.detections(len)
    except ArchiveError as error:
        problems.append(str(error))
    problems += _check_array(image, "pixels", partial(seen, "pixels", image.read))
    if not problems and entry.record["codec"] == "jpeg":
        try:
            image.original()
        except ArchiveError as error:
            problems.append(str(error))
    for factor in entry.overviews:
        problems += _check_array(image, overview_name(factor), partial(image.read_overview, factor))
    if entry.record["mask"] != "none":
        problems += _check_array(image, "mask", partial(seen, "mask", image.read_mask))
    return problems


def _check_array(image: ArchivedImage, name: str, read: Callable[..., Any]) -> list[str]:
    problems: list[str] = []
    try:
        array = image.array(name)
        stored, expected = image.count_shards(name), shard_count(array)
        if stored != expected:
            problems.append(
                f"{image.entry.flight}/{image.entry.id}: {name} has {stored} shards, not {expected}"
            )
        for window in shard_windows(array):
            try:
                read(window)
            except ArchiveError as error:
                problems.append(str(error))
                # a forged size must not make this endless
                if len(problems) > MAX_PROBLEMS:
                    break
    except ArchiveError as error:
        problems.append(str(error))
    return problems


def _compare_index(archive: Archive, found: dict[str, ImageEntry]) -> tuple[list[str], list[str]]:
    """What the index says otherwise than the images, a line each; and what else is to be said."""
    try:
        if read_index(archive) is None:
            return [f"{archive.url}: {KEY} is missing; --repair writes it"] if found else [], []
        note = [f"{KEY} is an older release's; --repair makes it fast"] * is_outdated(archive)
        keys = differences(archive, found.values())
        now = {key: _now(archive, key) for key in keys}  # they may have been written since
        there = [entry for entry in now.values() if entry is not None]
        differing = differences(archive, there, keys)
    except ArchiveError as error:
        return [str(error)], []
    problems = []
    for key, is_listed in differing.items():
        if not is_listed:
            problems.append(f"{key}: not in {KEY}")
        elif now[key] is None:
            problems.append(f"{key}: in {KEY}, but no such image is committed")
        else:
            problems.append(f"{key}: {KEY} describes another image")
    return problems, note
