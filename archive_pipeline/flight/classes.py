"""Names of classes and attribute tables of a raster, which lie in GDAL's `.aux.xml` beside it.

rasterio reads neither. Elements are those of GDAL's PAM (its data/pamdataset.xsd).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from archive_pipeline.flight._beside import beside
from archive_pipeline.flight._metadata_blocks import Block
from archive_pipeline.flight.formats import IMAGE_SUFFIXES
from archive_pipeline.flight.locations import read_bytes
from archive_pipeline.flight.source_image import Notes
from archive_pipeline.flight.xmp import parsed

BLOCK = "PAM"
ELEMENTS = ("CategoryNames", "GDALRasterAttributeTable")
MAX_BYTES = 16 << 20  # of a sidecar with them; as a tree they take ten times as much


def class_blocks(path: Path, notes: Notes) -> list[Block]:
    """What of the `.aux.xml` beside an image says what its values mean, as one block or none.

    Args:
        path: of the image.
        notes: are told of what is left out.
    """
    name = f"{path.name}.aux.xml".casefold()
    for folded, other in beside(path.parent, IMAGE_SUFFIXES).starting(name):
        if folded != name:
            continue
        try:
            data = read_bytes(path.with_name(other), MAX_BYTES)
        except OSError as error:
            notes.leave_out(f"classes in {other} are not kept: {error.strerror or error}")
            return []
        bands = _bands(data)
        if not bands:
            return []
        root = ElementTree.Element("PAMDataset")
        for band, elements in bands.items():
            ElementTree.SubElement(root, "PAMRasterBand", band=str(band)).extend(elements)
        return [(BLOCK, ElementTree.tostring(root, "utf-8"))]
    return []


def classes_of(metadata: Iterable[Block]) -> dict[int, str]:
    """What values mean, by the numbers of bands: GDAL's elements, as text."""
    payload = next((payload for name, payload in metadata if name == BLOCK), b"")
    return {
        band: "".join(ElementTree.tostring(element, "unicode") for element in elements)
        for band, elements in _bands(payload[:MAX_BYTES]).items()
    }


def _bands(data: bytes) -> dict[int, list[ElementTree.Element]]:
    """Elements of interest by bands, of a document that may be anybody's."""
    if not any(element.encode() in data for element in ELEMENTS):
        return {}
    root = parsed(data.decode("utf-8-sig", "replace"))
    found: dict[int, list[ElementTree.Element]] = {}
    for band in [] if root is None else root.iterfind("PAMRasterBand"):
        number = band.get("band", "")
        # what is deeper than a field of a row is none of GDAL's
        elements = [e for e in band if e.tag in ELEMENTS and e.find("*/*/*") is None]
        if elements and re.fullmatch("[1-9][0-9]{0,4}", number, re.ASCII):
            found.setdefault(int(number), []).extend(elements)
    return found
