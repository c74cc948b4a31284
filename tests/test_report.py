"""The report: self-contained, safe with hostile names, and says what was compared."""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from PIL import Image
from toy_detector import Objects, paint, save_toy_detector

from archive_pipeline.detection import report as report_module
from archive_pipeline.detection.metrics import METRICS
from archive_pipeline.detection.report import FILES, Shape, _spots
from archive_pipeline.outputs.pages import Table

if importlib.util.find_spec("ultralytics") is None:
    pytest.skip("the extra 'verify' is not installed", allow_module_level=True)

HOSTILE = "<img src=x onerror=alert(1)>&\"'{{7*7}}</script>".replace("/", "\u2215")
OBJECTS: Objects = [("car", 40, 40, 60, 30), ("person", 200, 100, 30, 30)]


class Page(HTMLParser):
    """Tags and attributes of a page, and the text outside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A flight of hostile names, its archive with stored detections, and the detector."""
    folder = tmp_path_factory.mktemp("report")
    toy = save_toy_detector(folder / "toy<b>.torchscript")
    flight = folder / HOSTILE
    flight.mkdir()
    noise = np.random.default_rng(0).integers(70, 130, (240, 320, 3), np.uint8)
    Image.fromarray(paint(noise, OBJECTS)).save(flight / f"{HOSTILE}.png")
    Image.fromarray(paint(noise, OBJECTS[:1])).save(flight / "=cmd().png")
    from click.testing import CliRunner

    from archive_pipeline.commands.cli import main

    url = folder / "a.zarr"
    args = ("ingest", flight, "--archive", url, "--ratio", 16, "--workers", 0, "--detect", toy)
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return flight, url, toy


def report(run: Run, made: tuple[Path, Path, Path], out: Path, *args: object) -> Page:
    _, url, toy = made
    result = run(
        "verify-detection", "--archive", url, "--model", toy, "--workers", 0, "--report", out,
        "--tolerance", 1, *args,
    )  # fmt: skip
    assert result.code == 0, result.err
    return Page((out / "report.html").read_text())


def test_page_is_self_contained_and_safe(
    run: Run, made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    page = report(run, made, tmp_path / "new" / "report")
    assert f"{HOSTILE}/{HOSTILE}.png" in page.text
    images = 0
    for tag, attributes in page.tags:
        assert tag not in ("img", "b", "link", "iframe", "base"), attributes
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            url = attributes.get(name)
            if url is not None:
                assert url.startswith("data:image/jpeg;base64,")
                pixels = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
                assert pixels.size[0] <= 1600
                images += 1
    # the whole and a part for each object, of both versions and both images
    assert images == 2 * (1 + 2) + 2 * (1 + 1)
    text = (tmp_path / "new" / "report" / "report.html").read_text()
    assert not re.search(r"https?://", text)
    rects = [a for tag, a in page.tags if tag == "rect"]
    assert {a["class"] for a in rects} == {"kept"}
    assert "passed" in page.text
    assert "NaN" not in page.text


def test_tables_beside_it(run: Run, made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    report(run, made, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["passed"] is True
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["class"], r["metric"]) for r in rows] == [
        (group, name) for group in ("vehicle", "person") for name in METRICS
    ]
    model = result["models"][0]
    for row in rows:
        assert float(row["delta"]) == model["delta"][row["class"]][row["metric"]]
    with (tmp_path / "images.csv").open(newline="") as file:
        images = list(csv.DictReader(file))
    assert len(images) == 4
    assert {r["image"] for r in images} == {f"{HOSTILE}/{HOSTILE}.png", f"{HOSTILE}/=cmd().png"}


def test_names_are_no_formulas(run: Run, made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """In the tables; and on the page they are no tags."""
    group = '+1"><b onclick>'
    page = report(run, made, tmp_path, "--classes", f"{group}=car")
    assert group in page.text
    assert "b" not in {tag for tag, _ in page.tags}
    for name in ("images.csv", "summary.csv"):
        with (tmp_path / name).open(newline="") as file:
            assert {row["class"] for row in csv.DictReader(file)} == {f"'{group}"}


@pytest.mark.parametrize("start", "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
def test_cells_that_spreadsheets_would_compute(start: str) -> None:
    file = io.StringIO(newline="")
    names = (f"{start}cmd()", f"a;{start}1", f'a"{start}1', "a", "", "1.5")
    Table(file).row(*names, -0.5, 3, None, True)
    assert file.getvalue().startswith(f'"\'{start}cmd()","a;{start}1","a""{start}1",')
    assert file.getvalue().endswith(',"a","","1.5",-0.5,3,"",True\r\n')
    file.seek(0)
    assert next(csv.reader(file))[:6] == ["'" + names[0], *names[1:]]


def test_originals_gone(run: Run, made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    flight, _, _ = made
    hidden = flight.with_name("hidden")
    flight.rename(hidden)
    try:
        page = report(run, made, tmp_path)
    finally:
        hidden.rename(flight)
    assert page.text.count("The original is gone.") == 2 * 1 + 3
    assert "their detections from ingest were used" in " ".join(page.text.split())
    classes = {a["class"] for tag, a in page.tags if tag == "rect"}
    assert classes == {"kept", "kept ghost"}


def test_places_that_cannot_be_written(
    run: Run, made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, url, toy = made
    (tmp_path / "file").touch()
    result = run(
        "verify-detection", "--archive", url, "--model", toy, "--report", tmp_path / "file" / "r"
    )
    assert result.code == 1
    assert len(result.err.splitlines()) == 1
    assert str(tmp_path / "file") in result.err


def test_what_is_there_stays(
    run: Run, made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url, toy = made
    args = ("verify-detection", "--archive", url, "--model", toy, "--workers", 0, "--report")
    (tmp_path / "result.json").write_text("somebody's")
    refused = run(*args, tmp_path)
    assert (refused.code, refused.out) == (1, "")
    there = tmp_path / "result.json"
    assert refused.err == f"Error: {there} is already there (--overwrite replaces it)\n"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert there.read_text() == "somebody's"
    report(run, made, tmp_path, "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(FILES)
    assert json.loads(there.read_text())["passed"] is True
    # What comes while it works stays, too.
    late = tmp_path / "late"
    real = report_module._draw

    def slow(*drawn: Any) -> Any:
        (late / "images.csv").write_text("somebody's")
        return real(*drawn)

    monkeypatch.setattr(report_module, "_draw", slow)
    refused = run(*args, late, "--tolerance", 1)
    assert refused.code == 1
    assert "images.csv is already there" in refused.err
    assert (late / "images.csv").read_text() == "somebody's"
    inside = run(*args, url / "report")
    assert inside.code == 1
    assert "is inside the archive" in inside.err
    assert not (url / "report").exists()


def test_parts_lie_inside_the_image() -> None:
    shapes = [
        Shape(0, (0, 0, 10, 10), "lost", "", 0.9),
        Shape(0, (5, 5, 10, 10), "lost", "", 0.8),  # in the first one's window
        Shape(0, (990, 490, 10, 10), "new", "", 0.7),
        Shape(0, (400, 100, 50, 50), "label", "", 1.0),
    ]
    assert _spots(shapes, 1000, 500) == [(0, 0, 160, 160), (840, 340, 160, 160)]
    assert _spots([Shape(0, (0, 0, 900, 20), "lost", "", 1.0)], 1000, 100) == [(400, 0, 100, 100)]
