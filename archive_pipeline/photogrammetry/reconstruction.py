"""A flight's frames reconstructed by COLMAP: cameras, their lens, and points on the ground."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
from numpy.typing import NDArray

from archive_pipeline.photogrammetry.frames import Frame, Pair
from archive_pipeline.photogrammetry.matching import packed, register
from archive_pipeline.photogrammetry.resuming import Arrays, Results, digest, versions

Array = NDArray[np.float64]

POSITION_M = 2.0  # standard deviation of positions by GPS
UNKNOWN_M = 1000.0  # of heights that nothing tells
BY_FRAME = "rotations", "centres", "errors"
NUMBERS = "track", "error", "spacing", "noise"
LEAST_FRAMES = 3  # of a reconstruction that says anything


@dataclass(frozen=True)
class Reconstruction:
    """What came out, in metres east, north and up.

    Attributes:
        rotations: of each registered frame, by its number: float64 (3, 3), world to camera.
        centres: where it was: float64 (3,).
        errors: mean reprojection error of its points, pixels.
        points: float64 (n, 3).
        track: frames that see a point, on average.
        error: mean reprojection error, pixels.
        spacing: ground sample distance: what a pixel covers at its points, median, metres.
        lenses: (focal length in pixels, radial distortion) of each lens, in the order of
            the frames.
        noise: standard deviation of a column or row of a point in a frame as the adjustment leaves
            it: root of the squared residuals over the redundancy, pixels; NaN where that is 0.
    """

    rotations: dict[int, Array]
    centres: dict[int, Array]
    errors: dict[int, float]
    points: Array
    track: float
    error: float
    spacing: float
    lenses: list[tuple[float, float]]
    noise: float = float("nan")

    def packed(self) -> Arrays:
        """All of it as arrays."""
        arrays: Arrays = {"points": self.points, "lenses": np.array(self.lenses).reshape(-1, 2)}
        for name in BY_FRAME:
            own = getattr(self, name)
            arrays[f"{name} of"] = np.array([*own], np.int64)
            arrays[name] = np.array([*own.values()], np.float64)
        arrays["numbers"] = np.array([getattr(self, name) for name in NUMBERS])
        return arrays

    @classmethod
    def unpacked(cls, arrays: Arrays) -> Reconstruction:
        """The reverse of `packed`."""
        numbers = dict(zip(NUMBERS, arrays["numbers"].tolist(), strict=True))
        lenses = [(focal, radial) for focal, radial in arrays["lenses"].tolist()]
        rotations, centres, errors = (
            dict(zip(arrays[f"{name} of"].tolist(), arrays[name], strict=True)) for name in BY_FRAME
        )
        means = {index: float(error) for index, error in errors.items()}
        return cls(rotations, centres, means, arrays["points"], lenses=lenses, **numbers)


def reconstruct_once(
    results: Results,
    frames: Sequence[Frame],
    where: Array,
    keypoints: Sequence[NDArray[np.float32]],
    tie_points: Mapping[Pair, Any],
    seed: int,
    scratch: Path,
) -> Reconstruction | None:
    """What an interrupted run had reconstructed from the same; else `reconstruct`."""
    pairs = [*tie_points]
    ties = packed([tie_points[pair] for pair in pairs])
    lenses = [frame.lens for frame in frames]
    question = {
        "reconstruction": digest(lenses, pairs, seed, where, *keypoints, *ties.values()),
        **versions(),
    }
    kept = results.get(question)
    if kept is not None:
        return Reconstruction.unpacked(kept) if kept else None
    found = reconstruct(frames, where, keypoints, tie_points, seed, scratch)
    results.put(question, {} if found is None else found.packed())
    return found


def reconstruct(
    frames: Sequence[Frame],
    where: Array,
    keypoints: Sequence[NDArray[np.float32]],
    tie_points: Mapping[Pair, Any],
    seed: int,
    scratch: Path,
) -> Reconstruction | None:
    """Reconstruct frames from their tie points; the same input always gives the same.

    Positions are priors; directions are not. Bundle adjustment sums in the order of its threads, so
    it runs on one.

    Args:
        where: float64 (n, 3), see `frames.places`.
        keypoints: of each frame, float32 (n, 2).
        tie_points: COLMAP's two-view geometries of frames that overlap.
        scratch: a folder for temporary files.

    Returns:
        None where no frames, or fewer than `LEAST_FRAMES`, fit together.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        path = Path(folder) / "database.db"
        numbers = _write(path, frames, where, keypoints, tie_points)
        options = pycolmap.IncrementalPipelineOptions()
        options.random_seed = options.mapper.random_seed = seed
        options.triangulation.random_seed = seed
        options.num_threads = options.mapper.num_threads = 1
        options.use_prior_position = True
        options.multiple_models = options.extract_colors = False
        options.min_model_size = LEAST_FRAMES
        found = pycolmap.incremental_mapping(path, folder, folder, options)
    models = [m for m in found.values() if m.num_reg_images() >= LEAST_FRAMES and m.num_points3D()]
    if not models:
        return None
    best = max(models, key=lambda model: model.num_reg_images())
    return _result(best, {number: index for index, number in enumerate(numbers)})


def _write(
    path: Path,
    frames: Sequence[Frame],
    where: Array,
    keypoints: Sequence[NDArray[np.float32]],
    tie_points: Mapping[Pair, Any],
) -> list[int]:
    """Write what COLMAP reconstructs from; returns its numbers of the frames."""
    with pycolmap.Database.open(path) as database:
        numbers = register(database, frames, "")
        for index, number in enumerate(numbers):
            database.write_keypoints(number, keypoints[index])
            prior = pycolmap.PosePrior()
            height = where[index, 2]
            prior.position = np.array([*where[index, :2], 0.0 if np.isnan(height) else height])
            spread = [POSITION_M, POSITION_M, UNKNOWN_M if np.isnan(height) else POSITION_M]
            prior.position_covariance = np.diag(np.square(spread))
            prior.coordinate_system = pycolmap.PosePriorCoordinateSystem.CARTESIAN
            prior.corr_data_id = database.read_image(number).data_id
            database.write_pose_prior(prior)
        for (one, two), geometry in tie_points.items():
            pair = numbers[one], numbers[two]
            database.write_matches(*pair, np.asarray(geometry.inlier_matches, np.uint32))
            database.write_two_view_geometry(*pair, geometry)
    return numbers


def _result(model: Any, indices: dict[int, int]) -> Reconstruction:
    rotations, centres, errors, spacings = {}, {}, {}, []
    lenses: dict[int, tuple[float, float]] = {}
    squares, observed = 0.0, 0
    # of some points COLMAP has numbers that nothing stands for in a stable order
    ids = sorted(model.point3D_ids())
    for number in sorted(model.reg_image_ids(), key=indices.__getitem__):
        image, index = model.image(number), indices[number]
        pose = image.cam_from_world()
        camera = model.camera(image.camera_id)
        focal, *_, radial = camera.params
        lenses.setdefault(image.camera_id, (float(focal), float(radial)))
        rotations[index] = np.asarray(pose.rotation.matrix(), np.float64)
        centres[index] = np.asarray(image.projection_center(), np.float64)
        spots = image.get_observation_points2D()
        seen = [model.point3D(spot.point3D_id) for spot in spots]
        if seen:
            errors[index] = float(np.mean([point.error for point in seen]))
            places = np.array([point.xyz for point in seen])
            ahead = (places - centres[index]) @ rotations[index].T
            spacings.append(float(np.median(ahead[:, 2])) / focal)
            off = camera.img_from_cam(ahead) - np.array([spot.xy for spot in spots])
            squares, observed = squares + float(np.square(off).sum()), observed + len(seen)
    # each camera has a place and a direction, each lens a focal length and a distortion
    unknowns = 3 * len(ids) + 6 * len(centres) + 2 * len(lenses)
    redundancy = 2 * observed - unknowns
    return Reconstruction(
        rotations,
        centres,
        errors,
        np.array([model.point3D(id).xyz for id in ids]).reshape(-1, 3),
        float(model.compute_mean_track_length()),
        float(model.compute_mean_reprojection_error()),
        float(np.median(spacings)) if spacings else float("nan"),
        list(lenses.values()),
        float(np.sqrt(squares / redundancy)) if redundancy > 0 else float("nan"),
    )
