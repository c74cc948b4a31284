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
from archive_pipeline.store.image_writer import ImageWriter
from archive_pipeline.store.layout import grid
from archive_pipeline.store.leftovers import Replaced

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
    """An archive's files but its index, which also has the times and inodes of records."""
    return {
        p.relative_to(url).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in url.rglob("*")
        if p.is_file() and p.name != "items.parquet"
    }


def arguments(flight: Path, url: Path, *more: object) -> list[str]:
    args = ["ingest", flight, "--archive", url, "--ratio", 16, "--workers", 0, "--json", *more]
    return [str(a) for a in args]


def all_shards(url: Path) -> list[Path]:
    """Shards of both generations."""
    return [*shards(url), *url.glob("flights/*/*/pixels/c.*")]


def stop_after(count: int, url: Path, patch: pytest.MonkeyPatch) -> None:
    """Let an ingest stop as it reads the pixels behind so many shards."""
    plain, before = ingest_image.SourcePixels.read, len(all_shards(url))

    def stops(reader: SourcePixels, window: Window) -> Any:
        if len(all_shards(url)) == before + count:
            raise KeyboardInterrupt
        return plain(reader, window)

    patch.setattr(ingest_image.SourcePixels, "read", stops)


@pytest.fixture
def interrupted(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive whose writer stopped after the first of two shards."""
    url = tmp_path / "a.zarr"
    with monkeypatch.context() as patch:
        stop_after(1, url, patch)
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
    assert shards(url) == {}  # the other generation's have other names
    assert run(*arguments(one, url, "--overwrite")).code == 0
    assert all(shards(url)[path] != time for path, time in before.items())
    assert contents(url) == expected


def test_an_interrupted_overwrite_keeps_the_old_image_and_goes_on(
    run: Run, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, again = tmp_path / "a.zarr", ("--overwrite", "--ratio", 20)
    assert run(*arguments(one, url)).code == 0
    expected = contents(url)
    with monkeypatch.context() as patch:
        stop_after(1, url, patch)
        assert CliRunner().invoke(main, arguments(one, url, *again)).exit_code == 1
    left = contents(url)
    assert {key: left[key] for key in expected} == expected
    checked = run("check", "--archive", url, "--json").json
    assert (checked["problems"], checked["images"], len(checked["notes"])) == ([], 1, 1)
    (first,) = url.glob("flights/*/*/pixels/c.*")
    time = first.stat().st_mtime_ns
    assert run(*arguments(one, url, *again)).code == 0
    assert first.stat().st_mtime_ns == time  # gone on behind it
    whole = contents(url)
    undisturbed = tmp_path / "undisturbed.zarr"
    assert run(*arguments(one, undisturbed)).code == 0
    assert run(*arguments(one, undisturbed, *again)).code == 0
    assert whole == contents(undisturbed)
    assert run("check", "--archive", url, "--json").json["notes"] == []


def test_an_old_generation_is_never_gone_on_with(
    run: Run, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right after its commit, an ingest leaves its plan beside the shards before."""
    url, again = tmp_path / "a.zarr", ("--overwrite", "--ratio", 20)
    assert run(*arguments(one, url)).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(ImageWriter, "_tidy", lambda *_: None)
        patch.setattr(Replaced, "collect", lambda *_, **__: None)
        assert run(*arguments(one, url, *again)).code == 0
    assert len(shards(url)) == SHARDS
    assert len(list(url.glob("flights/*/*/unfinished.json"))) == 1
    assert run("check", "--archive", url).code == 0
    before = shards(url)
    assert run(*arguments(one, url, *again)).code == 0
    assert all(shards(url)[path] != time for path, time in before.items())
    undisturbed = tmp_path / "undisturbed.zarr"
    assert run(*arguments(one, undisturbed, "--ratio", 20)).code == 0
    assert contents(url) == contents(undisturbed)


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
