"""Files are known by their bytes and their sidecars' within a flight, whatever their names are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import FRAMES, Result, Run
from PIL import Image

from archive_pipeline.flight.find import FlightError, ImageFile, find_images
from archive_pipeline.flight.locations import location
from archive_pipeline.flight.sidecars import WORLD_FILES, endings
from archive_pipeline.jobs.ingest_image import ingest_image
from archive_pipeline.jobs.ingest_task import IngestOptions, IngestTask
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage

WORLD = "0.5\n0\n0\n-0.5\n{}\n3240000\n"
AUX = '<PAMDataset><SRS dataAxisToSRSAxisMapping="1,2">EPSG:32615</SRS></PAMDataset>'


def save(path: Path, seed: int) -> Path:
    """A small grey image, stored losslessly; all of one size are TIFF files of equal length."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def ingest(run: Run, flight: Path | str, url: Path, *more: object) -> Result:
    return run("ingest", flight, "--archive", url, "--workers", 0, "--json", *more)


def stored(url: Path) -> dict[str, str]:
    """SHA-256 by id."""
    return {entry.id: entry.record["sha256"] for entry in Archive.open(url).images()}


def remarks(result: Result) -> dict[str, str]:
    """Why files were skipped or failed, by the last two parts of their paths."""
    found: dict[str, Any] = {i["path"]: i["reason"] or i["error"] for i in result.json["images"]}
    return {"/".join(Path(path).parts[-2:]): text for path, text in found.items() if text}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "beach"


@pytest.fixture
def url(tmp_path: Path) -> Path:
    return tmp_path / "a.zarr"


def test_a_file_beside_folders_whose_name_is_taken(run: Run, folder: Path, url: Path) -> None:
    save(folder / "100MEDIA" / "D.TIF", 1)
    assert ingest(run, folder, url).json["ingested"] == 1
    save(folder / "D.TIF", 2)
    assert ingest(run, folder, url).json["ingested"] == 1
    assert list(stored(url)) == ["D.TIF", "beach/D.TIF"]
    assert ingest(run, folder, url).json["skipped"] == 2


def test_a_folder_that_is_added_leaves_ids_alone(run: Run, folder: Path, url: Path) -> None:
    for number in (1, 2):
        save(folder / "100MEDIA" / f"DJI_000{number}.TIF", number)
    assert ingest(run, folder, url).json["ingested"] == 2
    before = stored(url)
    assert list(before) == ["DJI_0001.TIF", "DJI_0002.TIF"]
    for number in (1, 2):
        save(folder / "101MEDIA" / f"DJI_000{number}.TIF", 10 + number)
    added = ingest(run, folder, url)
    assert (added.code, added.json["ingested"], added.json["skipped"]) == (0, 2, 2)
    assert remarks(added) == {}
    now = stored(url)
    assert now.keys() - before.keys() == {"101MEDIA/DJI_0001.TIF", "101MEDIA/DJI_0002.TIF"}
    assert now.items() >= before.items()
    assert ingest(run, folder, url).json["skipped"] == 4
    again = ingest(run, folder, url, "--overwrite")
    assert (again.code, again.json["ingested"]) == (0, 4)
    assert stored(url) == now
    # the first folder is gone, and the ids of the others stay, too
    shutil.rmtree(folder / "100MEDIA")
    assert ingest(run, folder, url).json["skipped"] == 2
    # another image of the first one's name is no later version of it
    save(folder / "102MEDIA" / "DJI_0001.TIF", 21)
    (folder / "101MEDIA" / "DJI_0001.TIF").unlink()
    assert ingest(run, folder, url, "--overwrite").json["ingested"] == 2
    assert stored(url).items() > now.items()
    assert "102MEDIA/DJI_0001.TIF" in stored(url)
    assert run("check", "--archive", url).code == 0


def test_renamed_moved_and_repeated_files(run: Run, folder: Path, url: Path) -> None:
    first, second = save(folder / "a.tif", 1), save(folder / "b.tif", 2)
    shutil.copy(first, folder / "copy.tif")
    result = ingest(run, folder, url)
    assert (result.code, result.json["ingested"], result.json["skipped"]) == (0, 2, 1)
    assert remarks(result) == {"beach/copy.tif": "has the same bytes as beach/a.tif"}
    assert [w["path"] for w in result.json["warnings"] if "same bytes" in w["warning"]] == [
        str(folder / "copy.tif")
    ]
    assert "same bytes as beach/a.tif" in result.err
    before = stored(url)
    assert list(before) == ["a.tif", "b.tif"]
    (folder / "copy.tif").unlink()
    (folder / "sub").mkdir()
    first.rename(folder / "sub" / "new name.tif")
    second.rename(folder / "sub" / "b.tif")
    result = ingest(run, folder, url)
    assert (result.code, result.json["ingested"], result.json["skipped"]) == (0, 0, 2)
    assert remarks(result) == {"sub/new name.tif": "has the same bytes as beach/a.tif"}
    # --overwrite finds the image by its bytes, too
    result = ingest(run, folder, url, "--overwrite")
    assert (result.code, result.json["ingested"]) == (0, 2)
    assert stored(url) == before
    assert run("check", "--archive", url).code == 0


def test_copies_that_an_archive_has_twice_stay(run: Run, folder: Path, url: Path) -> None:
    """Earlier releases archived both."""
    save(folder / "a.tif", 1)
    assert ingest(run, folder, url).code == 0
    group = url / "flights" / "beach"
    shutil.copytree(group / "a.tif", group / "b.tif")
    record = group / "b.tif" / "zarr.json"
    record.write_text(record.read_text().replace('"id":"a.tif"', '"id":"b.tif"'))
    for name in ("b.tif", "c.tif"):
        shutil.copy(folder / "a.tif", folder / name)
    result = ingest(run, folder, url)
    assert remarks(result) == {"beach/c.tif": "has the same bytes as beach/a.tif"}
    assert ingest(run, folder, url, "--overwrite").json["ingested"] == 2
    assert list(stored(url)) == ["a.tif", "b.tif"]


def test_changed_files_replace_their_own_image_only(run: Run, folder: Path, url: Path) -> None:
    for number in (1, 2):
        save(folder / "100MEDIA" / f"{number}.tif", number)
    assert ingest(run, folder, url).code == 0
    before = stored(url)
    # an edit, with what was there before under another name
    (folder / "100MEDIA" / "1.tif").rename(folder / "100MEDIA" / "1_before.tif")
    save(folder / "100MEDIA" / "1.tif", 7)
    save(folder / "100MEDIA" / "2.tif", 8)
    result = ingest(run, folder, url)
    assert (result.code, result.json["ingested"], result.json["skipped"]) == (3, 1, 1)
    assert list(remarks(result)) == ["100MEDIA/1_before.tif", "100MEDIA/2.tif"]
    assert remarks(result)["100MEDIA/2.tif"] == (
        "the archive holds another image as beach/2.tif; use --overwrite to replace it or --flight "
        "to archive under another name"
    )
    # the image of 1_before.tif is 1.tif, so the edit has the next name
    assert list(stored(url)) == ["1.tif", "100MEDIA/1.tif", "2.tif"]
    assert stored(url)["1.tif"] == before["1.tif"]
    result = ingest(run, folder, url, "--overwrite")
    assert (result.code, result.json["ingested"]) == (0, 3)
    assert list(stored(url)) == ["1.tif", "100MEDIA/1.tif", "2.tif"]
    assert stored(url)["1.tif"] == before["1.tif"]
    assert stored(url)["2.tif"] != before["2.tif"]
    # a file whose only id is the image of a file elsewhere
    shutil.move(folder / "100MEDIA" / "2.tif", folder.parent / "2.tif")
    save(folder / "2.tif", 9)
    result = ingest(run, folder, url, "--overwrite")
    assert result.code == 3
    assert remarks(result)["beach/2.tif"] == (
        "the archive holds another image as beach/2.tif; rename the file or use --flight to "
        "archive under another name"
    )


def test_a_flight_that_moved_is_the_same(run: Run, folder: Path, url: Path) -> None:
    save(folder / "100MEDIA" / "1.tif", 1)
    save(folder / "100MEDIA" / "2.tif", 2)
    assert ingest(run, folder, url).code == 0
    moved = folder.rename(folder.parent / "disk")
    save(moved / "100MEDIA" / "1.tif", 3)
    result = ingest(run, moved, url, "--flight", "beach")
    assert list(remarks(result)) == ["100MEDIA/1.tif"]
    result = ingest(run, moved, url, "--flight", "beach", "--overwrite")
    assert result.json["ingested"] == 2
    assert list(stored(url)) == ["1.tif", "2.tif"]


def test_somebody_else_archives_it_under_its_other_id(run: Run, folder: Path, url: Path) -> None:
    path = save(folder / "100MEDIA" / "1.tif", 1)
    save(folder / "100MEDIA" / "2.tif", 2)
    assert ingest(run, folder, url).code == 0
    below = "100MEDIA/1.tif"

    def task(id: str, below: str, path: Path, **more: Any) -> IngestTask:
        file = ImageFile(id, below, path)
        return IngestTask(str(url), "beach", id, file, model="", **more)

    late = ingest_image(task(below, below, path, options=IngestOptions()))
    assert (late.status, late.id) == ("skipped", "1.tif")
    # planned when there was no such image, or another one
    other = save(folder.parent / "other" / "1.tif", 5)
    for options in (IngestOptions(), IngestOptions(overwrite=True)):
        outcome = ingest_image(task("1.tif", "1.tif", other, options=options))
        assert "the archive holds another image as beach/1.tif" in str(outcome.error)
    gone = task("1.tif", "1.tif", other, options=IngestOptions(overwrite=True), replaces="0" * 64)
    assert "the archive holds another image" in str(ingest_image(gone).error)
    assert list(stored(url)) == ["1.tif", "2.tif"]


def test_what_the_tool_wrote_is_left_out(run: Run, own_flight: Path, own_archive: Path) -> None:
    inside = Path(shutil.move(own_archive, own_flight / "archive.zarr"))
    for args in ((), ("--mosaic",), ("--format", "jpeg")):
        out = own_flight / "-".join(("restored", *args))
        assert run("restore", "--archive", inside, "-o", out, "--workers", 0, *args).code == 0
    # any Zarr hierarchy, whatever its files are named
    save(own_flight / "other.zarr" / "x" / "1.png", 1)
    (own_flight / "other.zarr" / "zarr.json").write_text("{}")
    result = ingest(run, own_flight, inside, "--ratio", 16)
    assert (result.code, result.json["ingested"]) == (0, 0)
    assert result.json["skipped"] == FRAMES + FRAMES + 1 + FRAMES
    left_out = remarks(result)
    assert set(left_out.values()) == {"was written by archive restore and is no original"}
    assert len(left_out) == 2 * FRAMES + 1
    assert f"is no original (and {2 * FRAMES} like it" in result.err
    # the same where nothing is known yet, and where files must be copied to be looked into
    for place in (own_flight, f"local://{own_flight}"):
        fresh = own_flight.parent / f"fresh-{len(str(place))}.zarr"
        result = ingest(run, place, fresh, "--ratio", 16)
        assert (result.code, result.json["ingested"]) == (0, FRAMES)
        assert len(remarks(result)) == 2 * FRAMES + 1
    for place in (inside, f"local://{inside}"):
        with pytest.raises(FlightError, match="a Zarr hierarchy"):
            find_images(location(str(place)))


# ---------------------------------------------------------------- sidecars


def tab(name: str) -> str:
    corners = ((1000, 2000, 0, 0), (1020, 2000, 40, 0), (1020, 1985, 40, 30), (1000, 1985, 0, 30))
    points = ",\n".join(f'({x},{y}) ({c},{r}) Label "{c}{r}"' for x, y, c, r in corners)
    return (
        f'!table\n!version 300\nDefinition Table\n  File "{name}"\n  Type "RASTER"\n{points}\n'
        'CoordSys Earth Projection 8, 104, "m", -93, 0, 0.9996, 500000, 0\nUnits "m"\n'
    )


def candidates() -> Iterator[tuple[str, str]]:
    """Images' extensions, and what might be beside them."""
    for extension in (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"):
        letters = extension[1:]
        world = (f".{letters[0]}{letters[-1]}w", f".{letters}w", ".wld", ".WLD")
        other = (".tab", ".prj", ".rpb", ".imd", ".rpc", ".pvl", "_RPC.TXT", ".map", ".hdr")
        for ending in (*world, *other, f"{extension}.aux.xml", f"{extension}.msk", ".aux.xml"):
            yield extension, ending


def test_sidecars_are_those_that_gdal_takes(tmp_path: Path) -> None:
    plain: dict[str, tuple[bool, list[str]]] = {}
    for number, (extension, ending) in enumerate([*candidates()]):
        image = save(tmp_path / str(number) / f"Bild{extension}", 1)
        if extension not in plain:
            with rasterio.open(image) as dataset:
                plain[extension] = dataset.transform.is_identity, dataset.files
        text = tab(image.name) if ending == ".tab" else WORLD.format(325000)
        text = AUX if ending.endswith(".aux.xml") else text
        beside = image.with_name("Bild" + ending)
        beside.write_text(text)
        if ending.endswith(".msk"):
            save(beside.with_suffix(".tif"), 2).replace(beside)
        with rasterio.open(image) as dataset:
            used = not dataset.transform.is_identity or len(dataset.files) > 1
        used |= ending == ".prj" and extension in WORLD_FILES  # read by `read_source`
        (file,) = find_images(image.parent)
        found = [sidecar.ending for sidecar in file.sidecars]
        assert found == ([ending] if used else []), (extension, ending)
    assert all(identity and len(files) == 1 for identity, files in plain.values())


def test_sidecars_go_with_a_copy(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "100% tiles #1"
    for name, ending in (
        ("a.png", ".pgw"),
        ("Ünï 写.jpg", ".JGW"),
        ("b%20c.jpeg", ".wld"),
        ("x" * 150 + ".tif", ".tab"),
        ("d.webp", ".webp.aux.xml"),
    ):
        image = save(folder / name, len(name))
        text = tab(name) if ending == ".tab" else WORLD.format(325000)
        if ending.endswith("xml"):
            text = AUX.replace("</PAM", "<GeoTransform>1,2,0,3,0,-2</GeoTransform></PAM")
        image.with_name(image.stem + ending).write_text(text)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False):
        masked = save(folder / "m.tif", 8)
        with rasterio.open(masked, "r+") as dataset:
            dataset.write_mask(np.eye(30, 40) > 0)
    records = []
    for place in (folder, f"local://{folder}"):
        url = tmp_path / f"{len(records)}.zarr"
        result = ingest(run, place, url)
        assert (result.code, result.json["ingested"]) == (0, 6), result.err
        # the source's path is stored, too, and one of them is longer
        kept = [{**entry.record, "archive_bytes": 0} for entry in Archive.open(url).images()]
        records.append(kept)
        assert run("check", "--archive", url).code == 0
    local, remote = records
    assert local == remote
    located = {record["id"]: record["georef"]["transform"] for record in local}
    assert [id for id, transform in located.items() if transform is None] == ["m.tif"]
    assert {record["mask"] for record in local if record["id"] == "m.tif"} == {"mask"}


@pytest.mark.parametrize("remote", [False, True])
def test_an_edited_sidecar_is_an_edited_image(
    run: Run, folder: Path, url: Path, remote: bool
) -> None:
    place = f"local://{folder}" if remote else folder
    save(folder / "a.png", 1)
    (folder / "a.pgw").write_text(WORLD.format(325000))
    save(folder / "b.png", 2)
    assert ingest(run, place, url).json["ingested"] == 2
    assert ingest(run, place, url).json["skipped"] == 2
    (folder / "a.pgw").write_text(WORLD.format(325100))
    (folder / "b.pgw").write_text(WORLD.format(325200))
    result = ingest(run, place, url)
    assert (result.code, result.json["skipped"]) == (3, 0)
    assert remarks(result) == {
        f"beach/{name}.png": f"its sidecar files have changed since it was archived (there are: "
        f"{name}.pgw); use --overwrite to archive it with them"
        for name in "ab"
    }
    assert ingest(run, place, url, "--overwrite").json["ingested"] == 2
    west = [entry.record["georef"]["transform"][2] for entry in Archive.open(url).images()]
    assert west == [325099.75, 325199.75]
    assert ingest(run, place, url).json["skipped"] == 2
    (folder / "a.pgw").unlink()
    (error,) = remarks(ingest(run, place, url)).values()
    assert "(there are: none)" in error


def test_equal_bytes_elsewhere_on_the_ground(run: Run, folder: Path, url: Path) -> None:
    """Tiles of a map that show nothing."""
    for number in range(3):
        save(folder / f"{number}.png", 1)
        (folder / f"{number}.pgw").write_text(WORLD.format(325000 + 20 * number))
    assert ingest(run, folder, url).json["ingested"] == 3
    assert ingest(run, folder, url).json["skipped"] == 3
    (folder / "2.png").rename(folder / "new.png")
    (folder / "2.pgw").rename(folder / "new.pgw")
    result = ingest(run, folder, url)
    assert remarks(result) == {"beach/new.png": "has the same bytes as beach/2.png"}
    assert len(stored(url)) == 3


def test_images_of_earlier_releases_are_known(run: Run, folder: Path, url: Path) -> None:
    for number in range(2):
        save(folder / f"{number}.png", number)
        (folder / f"{number}.pgw").write_text(WORLD.format(325000))
    assert ingest(run, folder, url).json["ingested"] == 2
    for entry in list(Archive.open(url).images()):
        path = url / entry.key / "zarr.json"
        group = json.loads(path.read_text())
        del group["attributes"]["archive_pipeline"]["sidecars"]
        path.write_text(json.dumps(group))
    assert ingest(run, folder, url).json["skipped"] == 2
    # with the bytes of another's image, it may lie elsewhere
    shutil.copy(folder / "0.png", folder / "2.png")
    (folder / "2.pgw").write_text(WORLD.format(325040))
    assert ingest(run, folder, url).json["ingested"] == 1


def test_a_sidecar_of_a_url_that_is_no_text(run: Run, folder: Path, url: Path) -> None:
    save(folder / "a.png", 1)
    with open(folder / "a.pgw", "wb") as file:
        file.truncate(65 << 20)
    result = ingest(run, f"local://{folder}", url)
    assert remarks(result) == {"beach/a.png": "its sidecar a.pgw has 68157440 bytes"}


def test_names_of_sidecars() -> None:
    assert list(endings("a.JPG")) == [
        ".jpg.aux.xml", ".jpg.aux", ".jpg.msk", ".jgw", ".jpgw", ".wld", ".prj", ".aux", ".tab",
    ]  # fmt: skip
    assert list(endings("a.webp")) == [".webp.aux.xml", ".webp.aux", ".webp.msk", ".aux"]


def test_paths_recorded_in_any_way(run: Run, folder: Path, url: Path) -> None:
    save(folder / "100MEDIA" / "1.tif", 1)
    assert ingest(run, folder / "100MEDIA", url, "--flight", "beach").code == 0
    (entry,) = Archive.open(url).images()
    assert str(ArchivedImage(Archive.open(url), entry).source.path).endswith("100MEDIA/1.tif")
    save(folder / "100MEDIA" / "1.tif", 2)
    (error,) = remarks(ingest(run, folder, url)).values()
    assert "--overwrite" in error


def test_another_folders_file_of_the_same_name_is_not_an_earlier_one(
    run: Run, tmp_path: Path
) -> None:
    for day, seed in (("day1", 1), ("day2", 2)):
        folder = tmp_path / day / "100MEDIA"
        folder.mkdir(parents=True)
        pixels = np.random.default_rng(seed).integers(0, 60_000, (40, 50), np.uint16)
        Image.fromarray(pixels).save(folder / "D1.png")
    url = tmp_path / "a.zarr"
    args = ("--archive", url, "--workers", 0, "--json")
    assert run("ingest", tmp_path / "day1" / "100MEDIA", *args).code == 0
    before = run("info", "--archive", url, "--json").json
    for more in ((), ("--overwrite",)):
        result = run("ingest", tmp_path / "day2" / "100MEDIA", *args, *more)
        assert result.code == 3
        assert "--flight" in result.json["failed"][0]["error"]
        assert run("info", "--archive", url, "--json").json == before


def test_a_relative_flight_is_overwritten_from_the_same_directory(
    run: Run, flight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").mkdir()
    for name in ("DJI_0001.JPG", "DJI_0002.JPG"):
        shutil.copy(flight / name, "s")
    args = ("ingest", "s", "--archive", "a.zarr", "--ratio", 16, "--workers", 0, "--json")
    assert run(*args).json["ingested"] == 2
    shutil.copy(flight / "DJI_0003.JPG", "s/DJI_0001.JPG")
    assert run(*args).code == 3
    done = run(*args, "--overwrite")
    assert (done.code, done.json["ingested"]) == (0, 2), done.err
