"""README and pages: their Python runs, their links lead somewhere, what they name exists."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, Run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_of(page: Path) -> str:
    """The first block of Python of a page."""
    found = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def at_home(run: Run, flight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the flight and the archive that the pages speak of; the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("flight", "flight_dir"):
        shutil.copytree(flight, tmp_path / name)
    done = run("ingest", "flight", "--ratio", 16, "--workers", 0)
    assert done.code == 0, done.err
    return tmp_path


def test_the_readmes_python_runs(at_home: Path) -> None:
    names: dict[str, object] = {}
    exec(python_of(ROOT / "README.md"), names)
    pixels = names["pixels"]
    assert pixels.values.shape[2] == 3  # type: ignore[attr-defined]
    assert pixels.crs == "EPSG:32615"  # type: ignore[attr-defined]


def test_the_python_pages_example_runs(at_home: Path) -> None:
    shutil.rmtree(at_home / "archive.zarr")
    code = python_of(ROOT / "docs" / "python.md").replace("ratio=48", "ratio=16, workers=0")
    # the detector of one's own is not here
    lines = [line for line in code.splitlines() if "verify_detection" not in line]
    assert len(lines) == len(code.splitlines()) - 1
    names: dict[str, object] = {}
    exec("\n".join(lines), names)
    assert list((at_home / "restored").rglob("*.jpg")) or list(
        (at_home / "restored").rglob("*.JPG")
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^    .*$", "", page.read_text(), flags=re.MULTILINE)  # code
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert heading in slugs, target


def test_the_code_map_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {path.name for path in (ROOT / "archive_pipeline").iterdir() if path.is_dir()}
    named = re.findall(r"`([a-z_]+/[a-z_/]*(?:\.py)?)`", text)
    assert len(named) > 15
    for name in named:
        inside = name.split("/")[0] in rooms
        assert ((ROOT / "archive_pipeline" if inside else ROOT) / name).exists(), name
