"""`archive info`: what is in an archive."""

from __future__ import annotations

from typing import Any

from archive_pipeline.store.archive import Archive
from archive_pipeline.store.index import read_images
from archive_pipeline.store.layout import ArchiveError


def describe(archive_url: str) -> dict[str, Any]:
    """Return flights, their images and totals, as `archive info --json` prints them.

    Footprints are [[lon, lat], ...] rings in EPSG:4326, transforms six numbers in rasterio's
    order, both None where unknown; sizes are bytes. Images whose record is damaged are under
    "damaged", name and error each.

    Raises:
        ArchiveError: the archive cannot be used.
    """
    archive = Archive.open(archive_url)
    flights: dict[str, list[dict[str, Any]]] = {}
    damaged: list[dict[str, str]] = []

    def note(name: str, error: ArchiveError) -> None:
        damaged.append({"image": name, "error": str(error)})

    for entry in read_images(archive, damaged=note):
        record = entry.record
        georef = record["georef"]
        flights.setdefault(entry.flight, []).append(
            {
                "id": entry.id,
                "width": record["width"],
                "height": record["height"],
                "codec": record["codec"],
                "crs": georef["crs"],
                "transform": georef["transform"],
                "footprint": georef["footprint"],
                "captured": record["captured"],
                "source_bytes": record["source_bytes"],
                "archive_bytes": record["archive_bytes"],
            }
        )
    every = [image for images in flights.values() for image in images]
    totals = {
        "flights": len(flights),
        "images": len(every),
        "source_bytes": sum(i["source_bytes"] for i in every),
        "archive_bytes": sum(i["archive_bytes"] for i in every),
        "model_bytes": archive.size_of("models"),
    }
    listed = [{"id": flight, "images": images} for flight, images in flights.items()]
    return {"flights": listed, "totals": totals, "damaged": damaged}
