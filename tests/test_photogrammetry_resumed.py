"""A verification by photogrammetry that was killed goes on, and believes nothing that is odd."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run

if importlib.util.find_spec("pycolmap") is None:
    pytest.skip("the extra 'photogrammetry' is not installed", allow_module_level=True)

from test_photogrammetry import exact, lossless, model, shift, town, verify

from archive_pipeline.photogrammetry import features, reconstruction, resuming
from archive_pipeline.photogrammetry.matching import packed, unpacked
from archive_pipeline.photogrammetry.reconstruction import Reconstruction
from archive_pipeline.photogrammetry.resuming import Results

__all__ = ["exact", "town"]  # fixtures

QUESTION = {"features": "abc", "most": 3}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "archive-pipeline" / "photogrammetry"


def keep(folder: Path) -> tuple[Results, Path]:
    results = Results()
    results.put(QUESTION, {"points": np.arange(6.0).reshape(3, 2)})
    [path] = folder.iterdir()
    return results, path


def test_what_is_kept_comes_back(folder: Path) -> None:
    results, path = keep(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    found = Results().get(QUESTION)
    assert found is not None
    assert [*found] == ["points"]
    assert np.array_equal(found["points"], [[0, 1], [2, 3], [4, 5]])
    assert results.get({**QUESTION, "most": 4}) is None
    results.forget()
    assert not path.exists()
    assert results.get(QUESTION) is None


def test_what_is_damaged_or_another_answer_is_not_believed(folder: Path) -> None:
    _, path = keep(folder)
    whole = path.read_bytes()
    other = folder / "other"
    other.write_bytes(whole)
    flipped = bytes([*whole[:90], whole[90] ^ 1, *whole[91:]])
    for data in (b"", whole[:-1], whole + b"x", flipped, b"[" * 99):
        path.write_bytes(data)
        assert Results().get(QUESTION) is None
        assert not path.exists()
    path.symlink_to(other)
    assert Results().get(QUESTION) is None
    # the answer to another question, under this one's name
    results = Results()
    results.put({"features": "other"}, {"points": np.zeros((1, 2))})
    [name] = results.names
    path.unlink(missing_ok=True)
    os.rename(folder / name, path)
    assert results.get(QUESTION) is None
    assert not path.exists()


def test_a_folder_that_others_may_write_to_is_not_used(folder: Path) -> None:
    _, path = keep(folder)
    folder.chmod(0o777)
    results = Results()
    assert results.get(QUESTION) is None
    results.put({"features": "x"}, {"points": np.zeros(1)})
    results.tidy()
    results.forget([path.name])
    assert [*folder.iterdir()] == [path]
    folder.chmod(0o700)
    moved = folder.rename(folder.parent / "moved")
    folder.symlink_to(moved)
    assert Results().get(QUESTION) is None


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    _, path = keep(folder)
    path.unlink()
    os.mkfifo(path)
    began = time.monotonic()
    assert Results().get(QUESTION) is None
    assert time.monotonic() - began < 5


def test_what_is_kept_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, path = keep(folder)
    monkeypatch.setattr(resuming, "MOST_BYTES", 2 * path.stat().st_size)
    for number in range(5):
        results.put({"n": number}, {"points": np.arange(6.0).reshape(3, 2)})
    assert sum(file.stat().st_size for file in folder.iterdir()) <= resuming.MOST_BYTES
    monkeypatch.setattr(resuming, "MOST_BYTES", 1 << 40)
    monkeypatch.setattr(resuming, "ROOM", 1 << 60)
    before = {*folder.iterdir()}
    results.put({"n": 9}, {"points": np.zeros(1)})
    assert {*folder.iterdir()} == before
    old = time.time() - resuming.OLDEST - 60
    os.utime(path, (old, old))
    results.tidy()
    assert {*folder.iterdir()} == before - {path}


def test_geometries_and_reconstructions_come_back_as_they_were() -> None:
    import pycolmap

    one, none = pycolmap.TwoViewGeometry(), pycolmap.TwoViewGeometry()
    one.config = pycolmap.TwoViewGeometryConfiguration.CALIBRATED
    one.E, one.F = np.arange(9.0).reshape(3, 3) / 7, np.eye(3)
    one.inlier_matches = np.array([[1, 2], [3, 4]], np.uint32)
    back = unpacked(packed([one, none, one]))
    for geometry, was in zip(back, [one, none, one], strict=True):
        assert int(geometry.config) == int(was.config)
        assert np.array_equal(geometry.inlier_matches, was.inlier_matches)
        for name in ("E", "F", "H"):
            left, right = getattr(geometry, name), getattr(was, name)
            assert (left is None) == (right is None)
            assert left is None or np.array_equal(left, right)
    assert unpacked(packed([])) == []
    found = model([np.eye(3)] * 3, [np.arange(3.0) / 3] * 3, np.ones((5, 3)) / 7)
    again = Reconstruction.unpacked(found.packed())
    assert again.centres.keys() == found.centres.keys()
    assert all(np.array_equal(again.centres[i], found.centres[i]) for i in range(3))
    assert all(np.array_equal(again.rotations[i], np.eye(3)) for i in range(3))
    assert (again.track, again.spacing, again.lenses) == (3.0, 0.02, [])
    assert np.array_equal(again.points, found.points)


KILLED = """
import os, sys
from archive_pipeline.photogrammetry import reconstruction
real, seen = reconstruction.reconstruct, []
def die(*args):
    seen.append(1)
    return real(*args) if len(seen) < int(sys.argv[3]) else os._exit(9)
reconstruction.reconstruct = die
import archive_pipeline as ap
url, flight = sys.argv[1:3]
ap.verify_photogrammetry(url, originals=flight, features=2000, workers=0)
"""


def kill(url: Path, flight: Path, at: int) -> None:
    """Kill a verification when it begins its first or second reconstruction."""
    done = subprocess.run([sys.executable, "-c", KILLED, url, flight, str(at)], timeout=300)
    assert done.returncode == 9


def test_killed_it_goes_on(
    run: Run, town: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = lossless(town, tmp_path / "bad.zarr", shift)
    fresh = verify(run, url, town)
    assert fresh.code == 4
    assert not [*folder.iterdir()]  # what has served is gone
    kill(url, town, 2)
    assert len([*folder.iterdir()]) == 8 + 2 + 1 + 1  # features, ties, how points moved, a model
    counts = {"features": 0, "models": 0}
    find, build = features.find_features, reconstruction.reconstruct

    def counted(name: str, real: Any) -> Any:
        def call(*args: Any) -> Any:
            counts[name] += 1
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(features, "find_features", counted("features", find))
        patch.setattr(reconstruction, "reconstruct", counted("models", build))
        again = verify(run, url, town)
    repeats = (again.json["flights"][0]["control"] or {"repeats": 0})["repeats"]
    assert counts == {"features": 0, "models": 1 + repeats}
    assert again.json["flights"] == fresh.json["flights"]
    assert not [*folder.iterdir()]


def test_pixels_that_were_changed_since_are_looked_at(
    run: Run, town: Path, exact: Path, tmp_path: Path, folder: Path
) -> None:
    """The same records, other chunks: what was found in those that were there is not believed."""
    url = Path(shutil.copytree(exact, tmp_path / "own.zarr"))
    kill(url, town, 1)
    bad = lossless(town, tmp_path / "bad.zarr", shift)
    for chunk in bad.glob("flights/town/*/pixels/c/**/*"):
        if chunk.is_file():
            shutil.copy(chunk, url / chunk.relative_to(bad))
    found = verify(run, url, town, "--quick")
    assert found.code == 4, found.err
    [flight] = found.json["flights"]
    assert "shift" in [failure["what"] for failure in flight["failures"]]
