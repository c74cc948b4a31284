"""What requests ask for: boxes, intervals, names; all from strangers."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

from archive_pipeline.errors import UsageError
from archive_pipeline.geo.georef import Bbox, Window

Interval = tuple[float | None, float | None]
"""First and last second since 1970, each None where it is open."""

_TIME = re.compile(
    r"\d{4}-\d\d-\d\d([Tt ]\d\d:\d\d:\d\d(\.\d{1,12})?([Zz]|[+-]\d\d:\d\d)?)?", re.ASCII
)
MAX_TEXT = 1000  # characters of a query


def timestamp(text: str | None) -> float:
    """Seconds since 1970 of an ISO 8601 time, taken for UTC where it has no offset; else NaN."""
    if text is None:
        return math.nan
    try:
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return math.nan


def parse_bbox(text: str | None) -> Bbox | None:
    """A box "west,south,east,north" in degrees; None of None.

    Six numbers are taken for a box with heights, which are passed over.

    Raises:
        UsageError: it is none.
    """
    from archive_pipeline.geo.mapping import check_bbox

    if text is None:
        return None
    try:
        numbers = [float(part) for part in text[:MAX_TEXT].split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 6:
        del numbers[5], numbers[2]
    if len(numbers) != 4:
        raise UsageError(f"bbox {text[:80]!r} is not west,south,east,north")
    west, south, east, north = numbers
    try:
        check_bbox((west, south, east, north))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return west, south, east, north


def parse_interval(text: str | None) -> Interval | None:
    """A time, or two of them with a slash between, ".." or nothing where it is open.

    A day alone is all of it.

    Raises:
        UsageError: it is none.
    """
    if text is None:
        return None
    parts = text[:MAX_TEXT].split("/")
    if len(parts) > 2 or (len(parts) == 1 and parts[0] in ("", "..")):
        raise UsageError(f"datetime {text[:80]!r} is no time and no interval")
    ends = [None if part in ("", "..") else _seconds(part) for part in parts]
    first, last = ends[0], ends[-1]
    if last is not None and "T" not in parts[-1].upper() and " " not in parts[-1]:
        last += 86400 - 1e-6
    if first is not None and last is not None and first > last:
        raise UsageError(f"datetime {text[:80]!r} ends before it begins")
    return first, last


def _seconds(text: str) -> float:
    found = timestamp(text) if _TIME.fullmatch(text) else math.nan
    if math.isnan(found):
        raise UsageError(f"datetime {text[:80]!r} is not a time as 2024-05-01T12:00:00Z")
    return found


def parse_window(text: str | None, width: int, height: int) -> Window:
    """A window "col,row,width,height" inside an image of a size; all of it without one.

    Raises:
        UsageError: it is none.
    """
    if text is None:
        return 0, 0, width, height
    parts = text[:MAX_TEXT].split(",")
    if len(parts) != 4 or not all(re.fullmatch(r"\d{1,9}", part, re.ASCII) for part in parts):
        raise UsageError(f"window {text[:80]!r} is not col,row,width,height")
    col, row, w, h = map(int, parts)
    if not (0 <= col < col + w <= width and 0 <= row < row + h <= height):
        raise UsageError(f"window {text[:80]!r} is not inside {width} x {height} pixels")
    return col, row, w, h
