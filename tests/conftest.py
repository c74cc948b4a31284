"""What tests of the whole tool share: a small flight, its archive, and runs of the command."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError

import pytest
from click.testing import CliRunner

from archive_pipeline.commands.cli import main

if TYPE_CHECKING:
    from s3_server import S3Server

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
BRIGHTON = DATA / "eval" / "brighton_beach"
ORTHO = DATA / "ortho"

BUCKET = "drones"

# Two tiles, the second narrower; small enough to code hundreds of times.
WIDTH, HEIGHT, FRAMES = 720, 304, 3


@dataclass
class Result:
    """What a run of the command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where ingests note what they archived, and verifications what they have found: not in the
    home of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def _done_once() -> Iterator[None]:
    """Frames that were archived before are not encoded again, see `done_once`."""
    import done_once

    with pytest.MonkeyPatch.context() as patch:
        done_once.patch(patch)
        yield


@pytest.fixture
def done_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """But here they are."""
    import done_once

    done_once.unpatch(monkeypatch)


@pytest.fixture
def run() -> Run:
    """Run `archive` in this process: run("ingest", folder, "--archive", url)."""

    def call(*args: object, env: dict[str, str] | None = None) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in args], env=env)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Result(result.exit_code, result.stdout, result.stderr)

    return call


@pytest.fixture(scope="session")
def command() -> Run:
    """Run `archive` as a process of its own."""

    def call(*args: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> Result:
        done = subprocess.run(
            command_line(*args),
            env={**os.environ, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return call


def command_line(*args: object) -> list[str]:
    """Return the command line of `archive` with these arguments."""
    return [sys.executable, "-m", "archive_pipeline.commands.cli", *(str(a) for a in args)]


def make_flight(folder: Path, *args: int) -> list[Path]:
    """Call the example flight's generator: frames, width, height, seed."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        made: list[Path] = importlib.import_module("make_flight").make_flight(folder, *args)
    finally:
        sys.path.pop(0)
    return made


@pytest.fixture(scope="session")
def flight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small overlapping frames with EXIF and XMP; not to be changed."""
    folder = tmp_path_factory.mktemp("flights") / "beach"
    *_, ortho = make_flight(folder, FRAMES, WIDTH, HEIGHT, 3)
    ortho.unlink()
    return folder


@pytest.fixture(scope="session")
def archive(flight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of `flight` at a ratio of 16, all by pcdc; not to be changed."""
    url = tmp_path_factory.mktemp("archive") / "archive.zarr"
    args = ["ingest", flight, "--archive", url, "--ratio", 16, "--workers", 0, "--json"]
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    assert {i["codec"] for i in json.loads(result.stdout)["images"]} == {"pcdc"}
    return url


@pytest.fixture
def lpips_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch find SqueezeNet's weights, or skip."""
    import torch

    shared = DATA.parent / "weights" / "torch" / "hub"
    for folder in (Path(torch.hub.get_dir()), shared):
        if list(folder.glob("checkpoints/squeezenet1_1-*.pth")):
            break
    else:
        pytest.skip("no SqueezeNet weights in the torch hub cache: LPIPS needs them")
    # not set_dir: once called, $TORCH_HOME is not looked at again
    monkeypatch.setattr(torch.hub, "_hub_dir", str(folder))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No weights and no network."""
    import torch

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


@pytest.fixture
def own_archive(archive: Path, tmp_path: Path) -> Path:
    """A copy of `archive` to break."""
    return Path(shutil.copytree(archive, tmp_path / "own.zarr"))


@pytest.fixture
def own_flight(flight: Path, tmp_path: Path) -> Path:
    """A copy of `flight` to change."""
    return Path(shutil.copytree(flight, tmp_path / "beach"))


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """An S3 server on this machine, with one empty bucket "drones"."""
    import fsspec
    from s3_server import S3Server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        server = S3Server()
        for name, value in server.environ.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield server
        server.stop()
        fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts file systems of their own with little room."""
    disks: list[Path] = []

    def mount(options: str) -> Path:
        disk = tmp_path / f"disk{len(disks)}"
        disk.mkdir()
        line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        try:
            subprocess.run(line, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a small tmpfs is not permitted here")
        disks.append(disk)
        return disk

    yield mount
    for disk in disks:
        subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Leave no room for another byte."""
    with suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
        while file.write(bytes(1 << 20)):
            pass
    assert os.statvfs(disk).f_bavail == 0
