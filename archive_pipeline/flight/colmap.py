"""COLMAP's models: images with their rotations and lenses, and points; text or binary.

The formats are those of COLMAP's documentation, "Output format".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from archive_pipeline.geo.lens import Lens, bent, not_read

Array = npt.NDArray[np.float64]

# Camera models by their numbers: name, how many parameters there are, how many are focal lengths.
_MODELS = (
    ("SIMPLE_PINHOLE", 3, 1),
    ("PINHOLE", 4, 2),
    ("SIMPLE_RADIAL", 4, 1),
    ("RADIAL", 5, 1),
    ("OPENCV", 8, 2),
    ("OPENCV_FISHEYE", 8, 2),
    ("FULL_OPENCV", 12, 2),
    ("FOV", 5, 2),
    ("SIMPLE_RADIAL_FISHEYE", 4, 1),
    ("RADIAL_FISHEYE", 5, 1),
    ("THIN_PRISM_FISHEYE", 12, 2),
    ("RAD_TAN_THIN_PRISM_FISHEYE", 16, 2),
    ("SIMPLE_DIVISION", 4, 1),
    ("DIVISION", 5, 2),
    ("SIMPLE_FISHEYE", 3, 1),
    ("FISHEYE", 4, 2),
)
_FOCALS = {name: focals for name, _, focals in _MODELS}
# How many radial terms are behind the principal point; other models' distortion is not read.
_RADIAL = {
    "SIMPLE_PINHOLE": 0,
    "PINHOLE": 0,
    "SIMPLE_RADIAL": 1,
    "RADIAL": 2,
    "OPENCV": 2,
    "OPENCV_FISHEYE": 4,
    "SIMPLE_RADIAL_FISHEYE": 1,
    "RADIAL_FISHEYE": 2,
    "SIMPLE_FISHEYE": 0,
    "FISHEYE": 0,
}


@dataclass(frozen=True)
class Shot:
    """One image of a model.

    Attributes:
        name: as COLMAP was given it, perhaps with folders.
        rotation: float64 (3, 3), world to camera: right, down, optical axis.
        place: float64 (3,), where the camera is.
        lens: its lens.
    """

    name: str
    rotation: Array
    place: Array
    lens: Lens


def read_model(images: Path) -> tuple[list[Shot], Array]:
    """Read a model by its `images.txt` or `images.bin`, the other files being beside it.

    Returns:
        Its images, and its points, float64 (n, 3); none without a file of them.

    Raises:
        OSError: a file cannot be read.
        ValueError, KeyError, IndexError, struct.error: a file is damaged, or none of COLMAP's.
    """
    suffix = images.suffix.lower()
    cameras, points = (images.with_name(f"{name}{suffix}") for name in ("cameras", "points3D"))
    if suffix == ".bin":
        with open(cameras, "rb") as file:
            lenses = dict(_binary_cameras(file))
        with open(images, "rb") as file:
            shots = [_shot(*found, lenses) for found in _binary_images(file)]
    else:
        lenses = dict(_text_cameras(cameras))
        shots = [_shot(*found, lenses) for found in _text_images(images)]
    if not points.exists():
        return shots, np.empty((0, 3))
    if suffix == ".bin":
        with open(points, "rb") as file:
            return shots, np.array(list(_binary_points(file))).reshape(-1, 3)
    rows = [line.split()[1:4] for line in _lines(points) if line]
    return shots, np.array(rows, np.float64).reshape(-1, 3)


def _shot(name: str, pose: tuple[float, ...], camera: int, lenses: dict[int, Lens]) -> Shot:
    w, x, y, z = np.array(pose[:4]) / np.linalg.norm(pose[:4])
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    return Shot(name, rotation, -rotation.T @ np.array(pose[4:7]), lenses[camera])


def _lens(model: str, width: int, height: int, numbers: tuple[float, ...]) -> Lens:
    focals, longer = _FOCALS[model], max(width, height)
    cx, cy = numbers[focals : focals + 2]
    focal = sum(numbers[:focals]) / focals
    centre = (cx - width / 2) / longer, (cy - height / 2) / longer
    if model not in _RADIAL:
        return Lens(focal / longer, centre, note=not_read(model))
    radial = numbers[focals + 2 : focals + 2 + _RADIAL[model]]
    return Lens(focal / longer, centre, bent(radial, "FISHEYE" in model))


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        yield from (line.strip() for line in file if not line.startswith("#"))


def _text_cameras(path: Path) -> Iterator[tuple[int, Lens]]:
    for line in filter(None, _lines(path)):
        number, model, width, height, *numbers = line.split()
        yield int(number), _lens(model, int(width), int(height), tuple(map(float, numbers)))


def _text_images(path: Path) -> Iterator[tuple[str, tuple[float, ...], int]]:
    # every second line has the image's points, and may be empty
    for line in list(_lines(path))[::2]:
        if line:
            _, *pose, camera, name = line.split(maxsplit=9)
            yield name, tuple(map(float, pose)), int(camera)


def _read(file: BinaryIO, layout: str) -> tuple[float, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _binary_cameras(file: BinaryIO) -> Iterator[tuple[int, Lens]]:
    for _ in range(int(_read(file, "<Q")[0])):
        number, model, width, height = map(int, _read(file, "<iiQQ"))
        name, count, _ = _MODELS[model]
        yield number, _lens(name, width, height, _read(file, f"<{count}d"))


def _binary_images(file: BinaryIO) -> Iterator[tuple[str, tuple[float, ...], int]]:
    for _ in range(int(_read(file, "<Q")[0])):
        _, *pose, camera = _read(file, "<I7dI")
        name = bytearray()
        while (letter := file.read(1)) != b"\0":
            if not letter:
                raise ValueError("it ends inside a name")
            name += letter
        file.seek(24 * int(_read(file, "<Q")[0]), 1)
        yield name.decode("utf-8", "surrogateescape"), tuple(pose), int(camera)


def _binary_points(file: BinaryIO) -> Iterator[tuple[float, ...]]:
    for _ in range(int(_read(file, "<Q")[0])):
        _, *place, _, _, _, _, track = _read(file, "<Q3d3BdQ")
        file.seek(8 * int(track), 1)
        yield tuple(place)
