"""Poses that photogrammetry found, in the words of its programs: each puts a frame where it was.

One camera is written into all formats by their own rules, from its place and its axes in geocentric
coordinates; where its pixels see the ground is computed from those axes alone.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import Run
from PIL import Image
from pyproj import CRS, Transformer
from scipy.spatial.transform import Rotation

from archive_pipeline.flight.placing import Ground
from archive_pipeline.flight.poses import PosesError, read_poses
from archive_pipeline.flight.read import read_source
from archive_pipeline.geo.camera import rotation
from archive_pipeline.geo.georef import Georef
from archive_pipeline.geo.lens import Distortion
from archive_pipeline.geo.mapping import pixel_mapping

LON, LAT, HEIGHT, ABOVE = 8.9, 47.5, 500.0, 80.0  # far from the zone's meridian
SIZE, FOCAL = (400, 300), 0.9  # of the longer side
UTM = "EPSG:32632"
TO_ECEF = Transformer.from_crs("EPSG:4979", "EPSG:4978", always_xy=True)
TO_UTM = Transformer.from_crs("EPSG:4326", UTM, always_xy=True)


def geocentric(lon: float, lat: float, height: float) -> np.ndarray:
    return np.array(TO_ECEF.transform(lon, lat, height))


def local_axes(lon: float = LON, lat: float = LAT, height: float = HEIGHT) -> np.ndarray:
    """Rows: east, north, up in geocentric coordinates, by differences."""
    here = geocentric(lon, lat, height)
    steps = [(lon + 1e-6, lat, height), (lon, lat + 1e-6, height), (lon, lat, height + 1)]
    rows = [geocentric(*step) - here for step in steps]
    return np.array([row / np.linalg.norm(row) for row in rows])


def camera(tilt: float = 25.0, roll: float = 8.0) -> np.ndarray:
    """Rows: right, down and axis in east, north, up, of a camera tilted ahead, heading 130."""
    yaw, tilt, roll = np.radians([130.0, tilt, roll])
    ahead, right = np.array([np.sin(yaw), np.cos(yaw), 0]), np.array([np.cos(yaw), -np.sin(yaw), 0])
    axis = np.sin(tilt) * ahead - np.cos(tilt) * np.array([0, 0, 1.0])
    down = np.cross(axis, right)
    cr, sr = np.cos(roll), np.sin(roll)
    return np.array([cr * right + sr * down, cr * down - sr * right, axis])


def shots(tilt: float) -> str:
    """ODM's: axes against the grid of the zone, by differences of projected coordinates."""
    east = np.subtract(TO_UTM.transform(LON + 1e-6, LAT), TO_UTM.transform(LON, LAT))
    turn = np.arctan2(east[1], east[0])  # of true east from the grid's
    grid = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    properties = {
        "filename": "a.png", "focal": FOCAL, "width": SIZE[0], "height": SIZE[1],
        "translation": [*TO_UTM.transform(LON, LAT), HEIGHT],
        "rotation": cv2.Rodrigues(camera(tilt) @ grid.T)[0].ravel().tolist(),
    }  # fmt: skip
    point = {"type": "Point", "coordinates": [LON, LAT, HEIGHT]}
    feature = {"type": "Feature", "properties": properties, "geometry": point}
    return json.dumps({"type": "FeatureCollection", "features": [feature]})


def opensfm(
    tilt: float,
    roll: float = 8.0,
    points: np.ndarray | None = None,
    lens: dict[str, object] | None = None,
) -> str:
    """OpenSfM's: about a reference some way off; points are east, north, up of the camera."""
    lon, lat, height = LON - 0.01, LAT + 0.008, 400.0
    axes = local_axes(lon, lat, height)
    place = axes @ (geocentric(LON, LAT, HEIGHT) - geocentric(lon, lat, height))
    world = camera(tilt, roll) @ local_axes() @ axes.T
    around = np.tile([0.0, 0.0, -ABOVE], (3, 1)) if points is None else points
    ground = place + around @ local_axes() @ axes.T
    part = {
        "reference_lla": {"latitude": lat, "longitude": lon, "altitude": height},
        "cameras": {"c": {"projection_type": "perspective", "width": SIZE[0], "height": SIZE[1],
                          "focal": FOCAL, "k1": 0.0, "k2": 0.0, **(lens or {})}},
        "shots": {"a.png": {"rotation": cv2.Rodrigues(world)[0].ravel().tolist(),
                            "translation": (-world @ place).tolist(), "camera": "c"}},
        "points": {str(n): {"coordinates": at.tolist(), "color": [0, 0, 0]}
                   for n, at in enumerate(ground)},
    }  # fmt: skip
    return json.dumps([part])


def metashape(tilt: float) -> str:
    """Metashape's: a chunk that is turned, scaled and moved; cameras to the chunk."""
    turn, scale = cv2.Rodrigues(np.array([0.3, -0.8, 0.5]))[0], 12.5
    move = geocentric(LON, LAT, HEIGHT) - np.array([5.0, 7.0, -3.0])
    place = turn.T @ np.array([5.0, 7.0, -3.0]) / scale
    matrix = np.eye(4)
    matrix[:3, :3] = turn.T @ (camera(tilt) @ local_axes()).T
    matrix[:3, 3] = place

    def text(numbers: np.ndarray) -> str:
        return " ".join(map(repr, np.ravel(numbers).tolist()))

    return f"""<?xml version="1.0" encoding="UTF-8"?>
<document version="1.5.0"><chunk label="Chunk 1" enabled="true">
<sensors next_id="1"><sensor id="0" label="s" type="frame">
<resolution width="{SIZE[0]}" height="{SIZE[1]}"/>
<calibration type="frame" class="initial"><f>1.0</f></calibration>
<calibration type="frame" class="adjusted"><resolution width="{SIZE[0]}" height="{SIZE[1]}"/>
<f>{FOCAL * max(SIZE)}</f><cx>0</cx><cy>0</cy></calibration></sensor></sensors>
<cameras next_id="2" next_group_id="0">
<camera id="0" sensor_id="0" label="a"><transform>{text(matrix)}</transform></camera>
<camera id="1" sensor_id="0" label="not-aligned"/></cameras>
<transform><rotation locked="false">{text(turn)}</rotation>
<translation locked="false">{text(move)}</translation>
<scale locked="false">{scale}</scale></transform></chunk></document>"""


def colmap(tilt: float, binary: bool) -> dict[str, bytes]:
    """COLMAP's, in geocentric coordinates: quaternions from the world to the camera."""
    world = Rotation.from_matrix(camera(tilt) @ local_axes())
    x, y, z, w = world.as_quat()
    pose = [w, x, y, z, *(-world.apply(geocentric(LON, LAT, HEIGHT)))]
    lens = [FOCAL * max(SIZE), FOCAL * max(SIZE), SIZE[0] / 2, SIZE[1] / 2]
    ground = geocentric(LON, LAT, HEIGHT - ABOVE)
    if binary:
        image = struct.pack("<QI7dI", 1, 7, *pose, 3) + b"100MEDIA/a.png\0"
        image += struct.pack("<Qddq", 1, 1.0, 2.0, 5)
        cameras = struct.pack("<QiiQQ", 1, 3, 1, *SIZE) + struct.pack("<4d", *lens)
        point = struct.pack("<QQ3d3BdQII", 1, 5, *ground, 1, 2, 3, 0.5, 1, 7, 0)
        return {"images.bin": image, "cameras.bin": cameras, "points3D.bin": point}

    def text(*values: object) -> str:
        return " ".join(str(value) for value in values)

    files = {
        "images.txt": f"# IMAGE_ID, ...\n{text(7, *pose, 3, '100MEDIA/a.png')}\n1.0 2.0 5\n",
        "cameras.txt": f"# CAMERA_ID, ...\n{text(3, 'PINHOLE', *SIZE, *lens)}\n",
        "points3D.txt": f"# POINT3D_ID, ...\n{text(5, *ground, 1, 2, 3, 0.5, 7, 0)}\n",
    }
    return {name: content.encode() for name, content in files.items()}


def pix4d(tilt: float, wgs84: bool) -> dict[str, str]:
    """PIX4Dmapper's: angles from the image's right, up and back to the grid of the zone."""
    east = np.subtract(TO_UTM.transform(LON + 1e-6, LAT), TO_UTM.transform(LON, LAT))
    turn = np.arctan2(east[1], east[0])
    grid = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    right, down, axis = camera(tilt) @ grid.T
    angles = Rotation.from_matrix(np.array([right, -down, -axis]).T).as_euler("XYZ", degrees=True)
    place = (LAT, LON) if wgs84 else TO_UTM.transform(LON, LAT)
    names = "latitude longitude altitude" if wgs84 else "X Y Z"
    values = " ".join(f"{number:.12f}" for number in (*place, HEIGHT, *angles))
    focal = FOCAL * max(SIZE)
    lens = f"""fileName imageWidth imageHeight
camera matrix K [3x3]
radial distortion [3x1]
tangential distortion [2x1]
camera position t [3x1]
camera rotation R [3x3]
camera model m = K [R|-Rt] X

a.png {SIZE[0]} {SIZE[1]}
{focal} 0 {SIZE[0] / 2}
0 {focal} {SIZE[1] / 2}
0 0 1
0 0 0
0 0
1 2 3
1 0 0
0 1 0
0 0 1
"""
    end = "_wgs84" if wgs84 else ""
    files = {
        f"p_calibrated_external_camera_parameters{end}.txt":
            f"imageName {names} Omega Phi Kappa\na.png {values}\n",
        "p_calibrated_camera_parameters.txt": lens,
    }  # fmt: skip
    if not wgs84:
        files["p_wkt.prj"] = CRS(UTM).to_wkt("WKT1_ESRI")
    return files


PIX4D = "p_calibrated_external_camera_parameters"
FORMATS: dict[str, Callable[[float], str]] = {
    "shots.geojson": shots,
    "reconstruction.json": opensfm,
    "cameras.xml": metashape,
}


def seen(col: float, row: float, tilt: float) -> np.ndarray:
    """Metres east and north of the camera where a pixel sees the ground."""
    right, down, axis = camera(tilt)
    focal = FOCAL * max(SIZE)
    ray = (col - SIZE[0] / 2) * right + (row - SIZE[1] / 2) * down + focal * axis
    return ray[:2] * ABOVE / -ray[2]


@pytest.fixture
def frame(tmp_path: Path) -> Path:
    """A frame without any tags."""
    Image.fromarray(np.zeros((SIZE[1], SIZE[0]), np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("tilt", [0.0, 25.0])
@pytest.mark.parametrize(
    "name", [*FORMATS, "images.txt", "images.bin", f"{PIX4D}.txt", f"{PIX4D}_wgs84.txt"]
)
def test_a_frame_lies_where_its_camera_was(frame: Path, name: str, tilt: float) -> None:
    path = frame.with_name(name)
    if name in FORMATS:
        path.write_text(FORMATS[name](tilt))
    elif name.startswith(PIX4D):
        for other, text in pix4d(tilt, name.endswith("_wgs84.txt")).items():
            frame.with_name(other).write_text(text)
    else:
        for other, content in colmap(tilt, name.endswith("bin")).items():
            frame.with_name(other).write_bytes(content)
    poses = read_poses(str(path))
    # reconstructions know where the ground is
    known = name not in ("shots.geojson", "cameras.xml") and not name.startswith(PIX4D)
    ground = Ground(None if known else HEIGHT - ABOVE, poses=poses)
    source = read_source(frame, "a.png", ground)
    assert source.camera is not None
    np.testing.assert_allclose(rotation(source.camera), camera(tilt), atol=2e-6)
    assert source.georef.method == "camera"
    ring = source.georef.footprint
    assert ring is not None
    corners = [(0, 0), (SIZE[0], 0), (SIZE[0], SIZE[1]), (0, SIZE[1])]
    for (lon, lat), corner in zip(ring[:4], corners, strict=True):
        offset = local_axes() @ (geocentric(lon, lat, HEIGHT) - geocentric(LON, LAT, HEIGHT))
        np.testing.assert_allclose(offset[:2], seen(*corner, tilt), atol=0.01)


def located(frame: Path, text: str) -> Georef:
    path = frame.with_name("reconstruction.json")
    path.write_text(text)
    return read_source(frame, "a.png", Ground(poses=read_poses(str(path)))).georef


def offsets(georef: Georef, cols: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Where pixels lie, metres east and north of the camera."""
    x, y = pixel_mapping(georef, inverse=False)(cols, rows)
    lon, lat = Transformer.from_crs(georef.crs, "EPSG:4326", always_xy=True).transform(x, y)
    places = np.column_stack(TO_ECEF.transform(lon, lat, np.full(len(lon), HEIGHT)))
    return ((places - geocentric(LON, LAT, HEIGHT)) @ local_axes().T)[:, :2]


@pytest.mark.parametrize(("tilt", "affine"), [(0.0, True), (2.0, False)])
def test_a_tilt_that_was_found_counts(frame: Path, tilt: float, affine: bool) -> None:
    """Of 2 degrees it is a metre in the corners, which tags would not be worth."""
    georef = located(frame, opensfm(tilt, roll=0.0))
    assert (georef.transform is not None) == affine
    right, down, axis = camera(tilt, 0.0)
    corners = np.array([(0, 0), (SIZE[0], 0), SIZE, (0, SIZE[1])], float)
    for (col, row), found in zip(corners, offsets(georef, *corners.T), strict=True):
        ray = (col - SIZE[0] / 2) * right + (row - SIZE[1] / 2) * down + FOCAL * max(SIZE) * axis
        np.testing.assert_allclose(found, ray[:2] * ABOVE / -ray[2], atol=0.01)


@pytest.mark.parametrize("tilt", [0.0, 25.0])
def test_the_ground_is_where_points_in_view_are(frame: Path, tilt: float) -> None:
    """It slopes, trees stand on it, and a hill is out of view."""
    slope, below = np.array([0.15, -0.08]), 70.0
    rng = np.random.default_rng(1)
    flat = rng.uniform(-60.0, 60.0, (400, 2))
    up = flat @ slope - below
    up[::7] += rng.uniform(3.0, 12.0, len(up[::7]))
    hill = np.column_stack([rng.uniform(300.0, 400.0, (3000, 2)), np.full(3000, 40.0)])
    points = np.concatenate([np.column_stack([flat, up]), hill])
    georef = located(frame, opensfm(tilt, points=points))
    right, down, axis = camera(tilt)
    pixels = np.array([(0, 0), (SIZE[0], 0), SIZE, (0, SIZE[1]), (130, 90)], float)
    for (col, row), found in zip(pixels, offsets(georef, *pixels.T), strict=True):
        ray = (col - SIZE[0] / 2) * right + (row - SIZE[1] / 2) * down + FOCAL * max(SIZE) * axis
        expected = ray[:2] * below / (ray[:2] @ slope - ray[2])
        np.testing.assert_allclose(found, expected, atol=0.05)


@pytest.mark.parametrize(
    "lens",
    [
        {"k1": -0.12, "k2": 0.01},
        {"projection_type": "brown", "focal_x": FOCAL, "k1": 0.05, "k3": -0.02},
        {"projection_type": "fisheye", "k1": -0.02},
    ],
)
def test_lenses_that_bend(frame: Path, lens: dict[str, object]) -> None:
    """The pinhole next to the lens is nearer all over than the one without its distortion."""
    georef = located(frame, opensfm(25.0, lens=lens))
    right, down, axis = camera(25.0)
    slopes = np.array(
        [(x, y) for x in np.linspace(-0.5, 0.5, 9) for y in np.linspace(-0.35, 0.35, 9)]
    )
    rays = slopes @ [right, down] + axis
    truth = rays[:, :2] * ABOVE / -rays[:, 2:]
    r = np.hypot(*slopes.T)
    bent = np.arctan(r) if lens.get("projection_type") == "fisheye" else r
    terms = sum(float(lens.get(f"k{n}", 0.0)) * bent ** (2 * n) for n in (1, 2, 3))  # type: ignore[arg-type]
    seen = slopes * (bent * (1 + terms) / np.maximum(r, 1e-12))[:, None]
    pixels = seen * FOCAL * max(SIZE) + np.array(SIZE) / 2
    off = np.hypot(*(offsets(georef, *pixels.T) - truth).T)
    plain = np.hypot(*(offsets(located(frame, opensfm(25.0)), *pixels.T) - truth).T)
    assert np.sqrt((off**2).mean()) < 0.65 * np.sqrt((plain**2).mean())
    assert off.max() < plain.max() / 2


def test_lenses_that_nobody_knows_are_named(frame: Path) -> None:
    path = frame.with_name("reconstruction.json")
    path.write_text(opensfm(0.0, lens={"projection_type": "dual"}))
    source = read_source(frame, "a.png", Ground(poses=read_poses(str(path))))
    assert any("lens of the model dual is not read" in warning for warning in source.warnings)
    for number in (0.0, -0.5, float("nan")):
        path.write_text(opensfm(0.0, lens={"focal": number, "k1": 0.1}))
        os.utime(path, ns=(1, round(abs(number) * 10) if number == number else 99))
        if number:
            with pytest.raises(PosesError, match="its lens is none"):
                read_poses(str(path))
    for radial in ((1e300, -1e300), (-1e9,), (float("inf"),)):
        x, y = Distortion(radial).straightened(np.array([0.0, 0.3]), np.array([0.1, 0.4]))
        assert np.isfinite([x, y]).all()


@pytest.mark.parametrize(
    ("head", "place"),
    [
        ("EPSG:4326", (LON, LAT)),
        ("WGS84 UTM 32N", TO_UTM.transform(LON, LAT)),
        ("+proj=utm +zone=32 +datum=WGS84 +units=m +no_defs", TO_UTM.transform(LON, LAT)),
    ],
)
def test_geo_txt(frame: Path, head: str, place: tuple[float, float]) -> None:
    path = frame.with_name("geo.txt")
    lines = [head, "# a comment", "", f"A.PNG {place[0]!r} {place[1]!r} 500.5", "b.png 1 2"]
    path.write_text("\n".join(lines))
    source = read_source(frame, "a.png", Ground(poses=read_poses(str(path))))
    assert source.camera is not None
    assert (source.camera.lon, source.camera.lat) == pytest.approx((LON, LAT), abs=1e-8)
    assert source.camera.altitude_gps_m == 500.5
    assert source.georef.method == "point"


@pytest.mark.parametrize(
    ("comment", "angles"),
    [
        ("# name x y z yaw pitch roll", (130.0, 25.0, 8.0)),
        (
            "#image_name geo_x geo_y geo_z yaw (degrees) pitch (degrees) roll (degrees)",
            (130, 25, 8),
        ),
        ("# name x y z Omega Phi Kappa horz vert", None),
        ("# nothing of angles", ()),
    ],
)
@pytest.mark.parametrize("head", ["EPSG:4326", UTM])
def test_angles_of_geo_txt(
    frame: Path, head: str, comment: str, angles: tuple[float, ...] | None
) -> None:
    """They are two things in two releases of ODM: a comment tells."""
    pitch = 25.0
    ahead, right = np.radians(130.0), np.radians(8.0)
    if angles is None:  # of the same camera, in the grid of the file
        turn = 0.0
        if head == UTM:
            east = np.subtract(TO_UTM.transform(LON + 1e-6, LAT), TO_UTM.transform(LON, LAT))
            turn = np.arctan2(east[1], east[0])
        about = Rotation.from_euler("z", turn).as_matrix()
        expected = camera(pitch)
        r, d, a = expected @ about.T
        angles = tuple(Rotation.from_matrix(np.array([r, -d, -a]).T).as_euler("XYZ", degrees=True))
    else:  # forward first, then right: axes by turning them, one after the other
        turns = Rotation.from_euler("ZYX", [ahead, np.radians(pitch), right])
        forward, side, below = turns.as_matrix().T @ np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1]])
        expected = np.array([side, -forward, below])
    place = (LON, LAT) if head == "EPSG:4326" else TO_UTM.transform(LON, LAT)
    path = frame.with_name("geo.txt")
    given = " ".join(map(str, angles or (1.0, 2.0, 3.0)))
    path.write_text(f"{head}\n{comment}\na.png {place[0]!r} {place[1]!r} 500.5 {given} 0.1 0.2\n")
    source = read_source(frame, "a.png", Ground(poses=read_poses(str(path))))
    assert source.camera is not None
    said = any("geo.txt: angles are not read" in warning for warning in source.warnings)
    assert said == (angles == ())
    if angles:
        np.testing.assert_allclose(rotation(source.camera), expected, atol=2e-6)
    else:
        assert source.camera.yaw_deg is None


def test_pix4d_in_a_crs_that_nobody_names(frame: Path) -> None:
    for other, text in pix4d(0.0, False).items():
        frame.with_name(other).write_text(text)
    frame.with_name("p_wkt.prj").unlink()
    with pytest.raises(PosesError, match=r"p_wkt\.prj is not beside it"):
        read_poses(str(frame.with_name(f"{PIX4D}.txt")))


def test_a_frame_that_is_not_in_the_file_is_named(frame: Path) -> None:
    path = frame.with_name("reconstruction.json")
    path.write_text(opensfm(0.0))
    ground = Ground(poses=read_poses(str(path)))
    # and one whose name repeats in the flight is told by its path alone
    for id in ("other.png", "b/a.png"):
        source = read_source(frame, id, ground)
        assert "not in reconstruction.json: placed by its tags" in source.warnings
        assert source.georef.method == "none"


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[]", "[1]", '{"type": "FeatureCollection", "features": []}', "<document/>",
        "<document><chunk/></document>", "<broken", "EPSG:4326\n", "nonsense\na.png 1 2",
        "imageName X Y", "imageName latitude longitude altitude Omega Phi Kappa\na.png 1 2 3",
        "EPSG:4326\na.png one two", "EPSG:4326\na.png 8 nan", '[{"shots": {}}]', "\udcff",
        '[{"reference_lla": {"latitude": 0, "longitude": 0, "altitude": 0}, "shots": {"a": {}}}]',
    ],
)  # fmt: skip
def test_files_of_no_poses(tmp_path: Path, text: str) -> None:
    path = tmp_path / "poses"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(PosesError, match=f"^{path}: ") as raised:
        read_poses(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["images.txt", "images.bin"])
def test_damaged_models_of_colmap(tmp_path: Path, name: str) -> None:
    files = colmap(0.0, name.endswith("bin"))
    for other, content in files.items():
        (tmp_path / other).write_bytes(content)
    path = tmp_path / name
    for content in (files[name][:40], b"", b"1 2 3\n\n", files[name].replace(b" 3 ", b" 4 ")[:-30]):
        path.write_bytes(content)
        with pytest.raises(PosesError, match=f"^{path}: "):
            read_poses(str(path))
    path.write_bytes(files[name])
    (tmp_path / f"cameras.{name[-3:]}").unlink()
    with pytest.raises(PosesError, match="No such file"):
        read_poses(str(path))


def test_a_model_of_colmap_that_is_nowhere(tmp_path: Path) -> None:
    for other, content in colmap(0.0, False).items():
        (tmp_path / other).write_bytes(content)
    pose = "7 1 0 0 0 0.5 0.25 3 3 a.png"
    (tmp_path / "images.txt").write_text(f"{pose}\n\n")
    with pytest.raises(PosesError, match="not geocentric"):
        read_poses(str(tmp_path / "images.txt"))


def test_the_command_takes_them(frame: Path, tmp_path: Path, run: Run) -> None:
    flight = tmp_path / "f"
    flight.mkdir()
    frame.rename(flight / "a.png")
    path, url = tmp_path / "reconstruction.json", tmp_path / "a.zarr"
    args = ("ingest", flight, "--archive", url, "--workers", 0, "--poses", path)
    path.write_text("[]")
    assert run(*args).code == 1
    assert not url.exists()
    path.write_text(opensfm(0.0))
    result = run(*args)
    assert result.code == 0, result.err
    (found,) = run("info", "--archive", url, "--json").json["flights"]
    assert found["images"][0]["placed_by"] == "OpenSfM"
    assert "  by OpenSfM" in run("info", "--archive", url).out
    middle = np.mean(found["images"][0]["footprint"][:4], axis=0)
    assert middle == pytest.approx((LON, LAT), abs=2e-4)
