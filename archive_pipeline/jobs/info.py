"""`archive info`: what is in an archive."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from archive_pipeline.jobs._verdicts import tell_verdicts
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.documents import documents
from archive_pipeline.store.index import look
from archive_pipeline.store.layout import ArchiveError, ImageEntry, quote_name
from archive_pipeline.store.retired import noted, retired_key
from archive_pipeline.store.stored_models import decoders_of


@contextmanager
def _uncollected() -> Iterator[None]:
    """Spare the garbage collector millions of objects that are all kept; it takes half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def describe(archive_url: str) -> dict[str, Any]:
    """Return flights, their images and totals, as `archive info --json` prints them.

    Footprints are [[lon, lat], ...] rings in EPSG:4326, transforms six numbers in rasterio's
    order, both None where unknown; sizes are bytes. "models" has, by their SHA-256, what the models
    that the archive carries can decode with: "deterministic" and, with denoising steps,
    "diffusion". Images and documents whose record is damaged are under "damaged", name and error
    each; "retired" of an image says that `retire` deleted its original, so this archive may be all
    that is left of it; "written_by" is the version that made the archive, None before 0.2.0.

    Raises:
        ArchiveError: the archive cannot be used.
    """
    archive = Archive.open(archive_url)
    flights: dict[str, list[dict[str, Any]]] = {}
    damaged: list[dict[str, str]] = []

    def note(name: str, error: ArchiveError) -> None:
        damaged.append({"image": name, "error": str(error)})

    contents = look(archive, damaged=note)
    retired = noted(archive)
    for flight, image in contents.summaries():
        image["retired"] = bool(retired) and retired_key(flight, image["id"]) in retired
        flights.setdefault(flight, []).append(image)
    kept = _documents(archive, note)
    for flight in kept:
        flights.setdefault(flight, [])
    every = [image for images in flights.values() for image in images]
    models = archive.stored("models")
    totals = {
        "flights": len(flights),
        "images": len(every),
        "source_bytes": sum(i["source_bytes"] for i in every),
        "archive_bytes": sum(i["archive_bytes"] for i in every),
        "documents": sum(map(len, kept.values())),
        "document_bytes": sum(d["archive_bytes"] for some in kept.values() for d in some),
        "model_bytes": sum(key.size for key in models.values()),
    }

    def entries_of(flight: str) -> list[ImageEntry]:
        prefix = f"flights/{quote_name(flight)}/"
        return [*contents.entries(note, {k for k in contents.images if k.startswith(prefix)})]

    verdicts = tell_verdicts(archive, entries_of, note)
    listed = [
        {
            "id": flight,
            "images": images,
            "documents": kept.get(flight, []),
            "verdicts": verdicts.get(flight, []),
        }
        for flight, images in flights.items()
    ]
    return {
        "flights": listed,
        "totals": totals,
        "models": decoders_of(models),
        "damaged": damaged,
        "written_by": archive.written_by,
    }


def _documents(
    archive: Archive, damaged: Callable[[str, ArchiveError], None]
) -> dict[str, list[dict[str, Any]]]:
    """Documents by flight, as `archive info --json` has them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in documents(archive, None, damaged):
        item = {
            "path": entry.path,
            "sha256": entry.sha256,
            "source_bytes": entry.size,
            "archive_bytes": entry.archive_bytes,
        }
        found.setdefault(entry.flight, []).append(item)
    return found
