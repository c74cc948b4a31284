"""Georeferences: windows of bounding boxes, camera frames, agreement of neighbours."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from pyproj import Proj, Transformer
from rasterio.rpc import RPC

from archive_pipeline.flight.camera_tags import read_pose
from archive_pipeline.flight.find import find_images
from archive_pipeline.flight.read import read_source
from archive_pipeline.flight.xmp import read_xmp
from archive_pipeline.geo.camera import camera_georef, field_of_view_pitch, locate
from archive_pipeline.geo.georef import Georef
from archive_pipeline.geo.mapping import (
    bbox_to_window,
    check_bbox,
    homography,
    window_transform,
    with_footprint,
)
from archive_pipeline.geo.neighbours import neighbour_warnings
from archive_pipeline.geo.pose import CameraPose

ROOT = Path(__file__).resolve().parents[1]
BRIGHTON = ROOT.parent / "shared" / "data" / "eval" / "brighton_beach"
WORLD = (-180.0, -90.0, 180.0, 90.0)

needs_brighton = pytest.mark.skipif(
    not BRIGHTON.is_dir(), reason=f"the brighton_beach frames are not at {BRIGHTON}"
)


def north_up(width: int = 1000, height: int = 800, res: float = 0.5) -> Georef:
    georef = Georef("EPSG:32615", (res, 0.0, 325000.0, 0.0, -res, 3240000.0), method="transform")
    return with_footprint(georef, width, height)


def yawed(degrees: float, res: float = 0.1, width: int = 1000, height: int = 600) -> Georef:
    """A frame around (325000, 3240000) whose top points ``degrees`` clockwise from grid north."""
    cos, sin = res * math.cos(math.radians(degrees)), res * math.sin(math.radians(degrees))
    a, b, d, e = cos, -sin, -sin, -cos
    c = 325000.0 - a * width / 2 - b * height / 2
    f = 3240000.0 - d * width / 2 - e * height / 2
    return with_footprint(
        Georef("EPSG:32615", (a, b, c, d, e, f), method="transform"), width, height
    )


def pose(**changes: float | None) -> CameraPose:
    values = {
        "lon": -94.8, "lat": 29.28, "altitude_relative_m": 100.0, "yaw_deg": 0.0,
        "pitch_deg": -90.0, "roll_deg": 0.0, "focal_35mm": 24.0,
    }  # fmt: skip
    return CameraPose(**{**values, **changes})  # type: ignore[arg-type]


def ground(georef: Georef, cols: object, rows: object) -> np.ndarray:
    assert georef.transform is not None
    a, b, c, d, e, f = georef.transform
    cols, rows = np.asarray(cols), np.asarray(rows)
    return np.stack([a * cols + b * rows + c, d * cols + e * rows + f], axis=-1)


def test_georef_survives_json() -> None:
    georef = Georef(
        "EPSG:32615", gcps=((0.0, 1.5, 2.0, 3.0, 0.0, "a", ""),), rpcs={"LINE_OFF": "12"},
        footprint=((0.1, 0.2), (0.3, 0.4), (0.1, 0.2)), method="gcps",
    )  # fmt: skip
    for case in (georef, Georef(), north_up()):
        assert Georef.from_json(json.loads(json.dumps(case.to_json()))) == case


@pytest.mark.parametrize(
    ("bbox", "window"),
    [
        ((325010.0, 3239900.0, 325020.0, 3239950.0), (20, 100, 20, 100)),
        ((325010.1, 3239900.1, 325019.9, 3239949.9), (20, 100, 20, 100)),
        ((324000.0, 3239900.0, 325020.0, 3250000.0), (0, 0, 40, 200)),
        ((0.0, 0.0, 900000.0, 9000000.0), (0, 0, 1000, 800)),
        ((325010.1, 3239900.1, 325010.2, 3239900.2), (20, 199, 1, 1)),
        ((324000.0, 3239900.0, 325000.0, 3239950.0), None),
        ((325500.0, 3239900.0, 325600.0, 3239950.0), None),
    ],
)
def test_bbox_on_a_north_up_grid(
    bbox: tuple[float, float, float, float], window: tuple[int, int, int, int] | None
) -> None:
    assert bbox_to_window(north_up(), 1000, 800, bbox, "EPSG:32615") == window


def test_bbox_in_other_crs_covers_the_same_pixels() -> None:
    georef = north_up()
    to_lonlat = Transformer.from_crs("EPSG:32615", "EPSG:4326", always_xy=True)
    west, south, east, north = to_lonlat.transform_bounds(325100, 3239800, 325200, 3239900)
    col, row, width, height = bbox_to_window(georef, 1000, 800, (west, south, east, north)) or ()
    # The enclosing box in degrees is a little larger than the box in metres.
    assert 195 <= col <= 200
    assert 195 <= row <= 200
    assert 200 <= width <= 210
    assert 200 <= height <= 210
    assert bbox_to_window(georef, 1000, 800, WORLD) == (0, 0, 1000, 800)


@pytest.mark.parametrize("degrees", [0.0, 17.0, 45.0, 90.0, 133.0, 200.0])
def test_yawed_window_is_the_smallest_cover(degrees: float) -> None:
    georef, width, height = yawed(degrees), 1000, 600
    bbox = (324990.0, 3240005.0, 325012.0, 3240020.0)
    window = bbox_to_window(georef, width, height, bbox, "EPSG:32615")
    fine = 4
    cols, rows = np.meshgrid(
        (np.arange(width * fine) + 0.5) / fine, (np.arange(height * fine) + 0.5) / fine
    )
    x, y = np.moveaxis(ground(georef, cols, rows), -1, 0)
    inside = (x > bbox[0]) & (x < bbox[2]) & (y > bbox[1]) & (y < bbox[3])
    expected_cols = np.flatnonzero(inside.any(axis=0)) // fine
    expected_rows = np.flatnonzero(inside.any(axis=1)) // fine
    assert window is not None
    # Samples a quarter of a pixel apart may miss the very tip of the shared outline.
    assert window[0] == pytest.approx(expected_cols[0], abs=1)
    assert window[1] == pytest.approx(expected_rows[0], abs=1)
    assert window[0] + window[2] == pytest.approx(expected_cols[-1] + 1, abs=1)
    assert window[1] + window[3] == pytest.approx(expected_rows[-1] + 1, abs=1)
    assert window[0] <= expected_cols[0]
    assert window[1] <= expected_rows[0]


def test_bbox_in_the_empty_corner_of_a_yawed_frame_is_disjoint() -> None:
    georef = yawed(45.0)
    assert georef.footprint is not None
    lon, lat = np.array(georef.footprint).T
    corner = (lon.max() - 5e-5, lat.max() - 5e-5, lon.max(), lat.max())
    assert corner[0] > lon.min()
    assert corner[1] > lat.min()
    assert bbox_to_window(georef, 1000, 600, corner) is None


@pytest.mark.parametrize(
    ("bbox", "crs", "message"),
    [
        ((1.0, 0.0, 0.0, 1.0), "EPSG:32615", "west .* east"),
        ((-94.80, 29.29, -94.79, 29.28), "EPSG:4326", "south"),
        ((-94.80, float("nan"), -94.79, 29.28), "EPSG:4326", "not finite"),
        ((29.28, -94.80, 29.29, -94.79), "EPSG:4326", "west south east north"),
        ((0.0, 0.0, 1.0, 1.0), "EPSG:999999", "unknown coordinate reference"),
        ((0.0, 0.0, 1.0, 1.0), "nonsense", "unknown coordinate reference"),
    ],
)
def test_invalid_bbox_is_refused(
    bbox: tuple[float, float, float, float], crs: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_bbox(bbox, crs)
    with pytest.raises(ValueError, match=message):
        bbox_to_window(north_up(), 1000, 800, bbox, crs)


def test_image_without_position_meets_no_bbox() -> None:
    for georef in (Georef(), Georef("EPSG:32615"), replace(north_up(), crs=None)):
        assert bbox_to_window(georef, 1000, 800, WORLD) is None


def test_image_across_the_antimeridian() -> None:
    georef = Georef("EPSG:32601", (10.0, 0.0, 165000.0, 0.0, -10.0, 10000.0), method="transform")
    georef = with_footprint(georef, 1000, 1000)
    assert georef.footprint is not None
    assert {p[0] > 180 for p in georef.footprint} == {True, False}
    west = bbox_to_window(georef, 1000, 1000, (179.9, -1.0, 180.0, 1.0))
    east = bbox_to_window(georef, 1000, 1000, (-180.0, -1.0, -179.9, 1.0))
    assert west is not None
    assert east is not None
    assert west[0] == 0
    assert abs(west[0] + west[2] - east[0]) <= 2


def affine_gcps(georef: Georef, width: int, height: int) -> Georef:
    spots = [(r, c) for r in (0, height) for c in (0, width)]
    places = ground(georef, [c for _, c in spots], [r for r, _ in spots])
    gcps = tuple(
        (float(r), float(c), float(x), float(y), 0.0, str(i), "")
        for i, ((r, c), (x, y)) in enumerate(zip(spots, places, strict=True))
    )
    return with_footprint(Georef(georef.crs, gcps=gcps, method="gcps"), width, height)


def test_gcps_cover_the_pixels_their_affine_does() -> None:
    plain = yawed(20.0)
    georef = affine_gcps(plain, 1000, 600)
    bbox = (324990.0, 3240005.0, 325012.0, 3240020.0)
    expected = bbox_to_window(plain, 1000, 600, bbox, "EPSG:32615")
    assert bbox_to_window(georef, 1000, 600, bbox, "EPSG:32615") == expected
    np.testing.assert_allclose(georef.footprint, plain.footprint, atol=1e-8)


def rpc_georef() -> Georef:
    # A camera far above longitude 10, latitude 45: lines run south, samples east.
    unit = [0.0] * 20
    numerator_line, numerator_samp, one = unit.copy(), unit.copy(), unit.copy()
    one[0], numerator_samp[1], numerator_line[2] = 1.0, 1.0, -1.0
    rpc = RPC(
        height_off=100.0, height_scale=500.0, lat_off=45.0, lat_scale=0.05, line_off=500.0,
        line_scale=500.0, long_off=10.0, long_scale=0.05, samp_off=500.0, samp_scale=500.0,
        line_num_coeff=numerator_line, line_den_coeff=one, samp_num_coeff=numerator_samp,
        samp_den_coeff=one,
    )  # fmt: skip
    return with_footprint(Georef("EPSG:4326", rpcs=rpc.to_gdal(), method="rpcs"), 1000, 1000)


def test_rpcs_give_footprint_and_windows() -> None:
    georef = rpc_georef()
    assert georef.footprint is not None
    np.testing.assert_allclose(georef.footprint[0], (9.95, 45.05), atol=2e-4)
    col, row, width, height = bbox_to_window(georef, 1000, 1000, (9.96, 45.0, 9.97, 45.01)) or ()
    assert abs(col - 100) <= 2
    assert abs(row - 400) <= 2
    assert abs(width - 100) <= 2
    assert abs(height - 100) <= 2


@pytest.mark.parametrize("kind", ["transform", "gcps", "rpcs", "oblique"])
def test_a_window_keeps_its_place_on_the_ground(kind: str) -> None:
    width, height = 1000, 600
    georef = {
        "transform": yawed(33.0),
        "gcps": affine_gcps(yawed(33.0), width, height),
        "rpcs": rpc_georef(),
        "oblique": camera_georef(pose(pitch_deg=-60.0, yaw_deg=40.0), width, height),
    }[kind]
    assert georef.footprint is not None
    window = (200, 100, 300, 250)
    part = window_transform(georef, window)
    assert part.footprint is not None
    assert part.method == georef.method
    lon, lat = np.array(part.footprint).mean(axis=0)
    size = 1e-7
    box = (lon - size, lat - size, lon + size, lat + size)
    whole = bbox_to_window(georef, width, height, box)
    inner = bbox_to_window(part, window[2], window[3], box)
    assert whole is not None
    assert inner is not None
    assert abs(whole[0] - inner[0] - window[0]) <= 1
    assert abs(whole[1] - inner[1] - window[1]) <= 1
    if kind == "transform":
        assert part.transform is not None
        np.testing.assert_allclose(ground(part, 0, 0), ground(georef, 200, 100), atol=1e-9)


def test_homography_is_exact_on_four_points() -> None:
    source = np.array([[0, 0], [5472, 0], [5472, 3648], [0, 3648]], dtype=np.float64)
    target = np.array([[0, 0], [150, 10], [120, -80], [20, -70]]) + np.array([325000.0, 3240000.0])
    matrix = homography(source, target)
    x, y, w = matrix @ np.column_stack([source, np.ones(4)]).T
    np.testing.assert_allclose(np.column_stack([x / w, y / w]), target, atol=1e-4)


@pytest.mark.parametrize("lon", [-94.8, -92.0, 5.9])
@pytest.mark.parametrize("lat", [29.28, -33.9, 62.0])
@pytest.mark.parametrize("yaw", [0.0, 37.0, -140.0])
def test_nadir_frame_stands_on_true_north(lon: float, lat: float, yaw: float) -> None:
    georef = camera_georef(pose(lon=lon, lat=lat, yaw_deg=yaw), 4000, 3000)
    assert georef.transform is not None
    assert georef.crs is not None
    assert georef.method == "camera"
    utm = Proj(georef.crs)
    np.testing.assert_allclose(ground(georef, 2000, 1500), utm(lon, lat), atol=0.01)
    factors = utm.get_factors(lon, lat)
    dx, dy = ground(georef, 2000, 0) - ground(georef, 2000, 1500)
    grid_yaw = math.degrees(math.atan2(dx, dy))
    expected = yaw - factors.meridian_convergence
    assert (grid_yaw - expected + 180) % 360 - 180 == pytest.approx(0.0, abs=1e-3)
    # 24 mm equivalent on a 4:3 sensor: a 34.6 mm wide field of view.
    across = np.linalg.norm(ground(georef, 4000, 1500) - ground(georef, 0, 1500))
    assert across == pytest.approx(100 * 34.613 / 24 * factors.meridional_scale, rel=1e-4)


def test_field_of_view_is_that_of_the_cropped_sensor() -> None:
    camera = CameraPose(focal_35mm=24.0)
    full, wide = field_of_view_pitch(camera, 4000, 3000), field_of_view_pitch(camera, 4000, 2250)
    assert full == wide
    assert field_of_view_pitch(camera, 3000, 4000) == full
    three_two = field_of_view_pitch(camera, 5472, 3648)
    assert three_two == pytest.approx(36.0 / 24.0 / 5472, rel=1e-3)
    lens = CameraPose(focal_35mm=24.0, focal_mm=8.8, model="FC6310")
    assert field_of_view_pitch(lens, 5472, 3648) == pytest.approx(13.2 / 8.8 / 5472)
    zoomed = CameraPose(focal_35mm=48.0, focal_mm=8.8, model="FC6310")
    assert field_of_view_pitch(zoomed, 5472, 3648) == pytest.approx(0.75 / 5472, rel=1e-3)
    assert field_of_view_pitch(CameraPose(focal_mm=8.8, model="unheard of"), 4000, 3000) is None


def test_roll_of_half_a_turn_turns_a_nadir_frame() -> None:
    rolled = camera_georef(pose(yaw_deg=30.0, roll_deg=180.0), 4000, 3000)
    turned = camera_georef(pose(yaw_deg=-150.0), 4000, 3000)
    np.testing.assert_allclose(rolled.transform, turned.transform, atol=1e-6)


def test_oblique_frame_has_gcps_ahead_of_the_camera() -> None:
    georef, warnings = locate(pose(pitch_deg=-50.0, yaw_deg=90.0), 4000, 3000)
    assert georef.transform is None
    assert len(georef.gcps) == 16
    assert warnings == ()
    assert georef.footprint is not None
    assert georef.footprint[0] == georef.footprint[-1]
    utm = Proj(georef.crs)
    east, north = np.array(utm(*np.array(georef.footprint).T)) - np.array([utm(-94.8, 29.28)]).T
    # Looking east: the top edge is far, the bottom edge near, north on the left.
    assert min(east[0], east[1]) > max(east[2], east[3])
    assert north[0] > north[3] > 0 > north[2] > north[1]
    # The optical axis meets the ground at height / tan(50 degrees).
    x, y = np.array(utm(-94.8, 29.28)) + np.array([100 / math.tan(math.radians(50)), 0])
    box = (x - 0.05, y - 0.05, x + 0.05, y + 0.05)
    window = bbox_to_window(georef, 4000, 3000, box, str(georef.crs))
    assert window is not None
    assert window[0] == pytest.approx(2000, abs=30)
    assert window[1] == pytest.approx(1500, abs=30)


def test_nearly_nadir_frame_looks_ahead_by_its_tilt() -> None:
    straight, tilted = (camera_georef(pose(pitch_deg=p), 4000, 3000) for p in (-90.0, -87.0))
    dx, dy = ground(tilted, 2000, 1500) - ground(straight, 2000, 1500)
    # 100 m * tan(3 degrees), and a little more: the far half is larger, and the affine fits it all.
    assert dx == pytest.approx(0.0, abs=0.3)
    assert 5.0 < dy < 6.5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pitch_deg": -10.0}, "horizon"),
        ({"lon": None}, "no GPS"),
        ({"altitude_relative_m": None, "altitude_gps_m": 103.0}, "no height"),
        ({"altitude_relative_m": -2.0}, "height above ground is -2"),
        ({"focal_35mm": None}, "no field of view"),
    ],
)
def test_frames_that_cannot_be_placed_say_why(changes: dict[str, float], reason: str) -> None:
    georef, warnings = locate(pose(**changes), 4000, 3000)
    spot = None if changes.get("lon", 0) is None else ((pose().lon, pose().lat),) * 4
    assert georef == Georef(footprint=spot, method="point" if spot else "none")
    assert len(warnings) == 1
    assert reason in warnings[0]


def test_ground_elevation_and_missing_angles() -> None:
    bare = pose(altitude_relative_m=None, altitude_gps_m=103.0, yaw_deg=None, pitch_deg=None)
    georef, warnings = locate(bare, 4000, 3000, ground_elevation=3.0)
    np.testing.assert_allclose(georef.transform, camera_georef(pose(), 4000, 3000).transform)
    assert len(warnings) == 2
    assert "north" in warnings[0]
    assert "straight down" in warnings[1]


def test_xmp_as_elements_and_exif_direction() -> None:
    xmp = b"<drone-dji:RelativeAltitude>+39.80</drone-dji:RelativeAltitude>"
    xmp += b" drone-dji:FlightYawDegree='-12.5' drone-dji:GimbalYawDegree=\"\""
    camera, captured = read_pose(b"", read_xmp([("XMP", xmp)]))
    assert camera is not None
    assert captured is None
    assert (camera.altitude_relative_m, camera.yaw_deg) == (39.8, -12.5)
    assert read_pose(b"") == (None, None)


@pytest.fixture(scope="module")
def flight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flight")
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        importlib.import_module("make_flight").make_flight(folder, 4, 912, 608, 3)
    finally:
        sys.path.pop(0)
    return folder


@cache  # each frame has a neighbour before it and one behind it
def described(path: Path, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features of a frame, in full-size pixels, and what they look like."""
    gray = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    assert gray is not None
    scale = min(1.0, width / gray.shape[1])
    small = cv2.resize(gray, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    points, descriptors = cv2.SIFT.create(3000).detectAndCompute(small, None)
    # OpenCV counts from pixel centres.
    return (np.array([p.pt for p in points]) + 0.5) / scale, descriptors


@cache
def georef_of(path: Path) -> Georef:
    return read_source(path, path.name).georef


def matched(one: Path, two: Path, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the same ground points in two frames, in full-size pixels."""
    found = [described(path, width) for path in (one, two)]
    pairs = cv2.BFMatcher().knnMatch(found[0][1], found[1][1], k=2)
    good = [m for m, n in pairs if m.distance < 0.75 * n.distance]
    source = found[0][0][[m.queryIdx for m in good]]
    target = found[1][0][[m.trainIdx for m in good]]
    _, inliers = cv2.findHomography(source, target, cv2.RANSAC, 12.0)
    kept = inliers.ravel().astype(bool)
    return source[kept], target[kept]


def disagreement(one: Path, two: Path, width: int) -> float:
    """Median distance in metres of the same ground points as two frames place them."""
    source, target = matched(one, two, width)
    assert len(source) >= 15
    first, second = georef_of(one), georef_of(two)
    return float(
        np.median(np.linalg.norm(ground(first, *source.T) - ground(second, *target.T), axis=1))
    )


def test_made_frames_agree_on_the_ground(flight: Path) -> None:
    frames = sorted(flight.glob("*.JPG"))
    for one, two in pairwise(frames):
        assert disagreement(one, two, 912) < 0.1


def test_made_frames_and_orthomosaic_share_a_bbox(flight: Path) -> None:
    box = (-94.80, 29.28, -94.79, 29.29)
    for file in find_images(flight):
        source = read_source(Path(file.path), file.id)
        assert bbox_to_window(source.georef, source.width, source.height, box) is not None


def thumbnails(folder: Path) -> list[tuple[str, Georef, np.ndarray]]:
    found = []
    for path in sorted(folder.glob("*.JPG")):
        gray = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        assert gray is not None
        small = cv2.resize(gray, (640, round(640 * gray.shape[0] / gray.shape[1])),
                           interpolation=cv2.INTER_AREA)  # fmt: skip
        found.append((path.name, georef_of(path), small))
    return found


def test_neighbours_name_the_frame_with_wrong_tags(flight: Path) -> None:
    frames = thumbnails(flight)
    assert neighbour_warnings(frames, 912, 608) == []
    id, georef, picture = frames[2]
    turned = (id, georef, np.ascontiguousarray(picture[::-1, ::-1]))
    found = neighbour_warnings([*frames[:2], turned, frames[3]], 912, 608)
    assert [name for name, _ in found] == [id]
    assert "180°" in found[0][1]
    assert georef.transform is not None
    a, b, c, d, e, f = georef.transform
    moved = (id, replace(georef, transform=(a, b, c + 60.0, d, e, f)), picture)
    found = neighbour_warnings([*frames[:2], moved], 912, 608)
    assert [name for name, _ in found] == [id]
    assert "position" in found[0][1]
    assert neighbour_warnings([(id, georef, None), (id, Georef(), picture)], 912, 608) == []


@needs_brighton
def test_real_frames_agree_on_the_ground() -> None:
    frames = [BRIGHTON / f"DJI_{number:04d}.JPG" for number in range(18, 24)]
    medians = [disagreement(a, b, 1000) for a, b in pairwise(frames)]
    assert max(medians) < 6.0
    assert np.median(medians) < 3.0


@needs_brighton
def test_real_frames_turned_by_a_viewer_are_named() -> None:
    found = neighbour_warnings(thumbnails(BRIGHTON), 4000, 2250)
    assert [name for name, _ in found] == ["DJI_0024.JPG", "DJI_0025.JPG"]
    assert all("yaw" in line for _, line in found)
