"""Where the pixels of an image lie on the ground, as it is stored; `mapping` computes with it.

Pixel coordinates are GDAL's: ``(0, 0)`` is the outer corner of the first pixel, columns run right
and rows run down.  Windows are ``(col, row, width, height)``, bounding boxes are
``(west, south, east, north)``.  CRS coordinates are always in the order x (east), y (north).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

Window = tuple[int, int, int, int]
Bbox = tuple[float, float, float, float]
Affine6 = tuple[float, float, float, float, float, float]
Gcp = tuple[float, float, float, float, float, str, str]
Ring = tuple[tuple[float, float], ...]

# What PROJ looks for files by, in WKT and in its own strings.
_FILES = re.compile(r"PARAMETERFILE|_GRIDS|(grids|file|init|model)=", re.IGNORECASE)
_CRS_TEXT = re.compile(r"EPSG:[0-9]{1,9}\Z|[A-Z_]+CR?S\[")


def names_files(crs: str) -> bool:
    """Whether a CRS, WKT or a string of PROJ's, has PROJ open files outside of its own data.

    Names of grids alone are looked for there; those with a path are opened, whatever they are, as
    soon as something is transformed. Names of CRSs may have " / " in them.
    """
    found = re.search(r"[/\\~]", crs.replace(" / ", " "))
    return found is not None and _FILES.search(crs) is not None


@dataclass(frozen=True)
class Georef:
    """Georeference of one image.

    Attributes:
        crs: ``"EPSG:n"`` if the CRS has a code that round-trips exactly, else WKT2; ``None``
            without one.
        transform: ``(a, b, c, d, e, f)`` as rasterio orders it: ``x = a*col + b*row + c`` and
            ``y = d*col + e*row + f``, in units of ``crs``.
        gcps: ground control points ``(row, col, x, y, z, id, info)``, in ``crs``.
        rpcs: GDAL's RPC metadata items as they are.
        footprint: closed ring of ``(longitude, latitude)`` degrees (EPSG:4326) through the four
            image corners; ``None`` where the position is unknown. Across the antimeridian
            longitudes count on (179, 181), so that it is one piece; round a pole it has more
            points, and runs along the pole.
        method: ``"transform"``, ``"gcps"``, ``"rpcs"``, ``"camera"``, ``"point"`` or ``"none"``.
            ``"point"``: only the camera's place is known, and the footprint is that, four times.
    """

    crs: str | None = None
    transform: Affine6 | None = None
    gcps: tuple[Gcp, ...] = ()
    rpcs: dict[str, str] | None = None
    footprint: Ring | None = None
    method: str = "none"

    @property
    def is_mapped(self) -> bool:
        """Whether it is known where each pixel lies."""
        return self.footprint is not None and self.method != "point"

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict of JSON types; `from_json` undoes it exactly."""
        return {
            "crs": self.crs,
            "transform": None if self.transform is None else list(self.transform),
            "gcps": [list(gcp) for gcp in self.gcps],
            "rpcs": None if self.rpcs is None else dict(self.rpcs),
            "footprint": None if self.footprint is None else [list(p) for p in self.footprint],
            "method": self.method,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Georef:
        """Rebuild a georeference from `to_json`'s dict.

        Raises:
            ValueError: its CRS is no code and no WKT (GDAL would take it for a file's name or
                URL), or names files.
        """
        transform, footprint = data["transform"], data["footprint"]
        if data["crs"] is not None and not _CRS_TEXT.match(data["crs"]):
            raise ValueError(f"not a CRS: {data['crs'][:60]!r}")
        if data["crs"] is not None and names_files(data["crs"]):
            raise ValueError(f"a CRS that names files elsewhere: {data['crs'][:60]!r}")
        return cls(
            crs=data["crs"],
            transform=None if transform is None else tuple(transform),
            gcps=tuple(tuple(gcp) for gcp in data["gcps"]),
            rpcs=data["rpcs"],
            footprint=None if footprint is None else tuple((p[0], p[1]) for p in footprint),
            method=data["method"],
        )
