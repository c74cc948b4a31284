"""Damage of every kind: `check` and `restore` name it, nothing crashes, other images restore."""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zarr
from conftest import FRAMES, Run

from archive_pipeline.jobs.check import check
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.index import read_index
from archive_pipeline.store.layout import ArchiveError, image_key
from archive_pipeline.store.stored_models import read_model

CASES = 60
SECONDS = 20  # for one case, on a busy machine
MEMORY = 512 << 20  # bytes that reading damaged files may add to this process's peak
FIRST = "flights/beach/DJI_0001.JPG"


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _replace(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    count = min(rng.randint(1, 64), len(data) - at)
    return data[:at] + rng.randbytes(count) + data[at + count :]


def _garbage(data: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([0, 1, 7, len(data), 2 * len(data)]))


DAMAGES = [_flip, _truncate, _replace, _garbage]


def _read(url: Path) -> list[str]:
    """Problems that reading the first image meets; any exception but ArchiveError escapes."""
    archive = Archive.open(url)
    try:
        entry = archive.entry(FIRST)
        if entry is None:  # what is left of the record says that no image was committed
            return []
        image = ArchivedImage(archive, entry)
        assert image.source.id == entry.id
        image.read((0, 0, entry.record["width"], entry.record["height"]))
    except ArchiveError as error:
        return [str(error)]
    return []


def _peak_memory() -> int:
    """Largest resident size of this process so far, in bytes; earlier tests have their share."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    "key",
    [
        f"{FIRST}/pixels/c/0/0/0",
        f"{FIRST}/metadata/c/0",
        f"{FIRST}/pixels/zarr.json",
        f"{FIRST}/metadata/zarr.json",
        f"{FIRST}/zarr.json",
    ],
)
def test_damage_is_named_or_harmless(own_archive: Path, key: str) -> None:
    path = own_archive / key
    data = path.read_bytes()
    rng = random.Random(key)
    silent = 0
    _read(own_archive)  # the weights are loaded by now
    before = _peak_memory()
    for case in range(CASES):
        broken = DAMAGES[case % len(DAMAGES)](data, rng)
        if broken == data:
            continue
        path.write_bytes(broken)
        started = time.monotonic()
        problems = _read(own_archive)
        assert time.monotonic() - started < SECONDS
        assert all("beach/DJI_0001.JPG" in p and "\n" not in p for p in problems)
        if "/c/" in key:  # everything in a shard is under a checksum
            assert len(problems) == 1
            named = ("row 0 column", "c/0/0/0 is missing or empty")
            assert "metadata" in key or any(text in problems[0] for text in named)
        silent += not problems
    # most of a record may change and still be a record: `check` compares it with the metadata
    assert silent <= (CASES if key.endswith("zarr.json") else 0)
    assert _peak_memory() - before < MEMORY


def test_check_finds_what_damage_leaves_readable(own_archive: Path) -> None:
    rng = random.Random(1)
    keys = [p for p in own_archive.rglob("*") if p.is_file() and "c" in p.parts[-4:]]
    for path in sorted(keys):
        data = path.read_bytes()
        path.write_bytes(_flip(data, rng))
        report = check(str(own_archive))
        assert len(report.problems) == 1
        assert path.relative_to(own_archive / "flights").parts[1] in report.problems[0]
        path.write_bytes(data)
    assert check(str(own_archive)).problems == []


def test_shards_that_are_not_the_images_own(own_archive: Path) -> None:
    """Each tile is whole, so that checksums say nothing."""
    one, two, *_ = Archive.open(str(own_archive)).images()
    shards = [next((own_archive / entry.key / "pixels").glob("c*")) for entry in (one, two)]
    files = [next(p for p in (s, *s.rglob("*")) if p.is_file()) for s in shards]
    data = [file.read_bytes() for file in files]
    assert len(data[0]) != len(data[1])
    for file, other in zip(files, reversed(data), strict=True):
        file.write_bytes(other)
    first, second = check(str(own_archive)).problems
    assert f"{one.id}: " in first
    assert f"{two.id}: " in second
    assert "bytes are stored" in first
    for file, own in zip(files, data, strict=True):
        file.write_bytes(own)
    assert not check(str(own_archive)).problems

    pixels = zarr.open_array(own_archive / one.key / "pixels", mode="r+")
    pixels[:5, :5] = 0  # every tile that is touched is coded anew
    [problem] = check(str(own_archive)).problems
    assert "bytes are stored" in problem


def test_index_damage(own_archive: Path) -> None:
    path = own_archive / "items.parquet"
    data = path.read_bytes()
    rng = random.Random(2)
    archive = Archive.open(own_archive)
    whole = read_index(archive)
    for case in range(2 * CASES):
        path.write_bytes(DAMAGES[case % len(DAMAGES)](data, rng))
        with suppress(ArchiveError):  # columns that are not read may be damaged unseen
            assert isinstance(read_index(archive), dict | None)
    path.write_bytes(b"")
    assert any("items.parquet" in p for p in check(str(own_archive)).problems)
    path.unlink()
    assert any("items.parquet is missing" in p for p in check(str(own_archive)).problems)
    path.write_bytes(data)
    assert read_index(archive) == whole


def test_model_damage(run: Run, own_archive: Path, tmp_path: Path) -> None:
    (folder,) = (own_archive / "models").iterdir()
    rng = random.Random(3)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        for damage in DAMAGES:
            path.write_bytes(damage(data, rng))
            with pytest.raises(ArchiveError, match="damaged: its hash"):
                read_model(Archive.open(own_archive), folder.name)
        result = run("check", "--archive", own_archive)
        assert result.code == 1
        assert folder.name in result.err
        path.unlink()
        # a model without denoiser is whole, too, so one that lacks its own is another
        with pytest.raises(ArchiveError, match=r"is missing|its hash is another"):
            read_model(Archive.open(own_archive), folder.name)
        path.write_bytes(data)


@pytest.mark.parametrize("key", ["pixels/c/0/0/0", "metadata/c/0", "pixels/zarr.json", "zarr.json"])
def test_other_images_restore(run: Run, own_archive: Path, tmp_path: Path, key: str) -> None:
    path = own_archive / FIRST / key
    path.write_bytes(_truncate(path.read_bytes(), random.Random(4)))
    out = tmp_path / "out"
    result = run("restore", "--archive", own_archive, "-o", out, "--workers", 0, "--json")
    assert result.code == 3
    assert len(result.json["files"]) == FRAMES - 1
    (failed,) = result.json["failed"]
    assert failed["image"] == "beach/DJI_0001.JPG"
    assert "DJI_0001.JPG" in failed["error"]
    assert len(list((out / "beach").iterdir())) == FRAMES - 1
    only = ("restore", "--archive", own_archive, "-o", tmp_path / "one", "--workers", 0)
    assert run(*only, "--image", "DJI_0001.JPG").code == 1
    assert run(*only, "--image", "DJI_0002.JPG").code == 0
    listed = run("info", "--archive", own_archive, "--json")
    assert listed.code == (3 if key == "zarr.json" else 0)
    assert listed.json["totals"]["images"] == FRAMES - (key == "zarr.json")


def test_missing_and_foreign_parts(own_archive: Path) -> None:
    shard = own_archive / FIRST / "pixels/c/0/0/0"
    data = shard.read_bytes()
    shard.unlink()
    report = check(str(own_archive))
    assert any("DJI_0001.JPG" in p and "missing" in p for p in report.problems)
    other = own_archive / "flights/beach/DJI_0002.JPG"
    shard.write_bytes(data)
    # another image's record in its place
    record = own_archive / FIRST / "zarr.json"
    mine = record.read_bytes()
    record.write_bytes((other / "zarr.json").read_bytes())
    assert any("DJI_0002.JPG" in p for p in check(str(own_archive)).problems)
    record.write_bytes(mine)
    (own_archive / "flights/beach/DJI_0003.JPG/zarr.json").unlink()
    assert check(str(own_archive)).problems == [
        "beach/DJI_0003.JPG: its record is missing; what is stored of it stays: ingest it again",
        "flights/beach/DJI_0003.JPG: in items.parquet, but no such image is committed",
    ]


Change = Callable[[dict[str, Any]], None]


def _edit(path: Path, change: Change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _record(**fields: Any) -> Change:
    return lambda content: content["attributes"]["archive_pipeline"].update(fields)


@pytest.mark.parametrize(
    "change",
    [
        _record(width=1 << 40),
        _record(height=-1),
        _record(width=True),
        _record(bands=1 << 30),
        _record(width=1 << 24, height=1 << 24),
        _record(codec="pickle"),
        _record(codec=["pcdc"]),
        _record(mask="odd"),
        _record(dtype="O"),
        _record(dtype="<U999999999"),
        _record(id="../../escape"),
        _record(id="/etc/passwd"),
        _record(id=7),
        _record(georef=None),
        _record(georef={"crs": 1, "transform": [1], "footprint": [[0]], "gcps": [], "rpcs": None}),
        _record(source_bytes="many"),
        _record(captured=[]),
        lambda content: content.update(attributes=[]),
        lambda content: content["attributes"].update(archive_pipeline="text"),
    ],
)
def test_hostile_records(run: Run, own_archive: Path, tmp_path: Path, change: Change) -> None:
    _edit(own_archive / FIRST / "zarr.json", change)
    out = tmp_path / "in" / "out"
    started = time.monotonic()
    result = run("restore", "--archive", own_archive, "-o", out, "--workers", 0)
    assert result.code == 3, result.err
    assert run("check", "--archive", own_archive).code == 1
    assert run("info", "--archive", own_archive).code in (0, 3)
    assert time.monotonic() - started < 2 * SECONDS
    assert {p.name for p in tmp_path.rglob("*.tif")} == {"DJI_0002.JPG.tif", "DJI_0003.JPG.tif"}
    assert {p.name for p in tmp_path.iterdir()} == {"own.zarr", "in"}


def _shape(height: int, width: int) -> Change:
    def change(content: dict[str, Any]) -> None:
        content["shape"] = [height, width, 3]

    return change


def _chunk(side: int) -> Change:
    def change(content: dict[str, Any]) -> None:
        content["chunk_grid"]["configuration"]["chunk_shape"] = [side, side, 3]
        content["codecs"][0]["configuration"]["chunk_shape"] = [side, side, 3]

    return change


@pytest.mark.parametrize(
    "change",
    [
        _shape(1, 1),
        _shape(1 << 40, 1 << 40),
        _shape(0, 0),
        _chunk(1 << 20),
        _chunk(1),
        _chunk(0),
        lambda content: content.update(data_type="float64"),
        lambda content: content.update(codecs=[{"name": "bytes"}]),
        lambda content: content.update(codecs=[{"name": "numcodecs.pickle"}]),
        lambda content: content.update(codecs=[]),
        lambda content: content.update(fill_value="x"),
        lambda content: content.update(zarr_format=2),
    ],
)
def test_hostile_arrays(own_archive: Path, change: Change) -> None:
    _edit(own_archive / FIRST / "pixels" / "zarr.json", change)
    started = time.monotonic()
    problems = check(str(own_archive)).problems
    assert time.monotonic() - started < 2 * SECONDS
    assert problems
    assert all("DJI_0001.JPG" in p for p in problems)


def test_forged_sizes_end_soon(own_archive: Path) -> None:
    side = 1 << 23
    _edit(own_archive / FIRST / "pixels" / "zarr.json", _shape(side, side))
    _edit(own_archive / FIRST / "zarr.json", _record(width=side, height=side))
    started = time.monotonic()
    problems = check(str(own_archive)).problems
    assert time.monotonic() - started < 2 * SECONDS
    assert any("DJI_0001.JPG: pixels" in p for p in problems)


@pytest.mark.parametrize("name", ["../up", "/abs", "%2e%2e", "a/../../b"])
def test_hostile_flights_stay_in_the_output_folder(
    run: Run, own_archive: Path, tmp_path: Path, name: str
) -> None:
    moved = own_archive / image_key(name, "../../../DJI_0001.JPG")
    moved.parent.mkdir(parents=True)
    (own_archive / FIRST).rename(moved)
    _edit(moved / "zarr.json", _record(id="../../../DJI_0001.JPG"))
    out = tmp_path / "in" / "out"
    result = run("restore", "--archive", own_archive, "-o", out, "--workers", 0, "--json")
    assert result.code == 0, result.err
    files = [Path(f["path"]) for f in result.json["files"]]
    assert len(files) == FRAMES
    assert all(out.resolve() in p.resolve().parents for p in files)
    assert {p.name for p in tmp_path.iterdir()} == {"own.zarr", "in"}
