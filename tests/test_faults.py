"""What breaks at night: workers, clients, schedulers, disks; and several commands at once."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import FRAMES, Result, Run, command_line, make_flight
from test_cluster import dask_processes

from archive_pipeline.store.archive import Archive
from archive_pipeline.store.index import read_index

SECONDS = 600  # that a command may take on a busy machine
MANY = "ARCHIVE_TEST_FRAMES"  # frames of the long chaos test
DIFFERENT = 100  # of them; the others are copies
MOST_KILLED = 60  # workers in it: each costs seconds to start anew


def tree(url: Path) -> dict[str, str]:
    """Contents of an archive's files; what killed writers began is no part of it.

    The index is left out, which also has the times and inodes of the records' files.
    """
    files = (
        p
        for p in url.rglob("*")
        if p.is_file() and p.suffix != ".partial" and p.name != "items.parquet"
    )
    return {
        str(p.relative_to(url)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)
    }


def committed(url: Path) -> int:
    """Number of images that readers see."""
    return sum(b"archive_pipeline" in p.read_bytes() for p in url.glob("flights/*/*/zarr.json"))


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(*args: object, **environ: str) -> subprocess.Popen:
    return subprocess.Popen(
        command_line(*args),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environ},
    )


def finish(process: subprocess.Popen) -> Result:
    out, err = process.communicate(timeout=SECONDS)
    return Result(process.returncode, out, err)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Worker processes of a command's local cluster."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [c for c in children if any("spawn_main" in part for part in c.cmdline())]


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve frames of less than a tile."""
    folder = tmp_path_factory.mktemp("frames") / "coast"
    *_, ortho = make_flight(folder, 12, 360, 304, 5)
    ortho.unlink()
    return folder


@pytest.fixture(scope="module")
def undisturbed(frames: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of `frames`, made in this process: nothing happens to it."""
    from archive_pipeline.jobs.ingest import ingest
    from archive_pipeline.jobs.ingest_task import Budget, IngestOptions

    url = tmp_path_factory.mktemp("undisturbed") / "a.zarr"
    report = ingest(str(url), [(frames.name, frames)], IngestOptions(Budget(ratio=16)), workers=0)
    assert {outcome.codec for outcome in report.outcomes} == {"pcdc"}
    return url


def kill_workers(process: subprocess.Popen, url: Path, times: int, rng: random.Random) -> int:
    """Kill a worker after each few images; returns how many died."""
    killed = 0
    for _ in range(times):
        seen, pause = committed(url), rng.randint(1, 3)
        wait_until(lambda seen=seen, n=pause: committed(url) >= seen + n, process)
        workers = workers_of(process)
        if workers:
            rng.choice(workers).kill()
            killed += 1
    return killed


def test_workers_killed_at_random_change_nothing(
    run: Run, frames: Path, undisturbed: Path, tmp_path: Path
) -> None:
    url = tmp_path / "a.zarr"
    ingest = start("ingest", frames, "--archive", url, "--ratio", 16, "--workers", 2, "--json")
    killed = kill_workers(ingest, url, 2, random.Random(1))
    result = finish(ingest)
    assert result.code == 0, result.err
    assert killed == 2
    assert result.json["workers_lost"] == killed
    assert result.json["retries"] >= 1
    assert (result.json["ingested"] + result.json["skipped"], result.json["failed"]) == (12, [])
    assert tree(url) == tree(undisturbed)
    assert run("check", "--archive", url).code == 0
    stages = result.json["stages"]
    assert stages.keys() == {"start", "read", "encode", "entropy", "write"}
    assert all(seconds > 0 for seconds in stages.values())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with little room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_is_one_error_and_goes_on_when_there_is_room(
    run: Run, flight: Path, archive: Path, small_disk: Path
) -> None:
    url = small_disk / "a.zarr"
    args = ("ingest", flight, "--archive", url, "--ratio", 16, "--workers", 0)
    # room for the model and for one image, not for all
    model, images = (
        sum(p.stat().st_size for p in (archive / name).rglob("*") if p.is_file())
        for name in ("models", "flights")
    )
    space = os.statvfs(small_disk)
    ballast = space.f_bavail * space.f_frsize - model - images // 2 - 80_000
    (small_disk / "ballast").write_bytes(bytes(ballast))
    result = run(*args)
    assert result.code == 1
    assert len(result.err.splitlines()) == 1
    assert "No space left on device" in result.err
    assert str(url) in result.err
    seen = committed(url)
    assert 0 < seen < FRAMES
    assert run("check", "--archive", url, "--json").json["images"] == seen
    (small_disk / "ballast").unlink()
    result = run(*args, "--json")
    assert (result.code, result.json["ingested"]) == (0, FRAMES - seen)
    assert run("check", "--archive", url).code == 0
    assert tree(url) == tree(archive)


@pytest.mark.slow
def test_a_poisoned_image_is_named_and_all_others_are_archived(
    run: Run, frames: Path, undisturbed: Path, tmp_path: Path
) -> None:
    poison = sorted(frames.iterdir())[4]
    preload = tmp_path / "poison.py"  # what a library that crashes on this file does
    preload.write_text(
        "import os, archive_pipeline.flight.read as flight\n"
        "import archive_pipeline.jobs.ingest_image as ingest\n"
        "def crash(path, *args):\n"
        f"    if path.name == {poison.name!r}: os.abort()\n"
        "    return flight.read_source(path, *args)\n"
        "ingest.read_source = crash\n"
    )
    url = tmp_path / "a.zarr"
    args = ("ingest", frames, "--archive", url, "--ratio", 16, "--workers", 2, "--json")
    result = finish(start(*args, DASK_DISTRIBUTED__WORKER__PRELOAD=str(preload)))
    assert result.code == 3, result.err
    assert [f["path"] for f in result.json["failed"]] == [str(poison)]
    assert "its worker died" in result.json["failed"][0]["error"]
    assert result.json["ingested"] + result.json["skipped"] == 11
    assert run("check", "--archive", url).code == 0
    assert run(*args[:-2], 0).code == 0  # a process in which it does no harm
    assert tree(url) == tree(undisturbed)


@pytest.mark.slow
def test_a_killed_client_leaves_no_workers_and_is_continued(
    run: Run, frames: Path, undisturbed: Path, tmp_path: Path
) -> None:
    url = tmp_path / "a.zarr"
    args = ("ingest", frames, "--archive", url, "--ratio", 16)
    ingest = start(*args, "--workers", 2)
    wait_until(lambda: committed(url) >= 3, ingest)
    workers = workers_of(ingest)
    assert len(workers) == 2
    ingest.kill()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []
    ingest.communicate()
    seen = committed(url)
    assert 3 <= seen < 12
    result = run(*args, "--workers", 0, "--json")
    assert (result.code, result.json["ingested"]) == (0, 12 - seen)
    assert tree(url) == tree(undisturbed)


@pytest.mark.slow
def test_schedulers_work_and_when_one_is_lost_a_run_continues(
    run: Run, command: Run, frames: Path, undisturbed: Path, tmp_path: Path
) -> None:
    url = tmp_path / "a.zarr"
    args = ("ingest", frames, "--archive", url, "--ratio", 16)
    with dask_processes("", "") as (address, scheduler):
        ingest = start(*args, "--scheduler", address)
        wait_until(lambda: committed(url) >= 3, ingest)
        scheduler.kill()
        result = finish(ingest)
    assert result.code == 1
    assert len(result.err.splitlines()) == 1, result.err
    assert f"{address}: the Dask scheduler was lost" in result.err
    seen = committed(url)
    assert 3 <= seen < 12
    with dask_processes("", "") as (address, _):
        result = command(*args, "--scheduler", address, "--json")
        assert result.code == 0, result.err
        assert result.json["ingested"] + result.json["skipped"] == 12
        assert result.json["workers"] == 2
        assert tree(url) == tree(undisturbed)
        # relative paths are the client's
        out = ("--archive", "a.zarr", "-o", "out", "--json")
        restored = command("restore", *out, "--scheduler", address, cwd=tmp_path)
        assert restored.code == 0, restored.err
        here = run("restore", "--archive", undisturbed, "-o", tmp_path / "here", "--workers", 0)
        assert here.code == 0
    files = [Path(file["path"]) for file in restored.json["files"]]
    assert len(files) == 12
    assert {f.name: f.read_bytes() for f in files} == {
        f.name: f.read_bytes() for f in (tmp_path / "here").rglob("*.tif")
    }


@pytest.mark.slow
def test_restore_survives_its_workers(run: Run, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ("restore", "--archive", undisturbed, "-o", out, "--workers", 2, "--json")
    restore = start(*args)
    wait_until(lambda: len(list(out.glob("*/*.tif"))) >= 2, restore)
    workers_of(restore)[0].kill()
    result = finish(restore)
    assert result.code == 0, result.err
    assert len(result.json["files"]) == 12
    assert not [*out.rglob(".restore-*")]
    here = run("restore", "--archive", undisturbed, "-o", tmp_path / "here", "--workers", 0)
    assert here.code == 0
    assert {f.name: f.read_bytes() for f in out.rglob("*.tif")} == {
        f.name: f.read_bytes() for f in (tmp_path / "here").rglob("*.tif")
    }


@pytest.mark.slow
def test_several_commands_at_once(
    run: Run, command: Run, frames: Path, flight: Path, undisturbed: Path, tmp_path: Path
) -> None:
    url = tmp_path / "a.zarr"
    args = ("--archive", url, "--ratio", 16, "--workers", 0, "--json")
    # two of the same flight and one of another
    ingests = [start("ingest", folder, *args) for folder in (frames, frames, flight)]
    wait_until(lambda: committed(url) >= 1, ingests[0])
    while any(process.poll() is None for process in ingests):
        checked = command("check", "--archive", url, "--json")
        assert checked.code == 0, checked.json
        restored = command(
            "restore", "--archive", url, "-o", tmp_path / "out", "--workers", 0, "--overwrite",
            "--json",
        )  # fmt: skip
        assert restored.code == 0, restored.err
    results = [finish(process) for process in ingests]
    assert [result.code for result in results] == [0, 0, 0], [r.err for r in results]
    counts = [(r.json["ingested"], r.json["skipped"]) for r in results]
    assert counts[0][0] + counts[1][0] == 12  # no image twice
    assert all(sum(count) == total for count, total in zip(counts, (12, 12, FRAMES), strict=True))
    checked = run("check", "--archive", url, "--json")
    assert checked.json == {
        "passed": True,
        "images": 12 + FRAMES,
        "documents": 0,
        "models": 1,
        "problems": [],
        "notes": [],
        "leftover_bytes": 0,
    }
    both = tree(url)
    alone = tree(undisturbed)
    assert alone.items() <= both.items()


@pytest.mark.slow
def test_check_does_not_blame_images_that_are_written_anew(
    command: Run, frames: Path, undisturbed: Path, tmp_path: Path
) -> None:
    url = tmp_path / "a.zarr"
    args = ("ingest", frames, "--archive", url, "--ratio", 16, "--workers", 0, "--json")
    assert command(*args).code == 0
    again = start(*args, "--overwrite")
    notes = set()
    while again.poll() is None:
        checked = command("check", "--archive", url, "--json")
        assert checked.code == 0, checked.json
        notes.update(checked.json["notes"])
    assert finish(again).json["ingested"] == 12
    assert len(notes) == 1
    assert "an ingest is running" in notes.pop()
    assert command(*args, "--overwrite").code == 0  # the generation of the first ingest again
    assert tree(url) == tree(undisturbed)


def test_repair_writes_the_index(run: Run, own_archive: Path) -> None:
    args = ("check", "--archive", own_archive, "--json")
    gone = own_archive / "flights" / "beach" / "DJI_0002.JPG" / "zarr.json"
    record = gone.read_bytes()
    gone.unlink()
    broken = run(*args)
    assert broken.code == 1
    assert "its record is missing" in broken.json["problems"][0]
    assert "no such image is committed" in broken.json["problems"][1]
    before = read_index(Archive.open(own_archive)) or {}
    mended = run(*args, "--repair")  # what may still be an image is not given up
    assert (mended.code, mended.json["problems"]) == (1, broken.json["problems"][:1])
    assert mended.json["notes"][-1] == f"items.parquet was written anew: {FRAMES - 1} images"
    assert len(read_index(Archive.open(own_archive)) or {}) == FRAMES - 1
    again = run(*args, "--repair")  # nothing to do, and nothing says that it was an image
    assert (again.code, again.json["notes"]) == (0, broken.json["problems"][:1])
    gone.write_bytes(record)
    (own_archive / "items.parquet").unlink()
    assert "is missing" in run(*args).json["problems"][0]
    assert run(*args, "--repair").code == 0
    assert read_index(Archive.open(own_archive)) == before
    # it mends nothing else
    (gone.parent / "pixels" / "c" / "0" / "0" / "0").unlink()
    assert run(*args, "--repair").code == 1


@pytest.mark.slow
def test_long_chaos(run: Run, tmp_path: Path) -> None:
    """Hundreds of frames (`ARCHIVE_TEST_FRAMES`), a worker killed every few seconds."""
    count = int(os.environ.get(MANY, 200))
    folder = tmp_path / "coast"
    *frames, ortho = make_flight(folder, min(count, DIFFERENT), 360, 304, 7)
    ortho.unlink()
    for number in range(len(frames), count):
        frame = frames[number % len(frames)]
        shutil.copy(frame, folder / f"{number:05}_{frame.name}")
    args = ("ingest", folder, "--ratio", 16, "--workers", 2, "--json", "--archive")
    assert run(*args, tmp_path / "calm.zarr").code == 0
    rng, killed = random.Random(2), 0
    ingest = start(*args, tmp_path / "a.zarr")
    wait_until(lambda: committed(tmp_path / "a.zarr") > 0, ingest)
    while ingest.poll() is None and killed < min(count // 10, MOST_KILLED):
        try:
            ingest.wait(timeout=rng.uniform(3, 9))
        except subprocess.TimeoutExpired:
            workers = workers_of(ingest)
            if workers:
                rng.choice(workers).send_signal(signal.SIGKILL)
                killed += 1
    result = finish(ingest)
    assert result.code == 0, result.err
    assert (result.json["ingested"] + result.json["skipped"], result.json["failed"]) == (count, [])
    assert result.json["workers_lost"] >= 3
    assert tree(tmp_path / "a.zarr") == tree(tmp_path / "calm.zarr")
    assert run("check", "--archive", tmp_path / "a.zarr").code == 0
