"""Files of a flight that are no images: archived byte for byte, and back with the flight."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import Run
from PIL import Image

from archive_pipeline.flight.documents import MAX_BYTES
from archive_pipeline.flight.find import find_flight
from archive_pipeline.flight.read import read_pixels, read_source
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.documents import document_keys, read_document, write_document
from archive_pipeline.store.layout import ArchiveError, document_key

FILES = {
    "100MEDIA/Timestamp.MRK": b"1\t297000.0\t[2100]\t   12,N\t   -3,E\t  190,V\n" * 200,
    "100MEDIA/rover.obs": bytes(range(256)) * 64,
    "100MEDIA/base.23o": b"     3.02           OBSERVATION DATA\r\n",
    "geo.txt": "EPSG:4326\na.png 8.5 47.5 500 ünïcode\n".encode("latin-1"),
    "gcp_list.txt": b"",
    "mission/plan @1.kml": b"<kml/>",
    "mission/odd % name?.json": b"{}",
    "a.DNG": b"II*\0 raw pixels",
}
NOT_TAKEN = {"video.MP4": b"mp4", "no-suffix": b"1"}


def save(path: Path) -> Path:
    """A small grey image, which is kept losslessly: no model is needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(30, 40)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    flight = tmp_path / "beach"
    save(flight / "a.png")
    for name, data in {**FILES, **NOT_TAKEN}.items():
        path = flight / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    (flight / ".hidden.txt").write_text("no")
    (flight / "a.png.aux.xml").write_text("<PAMDataset/>")  # the image's own
    return flight


def ingest(run: Run, flight: Path | str, *more: object):
    url = Path(str(flight).removeprefix("local://")).parent / "a.zarr"
    return run("ingest", flight, "--archive", url, "--workers", 0, "--json", *more), url


def restored(folder: Path) -> dict[str, bytes]:
    """Contents of all files below a folder but images."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tif")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("scheme", ["", "local://"])
def test_documents_come_back(folder: Path, tmp_path: Path, run: Run, scheme: str) -> None:
    result, url = ingest(run, f"{scheme}{folder}" if scheme else folder)
    assert result.code == 0, result.err
    documents = {d["document"]: d for d in result.json["documents"]}
    assert documents.keys() == FILES.keys()
    assert {d["status"] for d in documents.values()} == {"ingested"}
    assert [d["source_bytes"] for d in documents.values()] == [len(FILES[n]) for n in documents]
    assert {Path(path).name for path in result.json["not_archived"]} == NOT_TAKEN.keys()
    (warned,) = [w for w in result.json["warnings"] if "not decoded" in w["warning"]]
    assert warned["path"].endswith("a.DNG")

    info = run("info", "--archive", url, "--json").json
    (flight,) = info["flights"]
    assert {d["path"]: d["source_bytes"] for d in flight["documents"]} == {
        name: len(data) for name, data in FILES.items()
    }
    stored = sum(
        p.stat().st_size
        for p in (url / "documents" / "beach").rglob("*")
        if p.is_file() and p.parent.name != "beach"
    )
    assert info["totals"]["document_bytes"] == stored
    check = run("check", "--archive", url, "--json")
    assert (check.code, check.json["documents"], check.json["notes"]) == (0, len(FILES), [])

    out = tmp_path / "out"
    args = ("restore", "--archive", url, "-o", out, "--workers", 0, "--json")
    result = run(*args)
    assert result.code == 0
    assert len(result.json["documents"]) == len(FILES)
    back = restored(out / "beach")
    odd = {"mission/odd % name?.json": "mission/odd %25 name%3F.json"}
    odd["mission/plan @1.kml"] = "mission/plan %401.kml"
    assert back == {odd.get(name, name): data for name, data in FILES.items()}
    # again: what has the same bytes is as good as written; what differs stays
    (out / "beach" / "geo.txt").write_text("edited")
    result = run(*args, "--overwrite")
    assert result.code == 3
    assert [f["image"] for f in result.json["failed"]] == ["beach/geo.txt"]
    assert (out / "beach" / "geo.txt").read_text() == "edited"


def test_a_part_of_a_flight_has_no_documents(folder: Path, tmp_path: Path, run: Run) -> None:
    _, url = ingest(run, folder)
    args = ("restore", "--archive", url, "--workers", 0, "--image", "a.png")
    assert run(*args, "-o", tmp_path / "one").code == 0
    assert restored(tmp_path / "one") == {}


def test_known_changed_and_replaced(folder: Path, tmp_path: Path, run: Run) -> None:
    _, url = ingest(run, folder)
    result, _ = ingest(run, folder)
    assert result.code == 0
    assert {d["status"] for d in result.json["documents"]} == {"skipped"}
    (folder / "geo.txt").write_bytes(b"new")
    result, _ = ingest(run, folder)
    assert result.code == 3
    (failure,) = result.json["failed"]
    assert failure["path"] == f"{folder}/geo.txt"
    assert "has changed since it was archived" in failure["error"]
    for data in (b"new", b"newer", b"newest"):
        (folder / "geo.txt").write_bytes(data)
        result, _ = ingest(run, folder, "--overwrite")
        assert result.code == 0
        key = document_key("beach", "geo.txt")
        assert np.asarray(zarr.open_array(url / key, mode="r")[:]).tobytes() == data
        assert len([p for p in (url / key).rglob("*") if p.is_file()]) == 2
        assert run("check", "--archive", url).code == 0


def test_restored_documents_are_not_archived_again(folder: Path, run: Run) -> None:
    _, url = ingest(run, folder)
    args = ("restore", "--archive", url, "-o", folder / "restored", "--workers", 0)
    assert run(*args).code == 0
    result, _ = ingest(run, folder)
    again = [d for d in result.json["documents"] if d["document"].startswith("restored/")]
    assert len(again) == len(FILES)
    assert all("archive restore" in d["warning"] for d in again)
    (flight,) = run("info", "--archive", url, "--json").json["flights"]
    assert len(flight["documents"]) == len(FILES)


def test_damage_is_told(folder: Path, tmp_path: Path, run: Run) -> None:
    _, url = ingest(run, folder)
    chunk = url / document_key("beach", "100MEDIA/rover.obs") / "c" / "0"
    damaged = bytearray(chunk.read_bytes())
    damaged[-1] ^= 1
    chunk.write_bytes(damaged)
    record = url / document_key("beach", "geo.txt") / "zarr.json"
    record.write_text(record.read_text().replace('"path":"geo.txt"', '"path":"other.txt"'))
    result = run("check", "--archive", url, "--json")
    assert result.code == 1
    assert any("rover.obs: the document is damaged" in p for p in result.json["problems"])
    assert any("geo.txt: damaged record" in p for p in result.json["problems"])
    result = run("restore", "--archive", url, "-o", tmp_path / "o", "--workers", 0, "--json")
    assert result.code == 3
    assert len(result.json["failed"]) == 2
    assert len(result.json["documents"]) == len(FILES) - 2
    # a damaged record is written anew, a damaged chunk with --overwrite of what has changed
    result, _ = ingest(run, folder)
    assert [d["document"] for d in result.json["documents"] if d["status"] == "ingested"] == [
        "geo.txt"
    ]


def test_what_a_killed_writer_leaves(folder: Path, run: Run) -> None:
    _, url = ingest(run, folder)
    key = url / document_key("beach", "geo.txt")
    (key / "c.0").write_bytes(b"half")  # of the next generation
    lost = url / document_key("beach", "lost.txt") / "c"
    lost.mkdir(parents=True)
    (lost / "0").write_bytes(b"whole, but without a record")
    result = run("check", "--archive", url, "--json")
    assert (result.code, result.json["leftover_bytes"]) == (0, 31)
    assert len(result.json["notes"]) == 2
    assert run("check", "--archive", url, "--repair").code == 0
    assert not (key / "c.0").exists()
    assert not lost.parent.exists()
    assert read_all(url)["geo.txt"] == FILES["geo.txt"]


def read_all(url: Path) -> dict[str, bytes]:
    from archive_pipeline.store.documents import documents

    archive = Archive.open(url)

    def fail(name: str, error: ArchiveError) -> None:
        raise error

    return {d.path: read_document(archive, d) for d in documents(archive, None, fail)}


@pytest.mark.parametrize("path", ["../../evil.txt", "a/../../b", ".ssh/config", "/etc/x", "a//b"])
def test_a_stranger_cannot_write_elsewhere(tmp_path: Path, run: Run, path: str) -> None:
    url = tmp_path / "a.zarr"
    archive = Archive.create(url)
    write_document(archive, "f", "good.txt", b"good")
    (key,) = document_keys(archive)
    record = json.loads((url / key / "zarr.json").read_text())
    record["attributes"]["archive_pipeline"]["path"] = path
    bad = url / document_key("f", path)
    os.rename(url / key, bad)
    (bad / "zarr.json").write_text(json.dumps(record))
    result = run("restore", "--archive", url, "-o", tmp_path / "o", "--workers", 0, "--json")
    assert "hidden parts" in result.json["failed"][0]["error"]
    assert not (tmp_path / "o").exists()


def test_a_stranger_cannot_fill_memory(tmp_path: Path) -> None:
    archive = Archive.create(tmp_path / "a.zarr")
    entry = write_document(archive, "f", "a.txt", b"a" * 100)
    record = tmp_path / "a.zarr" / entry.key / "zarr.json"
    record.write_text(record.read_text().replace("100", str(MAX_BYTES)))
    with pytest.raises(ArchiveError, match="the document is damaged"):
        read_all(tmp_path / "a.zarr")
    record.write_text(record.read_text().replace(str(MAX_BYTES), str(MAX_BYTES + 1)))
    with pytest.raises(ArchiveError, match="damaged record"):
        read_all(tmp_path / "a.zarr")


def test_what_is_too_large_or_no_file_is_left_out(folder: Path) -> None:
    os.truncate(folder / "geo.txt", MAX_BYTES + 1)  # sparse
    os.mkfifo(folder / "pipe.txt")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    flight = find_flight(folder)
    assert {"geo.txt", "pipe.txt"} <= {*flight.others}
    assert "gone.txt" in [d.below for d in flight.documents]  # reading it tells why


def test_what_cannot_be_read_is_named(folder: Path, run: Run) -> None:
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    result, _ = ingest(run, folder)
    assert result.code == 3
    assert result.json["failed"] == [
        {"path": f"{folder}/gone.txt", "error": "No such file or directory"}
    ]
    assert "Failed: " in result.err
    assert result.json["ingested"] == 1


def test_pictures_of_an_mpo_are_named(tmp_path: Path) -> None:
    first, second = (np.full((40, 60, 3), shade, np.uint8) for shade in (90, 160))
    path = tmp_path / "stereo.MPO"
    more = [Image.fromarray(second)]
    Image.fromarray(first).save(path, "MPO", save_all=True, append_images=more)
    (image,) = find_flight(tmp_path).images
    source = read_source(tmp_path / "stereo.MPO", image.id)
    assert (source.driver, source.width, source.height) == ("JPEG", 60, 40)
    assert any("further pictures" in warning for warning in source.warnings)
    assert abs(int(read_pixels(source)[0].mean()) - 90) < 3
