"""Place a small flight's frames by photogrammetry, and measure what that gains.

    python workflows/place_by_photogrammetry.py FLIGHT OUT
    archive ingest FLIGHT --poses OUT/images.txt

FLIGHT is a folder of some tens of frames with positions. They are reconstructed by COLMAP
(pycolmap, the extra `photogrammetry`), every second match taking part, and written to OUT as a
model in geocentric coordinates. The other matches tell how far apart overlapping frames put the
same ground, placed by their tags and by the model: median and 90th percentile of each pair that
overlaps, and of all. What OpenDroneMap or Metashape found of a flight needs no such script.

Frames over foliage match only where it is known about where to look: within SEARCH of the place
that the tags tell. The focal length stays what the tags say, since frames that all look down do not
tell it; lens distortion is found.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import pycolmap
from numpy.typing import NDArray
from pyproj import Transformer

from archive_pipeline.flight.find import find_images
from archive_pipeline.flight.placing import Ground
from archive_pipeline.flight.poses import read_poses
from archive_pipeline.flight.read import open_dataset, read_source, read_window
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.geo.camera import field_of_view_pitch, rotation
from archive_pipeline.geo.mapping import crs_transformer, pixel_mapping
from archive_pipeline.photogrammetry.features import Features, find_features
from archive_pipeline.photogrammetry.frames import Frame, places
from archive_pipeline.photogrammetry.matching import register

Array = NDArray[np.float64]
Matches = dict[tuple[int, int], NDArray[np.uint32]]

FEATURES = 20_000  # of a frame
SEARCH = 0.225  # of the longer side, around where the tags have a point
CELL = 0.1  # of the longer side: features are compared by cells
RATIO = 0.88  # of the angles to the nearest and the second nearest descriptor, at most
NEAR = 0.75  # radians between descriptors, at most
LEAST = 30  # matches of two frames
ERROR_PX = 3.0  # of matches and the geometry of two frames
POSITION_M = 2.0, 2.0, 1.0  # standard deviations of positions by tags: east, north, up


@click.command(help=__doc__.split("\n\n", 1)[0])
@click.argument("flight", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--features", default=FEATURES, show_default=True, help="Features a frame, at most.")
def main(flight: Path, out: Path, features: int) -> None:
    """Place a flight's frames by photogrammetry."""
    sources = [read_source(Path(f.path), f.id) for f in find_images(flight)]
    report = place(sources, out, features)
    for pair in report["pairs"]:
        line = "{frames[0]} {frames[1]}: {matches} matches, by tags {tags[0]:.2f} m"
        click.echo(f"{line}, by photogrammetry {{poses[0]:.2f}} m".format(**pair))
    for kind in ("tags", "poses"):
        click.echo("{}: median {:.2f} m, 90 % within {:.2f} m".format(kind, *report[kind]))
    (out / "report.json").write_text(json.dumps(report, indent=1))


def place(sources: list[SourceImage], out: Path, features: int = FEATURES) -> dict[str, Any]:
    """Reconstruct frames, write the model into a folder, and measure.

    Args:
        sources: the frames, placed by their tags.
        out: the folder, which is made; the model's `images.txt` is for `--poses`.
        features: of a frame, at most.

    Returns:
        ``tags`` and ``poses``: median and 90th percentile, metres, of how far apart matches that
        took no part lie; the same of ``pairs``; the names of the frames that were ``placed``.
    """
    frames = [Frame(s.id, s.width, s.height, s.camera) for s in sources if s.camera is not None]
    if len(frames) < len(sources) or any(frame.problem for frame in frames):
        sys.exit("every frame needs a position")
    found = [_features(source, features) for source in sources]
    matches = {pair: m for pair, m in _matches(frames, found) if len(m) >= LEAST}
    model = _reconstruct(frames, found, {pair: m[::2] for pair, m in matches.items()})
    out.mkdir(parents=True, exist_ok=True)
    _to_earth(model, frames)
    model.write_text(out)
    placed = {model.image(number).name for number in model.reg_image_ids()}
    kept = {
        pair: _consistent(frames, found, pair, m[1::2])
        for pair, m in matches.items()
        if {frames[n].name for n in pair} <= placed
    }
    ground = Ground(poses=read_poses(str(out / "images.txt")))
    again = [read_source(Path(source.path), source.id, ground) for source in sources]
    return {**_measured(sources, again, found, kept), "placed": sorted(placed)}


def _features(source: SourceImage, most: int) -> Features:
    with open_dataset(source) as dataset:
        return find_features(
            lambda window: read_window(dataset, source, window)[0],
            source.width,
            source.height,
            most,
        )


def _matches(
    frames: list[Frame], found: list[Features]
) -> Iterator[tuple[tuple[int, int], NDArray[np.uint32]]]:
    """Pairs of frames that overlap, and features of both that are each other's nearest."""
    where = places(frames)
    unit = []
    for features in found:
        values = features.descriptors.astype(np.float32)
        unit.append(values / np.linalg.norm(values, axis=1, keepdims=True))
    for one, two in itertools.combinations(range(len(frames)), 2):
        expected = _expected(frames[one], frames[two], where[[one, two]], found[one].points)
        longer = max(frames[two].width, frames[two].height)
        size = np.array([frames[two].width, frames[two].height])
        inside = np.abs(expected - size / 2) <= size / 2
        if inside.all(axis=1).sum() >= LEAST:
            yield (
                (one, two),
                _nearest(expected / longer, found[two].points / longer, unit[one], unit[two]),
            )


def _expected(one: Frame, two: Frame, where: Array, points: NDArray[np.float32]) -> Array:
    """Where features of one frame are in another by tags, over flat ground; pixels."""
    height = one.camera.altitude_relative_m or float(where[0, 2])
    rays = _rays(one, points) @ rotation(one.camera)
    ground = where[0] + rays * (height / np.maximum(-rays[:, 2:], 1e-3))
    right, down, depth = rotation(two.camera) @ (ground - where[1]).T
    tangent = field_of_view_pitch(two.camera, two.width, two.height) or 1.0
    at = np.column_stack([right, down]) / np.maximum(depth, 1e-3)[:, None] / tangent
    return np.asarray(at + np.array([two.width / 2, two.height / 2]))


def _rays(frame: Frame, points: NDArray[np.float32]) -> Array:
    tangent = field_of_view_pitch(frame.camera, frame.width, frame.height) or 1.0
    offset = (points - np.array([frame.width / 2, frame.height / 2])) * tangent
    return np.column_stack([offset, np.ones(len(points))])


def _nearest(
    expected: Array, there: Array, one: NDArray[np.float32], two: NDArray[np.float32]
) -> NDArray[np.uint32]:
    """Numbers of features that are each other's nearest among those about where they should be."""
    best, near, second = (np.full(len(one), v) for v in (-1, -1.0, -1.0))
    back, back_near = np.full(len(two), -1), np.full(len(two), -1.0)
    cells = np.floor(expected / CELL).astype(np.int64)
    for cell in np.unique(cells, axis=0):
        low, high = cell * CELL - SEARCH, (cell + 1) * CELL + SEARCH
        theirs = np.flatnonzero(((there > low) & (there < high)).all(axis=1))
        if len(theirs) < 2:
            continue
        mine = np.flatnonzero((cells == cell).all(axis=1))
        alike = one[mine] @ two[theirs].T
        best[mine] = theirs[alike.argmax(axis=1)]
        top = np.partition(alike, -2, axis=1)[:, -2:]
        second[mine], near[mine] = top.min(axis=1), top.max(axis=1)
        first, value = alike.argmax(axis=0), alike.max(axis=0)
        better = value > back_near[theirs]
        back[theirs[better]], back_near[theirs[better]] = mine[first[better]], value[better]
    angle, other = (np.arccos(np.clip(v, -1.0, 1.0)) for v in (near, second))
    numbers = np.arange(len(one))
    good = (best >= 0) & (angle < RATIO * other) & (angle < NEAR) & (back[best] == numbers)
    return np.column_stack([numbers[good], best[good]]).astype(np.uint32)


def _two_views(
    frames: list[Frame], found: list[Features], pair: tuple[int, int], matches: NDArray[np.uint32]
) -> Any:
    """COLMAP's geometry of two frames, with the matches that agree with it."""
    options = pycolmap.TwoViewGeometryOptions()
    options.ransac.random_seed, options.ransac.max_error = 0, ERROR_PX
    options.detect_watermark = False
    cameras = []
    for number in pair:
        focal = frames[number].lens[-1] or 1.0
        size = frames[number].width, frames[number].height
        model = pycolmap.CameraModelId.SIMPLE_PINHOLE
        cameras.append(pycolmap.Camera.create_from_model_id(0, model, focal, *size))
    points = [found[number].points.astype(np.float64) for number in pair]
    return pycolmap.estimate_calibrated_two_view_geometry(
        cameras[0], points[0], cameras[1], points[1], matches, options
    )


def _consistent(
    frames: list[Frame], found: list[Features], pair: tuple[int, int], matches: NDArray[np.uint32]
) -> NDArray[np.uint32]:
    geometry = _two_views(frames, found, pair, matches)
    return np.asarray(geometry.inlier_matches, np.uint32).reshape(-1, 2)


def _reconstruct(frames: list[Frame], found: list[Features], matches: Matches) -> Any:
    """COLMAP's largest model, in metres east, north and up of the frames' middle."""
    where = places(frames)
    with TemporaryDirectory() as folder:
        path = Path(folder, "database.db")
        with pycolmap.Database.open(path) as database:
            numbers = register(database, frames, "")
            for n, number in enumerate(numbers):
                image = database.read_image(number)
                image.name = frames[n].name
                database.update_image(image)
                database.write_keypoints(number, found[n].points)
                prior = pycolmap.PosePrior()
                prior.position = np.nan_to_num(where[n])
                prior.position_covariance = np.diag(np.square(POSITION_M))
                prior.coordinate_system = pycolmap.PosePriorCoordinateSystem.CARTESIAN
                prior.corr_data_id = image.data_id
                database.write_pose_prior(prior)
            for pair, some in matches.items():
                geometry = _two_views(frames, found, pair, some)
                if len(geometry.inlier_matches) >= LEAST // 2:
                    ids = numbers[pair[0]], numbers[pair[1]]
                    database.write_matches(*ids, some)
                    database.write_two_view_geometry(*ids, geometry)
        models = pycolmap.incremental_mapping(path, folder, folder, _mapping())
    if not models:
        sys.exit("no two frames match")
    return max(models.values(), key=lambda model: model.num_reg_images())


def _mapping() -> Any:
    options = pycolmap.IncrementalPipelineOptions()
    options.random_seed = options.mapper.random_seed = options.triangulation.random_seed = 0
    options.num_threads = options.mapper.num_threads = 1
    options.use_prior_position, options.ba_refine_focal_length = True, False
    options.multiple_models = options.extract_colors = False
    options.min_model_size = 3
    # foliage has few matches
    options.mapper.init_min_num_inliers = 60
    options.mapper.abs_pose_min_num_inliers, options.mapper.abs_pose_min_inlier_ratio = 12, 0.1
    return options


def _to_earth(model: Any, frames: list[Frame]) -> None:
    """Move a model of `places`' axes to geocentric coordinates, the ellipsoid being its zero."""
    lon, lat = (np.array([getattr(f.camera, name) for f in frames]) for name in ("lon", "lat"))
    middle = float(np.angle(np.exp(1j * np.radians(lon)).mean(), deg=True)), float(lat.mean())
    to_earth = Transformer.from_crs("EPSG:4979", "EPSG:4978", always_xy=True)
    east, north = np.radians(middle)
    ce, se, cn, sn = np.cos(east), np.sin(east), np.cos(north), np.sin(north)
    axes = np.array([[-se, ce, 0.0], [-sn * ce, -sn * se, cn], [cn * ce, cn * se, sn]])
    at = np.array(to_earth.transform(*middle, 0.0))
    model.transform(pycolmap.Sim3d(1.0, pycolmap.Rotation3d(axes.T), at))


def _measured(
    tags: list[SourceImage], poses: list[SourceImage], found: list[Features], kept: Matches
) -> dict[str, Any]:
    """How far apart frames put the same ground, metres."""
    pairs, crs = [], str(tags[0].georef.crs)  # of a zone, in metres
    apart: dict[str, list[float]] = {"tags": [], "poses": []}
    for (one, two), matches in kept.items():
        if len(matches) < LEAST // 2:
            continue
        said: dict[str, Any] = {"frames": [tags[one].id, tags[two].id], "matches": len(matches)}
        for kind, sources in (("tags", tags), ("poses", poses)):
            ends = [
                _on_ground(sources[n], found[n].points[matches[:, side]], crs)
                for side, n in enumerate((one, two))
            ]
            off = np.hypot(*(ends[0] - ends[1]).T)
            apart[kind] += off.tolist()
            said[kind] = _spread(off)
        pairs.append(said)
    return {"pairs": pairs, **{kind: _spread(np.array(off)) for kind, off in apart.items()}}


def _on_ground(source: SourceImage, points: NDArray[np.float32], crs: str) -> Array:
    """Where pixels lie, in a CRS."""
    x, y = pixel_mapping(source.georef, inverse=False)(*points.astype(np.float64).T)
    return np.column_stack(crs_transformer(str(source.georef.crs), crs).transform(x, y))


def _spread(off: Array) -> list[float]:
    return [round(float(v), 3) for v in np.percentile(off, [50, 90])] if len(off) else []


if __name__ == "__main__":
    main()
