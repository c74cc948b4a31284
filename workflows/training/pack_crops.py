"""Decode training images once into a memory-mapped file that `train_transform.py` samples from.

    python workflows/training/pack_crops.py OUT.npy IMAGES_DIR [IMAGES_DIR ...]

Writes OUT.npy (uint8, all pixels end to end) and OUT.json (a list of [name, offset, height,
width], offset in bytes). JPEG decoding otherwise dominates training time.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
from PIL import Image


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(out: Path, folders: tuple[Path, ...]) -> None:
    paths = [
        p
        for f in folders
        for p in sorted(f.iterdir())
        if p.suffix.lower() in {".jpg", ".jpeg", ".png", ".tif", ".tiff"}
    ]
    if not paths:
        raise click.ClickException(f"no images in {', '.join(map(str, folders))}")
    sizes = []
    for path in paths:
        with Image.open(path) as image:
            sizes.append((image.height, image.width))
    total = sum(h * w * 3 for h, w in sizes)
    pixels = np.lib.format.open_memmap(out, mode="w+", dtype=np.uint8, shape=(total,))
    index, offset = [], 0
    for path, (h, w) in zip(paths, sizes, strict=True):
        with Image.open(path) as image:
            pixels[offset : offset + h * w * 3] = np.asarray(image.convert("RGB")).reshape(-1)
        index.append([path.name, offset, h, w])
        offset += h * w * 3
    out.with_suffix(".json").write_text(json.dumps(index))
    click.echo(f"{len(paths)} images, {total / 3e6:.0f} megapixels")


if __name__ == "__main__":
    main()
