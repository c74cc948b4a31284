"""Where an image's objects are, told to the encoder: `ingest --allocation objects`.

Zarr hands a codec the tiles of a write without their places, so tiles are known by their contents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.codec.zarr_codec import trimmed_tiles
from archive_pipeline.detection.boxes import Boxes
from archive_pipeline.pcdc.constants import BLOCK_SIDE

MARGIN = 8.0  # pixels around an object that detectors look at as well
LEVELS_FINER = 2  # an octave: half the quantisation step


def _digest(tile: NDArray[np.uint8]) -> bytes:
    shape = str(tile.shape).encode()
    return hashlib.blake2b(np.ascontiguousarray(tile).data, key=shape, digest_size=16).digest()


def object_blocks(boxes: Boxes, height: int, width: int) -> NDArray[np.bool_]:
    """The blocks (B_h, B_w) of an image or a part that objects, or what is around them, lie in."""
    blocks = np.zeros((-(-height // BLOCK_SIDE), -(-width // BLOCK_SIDE)), bool)
    low = np.maximum((boxes[:, :2] - MARGIN) // BLOCK_SIDE, 0).astype(int)
    high = np.maximum((boxes[:, 2:] + MARGIN) // BLOCK_SIDE + 1, 0).astype(int)
    for (left, top), (right, bottom) in zip(low, high, strict=True):
        blocks[top:bottom, left:right] = True
    return blocks


class RaisedBlocks:
    """By how many levels the blocks of a part of an image are raised.

    Args:
        pixels: uint8 (height, width, 3), as they will be written.
        boxes: of objects, in pixels of this part.
        tile: side of a tile in pixels, a multiple of 32.
    """

    def __init__(self, pixels: NDArray[np.uint8], boxes: Boxes, tile: int) -> None:
        height, width = pixels.shape[:2]
        raised = object_blocks(boxes, height, width).astype(np.uint8) * LEVELS_FINER
        self._tiles = {}
        count = tile // BLOCK_SIDE
        for row, col, part in trimmed_tiles(pixels, tile):
            blocks = raised[row // BLOCK_SIDE :, col // BLOCK_SIDE :][:count, :count]
            if blocks.any():
                self._tiles[_digest(part)] = blocks

    def of(self, tiles: Iterable[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """uint8 (B_h, B_w) for each tile, as `Codec.encode` takes them; zeros for other tiles."""
        out = []
        for tile in tiles:
            rows, columns = (-(-side // BLOCK_SIDE) for side in tile.shape[:2])
            known = self._tiles.get(_digest(tile)) if tile.size else None
            blocks = np.zeros((rows, columns), np.uint8) if known is None else known
            out.append(blocks[:rows, :columns])
        return out
