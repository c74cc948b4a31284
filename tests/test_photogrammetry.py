"""Verification by photogrammetry: identical pixels, sabotage, and what proves nothing."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, make_flight
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter

from archive_pipeline.flight.pixels import SourcePixels
from archive_pipeline.geo.pose import CameraPose
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.image_writer import ImageWriter

if importlib.util.find_spec("pycolmap") is None:
    pytest.skip("the extra 'photogrammetry' is not installed", allow_module_level=True)

from archive_pipeline.photogrammetry.alignment import difference, in_metres, level
from archive_pipeline.photogrammetry.control import BATCH, REPEATS, Control, run_control
from archive_pipeline.photogrammetry.features import find_features, reduction
from archive_pipeline.photogrammetry.frames import NEIGHBOURS, Frame, choose_pairs, places
from archive_pipeline.photogrammetry.reconstruction import Reconstruction
from archive_pipeline.photogrammetry.verdict import FlightReport, Tolerances, judge

WIDTH, HEIGHT, FRAMES = 640, 480, 4
NAMES = [f"town/DJI_{n:04d}.JPG" for n in range(1, FRAMES + 1)]
Pixels = NDArray[np.uint8]
HOSTILE = "<img src=x onerror=alert(1)>&\"'{{7*7}}"


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four frames that overlap; not to be changed."""
    folder = tmp_path_factory.mktemp("photogrammetry") / "town"
    *_, ortho = make_flight(folder, FRAMES, WIDTH, HEIGHT, 3)
    ortho.unlink()
    return folder


Change = Callable[[int, Pixels], Pixels]


def same(index: int, pixels: Pixels) -> Pixels:
    return pixels


@pytest.fixture(scope="module")
def exact(town: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive that gives the originals' pixels exactly: they are stored losslessly."""
    return lossless(town, tmp_path_factory.mktemp("exact") / "exact.zarr", same)


def lossless(flight: Path, url: Path, change: Change) -> Path:
    """An archive of a flight that gives changed pixels, as a bad codec's would."""
    from archive_pipeline.flight.find import find_images
    from archive_pipeline.flight.read import read_source

    archive = Archive.create(url)
    archive.create_flight(flight.name)
    for index, file in enumerate(find_images(flight)):
        source = read_source(file.path, file.id)
        with SourcePixels(source) as image:  # as the original is read: decoders differ
            pixels = change(index, image.read((0, 0, source.width, source.height))[0])
        writer = ImageWriter(archive, flight.name, source, "test")
        writer.write_metadata()
        writer.create_lossless()[:] = pixels
        record = {
            **{name: getattr(source, name) for name in ("id", "sha256", "width", "height")},
            **{"bands": 3, "dtype": "uint8", "codec": "lossless", "mask": "none"},
            **{"source_bytes": source.size_bytes, "georef": source.georef.to_json()},
            "captured": source.captured,
        }
        writer.commit(record, {})
    return url


def verify(run: Run, url: Path, flight: Path, *args: object) -> Any:
    options = ("--originals", flight, "--workers", 0, "--features", 2000, "--json")
    return run("verify-photogrammetry", "--archive", url, *options, *args)


def test_identical_pixels_give_no_difference_at_all(run: Run, town: Path, exact: Path) -> None:
    found = verify(run, exact, town)
    assert found.code == 0, found.err
    [flight] = found.json["flights"]
    assert flight["images"] == {"original": FRAMES, "restored": FRAMES}
    assert flight["inliers"]["original"] > 500
    assert all(pair["original"] == pair["restored"] for pair in flight["pairs"])
    assert len(flight["pairs"]) == FRAMES * (FRAMES - 1) / 2
    for moved in flight["moved"]:
        assert (moved["median_px"], moved["p95_px"], moved["shift_px"]) == (0, 0, [0, 0])
    assert flight["original"]["points"] == flight["restored"]["points"] > 200
    assert flight["original"]["lenses"] == flight["restored"]["lenses"]
    apart = flight["difference"]
    assert flight["control"] is None  # nothing is to be explained
    numbers = ("centres_m", "centres_gsd", "largest_m", "rotations_deg", "surface_m")
    assert [apart[name] for name in numbers] == [0] * len(numbers)
    assert (apart["scale"], apart["ground_sunk_m"]) == (1, 0)


@pytest.mark.slow
def test_processes_find_the_same(run: Run, town: Path, exact: Path) -> None:
    here, there = (verify(run, exact, town, "--workers", n).json for n in (0, 2))
    assert here["flights"] == there["flights"]


def blur(index: int, pixels: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2)))


def shift(index: int, pixels: Pixels) -> Pixels:
    """Move a frame by half a pixel: means of neighbours."""
    image = Image.fromarray(pixels)
    return np.asarray(Image.blend(image, ImageChops.offset(image, 1, 0), 0.5))


@pytest.mark.parametrize(("change", "what"), [(blur, "moved"), (shift, "shift")])
def test_sabotage_of_all_frames_fails(
    run: Run, town: Path, tmp_path: Path, change: Change, what: str
) -> None:
    found = verify(run, lossless(town, tmp_path / "bad.zarr", change), town, "--quick")
    assert found.code == 4
    [flight] = found.json["flights"]
    named = {f["what"]: f["images"] for f in flight["failures"]}
    assert sorted(named[what]) == NAMES
    assert not flight["passed"]
    assert flight["original"] is None


def test_a_frame_in_place_of_another_is_named(run: Run, town: Path, tmp_path: Path) -> None:
    with Image.open(town / "DJI_0003.JPG") as image:
        third = np.asarray(image)

    def replace(index: int, pixels: Pixels) -> Pixels:
        return third if index == 1 else pixels

    url = lossless(town, tmp_path / "bad.zarr", replace)
    args = ("--archive", url, "--originals", town, "--workers", 0, "--features", 2000, "--quick")
    found = run("verify-photogrammetry", *args)
    assert found.code == 4
    assert "below tolerance" in found.out
    lines = [line for line in found.out.splitlines() if "of a frame shifted" in line]
    assert len(lines) == 1
    assert lines[0].endswith("most in town/DJI_0002.JPG")


def test_a_frame_without_detail_is_lost(run: Run, town: Path, tmp_path: Path) -> None:
    def flatten(index: int, pixels: Pixels) -> Pixels:
        return np.full_like(pixels, 99) if index == 3 else pixels

    found = verify(run, lossless(town, tmp_path / "bad.zarr", flatten), town)
    assert found.code == 4
    [flight] = found.json["flights"]
    named = {f["what"]: f["images"] for f in flight["failures"]}
    assert named["images"] == ["town/DJI_0004.JPG"]
    assert named["frame inliers"] == ["town/DJI_0004.JPG"]
    assert flight["images"] == {"original": FRAMES, "restored": FRAMES - 1}


def test_the_report(run: Run, town: Path, tmp_path: Path) -> None:
    flight = Path(shutil.copytree(town, tmp_path / HOSTILE.replace("/", "")))
    url = lossless(flight, tmp_path / "bad.zarr", shift)
    report = tmp_path / "report"
    assert verify(run, url, flight, "--report", report).code == 4
    assert sorted(p.name for p in report.iterdir()) == [
        "frames.csv", "pairs.csv", "report.html", "result.json",
    ]  # fmt: skip
    page = (report / "report.html").read_text()
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Page(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attrs)))

    Page().feed(page)
    assert not {tag for tag, _ in tags} & {"img", "script", "link", "iframe"}
    assert not [a for _, attrs in tags for a in attrs if a in ("src", "href", "onerror")]
    assert sum(tag == "svg" for tag, _ in tags) == 4
    assert "49" not in page.split("<h2>")[1].split("</h2>")[0]
    assert json.loads((report / "result.json").read_text())["flights"][0]["flight"] == flight.name
    assert len((report / "frames.csv").read_text().splitlines()) == FRAMES + 1
    assert "is already there" in verify(run, url, flight, "--report", report).err


def test_what_proves_nothing(run: Run, town: Path, exact: Path, tmp_path: Path) -> None:
    found = verify(run, exact, tmp_path_with(tmp_path / "one", town, [1]), "--quick")
    assert (found.code, "1 of 4 frames could be compared" in found.err) == (1, True)
    assert "no file of its name is among the originals" in found.err
    alone = tmp_path_with(tmp_path / "alone", town, [1])
    single = verify(run, lossless(alone, tmp_path / "1.zarr", same), alone)
    assert (single.code, single.json["passed"]) == (1, False)
    assert "alone: a single frame, and tie points need two" in single.err
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    for name in ("a.JPG", "b.JPG"):
        Image.new("RGB", (300, 200), "green").save(nowhere / name)
    found = verify(run, lossless(nowhere, tmp_path / "2.zarr", same), nowhere)
    assert found.code == 1
    assert "nowhere: no frames of a camera with a position" in found.err
    assert [s["reason"] for s in found.json["skipped"]] == [
        "no frame: nothing is known of a camera"
    ] * 2


def tmp_path_with(folder: Path, flight: Path, frames: list[int]) -> Path:
    folder.mkdir()
    for number in frames:
        shutil.copy(flight / f"DJI_{number:04d}.JPG", folder)
    return folder


def test_frames_that_do_not_overlap_prove_nothing(run: Run, town: Path, tmp_path: Path) -> None:
    apart = tmp_path_with(tmp_path / "apart", town, [1])
    with Image.open(town / "DJI_0002.JPG") as image:
        exif = image.info["exif"]
        Image.new("RGB", image.size, "gray").save(apart / "flat.JPG", exif=exif)
    for args in ((), ("--quick",)):
        found = verify(run, lossless(apart, tmp_path / f"{len(args)}.zarr", same), apart, *args)
        assert found.code == 1
        assert "no frames overlap: no tie points between any two originals" in found.err


def test_a_codec_archive_passes_or_names_what_fails(
    run: Run, own_archive: Path, flight: Path
) -> None:
    archive = own_archive
    found = verify(run, archive, flight, "--quick", "--inliers", 0.5, "--moved", 1, "--shift", 0.3)
    assert found.code == 0, found.err
    [told] = found.json["flights"]
    assert 0.5 < told["inliers"]["share"] < 1.5
    assert all(0 < moved["median_px"] < 1 for moved in told["moved"])
    [kept] = run("info", "--archive", archive, "--json").json["flights"][0]["verdicts"]
    assert (kept["kind"], kept["passed"], kept["void"]) == ("photogrammetry-quick", True, 0)
    assert kept["how"]["tolerances"]["moved"] == 1
    assert len(kept["images"]) == 3
    strict = verify(run, archive, flight, "--quick", "--moved", 0.001)
    assert strict.code == 4
    line = "failed verify-photogrammetry-quick: 3 images, "
    assert line in run("info", "--archive", archive).out


def test_usage(run: Run, exact: Path, town: Path) -> None:
    assert verify(run, exact, town, "--inliers", 2).code == 2
    assert "no images of flight sea" in verify(run, exact, town, "--flight", "sea").err


def pose(lon: float, lat: float = 29.0) -> CameraPose:
    return CameraPose(lon, lat, altitude_relative_m=60.0, pitch_deg=-90.0, focal_35mm=24.0)


def test_frames_are_matched_with_those_near() -> None:
    # a lane across the antimeridian
    lons = [179.999 + n * 1e-4 for n in range(20)]
    frames = [
        Frame(str(n), 4000, 3000, pose((lon + 180) % 360 - 180)) for n, lon in enumerate(lons)
    ]
    where = places(frames)
    assert np.allclose(np.diff(where[:, 0]), 9.74, atol=0.1)
    assert np.allclose(where[:, 2], 60)
    pairs = choose_pairs(frames)
    assert len(choose_pairs(frames[:5])) == 10
    assert all(i < j for i, j in pairs)
    assert (0, 16) in pairs
    assert (0, 19) not in pairs
    assert len(pairs) < 20 * NEIGHBOURS


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"lon": None}, "no position"),
        ({"lat": 91.0}, "its position is not on Earth"),
        ({"lat": float("nan")}, "its position is not on Earth"),
        ({"altitude_gps_m": 1e300}, "its position is not on Earth"),
    ],
)
def test_forged_poses_take_no_part(change: dict[str, Any], problem: str) -> None:
    assert Frame("a", 4000, 3000, pose(1.0)).problem is None
    assert Frame("a", 4000, 3000, replace(pose(1.0), **change)).problem == problem
    assert Frame("a", 4000, 20, pose(1.0)).problem == "too small for features"
    for focal in (1e-30, 1e30, 0.0):
        assert (
            Frame(
                "a", 4000, 3000, replace(pose(1.0), focal_px=focal or None, focal_35mm=None)
            ).lens[-1]
            is None
        )


def test_features_are_where_they_are() -> None:
    """The middle of a spot, found at half size, in pixels of the whole frame."""
    rows, cols = np.mgrid[:1600, :2400] + 0.5  # of the pixels' middles
    spot = np.exp(-((rows - 732.0) ** 2 + (cols - 1031.0) ** 2) / (2 * 12**2))
    pixels = np.repeat(np.rint(255 * spot).astype(np.uint8)[..., None], 3, axis=2)

    def read(window: tuple[int, int, int, int]) -> Pixels:
        col, row, width, height = window
        return pixels[row : row + height, col : col + width]

    assert (reduction(1999, 100), reduction(2400, 1600), reduction(8192, 5460)) == (1, 2, 3)
    found = find_features(read, 2400, 1600, 50)
    assert len(found.points)
    assert np.allclose(found.points, [1031, 732], atol=0.2)
    assert found.descriptors.dtype == np.uint8


def model(rotations: Any, centres: Any, points: Any) -> Reconstruction:
    number = len(centres)
    return Reconstruction(
        dict(zip(range(number), rotations, strict=True)),
        dict(zip(range(number), centres, strict=True)),
        {}, points, 3.0, 0.5, 0.02, [],
    )  # fmt: skip


def turned(axis: int, degrees: float) -> NDArray[np.float64]:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = np.eye(3)
    a, b = [n for n in range(3) if n != axis]
    matrix[[a, a, b, b], [a, b, a, b]] = c, -s, s, c
    return matrix


def test_a_lane_that_was_moved_turned_and_scaled_is_fitted() -> None:
    rng = np.random.default_rng(0)
    down = np.diag([1.0, -1.0, -1.0])
    rotations = [turned(2, 3.0 * n) @ down for n in range(4)]
    centres = np.array([[10.0 * n, 5.0 * n, 60.0] for n in range(4)])
    points = np.column_stack([rng.uniform(-40, 40, (2000, 2)), rng.normal(0, 0.1, 2000)])
    turn = turned(0, 20) @ turned(2, 50)
    one = model(rotations, centres, points)
    moved = [1.5 * turn @ c + [3, 4, 5] for c in centres]
    moved[2] = moved[2] + 1.5 * turn @ [0, 0, 0.1]
    two = model([r @ turn.T for r in rotations], moved, 1.5 * points @ turn.T + [3, 4, 5])
    found = difference(one, two)
    assert found is not None
    assert found.scale == pytest.approx(1 / 1.5, rel=1e-3)
    assert max(found.turns.values()) < 1e-6
    # the mean takes its part of what one camera moved by
    ways = [float(np.linalg.norm(found.offsets[i])) for i in range(4)]
    assert ways[2] == pytest.approx(0.075, abs=0.002)
    assert found.surface == pytest.approx(0, abs=0.02)
    assert found.cells > 100
    # levelled by the tags of frames that look down
    frames = [Frame(str(n), 4000, 3000, pose(1.0)) for n in range(4)]
    tilted = turned(1, 12)
    askew = model(
        [r @ tilted.T for r in rotations], [tilted @ c for c in centres], points @ tilted.T
    )
    flat = level(askew, frames)
    heights = [c[2] for c in flat.centres.values()]
    assert np.ptp(heights) < 1e-9
    assert np.ptp(flat.points[:, 2]) == pytest.approx(np.ptp(points[:, 2]), abs=1e-9)


def noisy_lane(noise: float) -> tuple[Reconstruction, Callable[[Any], Reconstruction]]:
    """A reconstruction, and one whose cameras move as the first points do."""
    centres = np.array([[10.0 * n, 5.0 * (n % 2), 60.0] for n in range(6)])
    one = replace(model([np.eye(3)] * 6, centres, np.ones((20, 3))), noise=noise)

    def again(points: Any) -> Reconstruction:
        moved = [
            np.add(at, [0, 0, 0.02 * spots[0, 0]])
            for at, spots in zip(centres, points, strict=True)
        ]
        return model([np.eye(3)] * 6, moved, np.ones((20, 3)))

    return one, again


def test_repeats_end_when_one_moves_cameras_as_far() -> None:
    points = [np.zeros((4, 2), np.float32)] * 6
    one, again = noisy_lane(0.5)
    steps: list[int] = []

    def run(moved: float, threads: int = 2, seed: int = 0) -> Control:
        steps.clear()
        found = run_control(one, points, again, moved, seed, threads, steps.append)
        assert found is not None
        return found

    # cameras move by 0.02 m a pixel, so by 0.01 m with noise of half a pixel, less what is fitted
    far = run(1.0)
    assert (len(far.moved), steps[-1]) == (REPEATS, REPEATS)
    assert 0.003 < np.median(far.moved) < 0.012
    assert far.most < 0.03
    assert sorted(far.ways) == [*range(6)]
    assert run(1.0, threads=1) == far
    assert run(1.0, seed=1) != far
    near = run(0.002)
    assert near.moved == far.moved[:BATCH]
    assert steps == [BATCH]
    # more noise, further
    one = replace(one, noise=5.0)
    assert np.median(run(9.0).moved) == pytest.approx(10 * np.median(far.moved), rel=1e-3)
    one = replace(one, noise=float("nan"))
    assert run_control(one, points, again, 1.0, 0, 1, steps.append) is None


def test_frames_that_fall_apart_by_their_own_noise_excuse_any_move() -> None:
    one, _ = noisy_lane(0.5)
    points = [np.zeros((4, 2), np.float32)] * 6
    found = run_control(one, points, lambda points: None, 1.0, 0, 2, lambda last: None)
    assert found is not None
    assert found.moved == [float("inf")] * BATCH


def test_cameras_are_judged_by_what_they_move_by_themselves() -> None:
    one, _ = noisy_lane(0.2)
    frames = [Frame(f"f/{n}", 4000, 3000, pose(1.0)) for n in range(6)]
    moved = {
        n: np.add(at, [0, 0, 0.1 * (n == 4) + 0.04 * (n == 2)]) for n, at in one.centres.items()
    }
    two = replace(one, centres=moved)

    def report(control: Control | None) -> FlightReport:
        found = FlightReport("f", frames, {(0, 1): (200, 200)}, original=one, restored=two)
        found.difference, found.control = difference(one, two), control
        judge(found, Tolerances())
        return found

    failed = report(None)
    assert [f.what for f in failed.failures] == ["centres"]
    assert failed.failures[0].frames[0] == "f/4"
    assert failed.centres_gsd is not None
    by = failed.centres_gsd * one.spacing
    assert report(Control(0.2, [by / 3, by * 1.01], dict.fromkeys(range(6), by))).passed
    # of a frame that hardly moves by itself a short way is more
    ways = dict.fromkeys(range(6), by) | {2: by / 20}
    strict = report(Control(0.2, [by / 3, by * 0.99], ways))
    assert [f.what for f in strict.failures] == ["centres"]
    assert strict.failures[0].frames[0] == "f/2"
    assert strict.failures[0].tolerance == pytest.approx(0.99 * failed.centres_gsd)
    told = strict.to_json()["control"]
    assert (told["repeats"], told["fell_apart"]) == (2, 0)
    assert told["centres_gsd"]["largest"] == pytest.approx(0.99 * failed.centres_gsd, abs=1e-4)
    assert report(Control(0.2, [float("inf")], {})).to_json()["control"]["centres_gsd"] == {
        "median": None, "largest": None,
    }  # fmt: skip


def test_noise_is_what_the_adjustment_leaves(tmp_path: Path) -> None:
    """Six cameras over bumpy ground: points that are off by 0.4 px are found to be."""
    import pycolmap

    from archive_pipeline.photogrammetry.frames import choose_pairs
    from archive_pipeline.photogrammetry.reconstruction import reconstruct

    rng = np.random.default_rng(3)
    ground = np.column_stack([rng.uniform(-45, 45, (900, 2)), rng.uniform(0, 12, 900)])
    poses = [pose(1.0 + 1e-4 * (n % 3), 29.0 + 1e-4 * (n // 3)) for n in range(6)]
    frames = [Frame(str(n), 2000, 1500, camera) for n, camera in enumerate(poses)]
    where = places(frames)
    focal = 1400.0
    down = np.diag([1.0, -1.0, -1.0])
    spots, seen = [], []
    for centre in where:
        ahead = (ground - centre) @ down.T
        at = focal * ahead[:, :2] / ahead[:, 2:] + [1000, 750]
        spots.append((at + rng.normal(0, 0.4, at.shape)).astype(np.float32))
        seen.append(((at > 0) & (at < [2000, 1500])).all(axis=1))
    ties = {}
    for i, j in choose_pairs(frames):
        both = np.flatnonzero(seen[i] & seen[j]).astype(np.uint32)
        if len(both) < 50:
            continue
        geometry = pycolmap.TwoViewGeometry()
        geometry.config = pycolmap.TwoViewGeometryConfiguration.CALIBRATED
        geometry.inlier_matches = np.column_stack([both, both])
        ties[i, j] = geometry
    found = reconstruct(frames, where, spots, ties, 0, tmp_path)
    assert found is not None
    assert len(found.centres) == 6
    assert found.noise == pytest.approx(0.4, rel=0.08)


def test_what_has_a_unit_of_its_own_is_scaled_by_the_positions() -> None:
    centres = np.array([[10.0 * n, 5.0 * n, 60.0] for n in range(4)])
    found = model([np.eye(3)] * 4, centres / 8, np.ones((5, 3)))
    scaled = in_metres(found, centres + 3)
    assert np.allclose([*scaled.centres.values()], centres)
    assert (scaled.points[0, 0], scaled.spacing) == pytest.approx((8, 8 * 0.02))
    near = model([np.eye(3)] * 4, centres * 1.05, np.ones((5, 3)))
    assert in_metres(near, centres) is near  # as good as positions are
    assert in_metres(found, np.zeros((4, 3))) is found  # nothing is known
    heights = centres * [1, 1, np.nan]
    assert in_metres(found, heights).spacing == pytest.approx(0.16)


def test_retired_originals_are_told_in_one_line(
    run: Run, town: Path, exact: Path, tmp_path: Path
) -> None:
    url, flight = (Path(shutil.copytree(p, tmp_path / p.name)) for p in (exact, town))
    shutil.rmtree(url / "verdicts", ignore_errors=True)  # of tests before this one
    aside, names = tmp_path / "aside", [Path(name).name for name in NAMES]
    aside.mkdir()
    for name in names[1:]:
        (flight / name).rename(aside / name)
    assert verify(run, url, town, "--quick").code == 0
    retired = run("retire", "--archive", url, "--originals", flight, "--yes", "--json")
    assert (retired.code, len(retired.json["files"])) == (3, 1)
    for name in names[1:]:
        (aside / name).rename(flight / name)
    some = verify(run, url, flight, "--quick")
    assert some.code == 3
    assert [image["image"] for image in some.json["retired"]] == [f"town/{names[0]}"]
    assert some.json["failed"] == []
    day = datetime.now(UTC).date().isoformat()
    assert some.err == (
        f"Not compared: town: the originals of 1 image were deleted by archive retire on {day}; "
        f"verdicts that stand of them: 1 passed verify-photogrammetry-quick, last on {day}\n"
    )
    retired = run("retire", "--archive", url, "--originals", flight, "--yes", "--json")
    assert retired.json["already"] == 1
    assert not list(flight.iterdir())
    for args in ((), ("--quick",)):
        none = verify(run, url, flight, *args, "--report", tmp_path / f"report{len(args)}")
        assert none.code == 1
        line, error = none.err.splitlines()
        assert f"{FRAMES} passed verify-photogrammetry-quick" in line
        told = f"town: archive retire has deleted the originals of {FRAMES} of {FRAMES} frames"
        assert error == f"Error: nothing is proven: {told}"
        page = (tmp_path / f"report{len(args)}" / "report.html").read_text()
        assert f"{FRAMES} with originals that archive retire has deleted" in page
        assert told in page
    # what was proven before stays
    [flight_] = run("info", "--archive", url, "--json").json["flights"]
    assert {(v["kind"], v["passed"]) for v in flight_["verdicts"]} == {
        ("photogrammetry-quick", True)
    }
    # an archive says what it likes
    note = url / "retired" / "town" / f"{names[0]}.json"
    note.write_text(note.read_text().replace('"deleted": "', '"deleted": "\\u001b[2J'))
    (url / "verdicts" / "town" / "photogrammetry-quick.json").write_text("{")
    odd = verify(run, url, flight, "--quick")
    assert odd.code == 1
    assert "verdicts that stand of them: none" in odd.err
    assert "\x1b" not in odd.err
