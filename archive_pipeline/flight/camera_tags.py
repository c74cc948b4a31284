"""What a camera wrote of itself into EXIF and XMP, as a pose.

Broken blocks count as absent; nothing in them can raise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image
from pyproj import Geod

from archive_pipeline.flight.camera_dialects import (
    Dialect,
    number,
    parse,
    spoken,
    text,
    unknown_angles,
)
from archive_pipeline.flight.xmp import Xmp
from archive_pipeline.geo.pose import CameraPose

WGS84 = Geod(ellps="WGS84")
CONTRADICTION_M = 100.0  # that positions of EXIF and XMP may be apart
EXIF_IFD, GPS_IFD = 0x8769, 0x8825
MAKE, MODEL = 0x010F, 0x0110
FOCAL_MM, FOCAL_35MM, ZOOM = 0x920A, 0xA405, 0xA404
PLANE_X, PLANE_UNIT, PIXELS_X = 0xA20E, 0xA210, 0xA002
DATE_ORIGINAL, OFFSET_ORIGINAL, SUBSEC_ORIGINAL = 0x9003, 0x9011, 0x9291
LAT_REF, LAT, LON_REF, LON, ALTITUDE_REF, ALTITUDE, DIRECTION_REF, DIRECTION = (
    1, 2, 3, 4, 5, 6, 16, 17,
)  # fmt: skip
# EXIF's words on accuracy and datum, by the names that exiftool has for them.
GPS_SURVEY = {
    11: "GPSDOP",
    18: "GPSMapDatum",
    30: "GPSDifferential",
    31: "GPSHPositioningError",
}
BELOW = (1, b"\x01", 3, b"\x03")  # GPSAltitudeRef: below sea level, below the ellipsoid
ELLIPSOID = (2, b"\x02", 3, b"\x03")  # EXIF 3.0
# FocalPlaneResolutionUnit; 4 and 5 are Adobe's and exiftool's.
UNIT_MM = {1: 25.4, 2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}
XMP_EXIF = "http://ns.adobe.com/exif/1.0"
XMP_TIMES = (
    ("http://ns.adobe.com/xap/1.0", "CreateDate"),
    (XMP_EXIF, "DateTimeOriginal"),
    ("http://ns.adobe.com/photoshop/1.0", "DateCreated"),
)
XMP_TIFF = "http://ns.adobe.com/tiff/1.0"
_XMP_DEGREES = re.compile(r"(\d{1,3}),(\d{1,2}(?:\.\d{1,15})?)(?:,(\d{1,2}))?([NSEW])")


def read_pose(exif: bytes, xmp: Xmp = Xmp()) -> tuple[CameraPose | None, str | None]:  # noqa: B008
    """Read a camera's pose and time of capture from its metadata.

    Args:
        exif: a TIFF structure, with or without the leading ``Exif\\0\\0``; may be empty.
        xmp: what `read_xmp` found.

    Returns:
        The pose, ``None`` where neither says anything of a camera, and the time of capture in
        ISO 8601, with fraction and UTC offset where they are given, or ``None``.
    """
    main, detail, gps = _read_exif(exif)
    make = _text(main.get(MAKE)) or xmp.text(XMP_TIFF, "Make") or ""
    dialects = spoken(xmp, make)
    warnings: list[str] = []
    if xmp.damaged:
        warnings.append("XMP is damaged: what can be read of it counts")
    lon, lat = _position(gps, xmp, dialects, warnings)
    altitude = _number(gps.get(ALTITUDE))
    if altitude is not None and gps.get(ALTITUDE_REF) in BELOW:
        altitude = -altitude
    pose = CameraPose(
        lon=lon,
        lat=lat,
        altitude_gps_m=altitude,
        altitude_relative_m=_first(xmp, dialects, "height"),
        focal_35mm=_positive(detail.get(FOCAL_35MM)),
        focal_mm=_positive(detail.get(FOCAL_MM)) or _positive(_first(xmp, dialects, "focal_mm")),
        make=make,
        model=_text(main.get(MODEL)) or xmp.text(XMP_TIFF, "Model") or "",
        pixel_mm=_pixel_mm(detail),
        pixels_wide=_positive(detail.get(PIXELS_X)),
        focal_px=_positive(_first(xmp, dialects, "focal_px")),
        centre_px=_centre(xmp, dialects),
        digital_zoom=_positive(detail.get(ZOOM)),
        survey=_survey(gps, xmp, dialects),
        **_angles(gps, xmp, dialects, warnings),
        warnings=tuple(warnings),
    )
    captured = _exif_time(detail) or _xmp_time(xmp)
    known = (pose.lon, pose.altitude_relative_m, pose.focal_35mm, pose.focal_mm, pose.pitch_deg)
    silent = all(value is None for value in known) and not (pose.make or pose.model)
    return None if silent else pose, captured


def _angles(
    gps: dict[int, Any], xmp: Xmp, dialects: tuple[Dialect, ...], warnings: list[str]
) -> dict[str, Any]:
    """Yaw, pitch, roll and mount of the first dialect that has them, pitch as DJI counts it."""
    for dialect in dialects:
        yaw, pitch = (number(xmp, dialect, names) for names in (dialect.yaw, dialect.pitch))
        if yaw is None and pitch is None:
            continue
        roll = number(xmp, dialect, dialect.roll)
        return {
            "yaw_deg": yaw if yaw is not None else _direction(gps, warnings),
            "pitch_deg": None if pitch is None else pitch - dialect.nadir - 90.0,
            "roll_deg": None if roll is None else roll * dialect.roll_sign,
            "mount": dialect.mount,
            "dialect": dialect.name,
        }
    unknown = unknown_angles(xmp)
    if unknown is not None:
        warnings.append(f"angles of an unknown dialect of XMP are not read ({unknown})")
    return {"yaw_deg": _direction(gps, warnings)}


def _direction(gps: dict[int, Any], warnings: list[str]) -> float | None:
    yaw = _number(gps.get(DIRECTION))
    if yaw is not None and gps.get(DIRECTION_REF) == "M":
        warnings.append("yaw is against magnetic north; declination is not corrected")
    return yaw


def _position(
    gps: dict[int, Any], xmp: Xmp, dialects: tuple[Dialect, ...], warnings: list[str]
) -> tuple[float | None, float | None]:
    """Longitude and latitude: EXIF's, with XMP's signs where EXIF has none, or XMP's."""
    lon, lat = _dms(gps.get(LON), 180.0), _dms(gps.get(LAT), 90.0)
    # Cameras without a fix write zeros, and no drone has mapped that spot of the Atlantic.
    if lon is None or lat is None or (lon == 0.0 and lat == 0.0):
        lon = lat = None
    other = _xmp_position(xmp, dialects)
    if lon is None or lat is None:
        return other
    signs = [
        _sign(gps.get(ref), positive, negative)
        for ref, positive, negative in ((LON_REF, "E", "W"), (LAT_REF, "N", "S"))
    ]
    if None in signs:
        if other[0] is not None and other[1] is not None:
            signs = [
                given or math.copysign(1.0, value)
                for given, value in zip(signs, (other[0], other[1]), strict=True)
            ]
        else:
            warnings.append("GPS has no hemisphere: north and east are assumed")
    lon, lat = lon * (signs[0] or 1.0), lat * (signs[1] or 1.0)
    if other[0] is not None and other[1] is not None:
        apart = WGS84.inv(lon, lat, other[0], other[1])[2]
        if apart > CONTRADICTION_M:
            warnings.append(f"positions of EXIF and XMP are {apart:.0f} m apart; EXIF's counts")
    return lon, lat


def _xmp_position(xmp: Xmp, dialects: tuple[Dialect, ...]) -> tuple[float | None, float | None]:
    for dialect in dialects:
        lon, lat = (number(xmp, dialect, names) for names in (dialect.lon, dialect.lat))
        if lon is not None and lat is not None and (lon or lat):
            return (lon, lat) if abs(lon) <= 180.0 and abs(lat) <= 90.0 else (None, None)
    found = []
    for name, limit in (("GPSLongitude", 180.0), ("GPSLatitude", 90.0)):
        match = _XMP_DEGREES.fullmatch(xmp.text(XMP_EXIF, name) or "")
        if match is None:
            return None, None
        degrees = int(match[1]) + float(match[2]) / 60 + int(match[3] or 0) / 3600
        if degrees > limit:
            return None, None
        found.append(-degrees if match[4] in "SW" else degrees)
    return found[0], found[1]


def _sign(ref: Any, positive: str, negative: str) -> float | None:
    letter = ref[:1].upper() if isinstance(ref, str) else ""
    return {positive: 1.0, negative: -1.0}.get(letter)


def _first(xmp: Xmp, dialects: tuple[Dialect, ...], field: str) -> float | None:
    """The number of the first dialect that has one in a column of the table."""
    found = (number(xmp, dialect, getattr(dialect, field)) for dialect in dialects)
    return next((value for value in found if value is not None), None)


def _centre(xmp: Xmp, dialects: tuple[Dialect, ...]) -> tuple[float, float] | None:
    for dialect in dialects:
        if dialect.centre_px is not None:
            x, y = (parse(text(xmp, dialect, name)) for name in dialect.centre_px)
            if x is not None and y is not None:
                return x, y
    return None


def _survey(gps: dict[int, Any], xmp: Xmp, dialects: tuple[Dialect, ...]) -> dict[str, str]:
    """Accuracy, RTK and datum as the tags say, by their names."""
    found = {name: _said(gps[tag]) for tag, name in GPS_SURVEY.items() if tag in gps}
    if gps.get(ALTITUDE_REF) in ELLIPSOID:
        found["GPSAltitudeRef"] = "ellipsoid"
    for dialect in dialects:
        for name in dialect.survey:
            value = text(xmp, dialect, name)
            if value is not None:
                found.setdefault(name, value)
    return {name: value for name, value in found.items() if value}


def _said(value: Any) -> str:
    number = _number(value)
    return f"{number:g}" if number is not None else _text(value)


def _pixel_mm(detail: dict[int, Any]) -> float | None:
    """Side of a sensor's pixel as the focal plane's resolution says."""
    across = _positive(detail.get(PLANE_X))
    unit = _number(detail.get(PLANE_UNIT, 2))
    mm = None if unit is None else UNIT_MM.get(int(unit))
    return None if across is None or mm is None else mm / across


def _read_exif(block: bytes) -> tuple[dict[int, Any], dict[int, Any], dict[int, Any]]:
    exif = Image.Exif()
    parts: list[dict[int, Any]] = [{}, {}, {}]
    # Pillow raises many types on broken blocks, all of which mean the same here.
    try:
        exif.load(block)
        parts[0] = dict(exif)
    except Exception:
        return parts[0], parts[1], parts[2]
    for index, ifd in ((1, EXIF_IFD), (2, GPS_IFD)):
        try:
            parts[index] = dict(exif.get_ifd(ifd))
        except Exception:
            continue
    return parts[0], parts[1], parts[2]


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _positive(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and number > 0.0 else None


def _text(value: Any) -> str:
    return value.split("\0", 1)[0].strip() if isinstance(value, str) else ""


def _dms(value: Any, limit: float) -> float | None:
    if not isinstance(value, Sequence) or len(value) != 3:
        return None
    parts = [_number(part) for part in value]
    if parts[0] is None:
        return None
    degrees = sum((part or 0.0) / scale for part, scale in zip(parts, (1, 60, 3600), strict=True))
    return degrees if 0.0 <= degrees <= limit else None


def _exif_time(detail: dict[int, Any]) -> str | None:
    found = _text(detail.get(DATE_ORIGINAL))
    match = re.fullmatch(r"(\d{4}):(\d\d):(\d\d) (\d\d:\d\d:\d\d)", found)
    if match is None or match[1] == "0000":
        return None
    time = f"{match[1]}-{match[2]}-{match[3]}T{match[4]}"
    fraction = _text(detail.get(SUBSEC_ORIGINAL))
    if fraction.isdigit():
        time += f".{fraction}"
    offset = _text(detail.get(OFFSET_ORIGINAL))
    return time + (offset if re.fullmatch(r"[+-]\d\d:\d\d", offset) else "")


def _xmp_time(xmp: Xmp) -> str | None:
    for namespace, name in XMP_TIMES:
        match = re.match(
            r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d)?",
            xmp.text(namespace, name) or "",
        )
        if match:
            return match[0]
    return None
