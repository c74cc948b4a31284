"""`archive check`: is everything there, whole, decodable, and does the index agree?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from archive_pipeline.index import KEY, read_index, read_records
from archive_pipeline.store import (
    Archive,
    ArchivedImage,
    ArchiveError,
    ImageEntry,
    shard_count,
    shard_windows,
)

MAX_PROBLEMS = 100  # named for each array


@dataclass
class Report:
    """What was checked, and one line for each thing that is broken."""

    images: int = 0
    models: int = 0
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The contract of `archive check --json`."""
        return {
            "passed": not self.problems,
            "images": self.images,
            "models": self.models,
            "problems": self.problems,
        }


def check(archive_url: str, progress: Callable[[int], None] = lambda total: None) -> Report:
    """Check every checksum, decode every tile, compare the index with the contents.

    Args:
        progress: called after each image with the number of images.

    Raises:
        ArchiveError: there is no archive to check.
    """
    archive = Archive.open(archive_url)
    report = Report()
    for sha256 in archive.list_names("models"):
        report.models += 1
        _try(report, partial(archive.use_model, sha256))
    keys = list(archive.keys())
    found = {}
    for key in keys:
        entry = _try(report, partial(archive.entry, key))
        if entry is not None:
            report.images += 1
            found[key] = entry.record
            report.problems += _check_image(archive, entry)
        progress(len(keys))
    _check_index(archive, report, found)
    return report


def _try(report: Report, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except ArchiveError as error:
        report.problems.append(str(error))
        return None


def _check_image(archive: Archive, entry: ImageEntry) -> list[str]:
    image = archive.image(entry)
    problems = []
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
    problems += _check_array(archive, image, "pixels", image.read)
    if entry.record["mask"] != "none":
        problems += _check_array(archive, image, "mask", image.read_mask)
    return problems


def _check_array(
    archive: Archive, image: ArchivedImage, name: str, read: Callable[..., Any]
) -> list[str]:
    problems: list[str] = []
    try:
        array = image.array(name)
        stored, expected = len(archive.stored(f"{image.entry.key}/{name}")) - 1, shard_count(array)
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


def _check_index(archive: Archive, report: Report, found: dict[str, Any]) -> None:
    try:
        index = read_index(archive)
    except ArchiveError as error:
        report.problems.append(str(error))
        return
    if index is None:
        if found:
            report.problems.append(f"{archive.url}: {KEY} is missing; the next ingest writes it")
        return
    for key in sorted(found.keys() - index.keys()):
        report.problems.append(f"{key}: not in {KEY}")
    for key in sorted(index.keys() - found.keys()):
        report.problems.append(f"{key}: in {KEY}, but no such image is committed")
    records = read_records(archive) or {}  # of an older release's index there are none
    for key in sorted(found.keys() & index.keys()):
        record = json.dumps(found[key])
        told = records[key][1] if key in records else record
        if (index[key], told) != (found[key]["sha256"], record):
            report.problems.append(f"{key}: {KEY} describes another image")
