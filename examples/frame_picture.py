"""The README's picture: a frame, what it takes, and what comes back.

    python examples/frame_picture.py ARCHIVE FLIGHT_DIR OUT.jpg [--image NAME] [--at COL ROW]

Restored pixels come through the Python API.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

import archive_pipeline as ap

GAP, LINE = 16, 26  # pixels
INK, FRAME = (34, 34, 34), (220, 40, 40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive")
    parser.add_argument("originals", type=Path, help="folder of the flight")
    parser.add_argument("out", type=Path)
    parser.add_argument("--image", default="DJI_0002.JPG")
    parser.add_argument("--at", type=int, nargs=2, default=(2860, 640), metavar=("COL", "ROW"))
    parser.add_argument("--size", type=int, default=480, help="crop side in pixels")
    arguments = parser.parse_args()

    image = ap.open(arguments.archive)[arguments.image]
    (described,) = (
        found
        for flight in ap.info(arguments.archive)["flights"]
        for found in flight["images"]
        if found["id"] == image.id
    )
    side = arguments.size
    col, row = arguments.at
    with Image.open(arguments.originals / image.id) as file:
        frame = file.convert("RGB")
    crop = frame.crop((col, row, col + side, row + side))
    restored = Image.fromarray(image.read((col, row, side, side)).values)

    scale = side / image.height
    overview = frame.resize((round(image.width * scale), side), Image.Resampling.BOX)
    box = [round(v * scale) for v in (col, row, col + side, row + side)]
    ImageDraw.Draw(overview).rectangle(box, outline=FRAME, width=4)
    source, archived = described["source_bytes"], described["archive_bytes"]
    error = np.square(pixels(crop) - pixels(restored)).mean()
    sheet(
        arguments.out,
        [
            (overview, f"{image.width} x {image.height}, a JPEG of {source / 1e6:.1f} MB"),
            (crop, "original"),
            (
                restored,
                f"restored from {archived / 1e6:.1f} MB, {10 * np.log10(65025 / error):.1f} dB",
            ),
        ],
    )


def pixels(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image, float)


def sheet(out: Path, parts: list[tuple[Image.Image, str]]) -> None:
    """Pictures of one height side by side, a line under each."""
    height = parts[0][0].height
    width = sum(picture.width for picture, _ in parts) + GAP * (len(parts) - 1)
    page = Image.new("RGB", (width, height + LINE), "white")
    draw, font, left = ImageDraw.Draw(page), ImageFont.load_default(size=18), 0
    for picture, text in parts:
        page.paste(picture, (left, 0))
        draw.text((left, height + 3), text, INK, font)
        left += picture.width + GAP
    page.save(out, quality=85)


if __name__ == "__main__":
    main()
