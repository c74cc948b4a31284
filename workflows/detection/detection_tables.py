"""Tables of what detectors found: by ratio and codec, bytes at equal metrics, the paper's."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection_rates import AT_PRECISION, Rate, Sampled, rate

from archive_pipeline.detection.metrics import METRICS

RATE_METRICS = ("map50_95", "recall", AT_PRECISION["recall"])
HEADINGS = {
    "ratio": "object ratio",
    "confidence": "confidence",
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
    "map50": "mAP50",
    "map50_95": "mAP50-95",
    "ratio_at": "object ratio *",
    "precision_at": "precision *",
    "recall_at": "recall *",
}
AT = "\\* at the confidence threshold that gives the original's precision"
Row = dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """What one detector makes of one class group.

    Attributes:
        model, group: the detector's name, the class group.
        images, objects: how many were compared, and reference objects in them.
        original: of the originals.
        codecs: by codec and ratio.
    """

    model: str
    group: str
    images: int
    objects: int
    original: Sampled
    codecs: dict[str, dict[float, Sampled]]


def rows(judged: Iterable[Judged], reference: str) -> list[Row]:
    """A row for each ratio, codec, detector, class group and metric.

    Args:
        reference: "labels" or "originals".
    """
    found = []
    for one in judged:
        for codec, ratios in one.codecs.items():
            for ratio, sampled in ratios.items():
                for metric, values in sampled.values.items():
                    before, after = float(one.original.values[metric][0]), float(values[0])
                    low, high = sampled.interval(metric, one.original) or (math.nan, math.nan)
                    if math.isnan(after - before):
                        low, high = math.nan, math.nan
                    numbers = (before, after, after - before, low, high)
                    found.append(
                        {
                            "source_ratio": ratio,
                            "codec": codec,
                            "bytes": int(sampled.bytes[0]),
                            "images": one.images,
                            "model": one.model,
                            "reference": reference,
                            "class": one.group,
                            "objects": one.objects,
                            "metric": metric,
                            **dict(zip(NUMBERS, map(_number, numbers), strict=True)),
                        }
                    )
    return sorted(found, key=lambda row: row["source_ratio"])


NUMBERS = ("original", "restored", "delta", "low", "high")


def _number(value: float) -> float | None:
    """For CSV, where nothing stands for NaN."""
    return None if math.isnan(value) else round(value, 6)


def rate_rows(judged: Iterable[Judged], other: str) -> list[Row]:
    """Bytes of each codec over those of `other` at equal metrics: a row a codec and metric."""
    found = []
    for one in judged:
        for codec, ratios in one.codecs.items():
            if codec == other:
                continue
            for metric in RATE_METRICS:
                result = rate([*ratios.values()], [*one.codecs[other].values()], metric)
                found.append(_rate_row(one, codec, other, metric, result))
    return found


def _rate_row(one: Judged, codec: str, other: str, metric: str, result: Rate) -> Row:
    low, high = result.interval or (math.nan, math.nan)
    return {
        "model": one.model,
        "class": one.group,
        "codec": codec,
        "against": other,
        "metric": metric,
        "bytes_percent": _number(100 * (result.ratio - 1)),
        "low": _number(100 * (low - 1)),
        "high": _number(100 * (high - 1)),
        "share": _number(result.share),
        "defined": _number(result.defined),
    }


def change_table(found: list[Row]) -> str:
    """Markdown: differences between originals and restored images, a line a codec and ratio."""
    names = [*METRICS, AT_PRECISION["ratio"], AT_PRECISION["recall"]]
    tables = []
    for (model, group), own in _grouped(found, ("model", "class")).items():
        lines = [
            f"{model}, {group}:\n",
            _line(["source ratio", "codec", "bytes", *map(HEADINGS.get, names)]),
            _line(["---"] * (3 + len(names))),
        ]
        for key, some in _grouped(own, ("source_ratio", "codec", "bytes")).items():
            by_metric = {row["metric"]: row for row in some}
            cells = [_signed(by_metric[name]["delta"]) for name in names]
            lines.append(_line([f"{key[0]:g}", *key[1:], *cells]))
        tables.append("\n".join(lines))
    return "\n\n".join([*tables, AT])


def interval_table(found: list[Row]) -> str:
    """Markdown: all values, and differences with their intervals, a line each."""
    keys = ("model", "class", "source_ratio", "codec", "metric")
    lines = [
        _line(["detector", "class", "source ratio", "codec", "metric", "value", "change", "95 %"]),
        _line(["---"] * (len(keys) + 3)),
    ]
    for row in sorted(found, key=lambda row: (row["model"], row["class"])):
        between = "-" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"
        value = "-" if row["restored"] is None else f"{row['restored']:.3f}"
        name = HEADINGS[row["metric"]]
        cells = (row["model"], row["class"], f"{row['source_ratio']:g}", row["codec"], name)
        lines.append(_line([*cells, value, _signed(row["delta"]), between]))
    return "\n".join(lines)


def _grouped(found: list[Row], keys: tuple[str, ...]) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def rate_table(found: list[Row]) -> str:
    """Markdown: a line for each detector, class and two codecs; bytes in percent."""
    keys = ("model", "class", "codec", "against")
    equal = [f"equal {HEADINGS[metric]}" for metric in RATE_METRICS]
    lines = [
        _line(["detector", "class", "bytes of", "against", *equal]),
        _line(["---"] * (len(keys) + len(RATE_METRICS))),
    ]
    for key, some in _grouped(found, keys).items():
        by_metric = {row["metric"]: row for row in some}
        lines.append(_line([*key, *(_percent(by_metric[name]) for name in RATE_METRICS)]))
    return "\n".join(lines)


def _percent(row: Row) -> str:
    if row["bytes_percent"] is None:
        return "no overlap"
    between = "no interval" if row["low"] is None else f"{row['low']:+.0f} to {row['high']:+.0f}"
    part = "" if row["share"] > 0.995 else f", {100 * row['share']:.0f} % of the range"
    return f"{row['bytes_percent']:+.1f} % ({between}{part})"


def paper_table(judged: list[Judged], ratio: float) -> str:
    """Markdown in the layout of the paper's table of detection results, for one ratio.

    A detector's originals, then each codec's images: object ratio of each class group (the
    paper's B-R and V-R), mean confidence and mean IoU by group.
    """
    groups = list(dict.fromkeys(one.group for one in judged))
    models = list(dict.fromkeys(one.model for one in judged))
    lines = [
        _line(["Model", "Data", *(f"{group}-R" for group in groups), "Conf.", "IoU"]),
        _line(["---"] * (4 + len(groups))),
    ]
    for model in models:
        own = {one.group: one for one in judged if one.model == model}
        versions = {"Ori.": {group: one.original for group, one in own.items()}}
        for codec in next(iter(own.values())).codecs:
            versions[f"Rec., {codec}"] = {
                group: one.codecs[codec][ratio] for group, one in own.items()
            }
        for name, sampled in versions.items():
            first = model if name == "Ori." else ""
            lines.append(_line([first, name, *_paper_cells(sampled, groups)]))
    return "\n".join(lines)


def _paper_cells(sampled: dict[str, Sampled], groups: list[str]) -> list[str]:
    def value(group: str, metric: str, digits: int) -> str:
        number = float(sampled[group].values[metric][0])
        return "-" if math.isnan(number) else f"{number:.{digits}f}"

    ratios = [value(group, "ratio", 2) if group in sampled else "-" for group in groups]
    named = [group for group in groups if group in sampled]
    confidence = ", ".join(f"{group}: {value(group, 'confidence', 3)}" for group in named)
    overlap = ", ".join(f"{group}: {value(group, 'iou', 2)}" for group in named)
    return [*ratios, confidence, overlap]


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def write_csv(path: Path, found: list[Row]) -> None:
    """Write rows, which all have the fields of the first one; none where there are no rows."""
    if not found:
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
