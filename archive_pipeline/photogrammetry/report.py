"""The report of a verification: tie points, ground in plan view and residuals, as drawings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.outputs.pages import (
    PAGE,
    RESULT,
    Table,
    prepare_folder,
    render,
    write_files,
)
from archive_pipeline.outputs.publish import NOTHING, Stamps
from archive_pipeline.photogrammetry.verdict import FlightReport
from archive_pipeline.photogrammetry.verification import PhotogrammetryReport

T = TypeVar("T")
FRAMES, PAIRS = "frames.csv", "pairs.csv"
FILES = RESULT, FRAMES, PAIRS, PAGE
EXTRA = "pip install 'archive-pipeline[photogrammetry]'"
WIDTH, HEIGHT = 560, 420  # of a drawing, in its own units
MARGIN = 60
DOTS = 4000  # points or pairs drawn at most
LISTED = 200  # frames in the page's table; all are in frames.csv
ARROW = 0.08  # of a plan's width: what the longest of the cameras' ways is drawn as
TICKS = 5


def prepare_report(directory: Path, archive: Path | None = None, overwrite: bool = False) -> Stamps:
    """Make the folder, and find out early what would fail late: see `pages.prepare_folder`."""
    return prepare_folder(directory, FILES, EXTRA, archive, overwrite)


@dataclass
class Drawing:
    """What a drawing shows, in its own units.

    Attributes:
        title, caption: words for people.
        axes: names of the horizontal and the vertical one.
        dots: (x, y, class, text) of each.
        lines: (x1, y1, x2, y2, class) of each.
        ticks: (place, label) of the horizontal and of the vertical axis.
    """

    title: str
    caption: str
    axes: tuple[str, str]
    dots: list[tuple[float, float, str, str]] = field(default_factory=list)
    lines: list[tuple[float, float, float, float, str]] = field(default_factory=list)
    ticks: tuple[list[tuple[float, str]], list[tuple[float, str]]] = ([], [])


class _Scale:
    """Takes numbers to a drawing's units, x to the right and y up."""

    def __init__(self, low: NDArray[np.float64], high: NDArray[np.float64], equal: bool) -> None:
        span = np.maximum(high - low, 1e-9)
        room = np.array([WIDTH - 1.5 * MARGIN, HEIGHT - 1.5 * MARGIN])
        factor = room / span
        if equal:
            factor = np.full(2, factor.min())
            low = low - (room / factor - span) / 2
        self.low, self.factor, self.high = low, factor, low + room / factor

    def __call__(self, x: float, y: float) -> tuple[float, float]:
        right, up = (np.array([x, y]) - self.low) * self.factor
        return float(MARGIN + right), float(HEIGHT - MARGIN - up)

    def ticks(self) -> tuple[list[tuple[float, str]], list[tuple[float, str]]]:
        across = [(self(t, self.low[1])[0], f"{t:g}") for t in _round_numbers(self, 0)]
        up = [(self(self.low[0], t)[1], f"{t:g}") for t in _round_numbers(self, 1)]
        return across, up


def _round_numbers(scale: _Scale, axis: int) -> list[float]:
    low, high = float(scale.low[axis]), float(scale.high[axis])
    step = 10 ** math.floor(math.log10((high - low) / TICKS))
    step *= next(n for n in (1, 2, 5, 10) if (high - low) / (step * n) <= TICKS)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


def write_report(report: PhotogrammetryReport, directory: Path, replace: Stamps = NOTHING) -> Path:
    """Write report.html, result.json, frames.csv and pairs.csv; see `pages.write_files`.

    Args:
        directory: what `prepare_report` made.
        replace: what `prepare_report` returned.

    Returns:
        The page's path.

    Raises:
        ReportError: a file cannot be written, or another is there.
    """
    page = render(
        "archive_pipeline.photogrammetry",
        report=report,
        flights=[(flight, flight.to_json(), _drawings(flight)) for flight in report.flights],
        width=WIDTH,
        height=HEIGHT,
        margin=MARGIN,
        listed=LISTED,
        number=_number,
        share=_share,
    )
    tables = {FRAMES: partial(_write_frames, report), PAIRS: partial(_write_pairs, report)}
    return write_files(directory, page, report.to_json(), tables, replace)


def _number(value: float | None, digits: int = 3) -> str:
    return "\u2013" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _share(one: float, two: float) -> str:
    return f"{two / one:.1%}" if one else "\u2013"


def _write_frames(report: PhotogrammetryReport, file: TextIO) -> None:
    table = Table(file)
    table.row(
        *("image", "original_tie_points", "restored_tie_points", "points_found_again"),
        *("median_px", "p95_px", "shift_x_px", "shift_y_px", "centre_m", "rotation_deg"),
    )
    for flight in report.flights:
        told = flight.to_json()
        fits = {item["image"]: item for item in (told["difference"] or {}).get("frames", ())}
        for frame, counts, moved in zip(
            flight.frames, flight.by_frame(), told["moved"], strict=False
        ):
            fit = fits.get(frame.name, {})
            numbers = moved["points"], moved["median_px"], moved["p95_px"], *moved["shift_px"]
            table.row(frame.name, *counts, *numbers, fit.get("centre_m"), fit.get("rotation_deg"))


def _write_pairs(report: PhotogrammetryReport, file: TextIO) -> None:
    table = Table(file)
    table.row("one", "two", "original_tie_points", "restored_tie_points")
    for flight in report.flights:
        for (one, two), counts in flight.pairs.items():
            table.row(flight.frames[one].name, flight.frames[two].name, *counts)


# ---------------------------------------------------------------------- drawings


def _drawings(flight: FlightReport) -> list[Drawing]:
    drawings = []
    if flight.pairs:
        drawings.append(_tie_points(flight))
    if any(moved.points for moved in flight.moved):
        drawings.append(_movements(flight))
    if flight.original is not None:
        drawings += [_plan(flight), _residuals(flight)]
    return drawings


def _tie_points(flight: FlightReport) -> Drawing:
    """Tie points of each pair, in the originals and in the restored frames."""
    most = max(max(counts) for counts in flight.pairs.values())
    scale = _Scale(np.zeros(2), np.full(2, 1.05 * most), equal=False)
    drawing = Drawing(
        "Tie points by pair",
        "Each dot is a pair of frames, red where less than 90 % are kept. On the line both "
        "versions have as many.",
        ("in the originals", "in the restored frames"),
        ticks=scale.ticks(),
    )
    drawing.lines.append((*scale(0, 0), *scale(most, most), "even"))
    for (i, j), (a, b) in _some(list(flight.pairs.items())):
        names = f"{flight.frames[i].name} and {flight.frames[j].name}: {a}, restored {b}"
        drawing.dots.append((*scale(a, b), "loss" if b < 0.9 * a else "kept", names))
    return drawing


def _movements(flight: FlightReport) -> Drawing:
    """How far each frame's points moved, frame by frame."""
    shown = [(i, m) for i, m in enumerate(flight.moved) if m.points]
    most = max(m.p95 for _, m in shown)
    scale = _Scale(np.zeros(2), np.array([len(flight.moved) + 1, max(1.1 * most, 0.1)]), False)
    drawing = Drawing(
        "How far points moved",
        "From the original to the restored frame: from the median up to what 95 % keep.",
        ("frame", "pixels"),
        ticks=scale.ticks(),
    )
    for i, moved in _some(shown):
        text = f"{flight.frames[i].name}: median {moved.median:.2f}, 95 % {moved.p95:.2f} px"
        drawing.lines.append((*scale(i + 1, moved.median), *scale(i + 1, moved.p95), "range"))
        drawing.dots.append((*scale(i + 1, moved.median), "kept", text))
    return drawing


def _plan(flight: FlightReport) -> Drawing:
    """Points of the ground from above, the cameras, and where restored frames put them."""
    original, found = flight.original, flight.difference
    assert original is not None
    cameras = np.array(list(original.centres.values()))[:, :2]
    points = original.points[:: max(1, len(original.points) // DOTS)]
    low, high = np.percentile(points[:, :2], [1, 99], axis=0)
    low, high = np.minimum(low, cameras.min(axis=0)), np.maximum(high, cameras.max(axis=0))
    scale = _Scale(low, high, equal=True)
    inside = np.all((points[:, :2] >= low) & (points[:, :2] <= high), axis=1)
    heights = np.percentile(points[:, 2], [20, 40, 60, 80])
    ways = {} if found is None else found.offsets
    longest = max((float(np.linalg.norm(way[:2])) for way in ways.values()), default=0.0)
    caption = "Points of the ground, darker where lower; cameras as rings."
    if longest > 0:
        caption += f" Arrows are the cameras' ways; the longest is {longest:.3f} m in plan."
    drawing = Drawing("In plan view", caption, ("metres east", "metres north"), ticks=scale.ticks())
    for x, y, z in points[inside].tolist():
        drawing.dots.append((*scale(x, y), f"ground h{int(np.searchsorted(heights, z))}", ""))
    stretch = ARROW * float(scale.high[0] - scale.low[0]) / longest if longest else 0.0
    for index, place in original.centres.items():
        x, y = (float(n) for n in place[:2])
        way = ways.get(index)
        name, text = flight.frames[index].name, "not registered in the restored frames"
        if way is not None:
            east, north = (float(n) * stretch for n in way[:2])
            drawing.lines.append((*scale(x, y), *scale(x + east, y + north), "way"))
            text = f"moved by {float(np.linalg.norm(way)):.3f} m"
        drawing.dots.append((*scale(x, y), "camera" + " lost" * (way is None), f"{name}: {text}"))
    return drawing


def _residuals(flight: FlightReport) -> Drawing:
    """Mean reprojection error of each frame, of both reconstructions."""
    assert flight.original is not None
    restored = {} if flight.restored is None else flight.restored.errors
    both = (*flight.original.errors.values(), *restored.values(), 0.1)
    scale = _Scale(np.zeros(2), np.array([len(flight.frames) + 1, 1.1 * max(both)]), False)
    drawing = Drawing(
        "Residuals",
        "Mean reprojection error of a frame's points: ring original, dot restored.",
        ("frame", "pixels"),
        ticks=scale.ticks(),
    )
    for index, error in _some(list(flight.original.errors.items())):
        name, after = flight.frames[index].name, restored.get(index)
        text = f"{name}: {error:.2f} px"
        drawing.dots.append((*scale(index + 1, error), "camera", text))
        if after is not None:
            drawing.dots.append((*scale(index + 1, after), "kept", f"{name}: {after:.2f} px"))
    return drawing


def _some(items: list[T]) -> list[T]:
    return items[:: max(1, -(-len(items) // DOTS))]
