"""PIX4Dmapper's calibrated cameras: `PROJECT_calibrated_external_camera_parameters[_wgs84].txt`.

Columns are told by their header. Omega, phi and kappa turn the image (x right, y up, z backwards)
into the grid of the project's CRS, one after the other about its x, y and z (PIX4D's articles
202977149, on the folder `params`, and 202558969, on the angles). Beside it may lie
`PROJECT_wkt.prj`, that CRS, and `PROJECT_calibrated_camera_parameters.txt`, the lenses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pyproj import CRS, Proj, Transformer

from archive_pipeline.geo.georef import names_files
from archive_pipeline.geo.lens import Lens, bent

Array = npt.NDArray[np.float64]
NAME = re.compile(r"calibrated_external_camera_parameters(_wgs84)?\.txt", re.IGNORECASE)
SECTION = 1 + 3 + 1 + 1 + 1 + 3  # lines of an image's lens and place


@dataclass(frozen=True)
class Shot:
    """One image's calibrated camera.

    Attributes:
        lon, lat, altitude: degrees of WGS 84, metres in the project's vertical datum.
        rotation: rows are the image's right, its down and the optical axis, in east, north, up.
        lens: its lens, where the file of them is there.
    """

    name: str
    lon: float
    lat: float
    altitude: float
    rotation: Array
    lens: Lens | None


def read_external(path: Path, text: str) -> Iterator[Shot]:
    """Read the cameras of a project.

    Args:
        path: of the file, beside which others are looked for.
        text: its contents.

    Raises:
        ValueError, KeyError: they are none, or their CRS is not there.
    """
    head, *lines = text.strip().splitlines()
    columns = [name.casefold() for name in head.split()]
    prefix = NAME.sub("", path.name)
    crs = _crs_beside(path.with_name(f"{prefix}wkt.prj"))
    lenses = _lenses(path.with_name(f"{prefix}calibrated_camera_parameters.txt"))
    geographic = "latitude" in columns
    if not geographic and crs is None:
        raise ValueError(
            f"{prefix}wkt.prj is not beside it; the file that ends in _wgs84 does without"
        )
    to_degrees = None if geographic else Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    for line in lines:
        name, *numbers = line.rsplit(maxsplit=len(columns) - 1)
        said = dict(zip(columns[1:], map(float, numbers), strict=True))
        if to_degrees is None:
            lon, lat, altitude = said["longitude"], said["latitude"], said["altitude"]
        else:
            lon, lat = to_degrees.transform(said["x"], said["y"])
            altitude = said["z"]
        turned = from_angles(said["omega"], said["phi"], said["kappa"])
        rotation = turned @ grid_axes(lon, lat, crs)
        yield Shot(name, lon, lat, altitude, rotation, lenses.get(name))


def from_angles(omega: float, phi: float, kappa: float) -> Array:
    """Rows: an image's right, its down and the optical axis, by angles in degrees."""
    (co, so), (cp, sp), (ck, sk) = (
        (math.cos(a), math.sin(a)) for a in map(math.radians, (omega, phi, kappa))
    )
    about_x = np.array([[1, 0, 0], [0, co, -so], [0, so, co]])
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_z = np.array([[ck, -sk, 0], [sk, ck, 0], [0, 0, 1.0]])
    right, up, backwards = (about_x @ about_y @ about_z).T
    return np.array([right, -up, -backwards])


def grid_axes(lon: float, lat: float, crs: CRS | None) -> Array:
    """Rows: the axes of a CRS' grid at a place, in east, north, up; of its UTM zone without one."""
    if crs is None or not crs.is_projected:
        zone = min(int((lon + 180) // 6) + 1, 60)
        projection = Proj(proj="utm", zone=zone, south=lat < 0, ellps="WGS84")
    else:
        projection = Proj(crs)
    turn = math.radians(projection.get_factors(lon, lat).meridian_convergence)
    c, s = math.cos(turn), math.sin(turn)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _crs_beside(path: Path) -> CRS | None:
    try:
        text = path.read_text("utf-8-sig").strip()
    except FileNotFoundError:
        return None
    if names_files(text):
        raise ValueError(f"the CRS in {path.name} names files elsewhere")
    return CRS.from_user_input(text)


def _lenses(path: Path) -> dict[str, Lens]:
    """Lenses by images; none without the file."""
    try:
        lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        return {}
    start = next(i for i, line in enumerate(lines) if line.startswith("camera model")) + 1
    found = {}
    for at in range(start, len(lines) - SECTION + 1, SECTION):
        name, *size = lines[at].rsplit(maxsplit=2)
        width, height = map(float, size)
        first, second = ([float(n) for n in lines[at + row].split()] for row in (1, 2))
        longer = max(width, height)
        centre = (first[2] - width / 2) / longer, (second[2] - height / 2) / longer
        radial = [float(n) for n in lines[at + 4].split()]
        found[name] = Lens(first[0] / longer, centre, bent(radial))
    return found
