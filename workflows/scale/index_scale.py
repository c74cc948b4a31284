"""What `info`, a small box and one more image cost in an archive of very many images.

    python workflows/scale/index_scale.py OUT --images 100000
    python workflows/scale/index_scale.py OUT --images 100000 --beside ../another/checkout

Archives one small frame in OUT, then writes records of so many images like it, in flights of 5000,
lanes beside each other: any point of a flight lies in about ten of them. Only images that the box
meets have pixels. Runs the command, each time as a process of its own, and prints seconds, those of
processors, and the largest resident size (medians of --repeats); the same for another checkout of
this package where one is given, on the same archive. Writes OUT/index_scale.json.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from make_flight import make_flight

from archive_pipeline.geo.georef import Georef
from archive_pipeline.geo.mapping import with_footprint
from archive_pipeline.store.layout import ATTRIBUTE, group_json, image_key

ROOT = Path(__file__).resolve().parents[2]
PER_FLIGHT = 5000
LANE = 50  # images
WIDTH, HEIGHT, NEW = 360, 304, 8  # of the frames that are really archived
ALONG, ACROSS = 0.3, 0.5  # of a frame's height and width, from one to the next
APART = 5000.0  # metres between flights

Usage = dict[str, float]


def command(tree: Path, *args: object) -> tuple[Usage, str]:
    """Run `archive` of a checkout; seconds, processors' seconds, peak memory, what it printed."""
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    module = project["scripts"]["archive"].partition(":")[0]
    with TemporaryDirectory() as folder:
        # by its entry point Zarr finds the codec, of this checkout and not of the installed package
        metadata = Path(folder, "archive_pipeline-0.dist-info")
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: archive-pipeline\n")
        points = [f"{k}={v}" for k, v in project["entry-points"]["zarr.codecs"].items()]
        (metadata / "entry_points.txt").write_text("\n".join(["[zarr.codecs]", *points]))
        return timed(tree, folder, module, *args)


def timed(tree: Path, metadata: str, module: str, *args: object) -> tuple[Usage, str]:
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=tree,  # which `-m` looks in first
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), metadata])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{args[0]} in {tree} ended with {process.returncode}")
    scale = 1 if sys.platform == "darwin" else 1024
    worked = usage.ru_utime + usage.ru_stime
    peak = usage.ru_maxrss * scale / 1e9
    return {"seconds": seconds, "cpu_seconds": worked, "peak_gb": peak}, printed


def make_archive(url: Path, frame: Path, images: int) -> tuple[float, ...]:
    """Archive one frame and write records of `images` like it; returns a box that meets ten."""
    command(
        ROOT, "ingest", frame.parent, "--archive", url, "--ratio", 16, "--flight", "first", "-q"
    )
    first = url / image_key("first", frame.name)
    record = json.loads((first / "zarr.json").read_bytes())["attributes"][ATTRIBUTE]
    box: tuple[float, ...] = ()
    for number in range(images):
        flight, place = divmod(number, PER_FLIGHT)
        mine = moved(record, f"DJI_{place:05}.JPG", number, flight, place)
        folder = url / image_key(f"flight_{flight:04}", mine["id"])
        folder.mkdir(parents=True)
        if place == 0:
            (folder.parent / "zarr.json").write_bytes(group_json({}))
        # a block in the middle of a lane has pixels, and the box lies in the middle of that
        near = flight == 0 and abs(place // LANE - LANE) < 5 and abs(place % LANE - LANE // 2) < 9
        if near:
            shutil.copytree(first, folder, dirs_exist_ok=True)
        (folder / "zarr.json").write_bytes(group_json({ATTRIBUTE: mine}))
        if flight == 0 and place == LANE * LANE + LANE // 2:
            ring = mine["georef"]["footprint"]
            lon, lat = (sum(p[i] for p in ring[:4]) / 4 for i in (0, 1))
            box = (lon, lat, lon + 1e-7, lat + 1e-7)
    return box


def moved(record: dict[str, Any], name: str, number: int, flight: int, place: int) -> Any:
    """The record of another image like one, elsewhere."""
    mine = copy.deepcopy(record) | {"id": name, "sha256": f"{number:064x}"}
    georef = Georef.from_json(record["georef"])
    assert georef.transform is not None
    a, b, c, d, e, f = georef.transform
    col, row = WIDTH * ACROSS * (place // LANE), HEIGHT * ALONG * (place % LANE)
    east, north = APART * (flight % 10), APART * (flight // 10)
    transform = (a, b, a * col + b * row + c + east, d, e, d * col + e * row + f + north)
    placed = Georef(georef.crs, transform, method=georef.method)
    mine["georef"] = with_footprint(placed, WIDTH, HEIGHT).to_json()
    return mine


def measure(tree: Path, url: Path, frames: list[Path], box: tuple[float, ...], repeats: int) -> Any:
    """Seconds and memory of each command of a checkout."""
    out, one = url.parent / "restored", url.parent / "one"
    steps: dict[str, tuple[object, ...]] = {
        "index from nothing, and one image": ("ingest", one, "--flight", "flight_0000"),
        "one more image": ("ingest", one, "--flight", "flight_0000"),
        "info --json": ("info",),
        "a box that meets none": ("restore", "--bbox", *(v + 1.0 for v in box), "-o", out),
        "a box that meets ten": ("restore", "--bbox", *box, "-o", out),
    }
    (url / "items.parquet").unlink(missing_ok=True)
    found: dict[str, Usage] = {}
    for name, args in steps.items():
        usages = []
        for _ in range(1 if name.startswith("index") else repeats):
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(one, ignore_errors=True)
            if args[0] == "ingest":
                one.mkdir()
                frames.pop().rename(one / f"NEW_{len(frames)}.JPG")
                args = (*args, "--ratio", 16, "--workers", 0)
            usage, printed = command(tree, *args, "--archive", url, "--json")
            usages.append(usage)
        found[name] = {
            unit: round(statistics.median(usage[unit] for usage in usages), 2)
            for unit in ("seconds", "cpu_seconds", "peak_gb")
        }
        if args[0] == "restore":
            found[name]["files"] = len(json.loads(printed)["files"])
        click.echo(f"{tree.name}: {name}: {found[name]}", err=True)
    return found


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--images", default=100_000, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--beside", type=click.Path(exists=True, path_type=Path), help="Another checkout.")
@click.option("--beside-repeats", default=1, show_default=True)
def main(out: Path, images: int, repeats: int, beside: Path | None, beside_repeats: int) -> None:
    """Make an archive below OUT and report what commands on it cost."""
    out = out.resolve()
    url = out / "archive.zarr"
    shutil.rmtree(out, ignore_errors=True)
    *frames, ortho = make_flight(out / "frames", 2 * (repeats + beside_repeats + 2), WIDTH, HEIGHT)
    ortho.unlink()
    (out / "first").mkdir()
    box = make_archive(url, frames.pop().rename(out / "first" / "FIRST.JPG"), images)
    report: dict[str, Any] = {"images": images, "here": measure(ROOT, url, frames, box, repeats)}
    if beside is not None:
        report["beside"] = measure(beside.resolve(), url, frames, box, beside_repeats)
    click.echo(json.dumps(report, indent=1))
    (out / "index_scale.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
