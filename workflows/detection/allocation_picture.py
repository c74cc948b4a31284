"""Where allocations put a frame's bits, and what a detector then finds in it.

    python workflows/detection/allocation_picture.py OUT.png FRAME --detector MODEL

The upper row is the original with what the detector finds in it, and the levels of its blocks as
the policy and `--allocation objects` choose them within one budget; the lower one the same frame
coded by `uniform`, policy and objects, with what is found in each.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from archive_pipeline.codec.models import DEFAULT_MODEL
from archive_pipeline.detection.boxes import Boxes
from archive_pipeline.detection.detectors import (
    Detector,
    DetectorError,
    detect,
    find_detectors,
    load_detector,
)
from archive_pipeline.detection.object_blocks import RaisedBlocks
from archive_pipeline.pcdc.constants import BLOCK_SIDE
from archive_pipeline.pcdc.decoding import Symbols
from archive_pipeline.pcdc.encoding import encode_tiles
from archive_pipeline.store.layout import TILE

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
from coding import Coder, Pixels, join, split
from windows import reader_of

SURE = 0.25  # least score
BOX_COLOUR = "#D55E00"


def found_in(detector: Detector, pixels: Pixels) -> Boxes:
    """Boxes of what the detector finds for sure."""
    height, width = pixels.shape[:2]

    [found] = detect(detector, [reader_of(pixels)], width, height, None, height)
    return found.boxes[found.scores >= SURE]


class Coded:
    """A frame coded by one allocation within a budget: what is decoded, levels (B_h, B_w)."""

    def __init__(self, coder: Coder, pixels: Pixels, budget: int, rule: str, boxes: Boxes) -> None:
        tiles, shape = split(pixels), pixels.shape[:2]
        if rule == "objects":
            raised = RaisedBlocks(pixels, boxes, TILE).of(tiles)
            streams = encode_tiles(coder.codec, tiles, budget, raised=raised)
        else:
            streams = coder.encode(tiles, budget, rule)
        self.pixels = coder.decode(streams, shape, 0)
        symbols = coder.codec.decode_symbols(streams, TILE, TILE)
        levels = [one.levels for one in symbols if isinstance(one, Symbols)]
        blocks = (-(-shape[0] // BLOCK_SIDE), -(-shape[1] // BLOCK_SIDE))
        self.levels: NDArray[np.uint8] = join(levels, blocks, TILE // BLOCK_SIDE)


def draw(
    out: Path, original: Pixels, boxes: Boxes, coded: dict[str, Coded], found: dict[str, Boxes],
    photograph: bool,
) -> None:  # fmt: skip
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    height, width = original.shape[:2]
    figure, axes = pyplot.subplots(
        2, 3, figsize=(12, 0.6 + 8 * height / width), layout="constrained"
    )

    def show(panel: Any, pixels: Pixels, title: str, objects: Boxes) -> None:
        panel.imshow(pixels if photograph else np.full_like(pixels, 245))
        for x0, y0, x1, y1 in objects:
            panel.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=BOX_COLOUR))
        panel.set_title(title, fontsize=10)

    show(axes[0, 0], original, f"original: {len(boxes)} found", boxes)
    for panel, rule in zip(axes[0, 1:], ("policy", "objects"), strict=True):
        shown = panel.imshow(
            coded[rule].levels, cmap="viridis", vmin=1, vmax=5, extent=(0, width, height, 0)
        )
        panel.set_title(f"{rule}: levels of blocks", fontsize=10)
    for panel, (rule, one) in zip(axes[1], coded.items(), strict=True):
        show(panel, one.pixels, f"{rule}: {len(found[rule])} found", found[rule])
    for panel in axes.flat:
        panel.set_axis_off()
    figure.colorbar(shown, ax=axes[0], ticks=range(1, 6), label="level (5: finest)", shrink=0.8)
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


@click.command(help=__doc__)
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("frame", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--detector", required=True, metavar="MODEL", help="As for verify-detection.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="The codec's.")
@click.option("--source-ratio", default=30.0, show_default=True)
@click.option(
    "--photograph/--no-photograph", default=True, help="Draw the pixels, or only what is found."
)
def main(
    out: Path, frame: Path, detector: str, model: str, source_ratio: float, photograph: bool
) -> None:
    coder = Coder(model)
    try:
        loaded = load_detector(*find_detectors([detector]))
        pixels = np.asarray(Image.open(frame).convert("RGB"))
        boxes = found_in(loaded, pixels)
        budget = int(frame.stat().st_size / source_ratio)
        rules = ("uniform", "policy", "objects")
        coded = {rule: Coded(coder, pixels, budget, rule, boxes) for rule in rules}
        found = {rule: found_in(loaded, one.pixels) for rule, one in coded.items()}
    except (DetectorError, OSError) as error:
        raise click.ClickException(str(error)) from error
    draw(out, pixels, boxes, coded, found, photograph)
    click.echo(", ".join(f"{rule}: {len(found[rule])} of {len(boxes)} found" for rule in rules))


if __name__ == "__main__":
    main()
