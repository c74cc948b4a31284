"""Files of a flight that are no images and are archived with it, byte for byte.

What positioning, planning and photogrammetry leave beside the frames, and frames in formats that
are not decoded here. Each is a file on its own: what belongs to one image is its sidecar.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from os.path import splitext

from archive_pipeline.flight.locations import Location

MAX_BYTES = 256 << 20
"""Of one document, which is held in memory as a whole."""

# GNSS receivers' own formats and RINEX, DJI's marks of exposures, flight logs.
_LOGS = """.bin .dat .jps .log .mrk .nav .nmea .obs .pos .rnx .rtcm .rtcm3 .rtk .sbf .sp3 .srt .t02
 .t04 .tlog .ubx .ulg"""
# Missions and areas of interest.
_MISSIONS = """.cpg .dbf .geojson .gpkg .gpx .kml .kmz .mission .plan .prj .qpj .shp .shx .waypoints
 .wpml"""
# Control points, exposures' positions, image groups, cameras' calibrations and orientations.
_LISTS = ".cam .csv .ini .json .md .p4d .pdf .tsv .txt .xml .xmp .yaml .yml"
SUFFIXES = frozenset(f"{_LOGS} {_MISSIONS} {_LISTS}".split())
# RINEX 2: .23o, .23n, .23g, ...
_RINEX = re.compile(r"\.\d\d[a-z]")
_FRAMES = """.3fr .arw .avif .cr2 .cr3 .crw .dng .erf .fff .gpr .iiq .kdc .mrw .nef .nrw .orf
 .pef .raf .raw .rw2 .rwl .sr2 .srf .srw .x3f"""
FRAMES = frozenset(_FRAMES.split())
"""Suffixes of frames that are kept as they are: raw ones lose what they are for by decoding."""


@dataclass(frozen=True)
class Document:
    """A file that is archived as it is.

    Attributes:
        below: its path below the flight's directory, with forward slashes.
        path: where it is.
        size: bytes; ``None`` where the listing did not tell.
    """

    below: str
    path: Location
    size: int | None = None

    @property
    def is_frame(self) -> bool:
        """Whether it is a picture that would be an image if its format were read."""
        return splitext(self.below)[1].lower() in FRAMES


def is_document(name: str) -> bool:
    """Whether a file of this name is archived as it is."""
    suffix = splitext(name)[1].lower()
    return suffix in SUFFIXES or suffix in FRAMES or _RINEX.fullmatch(suffix) is not None
