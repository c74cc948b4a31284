"""ODM's cameras.json: the lenses of the shots that its shots.geojson places."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_poses import ABOVE, FOCAL, HEIGHT, SIZE, located, offsets, opensfm, shots

from archive_pipeline.flight.placing import Ground
from archive_pipeline.flight.poses import PosesError, read_poses
from archive_pipeline.flight.read import read_source
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.geo.lens import Distortion

LENS = {
    "projection_type": "brown", "width": SIZE[0], "height": SIZE[1],
    "focal_x": FOCAL, "focal_y": FOCAL, "c_x": 0.0061, "c_y": -0.0044,
    "k1": -0.11, "k2": 0.013, "p1": 0.0, "p2": 0.0, "k3": -0.004,
}  # fmt: skip
OTHERS = {"dji fc1 400 300 brown 0.7": {**LENS, "focal_x": 0.7, "k1": 0.2}}
TILT = 25.0
PIXELS = np.array([(0, 0), (SIZE[0], 0), SIZE, (0, SIZE[1]), (130, 90)], float).T


@pytest.fixture
def frame(tmp_path: Path) -> Path:
    """A frame without any tags."""
    Image.fromarray(np.zeros((SIZE[1], SIZE[0]), np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def project(frame: Path, camera: str | None, cameras: object, folder: str = "odm_report") -> Path:
    """What ODM leaves; its earlier releases do not name a shot's camera."""
    document = json.loads(shots(TILT))
    if camera is not None:
        document["features"][0]["properties"]["camera"] = camera
    path = frame.parent / folder / "shots.geojson"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    if cameras is not None:
        (frame.parent / "cameras.json").write_text(json.dumps(cameras))
    return path


def placed(frame: Path, shots: Path) -> SourceImage:
    return read_source(frame, "a.png", Ground(HEIGHT - ABOVE, poses=read_poses(str(shots))))


@pytest.mark.parametrize("folder", [".", "odm_report"])
@pytest.mark.parametrize("named", [True, False])
def test_they_count(frame: Path, folder: str, named: bool) -> None:
    """Their names are those in shots but for a mark; else size and focal length tell."""
    name = "sony dsc-wx220 400 300 brown 0.85"
    path = project(frame, f"v2 {name}" if named else None, {**OTHERS, name: LENS}, folder)
    found = placed(frame, path)
    assert not any("distortion" in warning for warning in found.warnings)
    here = offsets(found.georef, *PIXELS)
    np.testing.assert_allclose(
        here, offsets(located(frame, opensfm(TILT, lens=LENS)), *PIXELS), atol=0.01
    )
    plain = offsets(located(frame, opensfm(TILT)), *PIXELS)
    assert np.abs(here - plain).max() > 1.0


@pytest.mark.parametrize(
    ("camera", "cameras", "folder", "note"),
    [
        ("v2 a", None, ".", "without cameras.json"),
        ("v2 a", {"a": LENS}, "elsewhere", "without cameras.json"),
        ("v2 a", OTHERS, ".", "no lens of this camera"),
        (None, OTHERS, ".", "no lens of this camera"),
        (None, {"a": LENS, "b": {**LENS, "k1": 0.3}}, ".", "no lens of this camera"),
        ("v2 a", {"a": {**LENS, "projection_type": "dual"}}, ".", "model dual is not read"),
    ],
)
def test_one_that_is_not_found_is_named(
    frame: Path, camera: str | None, cameras: object, folder: str, note: str
) -> None:
    source = placed(frame, project(frame, camera, cameras, folder))
    assert any(note in warning for warning in source.warnings)
    assert source.camera is not None
    assert source.camera.focal_px == pytest.approx(FOCAL * max(SIZE))


def test_the_focal_length_of_a_part_of_a_flight(frame: Path) -> None:
    """Of a flight that was split ODM keeps the lenses of the first part alone."""
    poses = read_poses(str(project(frame, "v2 a", {"a": {**LENS, "focal_x": 0.88}})))
    pose = poses.find("a.png")
    assert pose is not None
    assert pose.lens is not None
    assert pose.lens.focal == FOCAL
    assert pose.lens.distortion == Distortion((-0.11, 0.013, -0.004, 0.0, 0.0, 0.0))


def test_lenses_alone_are_no_poses(frame: Path) -> None:
    path = project(frame, "v2 a", {"a": LENS})
    cameras = frame.with_name("cameras.json")
    with pytest.raises(PosesError, match=r"cameras\.json: holds lenses, no poses"):
        read_poses(str(cameras))
    for text in ("[1]", "{", '{"a": 1}', '{"a": {"projection_type": "brown", "focal_x": "wide"}}'):
        cameras.write_text(text)
        os.utime(path, ns=(1, len(text)))  # it is read again
        with pytest.raises(PosesError, match=f"^{path}: "):
            read_poses(str(path))
