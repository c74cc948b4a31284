"""The report of a verification: one page that opens without a network, with tables beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from archive_pipeline.detection.boxes import Boxes, Detections
from archive_pipeline.detection.detectors import EXTRA, Read, whole
from archive_pipeline.detection.metrics import METRICS, match
from archive_pipeline.detection.verdict import GroupResult
from archive_pipeline.detection.verification import ImageResult, Verification, Versions
from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.geo.georef import Window
from archive_pipeline.outputs.pages import (
    PAGE,
    RESULT,
    Table,
    prepare_folder,
    render,
    write_files,
)
from archive_pipeline.outputs.publish import NOTHING, Stamps

WORST, TYPICAL, CLOSE_UPS = 6, 3, 3  # images shown, and parts of each at full resolution
OVERVIEW_SIDE = 1600  # pixels at most
OVERVIEW_QUALITY, CLOSE_UP_QUALITY = 82, 90  # of the JPEGs in the page
CLOSE_UP_SIDES = 160, 640  # pixels of the image, least and most
METRIC_NAMES = {
    "ratio": "object ratio",
    "confidence": "mean confidence",
    "iou": "mean IoU of matches",
    "precision": "precision",
    "recall": "recall",
    "map50": "mAP50",
    "map50_95": "mAP50-95",
}
SUMMARY, IMAGES = "summary.csv", "images.csv"
FILES = RESULT, SUMMARY, IMAGES, PAGE
IMAGE_FIELDS = (
    "image", "model", "class", "original", "reference_objects", "original_detections",
    "restored_detections", "original_matched", "restored_matched", "lost", "change",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A box to draw: (left, top, width, height) in pixels of the image.

    Attributes:
        state: "kept" (found in both versions), "lost", "new", or "label".
        change: of its confidence between the versions, 0 to 1.
    """

    model: int
    box: tuple[float, float, float, float]
    state: str
    text: str
    change: float = 0.0


@dataclass(frozen=True)
class Pair:
    """A window of both versions as data: URLs; the original's is None where it is gone."""

    window: Window
    original: str | None
    restored: str


def prepare_report(directory: Path, archive: Path | None = None, overwrite: bool = False) -> Stamps:
    """Make the folder, and find out early what would fail late: see `pages.prepare_folder`."""
    return prepare_folder(directory, FILES, EXTRA, archive, overwrite)


def write_report(
    report: Verification,
    directory: Path,
    versions: Versions,
    progress: Callable[[int], None] = lambda total: None,
    replace: Stamps = NOTHING,
) -> Path:
    """Write report.html, result.json, summary.csv and images.csv.

    Args:
        directory: what `prepare_report` made.
        versions: opens an image to draw; what it raises of this package's errors is shown instead.
        progress: called after each image that is drawn with their number.
        replace: what `prepare_report` returned.

    Returns:
        The page's path.

    Raises:
        ReportError: a file cannot be written, or another is there.
    """
    page = render(
        "archive_pipeline.detection",
        report=report,
        metrics=METRIC_NAMES,
        pictures=_draw(report, versions, progress),
        number=_number,
        verdict="passed" if report.passed else "failed" if report.below_tolerance else "not proven",
    )
    tables = {SUMMARY: partial(_write_summary, report), IMAGES: partial(_write_images, report)}
    return write_files(directory, page, report.to_json(), tables, replace)


def _number(value: float | None, sign: bool = False) -> str:
    if value is None:
        return "\u2013"
    return f"{value:+.3f}".replace("-", "\u2212") if sign else f"{value:.3f}"


def _write_summary(report: Verification, file: TextIO) -> None:
    fields = ("model", "class", "metric", "original", "restored", "delta", "low", "high", "passed")
    table = Table(file)
    table.row(*fields)
    for model in report.models:
        failed = {(f.group, f.metric) for f in model.failures}
        for group, delta in model.delta.items():
            for name in METRICS:
                low, high = model.intervals[group][name] or (None, None)
                numbers = (model.original[group][name], model.restored[group][name], delta[name])
                passed = None if delta[name] is None else (group, name) not in failed
                table.row(model.model, group, name, *numbers, low, high, passed)


def _write_images(report: Verification, file: TextIO) -> None:
    least = report.options.confidence
    table = Table(file)
    table.row(*IMAGE_FIELDS)
    for image in report.images:
        name = image.name
        original = "stored detections" if image.original is None else str(image.original)
        for model in report.models:
            for group, result in image.groups.get(model.sha256, {}).items():
                counts = [int((m.found.scores >= least).sum()) for m in _versions(result)]
                hits = [
                    int((m.hits[0] & (m.found.scores >= least)).sum()) for m in _versions(result)
                ]
                amount, lost = model.changes[group][name]
                row = [name, model.model, group, original, len(result.reference)]
                table.row(*row, *counts, *hits, lost, round(amount, 4))


def _versions(result: GroupResult) -> tuple[Any, Any]:
    return result.original, result.restored


# ---------------------------------------------------------------------- pictures


def _draw(
    report: Verification, versions: Versions, progress: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Pictures of the images that changed most, then of typical ones, for the template."""
    chosen = _choose(report)
    pictures = []
    for image, kind, amount in chosen:
        before, after = _shapes(report, image)
        error, pairs = None, []
        try:
            with versions(image) as (original, restored):
                pairs = _pairs(image, original, restored, [*before, *after])
        except ArchivePipelineError as reason:  # gone since it was compared
            error = str(reason)
        drawn = [shape.state for shape in (*before, *after)]
        pictures.append(
            {
                "name": image.name,
                "kind": kind,
                "change": amount,
                "counts": [drawn.count("lost"), drawn.count("new")],
                "error": error,
                "pairs": pairs,
                "before": before,
                "after": after,
            }
        )
        progress(len(chosen))
    return pictures


def _choose(report: Verification) -> list[tuple[ImageResult, str, float]]:
    """Images to show, whether as "worst" or "typical", and their change."""
    amounts = []
    for image in report.images:
        own = [
            model.changes[group][image.name][0]
            for model in report.models
            for group in image.groups.get(model.sha256, {})
        ]
        amounts.append((max(own, default=0.0), image))
    amounts.sort(key=lambda pair: (-pair[0], pair[1].name))
    worst = [(image, "worst", amount) for amount, image in amounts[:WORST] if amount > 0]
    rest = amounts[len(worst) :]
    middle = max(0, (len(rest) - TYPICAL) // 2)
    typical = [(image, "typical", amount) for amount, image in rest[middle : middle + TYPICAL]]
    return worst + typical


def _shapes(
    report: Verification, image: ImageResult
) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """Boxes to draw over the original and over the restored image."""
    before: list[Shape] = []
    after: list[Shape] = []
    for index, model in enumerate(report.models):
        for group, result in image.groups.get(model.sha256, {}).items():
            if model.reference == "labels":
                labels = [
                    Shape(index, _corner(box), "label", f"{group}, label")
                    for box in result.reference
                ]
                before += labels
                after += labels
            least = report.options.confidence
            one, two = (m.found.where(m.found.scores >= least) for m in _versions(result))
            first, second = _states(index, group, one, two, report.options.iou)
            before += first
            after += second
    return tuple(before), tuple(after)


def _states(
    model: int, group: str, one: Detections, two: Detections, least_iou: float
) -> tuple[list[Shape], list[Shape]]:
    """Which objects of the original are kept or lost, and which of the restored image are new."""
    pairs = match(two, one.boxes, least_iou).reference
    found = {int(i): float(two.scores[k]) for k, i in enumerate(pairs) if i >= 0}
    first = []
    for i, (box, score) in enumerate(zip(one.boxes, one.scores, strict=True)):
        other = found.get(i)
        state = "lost" if other is None else "kept"
        then = "not found in the restored image" if other is None else f"restored {other:.2f}"
        change = abs(score - (other or 0.0))
        first.append(Shape(model, _corner(box), state, f"{group} {score:.2f}, {then}", change))
    second = []
    for box, score, i in zip(two.boxes, two.scores, pairs, strict=True):
        state, then = ("kept", f"original {one.scores[i]:.2f}") if i >= 0 else ("new", "new")
        change = abs(score - one.scores[i]) if i >= 0 else score
        second.append(Shape(model, _corner(box), state, f"{group} {score:.2f}, {then}", change))
    return first, second


def _corner(box: Boxes) -> tuple[float, float, float, float]:
    left, top, right, bottom = box.tolist()
    return left, top, right - left, bottom - top


def _pairs(
    result: ImageResult, original: Read | None, restored: Read, shapes: list[Shape]
) -> list[Pair]:
    """The whole image, reduced, then the parts that changed most."""
    width, height = result.width, result.height
    windows = [(0, 0, width, height), *_spots(shapes, width, height)]
    restored = whole(restored, width, height)
    if original is not None:
        original = whole(original, width, height)
    return [_pair(original, restored, window) for window in windows]


def _spots(shapes: list[Shape], width: int, height: int) -> list[Window]:
    """Windows around the objects that changed most, each object in one of them."""
    windows: list[Window] = []
    for shape in sorted(shapes, key=lambda s: -s.change):
        left, top, w, h = shape.box
        x, y = left + w / 2, top + h / 2
        if shape.state == "label" or any(
            c <= x <= c + a and r <= y <= r + b for c, r, a, b in windows
        ):
            continue
        least, most = CLOSE_UP_SIDES
        side = min(max(round(3 * max(w, h)), least), most, width, height)
        col = min(max(round(x - side / 2), 0), width - side)
        row = min(max(round(y - side / 2), 0), height - side)
        windows.append((col, row, side, side))
        if len(windows) == CLOSE_UPS:
            break
    return windows


def _pair(original: Read | None, restored: Read, window: Window) -> Pair:
    is_whole = max(window[2:]) > CLOSE_UP_SIDES[1]
    quality = OVERVIEW_QUALITY if is_whole else CLOSE_UP_QUALITY
    url = partial(_url, window=window, quality=quality)
    return Pair(window, None if original is None else url(original), url(restored))


def _url(read: Read, window: Window, quality: int) -> str:
    """A window as a JPEG in a data: URL, reduced by a whole factor, some rows at a time."""
    col, row, width, height = window
    factor = -(-max(width, height) // OVERVIEW_SIDE)
    step = factor * 256
    parts: list[NDArray[Any]] = []
    for top in range(row, row + height, step):
        pixels = read((col, top, width, min(step, row + height - top)))
        if factor > 1:
            size = (-(-width // factor), -(-pixels.shape[0] // factor))
            pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
        parts.append(pixels)
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(parts)).save(buffer, "JPEG", quality=quality, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
