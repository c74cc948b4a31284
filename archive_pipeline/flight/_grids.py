"""Files that a CRS names as grids: PROJ opens them as soon as GDAL reads the CRS."""

from __future__ import annotations

import html
import mmap
import re
from pathlib import Path

from archive_pipeline.flight._beside import Beside
from archive_pipeline.flight.locations import open_file
from archive_pipeline.flight.sidecars import MAX_TEXT
from archive_pipeline.flight.source_image import SourceError
from archive_pipeline.flight.tiff_directory import first_directory, kept_value
from archive_pipeline.geo.georef import names_files

GEO_TEXT = 34737  # GeoAsciiParams
# Where GDAL looks for a CRS in its auxiliary XML: elements or attributes.
_IN_XML = re.compile(
    r"""<(?:SRS|WKT|Projection)\b[^>]*>(.*?)</|\b(?:SRS|WKT|Projection)\s*=\s*(?:"([^"]*)"|'([^']*)')""",
    re.IGNORECASE | re.DOTALL,
)
_AUXILIARY = re.compile(r"(\.(ovr|msk))*\.aux\.xml")
_IN_BYTES = re.compile(rb"(?i:PARAMETERFILE|PROJ4_GRIDS|grids=)[^\0]{0,256}?[/\\~]")
_SCANNED = ("HFA", "JP2OpenJPEG")  # formats that hold WKT or a GeoTIFF's keys somewhere


def check_grids(path: Path, driver: str, others: Beside) -> None:
    """Refuse an image whose CRS, its own or that of a sidecar, names grids by paths.

    Raises:
        SourceError: one line.
        OSError: it cannot be read.
    """
    if driver == "GTiff" and names_files(_tiff_text(path)):
        raise SourceError(path, "its coordinate reference system names files elsewhere")
    if driver in _SCANNED and _found_in(path):
        raise SourceError(path, "its coordinate reference system names files elsewhere")
    name, stem = path.name.casefold(), path.stem.casefold()
    for folded, other in others.starting(stem):
        beside = path.with_name(other)
        if folded.startswith(name) and _AUXILIARY.fullmatch(folded, len(name)):
            found = _IN_XML.findall(_text(beside))
            bad = any(names_files(html.unescape(text)) for texts in found for text in texts)
        elif folded == f"{stem}.prj":
            bad = names_files(_text(beside))
        else:
            bad = folded in (f"{stem}.aux", f"{name}.aux") and _found_in(beside)
        if bad:
            raise SourceError(path, f"{other} beside it names files elsewhere")


def _tiff_text(path: Path) -> str:
    with open_file(path) as file:
        directory = first_directory(file)
        entry = directory and directory.find(GEO_TEXT)
        return ((entry and kept_value(file, entry)) or b"").decode("latin-1")


def _text(path: Path) -> str:
    try:
        with open_file(path) as file:
            return file.read(MAX_TEXT).decode("utf-8", "replace")
    except OSError:
        return ""  # GDAL cannot read it either


def _found_in(path: Path) -> bool:
    try:
        with open_file(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _IN_BYTES.search(data) is not None
    except (OSError, ValueError):  # it is empty, or cannot be read
        return False
