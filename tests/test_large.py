"""Images of several shards: an ingest that was killed goes on, and only where it may."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import ROOT, Run

from archive_pipeline.commands.cli import main
from archive_pipeline.flight.pixels import SourcePixels
from archive_pipeline.geo.georef import Window
from archive_pipeline.jobs import ingest as ingesting
from archive_pipeline.jobs import ingest_image
from archive_pipeline.store import layout
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.layout import grid

SHARDS = 2  # of a frame, once a tile is a shard


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SHARD_TILES", 1)


@pytest.fixture
def one(own_flight: Path) -> Path:
    """A flight of one frame."""
    for path in sorted(own_flight.iterdir())[1:]:
        path.unlink()
    return own_flight


def contents(url: Path) -> dict[str, str]:
    return {
        p.relative_to(url).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in url.rglob("*")
        if p.is_file()
    }


def arguments(flight: Path, url: Path, *more: object) -> list[str]:
    args = ["ingest", flight, "--archive", url, "--ratio", 16, "--workers", 0, "--json", *more]
    return [str(a) for a in args]


@pytest.fixture
def interrupted(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive whose writer stopped after the first of two shards."""
    url = tmp_path / "a.zarr"
    plain = ingest_image.SourcePixels.read

    def stops(reader: SourcePixels, window: Window) -> Any:
        if shards(url):
            raise KeyboardInterrupt
        return plain(reader, window)

    with monkeypatch.context() as patch:
        patch.setattr(ingest_image.SourcePixels, "read", stops)
        assert CliRunner().invoke(main, arguments(one, url)).exit_code == 1
    assert len(shards(url)) == 1
    assert list(Archive.open(url).images()) == []
    return url


def shards(url: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in url.glob("flights/*/*/pixels/c/*/*/*")}


def test_goes_on_inside_an_image(
    run: Run, one: Path, interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = shards(interrupted)
    (first,) = before
    first.with_suffix(".0123456789abcdef.partial").write_bytes(b"what a kill leaves of a write")
    told = []
    plain = ingesting.ingest

    def listens(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **{**kwargs, "part": lambda *what: told.append(what)})

    with monkeypatch.context() as patch:
        patch.setattr(ingesting, "ingest", listens)
        result = run(*arguments(one, interrupted))
    assert (result.code, result.json["ingested"]) == (0, 1)
    after = shards(interrupted)
    assert len(after) == SHARDS
    assert after[first] == before[first]
    assert told == [("DJI_0001.JPG", 2, SHARDS, 1)]
    undisturbed = tmp_path / "undisturbed.zarr"
    assert run(*arguments(one, undisturbed)).code == 0
    assert contents(interrupted) == contents(undisturbed)
    assert run("check", "--archive", interrupted).code == 0
    assert run(*arguments(one, interrupted)).json["skipped"] == 1


@pytest.mark.parametrize("change", ["ratio", "source", "metadata", "version"])
def test_shards_of_another_plan_are_not_used(
    run: Run, one: Path, interrupted: Path, tmp_path: Path, change: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    before = shards(interrupted)
    more: tuple[object, ...] = ()
    if change == "ratio":
        more = ("--ratio", 20)
    elif change == "source":
        (frame,) = one.iterdir()
        frame.write_bytes(frame.read_bytes() + b"trailer")
    elif change == "metadata":  # of the same plan, yet not what it makes: damaged meanwhile
        path = next(interrupted.glob("flights/*/*/pixels/zarr.json"))
        path.write_bytes(path.read_bytes() + b" ")
    else:
        monkeypatch.setattr(ingest_image, "__version__", "another")
    result = run(*arguments(one, interrupted, *more))
    assert (result.code, result.json["ingested"]) == (0, 1)
    (first,) = before
    assert shards(interrupted)[first] != before[first]
    undisturbed = tmp_path / "undisturbed.zarr"
    assert run(*arguments(one, undisturbed, *more)).code == 0
    assert contents(interrupted) == contents(undisturbed)


def test_a_committed_image_is_never_gone_on_with(run: Run, one: Path, tmp_path: Path) -> None:
    url = tmp_path / "a.zarr"
    assert run(*arguments(one, url)).code == 0
    before, expected = shards(url), contents(url)
    assert run(*arguments(one, url, "--overwrite")).code == 0
    assert all(shards(url)[path] != time for path, time in before.items())
    assert contents(url) == expected


def test_shards_of_many_bands_are_no_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real sizes
    for bands in (1, 4, 200, 2000):
        chunks, shards = grid((20_000, 20_000, bands), 8)
        assert chunks[0] * chunks[1] * bands * 8 <= max(4 << 20, 64 * 64 * bands * 8)
        assert shards[0] * shards[1] * bands * 8 <= 400 << 20
        assert shards[0] % chunks[0] == shards[1] % chunks[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["photo", "lossless"])
def test_a_raster_beyond_memory(kind: str, tmp_path: Path) -> None:
    """Peak memory, and a killed ingest, at 12,000 pixels a side; the workflow takes any."""
    import json

    script = ROOT / "workflows" / "scale" / "huge_raster.py"
    args = ["--side", "12000", "--kind", kind, "--textured", "1024", "--kill", "--no-mosaic"]
    subprocess.run([sys.executable, script, tmp_path / "out", *args], check=True)
    report = json.loads((tmp_path / "out" / "huge_raster.json").read_text())
    assert report["identical"]
    assert 0 < report["kept_shards"] < report["shards"]
    for step in ("ingest", "resumed", "restore"):
        assert report[step]["code"] == 0
        assert report[step]["peak_gb"] <= 2
