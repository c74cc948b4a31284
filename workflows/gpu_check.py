"""Check a GPU with this codec: exact, how fast, and what limits it.

    python workflows/gpu_check.py [FRAME] [--out gpu.json]

Needs this checkout and what comes with PyTorch (NumPy, safetensors); Pillow to read a FRAME, else a
frame of 20 megapixels is made up. What further parts need is said where it is missing: diffusers
for steps 1, the package's own dependencies for a whole ingest, `.[train]` for training. It takes
less than four minutes on a recent GPU.

It tells whether the CPU reads the same symbols in the GPU's streams as the GPU does, and the other
way round; how far pixels differ; megapixels a second of encoding and decoding (wall clock, median
of the runs), with the share of that in which the networks have work; and training steps a second,
in bfloat16, with and without `torch.compile`. Prints a table, and writes all of it as JSON.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent / "training"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from archive_pipeline.codec.models import DEFAULT_MODEL, find_folder
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.decoding import Symbols
from archive_pipeline.pcdc.encoding import encode_tiles
from archive_pipeline.pcdc.model import Model
from archive_pipeline.pcdc.model_files import read_folder
from archive_pipeline.pcdc.precision import Precision
from archive_pipeline.stages import timed

TILE = 608
FEW = 6  # tiles that are compared with the CPU's
RATIOS = (24, 100)
Pixels = NDArray[np.uint8]


def made_up(height: int, width: int) -> Pixels:
    """A picture with the spectrum of natural ones: amplitudes fall with the frequency."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    falling = 1 / np.maximum(frequency, 1 / max(height, width))
    shared = np.fft.rfft2(rng.normal(size=(height, width))) * falling
    planes = []
    for _ in range(3):
        own = np.fft.rfft2(rng.normal(size=(height, width))) * falling
        plane = np.fft.irfft2(shared + 0.3 * own, (height, width))
        planes.append(110 + 45 * plane / plane.std())
    return np.clip(np.stack(planes, 2), 0, 255).astype(np.uint8)


def cut(pixels: Pixels) -> list[Pixels]:
    rows, columns = range(0, pixels.shape[0], TILE), range(0, pixels.shape[1], TILE)
    return [np.ascontiguousarray(pixels[r : r + TILE, c : c + TILE]) for r in rows for c in columns]


def bytes_for(tiles: list[Pixels], ratio: float) -> int:
    return int(sum(tile.size for tile in tiles) / ratio)


class Check:
    """One device beside the CPU."""

    def __init__(self, device: str, runs: int) -> None:
        self.device = torch.device(device)
        self.runs = runs
        self.files = read_folder(find_folder(DEFAULT_MODEL))
        self.found: dict[str, Any] = {}

    def codec(self, precision: Precision, device: torch.device | str | None = None) -> Codec:
        return Codec(Model(self.files, device or self.device, precision))

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Median seconds of the runs, after one that does not count."""
        taken = []
        for _ in range(self.runs + 1):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - started)
        return median(taken[1:])

    @contextmanager
    def part(self, name: str) -> Iterator[dict[str, Any]]:
        """A part of the result; what fails in it is part of it, too."""
        result = self.found[name] = {}
        started = time.perf_counter()
        try:
            yield result
        except Exception as error:  # the other parts say something all the same
            result["not_measured"] = f"{type(error).__name__}: {error}"
        result["seconds"] = round(time.perf_counter() - started, 1)
        click.echo(f"{name}: {json.dumps(result)}", err=True)

    def describe(self) -> None:
        with self.part("machine") as result:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
            result |= {"torch": torch.__version__, "python": platform.python_version()}
            result |= {"cores": cores or os.cpu_count(), "device": str(self.device)}
            if self.device.type == "cuda":
                properties = torch.cuda.get_device_properties(self.device)
                result |= {"name": properties.name, "memory_bytes": properties.total_memory}
                result |= {"capability": list(torch.cuda.get_device_capability(self.device))}

    def exactness(self, tiles: list[Pixels]) -> None:
        """Symbols of either's streams, read by both; pixels of both."""
        here, there = self.codec("float32", "cpu"), self.codec("float32")
        fast = self.codec("auto")
        with self.part("exactness") as result:
            for ratio in RATIOS:
                budget = bytes_for(tiles, ratio)
                for maker, codec in (("cpu", here), ("device", there)):
                    streams = encode_tiles(codec, tiles, budget)
                    pairs = zip(
                        here.decode_symbols(streams, TILE, TILE),
                        there.decode_symbols(streams, TILE, TILE),
                        strict=True,
                    )
                    same = all(_same(a, b) for a, b in pairs)
                    result[f"symbols_equal_{maker}_{ratio}"] = same
                expected = _joined(here.decode(streams, TILE, TILE))
                for name, codec in (("float32", there), ("auto", fast)):
                    apart = np.abs(_joined(codec.decode(streams, TILE, TILE)) - expected)
                    result[f"pixels_apart_most_{name}_{ratio}"] = int(apart.max())
                    result[f"pixels_apart_share_{name}_{ratio}"] = round(
                        float((apart > 0).mean()), 6
                    )

    def speed(self, tiles: list[Pixels]) -> None:
        codec = self.codec("auto")
        million = sum(tile.shape[0] * tile.shape[1] for tile in tiles) / 1e6
        with self.part("networks") as result:
            encoding, decoding = self._networks(codec, tiles)
            result["g_a_mp_s"] = round(million / encoding, 2)
            result["g_s_mp_s"] = round(million / decoding, 2)
        for ratio in RATIOS:
            budget = bytes_for(tiles, ratio)
            with self.part(f"coding_{ratio}") as result:
                streams = encode_tiles(codec, tiles, budget)
                taken = self.seconds(lambda budget=budget: encode_tiles(codec, tiles, budget))
                result["encode_mp_s"] = round(million / taken, 2)
                result["encode_g_a_share"] = round(encoding / taken, 3)
                taken = self.seconds(lambda streams=streams: codec.decode(streams, TILE, TILE))
                result["decode_mp_s"] = round(million / taken, 2)
                result["decode_g_s_share"] = round(decoding / taken, 3)
                with timed() as spent:
                    codec.decode(streams, TILE, TILE)
                result["decode_symbol_coder_share"] = round(spent.get("entropy", 0) / taken, 3)
            with self.part(f"steps_1_{ratio}") as result:
                taken = self.seconds(lambda streams=streams: codec.decode(streams, TILE, TILE, 1))
                result["decode_mp_s"] = round(million / taken, 2)

    def _networks(self, codec: Codec, tiles: list[Pixels]) -> tuple[float, float]:
        """Seconds of g_a and of g_s alone on all tiles, in batches that are on the device."""
        networks, side = codec.model.networks, max(1, codec.batch_pixels // TILE**2)
        batches = -(-len(tiles) // side)
        x = torch.rand(side, 3, TILE, TILE, device=self.device) * 2 - 1
        with torch.no_grad():
            y = networks.g_a(x)
            exponent = torch.full((side, 1, *y.shape[2:]), 30, device=self.device)
            encoding = self.seconds(lambda: [networks.g_a(x) for _ in range(batches)])
            decoding = self.seconds(lambda: [networks.g_s(y, exponent) for _ in range(batches)])
        share = len(tiles) / (batches * side)
        return encoding * share, decoding * share

    def ingest(self, pixels: Pixels, frames: int) -> None:
        """A whole ingest, files to archive, of some equal frames."""
        with self.part("ingest") as result, tempfile.TemporaryDirectory() as folder:
            import rasterio

            import archive_pipeline

            flight = Path(folder) / "flight"
            flight.mkdir()
            height, width = pixels.shape[:2]
            for k in range(frames):
                profile = {"driver": "JPEG", "quality": 95, "dtype": "uint8", "count": 3}
                with rasterio.open(
                    flight / f"{k}.jpg", "w", width=width, height=height, **profile
                ) as file:
                    file.write(np.roll(pixels, k, 0).transpose(2, 0, 1))
            started = time.perf_counter()
            report = archive_pipeline.ingest(
                flight, Path(folder) / "a.zarr", device=self.device.type, workers=0
            )
            taken = time.perf_counter() - started
            result["frames"] = len(report.outcomes)
            result["mp_s"] = round(frames * height * width / 1e6 / taken, 2)
            result["stages"] = report.to_json().get("stages")

    def training(self, batch: int, size: int, steps: int, compile: bool) -> None:
        """Steps a second of stage 1, LPIPS and the detector's term left out."""
        for compiled in (False, True) if compile else (False,):
            with self.part(f"training_{'compiled' if compiled else 'plain'}") as result:
                result |= {"batch": batch, "size": size}
                result["steps_s"] = round(self._steps_a_second(compiled, batch, size, steps), 2)

    def _steps_a_second(self, compiled: bool, batch: int, size: int, steps: int) -> float:
        from training import make_optimiser
        from training_samples import random_offsets, random_steps
        from transform_loss import multiscale_squared_error, rate_distortion, structural_error

        from archive_pipeline.pcdc.transforms import TransformCodec

        torch.manual_seed(0)
        network = TransformCodec().to(self.device, memory_format=torch.channels_last)
        optimiser = make_optimiser(network, 1e-4)
        forward = torch.compile(rate_distortion) if compiled else rate_distortion
        x = torch.rand(batch, 3, size, size, device=self.device) * 2 - 1
        generator = torch.Generator().manual_seed(0)

        def step() -> None:
            image_step = random_steps(batch, generator).to(self.device)
            offsets = random_offsets(batch, size // 16, size // 16, generator).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16):
                bits, x_bar, _ = forward(network, x, image_step, offsets, noise=True)
            x_bar = x_bar.float()
            error = multiscale_squared_error(x_bar, x).mean() + structural_error(x_bar, x).mean()
            optimiser.zero_grad(set_to_none=True)
            (error + bits.mean() / size**2).backward()
            optimiser.step()

        for _ in range(3):  # compiling, and the optimiser's first steps
            step()
        self.wait()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        self.wait()
        return steps / (time.perf_counter() - started)


def _same(a: object, b: object) -> bool:
    assert isinstance(a, Symbols), a
    assert isinstance(b, Symbols), b
    numbers = ("levels", "z", "q")
    return a.image_step == b.image_step and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in numbers
    )


def _joined(tiles: list[Pixels]) -> NDArray[np.int64]:
    return np.concatenate([tile.reshape(-1).astype(np.int64) for tile in tiles])


def table(found: dict[str, Any]) -> str:
    """All that was found, a line each."""
    lines = []
    for part, result in found.items():
        for name, value in result.items():
            lines.append(f"{part:20} {name:34} {value}")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument(
    "frame", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False
)
@click.option("--out", type=click.Path(path_type=Path), help="Where the JSON goes.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--height", default=6 * TILE, show_default=True, help="Of the frame, at most.")
@click.option("--width", default=9 * TILE, show_default=True, help="Likewise.")
@click.option("--runs", default=3, show_default=True, help="Of each measurement.")
@click.option("--frames", default=4, show_default=True, help="Of the ingest.")
@click.option("--batch", default=16, show_default=True, help="Crops of a training step.")
@click.option("--crop", default=256, show_default=True, help="Pixels a side of such a crop.")
@click.option("--steps", default=20, show_default=True, help="Training steps.")
@click.option("--compile/--no-compile", default=True, help="Also train with torch.compile.")
def main(
    frame: Path | None,
    out: Path | None,
    device: str,
    height: int,
    width: int,
    runs: int,
    frames: int,
    batch: int,
    crop: int,
    steps: int,
    compile: bool,
) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise click.ClickException("no CUDA device is available (--device cpu tries the script)")
    if frame is None:
        pixels = made_up(height, width)
    else:
        from PIL import Image

        pixels = np.asarray(Image.open(frame).convert("RGB"))[:height, :width]
    tiles = cut(pixels)
    check = Check(device, runs)
    check.describe()
    check.exactness(tiles[:FEW])
    check.speed(tiles)
    check.ingest(pixels, frames)
    check.training(batch, crop, steps, compile)
    click.echo(table(check.found))
    if out is not None:
        out.write_text(json.dumps(check.found, indent=1) + "\n")
    exact = check.found["exactness"]
    if not all(value for name, value in exact.items() if name.startswith("symbols_equal")):
        raise click.ClickException("the device and the CPU do not read the same symbols")
    if "not_measured" in exact:
        raise click.ClickException(f"not checked: {exact['not_measured']}")


if __name__ == "__main__":
    main()
