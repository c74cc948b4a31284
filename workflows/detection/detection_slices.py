"""Labelled images as slices at full resolution, for training a detector with Ultralytics.

The slices are those of `archive_pipeline.detection.boxes.slice_rows`, in which detectors later
see an image; an object that a slice cuts is labelled where enough of it shows.
"""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import yaml

from archive_pipeline.detection.boxes import Boxes, areas, intersections, slice_rows
from archive_pipeline.detection.labels import (
    Groups,
    LabelError,
    group_classes,
    read_labels,
    read_names,
)
from archive_pipeline.geo.georef import Window

VISIBLE = 0.3  # of an object's area; what is less of it in a slice is not labelled
EMPTY_SHARE = 5  # of the slices without an object every so many-th is kept
SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}


def train_images(data: Path) -> tuple[list[Path], dict[int, str]]:
    """Images that a data.yaml's `train` names, and the class names.

    Raises:
        click.ClickException: there are none.
    """
    file = data / "data.yaml"
    try:
        names = read_names(file)
        content = yaml.safe_load(file.read_text("utf-8"))
        folders = content["train"] if isinstance(content["train"], list) else [content["train"]]
        root = data / str(content.get("path") or ".")
    except LabelError as error:
        raise click.ClickException(str(error)) from error
    except KeyError as error:
        raise click.ClickException(f"{file}: no `train` in it") from error
    found = [
        p for f in folders for p in sorted((root / f).rglob("*")) if p.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise click.ClickException(f"{file}: no images in {', '.join(map(str, folders))}")
    return found, names


def label_of(image: Path) -> Path:
    """The label file of an image: in `labels` where the image is in `images`."""
    parts = list(image.with_suffix(".txt").parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts)


def cut(
    images: list[Path], names: dict[int, str], groups: Groups | None, size: int, out: Path
) -> tuple[int, int]:
    """Write slices of images and their labels in YOLO's layout below `out`.

    Args:
        groups: class names by new class; the labels' own classes without it.

    Returns:
        How many slices and how many objects (of whole images).
    """
    known = group_classes(names, groups or {name: (name,) for name in names.values()})
    slices = objects = empty = 0
    for path in images:
        pixels = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is None:
            raise click.ClickException(f"{path}: not an image")
        height, width = pixels.shape[:2]
        label = label_of(path)
        try:
            found = read_labels(label, width, height, names) if label.exists() else {}
        except LabelError as error:
            raise click.ClickException(str(error)) from error
        nothing = np.zeros((0, 4))
        boxes = [np.concatenate([nothing, *(found.get(names[i], nothing) for i in own)])
                 for own in known.values()]  # fmt: skip
        objects += sum(map(len, boxes))
        for window in (window for row in slice_rows(width, height, size) for window in row):
            col, row, across, down = window
            lines = [line for kind, own in enumerate(boxes) for line in seen(kind, own, window)]
            if not lines:
                empty += 1
                if empty % EMPTY_SHARE:
                    continue
            name = f"{path.stem}-{col}-{row}"
            part = pixels[row : row + down, col : col + across]
            cv2.imwrite(str(out / "images" / f"{name}.png"), part)
            (out / "labels" / f"{name}.txt").write_text("".join(lines))
            slices += 1
    return slices, objects


def seen(kind: int, boxes: Boxes, window: Window) -> list[str]:
    """Label lines of the boxes that a slice shows enough of, cut at its borders."""
    col, row, width, height = window
    frame = np.array([[col, row, col + width, row + height]], float)
    shares = intersections(boxes, frame)[:, 0] / np.maximum(areas(boxes), 1e-9)
    lines = []
    for box in boxes[shares >= VISIBLE]:
        left, right = np.clip(box[[0, 2]] - col, 0, width) / width
        top, bottom = np.clip(box[[1, 3]] - row, 0, height) / height
        values = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
        lines.append(" ".join([str(kind), *(f"{v:.6f}" for v in values)]) + "\n")
    return lines


def prepare(
    data: Path, holdout: tuple[str, ...], groups: Groups | None, size: int, out: Path
) -> dict[str, Any]:
    """Cut the training images into slices; returns what the card says of them.

    Raises:
        click.ClickException: nothing is left to train on or to hold out.
    """
    images, names = train_images(data)
    held = [p for p in images if any(fnmatch(p.name, pattern) for pattern in holdout)]
    if not holdout:
        held = images[9::10]
    parts = {"train": [p for p in images if p not in held], "val": held}
    shutil.rmtree(out, ignore_errors=True)
    facts: dict[str, Any] = {}
    for part, chosen in parts.items():
        if not chosen:
            raise click.ClickException(f"{data}: no image is left for {part!r}; see --holdout")
        for kind in ("images", "labels"):
            (out / part / kind).mkdir(parents=True)
        slices, objects = cut(chosen, names, groups, size, out / part)
        if not objects:
            raise click.ClickException(f"{data}: no labelled object in the images for {part!r}")
        facts[part] = {"images": len(chosen), "objects": objects, "slices": slices}
    own = group_classes(names, groups or {name: (name,) for name in names.values()})
    listed = {"path": str(out.absolute()), "train": "train/images", "val": "val/images"}
    listed["names"] = dict(enumerate(own))
    (out / "data.yaml").write_text(yaml.safe_dump(listed))
    facts["classes"] = {name: [names[i] for i in indices] for name, indices in own.items()}
    return facts
