"""Tie points: features of two frames that match and agree with one geometry, by COLMAP.

Matching and RANSAC give the same with the same seed on any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
from numpy.typing import NDArray

from archive_pipeline.photogrammetry.features import Features
from archive_pipeline.photogrammetry.frames import Frame
from archive_pipeline.photogrammetry.resuming import Arrays, Results, digest, versions

LEAST = 15  # tie points of two frames that overlap: COLMAP's default
BATCH = 64  # pairs matched at a time
MATRICES = "E", "F", "H"
ANY_FOCAL = 1.2  # of the longer side, where a focal length is not known: COLMAP's default

pycolmap.logging.minloglevel = int(pycolmap.logging.ERROR)


def register(database: Any, frames: Sequence[Frame], prefix: str) -> list[int]:
    """Write frames and their lenses, one for all frames that share it; returns images' numbers."""
    cameras: dict[tuple[Any, ...], int] = {}
    numbers = []
    for index, frame in enumerate(frames):
        if frame.lens not in cameras:
            cameras[frame.lens] = database.write_camera(_camera(frame))
        name = image_name(prefix, index)
        image = pycolmap.Image(name=name, camera_id=cameras[frame.lens])
        numbers.append(database.write_image(image))
    return numbers


def image_name(prefix: str, index: int) -> str:
    """A frame's name in COLMAP: those of files may hold blanks, by which it splits lines."""
    return f"{prefix}{index:08d}"


def _camera(frame: Frame) -> Any:
    focal = frame.lens[-1]
    camera = pycolmap.Camera.create_from_model_id(
        pycolmap.INVALID_CAMERA_ID,
        pycolmap.CameraModelId.SIMPLE_RADIAL,
        focal or ANY_FOCAL * max(frame.width, frame.height),
        frame.width,
        frame.height,
    )
    camera.has_prior_focal_length = focal is not None
    return camera


class Matcher:
    """COLMAP's database of all frames, once as they were and once restored.

    Args:
        path: where to make it.
        seed: of RANSAC.
        threads: to match with.
        results: what an interrupted run had found.
    """

    def __init__(
        self,
        path: Path,
        frames: Sequence[Frame],
        seed: int,
        threads: int,
        results: Results | None = None,
    ) -> None:
        self._path, self._seed, self._threads = path, seed, threads
        self._results, self._frames = results or Results(nowhere=True), frames
        self._numbers: dict[str, int] = {}
        self._digests: dict[str, str] = {}
        with pycolmap.Database.open(path) as database:
            for prefix in ("o", "r"):
                for index, number in enumerate(register(database, frames, prefix)):
                    self._numbers[image_name(prefix, index)] = number

    def add(self, name: str, features: Features) -> None:
        """Give an image (`image_name`) its features."""
        lens = self._frames[int(name[1:])].lens
        self._digests[name] = digest(lens, features.points, features.descriptors)
        described = pycolmap.FeatureDescriptors(
            pycolmap.FeatureExtractorType.SIFT, features.descriptors
        )
        with pycolmap.Database.open(self._path) as database:
            database.write_keypoints(self._numbers[name], features.points)
            database.write_descriptors(self._numbers[name], described)

    def keypoints(self, name: str) -> NDArray[np.float32]:
        """Where an image's features are, float32 (n, 2), see `Features`."""
        with pycolmap.Database.open(self._path) as database:
            return np.asarray(database.read_keypoints(self._numbers[name]), np.float32)[:, :2]

    def match(
        self, pairs: Iterable[tuple[str, str]], step: Callable[[int], None]
    ) -> dict[tuple[str, str], Any]:
        """Match pairs of images and find the tie points.

        Args:
            step: called after some pairs with their number.

        Returns:
            COLMAP's two-view geometry of each pair.
        """
        todo = list(pairs)
        found: dict[tuple[str, str], Any] = {}
        for start in range(0, len(todo), BATCH):
            some = todo[start : start + BATCH]
            names = [[self._digests.get(name, "none") for name in pair] for pair in some]
            question = {"tie points": names, "seed": self._seed, **versions()}
            kept = self._results.get(question)
            geometries = self._match(some) if kept is None else unpacked(kept)
            if kept is None:
                self._results.put(question, packed(geometries))
            found.update(zip(some, geometries, strict=True))
            step(len(some))
        return found

    def _match(self, pairs: Sequence[tuple[str, str]]) -> list[Any]:
        matching = pycolmap.FeatureMatchingOptions()
        matching.use_gpu, matching.num_threads = False, self._threads
        verification = pycolmap.TwoViewGeometryOptions()
        verification.ransac.random_seed = self._seed
        verification.detect_watermark = False  # a frame and itself have not moved
        pairing = pycolmap.ImportedPairingOptions()
        pairing.match_list_path = self._path.with_suffix(".txt")
        lines = "".join(f"{one} {two}\n" for one, two in pairs)
        pairing.match_list_path.write_text(lines, encoding="utf-8")
        pycolmap.match_image_pairs(
            self._path, matching, pairing, verification, device=pycolmap.Device.cpu
        )
        with pycolmap.Database.open(self._path) as database:
            return [
                database.read_two_view_geometry(self._numbers[one], self._numbers[two])
                for one, two in pairs
            ]


def inliers(geometry: Any) -> NDArray[np.uint32]:
    """Numbers of the features that are tie points, uint32 (n, 2); none where frames do not fit."""
    pairs = np.asarray(geometry.inlier_matches, np.uint32).reshape(-1, 2)
    return pairs if len(pairs) >= LEAST else pairs[:0]


def packed(geometries: Sequence[Any]) -> Arrays:
    """COLMAP's geometries of pairs, as matching leaves them, as arrays."""
    rows, matches = [], []
    for geometry in geometries:
        row = [float(int(geometry.config))]
        for name in MATRICES:
            matrix = getattr(geometry, name)
            row += [np.nan] * 9 if matrix is None else np.ravel(matrix).tolist()
        rows.append(row)
        matches.append(np.asarray(geometry.inlier_matches, np.uint32).reshape(-1, 2))
    return {
        "numbers": np.array(rows, np.float64).reshape(-1, 1 + 9 * len(MATRICES)),
        "counts": np.array([len(some) for some in matches], np.int64),
        "matches": np.concatenate([*matches, np.zeros((0, 2), np.uint32)]),
    }


def unpacked(arrays: Arrays) -> list[Any]:
    """The reverse of `packed`."""
    geometries = []
    ends = np.cumsum(arrays["counts"])
    for row, end, count in zip(arrays["numbers"], ends, arrays["counts"], strict=True):
        geometry = pycolmap.TwoViewGeometry()
        geometry.config = pycolmap.TwoViewGeometryConfiguration(int(row[0]))
        for number, name in enumerate(MATRICES):
            matrix = row[1 + 9 * number : 10 + 9 * number].reshape(3, 3)
            if not np.isnan(matrix).any():
                setattr(geometry, name, matrix)
        geometry.inlier_matches = arrays["matches"][end - count : end]
        geometries.append(geometry)
    return geometries
