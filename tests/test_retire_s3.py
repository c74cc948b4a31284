"""`archive retire` in buckets: nothing is lost that was not archived, whatever the store does."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import BUCKET, Result, Run
from s3_server import S3Server

from archive_pipeline.flight import objects
from archive_pipeline.flight.aside import Kept
from archive_pipeline.jobs import _deleting
from archive_pipeline.jobs import retire as job
from archive_pipeline.store import leases
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.retired import read_retired, write_retired

ONE, TWO, THREE = "DJI_0001.JPG", "DJI_0002.JPG", "DJI_0003.JPG"
ODD = "a b+c%20#[*]é\u2028.JPG", "DJI_0001.JPG?x=1", "deep//folder/.JPG", "'\"&<>.JPG"


@pytest.fixture(params=[False, True], ids=["plain", "versions"])
def versioned(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[True, False], ids=["If-Match", "careless"])
def careful(request: pytest.FixtureRequest, server: S3Server) -> Iterator[bool]:
    """Whether the store looks at the condition, or deletes all the same, as many do."""
    if not request.param:
        ignore_conditions(server)
    yield bool(request.param)
    server.before = lambda method, path, environ: None


def ignore_conditions(server: S3Server, then: Callable[[str], None] = lambda path: None) -> None:
    def drop(method: str, path: str, environ: dict[str, Any]) -> None:
        if method == "DELETE":
            environ.pop("HTTP_IF_MATCH", None)
            then(path)

    server.before = drop


@pytest.fixture
def bucket(server: S3Server, request: pytest.FixtureRequest) -> str:
    """A bucket of its own for each test."""
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:20]
    s3().mkdir(name)
    return f"s3://{name}"


def s3() -> Any:
    return fsspec.filesystem("s3", use_listings_cache=False)


def keep_versions(bucket: str) -> None:
    s3().call_s3(
        "put_bucket_versioning",
        Bucket=bucket.removeprefix("s3://"),
        VersioningConfiguration={"Status": "Enabled"},
    )


def history(bucket: str) -> list[tuple[str, bytes | None]]:
    """Every version of every object, the latest first; None is a delete marker."""
    name = bucket.removeprefix("s3://").partition("/")[0]
    found = s3().call_s3("list_object_versions", Bucket=name)
    told = [(v["Key"], v["VersionId"]) for v in found.get("Versions", [])]

    def data(key: str, version: str) -> bytes:
        answer = s3().call_s3("get_object", Bucket=name, Key=key, VersionId=version)
        return bytes(fsspec.asyn.sync(s3().loop, answer["Body"].read))

    markers: list[tuple[str, bytes | None]] = [
        (m["Key"], None) for m in found.get("DeleteMarkers", [])
    ]
    return markers + [(key, data(key, version)) for key, version in told]


def put(url: str, data: bytes) -> None:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    s3().call_s3("put_object", Bucket=bucket, Key=key, Body=data)


def there(url: str) -> dict[str, bytes]:
    root = url.removeprefix("s3://")
    return {name.removeprefix(f"{root}/"): s3().cat_file(name) for name in s3().find(root)}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------ objects


def test_how_a_bucket_deletes_is_tried(bucket: str, versioned: bool, careful: bool) -> None:
    if versioned:
        keep_versions(bucket)
    put(f"{bucket}/flight/{ONE}", b"one")
    before = history(bucket)
    assert objects.way_of(f"{bucket}/flight") == objects.Way(careful, versioned)
    assert objects.way_of(bucket) == objects.Way(careful, versioned)
    assert history(bucket) == before  # our own object is gone, with all its versions


def test_a_bucket_that_cannot_be_tried(server: S3Server, bucket: str) -> None:
    for method, words in (("PUT", "lets nothing be written"), ("HEAD", "cannot be found out")):
        server.refuse = lambda m, path, method=method: 403 if m == method else None
        try:
            with pytest.raises(Kept, match=words):
                objects.way_of(bucket)
        finally:
            server.refuse = lambda method, path: None
        assert there(bucket) == {}
    with pytest.raises(Kept, match="lets nothing be written"):
        objects.way_of("s3://no-such-bucket/flight")


def test_only_the_object_that_was_read_goes(bucket: str, versioned: bool, careful: bool) -> None:
    if versioned:
        keep_versions(bucket)
    url, way = f"{bucket}/{ONE}", objects.Way(careful, versioned)
    put(url, b"one")
    put(f"{url}.aux.xml", b"another's name begins like it")
    held = objects.read(url, sha(b"one"))
    put(url, b"a new flight's frame")
    reason = "neither deletes on a condition" if not (versioned or careful) else "changed just now"
    with pytest.raises(Kept, match=reason):
        objects.delete(held, way)
    assert there(bucket)[ONE] == b"a new flight's frame"
    with pytest.raises(Kept, match="changed since it was archived"):
        objects.read(url, sha(b"one"))
    if not (versioned or careful):
        return
    objects.delete(objects.read(url, sha(b"a new flight's frame")), way)
    assert there(bucket) == {f"{ONE}.aux.xml": b"another's name begins like it"}
    assert not objects.is_there(url)
    kept = [data for key, data in history(bucket) if key == ONE]
    assert kept == ([None, b"a new flight's frame", b"one"] if versioned else [])


def test_a_bucket_that_began_to_keep_versions(server: S3Server, bucket: str) -> None:
    """What was there before has the version null."""
    url = f"{bucket}/{ONE}"
    put(url, b"one")
    keep_versions(bucket)
    ignore_conditions(server)
    try:
        held = objects.read(url, sha(b"one"))
        put(url, b"two")
        with pytest.raises(Kept, match="changed just now"):
            objects.delete(held, objects.way_of(bucket))
        assert there(bucket) == {ONE: b"two"}
        objects.delete(objects.read(url, sha(b"two")), objects.way_of(bucket))
        assert [data for _, data in history(bucket)] == [None, b"two", b"one"]
    finally:
        server.before = lambda method, path, environ: None


def test_an_answer_that_was_lost(server: S3Server, bucket: str) -> None:
    """The store deletes, the answer does not come, and what is asked again finds nothing."""
    url = f"{bucket}/{ONE}"
    put(url, b"one")
    held = objects.read(url, sha(b"one"))
    s3().rm_file(url)
    objects.delete(held, objects.Way(True, False))
    put(url, b"one")
    for refused, error, words in (
        (("DELETE",), Kept, "it cannot be deleted"),
        (("DELETE", "HEAD"), OSError, "not known whether it is there"),
    ):
        server.refuse = lambda method, path, refused=refused: 403 if method in refused else None
        try:
            with pytest.raises(error, match=words):
                objects.delete(objects.read(url, sha(b"one")), objects.Way(True, False))
        finally:
            server.refuse = lambda method, path: None
    assert there(bucket) == {ONE: b"one"}


@pytest.mark.parametrize("name", ODD)
def test_odd_names(bucket: str, name: str) -> None:
    url = f"{bucket}/{name}"
    put(url, b"one")
    put(f"{bucket}/{ONE}", b"another")
    objects.delete(objects.read(url, sha(b"one")), objects.Way(True, False))
    assert there(bucket) == {ONE: b"another"}


def test_a_name_that_s3fs_takes_for_another(bucket: str) -> None:
    """It would read, and delete, DJI_0001.JPG."""
    put(f"{bucket}/{ONE}", b"one")
    put(f"{bucket}/{ONE}?versionId=x.JPG", b"one")
    url = f"{bucket}/{ONE}?versionId=x.JPG"
    with pytest.raises(Kept, match="taken for that of another object"):
        objects.read(url, sha(b"one"))
    with pytest.raises(OSError, match="taken for that of another object"):
        objects.is_there(url)
    assert len(history(bucket)) == 2


# ------------------------------------------------------------------ the command


@pytest.fixture
def flight_url(bucket: str, flight: Path) -> str:
    """One frame of the flight in a bucket, with its world file and something else."""
    s3().put_file(str(flight / ONE), f"{bucket}/beach/{ONE}")
    put(f"{bucket}/beach/DJI_0001.JGW", b"1\n0\n0\n1\n0\n0\n")
    put(f"{bucket}/beach/notes.txt", b"notes")
    return f"{bucket}/beach"


BESIDE = {"DJI_0001.JGW": b"1\n0\n0\n1\n0\n0\n", "notes.txt": b"notes"}


def retire(run: Run, archive: Path | str, originals: Path | str, *args: object) -> Result:
    return run("retire", "--archive", archive, "--originals", originals, *args)


def kept(result: Result, name: str = ONE) -> str:
    [reason] = [i["reason"] for i in result.json["kept"] if i["image"] == f"beach/{name}"]
    return str(reason)


def notes(url: Path | str) -> list[dict[str, Any]]:
    return read_retired(Archive.open(url), "beach", ONE)


def test_originals_in_a_bucket_go_and_nothing_else(
    run: Run, server: S3Server, own_archive: Path, flight_url: str
) -> None:
    before = there(flight_url)
    with server.recorded() as requests:
        told = retire(run, own_archive, flight_url)
    assert told.code == 3, told.err  # the other frames' originals are elsewhere
    assert f"Would delete: {flight_url}/{ONE}" in told.out
    assert "whether it deletes safely is tried with --yes" in told.err
    assert {r.method for r in requests} <= {"GET", "HEAD"}
    assert there(flight_url) == before
    done = retire(run, own_archive, flight_url, "--yes", "--json")
    assert [f["path"] for f in done.json["files"]] == [f"{flight_url}/{ONE}"], done.err
    assert done.json["bytes"] == len(before[ONE])
    assert there(flight_url) == BESIDE
    [note] = notes(own_archive)
    assert (note["path"], note["sha256"]) == (f"{flight_url}/{ONE}", sha(before[ONE]))
    assert note["date"] <= note["deleted"]
    assert note["object"]["conditional"]
    again = retire(run, own_archive, f"{flight_url}/", "--yes", "--json")
    assert (again.json["files"], again.json["already"]) == ([], 1)
    assert run("check", "--archive", own_archive).code == 0


def test_a_careless_store_keeps_its_originals_until_it_keeps_versions(
    run: Run, server: S3Server, own_archive: Path, flight_url: str, bucket: str
) -> None:
    before = there(flight_url)
    ignore_conditions(server)
    try:
        done = retire(run, own_archive, flight_url, "--yes", "--json")
        assert (done.code, kept(done)) == (1, objects.NO_WAY)
        assert there(bucket) == {f"beach/{name}": data for name, data in before.items()}
        assert notes(own_archive) == []
        keep_versions(bucket)
        done = retire(run, own_archive, flight_url, "--yes", "--json")
    finally:
        server.before = lambda method, path, environ: None
    assert len(done.json["files"]) == 1
    assert there(flight_url) == BESIDE
    assert (f"beach/{ONE}", before[ONE]) in history(bucket)
    assert f"{bucket}: keeps versions" in done.json["notes"][0]


@pytest.mark.parametrize("late", ["before the proof", "after the proof", "as it is deleted"])
def test_an_object_that_changes_stays(
    run: Run,
    own_archive: Path,
    flight_url: str,
    monkeypatch: pytest.MonkeyPatch,
    late: str,
) -> None:
    url, other = f"{flight_url}/{ONE}", b"a new flight's frame"
    why_not, delete = job.why_not, objects.delete

    def proof(*args: Any) -> str | None:
        reason = why_not(*args)
        if late == "after the proof":
            put(url, other)
        return reason

    def deletion(*args: Any) -> None:
        if late == "as it is deleted":
            put(url, other)
        delete(*args)

    monkeypatch.setattr(job, "why_not", proof)
    monkeypatch.setattr(objects, "delete", deletion)
    if late == "before the proof":
        put(url, other)
    done = retire(run, own_archive, flight_url, "--yes", "--json")
    assert done.code == 1
    assert (
        kept(done)
        == {
            "before the proof": "it is not the file that was archived: its SHA-256 differs",
            "after the proof": "it was changed since it was archived",
            "as it is deleted": "it was changed just now",
        }[late]
    )
    assert there(flight_url) == {ONE: other, **BESIDE}
    assert notes(own_archive) == []


KILLED = """
import os, sys
from archive_pipeline.flight import objects

def die(*args, **kwargs):
    os._exit(9)

moment, url, flight = sys.argv[1:]
real = objects.delete
objects.delete = die if moment == "noted" else lambda *args: (real(*args), die())
import archive_pipeline as ap
ap.retire(archive=url, originals=flight, yes=True)
"""


@pytest.mark.parametrize("moment", ["noted", "gone"])
def test_killed_it_can_be_run_again(
    run: Run, own_archive: Path, flight_url: str, flight: Path, moment: str
) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, moment, own_archive, flight_url])
    assert done.returncode == 9
    left = {ONE: (flight / ONE).read_bytes()} if moment == "noted" else {}
    assert there(flight_url) == {**left, **BESIDE}
    assert notes(own_archive)[0]["deleted"] is None
    again = retire(run, own_archive, flight_url, "--yes", "--json")
    assert (len(again.json["files"]), again.json["already"]) == (len(left), 1 - len(left))
    assert there(flight_url) == BESIDE
    [note] = notes(own_archive)
    assert note["deleted"] is not None


def test_killed_before_it_was_looked_at_a_later_version_shows_again(
    run: Run, own_archive: Path, flight_url: str, bucket: str
) -> None:
    """A careless store with versions: another object was hidden just when the run was killed."""
    keep_versions(bucket)
    url = f"{flight_url}/{ONE}"
    put(url, b"the one that was read")
    read = objects.read(url, sha(b"the one that was read"))
    put(url, b"later")
    s3().rm_file(url)
    way = {"etag": read.etag, "version": read.version, "conditional": False, "versioned": True}
    archive = Archive.open(own_archive, writable=True)
    write_retired(archive, "beach", ONE, {"path": url, "deleted": None, "object": way})
    retire(run, own_archive, flight_url, "--json")
    assert ONE not in there(flight_url)  # without --yes nothing changes
    done = retire(run, own_archive, flight_url, "--yes", "--json")
    assert done.json["notes"] == [f"{url}: a killed run had hidden a later version; it shows again"]
    assert there(flight_url) == {ONE: b"later", **BESIDE}


def test_notes_of_strangers_are_not_followed(
    run: Run, server: S3Server, own_archive: Path, flight_url: str, bucket: str
) -> None:
    """Whoever can write the archive can name any URL as deleted."""
    archive = Archive.open(own_archive, writable=True)
    secret = f"{bucket}/beach-secret/x.JPG"
    for path in (secret, "http://127.0.0.1:9/x.JPG"):
        write_retired(archive, "beach", TWO, {"path": path, "deleted": None})
    with server.recorded() as requests:
        done = retire(run, own_archive, flight_url, "--yes", "--json")
    assert not [r for r in requests if "beach-secret" in r.path]
    assert kept(done, TWO) == "no file of its name is among the originals"


def test_a_note_is_no_proof_that_an_object_is_gone(
    run: Run, server: S3Server, own_archive: Path, flight_url: str
) -> None:
    archive = Archive.open(own_archive, writable=True)
    note = {"path": f"{flight_url}/{TWO}", "deleted": None}
    write_retired(archive, "beach", TWO, note)
    server.refuse = lambda method, path: 403 if method == "HEAD" and TWO in path else None
    try:
        done = retire(run, own_archive, flight_url, "--yes", "--json")
    finally:
        server.refuse = lambda method, path: None
    assert "it is not known whether it is there" in kept(done, TWO)
    assert read_retired(archive, "beach", TWO) == [note]


def test_an_archive_among_the_originals_is_refused(
    run: Run, archive: Path, flight: Path, bucket: str
) -> None:
    s3().put(f"{archive}/", f"{bucket}/beach/deep/own.zarr/", recursive=True)
    s3().put_file(str(flight / ONE), f"{bucket}/beach/{ONE}")
    s3().put_file(str(flight / ONE), f"{bucket}/beach/deep/own.zarr/originals/{ONE}")
    url = f"{bucket}/beach/deep/own.zarr"
    before = there(bucket)
    for originals in (
        *(f"{bucket}/beach", f"{bucket}/beach/", bucket, f"{bucket}/", f"{url}/originals"),
        f"{bucket}/beach/deep".replace("s3://", "s3a://"),
    ):
        done = retire(run, url, originals, "--yes")
        assert done.code == 1, originals
        assert "lies in one folder with the originals" in done.err
    assert there(bucket) == before


@pytest.fixture
def remote(bucket: str, archive: Path) -> str:
    """The archive in a bucket."""
    s3().put(f"{archive}/", f"{bucket}/own.zarr/", recursive=True)
    return f"{bucket}/own.zarr"


def test_an_archive_in_the_same_bucket(run: Run, remote: str, flight_url: str) -> None:
    done = retire(run, remote, flight_url, "--yes", "--json")
    assert len(done.json["files"]) == 1, done.err
    assert there(flight_url) == BESIDE
    assert notes(remote)[0]["deleted"] is not None
    assert run("check", "--archive", remote).code == 0
    left = {key for key in there(remote) if key.startswith("leases/")}
    assert not left


def test_local_originals_of_an_archive_in_a_bucket(
    run: Run, server: S3Server, remote: str, own_flight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> list[str]:
        return sorted(p.name for p in own_flight.iterdir())

    for refused, words in (("/retired/", "AccessDenied"), ("/leases/", "AccessDenied")):
        server.refuse = lambda method, path, part=refused: (
            403 if method == "PUT" and part in path else None
        )
        try:
            done = retire(run, remote, own_flight, "--yes")
        finally:
            server.refuse = lambda method, path: None
        assert (done.code, words in done.err) == (1, True)
        assert files() == [ONE, TWO, THREE]
    # one whose lease another has taken while the image was compared
    why_not = job.why_not

    def slow(*args: Any) -> str | None:
        reason = why_not(*args)
        held[0].lost.append("another one took over")
        return reason

    held: list[leases.Leases] = []
    leased = job.leased

    def watched(*args: Any) -> Any:
        context = leased(*args)
        enter = context.__enter__

        class Watched:
            def __enter__(self) -> Any:
                held.append(enter())
                return held[0]

            def __exit__(self, *error: Any) -> Any:
                return context.__exit__(*error)

        return Watched()

    with monkeypatch.context() as patch:
        patch.setattr(job, "why_not", slow)
        patch.setattr(job, "leased", watched)
        done = retire(run, remote, own_flight, "--yes")
    assert (done.code, "another one took over" in done.err) == (1, True)
    assert files() == [ONE, TWO, THREE]
    s3().rm(f"{remote}/{leases.lease_key('beach')}")  # the other one is done
    done = retire(run, remote, own_flight, "--yes")
    assert (done.code, files()) == (0, []), done.err


def test_a_damaged_archive_in_a_bucket_keeps_the_originals(
    run: Run, remote: str, flight_url: str
) -> None:
    key = f"{remote}/flights/beach/{ONE}/pixels/c/0/0/0"
    data = bytearray(s3().cat_file(key))
    data[len(data) // 2] ^= 1
    put(key, bytes(data))
    done = retire(run, remote, flight_url, "--yes", "--json")
    assert (done.code, "damaged" in kept(done)) == (1, True)
    assert ONE in there(flight_url)
    assert _deleting.read_retired(Archive.open(remote), "beach", ONE) == []


def test_a_bucket_that_is_away_or_denies(
    run: Run, server: S3Server, own_archive: Path, flight_url: str
) -> None:
    before = there(flight_url)
    for method, words in (("GET", "Error: "), ("PUT", "lets nothing be written"), ("DELETE", "")):
        server.refuse = lambda m, path, method=method: 403 if m == method else None
        try:
            done = retire(run, own_archive, flight_url, "--yes")
        finally:
            server.refuse = lambda method, path: None
        assert (done.code, words in done.err) == (1, True)
        assert BUCKET not in done.err
        assert all(line.startswith(("Stays: ", "Error: ")) for line in done.err.splitlines())
        left = there(flight_url)
        left.pop(objects.PROBE, None)  # what may not be deleted stays
        assert left == before
