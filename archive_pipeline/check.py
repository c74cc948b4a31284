"""`archive check`: is everything there, whole, decodable, and does the index agree?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from archive_pipeline.index import KEY, read_index
from archive_pipeline.store import Archive, ArchiveError, ImageEntry, shard_windows


@dataclass
class Report:
    """What was checked, and one line for each thing that is broken."""

    images: int = 0
    models: int = 0
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
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
        _try(report, lambda sha256=sha256: archive.use_model(sha256))  # type: ignore[misc]
    keys = [
        f"flights/{flight}/{name}"
        for flight in archive.list_names("flights")
        if flight != "zarr.json"
        for name in archive.list_names(f"flights/{flight}")
        if name != "zarr.json"
    ]
    found = {}
    for key in keys:
        entry = _try(report, lambda key=key: archive.entry(key))  # type: ignore[misc]
        if entry is not None:
            report.images += 1
            found[key] = entry.record.get("sha256")
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
    readers: list[tuple[str, Callable[..., Any]]] = [("pixels", image.read)]
    if entry.record["mask"] != "none":
        readers.append(("mask", image.read_mask))
    for name, read in readers:
        try:
            for window in shard_windows(image.array(name)):
                try:
                    read(window)
                except ArchiveError as error:
                    problems.append(str(error))
        except ArchiveError as error:
            problems.append(str(error))
    return problems


def _check_index(archive: Archive, report: Report, found: dict[str, Any]) -> None:
    try:
        index = read_index(archive)
    except ValueError as error:
        report.problems.append(f"{archive.url}: {error}")
        return
    if index is None:
        if found:
            report.problems.append(f"{archive.url}: {KEY} is missing; the next ingest writes it")
        return
    for key in sorted(found.keys() - index.keys()):
        report.problems.append(f"{key}: not in {KEY}")
    for key in sorted(index.keys() - found.keys()):
        report.problems.append(f"{key}: in {KEY}, but no such image is committed")
    for key in sorted(found.keys() & index.keys()):
        if index[key] != found[key]:
            report.problems.append(f"{key}: {KEY} describes another image")
