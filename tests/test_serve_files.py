"""What `archive serve` gives of single images, and what can be taken away."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import HEIGHT, WIDTH, Run
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image
from test_serve import client_of

import archive_pipeline as ap
from archive_pipeline.serving import _original_files

IMAGE = "/flights/beach/images/DJI_0002.JPG"


@pytest.fixture(scope="module")
def client(archive: Path) -> Iterator[TestClient]:
    with client_of(archive) as client:
        yield client


def pixels_of(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_window_is_what_python_reads(client: TestClient, archive: Path) -> None:
    image = ap.open(archive)["DJI_0002.JPG"]
    part = client.get(f"{IMAGE}/window.png?window=600,10,100,50")
    assert np.array_equal(pixels_of(part.content), image.read((600, 10, 100, 50)).values)
    small = client.get(f"{IMAGE}/window.png?max_size=90")
    assert np.array_equal(pixels_of(small.content), image.read(max_size=90).values)
    assert pixels_of(client.get(f"{IMAGE}/window.webp").content).shape == (HEIGHT, WIDTH, 3)


def test_files_are_what_restore_writes(
    client: TestClient, archive: Path, run: Run, tmp_path: Path
) -> None:
    for ext, format in (("tif", "gtiff"), ("jpg", "jpeg"), ("png", "png")):
        out = tmp_path / ext
        done = run(
            *("restore", "--archive", archive, "-o", out, "--image", "DJI_0002.JPG"),
            *("--format", format),
        )
        assert done.code == 0
        (path,) = [p for p in out.rglob("DJI*") if p.suffix.lower() == f".{ext}"]
        answer = client.get(f"{IMAGE}/file.{ext}")
        assert answer.content == path.read_bytes()
        assert path.name in answer.headers["content-disposition"]
    part = client.get(f"{IMAGE}/window.tif?window=100,20,64,32&max_size=16")
    with rasterio.io.MemoryFile(part.content) as memory, memory.open() as file:
        assert (file.width, file.height) == (16, 8)
        own = ap.open(archive)["DJI_0002.JPG"].read((100, 20, 64, 32), max_size=16)
        assert tuple(file.transform)[:6] == pytest.approx(own.transform)


def test_an_original_beside_what_is_archived(client: TestClient, flight: Path) -> None:
    assert client.get(IMAGE).json()["original"] is True
    area = (100, 20, 164, 52)
    given = pixels_of(client.get(f"{IMAGE}/original.png?window=100,20,64,32").content)
    true = np.asarray(Image.open(flight / "DJI_0002.JPG").crop(area))
    assert np.abs(given.astype(int) - true).mean() < 2  # decoders differ by a level
    small = pixels_of(client.get(f"{IMAGE}/original.jpg?max_size=90").content)
    assert small.shape == pixels_of(client.get(f"{IMAGE}/window.jpg?max_size=90").content).shape


def test_an_original_that_changed_is_none(archive: Path, own_flight: Path) -> None:
    with client_of(archive, originals=own_flight) as client:
        assert client.get(f"{IMAGE}/original.jpg").status_code == 200
        path = own_flight / "DJI_0002.JPG"
        path.write_bytes(path.read_bytes() + b"\0")
        assert client.get(IMAGE).json()["original"] is False
        answer = client.get(f"{IMAGE}/original.jpg")
        assert answer.status_code == 404
        assert str(own_flight) not in answer.text
        path.unlink()
        os.mkfifo(path)
        assert client.get(f"{IMAGE}/original.jpg").status_code == 404


def test_originals_may_go_while_they_are_shown(
    archive: Path, own_flight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_original_files, "LOOK_EVERY", 0.0)
    with client_of(archive, originals=own_flight) as client:
        assert client.get(IMAGE).json()["original"] is True
        for path in own_flight.iterdir():
            path.unlink()
        assert client.get(IMAGE).json()["original"] is False
        assert client.get(f"{IMAGE}/original.png").status_code == 404
        own_flight.rmdir()
        assert client.get(IMAGE).json()["original"] is False


def test_a_box_as_geotiff(client: TestClient, archive: Path, run: Run, tmp_path: Path) -> None:
    west, south, east, north = client.get("/api").json()["bounds"]
    box = (west, south, (west + east) / 2, (south + north) / 2)
    done = run(
        *("restore", "--archive", archive, "-o", tmp_path, "--mosaic", "--bbox", *box),
        *("--resolution", 0.1),
    )
    assert done.code == 0
    listed = ",".join(map(repr, box))
    answer = client.get(f"/mosaic.tif?bbox={listed}&resolution=0.1")
    assert hashlib.sha256(answer.content).digest() == (
        hashlib.sha256((tmp_path / "mosaic.tif").read_bytes()).digest()
    )
    assert client.get("/mosaic.tif?bbox=0,0,1,1").status_code == 404
    fine = client.get(f"/mosaic.tif?bbox={listed}&resolution=1e-9")
    assert fine.status_code == 422
    assert "megapixels" in fine.json()["detail"]


def test_a_boxs_frames(client: TestClient, flight: Path) -> None:
    answer = client.get("/frames.zip?flight=beach")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as file:
        assert file.testzip() is None
        names = [f"beach/DJI_000{n}.JPG" for n in (1, 2, 3)]
        assert file.namelist() == names
        exif = Image.open(io.BytesIO(file.read(names[0]))).getexif()
        assert dict(exif) == dict(Image.open(flight / "DJI_0001.JPG").getexif())
    assert client.get("/frames.zip?flight=none").status_code == 404
    assert client.get("/frames.zip?bbox=0,0,1,1").status_code == 404


def test_frames_that_are_damaged_are_named(own_archive: Path) -> None:
    shutil.rmtree(own_archive / "flights" / "beach" / "DJI_0002.JPG" / "pixels" / "c")
    with client_of(own_archive) as client:
        data = client.get("/frames.zip").content
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            assert len(file.namelist()) == 3
            assert b"DJI_0002.JPG" in file.read("FAILED.txt")
        answer = client.get(f"{IMAGE}/window.png")
        assert answer.status_code == 500
        assert "DJI_0002.JPG" in answer.json()["detail"]
        assert client.get(f"{IMAGE.replace('2.JPG', '1.JPG')}/window.png").status_code == 200
        site = client.app.state.site  # type: ignore[attr-defined]
        assert not os.listdir(site.temporary.name)


@pytest.mark.parametrize(
    "query",
    [
        "window=0,0,10",
        "window=-1,0,10,10",
        f"window=0,0,{WIDTH + 1},10",
        "window=0,0,0,0",
        "window=1e9,0,1,1",
        "window=nan,0,1,1",
        "max_size=0",
        "max_size=1000000000",
        "max_size=x",
        "steps=2",
        "steps=-1",
    ],
)
@pytest.mark.parametrize("ext", ["png", "tif"])
def test_what_is_no_window_is_told_in_one_line(client: TestClient, query: str, ext: str) -> None:
    answer = client.get(f"{IMAGE}/window.{ext}?{query}")
    assert answer.status_code == 422
    assert len(answer.json()["detail"].splitlines()) == 1
