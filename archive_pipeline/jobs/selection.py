"""Which archived images are meant, and which window of each."""

from __future__ import annotations

from dataclasses import dataclass

from archive_pipeline.errors import did_you_mean
from archive_pipeline.geo.georef import Bbox, Georef, Window
from archive_pipeline.geo.mapping import bbox_to_window, check_bbox
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.index import look
from archive_pipeline.store.layout import ArchiveError, ImageEntry

LISTED = 5  # flights that an error names


@dataclass(frozen=True)
class Selection:
    """Which images to restore, and which part of each.

    Attributes:
        bbox: west, south, east, north in `bbox_crs`; whole images without one.
        flight: only this flight.
        images: ids, or "flight/id"; all where empty.
    """

    bbox: Bbox | None = None
    bbox_crs: str = "EPSG:4326"
    flight: str | None = None
    images: tuple[str, ...] = ()


def select(
    archive: Archive, selection: Selection
) -> tuple[list[tuple[ImageEntry, Window]], list[dict[str, str]]]:
    """Images and windows that a selection means, in the archive's order.

    Returns:
        The images with their windows, and {"image", "error"} of those that may be meant but whose
        records are damaged.

    Raises:
        ArchiveError: a flight or image is not in the archive.
        ValueError: the bounding box or its CRS is invalid.
    """
    if selection.bbox is not None:
        check_bbox(selection.bbox, selection.bbox_crs)
    if selection.flight is not None and selection.flight not in (flights := archive.flights()):
        hint = did_you_mean(selection.flight, flights)
        raise ArchiveError(f"{archive.url}: no flight {selection.flight}{hint or _some(flights)}")
    wanted = set(selection.images)
    found: set[str] = set()
    chosen = []
    failed: list[dict[str, str]] = []

    def note(name: str, error: ArchiveError) -> None:
        names = {name, name.partition("/")[2]}
        found.update(names)
        if not wanted or wanted & names:
            failed.append({"image": name, "error": str(error)})

    contents = look(archive, selection.flight, note)
    keys: set[str] | None = None
    if wanted:
        keys = {k for k, flight, id in contents.names() if wanted & {id, f"{flight}/{id}"}}
    elif selection.bbox is not None:
        keys = contents.near(selection.bbox, selection.bbox_crs)
    for entry in contents.entries(note, keys):
        names = {entry.id, f"{entry.flight}/{entry.id}"}
        if wanted and not wanted & names:
            continue
        found |= names
        width, height = entry.record["width"], entry.record["height"]
        window: Window | None = (0, 0, width, height)
        if selection.bbox is not None:
            georef = Georef.from_json(entry.record["georef"])
            try:
                window = bbox_to_window(georef, width, height, selection.bbox, selection.bbox_crs)
            except Exception as error:  # the box is fine, so the image's own georeference is not
                name = f"{entry.flight}/{entry.id}"
                failed.append({"image": name, "error": f"{name}: georeference: {error}"})
                continue
        if window is not None:
            chosen.append((entry, window))
    missing = sorted(wanted - found)
    if missing:
        known = {name for _, flight, id in contents.names() for name in (id, f"{flight}/{id}")}
        hints = [f"no image {name}{did_you_mean(name, known)}" for name in missing]
        raise ArchiveError(f"{archive.url}: {', '.join(hints)}")
    return chosen, failed


def _some(flights: list[str]) -> str:
    """The first of an archive's flights, for who asked for one that is not there."""
    listed = ", ".join(flights[:LISTED]) or "none"
    more = f" and {len(flights) - LISTED} more" if len(flights) > LISTED else ""
    return f" (there are: {listed}{more})"
