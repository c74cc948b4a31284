"""`archive remove`: nothing of an image stays, nothing of the others goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import pytest
from conftest import FRAMES, Run

import archive_pipeline as ap
from archive_pipeline.jobs.ingested import noted_sources
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.layout import ArchiveError, ImageEntry

GONE = "DJI_0002.JPG"


@pytest.fixture
def own(
    flight: Path, archive: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of the archive, with a second flight that has a document."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    url = Path(shutil.copytree(archive, tmp_path / "own.zarr"))
    other = tmp_path / "inland"
    other.mkdir()
    shutil.copy(flight / "DJI_0001.JPG", other / "a.JPG")
    (other / "geo.txt").write_text("EPSG:4326\na.JPG -94.79 29.28 50\n")
    assert run("ingest", other, "--archive", url, "--ratio", 16, "--workers", 0).code == 0
    return url


def tree(url: Path) -> dict[str, bytes]:
    return {str(p.relative_to(url)): p.read_bytes() for p in url.rglob("*") if p.is_file()}


def entries(url: Path) -> dict[str, ImageEntry]:
    return {f"{e.flight}/{e.id}": e for e in Archive.open(url).images()}


def whole(run: Run, url: Path) -> int:
    """The number of images of an archive in which nothing is wrong."""
    found = run("check", "--archive", url, "--json").json
    assert (found["problems"], found["leftover_bytes"]) == ([], 0)
    return int(found["images"])


def test_without_yes_nothing_goes(run: Run, own: Path) -> None:
    before = tree(own)
    told = run("remove", "beach", GONE, "--archive", own)
    assert (told.code, tree(own)) == (0, before)
    assert f"Would remove: beach/{GONE}" in told.out
    assert "nothing is removed without --yes" in told.out
    found = run("remove", "inland", "--archive", own, "--json").json
    assert not found["removed"]
    assert [image["image"] for image in found["images"]] == ["inland/a.JPG"]
    assert [document["document"] for document in found["documents"]] == ["inland/geo.txt"]
    parts = [data for key, data in before.items() if key.split("/")[1:2] == ["inland"]]
    groups = sum(len(before[f"{root}/inland/zarr.json"]) for root in ("flights", "documents"))
    assert found["bytes"] == sum(map(len, parts)) - groups
    assert tree(own) == before


def test_nothing_of_an_image_stays(run: Run, own: Path) -> None:
    before, entry = tree(own), entries(own)[f"beach/{GONE}"]
    shard = before[f"{entry.key}/pixels/c/0/0/0"]
    parts = [GONE.encode(), entry.record["sha256"].encode(), shard[:64], shard[-200:-100]]
    assert all(any(part in data for data in before.values()) for part in parts)
    done = run("remove", "beach", GONE, "--archive", own, "--yes", "--json")
    assert done.code == 0, done.err
    size = sum(len(data) for key, data in before.items() if key.startswith(f"{entry.key}/"))
    assert done.json["images"] == [{"image": f"beach/{GONE}", "bytes": size}]
    assert (done.json["bytes"], done.json["models"]) == (size, [])
    after = tree(own)
    for key, data in after.items():
        assert not [part for part in parts if part in data or part in key.encode()], key
    assert not (own / entry.key).exists()
    assert before.keys() - after.keys() == {key for key in before if key.startswith(entry.key)}
    changed = {key for key in after if before[key] != after[key]}
    assert changed == {"items.parquet"}
    assert whole(run, own) == FRAMES
    listed = run("info", "--archive", own, "--json").json["flights"]
    assert GONE not in json.dumps(listed)


def test_a_flight_goes_with_its_documents_and_models(run: Run, own: Path, flight: Path) -> None:
    assert noted_sources(str(own))["inland"]
    report = ap.remove("inland", archive=own, yes=True)
    assert (list(report.images), list(report.documents)) == (["inland/a.JPG"], ["inland/geo.txt"])
    assert (report.models, report.notes) == ([], [])
    assert not [key for key in tree(own) if "inland" in key]
    assert "inland" not in noted_sources(str(own))
    assert whole(run, own) == FRAMES
    last = run("remove", "beach", "--archive", own, "--yes")
    assert last.code == 0
    assert "3 images, 1 model, " in last.out
    assert not [key for key in tree(own) if key.startswith("models/")]
    assert whole(run, own) == 0
    # and can be archived again
    assert run("ingest", flight, "--archive", own, "--ratio", 16, "--workers", 0).code == 0
    assert whole(run, own) == FRAMES


def test_interrupted_at_any_moment_it_can_be_run_again(
    run: Run, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Archive.delete
    names = {name for name in entries(own) if name.startswith("beach/")}
    for allowed in range(8):
        url = Path(shutil.copytree(own, tmp_path / f"{allowed}.zarr"))
        deleted = 0

        def delete(self: Archive, keys: Collection[str], most: int = allowed) -> None:
            nonlocal deleted
            for key in sorted(keys, key=lambda key: (not key.endswith("/zarr.json"), len(key))):
                if deleted == most:
                    raise ArchiveError("the disk is gone")
                plain(self, [key])
                deleted += 1

        with monkeypatch.context() as patch:
            patch.setattr(Archive, "delete", delete)
            broken = run("remove", "beach", "--archive", url, "--yes")
        assert (broken.code, "the disk is gone" in broken.err) == (1, True)
        there = entries(url)
        for name in names & there.keys():  # all of an image, or nothing
            key = there[name].key
            assert {k for k in tree(own) if k.startswith(key)} <= tree(url).keys()
        again = run("remove", "beach", "--archive", url, "--yes")
        assert again.code == 0, again.err
        assert whole(run, url) == 1
        assert not [key for key in tree(url) if "beach" in key]
        shutil.rmtree(url)


def test_what_is_not_there(run: Run, own: Path, tmp_path: Path) -> None:
    before = tree(own)
    for args, said in (
        (("baech",), "no flight baech; did you mean beach?"),
        (("beach", "DJI_0001.JPG", "DJI_000.JPG"), "no image DJI_000.JPG in beach; did you mean"),
        (("beach", "../inland/a.JPG"), "no image ../inland/a.JPG"),
        (("..",), "no flight .."),
    ):
        found = run("remove", *args, "--archive", own, "--yes")
        assert (found.code, said in found.err) == (1, True), found.err
        assert tree(own) == before
    assert run("remove", "beach", "--archive", tmp_path / "none.zarr", "--yes").code == 1


def test_names_that_look_like_options(run: Run, own: Path) -> None:
    said = run("remove", "-x.jpg", "--archive", own)
    assert said.code == 2
    assert "names that begin with a dash come behind --" in said.err
    said = run("remove", "--archive", own, "--", "f", "-x.jpg")
    assert said.code == 1
    assert "-x.jpg" in said.err


def test_damaged_images_can_go_and_keep_models(run: Run, own: Path) -> None:
    for name in ("DJI_0001.JPG", GONE):
        (own / entries(own)[f"beach/{name}"].key / "zarr.json").write_text("{}")
    done = run("remove", "beach", GONE, "--archive", own, "--yes")
    assert done.code == 0, done.err
    assert not (own / "flights" / "beach" / GONE).exists()
    (model,) = (own / "models").iterdir()
    assert ap.remove("inland", archive=own, yes=True).notes == []
    report = ap.remove("beach", "DJI_0003.JPG", archive=own, yes=True)
    # what the damaged record would say is not known
    (note,) = report.notes
    assert "may need, whose record is damaged" in note
    assert model.is_dir()
    assert ap.remove("beach", archive=own, yes=True).models == [f"models/{model.name}"]


def test_models_stay_beside_an_ingest(run: Run, own: Path) -> None:
    ap.remove("inland", archive=own, yes=True)
    with Archive.open(own).writing():  # that has looked for its model, say
        report = ap.remove("beach", archive=own, yes=True)
    assert report.notes == ["models that nothing uses stay: an ingest is running"]
    assert list((own / "models").iterdir())
    assert not report.models
