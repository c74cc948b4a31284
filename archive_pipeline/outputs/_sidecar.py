"""GDAL's `.aux.xml`: georeference and tags that an image file has no place for."""

from __future__ import annotations

import re
from xml.sax.saxutils import escape, quoteattr

import pyproj
from rasterio.crs import CRS

from archive_pipeline.flight.xmp import parsed
from archive_pipeline.geo.georef import Georef

DEEP = "/".join("*" * 64)
_DECLARATION = re.compile(r"^\s*<\?xml\b[^>]*>")
MADE_NAMESPACES = frozenset(
    ("COLOR_PROFILE", "IMAGE_STRUCTURE", "DERIVED_SUBDATASETS", "SUBDATASETS", "OVERVIEWS")
)
"""Namespaces of tags that GDAL makes from a file's other parts, or opens other files for."""


def auxiliary_xml(
    georef: Georef,
    tags: dict[str, dict[str, str]] | None = None,
    band_tags: tuple[dict[str, dict[str, str]], ...] = (),
    classes: dict[int, str] | None = None,
) -> str:
    """Return a georeference and the tags of custom namespaces as GDAL's auxiliary XML, or "".

    Args:
        classes: what bands' values mean, as `flight.classes` has it.
    """
    lines = []
    wkt = CRS.from_user_input(georef.crs).to_wkt() if georef.crs else ""
    # GDAL would otherwise take latitude first for the CRSs that are defined so.
    axes = f'dataAxisToSRSAxisMapping="{"2,1" if _latitude_first(wkt) else "1,2"}"'
    if georef.transform is not None:
        a, b, c, d, e, f = georef.transform
        if wkt:
            lines.append(f"  <SRS {axes}>{escape(wkt)}</SRS>")
        order = ", ".join(repr(float(v)) for v in (c, a, b, f, d, e))
        lines.append(f"  <GeoTransform>{order}</GeoTransform>")
    elif georef.gcps:
        lines.append(f"  <GCPList Projection={quoteattr(wkt)} {axes}>")
        for row, col, x, y, z, name, info in georef.gcps:
            lines.append(
                f"    <GCP Id={quoteattr(name)} Info={quoteattr(info)} "
                f'Pixel="{col!r}" Line="{row!r}" X="{x!r}" Y="{y!r}" Z="{z!r}"/>'
            )
        lines.append("  </GCPList>")
    if georef.rpcs:
        lines += _pam_metadata({"RPC": georef.rpcs})
    lines += _pam_metadata(tags or {})
    named = classes or {}
    for band in range(1, max([len(band_tags), *named]) + 1):
        inner = _pam_metadata(band_tags[band - 1] if band <= len(band_tags) else {})
        inner += [named[band]] if band in named else []
        if inner:
            lines += [f'  <PAMRasterBand band="{band}">', *inner, "  </PAMRasterBand>"]
    return "\n".join(["<PAMDataset>", *lines, "</PAMDataset>", ""]) if lines else ""


def _pam_metadata(tags: dict[str, dict[str, str]]) -> list[str]:
    lines = []
    for namespace, items in tags.items():
        if namespace in ("", "xml:XMP") or namespace.upper() in MADE_NAMESPACES:
            continue
        if namespace.startswith("xml:"):
            lines += _pam_documents(namespace, items)
            continue
        lines.append(f"  <Metadata domain={quoteattr(namespace)}>")
        for key, value in items.items():
            lines.append(f"    <MDI key={quoteattr(key)}>{escape(value)}</MDI>")
        lines.append("  </Metadata>")
    return lines


def _pam_documents(namespace: str, items: dict[str, str]) -> list[str]:
    """Namespaces that are XML: of JPEG 2000's boxes, or the user's own."""
    lines = []
    for document in items.values():
        root = parsed(document)
        if root is None or root.find(DEEP) is not None:
            continue  # GDAL would read nothing of a file with it
        text = _DECLARATION.sub("", document[: document.rfind(">") + 1])
        head = f'  <Metadata domain={quoteattr(namespace)} format="xml">'
        lines.append(f"{head}{text}</Metadata>")
    return lines


def _latitude_first(wkt: str) -> bool:
    return bool(wkt) and pyproj.CRS.from_wkt(wkt).axis_info[0].direction == "north"
