"""`archive serve` when things change, break or are hostile."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import subprocess
import threading
import time
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from conftest import Run
from fastapi.testclient import TestClient
from PIL import Image
from s3_server import S3Server
from test_s3 import s3  # noqa: F401  a fixture
from test_serve import LOCAL, client_of, served  # noqa: F401  a fixture
from test_serve_tiles import pixels_of, tile_at

from archive_pipeline.errors import UsageError
from archive_pipeline.serving import site
from archive_pipeline.serving.app import make_app
from archive_pipeline.serving.options import ServeOptions
from archive_pipeline.serving.windows import size_of

IMAGE = "/flights/beach/images/DJI_0002.JPG"
NAMES = [
    "../../../../etc/passwd",
    "..",
    ".",
    "",
    "DJI_0002.JPG/../DJI_0001.JPG",
    "DJI_0002.JPG\0",
    "%2e%2e%2f",
    "\udcff\udcfe",
    "\u202e\U0001f4a3",
    "x" * 3000,
    "zarr.json",
    "<img src=x onerror=alert(1)>",
    "con",
    "DJI_0002.JPG?x=y#z",
    "*",
    "{flight}",
    "' or 1=1 --",
]


@pytest.fixture(scope="module")
def client(archive: Path) -> Iterator[TestClient]:
    with client_of(archive) as client:
        yield client


@dataclass
class Disk:
    """A folder of temporary files."""

    name: str


def quoted(name: str) -> str:
    return quote(name, safe="", errors="surrogateescape")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_that_are_not_there(client: TestClient, name: str) -> None:
    for path in (
        f"/flights/{quoted(name)}/images",
        f"/flights/{quoted(name)}/images/DJI_0001.JPG",
        f"/flights/beach/images/{quoted(name)}",
        f"/flights/beach/images/{quoted(name)}/window.png",
        f"/flights/beach/images/{quoted(name)}/original.png",
        f"/flights/beach/images/{quoted(name)}/file.jpg",
        f"/flights/beach/images/{quoted(name)}/tiles/1/0/0.png",
        f"/flights/{quoted(name)}/tiles/1/0/0.png",
        f"/mosaic.tif?bbox=-180,-90,180,90&flight={quoted(name)}",
        f"/page/{quoted(name)}",
    ):
        answer = client.get(path)
        # a name that is none leads to lists, as one with dots that a client has resolved
        if answer.status_code == 200:
            assert name in ("", ".", ".."), path
            continue
        assert answer.status_code in (404, 405, 422), (path, answer.text)
        assert len(answer.json()["detail"].splitlines()) == 1
    for path in ("/images?text=", "/images?after=", "/images?flight=", "/footprints?flight="):
        answer = client.get(path + quoted(name))
        assert answer.status_code in (200, 422), (path, answer.text)


def test_nothing_can_be_changed(client: TestClient) -> None:
    for method in ("PUT", "DELETE", "PATCH", "TRACE"):
        assert client.request(method, IMAGE).status_code == 405
    assert client.post(IMAGE).status_code == 405
    for path in (IMAGE, f"{IMAGE}/window.png?max_size=8", "/none"):
        head, whole = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (whole.status_code, b"")
        assert head.headers["content-length"] == whole.headers["content-length"]
    assert client.get("/" + "x" * 10_000).status_code == 414


def test_browsers_are_told_to_load_nothing_from_elsewhere(archive: Path) -> None:
    with client_of(archive, background="https://tiles.example/{z}/{x}/{y}.png") as client:
        for path in ("/api", "/none", "/tiles/0/0/0.png", "/tiles/99/0/0.png"):
            headers = client.get(path).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "img-src 'self' data: blob: https://tiles.example;" in policy
            assert headers["x-content-type-options"] == "nosniff"
            assert "access-control-allow-origin" not in headers
        assert client.get("/api", headers={"Host": "evil.example"}).status_code == 421
        assert client.get("/api", headers={"Host": "localhost:1"}).status_code == 200
        assert client.get("/api", headers={"Host": "[::1]:8000"}).status_code == 200
        assert client.get("/api", headers={"Host": "[::1"}).status_code == 421


def test_odd_names_are_told_as_they_are(flight: Path, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    names = ["<img src=x onerror=alert(1)>.JPG", "a b%2F\u00e9\U0001f4a3.JPG"]
    for name, path in zip(names, sorted(flight.glob("*.JPG")), strict=False):
        try:
            shutil.copy(path, folder / name)
        except OSError:
            pytest.skip("the file system takes no such name")
    url = tmp_path / "odd.zarr"
    done = run(
        *("ingest", folder, "--archive", url, "--ratio", 16, "--workers", 0),
        *("--flight", "a/b <c>"),
    )
    assert done.code == 0, done.err
    with client_of(url) as client:
        listed = client.get("/images").json()["images"]
        assert sorted(i["id"] for i in listed) == sorted(names)
        for image in listed:
            told = client.get(image["href"])
            assert told.json()["id"] == image["id"]
            assert client.get(image["href"] + "/window.png?max_size=8").status_code == 200
        (flight_,) = client.get("/flights").json()
        assert client.get(flight_["href"] + "/images").json()["matched"] == 2
        capabilities = client.get("/WMTSCapabilities.xml").text
        assert "<c>" not in capabilities
        layer = flight_["href"][1:]
        path = f"/wmts?request=GetTile&layer={quoted(layer)}&tilematrix=0&tilerow=0&tilecol=0"
        assert client.get(path).status_code == 200
        assert client.get("/footprints").status_code == 200


def test_what_is_removed_and_added_is_seen(own_archive: Path, flight: Path, run: Run) -> None:
    with client_of(own_archive) as client:
        before = client.get(IMAGE)
        assert before.status_code == 200
        tile = client.get("/tiles/10/0/0.png").headers["etag"]
        assert run("remove", "beach", "DJI_0002.JPG", "--archive", own_archive, "--yes").code == 0
        assert client.get(IMAGE).status_code == 404
        time.sleep(1.1)
        assert client.get("/api").json()["images"] == 2
        args = ("ingest", flight, "--archive", own_archive, "--workers", 0)
        assert run(*args, "--ratio", 16).code == 0
        assert client.get(IMAGE).status_code == 200
        time.sleep(1.1)
        assert client.get("/api").json()["images"] == 3
        assert client.get("/tiles/10/0/0.png").headers["etag"] == tile  # nothing is there


def test_an_image_that_is_overwritten_shows_up(flight: Path, run: Run, tmp_path: Path) -> None:
    folder, url = tmp_path / "beach", tmp_path / "own.zarr"
    folder.mkdir()
    path = Path(shutil.copy(flight / "DJI_0002.JPG", folder))
    args = ("ingest", folder, "--archive", url, "--workers", 0, "--ratio", 16)
    assert run(*args).code == 0
    with client_of(url) as client:
        west, south, east, north = client.get(IMAGE).json()["bbox"]
        x, y = tile_at((west + east) / 2, (south + north) / 2, 20)
        paths = [f"{IMAGE}/window.png", f"{IMAGE}/tiles/20/{x}/{y}.png", f"/tiles/20/{x}/{y}.png"]
        before = [client.get(path) for path in paths]
        picture = Image.open(path)
        black = Image.new("RGB", picture.size)
        black.save(path, exif=picture.info["exif"], xmp=picture.info["xmp"])
        assert run(*args, "--overwrite").code == 0
        time.sleep(1.1)
        for where, old in zip(paths, before, strict=True):
            new = client.get(where, headers={"If-None-Match": old.headers["etag"]})
            assert new.status_code == 200
            assert pixels_of(new.content)[..., :3].max() < 30 < pixels_of(old.content).max()


def test_an_archive_that_is_away_comes_back(own_archive: Path) -> None:
    away = own_archive.with_name("away.zarr")
    with client_of(own_archive) as client:
        assert client.get(f"{IMAGE}/window.png?max_size=64").status_code == 200
        own_archive.rename(away)
        time.sleep(1.1)
        for path in ("/api", "/flights", IMAGE, f"{IMAGE}/window.png", "/tiles/0/0/0.png"):
            answer = client.get(path)
            assert answer.status_code == 503, path
            assert int(answer.headers["retry-after"]) > 0
            assert len(answer.json()["detail"].splitlines()) == 1
        away.rename(own_archive)
        assert client.get(f"{IMAGE}/window.png").status_code == 200
        assert client.get("/api").json()["images"] == 3


@pytest.mark.parametrize("options", ["nr_inodes=1", "size=20k"])
def test_a_full_disk_is_busy_until_there_is_room(
    archive: Path, mounted: Callable[[str], Path], options: str
) -> None:
    disk = mounted(options)
    made = site.Site(ServeOptions(str(archive)))
    elsewhere = made.temporary
    app = make_app(made.options, made)
    with TestClient(app, base_url=LOCAL, raise_server_exceptions=False) as client:
        made.temporary = Disk(str(disk))  # type: ignore[assignment]
        for _ in range(site.MOST_SENT + 1 if "inodes" in options else 2):
            answer = client.get(f"{IMAGE}/window.tif?window=0,0,400,300")
            assert (answer.status_code, answer.json()["detail"]) == (503, site.NO_ROOM)
        zipped = client.get("/frames.zip?flight=beach")
        with zipfile.ZipFile(io.BytesIO(zipped.content)) as file:  # it says what is missing
            assert file.read("FAILED.txt").decode().count(site.NO_ROOM) == 3
        made.temporary = elsewhere
        assert client.get(f"{IMAGE}/window.tif?window=0,0,400,300").status_code == 200
    made.close()
    elsewhere.cleanup()


def test_a_damaged_tile_is_an_error_of_that_tile(own_archive: Path) -> None:
    shard = next((own_archive / "flights" / "beach" / "DJI_0002.JPG" / "pixels").rglob("0"))
    shard = shard if shard.is_file() else next(p for p in shard.rglob("*") if p.is_file())
    data = bytearray(shard.read_bytes())
    data[100:140] = bytes(40)
    shard.write_bytes(data)
    with client_of(own_archive) as client:
        broken = client.get(f"{IMAGE}/window.png")
        assert broken.status_code == 500
        assert "damaged tile at row 0 column 0" in broken.json()["detail"]
        assert client.get(f"{IMAGE}/window.png?window=650,0,60,60").status_code == 200
        west, south, east, north = client.get(IMAGE).json()["bbox"]
        statuses = Counter(
            client.get(f"{IMAGE}/tiles/21/{x}/{y}.png").status_code
            for x in range(tile_at(west, north, 21)[0], tile_at(east, north, 21)[0] + 1)
            for y in range(tile_at(west, north, 21)[1], tile_at(west, south, 21)[1] + 1)
        )
        assert statuses[500] >= 1
        assert statuses[200] >= 1
        assert set(statuses) == {200, 500}


def test_a_damaged_record_is_an_error_of_that_image(own_archive: Path) -> None:
    record = own_archive / "flights" / "beach" / "DJI_0002.JPG" / "zarr.json"
    record.write_text(record.read_text().replace('"width":', '"wide":'))
    with client_of(own_archive) as client:
        assert client.get("/api").json()["images"] == 2
        assert client.get("/api").json()["damaged"] == 1
        answer = client.get(IMAGE)
        assert answer.status_code == 500
        assert "damaged record" in answer.json()["detail"]
        assert client.get("/tiles/0/0/0.png").status_code == 200


def test_an_archive_in_memory(flight: Path, run: Run) -> None:
    url = "memory://served.zarr"
    assert run("ingest", flight, "--archive", url, "--ratio", 16, "--workers", 0).code == 0
    with client_of(url) as client:
        assert client.get("/api").json()["images"] == 3
        assert client.get(f"{IMAGE}/window.png?max_size=64").status_code == 200
        assert client.get(f"{IMAGE}/window.tif?max_size=64").status_code == 200
        assert client.get("/tiles/0/0/0.png").status_code == 200
        assert run("remove", "beach", "DJI_0002.JPG", "--archive", url, "--yes").code == 0
        time.sleep(1.1)
        assert client.get("/api").json()["images"] == 2


@pytest.mark.slow  # S3 clients try again for long
def test_a_bucket_that_is_away_comes_back(
    flight: Path,
    run: Run,
    s3: str,  # noqa: F811
    server: S3Server,
) -> None:
    assert run("ingest", flight, "--archive", s3, "--ratio", 16, "--workers", 0).code == 0
    with client_of(s3) as client:
        assert client.get("/api").json()["images"] == 3
        assert client.get(f"{IMAGE}/window.png?window=0,0,8,8").status_code == 200
        assert client.get("/tiles/0/0/0.png").status_code == 200
        server.refuse = lambda method, path: 503
        time.sleep(1.1)
        try:
            # lists are told from memory meanwhile
            assert client.get(f"{IMAGE}/window.png?window=0,0,9,9").status_code == 503
            started = time.monotonic()
            assert client.get(f"{IMAGE}/window.png?window=0,0,9,9").status_code == 503
            assert time.monotonic() - started < 1
        finally:
            server.refuse = lambda method, path: None
        time.sleep(4)
        assert client.get(f"{IMAGE}/window.png?window=0,0,9,9").status_code == 200
        assert client.get("/api").json()["images"] == 3
        assert client.get(f"{IMAGE}/window.png?window=0,0,9,9").status_code == 200


def crowd(url: str, paths: list[str], clients: int, seconds: float) -> Counter[int]:
    """Statuses of what so many clients ask for at once; 503s must say when to come back."""
    statuses: Counter[int] = Counter()
    told: list[str | None] = []
    until = time.monotonic() + seconds

    def ask(number: int) -> None:
        count = 0
        while count == 0 or time.monotonic() < until:
            path = paths[(number * 7 + count) % len(paths)]
            count += 1
            try:
                with urllib.request.urlopen(url + path, timeout=120) as answer:
                    answer.read()
                    statuses[answer.status] += 1
            except HTTPError as error:
                statuses[error.code] += 1
                told.append(error.headers["Retry-After"])
                time.sleep(0.2)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in told, statuses
    return statuses


def test_what_is_too_much_is_told_to_come_back(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "WAITING", 2)
    app = make_app(ServeOptions(str(archive)))

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=LOCAL) as client:
            paths = [f"{IMAGE}/window.png?window={n},0,300,300" for n in range(9)]
            found = await asyncio.gather(*map(client.get, paths))
            assert (await client.get(paths[0])).status_code == 200
            return list(found)

    answers = asyncio.run(ask())
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < 9
    for answer in refused:
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0


def test_many_clients_at_once(served: tuple[str, object]) -> None:  # noqa: F811
    url, _ = served
    west, south, east, north = json.load(urllib.request.urlopen(f"{url}api"))["bounds"]
    x, y = tile_at((west + east) / 2, (south + north) / 2, 19)
    paths = [f"tiles/19/{x + n % 3 - 1}/{y + n // 3 - 1}.png" for n in range(9)]
    paths += ["flights", "images", "footprints", f"{IMAGE[1:]}/window.jpg?max_size=100"]
    paths += [f"{IMAGE[1:]}/window.jpg?window={n},{n},200,200" for n in range(100)]
    statuses = crowd(url, paths, 200, 2)
    assert set(statuses) <= {200, 503}, statuses
    assert statuses[200] > 100
    assert json.load(urllib.request.urlopen(f"{url}api"))["images"] == 3


@pytest.mark.slow
def test_many_clients_for_a_minute(served: tuple[str, object]) -> None:  # noqa: F811
    import psutil

    url, process = served
    assert isinstance(process, subprocess.Popen)
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.5):
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    west, south, east, north = json.load(urllib.request.urlopen(f"{url}api"))["bounds"]
    paths = ["flights", "images", "footprints", "frames.zip", f"{IMAGE[1:]}/file.tif"]
    paths += [f"mosaic.tif?bbox={west},{south},{east},{north}&resolution={n}" for n in (1, 0.2)]
    for zoom in range(17, 23):
        x, y = tile_at((west + east) / 2, (south + north) / 2, zoom)
        paths += [f"tiles/{zoom}/{x + n % 9}/{y + n // 9}.png" for n in range(81)]
    paths += [f"{IMAGE[1:]}/window.png?window={n},{n // 2},100,100" for n in range(400)]
    statuses = crowd(url, paths, 200, 60)
    done.set()
    watcher.join()
    assert set(statuses) <= {200, 503}, statuses
    assert peak < 2 << 30
    started = time.monotonic()
    assert json.load(urllib.request.urlopen(f"{url}api"))["images"] == 3
    assert time.monotonic() - started < 5
    print(statuses, peak)


def test_a_client_that_leaves_is_not_worked_for(served: tuple[str, object]) -> None:  # noqa: F811
    import socket
    from urllib.parse import urlsplit

    url, _ = served
    place = urlsplit(url)
    assert place.hostname is not None
    for n in range(60):
        with socket.create_connection((place.hostname, place.port or 0)) as connection:
            path = f"{IMAGE}/window.png?window={n},0,300,300"
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    started = time.monotonic()
    assert urllib.request.urlopen(f"{url}{IMAGE[1:]}/window.png?window=1,1,9,9").status == 200
    assert time.monotonic() - started < 10


def test_a_zip_cannot_be_kept_waiting_on_disk(client: TestClient) -> None:
    with client.stream("GET", "/frames.zip") as answer:
        assert answer.status_code == 200
        next(answer.iter_bytes())
    site = client.app.state.site  # type: ignore[attr-defined]
    assert not os.listdir(site.temporary.name)


def test_a_picture_of_a_huge_image_without_overviews_is_refused() -> None:
    huge = (0, 0, 1 << 24, 1 << 24)
    for overviews in ((), (8,)):
        with pytest.raises(UsageError, match="no overview"):
            size_of(huge, 600, overviews)
    assert size_of((0, 0, 5472, 3648), 600, (8,)) == (600, 400, False)
    assert size_of((0, 0, 5472, 3648), 600, ()) == (600, 400, True)
    assert size_of((0, 0, 600, 400), None, ()) == (600, 400, False)


def test_sixteen_bits_are_stretched(run: Run, tmp_path: Path) -> None:
    import rasterio
    from rasterio.transform import from_origin

    folder = tmp_path / "thermal"
    folder.mkdir()
    values = np.linspace(20000, 22000, 200 * 300).reshape(200, 300).astype(np.uint16)
    values[:20] = 0
    options = {"crs": "EPSG:32633", "transform": from_origin(500000, 5000000, 0.5, 0.5)}
    profile = {"driver": "GTiff", "width": 300, "height": 200, "count": 1, "dtype": "uint16"}
    with rasterio.open(folder / "t.tif", "w", **profile, **options, nodata=0) as file:
        file.write(values, 1)
    with rasterio.open(folder / "p.tif", "w", **{**profile, "dtype": "uint8"}, **options) as file:
        file.write((values % 3).astype(np.uint8), 1)
        file.write_colormap(1, {0: (255, 0, 0, 255), 1: (0, 255, 0, 255), 2: (0, 0, 255, 255)})
    url = tmp_path / "thermal.zarr"
    assert run("ingest", folder, "--archive", url, "--workers", 0).code == 0
    with client_of(url) as client:
        shown = pixels_of(client.get("/flights/thermal/images/t.tif/window.png").content)
        assert shown.shape == (200, 300, 4)
        assert not shown[:20, :, 3].any()
        assert shown[25:40, :, 0].mean() < 50 < 200 < shown[-20:, :, 0].mean()
        palette = pixels_of(client.get("/flights/thermal/images/p.tif/window.png").content)
        expected = np.eye(3, dtype=np.uint8)[values % 3] * 255
        assert np.array_equal(palette, expected)
        west, south, east, north = client.get("/api").json()["bounds"]
        x, y = tile_at((west + east) / 2, (south + north) / 2, 17)
        for image in ("t.tif", "p.tif"):
            path = f"/flights/thermal/images/{image}/tiles/17/{x}/{y}.png"
            assert len(np.unique(pixels_of(client.get(path).content))) > 2
