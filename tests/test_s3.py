"""Archives and flights on an S3 server: the same bytes, few requests, and every kind of failure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import rasterio
from conftest import BUCKET, FRAMES, HEIGHT, WIDTH, Result, Run, command_line
from s3_server import Request, S3Server

from archive_pipeline.flight.formats import FORMAT_NAMES
from archive_pipeline.store import leases
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.documents import write_document
from archive_pipeline.store.layout import ArchiveError

MANY = 20


@pytest.fixture
def s3(server: S3Server, request: pytest.FixtureRequest) -> str:
    """A URL of its own for each test."""
    return f"s3://{BUCKET}/{request.node.name}"


def objects(url: str) -> dict[str, bytes]:
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    root = url.removeprefix("s3://")
    return {name.removeprefix(f"{root}/"): fs.cat_file(name) for name in fs.find(root)}


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def upload(files: list[Path], url: str) -> None:
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    for file in files:
        fs.put_file(str(file), f"{url}/{file.name}")


def ingest(run: Run, flight: Path | str, url: str, *more: object) -> Result:
    result = run("ingest", flight, "--archive", url, "--ratio", 16, "--workers", 0, "--json", *more)
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def uploaded(server: S3Server, archive: Path) -> str:
    """The archive of three frames, copied to the server; not to be changed."""
    url = f"s3://{BUCKET}/uploaded.zarr"
    fsspec.filesystem("s3").put(f"{archive}/", f"{url}/", recursive=True)
    return url


def test_the_same_bytes_as_on_disk(
    run: Run,
    server: S3Server,
    flight: Path,
    archive: Path,
    s3: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leases, "RENEWED_EVERY", 600.0)  # however busy the machine is
    with server.recorded() as requests:
        ingest(run, flight, s3)
    here, there = files(archive), objects(s3)
    index, other = (found.pop("items.parquet") for found in (here, there))
    assert here == there
    assert index != other  # there it has versions, too
    puts = [r.path for r in requests if r.method == "PUT"]
    # one of each object, no copies; the index and, until the end, the lease are not in `here`
    assert len(puts) == len(set(puts)) == len(here) + 2
    assert {r.method for r in requests} <= {"GET", "HEAD", "PUT", "POST"}
    (removal,) = (r for r in requests if r.method == "POST")  # the lease
    assert "delete" in removal.query
    ours = [r for r in requests if "DJI_0002.JPG" in str((r.path, r.query))]
    # it may be there under either of two ids; listing what is there takes s3fs three, sizes three,
    # the arrays four and the record one; one looks for a shard to be changed, two read the record
    # for neighbours and for the index
    assert len(ours) <= 16


def test_images_are_removed(run: Run, s3: str, archive: Path) -> None:
    record = Archive.open(archive).entry("flights/beach/DJI_0002.JPG").record  # type: ignore[union-attr]
    fsspec.filesystem("s3").put(f"{archive}/", f"{s3}/", recursive=True)
    done = run("remove", "beach", "DJI_0002.JPG", "--archive", s3, "--yes", "--json")
    assert done.code == 0, done.err
    left = objects(s3)
    parts = b"DJI_0002.JPG", record["sha256"].encode()
    assert not [k for k, data in left.items() if any(p in data or p in k.encode() for p in parts)]
    assert run("check", "--archive", s3, "--json").json["images"] == FRAMES - 1
    assert run("remove", "beach", "--archive", s3, "--yes").code == 0
    assert {key for key in objects(s3) if "/" in key} <= {"flights/zarr.json"}


def test_info_restore_mosaic_check(
    run: Run, server: S3Server, uploaded: str, archive: Path, tmp_path: Path
) -> None:
    local, remote = (run("info", "--archive", url, "--json").json for url in (archive, uploaded))
    assert remote == local
    for more in ((), ("--mosaic",)):
        found = []
        for url in (archive, uploaded):
            args = ("restore", "--archive", url, "-o", tmp_path / "out", "--workers", 0, *more)
            result = run(*args, "--json")
            assert result.code == 0, result.err
            found.append(files(tmp_path / "out"))
            shutil.rmtree(tmp_path / "out")
        assert found[0].keys() == found[1].keys()
        assert found[0] == found[1]
    result = run("check", "--archive", uploaded, "--json")
    assert (result.code, result.json["images"]) == (0, FRAMES)


def test_an_old_or_wrong_index_costs_requests_only(
    run: Run, server: S3Server, flight: Path, archive: Path, s3: str
) -> None:
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    fs.put(f"{archive}/", f"{s3}/", recursive=True)
    expected = run("info", "--archive", archive, "--json").json
    assert run("info", "--archive", s3, "--json").json == expected
    # ingesting again mends the index, which then has the versions
    assert ingest(run, flight, s3).json["skipped"] == FRAMES
    with server.recorded() as requests:
        assert run("info", "--archive", s3, "--json").json == expected
    assert len(requests) == 10
    # a record that changed since is read, not taken from the index
    key = f"{s3}/flights/beach/DJI_0002.JPG/zarr.json"
    changed = json.loads(fs.cat_file(key))
    changed["attributes"]["archive_pipeline"]["captured"] = "2001-01-01T00:00:00"
    fs.pipe_file(key, json.dumps(changed).encode())
    with server.recorded() as requests:
        (listed,) = run("info", "--archive", s3, "--json").json["flights"]
    assert [i["captured"][:4] == "2001" for i in listed["images"]] == [False, True, False]
    assert len(requests) == 11
    assert "describes another image" in run("check", "--archive", s3).err
    fs.rm_file(key)
    assert run("info", "--archive", s3, "--json").json["totals"]["images"] == FRAMES - 1
    fs.pipe_file(f"{s3}/items.parquet", b"PAR1")
    assert run("info", "--archive", s3, "--json").json["totals"]["images"] == FRAMES - 1


@pytest.fixture(scope="module")
def twenty(server: S3Server, archive: Path) -> str:
    """An archive of twenty images: copies of one under other names, half a degree apart."""
    from archive_pipeline.store.index import write_index

    url = f"s3://{BUCKET}/twenty.zarr"
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    first = archive / "flights" / "beach" / "DJI_0001.JPG"
    for path in ("zarr.json", "flights/zarr.json", "flights/beach/zarr.json"):
        fs.put_file(str(archive / path), f"{url}/{path}")
    for folder in archive.glob("models/*"):
        fs.put(f"{folder}/", f"{url}/models/{folder.name}/", recursive=True)
    for number in range(MANY):
        name = f"copy_{number}.JPG"
        fs.put(f"{first}/", f"{url}/flights/beach/{name}/", recursive=True)
        group = json.loads((first / "zarr.json").read_text())
        record = group["attributes"]["archive_pipeline"]
        record["id"] = name
        georef = record["georef"]
        georef["footprint"] = [[x, y + number / 2] for x, y in georef["footprint"]]
        georef["transform"][5] += number / 2 * 110_900  # metres in a degree of latitude, about
        key = f"{url}/flights/beach/{name}/zarr.json"
        fs.pipe_file(key, json.dumps(group, separators=(",", ":")).encode())
    write_index(Archive.open(url, writable=True))
    return url


def test_requests_of_info_and_of_a_window(
    run: Run, server: S3Server, twenty: str, tmp_path: Path
) -> None:
    with server.recorded() as requests:
        result = run("info", "--archive", twenty, "--json")
    assert result.json["totals"]["images"] == MANY
    # the record, a listing of images, the index, two listings each for documents, deleted
    # originals and verdicts (there are none), and one of models
    kinds = [(r.method, r.is_list) for r in requests]
    assert kinds == [("GET", False), ("GET", True), ("GET", False), *[("GET", True)] * 7]
    ring = np.array(result.json["flights"][0]["images"][0]["footprint"])
    middle, reach = ring.mean(0), np.ptp(ring, 0) / 10
    (west, south), (east, north) = middle - reach, middle + reach
    with server.recorded() as requests:
        result = run(
            "restore", "--archive", twenty, "--bbox", west, south, east, north, "-o", tmp_path,
            "--json",
        )  # fmt: skip
    assert result.code == 0, result.err
    assert len(result.json["files"]) == 1
    # record, listing, index; metadata and pixels with their arrays' own; the shard's index and a
    # tile: of the images that the box misses nothing is asked
    assert len(requests) == 3 + 2 + 3
    assert {r.method for r in requests} == {"GET"}
    assert not any("models" in r.path for r in requests)  # the shipped one is the same


def test_a_window_reads_its_tiles_and_the_shards_index(
    run: Run, server: S3Server, uploaded: str, archive: Path
) -> None:
    entry = next(Archive.open(archive).images())
    shard = (archive / entry.key / "pixels/c/0/0/0").stat().st_size
    image = ArchivedImage(Archive.open(uploaded), entry)
    image.array("pixels")
    with server.recorded() as requests:
        image.read((20, 30, 100, 100))
    assert requests[0].range == "bytes=-36"  # two tiles' places and a checksum
    assert len(requests) == 2
    assert sum(r.sent for r in requests) < 0.9 * shard


@pytest.mark.slow
def test_a_1000_x_1000_window_of_a_full_frame(
    run: Run, server: S3Server, s3: str, tmp_path: Path
) -> None:
    from conftest import make_flight

    frame, *_ = make_flight(tmp_path / "full", 1, 5472, 3648, 3)
    for path in (tmp_path / "full").iterdir():
        if path != frame:
            path.unlink()
    result = ingest(run, tmp_path / "full", s3, "--overwrite")
    assert result.json["ingested"] == 1
    (entry,) = Archive.open(s3).images()
    image = ArchivedImage(Archive.open(s3), entry)
    image.array("pixels")
    (shard,) = [v for k, v in objects(s3).items() if "/pixels/c/" in k]
    with server.recorded() as requests:
        image.read((1000, 1000, 1000, 1000))
    tiles = 2 * 3  # columns 1000 to 1999 lie in tiles 1 to 3, so do rows
    touched = len({c // 608 for c in range(1000, 2000)}) * len(
        {r // 608 for r in range(1000, 2000)}
    )
    assert tiles <= touched <= 9
    index = 16 * 54 + 4
    assert len(requests) == 1 + touched
    assert requests[0].sent == index
    places = np.frombuffer(shard[-index:-4], "<u8").reshape(6, 9, 2)
    assert sum(r.sent for r in requests[1:]) == places[1:4, 1:4, 1].sum()


def test_flight_on_s3_and_back_by_its_url(
    run: Run, server: S3Server, flight: Path, archive: Path, s3: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    upload([*sorted(flight.iterdir())], f"{s3}/beach")
    upload([archive / "zarr.json"], f"{s3}/beach/.hidden")
    url = tmp_path / "a.zarr"
    result = ingest(run, f"{s3}/beach", str(url))
    assert result.json["ingested"] == FRAMES
    opened = Archive.open(url)
    for mine, local in zip(opened.images(), Archive.open(archive).images(), strict=True):
        source, other = (
            ArchivedImage(opened, mine).source,
            ArchivedImage(Archive.open(archive), local).source,
        )
        assert source.path == f"{s3}/beach/{mine.id}"
        assert source.sha256 == other.sha256
        assert source.metadata == other.metadata
        assert (source.georef, source.camera) == (other.georef, other.camera)
    with server.recorded() as requests:
        again = ingest(run, f"{s3}/beach", str(url))
    assert again.json["skipped"] == FRAMES
    assert sum(r.sent for r in requests) < 20_000  # told by their ETags, not read
    # the same file under another version is read, and found to be the same
    upload([sorted(flight.iterdir())[0]], f"{s3}/beach")
    assert ingest(run, f"{s3}/beach", str(url)).json["skipped"] == FRAMES

    from archive_pipeline.jobs.originals import Originals, find_original, original_pixels

    def copies() -> list[Path]:
        return list(Path(tempfile.gettempdir()).glob("archive-source-*/*"))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    entry = next(opened.images())
    original, _, other_file = find_original(
        ArchivedImage(opened, entry), Originals(str(url), None).candidates(entry)
    )
    assert original is not None
    assert not other_file
    with original_pixels(original) as read:
        assert read is not None
        pixels = read((0, 0, WIDTH, HEIGHT))
        part = read((5, 6, 7, 8))
        assert len(copies()) == 1
    assert not copies()
    with rasterio.open(flight / entry.id) as image:
        assert np.array_equal(np.moveaxis(pixels, 2, 0), image.read())
    assert np.array_equal(part, pixels[6:14, 5:12])


def test_bad_originals_on_s3_are_named(
    run: Run, server: S3Server, flight: Path, s3: str, tmp_path: Path
) -> None:
    (tmp_path / "text.jpg").write_text("not an image\n" * 10)
    (tmp_path / "zero.jpg").write_bytes(b"")
    upload([sorted(flight.iterdir())[0], *tmp_path.iterdir()], f"{s3}/beach")
    result = run("ingest", f"{s3}/beach", "--archive", tmp_path / "a", "--workers", 0, "--json")
    assert result.code == 3
    assert {f["path"]: f["error"] for f in result.json["failed"]} == {
        f"{s3}/beach/text.jpg": f"not an image in a format that is read ({FORMAT_NAMES})",
        f"{s3}/beach/zero.jpg": "the file is empty",
    }
    for url in (f"{s3}/nothing", f"s3://no-such-bucket-{os.getpid()}/x"):
        result = run("ingest", url, "--archive", tmp_path / "b")
        assert result.code == 1
        assert len(result.err.splitlines()) == 1
        assert url in result.err


def test_missing_bucket_and_denied_access(
    run: Run, server: S3Server, flight: Path, uploaded: str, tmp_path: Path
) -> None:
    url = "s3://no-such-bucket/a.zarr"
    for args in (("info",), ("ingest", flight, "--workers", 0)):
        result = run(*args, "--archive", url)
        assert result.code == 1
        assert len(result.err.splitlines()) == 1
        assert url in result.err
    server.refuse = lambda method, path: 403
    try:
        for args in (("info",), ("check",), ("restore", "-o", tmp_path), ("ingest", flight)):
            result = run(*args, "--archive", uploaded)
            assert result.code == 1
            assert len(result.err.splitlines()) == 1
            assert uploaded in result.err
            assert "AccessDenied" in result.err or "Forbidden" in result.err
    finally:
        server.refuse = lambda method, path: None


def test_writes_that_are_denied_fail_one_by_one(
    run: Run, server: S3Server, flight: Path, s3: str
) -> None:
    """Of one image's pixels, as a full bucket or a policy would: the others are archived."""

    def refuse(method: str, path: str) -> int | None:
        return 403 if method == "PUT" and "DJI_0002.JPG/pixels/c" in path else None

    server.refuse = refuse
    try:
        result = run("ingest", flight, "--archive", s3, "--ratio", 16, "--workers", 0, "--json")
    finally:
        server.refuse = lambda method, path: None
    assert (result.code, result.json["ingested"]) == (3, FRAMES - 1)
    (failed,) = result.json["failed"]
    assert failed["path"].endswith("DJI_0002.JPG")
    assert "AccessDenied" in failed["error"]
    assert run("check", "--archive", s3).code == 0
    again = ingest(run, flight, s3)
    assert (again.json["ingested"], again.json["skipped"]) == (1, FRAMES - 1)
    assert run("check", "--archive", s3).code == 0


@pytest.mark.slow  # s3fs and botocore try again and again, with pauses
def test_server_that_goes_in_the_middle(
    run: Run, command: Run, server: S3Server, flight: Path, archive: Path, s3: str
) -> None:
    seen: list[Request] = server.requests

    def stop_after_first(method: str, path: str) -> int | None:
        committed = any(
            r.method == "PUT" and r.path.endswith("JPG/zarr.json") and s3[5:] in r.path
            for r in seen
        )
        return 503 if committed else None

    server.refuse = stop_after_first
    try:
        result = run("ingest", flight, "--archive", s3, "--ratio", 16, "--workers", 0)
    finally:
        server.refuse = lambda method, path: None
    # the index could not be written either
    assert result.code == 1
    assert all(line.startswith(("Failed: ", "Error: ")) for line in result.err.splitlines())
    server.stop()
    try:
        gone = command("info", "--archive", s3)
        assert gone.code == 1
        assert len(gone.err.splitlines()) == 1
        assert s3 in gone.err
    finally:
        server.start()
    again = ingest(run, flight, s3)
    assert (again.json["ingested"], again.json["skipped"]) == (FRAMES - 1, 1)
    here, there = files(archive), objects(s3)
    assert {k: v for k, v in here.items() if k != "items.parquet"} == {
        k: v for k, v in there.items() if k != "items.parquet"
    }


def test_two_ingests_of_one_flight_take_turns(
    server: S3Server, flight: Path, archive: Path, s3: str
) -> None:
    args = ("ingest", flight, "--archive", s3, "--ratio", 16, "--workers", 0, "--json")
    both = [
        subprocess.Popen(
            command_line(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    ends = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    counts = [
        (found["ingested"], found["skipped"]) for found in (json.loads(out) for out, _ in ends)
    ]
    assert sorted(counts) == [(0, FRAMES), (FRAMES, 0)]
    here, there = files(archive), objects(s3)
    assert here.keys() == there.keys()  # no lease is left
    assert all(here[key] == there[key] for key in here if key != "items.parquet")


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that end in seconds."""
    monkeypatch.setattr(leases, "RENEWED_EVERY", 0.2)
    monkeypatch.setattr(leases, "GIVEN_UP_AFTER", 1.0)
    monkeypatch.setattr(leases, "LOOK_EVERY", 0.1)
    monkeypatch.setattr(leases, "SETTLED_AFTER", 0.5)


@pytest.mark.parametrize(
    "content", [b'{"host": "gone", "process": 7}', b"\xff\n["], ids=["killed", "strange"]
)
def test_the_lease_of_a_dead_ingest_is_taken(
    run: Run, server: S3Server, flight: Path, s3: str, hurried: None, content: bytes
) -> None:
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    fs.pipe_file(f"{s3}/leases/{flight.name}", content)
    result = run("ingest", flight, "--archive", s3, "--ratio", 16, "--workers", 0)
    assert result.code == 0, result.err
    assert f"flight {flight.name}: waiting for" in result.err
    assert len(result.err.splitlines()) == 1
    assert not fs.exists(f"{s3}/leases/{flight.name}")


def test_a_live_lease_is_waited_for_and_a_lost_one_is_an_error(
    server: S3Server, s3: str, hurried: None
) -> None:
    archive = Archive.create(s3)
    turns = []

    def wait() -> None:
        with leases.leased(Archive.open(s3, writable=True), ["beach"]):
            turns.append("second")

    with leases.leased(archive, ["beach", "coast"]) as held:
        second = threading.Thread(target=wait)
        second.start()
        second.join(3 * leases.GIVEN_UP_AFTER)  # it is renewed all the time
        turns.append("first")
        held.check()
    second.join(30)
    assert turns == ["first", "second"]

    with leases.leased(archive, ["beach"]) as held:
        archive.write_key("leases/beach", b'{"token": "another"}')
        time.sleep(4 * leases.RENEWED_EVERY)
        with pytest.raises(ArchiveError, match=r"flight beach: .* another one took over"):
            held.check()
    assert archive.read_key("leases/beach") == b'{"token": "another"}'  # not ours to remove


def test_a_key_that_goes_as_another_wants_it_is_no_error(
    server: S3Server, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner may remove its lease right after the store has refused a second one."""
    archive = Archive.create(s3)
    assert archive.create_key("leases/beach", b"1") is True

    async def gone(*_: object) -> bool:
        return False

    monkeypatch.setattr(type(archive.store), "exists", gone)
    assert archive.create_key("leases/beach", b"2") is False
    assert archive.read_key("leases/beach") == b"1"


def test_a_lease_that_is_neither_shown_nor_given_ends_the_wait(
    server: S3Server, s3: str, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Archive.create(s3)
    monkeypatch.setattr(Archive, "create_key", lambda *_: False)
    monkeypatch.setattr(Archive, "read_key", lambda *_: None)
    with (
        pytest.raises(ArchiveError, match=r"leases/beach is said to exist, but cannot be read"),
        leases.leased(archive, ["beach"]),
    ):
        pass


@pytest.mark.slow
def test_two_worker_processes_write_the_same(
    command: Run, server: S3Server, flight: Path, archive: Path, s3: str
) -> None:
    result = command(
        "ingest", flight, "--archive", s3, "--ratio", 16, "--workers", 2, "--json", "-q"
    )
    assert (result.code, result.err) == (0, "")
    assert result.json["ingested"] == FRAMES
    here, there = files(archive), objects(s3)
    assert here.keys() == there.keys()
    assert all(here[key] == there[key] for key in here if key != "items.parquet")


def test_without_the_environment_there_is_one_line(flight: Path, tmp_path: Path) -> None:
    """No credentials at all: no hang, no traceback."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    environ |= {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    environ |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}  # never the real one
    done = subprocess.run(
        command_line("info", "--archive", "s3://bucket/a.zarr"),
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def test_documents_of_a_flight(run: Run, server: S3Server, s3: str, tmp_path: Path) -> None:
    archive = Archive.create(s3)
    contents = {"geo.txt": b"third", "odd [*] %.MRK": bytes(range(256)), "empty.obs": b""}
    for text in (b"first", b"second"):  # each is replaced by the next, and its chunk goes
        write_document(archive, "f", "geo.txt", text)
    for path, data in contents.items():
        write_document(archive, "f", path, data)
    stored = [name for name in objects(s3) if name.startswith("documents/f/geo.txt/")]
    assert len(stored) == 2
    result = run("check", "--archive", s3, "--json")
    assert (result.code, result.json["documents"]) == (0, 3)
    assert run("restore", "--archive", s3, "-o", tmp_path, "--workers", 0).code == 0
    back = {path.suffix: path.read_bytes() for path in (tmp_path / "f").iterdir()}
    assert back == {Path(path).suffix: data for path, data in contents.items()}
