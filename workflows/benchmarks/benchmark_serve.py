"""What map tiles of an archive cost, beside titiler's from a COG of the same frame.

    python workflows/benchmarks/benchmark_serve.py FLIGHT --ratio 100
    python workflows/benchmarks/benchmark_serve.py FLIGHT --archive archive.zarr

Archives a flight, or takes an archive of it that is there, and serves it by `archive serve` in a
process of its own. Asks for tiles of 256 pixels as a browser does, six at a time where there are
many: from afar, at native size, once more, and a screenful of 5 x 4 at native size, of the flight's
mosaic and of one frame. Then the same tiles of that frame by titiler, from a Cloud Optimized
GeoTIFF of the original's pixels (JPEG, quality 85, overviews). Prints seconds and the server's
processor seconds.
"""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError
from urllib.parse import quote

import click
import psutil

import archive_pipeline as ap

Address = Callable[[str], str]

SMALL = "window.jpg?window=0,0,64,64"  # for which everything is loaded
ACROSS, DOWN = 5, 4  # tiles of a screenful
CONNECTIONS = 6  # of a browser to one server
EQUATOR = 2 * math.pi * 6378137.0
PATIENCE = 120  # seconds until a server must answer
TITILER = """
import sys, uvicorn
from fastapi import FastAPI
from titiler.core.factory import TilerFactory
app = FastAPI()
app.include_router(TilerFactory().router)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""


class Server:
    """A server's process, and what it costs to ask it."""

    def __init__(self, url: str, process: subprocess.Popen[str]) -> None:
        self.url = url
        self._process = psutil.Process(process.pid)

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=PATIENCE) as answer:
            data: bytes = answer.read()
            return data

    def measure(self, paths: list[str]) -> dict[str, float]:
        """Seconds for all of some addresses, of the server's processor, and bytes."""
        before, started = self._process.cpu_times(), time.perf_counter()
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            sizes = [len(data) for data in pool.map(self.get, paths)]
        seconds, after = time.perf_counter() - started, self._process.cpu_times()
        worked = after.user + after.system - before.user - before.system
        found = {"seconds": seconds, "cpu_seconds": worked, "bytes": sum(sizes)}
        return {name: round(value, 3) for name, value in found.items()}

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(self._process.memory_info().rss)


@contextmanager
def running(args: list[str], url: str | None = None) -> Iterator[Server]:
    """A server that answers; its address is in its first line where it is not known."""
    process = subprocess.Popen(args, stdout=subprocess.PIPE, text=True)
    try:
        if url is None:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
        yield Server(url, process)
    finally:
        process.terminate()
        process.wait()


def archive_server(archive: Path) -> list[str]:
    module = "archive_pipeline.commands.cli"
    return [
        sys.executable,
        "-m",
        module,
        "serve",
        "--archive",
        str(archive),
        "--port",
        "0",
        "--json",
    ]


def tile_at(lon: float, lat: float, zoom: int) -> tuple[int, int]:
    turned = math.asinh(math.tan(math.radians(lat))) / math.pi
    return int((lon + 180) / 360 * 2**zoom), int((1 - turned) / 2 * 2**zoom)


def address_of(path: str, query: str = "") -> Address:
    """What gives the address of a tile "z/x/y" below a path."""
    return lambda tile: f"{path}/{tile}.jpg{query}"


def native_zoom(image: dict[str, Any]) -> int:
    """The zoom whose pixels are most nearly as large as an image's."""
    a, b, _, d, e, _ = image["transform"]  # metres
    south, north = image["bbox"][1::2]
    pitch = math.sqrt(abs(a * e - b * d)) / math.cos(math.radians((south + north) / 2))
    return round(math.log2(EQUATOR / 256 / pitch))


def measure(server: Server, bounds: list[float], native: int, address: Address) -> Any:
    """What tiles within bounds cost, each of them for the first time."""
    west, south, east, north = bounds
    far = math.floor(math.log2(360 / (east - west)))  # a tile is about as large as all of it
    lone = (west + east) / 2, south + (north - south) * 0.2  # not near the screenful
    (x, y), (x1, y1) = tile_at((west + east) / 2, (south + north) / 2, far), tile_at(*lone, native)
    x2, y2 = tile_at((west + east) / 2, (south + north) / 2, native)
    screen = [
        address(f"{native}/{x2 + n % ACROSS - ACROSS // 2}/{y2 + n // ACROSS - DOWN // 2}")
        for n in range(ACROSS * DOWN)
    ]
    return {
        "seen from afar, cold": server.measure([address(f"{far}/{x}/{y}")]),
        "native, cold": server.measure([address(f"{native}/{x1}/{y1}")]),
        "native, once more": server.measure([address(f"{native}/{x1}/{y1}")]),
        "20 native, cold": server.measure(screen),
        "20 native, once more": server.measure(screen),
    }


def make_cog(flight: Path, image: dict[str, Any], folder: Path) -> Path:
    """The original's pixels with the frame's place as a COG: JPEG, quality 85, overviews."""
    import rasterio
    import rasterio.shutil

    with rasterio.open(flight / image["id"]) as source:
        pixels = source.read((1, 2, 3))
    placed, path = folder / "placed.tif", folder / "frame.tif"
    _, height, width = pixels.shape
    profile = {"driver": "GTiff", "width": width, "height": height, "count": 3, "dtype": "uint8"}
    place = {"crs": image["crs"], "transform": rasterio.Affine(*image["transform"])}
    with rasterio.open(placed, "w", **profile, **place) as file:
        file.write(pixels)
    rasterio.shutil.copy(placed, path, driver="COG", compress="JPEG", quality=85)
    return path


def measure_archive(archive: Path, frame: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What tiles of an archive cost, and what the server tells of the frame."""
    found: dict[str, Any] = {}
    started = time.perf_counter()
    with running(archive_server(archive)) as server:
        listed = json.loads(server.get("images?limit=1000"))["images"]
        found["ready and listed, seconds"] = round(time.perf_counter() - started, 2)
        chosen = next(i for i in listed if frame in (None, i["id"]))
        image: dict[str, Any] = json.loads(server.get(chosen["href"][1:]))
        native = native_zoom(image)
        found["first picture"] = server.measure([f"{listed[-1]['href'][1:]}/{SMALL}"])
        path = f"{chosen['href'][1:]}/tiles"
        found["one frame"] = measure(server, image["bbox"], native, address_of(path))
        found["memory"] = server.memory
    with running(archive_server(archive)) as server:
        bounds = json.loads(server.get("api"))["bounds"]
        server.get(f"{listed[-1]['href'][1:]}/{SMALL}")
        found["mosaic"] = measure(server, bounds, native, address_of("tiles"))
        found["memory of the mosaic's"] = server.memory
    return found, {**image, "native": native}


def measure_titiler(flight: Path, image: dict[str, Any], folder: Path) -> dict[str, Any]:
    cog = make_cog(flight, image, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    with running([sys.executable, "-c", TITILER, str(port)], url) as server:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                server.get("openapi.json")
                break
            except URLError:
                time.sleep(0.1)
        tiles = address_of("tiles/WebMercatorQuad", f"?url={quote(str(cog))}")
        found = measure(server, image["bbox"], image["native"], tiles)
        return {"one frame": found, "memory": server.memory, "bytes": cog.stat().st_size}


@click.command()
@click.argument("flight", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--archive", type=click.Path(path_type=Path), help="An archive of it.")
@click.option("--ratio", default=100.0, show_default=True)
@click.option("--frame", help="Id of the frame to compare.  [default: the first]")
def main(flight: Path, archive: Path | None, ratio: float, frame: str | None) -> None:
    """Print what tiles of FLIGHT cost."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        if archive is None:
            archive = folder / "archive.zarr"
            ap.ingest(str(flight), str(archive), ratio=ratio, workers=0)
        ours, image = measure_archive(archive, frame)
        theirs = measure_titiler(flight, image, folder)
    ratios = {
        case: {
            unit: round(values[unit] / max(theirs["one frame"][case][unit], 0.01), 2)
            for unit in ("seconds", "cpu_seconds")
        }
        for case, values in ours["one frame"].items()
    }
    report = {"archive serve": ours, "titiler": theirs, "ratio, one frame": ratios}
    click.echo(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
