"""`archive retire`: no original goes whose pixels the archive cannot give back."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result, Run, fill

from archive_pipeline.flight import aside
from archive_pipeline.flight.find import find_images
from archive_pipeline.flight.locations import sha256
from archive_pipeline.flight.pixels import SourcePixels
from archive_pipeline.flight.read import read_source
from archive_pipeline.jobs import _deleting, known_images
from archive_pipeline.jobs import retire as job
from archive_pipeline.jobs._verdicts import keep_verdict
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.image_writer import ImageWriter
from archive_pipeline.store.layout import ArchiveError
from archive_pipeline.store.retired import read_retired
from archive_pipeline.store.verdicts import Verdict, add_verdict, record_digest

NAMES = ["DJI_0001.JPG", "DJI_0002.JPG", "DJI_0003.JPG"]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def retire(run: Run, url: Path, flight: Path, *args: object) -> Result:
    return run("retire", "--archive", url, "--originals", flight, *args)


def there(flight: Path) -> list[str]:
    return sorted(p.name for p in flight.iterdir())


def kept(result: Result) -> dict[str, str]:
    return {item["image"]: item["reason"] for item in result.json["kept"]}


@pytest.fixture
def single(own_archive: Path, own_flight: Path, run: Run) -> tuple[Path, Path]:
    """An archive of one image, and its flight."""
    for name in NAMES[1:]:
        (own_flight / name).unlink()
    assert run("remove", "beach", *NAMES[1:], "--archive", own_archive, "--yes").code == 0
    return own_archive, own_flight


def test_without_yes_nothing_goes(run: Run, own_archive: Path, own_flight: Path) -> None:
    before = tree(own_archive), tree(own_flight)
    told = retire(run, own_archive, own_flight)
    assert told.code == 0, told.err
    assert told.out.count("Would delete: ") == 3
    assert "3 originals, " in told.out
    assert "can go: nothing is deleted without --yes" in told.out
    assert (tree(own_archive), tree(own_flight)) == before


def test_originals_go_and_nothing_else(run: Run, own_archive: Path, own_flight: Path) -> None:
    beside = {"DJI_0001.JGW": b"1\n0\n0\n1\n0\n0\n", "geo.txt": b"notes", "x.JPG.txt": b"x"}
    (own_flight / "sub").mkdir()
    for name, data in beside.items():
        (own_flight / "sub" / name).write_bytes(data)
    files = {name: (own_flight / name).read_bytes() for name in NAMES}
    before = tree(own_archive)
    assert "deleted by" not in run("info", "--archive", own_archive).out
    done = retire(run, own_archive, own_flight, "--yes", "--json")
    assert done.code == 0, done.err
    assert tree(own_flight) == {f"sub/{name}": data for name, data in beside.items()}
    assert done.json["bytes"] == sum(map(len, files.values()))
    assert [f["image"] for f in done.json["files"]] == [f"beach/{name}" for name in NAMES]
    after = tree(own_archive)
    assert after.keys() - before.keys() == {f"retired/beach/{name}.json" for name in NAMES}
    assert {key: after[key] for key in before} == before
    for name in NAMES:
        [note] = read_retired(Archive.open(own_archive), "beach", name)
        assert note["path"] == str(own_flight / name)
        assert note["date"] <= note["deleted"]
        assert note["sha256"] == sha256_of(files[name])
    assert run("check", "--archive", own_archive).code == 0
    back = ("-o", own_flight.parent / "back", "--workers", 0)
    assert run("restore", "--archive", own_archive, *back).code == 0
    # run again, there is nothing to do
    again = retire(run, own_archive, own_flight, "--yes")
    assert again.code == 0, again.err
    assert "0 originals, 0 B deleted; 3 deleted before" in again.out
    told = run("info", "--archive", own_archive).out.splitlines()
    assert told[1] == "  3 originals deleted by archive retire: keep this archive"
    # removing the image for good tells that nothing else is left of it
    told = run("remove", "beach", NAMES[0], "--archive", own_archive, "--yes")
    assert "the originals of 1 of them were deleted by archive retire" in told.err
    assert not [d for d in tree(own_archive).values() if NAMES[0].encode() in d]


def sha256_of(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def test_a_file_that_changed_stays(run: Run, own_archive: Path, own_flight: Path) -> None:
    changed = own_flight / NAMES[1]
    data = changed.read_bytes() + b"\0"
    changed.write_bytes(data)
    (own_flight / NAMES[2]).unlink()
    done = retire(run, own_archive, own_flight, "--yes", "--json")
    assert done.code == 3
    assert kept(done) == {
        f"beach/{NAMES[1]}": "it is not the file that was archived: its SHA-256 differs",
        f"beach/{NAMES[2]}": "no file of its name is among the originals",
    }
    assert tree(own_flight) == {NAMES[1]: data}


@pytest.mark.parametrize("moment", ["before it is moved", "when it is moved", "a new file"])
def test_a_file_that_changes_meanwhile_stays(
    run: Run, single: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Nothing that was not archived is lost, however late it comes."""
    url, flight = single
    path = flight / NAMES[0]
    other = b"a new flight's frame"
    delete, digest = _deleting.delete_if, aside._digest

    def late(place: Path, wanted: str) -> None:
        assert place == path
        path.write_bytes(other)
        delete(place, wanted)

    def later(place: Path) -> str:
        assert not path.exists()  # it is aside
        path.write_bytes(other)
        if moment == "when it is moved":
            place.write_bytes(other + b"!")
        return digest(place)

    with monkeypatch.context() as patch:
        if moment == "before it is moved":
            patch.setattr(_deleting, "delete_if", late)
        else:
            patch.setattr(aside, "_digest", later)
        done = retire(run, url, flight, "--yes", "--json")
    assert path.read_bytes() == other
    if moment == "a new file":  # the archived one went, its successor stays
        assert done.code == 0
        assert there(flight) == [NAMES[0]]
        return
    assert done.code == 1
    [reason] = kept(done).values()
    assert reason.startswith("it was changed since it was archived")
    assert read_retired(Archive.open(url), "beach", NAMES[0]) == []
    if moment == "before it is moved":
        assert there(flight) == [NAMES[0]]
    else:  # both are there, and the line says where
        [hidden] = [p for p in flight.rglob("*") if p.is_file() and p != path]
        assert str(hidden) in reason
        assert hidden.read_bytes() == other + b"!"


KILLED = """
import os, sys
from archive_pipeline.flight import aside
from archive_pipeline.jobs import _deleting

def die(*args, **kwargs):
    os._exit(9)

moment, url, flight = sys.argv[1:]
if moment == "noted":
    _deleting.delete_if = die
elif moment == "aside":
    aside._digest = die
elif moment == "read":
    aside.os.unlink = die
else:
    real = _deleting.delete_if
    _deleting.delete_if = lambda *args: (real(*args), die())
import archive_pipeline as ap
ap.retire(archive=url, originals=flight, yes=True)
"""


@pytest.mark.parametrize("moment", ["noted", "aside", "read", "gone"])
def test_killed_at_any_moment_it_can_be_run_again(
    run: Run, single: tuple[Path, Path], moment: str
) -> None:
    url, flight = single
    data = (flight / NAMES[0]).read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, moment, url, flight], timeout=300)
    assert done.returncode == 9
    left = [p for p in flight.rglob("*") if p.is_file() and p.read_bytes() == data]
    assert len(left) == (moment != "gone")  # whole, under its name or aside
    assert (flight / NAMES[0] in left) == (moment == "noted")
    [note] = read_retired(Archive.open(url), "beach", NAMES[0])
    assert note["deleted"] is None
    assert run("check", "--archive", url).code == 0
    before = tree(flight)
    told = retire(run, url, flight)
    assert tree(flight) == before
    if moment in ("aside", "read"):
        assert "--yes mends it" in told.err
    again = retire(run, url, flight, "--yes")
    assert again.code == 0, again.err
    assert there(flight) == []
    [note] = read_retired(Archive.open(url), "beach", NAMES[0])
    assert note["deleted"] is not None


def test_what_was_left_aside_is_put_back_beside_its_successor(tmp_path: Path) -> None:
    hidden = tmp_path / f"{aside.PREFIX}x" / "a.JPG"
    hidden.parent.mkdir()
    hidden.write_bytes(b"old")
    (tmp_path / "a.JPG").write_bytes(b"new")
    assert list(aside.left_aside(tmp_path)) == [hidden]
    told = aside.put_back(hidden)
    assert told is not None
    assert "another file has its name by now" in told
    assert (hidden.read_bytes(), (tmp_path / "a.JPG").read_bytes()) == (b"old", b"new")
    (tmp_path / "a.JPG").unlink()
    assert aside.put_back(hidden) is None
    assert tree(tmp_path) == {"a.JPG": b"old"}
    assert not hidden.parent.exists()


def test_deleting_by_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.JPG"
    path.write_bytes(b"one")
    for wrong in (sha256_of(b"two"), "", sha256_of(b"one").upper()):
        with pytest.raises(aside.Kept, match="changed"):
            aside.delete_if(path, wrong)
        assert tree(tmp_path) == {"a.JPG": b"one"}
    link = tmp_path / "link.JPG"
    link.symlink_to(path)
    with pytest.raises(aside.Kept, match="a link, or no file"):
        aside.delete_if(link, sha256_of(b"one"))
    assert link.is_symlink()
    with pytest.raises(aside.Kept, match="No such file"):
        aside.delete_if(tmp_path / "none.JPG", sha256_of(b"one"))
    assert there(tmp_path) == ["a.JPG", "link.JPG"]

    def stop(place: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(aside, "_digest", stop)
        with pytest.raises(KeyboardInterrupt):
            aside.delete_if(path, sha256_of(b"one"))
    assert there(tmp_path) == ["a.JPG", "link.JPG"]

    def no_links(*args: Any, **kwargs: Any) -> None:
        raise OSError(1, "Operation not permitted")

    with monkeypatch.context() as patch:  # as on FAT
        patch.setattr(aside.os, "link", no_links)
        with pytest.raises(aside.Kept, match=r"changed since it was archived$"):
            aside.delete_if(path, "0")
    assert path.read_bytes() == b"one"
    aside.delete_if(path, sha256_of(b"one"))
    assert not path.exists()


Damage = Callable[[Path], None]


def flip(name: str) -> Damage:
    def damage(url: Path) -> None:
        [path] = url.glob(name)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))

    return damage


def drop(name: str) -> Damage:
    def damage(url: Path) -> None:
        for path in url.glob(name):
            path.unlink()

    return damage


def exchange(url: Path) -> None:
    """Give the image another frame's pixels: all checksums are right."""
    one, two = (url / "flights" / "beach" / name / "pixels/c/0/0/0" for name in NAMES[:2])
    shutil.copy(two, one)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip("flights/beach/DJI_0001.JPG/pixels/c/0/0/0"), "damaged"),
        (drop("flights/beach/DJI_0001.JPG/pixels/c/0/0/0"), "damaged"),
        (flip("flights/beach/DJI_0001.JPG/metadata/c/0"), "metadata is damaged"),
        (drop("flights/beach/DJI_0001.JPG/pixels/zarr.json"), "damaged"),
        (drop("models/*/model.safetensors"), "is missing"),
        (flip("models/*/model.safetensors"), "damaged"),
    ],
)
def test_a_damaged_archive_keeps_the_original(
    run: Run, single: tuple[Path, Path], damage: Damage, reason: str
) -> None:
    url, flight = single
    before = tree(flight)
    damage(url)
    for args in ((), ("--yes",)):
        done = retire(run, url, flight, *args, "--json")
        assert done.code == 1
        [told] = kept(done).values()
        assert reason in told
    assert tree(flight) == before
    assert not (url / "retired").exists()


def test_pixels_of_another_frame_keep_the_original(
    run: Run, own_archive: Path, own_flight: Path
) -> None:
    exchange(own_archive)
    checked = run("check", "--archive", own_archive)
    assert (checked.code, "bytes are stored" in checked.err) == (1, True)  # it knows sizes only
    done = retire(run, own_archive, own_flight, "--yes", "--json")
    assert done.code == 3
    assert kept(done) == {f"beach/{NAMES[0]}": "its pixels have nothing to do with the original's"}
    assert there(own_flight) == [NAMES[0]]


def test_lossless_pixels_must_be_equal(run: Run, own_flight: Path, tmp_path: Path) -> None:
    url = tmp_path / "exact.zarr"
    archive = Archive.create(url)
    archive.create_flight("beach")
    for index, file in enumerate(find_images(own_flight)):
        source = read_source(Path(file.path), file.id)
        with SourcePixels(source) as image:
            pixels = np.array(image.read((0, 0, source.width, source.height))[0])
        pixels[100, 200, 1] ^= index == 1
        writer = ImageWriter(archive, "beach", source, "test")
        writer.write_metadata()
        writer.create_lossless()[:] = pixels
        record = {
            **{name: getattr(source, name) for name in ("id", "sha256", "width", "height")},
            **{"bands": 3, "dtype": "uint8", "codec": "lossless", "mask": "none"},
            **{"source_bytes": source.size_bytes, "georef": source.georef.to_json()},
            "captured": source.captured,
        }
        writer.commit(record, {})
    done = retire(run, url, own_flight, "--yes", "--json")
    [(name, reason)] = kept(done).items()
    assert name == f"beach/{NAMES[1]}"
    assert reason.endswith("its pixels are not the original's")
    assert there(own_flight) == [NAMES[1]]


def test_masks_must_be_equal_and_files_whole(run: Run, tmp_path: Path) -> None:
    from PIL import Image

    flight = tmp_path / "masked"
    flight.mkdir()
    pixels = np.empty((200, 300, 4), np.uint8)
    pixels[..., :3] = np.arange(300)[:, None] // 2
    pixels[..., 3] = 255 * (np.arange(300) < 150)
    Image.fromarray(pixels).save(flight / "a.png")
    Image.fromarray(pixels[..., :3]).save(flight / "b.jpg", quality=80)
    url = tmp_path / "masked.zarr"
    args = ("--archive", url, "--ratio", 8, "--workers", 0, "--lossless-jpeg")
    assert run("ingest", flight, *args).code == 0
    found = retire(run, url, flight, "--json")
    assert [f["image"] for f in found.json["files"]] == ["masked/a.png", "masked/b.jpg"], found.err
    import zarr

    array = zarr.open(url / "flights" / "masked" / "a.png" / "mask")
    array[10, 10] = 7  # as whoever can write the archive could
    done = retire(run, url, flight, "--yes", "--json")
    assert "its mask is not the original's" in kept(done)["masked/a.png"]
    assert there(flight) == ["a.png"]


@pytest.mark.parametrize("quiet", [False, True])
def test_an_archive_that_keeps_no_note_keeps_the_original(
    run: Run, single: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, quiet: bool
) -> None:
    url, flight = single
    write = Archive.write_key

    def refuse(self: Archive, key: str, data: bytes) -> None:
        if key.startswith("retired/") and not quiet:
            raise ArchiveError(f"{self.url}: {key}: Read-only file system")
        if not key.startswith("retired/"):
            write(self, key, data)

    monkeypatch.setattr(Archive, "write_key", refuse)
    done = retire(run, url, flight, "--yes", "--json")
    assert done.code == 1
    [reason] = kept(done).values()
    assert ("does not keep what is written" if quiet else "Read-only file system") in reason
    assert there(flight) == [NAMES[0]]


def test_links_are_not_followed(run: Run, single: tuple[Path, Path], tmp_path: Path) -> None:
    url, flight = single
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.move(flight / NAMES[0], outside)
    (flight / NAMES[0]).symlink_to(outside / NAMES[0])
    done = retire(run, url, flight, "--yes", "--json")
    assert (done.code, [*kept(done).values()]) == (1, ["it is a link"])
    (flight / NAMES[0]).unlink()
    (flight / "sub").symlink_to(outside)
    (flight / "other.JPG").write_bytes(b"")  # else there were no images
    done = retire(run, url, flight, "--yes", "--json")
    assert [*kept(done).values()] == ["no file of its name is among the originals"]
    assert there(outside) == [NAMES[0]]
    # nor where a folder becomes a link after it was looked through
    place = flight / "sub" / NAMES[0]
    assert job._misplaced(place, [flight]) == (
        "a link leads to it from outside of the flight's folder"
    )
    assert job._misplaced(outside / NAMES[0], [outside]) is None
    assert job._misplaced("gs://bucket/a.JPG", ["gs://bucket"]) == (
        "it is at a URL: only files of this machine and objects at s3:// are deleted"
    )


def test_an_archive_among_the_originals_is_refused(
    run: Run, own_archive: Path, own_flight: Path, tmp_path: Path
) -> None:
    inside = Path(shutil.copytree(own_archive, own_flight / "deep" / "own.zarr"))
    (tmp_path / "linked").symlink_to(own_flight)
    for url, flight in (
        (inside, own_flight),
        (inside, tmp_path / "linked"),
        (f"file://{inside}", own_flight),
    ):
        done = run("retire", "--archive", url, "--originals", flight, "--yes")
        assert done.code == 1
        assert "lies in one folder with the originals" in done.err
    below = Path(shutil.copytree(own_flight, own_archive / "originals"))
    done = run("retire", "--archive", own_archive, "--originals", below, "--yes")
    assert "lies in one folder with the originals" in done.err
    assert set(NAMES) <= {*there(own_flight)}
    assert set(NAMES) <= {*there(below)}


def test_an_archive_in_memory_is_refused(run: Run, own_flight: Path) -> None:
    Archive.create("memory://retire")
    done = run("retire", "--archive", "memory://retire", "--originals", own_flight, "--yes")
    assert (done.code, "is gone when this process ends" in done.err) == (1, True)


def test_verdicts_that_are_asked_for(run: Run, own_archive: Path, own_flight: Path) -> None:
    entries = list(Archive.open(own_archive).images())
    both = ("--require", "detection,photogrammetry-quick", "--json")
    keep_verdict(str(own_archive), "detection", True, {}, entries)
    assert set(kept(retire(run, own_archive, own_flight, *both)).values()) == {
        "it has no verdict of verify-photogrammetry-quick"
    }
    keep_verdict(str(own_archive), "photogrammetry", True, {}, entries)
    keep_verdict(str(own_archive), "detection", False, {}, entries[1:2])
    changed = entries[2].record | {"archive_bytes": 5}
    keep_verdict(str(own_archive), "detection", True, {}, [replace(entries[2], record=changed)])
    done = retire(run, own_archive, own_flight, *both, "--yes")
    assert done.code == 3
    assert kept(done) == {
        f"beach/{NAMES[1]}": "it failed verify-detection",
        f"beach/{NAMES[2]}": "it has no verdict of verify-detection",
    }
    assert there(own_flight) == NAMES[1:]
    [note] = read_retired(Archive.open(own_archive), "beach", NAMES[0])
    assert note["verdicts"] == ["detection", "photogrammetry-quick"]
    assert run("retire", "--archive", own_archive, "--require", "luck").code == 2


def test_an_image_that_was_replaced_meanwhile_keeps_its_original(
    run: Run, single: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, flight = single
    stale = [replace(e, record=e.record | {"generation": 1}) for e in Archive.open(url).images()]
    monkeypatch.setattr(job, "read_images", lambda *args: iter(stale))
    done = retire(run, url, flight, "--yes", "--json")
    assert [*kept(done).values()] == ["its image was replaced or removed just now"]
    assert there(flight) == [NAMES[0]]


def test_what_the_archive_names_is_not_followed(
    run: Run, own_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --originals only folders count that this user archived from on this machine."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "nobody"))
    done = run("retire", "--archive", own_archive, "--yes", "--json")
    assert done.code == 1
    assert set(kept(done).values()) == {"nobody has named where its original lies: --originals"}


def test_damaged_notes_are_no_harm(run: Run, single: tuple[Path, Path]) -> None:
    url, flight = single
    note = url / "retired" / "beach" / f"{NAMES[0]}.json"
    note.parent.mkdir(parents=True)
    for content in (b"", b"[]", b'{"files": 5}', b'{"files": [{"path": 7}, 3]}', b"[" * 100_000):
        note.write_bytes(content)
        assert retire(run, url, flight).code == 0
    assert retire(run, url, flight, "--yes").code == 0
    assert len(json.loads(note.read_text())["files"]) == 1
    assert not os.path.lexists(flight / NAMES[0])


def test_the_sha_of_a_record_is_what_counts(own_flight: Path, own_archive: Path) -> None:
    for entry in Archive.open(own_archive).images():
        assert entry.record["sha256"] == sha256(own_flight / entry.id)


def test_an_image_that_is_the_only_copy_is_not_replaced(
    run: Run, own_flight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A camera's next flight in the same folder has the same names."""
    url, flight = tmp_path / "only.zarr", own_flight
    for name in NAMES[1:]:
        (flight / name).unlink()
    args = ("ingest", flight, "--archive", url, "--workers", 0, "--lossless-jpeg")
    assert run(*args).code == 0
    path, before = flight / NAMES[0], tree(url)
    data = path.read_bytes()
    assert retire(run, url, flight, "--yes").code == 0
    path.write_bytes(data + b"!")
    for more in ((), ("--overwrite",)):
        done = run(*args, *more)
        assert done.code == 3, done.err
        assert "was deleted by archive retire: it is the only copy" in done.err
    # nor by an ingest that was told what to do before the original was deleted
    with monkeypatch.context() as patch:
        patch.setattr(known_images, "is_retired", lambda archive, entry: False)
        done = run(*args, "--overwrite")
    assert done.code == 3
    assert "it is the only copy" in done.err
    after = tree(url)
    assert {key: after[key] for key in before if "pixels" in key} == {
        key: before[key] for key in before if "pixels" in key
    }
    path.write_bytes(data)  # a copy that turned up
    assert run(*args, "--overwrite").code == 0


def test_what_a_cache_has_read_is_no_archive(run: Run, single: tuple[Path, Path]) -> None:
    url, flight = single
    for chained in (f"simplecache::file://{url}", f"filecache::file://{url}"):
        assert run("info", "--archive", chained).code == 0
        done = run("retire", "--archive", chained, "--originals", flight, "--yes")
        assert done.code == 1
        assert "nothing is deleted" in done.err
    assert there(flight) == [NAMES[0]]


@pytest.fixture
def kept_as_files(own_flight: Path, run: Run, tmp_path: Path) -> Path:
    """An archive of JPEGs kept byte for byte."""
    url = tmp_path / "files.zarr"
    args = ("--archive", url, "--workers", 0, "--lossless-jpeg")
    assert run("ingest", own_flight, *args).code == 0
    return url


def test_originals_go_from_a_full_disk(
    run: Run, kept_as_files: Path, own_flight: Path, mounted: Callable[[str], Path]
) -> None:
    """Making room is what it is for: not even a folder can be made there."""
    disk = mounted("size=60m,nr_inodes=40")
    flight = Path(shutil.copytree(own_flight, disk / "beach"))
    for n in range(50):
        with suppress(OSError):
            (disk / f"ballast{n}").touch()
    with pytest.raises(OSError, match="No space left"):
        (flight / "folder").mkdir()
    hidden = flight / f"{aside.PREFIX}0123-{NAMES[0]}"
    (flight / NAMES[0]).rename(hidden)  # as a run that was killed left it
    assert list(aside.left_aside(flight)) == [hidden]
    assert aside.origin(hidden) == flight / NAMES[0]
    told = retire(run, kept_as_files, flight)
    assert f"{flight / NAMES[0]}: a killed run has left it as {hidden}" in told.err
    (disk / "ballast0").unlink()  # a link takes an inode here
    done = retire(run, kept_as_files, flight, "--yes")
    assert done.code == 0, done.err
    assert there(flight) == []


def test_a_changed_file_comes_back_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(aside.tempfile, "mkdtemp", full)
    path = tmp_path / "a.JPG"
    path.write_bytes(b"one")
    with pytest.raises(aside.Kept, match="changed"):
        aside.delete_if(path, sha256_of(b"two"))
    assert tree(tmp_path) == {"a.JPG": b"one"}
    aside.delete_if(path, sha256_of(b"one"))
    assert tree(tmp_path) == {}


def test_an_archive_on_a_full_disk_keeps_the_originals(
    run: Run,
    kept_as_files: Path,
    own_flight: Path,
    mounted: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = mounted("size=20m")
    url = Path(shutil.copytree(kept_as_files, disk / "files.zarr"))
    fill(disk)
    before = tree(url), tree(own_flight)
    proofs = []
    why_not = job.why_not
    monkeypatch.setattr(job, "why_not", lambda *args: proofs.append(args) or why_not(*args))
    done = retire(run, url, own_flight, "--yes", "--json")
    assert done.code == 1
    assert len(proofs) == 1  # nothing is decoded in vain
    assert [*kept(done)] == [f"beach/{name}" for name in NAMES]
    assert all("No space left on device" in reason for reason in kept(done).values())
    after = tree(url)
    assert (after, tree(own_flight)) == before
    assert run("check", "--archive", url).code == 0
    for path in disk.glob("ballast*"):
        path.unlink()
    assert retire(run, url, own_flight, "--yes").code == 0
    assert there(own_flight) == []


def test_what_went_is_told_though_it_could_not_be_noted(
    run: Run, kept_as_files: Path, own_flight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Archive.write_key

    def full(self: Archive, key: str, data: bytes) -> None:
        if key.endswith(f"{NAMES[0]}.json") and b'"deleted": null' not in data:
            raise ArchiveError(f"{self.url}: {key}: No space left on device")
        write(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(Archive, "write_key", full)
        done = retire(run, kept_as_files, own_flight, "--yes", "--json")
    assert (done.code, done.json["kept"]) == (0, [])
    assert len(done.json["files"]) == 3
    assert f"{own_flight / NAMES[0]}: is deleted, which the archive could not note" in done.err
    again = retire(run, kept_as_files, own_flight, "--yes", "--json")
    assert (again.code, again.json["already"]) == (0, 3)
    [note] = read_retired(Archive.open(kept_as_files), "beach", NAMES[0])
    assert note["deleted"] is not None


def test_images_are_removed_on_a_full_disk(
    run: Run, kept_as_files: Path, mounted: Callable[[str], Path]
) -> None:
    """Although what is left of their verdicts, and of the index, is written anew."""
    disk = mounted("size=20m")
    url = Path(shutil.copytree(kept_as_files, disk / "files.zarr"))
    assert keep_verdict(str(url), "detection", True, {}, list(Archive.open(url).images())) == []
    fill(disk)
    done = run("remove", "beach", NAMES[1], "--archive", url, "--yes")
    assert done.code == 0, done.err
    assert not [d for d in tree(url).values() if NAMES[1].encode() in d]
    assert run("check", "--archive", url, "--json").json["images"] == 2
    [flight] = run("info", "--archive", url, "--json").json["flights"]
    assert [v["images"] for v in flight["verdicts"]] == [[NAMES[0], NAMES[2]]]


def test_a_clock_that_is_wrong_changes_nothing(
    run: Run, kept_as_files: Path, own_flight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict that was given last counts, whatever its date; so do records and files."""
    archive = Archive.open(kept_as_files, writable=True)
    digests = {entry.id: record_digest(entry) for entry in archive.images()}
    for passed, date, names in ((True, "2099-01-01", NAMES), (False, "1970-01-01", NAMES[:1])):
        images = {name: digests[name] for name in names}
        add_verdict(archive, Verdict("beach", "detection", passed, {}, "0", date, images))
    for path in kept_as_files.rglob("*"):
        os.utime(path, (4e9, 4e9))
    for path in own_flight.iterdir():
        os.utime(path, (0, 0))
    back = iter(f"20{year}-01-01T00:00:00+00:00" for year in range(99, 9, -1))
    monkeypatch.setattr(_deleting, "_now", lambda: next(back))
    done = retire(run, kept_as_files, own_flight, "--yes", "--require", "detection", "--json")
    assert (done.code, kept(done)) == (3, {f"beach/{NAMES[0]}": "it failed verify-detection"})
    again = retire(run, kept_as_files, own_flight, "--yes", "--json")
    assert (again.code, again.json["already"], len(again.json["files"])) == (0, 2, 1)
    [note] = read_retired(Archive.open(kept_as_files), "beach", NAMES[0])
    assert note["deleted"] < note["date"]
    assert run("check", "--archive", kept_as_files).code == 0
    assert run("remove", "beach", NAMES[0], "--archive", kept_as_files, "--yes").code == 0
    [flight] = run("info", "--archive", kept_as_files, "--json").json["flights"]
    assert [image["id"] for image in flight["images"]] == NAMES[1:]
    assert [v["images"] for v in flight["verdicts"]] == [NAMES[1:]]
