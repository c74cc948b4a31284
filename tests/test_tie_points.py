"""Tie points through codecs at equal bytes, and releases compared by the rows that they left."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import make_flight
from golden import reference as ref
from PIL import Image

if importlib.util.find_spec("pycolmap") is None:
    pytest.skip("the extra 'photogrammetry' is not installed", allow_module_level=True)

import benchmark
import benchmark_tie_points
import compare_releases
import releases
import tie_points
from peers import FLIGHT_PEERS
from rate_distortion import bootstrap_share

Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three frames that overlap, and a map; not to be changed."""
    folder = tmp_path_factory.mktemp("ties") / "town"
    make_flight(folder, 3, 640, 480, 3)
    return folder


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that have nothing in common."""
    folder = tmp_path_factory.mktemp("apart")
    for k in range(2):
        Image.fromarray(ref.texture(200, 220, k)).save(folder / f"{k}.png")
    return folder


def rows(path: Path) -> Rows:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def count(out: Path, *args: str) -> Result:
    options = ["--codec", "jpeg", "--ratio", "24", *args]
    return CliRunner().invoke(benchmark_tie_points.main, [str(out), *options])


def test_tie_points_at_equal_bytes(town: Path, apart: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "model"
    kept.mkdir()
    sets = ("--set", f"town={town}", "--set", f"apart={apart}")
    result = count(out, *sets, "--record", str(kept))
    assert result.exit_code == 0, result.output
    pairs, frames = rows(out / "tie_points.csv"), rows(out / "tie_frames.csv")
    # the map is no frame, though it shows the same ground
    assert {p["one"] for p in pairs} | {p["two"] for p in pairs} == {
        f"DJI_{n:04d}.JPG" for n in (1, 2, 3)
    }
    assert {p["set"] for p in pairs} == {"town"}
    assert "tie points of apart: no two of its frames overlap" in result.output
    taken = {"pcdc": 0, "jpeg": 0}
    for frame in frames:
        taken[frame["codec"]] += int(frame["bytes"])
        if frame["codec"] == "pcdc":
            assert int(frame["bytes"]) <= 640 * 480 * 3 / 24
        assert int(frame["points"]) > 100
        assert 0 < float(frame["median_px"]) < 1
    assert 0.95 * taken["pcdc"] < taken["jpeg"] <= taken["pcdc"]
    # a set of frames that fit to nothing would have none
    found = {c: [p for p in pairs if p["codec"] == c] for c in taken}
    for mine in found.values():
        assert [p["original"] for p in mine] == [p["original"] for p in found["pcdc"]]
        before, after = (sum(int(p[k]) for p in mine) for k in ("original", "restored"))
        assert before > 300
        assert 0.5 * before < after < 1.1 * before
    page = (out / "tie_points.md").read_text()
    assert "## Tie points, town (3 frames, 3 pairs overlap)" in page
    assert "| 24 | PCDC (ours) | 1.000 | " in page
    assert rows(kept / "tie_points.csv")[0]["release"]
    assert not rows(kept / "tie_points.csv")[-1]["release"]
    # nothing is measured again
    before_again = (out / "tie_frames.csv").read_bytes()
    again = count(out, *sets)
    assert again.exit_code == 0
    assert "24: DJI_0001.JPG" in result.stderr
    assert "24: DJI_0001.JPG" not in again.stderr
    assert (out / "tie_frames.csv").read_bytes() == before_again
    assert count(out, *sets, "--seed", "1").exit_code == 1


def test_what_cannot_be_measured_is_named(tmp_path: Path) -> None:
    folder, out = tmp_path / "same", tmp_path / "out"
    folder.mkdir()
    for name in ("0.png", "1.png"):
        Image.fromarray(ref.noise(100, 100)).save(folder / name)
    result = count(out, "--set", f"same={folder}", "--ratio", "1000")
    assert result.exit_code == 0, result.output
    assert "tie points of same at ratio 1000: a frame needs " in result.output
    assert {r["ratio"] for r in rows(out / "tie_points.csv")} == {"24"}
    (folder / "broken.png").write_bytes(b"no")
    broken = count(tmp_path / "other", "--set", f"same={folder}")
    assert broken.exit_code == 1
    assert "same: broken.png cannot be read" in broken.stderr


def test_what_is_left_goes_to_the_next_frame() -> None:
    pictures = [ref.texture(96, 96, k) for k in range(6)]
    taken, total = tie_points.Taken(FLIGHT_PEERS["jpeg"]), 0
    for k, pixels in enumerate(pictures, 1):
        setting, data = taken.encode(pixels, 2000)
        total += len(data)
        assert total <= 2000 * k
        finer = FLIGHT_PEERS["jpeg"].encode(pixels, setting + 1)
        left = 2000 * k - total
        assert left < 0.07 * (len(data) + left) or len(finer) > len(data) + left
    # what cannot be had is the coarsest, and no debt
    setting, data = taken.encode(pictures[0], -2000)
    assert setting == FLIGHT_PEERS["jpeg"].settings[0]
    assert 0 < 2000 - len(taken.encode(pictures[1], 2000)[1]) < 300


def test_interval_of_a_share() -> None:
    rng = np.random.default_rng(0)
    whole = rng.integers(50, 500, 300).astype(float)
    low, high = bootstrap_share(0.8 * whole, whole, 0)
    assert (low, high) == (pytest.approx(0.8), pytest.approx(0.8))
    kept = rng.binomial(whole.astype(int), 0.8).astype(float)
    low, high = bootstrap_share(kept, whole, 0)
    half = 1.96 * np.sqrt(0.8 * 0.2 / whole.sum())
    assert (low, high) == (
        pytest.approx(kept.sum() / whole.sum() - half, abs=half / 5),
        pytest.approx(kept.sum() / whole.sum() + half, abs=half / 5),
    )
    assert np.isnan(bootstrap_share(kept[:1], whole[:1], 0)).all()


def point(crop: str, codec: str, rate: float, quality: float) -> dict[str, object]:
    place = {"set": "a", "scale": "native", "crop": crop, "width": 384, "height": 384}
    return {**place, "codec": codec, "setting": rate, "bpp": rate, "psnr": quality, "encode_s": 3}


def curve(codec: str, factor: float, crops: str = "xy") -> list[dict[str, object]]:
    return [
        point(crop, codec, factor * 0.05 * 2**k, 20.0 + 3 * k) for crop in crops for k in range(6)
    ]


def ties(codec: str, *kept: int) -> list[dict[str, object]]:
    row = {"set": "a", "ratio": 24.0, "codec": codec, "one": "1.jpg"}
    return [{**row, "two": f"{n}.jpg", "original": 100, "restored": k} for n, k in enumerate(kept)]


def compared(*args: object) -> Result:
    return CliRunner().invoke(compare_releases.main, [str(arg) for arg in args])


def test_releases_are_compared_by_their_rows(tmp_path: Path) -> None:
    one, two = "1" * 64, "2" * 64
    releases.record(tmp_path, one, curve("pcdc", 1) + curve("hevc", 1.5), ties("pcdc", 50, 50))
    alone = compared(tmp_path)
    assert "| bytes of HEVC intra over 111111111111 | 1.50 |" in alone.output
    assert "| 24 | 111111111111 | 100 of 200 | 50.0% [50.0%, 50.0%] |  |" in alone.output
    # a release that needs three quarters of the bytes, and one crop that the first never saw
    later = curve("pcdc", 0.75, "xyz") + curve("pcdc-1", 5)
    releases.record(tmp_path, two, later, ties("pcdc", 60, 80) + ties("hevc", 70, 70))
    both = compared(tmp_path)
    assert both.exit_code == 0, both.output
    assert "## a, native size (crops: 2)" in both.output
    assert "| bytes of 111111111111 over 222222222222 | **1.33** [1.33, 1.33] |" in both.output
    assert "HEVC intra over 111111111111 / 222222222222 | 1.50 / 2.00 |" in both.output
    assert "| 24 | 222222222222 | 140 of 200 | 70.0%" in both.output
    assert "| 24 | 111111111111 | 100 of 200 | 50.0% [50.0%, 50.0%] | -20.0 % [-30.0, -10.0] |" in (
        both.output
    )
    turned = compared(tmp_path, "--after", "111", "--before", "2")
    assert "| bytes of 222222222222 over 111111111111 | **0.75** [0.75, 0.75] |" in turned.output
    # recorded anew, rows replace those of the same crop and codec, and of no other
    releases.record(tmp_path, two, curve("pcdc", 0.5), [])
    assert "**2.00** [2.00, 2.00]" in compared(tmp_path).output
    points, _ = releases.read(tmp_path)
    assert len(points) == 12 + 12 + 18 + 12
    assert {len(r["release"]) for r in points if "release" in r} == {12}
    assert not any("encode_s" in r for r in points)


def test_nothing_to_compare(tmp_path: Path) -> None:
    nothing = compared(tmp_path)
    assert nothing.exit_code == 1
    assert "no release's rows" in nothing.stderr
    releases.record(tmp_path, "1" * 64, curve("pcdc", 1), [])
    unknown = compared(tmp_path, "--before", "3")
    assert unknown.exit_code == 1
    assert "3: no single release of 111111111111" in unknown.stderr


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark of two rates and one metric."""
    monkeypatch.setattr(benchmark, "OUR_RATES", (0.1, 0.6))
    monkeypatch.setattr(benchmark, "SHEET_RATES", ())
    monkeypatch.setattr(benchmark, "METRICS", {"psnr": benchmark.METRICS["psnr"]})


def test_the_benchmark_of_crops_counts_them_too(
    town: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    frames = tmp_path / "frames"
    frames.mkdir()
    for path in sorted(town.glob("*.JPG"))[:2]:
        (frames / path.name).symlink_to(path)
    kept = tmp_path / "model"
    kept.mkdir()
    args = [str(tmp_path / "out"), "--set", f"town={frames}", "--crops", "1", "--size", "176"]
    args += ["--codec", "jpeg", "--tie-points", "40", "--record", str(kept)]
    result = CliRunner().invoke(benchmark.main, args)
    assert result.exit_code == 0, result.output
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "## Tie points, town (2 frames, 1 pairs overlap)" in summary
    assert "--tie-points 40" in summary
    assert {r["codec"] for r in rows(kept / "benchmark.csv")} == {"pcdc", "jpeg"}
    assert [r["ratio"] for r in rows(kept / "tie_points.csv")] == ["40", "40"]
    refused = CliRunner().invoke(benchmark.main, [*args, "--allocation", "greedy"])
    assert refused.exit_code == 2
    assert "--record keeps" in refused.stderr


def test_a_release_can_be_measured_without_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    Image.fromarray(ref.texture(180, 190)).save(tmp_path / "0.png")
    args = [str(tmp_path / "out"), "--set", f"toy={tmp_path}", "--size", "180", "--codec", "none"]
    result = CliRunner().invoke(benchmark.main, [*args, "--record", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert {r["codec"] for r in rows(tmp_path / "benchmark.csv")} == {"pcdc"}
