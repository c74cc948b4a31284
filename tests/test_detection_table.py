"""The table of detectors, codecs and ratios: every version is compared with the same original."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import HEIGHT, WIDTH
from toy_detector import Objects, paint_frame, save_toy_detector, write_labels

if importlib.util.find_spec("ultralytics") is None:  # not imported: it would write settings
    pytest.skip("the extra 'verify' is not installed", allow_module_level=True)
main = pytest.importorskip("detection_table", reason="needs the extra `benchmark`").main

OBJECTS: Objects = [("car", 40, 40, 60, 30), ("car", 300, 200, 30, 60), ("person", 600, 99, 24, 24)]


def test_table_of_one_image(flight: Path, tmp_path: Path) -> None:
    first, second, *_ = sorted(flight.iterdir())
    folder, labels, out = tmp_path / "town", tmp_path / "labels", tmp_path / "out"
    paint_frame(first, OBJECTS, folder / first.name)
    (folder / second.name).write_bytes(second.read_bytes())
    unseen: Objects = [("car", 500, 250, 40, 40)]  # labelled, and not there
    write_labels(labels / f"{first.stem}.txt", [*OBJECTS, *unseen], WIDTH, HEIGHT)
    (labels / "classes.txt").write_text("car\nperson\n")
    detector = save_toy_detector(tmp_path / "toy.torchscript")
    args = [out, folder, "--model", detector, "--labels", labels, "--image", first.name]
    args += ["--source-ratio", 4, "--peer", "jpeg", "--steps", 0, "--steps", 1]
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    assert {p.name for p in out.iterdir()} == {"detection.csv", "detection.md"}
    with (out / "detection.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["codec"] for r in rows} == {"pcdc", "pcdc-1", "jpeg"}
    assert {r["images"] for r in rows} == {"1"}
    (size,) = {r["bytes"] for r in rows if r["codec"].startswith("pcdc")}
    budget = (folder / first.name).stat().st_size / 4
    assert 0.9 * budget < int(size) <= budget
    assert all(int(r["bytes"]) <= int(size) for r in rows)
    for row in rows:
        if row["metric"] == "recall":  # of the original: two of three cars, the person
            assert float(row["original"]) == pytest.approx(
                {"vehicle": 2 / 3, "person": 1}[row["class"]]
            )
        if row["delta"]:
            difference = float(row["restored"]) - float(row["original"])
            assert float(row["delta"]) == pytest.approx(difference)
    sharper, plain = (
        [r["restored"] for r in rows if (r["codec"], r["metric"]) == (codec, "confidence")]
        for codec in ("pcdc-1", "pcdc")
    )
    assert sharper != plain  # other pixels


def test_images_that_are_not_there(flight: Path, tmp_path: Path) -> None:
    detector = save_toy_detector(tmp_path / "toy.torchscript")
    args = [tmp_path / "out", flight, "--model", detector, "--image", "none.jpg"]
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 1
    assert result.output.endswith("none.jpg: no such file\n")
    assert not list((tmp_path / "out").iterdir())
