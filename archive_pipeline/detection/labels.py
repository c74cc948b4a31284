"""Classes of objects in groups, and labels as YOLO tools write them: a .txt an image."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from archive_pipeline.detection.boxes import Boxes
from archive_pipeline.errors import ArchivePipelineError

NAME_FILES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt")
SHOWN_CLASSES = 8
PARENTS = 2  # folders above the labels where the names may be: labels/test/ beside data.yaml

Groups = dict[str, tuple[str, ...]]  # names of classes by group

# Groups of classes, by the names that public data sets use: COCO, VisDrone, DOTA, xView, UAVDT.
GROUPS: Groups = {
    "vehicle": (
        "vehicle", "small vehicle", "large vehicle", "car", "suv", "taxi", "truck", "pickup",
        "pickup truck", "lorry", "trailer", "bus", "minibus", "van", "minivan", "camper",
        "motorcycle", "motorbike", "motor", "tricycle", "awning tricycle",
    ),
    "person": ("person", "pedestrian", "people", "human"),
    "building": ("building", "house", "roof"),
}  # fmt: skip


class LabelError(ArchivePipelineError):
    """Labels that cannot be used; one line that names the file."""


@dataclass(frozen=True)
class Labels:
    """The label files of a folder.

    Attributes:
        folder: where they lie.
        files: by path below the folder, without the suffix, with forward slashes.
        names: of the classes by index; None where no file says them.
    """

    folder: Path
    files: dict[str, Path]
    names: dict[int, str] | None

    def find(self, flight: str, image_id: str) -> Path | None:
        """The label file of an archived image, None where there is none.

        Raises:
            LabelError: several could be meant.
        """
        stem = image_id.rpartition(".")[0] or image_id
        for key in (f"{flight}/{stem}", stem):
            if key in self.files:
                return self.files[key]
        last = stem.rpartition("/")[2]
        found = [path for key, path in self.files.items() if key.rpartition("/")[2] == last]
        if len(found) > 1:
            raise LabelError(f"{flight}/{image_id}: several label files: {found[0]}, {found[1]}")
        return found[0] if found else None


def find_labels(folder: Path, names: Path | None = None) -> Labels:
    """List the label files of a folder and of the folders in it, and read their class names.

    Args:
        names: data.yaml or classes.txt; by default the one in the folder or up to two above it.

    Raises:
        LabelError: the folder holds no labels, or the names cannot be read.
    """
    if not folder.is_dir():
        raise LabelError(f"{folder}: no such directory")
    paths = sorted(p for p in folder.rglob("*.txt") if p.is_file() and p.name not in NAME_FILES)
    if not paths:
        raise LabelError(f"{folder}: no label files (.txt)")
    files = {p.relative_to(folder).with_suffix("").as_posix(): p for p in paths}
    if names is None:
        places = [folder, *folder.absolute().parents[:PARENTS]]
        names = next((p / n for p in places for n in NAME_FILES if (p / n).is_file()), None)
    return Labels(folder, files, None if names is None else read_names(names))


def read_names(path: Path) -> dict[int, str]:
    """Class names by index, from the `names` of a data.yaml or the lines of a classes.txt.

    Raises:
        LabelError: it has none.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise LabelError(f"{path}: {reason}") from error
    if path.suffix == ".txt":
        return dict(enumerate(line.strip() for line in text.splitlines() if line.strip()))
    import yaml

    try:
        listed: Any = yaml.safe_load(text)["names"]
        pairs = listed.items() if isinstance(listed, dict) else enumerate(listed)
        return {int(index): str(name) for index, name in pairs}
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise LabelError(f"{path}: no class names in it") from error


def read_labels(path: Path, width: int, height: int, names: dict[int, str]) -> dict[str, Boxes]:
    """Boxes of a label file by class name, float64 (n, 4) in pixels.

    A line is a class index and centre x, centre y, width, height, as parts of the image's sides,
    or the corners of a polygon, whose enclosing box is taken.

    Raises:
        LabelError: a line is neither, or its class has no name.
    """
    boxes: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise LabelError(f"{path}: {reason}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            first, *values = (float(part) for part in line.split())
            if not all(math.isfinite(v) for v in (first, *values)):
                raise ValueError("not finite")
            left, top, right, bottom = _box(values)
        except ValueError as error:
            raise LabelError(f"{path}: line {number} is not a label: {line[:60]!r}") from error
        if first not in names:
            raise LabelError(f"{path}: line {number}: class {first:g} has no name")
        box = (left * width, top * height, right * width, bottom * height)
        boxes[names[int(first)]].append(box)
    return {name: np.array(found) for name, found in boxes.items()}


def count_classes(files: Iterable[Path]) -> dict[int, int]:
    """Objects of each class index in label files, in the order of the indices.

    What cannot be read is left out; `read_labels` says why.
    """
    counts: Counter[int] = Counter()
    for path in files:
        with suppress(OSError, UnicodeDecodeError):
            for line in path.read_text("utf-8").splitlines():
                first = line.split(maxsplit=1)[:1]
                if first and first[0].isdecimal():
                    counts[int(first[0])] += 1
    return dict(sorted(counts.items()))


def unnamed_classes(labels: Labels, detector: str, classes: dict[int, str]) -> str:
    """One line that says which of a detector's classes labels without names are compared with.

    Args:
        detector: its name.
        classes: its class names by index.
    """
    counts = count_classes(labels.files.values())
    pairs = [
        f"{index} ({count} object{'s' if count != 1 else ''}) as {classes.get(index, 'none')}"
        for index, count in [*counts.items()][:SHOWN_CLASSES]
    ]
    more = f" and {len(counts) - SHOWN_CLASSES} more" if len(counts) > SHOWN_CLASSES else ""
    return (
        f"{labels.folder}: no file names its classes; taken for those of {detector}: "
        f"{', '.join(pairs) or 'none'}{more} (--names says otherwise)"
    )


def _box(values: list[float]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a label's numbers."""
    if len(values) == 4:
        x, y, w, h = values
        if w < 0 or h < 0:
            raise ValueError("negative size")
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2
    if len(values) < 6 or len(values) % 2:
        raise ValueError("neither a box nor a polygon")
    xs, ys = values[::2], values[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def parse_groups(texts: Iterable[str]) -> Groups | None:
    """Read --classes options: GROUP=name,name, or the name of a default group or of a class.

    Returns:
        The names of each group's classes, None without any option.

    Raises:
        ValueError: an option names nothing.
    """
    groups: Groups = {}
    for text in texts:
        group, _, listed = (part.strip() for part in text.partition("="))
        names = tuple(n.strip() for n in listed.split(",") if n.strip())
        if not group or ("=" in text and not names):
            raise ValueError(f"--classes {text!r} is not GROUP=name,name")
        groups[group] = names or GROUPS.get(group, (group,))
    return groups or None


def group_classes(classes: dict[int, str], groups: Groups | None) -> dict[str, list[int]]:
    """Indices of the classes that belong to each group; groups without any are left out.

    Args:
        classes: names by index; letter case, hyphens and underscores do not matter.
        groups: class names by group; without them those of `GROUPS`, or where none fits, each
            class as a group of its own.
    """
    found = {
        group: [k for k, name in classes.items() if _plain(name) in {_plain(n) for n in names}]
        for group, names in (GROUPS if groups is None else groups).items()
    }
    found = {group: indices for group, indices in found.items() if indices}
    if groups is None and not found:
        found = {name: [k] for k, name in classes.items()}
    return found


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.strip().casefold()))
