"""Quality of decoded pixels: what the benchmarks judge by.

Every measure takes uint8 (height, width, 3) RGB pixels, the original and the decoded ones.
"""

from __future__ import annotations

import importlib
import io
import math
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
import texture

Pixels = NDArray[np.uint8]
Measure = Callable[[Pixels, Pixels], float]
# MS-SSIM halves the picture four times and then needs an 11-pixel window
MIN_SIDE = 176
DOWNLOAD_TIMEOUT = 10.0  # seconds without an answer


@dataclass(frozen=True)
class Metric:
    """What a measure's values mean.

    Attributes:
        label: as shown in tables and plots.
        better: "higher" or "lower".
        headline: whether rates are compared at equal values of it.
        decibels: whether it is compared as -10 log10(1 - value), as is usual for values near 1.
    """

    label: str
    better: str = "higher"
    headline: bool = True
    decibels: bool = False

    @property
    def axis(self) -> str:
        unit = " (dB)" if self.decibels or self.label == "PSNR" else ""
        return f"{self.label}{unit}{' (lower is better)' if self.better == 'lower' else ''}"

    def scaled(self, value: float) -> float:
        """Value as plotted and averaged."""
        if not self.decibels:
            return value
        return -10 * math.log10(1 - value) if value < 1 else math.inf

    def quality(self, value: float) -> float:
        """Value on a scale where more is better."""
        return -self.scaled(value) if self.better == "lower" else self.scaled(value)


METRICS = {
    "lpips": Metric("LPIPS", "lower"),
    "ssimulacra2": Metric("SSIMULACRA 2"),
    "ms_ssim": Metric("MS-SSIM", decibels=True),
    "psnr": Metric("PSNR"),
    "dists": Metric("DISTS", "lower"),
    "texture": Metric("texture", "lower"),
    "orientation": Metric("orientation", "lower", headline=False),
    "ssim": Metric("SSIM", headline=False),
}


def psnr(original: Pixels, decoded: Pixels) -> float:
    """Peak signal-to-noise ratio over all samples, dB; infinite where nothing differs."""
    error = np.mean((original.astype(np.float32) - decoded) ** 2, dtype=np.float64)
    return float(10 * np.log10(255**2 / error)) if error else math.inf


def _ssimulacra2() -> Measure:
    compute = importlib.import_module("ssimulacra2").compute_ssimulacra2

    def file(pixels: Pixels) -> io.BytesIO:
        # the package reads files only
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "BMP")
        return buffer

    return lambda original, decoded: float(compute(file(original), file(decoded)))


def _on_tensors(function: Callable[[Tensor, Tensor], Tensor]) -> Measure:
    """Measure of float32 (1, 3, height, width) pictures in [0, 1], the decoded one first."""

    def tensor(pixels: Pixels) -> Tensor:
        return torch.tensor(pixels).permute(2, 0, 1)[None].float() / 255

    @torch.inference_mode()
    def measure(original: Pixels, decoded: Pixels) -> float:
        return float(function(tensor(decoded), tensor(original)))

    return measure


def _ssim() -> Measure:
    image = importlib.import_module("torchmetrics.functional.image")
    return _on_tensors(lambda a, b: image.structural_similarity_index_measure(a, b, data_range=1.0))


def _ms_ssim() -> Measure:
    image = importlib.import_module("torchmetrics.functional.image")
    return _on_tensors(
        lambda a, b: image.multiscale_structural_similarity_index_measure(a, b, data_range=1.0)
    )


def _lpips() -> Measure:
    image = importlib.import_module("torchmetrics.image")
    with impatient():
        network = image.LearnedPerceptualImagePatchSimilarity("squeeze", normalize=True)
    return _on_tensors(network)


def _dists() -> Measure:
    # the metric class would load its 0.5 GB of weights anew for every picture
    module = importlib.import_module("torchmetrics.functional.image.dists")
    with impatient():
        return _on_tensors(module.DISTSNetwork().eval())


@contextmanager
def impatient() -> Iterator[None]:
    """Let downloads of weights fail soon where there is no network."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


LOADERS: dict[str, Callable[[], Measure]] = {
    "lpips": _lpips,
    "ssimulacra2": _ssimulacra2,
    "ms_ssim": _ms_ssim,
    "psnr": lambda: psnr,
    "dists": _dists,
    "texture": lambda: texture.texture_error,
    "orientation": lambda: texture.orientation_error,
    "ssim": _ssim,
}


def load(names: Iterable[str]) -> tuple[dict[str, Measure], dict[str, str]]:
    """Load measures by name.

    Returns:
        The measures, and a line for each that could not be had.
    """
    measures: dict[str, Measure] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            measures[name] = LOADERS[name]()
        except ImportError as error:
            missing[name] = f"{METRICS[name].label} is left out: {error}"
        except Exception as error:  # torch.hub and torchvision promise no particular ones
            missing[name] = (
                f"{METRICS[name].label} is left out: its weights could not be loaded "
                f"({' '.join(str(error).split())})"
            )
    return measures, missing
