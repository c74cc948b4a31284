"""The table of detectors, codecs and ratios: every version is compared with the same original."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import HEIGHT, WIDTH
from PIL import Image
from toy_detector import Objects, paint_frame, save_toy_detector, write_labels

from archive_pipeline.detection.boxes import Detections
from archive_pipeline.detection.metrics import Matched, Summary, intervals, match

if importlib.util.find_spec("ultralytics") is None:  # not imported: it would write settings
    pytest.skip("the extra 'verify' is not installed", allow_module_level=True)
main = pytest.importorskip("detection_table", reason="needs the extra `benchmark`").main
rates = pytest.importorskip("detection_rates")

OBJECTS: Objects = [("car", 40, 40, 60, 30), ("car", 300, 200, 30, 60), ("person", 600, 99, 24, 24)]


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def town(flight: Path, tmp_path: Path) -> list[object]:
    """Arguments for two painted frames: 4 of 5 labelled cars are there, and both persons."""
    for number, frame in enumerate(sorted(flight.glob("*.JPG"))[:2]):
        moved: Objects = [(n, x + 20 * number, y, w, h) for n, x, y, w, h in OBJECTS]
        paint_frame(frame, moved, tmp_path / "town" / frame.name)
        unseen: Objects = [("car", 500, 250, 40, 40)] * (number == 0)
        label = tmp_path / "labels" / f"{frame.stem}.txt"
        write_labels(label, [*moved, *unseen], WIDTH, HEIGHT)
    (tmp_path / "labels" / "classes.txt").write_text("car\nperson\n")
    detector = save_toy_detector(tmp_path / "toy.torchscript")
    args = [tmp_path / "out", tmp_path / "town", "--model", detector]
    return [*args, "--labels", tmp_path / "labels", "--peer", "jpeg", "--resamples", 50]


def test_runs_go_on_and_take_more_codecs_and_ratios(town: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(*town, "--source-ratio", 4)
    assert first.exit_code == 0, first.output
    rows = read(out / "detection.csv")
    assert {r["codec"] for r in rows} == {"uniform", "jpeg"}
    assert {r["images"] for r in rows} == {"2"}
    budget = sum(p.stat().st_size // 4 for p in (tmp_path / "town").iterdir())
    for row in rows:
        assert 0.8 * budget < int(row["bytes"]) <= budget
        if row["metric"] == "recall":
            expected = {"vehicle": 4 / 5, "person": 1}[row["class"]]
            assert float(row["original"]) == pytest.approx(expected)
        if row["delta"]:
            difference = float(row["restored"]) - float(row["original"])
            assert float(row["delta"]) == pytest.approx(difference, abs=2e-6)
            assert float(row["low"]) - 1e-6 <= float(row["high"])
    kept = {p: p.stat().st_mtime_ns for p in (out / "found").rglob("*.json")}
    assert len(kept) == 2 * 3  # originals and two codecs
    damaged, *_ = sorted(p for p in kept if p.name.startswith("uniform"))
    before = damaged.read_text()
    damaged.write_text(before[:100])

    toy = tmp_path / "toy.torchscript"
    more = run(*town, "--source-ratio", 4, "--source-ratio", 12, "--objects", toy, "--steps", 0)
    assert more.exit_code == 0, more.output
    assert f"{damaged}: damaged" in more.output
    assert damaged.read_text() == before
    again = {p: p.stat().st_mtime_ns for p in kept}
    assert {p for p in kept if again[p] != kept[p]} == {damaged}
    both = read(out / "detection.csv")
    assert [r for r in both if r["source_ratio"] == "4.0" and r["codec"] != "objects"] == rows
    assert {(r["source_ratio"], r["codec"]) for r in both} == {
        (ratio, codec) for ratio in ("4.0", "12.0") for codec in ("uniform", "objects", "jpeg")
    }
    found = read(out / "bd_rates.csv")
    assert {(r["codec"], r["against"]) for r in found} == {
        ("objects", "uniform"),
        ("jpeg", "uniform"),
    }
    assert "Rec., objects" not in (out / "detection.md").read_text()  # no ratio of 21.2
    assert Image.open(out / "detection.png").size[0] > 600
    assert "<svg" in (out / "detection.svg").read_text()


def test_steps_and_the_papers_layout(town: list[object], tmp_path: Path) -> None:
    one = sorted((tmp_path / "town").iterdir())[0].name
    args = ["--image", one, "--source-ratio", 21.2, "--steps", 0, "--steps", 1]
    result = run(*town, *args)
    assert result.exit_code == 0, result.output
    rows = read(tmp_path / "out" / "detection.csv")
    assert {r["images"] for r in rows} == {"1"}
    sizes = {r["codec"]: r["bytes"] for r in rows}
    assert sizes["uniform"] == sizes["uniform-1"]
    sharper, plain = (
        [r["restored"] for r in rows if (r["codec"], r["metric"]) == (codec, "confidence")]
        for codec in ("uniform-1", "uniform")
    )
    assert sharper != plain  # other pixels
    _, paper = result.output.split("At source ratio 21.2:\n")
    lines = [line.split(" | ") for line in paper.splitlines() if line.startswith("| ")]
    assert [cells[1] for cells in lines] == [
        "Data", "---", "Ori.", "Rec., uniform", "Rec., uniform-1", "Rec., jpeg",
    ]  # fmt: skip
    ratio = next(r["original"] for r in rows if (r["class"], r["metric"]) == ("vehicle", "ratio"))
    assert lines[2][2] == f"{float(ratio):.2f}"


def test_what_cannot_be_compared_is_named(town: list[object], tmp_path: Path) -> None:
    missing = run(*town, "--image", "none.jpg")
    assert missing.exit_code == 1
    assert missing.output.endswith("none.jpg: no such file\n")
    assert run(*town, "--source-ratio", 0).exit_code == 2
    assert run(*town, "--classes", "=car").exit_code == 2
    policy = run(*town, "--allocation", "policy", "--codec-model", tmp_path)
    assert policy.exit_code == 1
    assert "no such model" in policy.output
    label = next((tmp_path / "labels").glob("*[0-9].txt"))
    label.write_text("a car\n")
    labels = run(*town)
    assert labels.exit_code == 1
    assert f"{label}: line 1 is not a label" in labels.output
    label.unlink()
    damaged = next((tmp_path / "town").glob(f"*{label.stem}*"))
    assert f"{damaged}: left out: no labels" in run(*town, "--image", damaged.name).output
    assert not (tmp_path / "out" / "archive.zarr").exists()


# ---------------------------------------------------------------- bytes at equal metrics


def versions(seed: int, scale: float = 1.0, kept: float = 1.0) -> list[rates.Sampled]:
    """Five images at four ratios: objects are lost as bytes fall; all bytes by a factor."""
    random = np.random.default_rng(seed)
    boxes = np.array([[40 * i, 0, 40 * i + 30, 30] for i in range(30)], float)
    weights = rates.draws(5, 60)
    ranks = random.random((5, 30))
    sizes = random.integers(1000, 9000, 5)
    out = []
    for part in (0.9, 0.7, 0.5, 0.3):
        matched = []
        for image in range(5):
            seen = np.flatnonzero(ranks[image] < part * kept)
            scores = 0.9 - 0.01 * np.arange(len(seen))
            found = Detections.of(boxes[seen], scores, np.zeros(len(seen)))
            matched.append(match(found, boxes, 0.5))
        own = [math.ceil(scale * 100 * part**2 * size) for size in sizes]
        out.append(rates.sample(matched, own, weights, 0.25, np.ones(len(weights))))
    return out


def test_bytes_at_equal_metrics_are_paired() -> None:
    """A codec that finds the same in 0.8 times the bytes of every image: 0.8 in every resample."""
    for metric in ("map50_95", "recall", "recall_at"):
        result = rates.rate(versions(1, 0.8), versions(1), metric)
        assert result.ratio == pytest.approx(0.8, rel=1e-3)
        assert result.interval == pytest.approx((0.8, 0.8), rel=1e-3)
        assert result.share == pytest.approx(1)
        assert result.defined == 1
    worse = rates.rate(versions(1, kept=0.8), versions(1), "recall")
    assert worse.interval is not None
    assert 1.2 < worse.interval[0] < worse.ratio < worse.interval[1]
    apart = rates.rate(versions(1, kept=0.1), versions(1), "recall")
    assert math.isnan(apart.ratio)
    assert apart.interval is None


def test_points_that_cost_more_for_less_are_dropped() -> None:
    ours = versions(1)
    best, *rest = ours
    worse = rates.Sampled(best.bytes * 3, {k: v * 0.99 for k, v in best.values.items()})
    plain, dropped = (rates.rate(versions(1, 0.7), o, "recall") for o in (ours, [worse, *ours]))
    assert plain == dropped
    assert len(rest) == 3


def test_intervals_are_those_of_the_verdict() -> None:
    random = np.random.default_rng(0)
    reference = np.array([[0, 0, 30, 30], [50, 0, 80, 30], [0, 60, 30, 90]], float)

    def seen(shift: float) -> list[Matched]:
        return [
            match(
                Detections.of(reference + shift * random.random((3, 4)), random.random(3), [0] * 3),
                reference,
                0.5,
            )
            for _ in range(6)
        ]

    before, after = seen(4), seen(12)
    weights = rates.draws(6, 80)
    original = rates.sample(before, [1] * 6, weights, 0.25, None)
    restored = rates.sample(after, [1] * 6, weights, 0.25, original.values["precision"])
    expected = intervals(Summary(before, 0.25), Summary(after, 0.25), resamples=80)
    for metric, pair in expected.items():
        assert restored.interval(metric, original) == pytest.approx(pair)


def test_threshold_of_the_originals_precision() -> None:
    """Scores 0.9 to 0.1: right, right, wrong, right | right, wrong, wrong; 8 objects."""
    boxes = np.array([[40 * i, 0, 40 * i + 30, 30] for i in range(8)], float)
    hits = [True, True, False, True, True, False, False]
    places = [box if hit else box + 1000 for box, hit in zip(boxes, hits, strict=False)]
    scores = [0.9, 0.8, 0.7, 0.6, 0.2, 0.15, 0.1]
    image = match(Detections.of(places, scores, [0] * 7), boxes, 0.5)
    ranked = rates.Ranked([image], 0.25)
    one = np.ones(1)
    assert ranked.at(one, 0.75) == pytest.approx((5 / 8, 4 / 5, 4 / 8))  # 0.2 joins, 0.15 not
    assert ranked.at(one, 0.6) == pytest.approx((6 / 8, 4 / 6, 4 / 8))
    assert ranked.at(one, 0.9) == pytest.approx((2 / 8, 1, 2 / 8))  # back above the wrong one
    assert all(math.isnan(value) for value in ranked.at(one, math.nan))
    nothing = rates.Ranked([match(Detections.of([], [], []), boxes, 0.5)], 0.25)
    assert all(math.isnan(value) for value in nothing.at(one, 0.5))


def test_found_files_say_what_they_follow_from(town: list[object], tmp_path: Path) -> None:
    one = sorted((tmp_path / "town").iterdir())[0].name
    result = run(*town, "--image", one, "--source-ratio", 30)
    assert result.exit_code == 0, result.output
    keys = {
        path.name.split("-")[0]: json.loads(path.read_text())["key"]
        for path in (tmp_path / "out" / "found").rglob("*.json")
    }
    assert keys.keys() == {"original", "uniform", "jpeg"}
    assert len({key["image"] for key in keys.values()}) == 1
    assert len({key["detector"] for key in keys.values()}) == 1
    assert {"model", "ratio", "steps"} <= keys["uniform"].keys()
    assert {"library", "ratio", "set"} <= keys["jpeg"].keys()
