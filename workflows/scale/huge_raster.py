"""Memory and time of an orthomosaic beyond memory: ingest, restore, mosaic, and a killed ingest.

    python workflows/scale/huge_raster.py OUT --side 20000 --kind photo

Makes a tiled GeoTIFF of SIDE x SIDE pixels block by block and runs the `archive` command on it.
Kinds:

    photo     8-bit RGB in JPEG tiles. Only a square of --textured pixels a side holds an image (the
              codec's time goes there), the rest is black: flight lines in a large frame.
    lossless  uint16, one band, DEFLATE: terrain with noise, all of it stored.

Prints, and writes to OUT/huge_raster.json, wall time and peak memory of each command, that is the
largest resident size of its processes (`os.wait4`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import rasterio
from rasterio.windows import Window

from archive_pipeline.flight.locations import sha256

BLOCK = 512
ORIGIN = (300_000.0, 3_240_000.0)  # EPSG:32615, near Galveston
PIXEL = 0.05  # metres


def make_raster(path: Path, side: int, kind: str, textured: int, seed: int = 0) -> None:
    """Write the GeoTIFF block by block; black blocks of a photo stay unwritten."""
    profile = {
        "driver": "GTiff",
        "width": side,
        "height": side,
        "tiled": True,
        "blockxsize": BLOCK,
        "blockysize": BLOCK,
        "bigtiff": "IF_SAFER",
        "crs": "EPSG:32615",
        "transform": rasterio.Affine(PIXEL, 0, ORIGIN[0], 0, -PIXEL, ORIGIN[1]),
    }
    if kind == "photo":
        profile |= {"count": 3, "dtype": "uint8", "compress": "JPEG", "photometric": "YCBCR"}
        profile |= {"jpeg_quality": 90, "sparse_ok": True, "interleave": "pixel"}
    else:
        profile |= {"count": 1, "dtype": "uint16", "compress": "DEFLATE", "zlevel": 1}
        profile |= {"predictor": 2}
    rng = np.random.default_rng(seed)
    first = max(0, (side - textured) // 2)
    with rasterio.open(path, "w", **profile) as out:
        for row in range(0, side, BLOCK):
            for col in range(0, side, BLOCK):
                height, width = min(BLOCK, side - row), min(BLOCK, side - col)
                inside = all(first <= n < first + textured for n in (row, col))
                if kind == "photo" and not inside:
                    continue
                y, x = np.mgrid[row : row + height, col : col + width].astype(np.float32)
                noise = rng.standard_normal((height, width), np.float32)
                if kind == "photo":
                    shade = 110 + 60 * np.sin(x / 37) * np.cos(y / 53) + 12 * noise
                    bands = np.stack([shade, shade * 0.9 + 10, shade * 0.7])
                    pixels = np.clip(bands, 1, 255).astype(np.uint8)
                else:
                    terrain = 9000 + 4000 * np.sin(x / 2900) * np.cos(y / 3700) + 20 * noise
                    pixels = terrain.astype(np.uint16)[None]
                out.write(pixels, window=Window(col, row, width, height))


def run(*args: object, until: Callable[[], bool] | None = None) -> dict[str, float]:
    """Run `archive`; returns exit code, seconds and peak memory in GB.

    Args:
        until: kill the command once this holds.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "archive_pipeline.commands.cli", *map(str, args)], stdout=sys.stderr
    )
    while until is not None and process.poll() is None:
        if until():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.05)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "code": process.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "peak_gb": round(usage.ru_maxrss * scale / 1e9, 2),
    }


def contents(archive: Path) -> dict[str, str]:
    """SHA-256 of an archive's files but its index, which also has times and inodes of records."""
    files = (p for p in archive.rglob("*") if p.is_file() and p.name != "items.parquet")
    return {str(path.relative_to(archive)): sha256(path) for path in files}


def shards(archive: Path) -> list[Path]:
    """Shards of pixels that are complete."""
    return [p for p in archive.glob("flights/*/*/pixels/c/**/*") if p.is_file() and not p.suffix]


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--side", default=20_000, show_default=True)
@click.option(
    "--kind", type=click.Choice(["photo", "lossless"]), default="photo", show_default=True
)
@click.option("--textured", default=4096, show_default=True, help="Side of a photo's own part.")
@click.option("--ratio", default=100, show_default=True)
@click.option("--kill", is_flag=True, help="Ingest once more, killed half-way; bytes must agree.")
@click.option("--no-mosaic", is_flag=True)
def main(
    out: Path, side: int, kind: str, textured: int, ratio: int, kill: bool, no_mosaic: bool
) -> None:
    """Generate a raster below OUT, archive it, restore it, and report memory and time."""
    flight, archive = out / "flight", out / "archive.zarr"
    flight.mkdir(parents=True)
    raster = flight / "ortho.tif"
    make_raster(raster, side, kind, textured)
    report: dict[str, object] = {"side": side, "kind": kind, "textured": textured}
    report["source_gb"] = round(raster.stat().st_size / 1e9, 3)

    def step(name: str, *args: object, until: Callable[[], bool] | None = None) -> None:
        report[name] = run(*args, until=until)
        click.echo(f"{name}: {report[name]}")

    ingest = ("ingest", flight, "--ratio", ratio, "--workers", 0, "--archive")
    step("ingest", *ingest, archive)
    if kill:
        half, again = len(shards(archive)) // 2, out / "again.zarr"
        step("killed", *ingest, again, until=lambda: len(shards(again)) >= half)
        before = {path: path.stat().st_mtime_ns for path in shards(again)}
        step("resumed", *ingest, again)
        report["kept_shards"] = sum(p.stat().st_mtime_ns == t for p, t in before.items())
        report["shards"] = len(shards(again))
        report["identical"] = contents(again) == contents(archive)
        click.echo(
            f"kept {report['kept_shards']} of {report['shards']} shards; "
            f"{'the same' if report['identical'] else 'OTHER'} bytes as undisturbed"
        )
    step("restore", "restore", "--archive", archive, "-o", out / "restored", "--workers", 0)
    if not no_mosaic:
        step("mosaic", "restore", "--archive", archive, "-o", out / "mosaic", "--mosaic")
    click.echo(json.dumps(report, indent=1))
    (out / "huge_raster.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
