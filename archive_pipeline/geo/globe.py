"""Outlines on the globe: longitudes that pass the antimeridian, outlines that go round a pole.

Longitudes have a period (360 degrees, 400 grads); 181 and -179 are one place. An outline is made
one piece by counting on: 179, 180, 181.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import shapely
from shapely.affinity import translate
from shapely.geometry import box

from archive_pipeline.geo.georef import Ring

Array = npt.NDArray[np.float64]

NOTHING = shapely.Polygon()
ROUNDING = 1e-9
"""As a share of the period; less is an error of the projection."""


def unrolled(lon: Array, lat: Array, period: float = 360.0) -> tuple[Array, Array, bool]:
    """Count an outline's longitudes on, so that no two neighbours are half a turn apart.

    Args:
        lon, lat: float64 (n,), an outline that is not closed, neighbours less than half a turn
            apart.
        period: of the longitudes.

    Returns:
        The closed outline, and whether it goes round a pole: its last longitude is then a turn
        from its first.
    """
    limit = period / 4 * (1 - ROUNDING)
    if lon.max() - lon.min() < period / 2 and -limit < lat.min() and lat.max() < limit:
        return np.append(lon, lon[0]), np.append(lat, lat[0]), False
    polar = np.abs(lat) > limit
    # a corner at the pole has no longitude of its own: it has those of both its neighbours
    at = np.flatnonzero(polar & ~np.roll(polar, 1) & ~np.roll(polar, -1))
    if at.size:
        lon, lat = np.roll(lon, -at[0]), np.roll(lat, -at[0])
        lon = np.concatenate([lon[1:2], lon[1:], lon[-1:]])
        lat = np.concatenate([lat, lat[:1]])
    else:
        lon, lat = np.append(lon, lon[0]), np.append(lat, lat[0])
    lon = np.unwrap(lon, period=period)
    turn = lon[-1] - lon[0]
    if at.size:
        return np.append(lon, lon[0]), np.append(lat, lat[0]), False
    if abs(turn) > period / 2:
        return lon, lat, True
    lon[-1] = lon[0]  # but for rounding it was
    return lon, lat, False


def region(lon: Array, lat: Array, period: float = 360.0) -> shapely.Geometry:
    """The area inside an outline (see `unrolled`), with longitudes that count on."""
    lon, lat, round_pole = unrolled(lon, lat, period)
    if round_pole:
        lon, lat = _with_pole(lon, lat, period)
    return shapely.make_valid(shapely.Polygon(np.column_stack([lon, lat])))


def shared(one: shapely.Geometry, other: shapely.Geometry, period: float) -> shapely.Geometry:
    """What two areas share, whatever turn their longitudes are counted in; in `one`'s turn."""
    west, south, east, north = one.bounds
    left, bottom, right, top = other.bounds
    if not (south <= top and bottom <= north):  # or one is empty
        return NOTHING
    first, last = math.ceil((west - right) / period), math.floor((east - left) / period)
    turned = (translate(other, t * period) if t else other for t in range(first, last + 1))
    parts = [one.intersection(area) for area in turned]
    return parts[0] if len(parts) == 1 else shapely.union_all(parts) if parts else NOTHING


def ring(lon: Array, lat: Array, corner_step: int = 1) -> Ring:
    """A footprint: a closed ring in degrees, its westernmost longitude in -180..180.

    Args:
        lon, lat: float64 (n,), degrees, an outline as `unrolled` takes it.
        corner_step: the ring has every so many of the points; all where it goes round a pole.
    """
    across, up, round_pole = unrolled(lon, lat)
    if round_pole:
        across, up = _with_pole(across, up, 360.0)
    elif len(across) == len(lon) + 1:  # no corner at a pole
        across, up = across[::corner_step], up[::corner_step]
    turn = math.floor((across.min() + 180.0) / 360.0 + ROUNDING)
    if turn:
        across = across - 360.0 * turn
    return tuple((float(x), float(y)) for x, y in zip(across, up, strict=True))


def cut_at_antimeridian(footprint: Sequence[Sequence[float]]) -> shapely.Geometry:
    """A footprint's ring as GeoJSON wants it (RFC 7946): parts within longitudes -180..180.

    A ring that is one place is a point.
    """
    if all(tuple(point) == tuple(footprint[0]) for point in footprint):
        return shapely.Point(footprint[0])
    polygon = shapely.Polygon(footprint)
    west, _, east, _ = polygon.bounds
    if west >= -180.0 and east <= 180.0:
        return polygon
    world = box(-180.0, -90.0, 180.0, 90.0)
    cut = shapely.get_parts(shared(world, shapely.make_valid(polygon), 360.0))
    return shapely.union_all([part for part in cut if part.area > 0.0])


def near(lon: Array, middle: float, period: float) -> Array:
    """The same longitudes within half a turn of another; what is at its ends stays there."""
    return lon - period * np.round((lon - middle) / period * (1 - ROUNDING))


def mean_longitude(lon: Array, period: float = 360.0) -> float:
    """The longitude in the middle of others, whatever turns they are counted in."""
    angles = np.asarray(lon) * (2 * math.pi / period)
    return math.atan2(np.sin(angles).mean(), np.cos(angles).mean()) * period / (2 * math.pi)


def _with_pole(lon: Array, lat: Array, period: float) -> tuple[Array, Array]:
    """Close an outline that goes round a pole along the pole."""
    pole = math.copysign(period / 4, lat.mean())
    return np.concatenate([lon, lon[-1:], lon[:1], lon[:1]]), np.concatenate(
        [lat, [pole, pole], lat[:1]]
    )
