"""Where the objects of training images are, for a policy that shall learn to see them.

    python workflows/training/find_objects.py crops.json OUT.json --detector MODEL IMAGES_DIR ...

Images are those that `pack_crops.py` packed, from the same folders. Labels are the truth where an
image has any (YOLO text files, in `labels` where the image is in `images`). In other images it is
what the detector is sure of; of what it is not, nothing shall be learned.

Writes OUT.json: by image name {"sure": boxes, "unsure": boxes}, each left, top, right, bottom in
pixels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import numpy as np
from PIL import Image

from archive_pipeline.detection.boxes import Boxes
from archive_pipeline.detection.detectors import detect_all, find_detectors
from archive_pipeline.detection.labels import read_labels, read_names

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "detection"))
from detection_slices import label_of
from windows import reader_of

SURE, UNSURE = 0.4, 0.1  # least scores


def labelled(path: Path, width: int, height: int) -> Boxes | None:
    """Boxes of an image's labels; None where it has none."""
    label = label_of(path)
    data = path.parents[2] / "data.yaml" if len(path.parents) > 2 else None
    if label == path.with_suffix(".txt") or not label.exists() or not data or not data.exists():
        return None
    boxes = read_labels(label, width, height, read_names(data)).values()
    return np.concatenate([np.zeros((0, 4)), *boxes])


@click.command(help=__doc__)
@click.argument("index", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--detector", required=True, help="YOLO detector, as for verify-detection.")
def main(index: Path, out: Path, folders: tuple[Path, ...], detector: str) -> None:
    files = find_detectors([detector])
    wanted = {name for name, *_ in json.loads(index.read_text())}
    objects, truths = {}, 0
    for path in (p for f in folders for p in sorted(f.iterdir()) if p.name in wanted):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        height, width = pixels.shape[:2]
        sure, unsure = labelled(path, width, height), np.zeros((0, 4))
        truths += sure is not None
        if sure is None:
            [(_, found)] = detect_all(files, "cpu", reader_of(pixels), width, height, height)
            sure = found.boxes[found.scores >= SURE]
            unsure = found.boxes[(found.scores >= UNSURE) & (found.scores < SURE)]
        objects[path.name] = {"sure": sure.tolist(), "unsure": unsure.tolist()}
    out.write_text(json.dumps(objects))
    count = sum(len(found["sure"]) for found in objects.values())
    click.echo(f"{count} objects in {len(objects)} images, {truths} of them labelled")


if __name__ == "__main__":
    main()
