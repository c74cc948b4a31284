"""Where restore writes: never over what is there, over originals or inside the archive."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import Run, make_flight
from PIL import Image, ImageOps

import archive_pipeline as ap
from archive_pipeline.errors import UsageError
from archive_pipeline.flight.restored_tag import is_restored

FLIGHTS = "one", "two"
BOX = ("--bbox", -94.7965, 29.284, -94.7955, 29.285)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two flights with the same names of images, and their archive; not to be changed.

    So small that they are kept losslessly, which decodes at once.
    """
    folder = tmp_path_factory.mktemp("made")
    from archive_pipeline.jobs.ingest import ingest
    from archive_pipeline.jobs.ingest_task import Budget, IngestOptions

    for seed, name in enumerate(FLIGHTS):
        *_, ortho = make_flight(folder / name, 2, 96, 64, seed)
        ortho.unlink()
    flights = [(name, folder / name) for name in FLIGHTS]
    ingest(str(folder / "a.zarr"), flights, IngestOptions(Budget(ratio=100)), workers=0)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of the flights and the archive."""
    return Path(shutil.copytree(made, tmp_path / "place"))


def contents(folder: Path) -> dict[str, str]:
    """Every file and link below a folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def restore(run: Run, place: Path, out: Path, *args: object):  # type: ignore[no-untyped-def]
    return run("restore", "--archive", place / "a.zarr", "-o", out, "--workers", 0, "--json", *args)


def test_flights_lie_apart_whatever_is_asked_for(run: Run, made: Path, tmp_path: Path) -> None:
    for name in FLIGHTS:  # one after the other
        result = restore(run, made, tmp_path / "each", "--flight", name)
        assert result.code == 0, result.err
    assert restore(run, made, tmp_path / "both").code == 0
    assert contents(tmp_path / "each") == contents(tmp_path / "both")
    found = {str(p.relative_to(tmp_path / "both")) for p in (tmp_path / "both").rglob("*.tif")}
    assert found == {f"{f}/DJI_000{n}.JPG.tif" for f in FLIGHTS for n in (1, 2)}


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
@pytest.mark.parametrize("at", ["recorded", "copied", "linked folder", "links", "hard links"])
def test_originals_stay(run: Run, place: Path, tmp_path: Path, at: str, more: tuple) -> None:
    out = place
    if at != "recorded":  # their content tells, wherever they are
        out = tmp_path / "out"
        out.mkdir()
    for name in FLIGHTS:
        if at == "copied":
            shutil.copytree(place / name, out / name)
        elif at == "linked folder":
            (out / name).symlink_to(place / name)
        elif at in ("links", "hard links"):
            (out / name).mkdir()
            for frame in (place / name).iterdir():
                (out / name / frame.name).symlink_to(frame) if at == "links" else os.link(
                    frame, out / name / frame.name
                )
    before = contents(tmp_path)
    result = restore(run, place, out, "--format", "jpeg", *more)
    assert result.code == 1
    assert contents(tmp_path) == before
    assert result.json["files"] == []
    names = [failed["image"] for failed in result.json["failed"]]
    assert names == [f"{f}/DJI_000{n}.JPG" for f in FLIGHTS for n in (1, 2)]
    for failed in result.json["failed"]:
        assert failed["error"].startswith(f"{failed['image']}: ")
        assert ("never replaced" if more else "already there") in failed["error"]


def test_what_is_there_stays_without_overwrite(run: Run, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "one").mkdir(parents=True)
    (out / "one" / "DJI_0001.JPG").write_text("somebody's")
    (out / "two").mkdir()
    (out / "two" / "DJI_0002.JGW").write_text("somebody's")
    result = restore(run, made, out, "--format", "jpeg")
    assert result.code == 3
    assert [f["image"] for f in result.json["failed"]] == ["one/DJI_0001.JPG", "two/DJI_0002.JPG"]
    assert len(result.json["files"]) == 2
    assert f"Failed: one/DJI_0001.JPG: {out}/one/DJI_0001.JPG is already there" in result.err
    assert (out / "one" / "DJI_0001.JPG").read_text() == "somebody's"
    assert (out / "two" / "DJI_0002.JGW").read_text() == "somebody's"
    assert not (out / "two" / "DJI_0002.JPG").exists()
    before = contents(out)
    again = restore(run, made, out, "--format", "jpeg")
    assert (again.code, len(again.json["failed"])) == (1, 4)
    assert contents(out) == before
    result = restore(run, made, out, "--format", "jpeg", "--overwrite")  # not what is somebody's
    assert (result.code, len(result.json["files"])) == (3, 3)
    reason = "was not written by archive restore, and is never replaced: move it away"
    assert result.json["failed"][0]["error"].endswith(reason)
    assert (out / "one" / "DJI_0001.JPG").read_text() == "somebody's"
    (out / "one" / "DJI_0001.JPG").unlink()
    result = restore(run, made, out, "--format", "jpeg", "--overwrite")
    assert (result.code, len(result.json["files"])) == (0, 4)
    assert all(is_restored(Path(file["path"])) for file in result.json["files"])
    assert "somebody's" not in (out / "two" / "DJI_0002.JGW").read_text()
    assert not [p for p in out.rglob("*") if ".restore-" in p.name]


def test_what_killed_processes_left_goes_and_what_is_in_use_stays(
    run: Run, made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code = (
        "import time; from pathlib import Path\n"
        "from archive_pipeline.outputs.publish import workdir\n"
        f"with workdir(Path({str(out / 'one' / 'x.tif')!r})) as work:\n"
        "    (work / 'stage.tif').write_text('half')\n"
        "    print(work, flush=True); time.sleep(600)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    killed, busy = (Path(str(p.stdout and p.stdout.readline()).strip()) for p in running)
    running[0].kill()
    running[0].wait()
    try:
        assert restore(run, made, out).code == 0
        assert not killed.exists()
        assert (busy / "stage.tif").read_text() == "half"
    finally:
        running[1].kill()
        running[1].wait()


def test_overwrite_spares_what_was_edited_since(run: Run, place: Path) -> None:
    frame = place / "one" / "DJI_0001.JPG"
    with Image.open(frame) as image:
        ImageOps.invert(image).save(frame, exif=image.info["exif"])
    before = contents(place)
    result = restore(run, place, place, "--format", "jpeg", "--overwrite")
    assert result.code == 1
    assert "DJI_0001.JPG was not written by archive restore" in result.json["failed"][0]["error"]
    assert contents(place) == before


def test_a_url_is_no_folder(run: Run, made: Path, tmp_path: Path) -> None:
    for output in ("s3://bucket/there", "file:///tmp/there"):
        said = run("restore", "--archive", made / "a.zarr", "-o", output)
        assert said.code == 2
        assert "it is written to a folder of this machine" in said.err
        with pytest.raises(UsageError, match="is a URL"):
            ap.restore(str(made / "a.zarr"), output=output)
    assert not Path("s3:").exists()


def test_nothing_is_written_inside_the_archive(run: Run, place: Path, tmp_path: Path) -> None:
    url = place / "a.zarr"
    (tmp_path / "link").symlink_to(url / "flights")
    before = contents(tmp_path)
    for out in (url, url / "out", tmp_path / "link" / "new", place / "one" / ".." / "a.zarr"):
        for more in ((), ("--mosaic",), ("--overwrite",), BOX):
            result = restore(run, place, out, *more)
            assert (result.code, result.out) == (1, "")
            assert result.err == f"Error: {out} is inside the archive {url}; choose another -o\n"
    assert run("restore", "--archive", url.as_uri(), "-o", url).code == 1
    assert run("restore", "--archive", f"local://{url}", "-o", url).code == 1
    assert contents(tmp_path) == before


def test_no_flight_is_written_into_the_archive_beside_it(
    run: Run, place: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (place / "a.zarr").rename(tmp_path / "out" / "one")
    (tmp_path / "out" / "two").symlink_to("one/flights")
    before = contents(tmp_path)
    url = tmp_path / "out" / "one"
    result = run("restore", "--archive", url, "-o", tmp_path / "out", "--workers", 0, "--json")
    assert (result.code, len(result.json["failed"])) == (1, 4)
    assert all("inside the archive" in failed["error"] for failed in result.json["failed"])
    assert contents(tmp_path) == before


def test_a_mosaic_stays_too(run: Run, made: Path, tmp_path: Path) -> None:
    (tmp_path / "mosaic.tif.aux.xml").write_text("somebody's")
    result = restore(run, made, tmp_path, "--mosaic")
    assert (result.code, result.out) == (1, "")
    assert "mosaic.tif.aux.xml is already there (--overwrite replaces it)" in result.err
    assert os.listdir(tmp_path) == ["mosaic.tif.aux.xml"]
    assert restore(run, made, tmp_path, "--mosaic", "--overwrite").code == 0
    assert os.listdir(tmp_path) == ["mosaic.tif"]
    assert restore(run, made, tmp_path, "--mosaic").code == 1


def test_a_mosaic_is_no_original_of_the_archive(run: Run, made: Path, tmp_path: Path) -> None:
    flight = tmp_path / "ortho"
    flight.mkdir()
    profile = {"driver": "GTiff", "width": 40, "height": 30, "count": 1, "dtype": "uint16"}
    where = {"crs": "EPSG:32615", "transform": rasterio.Affine(1, 0, 3e5, 0, -1, 3e6)}
    with rasterio.open(flight / "mosaic.tif", "w", **profile, **where) as out:
        out.write(np.arange(1200, dtype=np.uint16).reshape(1, 30, 40))
    url = tmp_path / "b.zarr"
    assert run("ingest", flight, "--archive", url, "--workers", 0).code == 0
    before = contents(flight)
    args = ("restore", "--archive", url, "-o", flight, "--mosaic", "--overwrite")
    result = run(*args)
    assert result.code == 1
    assert "is the original of ortho/mosaic.tif, which is never replaced" in result.err
    assert contents(flight) == before


def test_nothing_matches(run: Run, made: Path, tmp_path: Path) -> None:
    for more in ((), ("--mosaic",)):
        args = ("--bbox", 10, 10, 11, 11, *more)
        result = restore(run, made, tmp_path / "out", *args)
        assert (result.code, result.json["files"]) == (0, [])
        result = run("restore", "--archive", made / "a.zarr", "-o", tmp_path / "out", *args)
        assert (result.code, result.out) == (0, "")
        said = "Nothing in the archive matches; its images lie within -94.7969 29.2836 "
        assert result.err.startswith(said)
        assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_resolution_and_crs_of_a_mosaic(run: Run, made: Path, tmp_path: Path) -> None:
    args = ("--mosaic", "--resolution", 0.5, "--crs", "EPSG:3857")
    result = restore(run, made, tmp_path, *args)
    assert result.code == 0, result.err
    (file,) = result.json["files"]
    assert (file["crs"], file["transform"][0]) == ("EPSG:3857", 0.5)
    with rasterio.open(file["path"]) as dataset:
        assert dataset.crs.to_epsg() == 3857
        assert dataset.transform.a == -dataset.transform.e == 0.5
    result = restore(run, made, tmp_path / "x", "--mosaic", "--resolution", 1e-9)
    assert result.code == 1
    assert "coarser resolution" in result.err
    result = restore(run, made, tmp_path / "y", "--mosaic", "--resolution", 1e9)
    assert result.code == 1
    assert "no image has valid pixels" in result.err


Change = Callable[[Path], None]
DAMAGES: dict[str, Change] = {
    "record": lambda image: (image / "zarr.json").write_text("{"),  # type: ignore[dict-item]
    "metadata": lambda image: (image / "metadata/c/0").write_bytes(b"?"),  # type: ignore[dict-item]
    "tile": lambda image: (image / "pixels/c/0/0/0").write_bytes(b"?" * 99),  # type: ignore[dict-item]
    "array": lambda image: (image / "pixels/zarr.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_image_is_left_out_of_the_mosaic(
    run: Run, place: Path, tmp_path: Path, damage: str
) -> None:
    flight = ("--mosaic", "--resolution", 1, "--flight", "one")
    other = ("--image", "DJI_0002.JPG")
    assert restore(run, place, tmp_path / "alone", *flight, *other).code == 0
    DAMAGES[damage](place / "a.zarr/flights/one/DJI_0001.JPG")
    result = restore(run, place, tmp_path / "out", *flight)
    assert result.code == 3, result.err
    (failed,) = result.json["failed"]
    assert failed["image"] == "one/DJI_0001.JPG"
    assert "DJI_0001.JPG" in failed["error"]
    (file,) = result.json["files"]
    assert file["image"] == ["DJI_0002.JPG"]
    with rasterio.open(file["path"]) as got, rasterio.open(tmp_path / "alone/mosaic.tif") as want:
        window = got.window(*want.bounds)
        assert np.array_equal(got.dataset_mask(window=window), want.dataset_mask())
        assert np.array_equal(got.read(window=window), want.read())
        assert np.count_nonzero(got.dataset_mask()) == np.count_nonzero(want.dataset_mask())
    # None is left: nothing is written, and what failed is named.
    only = restore(run, place, tmp_path / "none", *flight, "--image", "DJI_0001.JPG")
    assert (only.code, only.json["files"]) == (1, [])
    assert [f["image"] for f in only.json["failed"]] == ["one/DJI_0001.JPG"]
    assert not list(tmp_path.glob("none/*"))
