"""Ingest: no-ops, bad files, kills, changed sources, neighbours, worker processes."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import struct
import subprocess
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import BRIGHTON, FRAMES, Run, command_line
from PIL import Image

from archive_pipeline.flight.formats import FORMAT_NAMES
from archive_pipeline.jobs import cluster
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.index import read_index


def ids(url: Path | str) -> list[str]:
    return [entry.id for entry in Archive.open(url).images()]


def test_again_is_a_no_op(command: Run, flight: Path, own_archive: Path) -> None:
    def times() -> dict[Path, int]:
        # but the index's, which knows files by times that those of a copy are not
        files = (p for p in own_archive.rglob("*") if p.name != "items.parquet")
        return {p: p.stat().st_mtime_ns for p in files if p != own_archive}

    before = times()
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    result = command("ingest", flight, "--archive", own_archive, "--json")
    # processor time, which a busy machine does not stretch
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used < 8
    assert result.code == 0, result.err
    assert (result.json["ingested"], result.json["skipped"]) == (0, FRAMES)
    assert times() == before


def test_bad_files_are_named_and_the_rest_is_archived(run: Run, own_flight: Path) -> None:
    good = sorted(own_flight.glob("*.JPG"))
    data = good[0].read_bytes()
    (own_flight / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (own_flight / "text.jpg").write_text("not an image\n" * 10)
    (own_flight / "zero.jpg").write_bytes(b"")
    (own_flight / "dangling.jpg").symlink_to(own_flight / "gone")
    (own_flight / "folder.jpg").mkdir()
    with Image.open(good[0]) as image:
        image.save(own_flight / "no_gps.jpg", quality=95)
    url = own_flight.parent / "a.zarr"
    args = ("ingest", own_flight, "--archive", url, "--ratio", 6, "--workers", 0, "--json")
    result = run(*args)
    assert result.code == 3
    failed = {Path(f["path"]).name: f["error"] for f in result.json["failed"]}
    assert failed == {
        "truncated.jpg": "truncated: the JPEG ends inside its image data",
        "text.jpg": f"not an image in a format that is read ({FORMAT_NAMES})",
        "zero.jpg": "the file is empty",
        "dangling.jpg": "no such file",
    }
    for name in failed:
        assert result.err.count(name) == 1
    assert ids(url) == sorted([*(p.name for p in good), "no_gps.jpg"])
    assert [w["path"] for w in result.json["warnings"]] == [str(own_flight / "no_gps.jpg")]
    assert run("check", "--archive", url).code == 0
    again = run(*args)
    assert again.code == 3
    assert (again.json["ingested"], len(again.json["failed"])) == (0, 4)


def test_names_that_are_no_text_and_that_would_break_lines(run: Run, tmp_path: Path) -> None:
    folder, url = tmp_path / "beach", tmp_path / "a.zarr"
    folder.mkdir()
    picture = io.BytesIO()
    Image.new("L", (40, 30)).save(picture, "png")
    (folder / "a\n\x1b[31mb.png").write_bytes(picture.getvalue())
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(picture.getvalue() + b"1")
    args = ("ingest", folder, "--archive", url, "--workers", 0, "--flight", "zarr.json")
    result = run(*args)
    assert result.code == 3
    assert "caf\\udce9.png: its path is not UTF-8; rename it\n" in result.err
    told = run("info", "--archive", url).out
    assert "  a\\n\\x1b[31mb.png " in told
    assert run("check", "--archive", url).code == 0
    listed = run("info", "--archive", url, "--json").json["flights"]
    assert [(f["id"], [i["id"] for i in f["images"]]) for f in listed] == [
        ("zarr.json", ["a\n\x1b[31mb.png"])
    ]


def test_no_archive_is_made_among_other_files(run: Run, own_flight: Path) -> None:
    before = sorted(own_flight.iterdir())
    result = run("ingest", own_flight, "--archive", own_flight, "--workers", 0)
    assert result.code == 1
    assert "holds other files (DJI_0001.JPG); an archive needs a folder of its own" in result.err
    assert sorted(own_flight.iterdir()) == before
    inside = own_flight / "kept.zarr"  # which no ingest takes for images
    assert run("ingest", own_flight, "--archive", inside, "--workers", 0, "--ratio", 16).code == 0
    again = run("ingest", own_flight, "--archive", inside, "--workers", 0, "--json")
    assert (again.code, again.json["skipped"]) == (0, FRAMES)


def test_flights_sub_folders_and_odd_names(run: Run, flight: Path, tmp_path: Path) -> None:
    frames = sorted(flight.iterdir())
    first, second = tmp_path / "1" / "Ünï 100% 写", tmp_path / "2" / "second"
    for number, target in enumerate(
        (
            first / "DJI.JPG",
            second / "DJI.JPG",
            second / "sub dir" / "twice.JPG",
            second / "other%2F" / "twice.JPG",
        )
    ):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(frames[0].read_bytes() + bytes([number]))
    url = tmp_path / "my archive %41.zarr"
    result = run("ingest", first, second, "--archive", url, "--ratio", 16, "--workers", 0)
    assert result.code == 0, result.err
    listed = run("info", "--archive", url, "--json").json
    assert {f["id"]: sorted(i["id"] for i in f["images"]) for f in listed["flights"]} == {
        "second": ["DJI.JPG", "other%2F/twice.JPG", "sub dir/twice.JPG"],
        "Ünï 100% 写": ["DJI.JPG"],
    }
    assert run("check", "--archive", url).code == 0
    out = tmp_path / "out"
    result = run("restore", "--archive", url, "-o", out, "--workers", 0, "--json")
    assert result.code == 0, result.err
    paths = {Path(f["path"]) for f in result.json["files"]}
    assert len(paths) == 4
    assert all(p.is_file() and out in p.parents for p in paths)
    one = run(
        "restore", "--archive", url, "--flight", "Ünï 100% 写", "-o", tmp_path / "one", "--json"
    )
    assert [f["image"] for f in one.json["files"]] == ["DJI.JPG"]


def test_changed_sources_need_overwrite(run: Run, own_flight: Path, tmp_path: Path) -> None:
    own_archive = tmp_path / "own.zarr"
    assert run("ingest", own_flight, "--archive", own_archive, "--workers", 0).code == 0
    frame = sorted(own_flight.iterdir())[0]
    with Image.open(frame) as image:
        exif = image.info["exif"]
        Image.fromarray(255 - np.asarray(image)).save(frame, exif=exif, quality=90)
    args = ("ingest", own_flight, "--archive", own_archive, "--ratio", 16, "--workers", 0)
    result = run(*args, "--json")
    assert result.code == 3
    assert result.json["skipped"] == FRAMES - 1
    assert "--overwrite" in result.json["failed"][0]["error"]
    result = run(*args, "--overwrite", "--json")
    assert (result.code, result.json["ingested"]) == (0, FRAMES)
    assert run("check", "--archive", own_archive).code == 0
    assert run(*args, "--json").json["skipped"] == FRAMES


def test_a_damaged_record_and_a_stale_index_are_mended(
    run: Run, flight: Path, own_archive: Path
) -> None:
    name = sorted(flight.iterdir())[0].name
    (own_archive / "flights" / "beach" / name / "zarr.json").write_text("{")
    (own_archive / "items.parquet").write_bytes(b"PAR1")
    args = ("ingest", flight, "--archive", own_archive, "--ratio", 16, "--workers", 0, "--json")
    assert run(*args).json["ingested"] == 1
    assert run("check", "--archive", own_archive).code == 0
    (own_archive / "items.parquet").unlink()
    assert run(*args).json["ingested"] == 0
    assert len(read_index(Archive.open(own_archive)) or {}) == FRAMES


def test_killed_and_run_again(run: Run, flight: Path, tmp_path: Path) -> None:
    url = tmp_path / "a.zarr"
    args = ("ingest", flight, "--archive", url, "--ratio", 16, "--workers", 0)
    process = subprocess.Popen(command_line(*args), stderr=subprocess.DEVNULL)
    pixels = url / "flights" / "beach"
    deadline = time.monotonic() + 120
    # in the middle of the second image: its metadata are there, its record is not
    while time.monotonic() < deadline and process.poll() is None:
        if len(list(pixels.glob("*/metadata/zarr.json"))) >= 2:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    seen = ids(url)
    assert len(seen) < FRAMES
    assert run("info", "--archive", url).code == 0
    result = run(*args, "--json")
    assert result.code == 0, result.err
    assert (result.json["ingested"], result.json["skipped"]) == (FRAMES - len(seen), len(seen))
    checked = run("check", "--archive", url, "--json")
    assert (checked.code, checked.json["images"]) == (0, FRAMES)


def test_a_worker_process_does_the_same_quietly(
    command: Run, flight: Path, archive: Path, tmp_path: Path
) -> None:
    url = tmp_path / "a.zarr"
    result = command(
        "ingest", flight, "--archive", url, "--ratio", 16, "--workers", 1, "--json", "-q"
    )
    assert result.code == 0
    assert result.err == ""
    assert result.json["ingested"] == FRAMES
    for entry in Archive.open(archive).images():
        assert Archive.open(url).entry(entry.key) is not None


def test_interrupt_ends_at_once_in_one_line(flight: Path, tmp_path: Path) -> None:
    url = tmp_path / "a.zarr"
    args = ("ingest", flight, "--archive", url, "--ratio", 16, "--workers", 2)
    process = subprocess.Popen(
        command_line(*args),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell's background jobs ignore it, and so would what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if list((url / "flights").glob("beach/*/metadata")):
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 15
    assert process.returncode == 1
    assert err.strip() == "Aborted!"


def test_local_workers_and_their_threads() -> None:
    assert cluster.local_workers(1) == 0
    assert cluster.local_workers(10_000) == cluster.cpu_count()
    before = dict(os.environ)
    with cluster.connect(None, 1, 3) as pool:
        results = [r for _, r in pool.run(_threads, [0])]
    assert results == [(cluster.cpu_count(), str(cluster.cpu_count()), None)]
    names = cluster.THREAD_VARIABLES
    assert {n: os.environ.get(n) for n in names} == {n: before.get(n) for n in names}


def _threads(_: int) -> tuple[int, str | None, str | None]:
    import torch

    environ = os.environ
    return (
        torch.get_num_threads(),
        environ.get("OMP_NUM_THREADS"),
        environ.get("MALLOC_TRIM_THRESHOLD_"),
    )


def test_tasks_that_fail_do_not_stop_others() -> None:
    results = dict(cluster.Pool(None).run(_one_over, [1, 0, 2]))
    assert (results[1], results[2]) == (1, 0.5)
    assert isinstance(results[0], ZeroDivisionError)


def _one_over(number: int) -> float:
    return 1 / number


def test_memory_archives_stay_in_this_process(run: Run, flight: Path, tmp_path: Path) -> None:
    args = ("ingest", flight, "--archive", "memory://test_ingest.zarr", "--ratio", 16)
    result = run(*args, "--workers", 4, "--json")
    assert (result.code, result.json["ingested"]) == (0, FRAMES)
    assert run("check", "--archive", "memory://test_ingest.zarr").code == 0
    result = run(*args, "--scheduler", "tcp://127.0.0.1:1")
    assert result.code == 1
    assert "--scheduler" in result.err
    restored = run("restore", "--archive", "memory://test_ingest.zarr", "-o", tmp_path, "--json")
    assert len(restored.json["files"]) == FRAMES


def test_flight_that_cannot_be_stored_or_read(run: Run, tmp_path: Path) -> None:
    url = tmp_path / "a.zarr"
    for folder, message in ((tmp_path / "none", "no such directory"), (tmp_path, "no images")):
        result = run("ingest", folder, "--archive", url)
        assert result.code == 1
        assert message in result.err
        assert len(result.err.splitlines()) == 1
    assert not url.exists()


def test_archive_where_none_can_be(run: Run, flight: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run("ingest", flight, "--archive", tmp_path / "file" / "a.zarr", "--workers", 0)
    assert result.code == 1
    assert len(result.err.splitlines()) == 1
    assert "file/a.zarr" in result.err


def test_neighbours_that_contradict_the_tags(
    run: Run, flight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def fake(frames: list, width: int, height: int) -> list[tuple[str, str]]:
        seen.append([(key, None if grey is None else grey.shape) for key, _, grey in frames])
        return [(frames[-1][0], "yaw tag is off by 179° against its neighbours")]

    monkeypatch.setattr("archive_pipeline.geo.neighbours.neighbour_warnings", fake)
    monkeypatch.setattr("archive_pipeline.jobs._neighbouring.NEIGHBOURS", 2)
    args = ("--archive", tmp_path / "a.zarr", "--ratio", 16, "--workers", 0)
    result = run("ingest", flight, *args, "--json")
    assert result.code == 0
    names = sorted(p.name for p in flight.iterdir())
    assert [[key.split("/")[-1] for key, _ in chunk] for chunk in seen] == [names[:2], names[1:]]
    assert {shape for chunk in seen for _, shape in chunk} == {(270, 640)}
    warned = result.json["warnings"]
    assert [Path(w["path"]).name for w in warned] == names[1:]
    assert sum(line.startswith("Warning: ") for line in result.err.splitlines()) == 2
    seen.clear()
    assert run("ingest", flight, *args).code == 0
    assert seen == []

    def broken(*args: object) -> None:
        raise RuntimeError("matching failed")

    monkeypatch.setattr("archive_pipeline.geo.neighbours.neighbour_warnings", broken)
    assert run("ingest", flight, *args, "--overwrite").code == 0


@pytest.mark.slow
@pytest.mark.skipif(
    not BRIGHTON.is_dir(), reason=f"the brighton_beach frames are not at {BRIGHTON}"
)
def test_neighbours_of_a_real_flight(run: Run, tmp_path: Path) -> None:
    result = run("ingest", BRIGHTON, "--archive", tmp_path / "a.zarr", "--json")
    yaw = [Path(w["path"]).name for w in result.json["warnings"] if "yaw" in w["warning"]]
    assert yaw == ["DJI_0024.JPG", "DJI_0025.JPG"]
    assert result.err.count("bytes of further pictures") == 1


def test_report_is_json(run: Run, flight: Path, own_archive: Path) -> None:
    result = run("ingest", flight, "--archive", own_archive, "--json")
    assert set(json.loads(result.out)) >= {
        "ingested",
        "skipped",
        "failed",
        "source_bytes",
        "raw_bytes",
        "archive_bytes",
        "seconds",
        "megapixels_per_second",
        "warnings",
    }


def _png(width: int, height: int, interlaced: bool) -> bytes:
    """A PNG of valid chunks whose header claims more than its few rows of data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _claim(jpeg: bytes, side: int) -> bytes:
    """The same JPEG with another size in its frame header."""
    at = next(i for i in range(len(jpeg)) if jpeg[i : i + 2] in (b"\xff\xc0", b"\xff\xc2"))
    return jpeg[: at + 5] + struct.pack(">HH", side, side) + jpeg[at + 9 :]


def test_files_that_claim_to_be_huge(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "bombs"
    folder.mkdir()
    (folder / "plain.png").write_bytes(_png(100_000, 100_000, False))
    (folder / "interlaced.png").write_bytes(_png(100_000, 100_000, True))
    for name, progressive in (("baseline.jpg", False), ("progressive.jpg", True)):
        coded = io.BytesIO()
        Image.new("RGB", (64, 64), (90, 80, 70)).save(coded, "JPEG", progressive=progressive)
        (folder / name).write_bytes(_claim(coded.getvalue(), 65_500))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    url = tmp_path / "a.zarr"
    result = run("ingest", folder, "--archive", url, "--workers", 0, "--json")
    assert result.code == 3
    failed = {Path(f["path"]).name: f["error"] for f in result.json["failed"]}
    assert failed.keys() == {path.name for path in folder.iterdir()}
    assert all("\n" not in error for error in failed.values())
    assert result.json["ingested"] == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kilobytes
    assert ids(url) == []


def test_a_flight_without_photographs_needs_no_model(run: Run, tmp_path: Path) -> None:
    """It is neither loaded nor stored, until a photograph comes."""
    folder, url = tmp_path / "f", tmp_path / "a.zarr"
    folder.mkdir()
    form = {"driver": "GTiff", "width": 30, "height": 20, "count": 5, "dtype": "uint16"}
    with rasterio.open(folder / "a.tif", "w", **form) as out:
        out.write(np.random.default_rng(0).integers(0, 999, (5, 20, 30), np.uint16))
    args = ("ingest", folder, "--archive", url, "--workers", 0, "--ratio", 8)
    first = run(*args)
    assert first.code == 0, first.err
    assert "models" not in first.out
    assert not (url / "models").exists()
    assert run("check", "--archive", url).code == 0
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "b.png")
    second = run(*args)
    assert second.code == 0, second.err
    assert len(list((url / "models").iterdir())) >= 1
    assert run("check", "--archive", url).code == 0
