"""Put a crop of an original beside the same crop of the archive, every frame a row.

    python examples/side_by_side.py ARCHIVE OUT.png [--size 512] [--rows 4]

Reads originals from the paths that the archive recorded and restored pixels through zarr alone.
"""

from __future__ import annotations

import argparse

import numpy as np
import zarr
from PIL import Image

from archive_pipeline.flight.read import read_pixels
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive")
    parser.add_argument("out")
    parser.add_argument("--size", type=int, default=512, help="crop side in pixels")
    parser.add_argument("--rows", type=int, default=4, help="most rows")
    arguments = parser.parse_args()

    archive = Archive.open(arguments.archive)
    rows = []
    for entry in archive.images():
        source = ArchivedImage(archive, entry).source
        if entry.record["codec"] != "pcdc" or len(rows) == arguments.rows:
            continue
        side = min(arguments.size, source.width, source.height)
        col, row = (source.width - side) // 2, (source.height - side) // 2
        original, _ = read_pixels(source, (col, row, side, side))
        pixels = zarr.open_array(arguments.archive, path=f"{entry.key}/pixels", mode="r")
        restored = np.asarray(pixels[row : row + side, col : col + side])
        error = original.astype(float) - restored
        psnr = 10 * np.log10(255**2 / max(float(np.mean(error**2)), 1e-9))
        ratio = source.width * source.height * 3 / entry.record["archive_bytes"]
        print(f"{entry.id}: PSNR of the crop {psnr:.2f} dB at {ratio:.1f} times fewer bytes")
        rows.append(np.hstack([original, restored]))
    if not rows:
        raise SystemExit(f"{arguments.archive}: no image is coded by pcdc")
    Image.fromarray(np.vstack(rows)).save(arguments.out)


if __name__ == "__main__":
    main()
