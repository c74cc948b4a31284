"""The codecs that the benchmarks compare with, at settings that serve them well.

Pixels are uint8 (height, width, 3) RGB. Chroma formats of AVIF and HEVC were chosen by their rates
at equal quality, and both of HEVC's tunings run: one needs fewer bytes at equal PSNR, the other at
equal SSIMULACRA 2. Efforts are the highest that help and take about 10 s a crop at most; whole
frames (`FRAME_PEERS`) make do with less. `Peer.note` says what is set.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Peer:
    """A codec with one knob.

    Attributes:
        label: name in tables and plots.
        note: what is set besides the knob.
        library: returns the library's name and version, or raises ImportError.
        ladder: settings of a rate-distortion curve, from few bytes to many.
        settings: all settings that a search may use, from few bytes to many.
        encode: pixels and a setting to a file.
        decode: a file to pixels.
        size: bytes of a file that count; all of them unless said otherwise.
    """

    label: str
    note: str
    library: Callable[[], str]
    ladder: Sequence[float]
    settings: Sequence[float]
    encode: Callable[[Pixels, float], bytes]
    decode: Callable[[bytes], Pixels]
    size: Callable[[bytes], int] = len


def _imagecodecs() -> ModuleType:
    return importlib.import_module("imagecodecs")


def _pillow_heif() -> ModuleType:
    return importlib.import_module("pillow_heif")


def _pillow(feature: str, name: str) -> Callable[[], str]:
    def version() -> str:
        if not features.check(feature):
            raise ImportError(f"Pillow was built without {name}")
        return f"{name} {features.version(feature)}"

    return version


def _imagecodecs_version(library: str) -> Callable[[], str]:
    def version() -> str:
        versions = dict(v.rsplit("-", 1) for v in _imagecodecs().version().split(", "))
        return f"{library} {versions[library]}"

    return version


def _save(pixels: Pixels, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def _open(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def coded_size(file: bytes) -> int:
    """Bytes of a HEIF or AVIF file that carry the picture: coded data and decoder configuration.

    The boxes around them, some 260 bytes, would weigh on small crops and on nothing else.
    """
    total = at = 0
    while at < len(file):
        length = int.from_bytes(file[at : at + 4], "big") or len(file) - at
        if file[at + 4 : at + 8] == b"mdat":
            total += length - 8
        at += length
    for name in (b"hvcC", b"av1C"):
        at = file.find(name)
        if at >= 0:
            total += int.from_bytes(file[at - 4 : at], "big") - 8
    return total


def _jpeg(pixels: Pixels, quality: float) -> bytes:
    return _save(pixels, "JPEG", quality=int(quality), optimize=True, progressive=True)


def _jpeg2000(pixels: Pixels, bpp: float) -> bytes:
    """Encode with at most `bpp` bits a pixel."""
    return _save(
        pixels,
        "JPEG2000",
        quality_mode="rates",
        quality_layers=[24 / bpp],
        irreversible=True,
        mct=1,
        no_jp2=True,
    )


def _webp(pixels: Pixels, quality: float) -> bytes:
    return _save(pixels, "WEBP", quality=int(quality), method=6)


def _avif(pixels: Pixels, quality: float, speed: int) -> bytes:
    options = {"speed": speed, "subsampling": "4:4:4", "max_threads": 1}
    return _save(pixels, "AVIF", quality=int(quality), **options)


def _jpegxl(pixels: Pixels, distance: float, effort: int) -> bytes:
    data: bytes = _imagecodecs().jpegxl_encode(
        pixels, distance=distance, effort=effort, usecontainer=False, numthreads=1
    )
    return data


def _jpegxl_decode(data: bytes) -> Pixels:
    pixels: Pixels = _imagecodecs().jpegxl_decode(data, numthreads=1)
    return pixels


def _hevc(pixels: Pixels, quality: float, preset: str, tune: str) -> bytes:
    height, width = pixels.shape[:2]
    heif = _pillow_heif()
    image = heif.from_bytes("RGB", (width, height), np.ascontiguousarray(pixels).tobytes())
    buffer = io.BytesIO()
    options = {"preset": preset, "tune": tune}
    image.save(buffer, quality=int(quality), chroma="420", enc_params=options)
    return buffer.getvalue()


def _hevc_decode(data: bytes) -> Pixels:
    image = _pillow_heif().open_heif(io.BytesIO(data), convert_hdr_to_8bit=True)
    return np.asarray(image)[..., :3]


def _hevc_version() -> str:
    return str(_pillow_heif().libheif_info()["HEIF"])


def avif_peer(speed: int) -> Peer:
    """AVIF at one of its speeds, 0 (slowest) to 10."""
    return Peer(
        "AVIF",
        f"4:4:4, speed {speed}",
        _pillow("avif", "libavif"),
        (0, 4, 9, 14, 20, 26, 33, 40, 48, 56, 64, 72, 80, 88),
        range(101),
        partial(_avif, speed=speed),
        _open,
        coded_size,
    )


def jpegxl_peer(effort: int) -> Peer:
    """JPEG XL at one of its efforts, 1 (fastest) to 10."""
    return Peer(
        "JPEG XL",
        f"VarDCT, effort {effort}, codestream without boxes",
        _imagecodecs_version("libjxl"),
        (25, 20, 16, 13, 10.5, 8.5, 6.8, 5.4, 4.3, 3.4, 2.7, 2.1, 1.6, 1.2, 0.9),
        tuple(25 / 1.01**k for k in range(400)),
        partial(_jpegxl, effort=effort),
        _jpegxl_decode,
    )


def hevc_peer(label: str, tune: str, preset: str) -> Peer:
    """HEVC intra by one of x265's tunings and presets."""
    return Peer(
        label,
        f"4:2:0, preset {preset}, tune {tune}; decoded by libde265",
        _hevc_version,
        range(0, 91, 5),
        range(0, 101, 2),  # libheif makes whole rate factors of them, (100 - quality) // 2
        partial(_hevc, preset=preset, tune=tune),
        _hevc_decode,
        coded_size,
    )


PEERS = {
    "jpeg": Peer(
        "JPEG",
        "4:2:0, progressive, optimised tables",
        _pillow("libjpeg_turbo", "libjpeg-turbo"),
        (2, 4, 7, 11, 16, 23, 32, 43, 55, 67, 77, 85, 91, 95),
        range(1, 96),
        _jpeg,
        _open,
    ),
    "jpeg2000": Peer(
        "JPEG 2000",
        "irreversible wavelet and colour transform, codestream without boxes",
        _pillow("jpg_2000", "OpenJPEG"),
        tuple(0.05 * 2 ** (k / 2) for k in range(11)),
        tuple(0.02 * 1.01**k for k in range(600)),
        _jpeg2000,
        _open,
    ),
    "webp": Peer(
        "WebP",
        "4:2:0, method 6",
        _pillow("webp", "libwebp"),
        (0, 3, 8, 15, 24, 34, 45, 57, 68, 76, 83, 89, 94),
        range(101),
        _webp,
        _open,
    ),
    "avif": avif_peer(2),
    "jpegxl": jpegxl_peer(9),
    "hevc_psnr": hevc_peer("HEVC intra (PSNR)", "psnr", "slow"),
    "hevc": hevc_peer("HEVC intra", "ssim", "placebo"),
}

# for whole frames, 50 times as large as crops: a search would take hours at the settings above
FRAME_PEERS = {
    **PEERS,
    "avif": avif_peer(4),
    "jpegxl": jpegxl_peer(7),
    "hevc": hevc_peer("HEVC intra", "ssim", "slow"),
}

# for whole flights at several sizes
FLIGHT_PEERS = {
    "hevc": hevc_peer("HEVC intra", "ssim", "medium"),
    "jpeg": PEERS["jpeg"],
    "avif": avif_peer(6),
    "jpegxl": jpegxl_peer(7),
}


def search(
    peer: Peer,
    pixels: Pixels,
    size: int,
    *,
    at_most: bool,
    start: float | None = None,
    enough: float | None = None,
) -> tuple[float, bytes] | None:
    """Find the finest setting within `size` bytes, or the coarsest that takes at least so many.

    Counted bytes (`Peer.size`) are taken to grow along `Peer.settings`.

    Args:
        start: a setting that is tried first, then those around it: with that of a similar picture
            fewer are tried.
        enough: with `at_most`, the share of `size` from which on nothing finer is looked for.

    Returns:
        The setting and its file, or None if no setting that was tried serves.
    """
    low, high = 0, len(peer.settings)
    near = None if start is None else list(peer.settings).index(start)
    stride = 1
    found = None
    while low < high:
        if near is None or (low > 0 and high < len(peer.settings)):
            middle = (low + high) // 2
        elif low == 0 and high == len(peer.settings):
            middle = near
        else:  # only one end is known: on from it, by more each time
            middle = max(high - stride, 0) if low == 0 else min(low + stride, high) - 1
            stride *= 2
        data = peer.encode(pixels, peer.settings[middle])
        counted = peer.size(data)
        if counted <= size if at_most else counted >= size:
            found = peer.settings[middle], data
            if at_most and enough is not None and counted >= enough * size:
                break
        if counted < size or (at_most and counted == size):
            low = middle + 1
        else:
            high = middle
    return found


def within(
    peer: Peer,
    pixels: Pixels,
    size: int,
    known: dict[int, int] | None = None,
    start: int | None = None,
) -> bytes:
    """The finest file within `size` bytes, or the coarsest there is if none is so small.

    Counted bytes (`Peer.size`) are taken to grow along `Peer.settings`, about as an exponential:
    settings are guessed by the logarithm of the bytes, which takes fewer files than halving does.

    Args:
        known: counted bytes of the same pixels by indices of `Peer.settings`. What this search
            encodes joins it, and makes the next one shorter.
        start: the index to try first where nothing is known: what a picture like this one had.
    """
    known = {} if known is None else known
    files: dict[int, bytes] = {}
    low = max((i for i, counted in known.items() if counted <= size), default=-1)
    high = min((i for i in known if i > low), default=len(peer.settings))
    halve = False
    while high - low > 1:
        width, bounded = high - low, low in known and high in known
        index = (low + high) // 2 if halve else _guess(known, low, high, size, len(peer.settings))
        if not known and start is not None:
            index = min(max(start, 0), high - 1)
        files[index] = peer.encode(pixels, peer.settings[index])
        known[index] = peer.size(files[index])
        low, high = (index, high) if known[index] <= size else (low, index)
        halve = not halve and bounded and high - low > width // 2  # guesses may creep
    best = max(low, 0)
    return files.get(best) or peer.encode(pixels, peer.settings[best])


def _guess(known: dict[int, int], low: int, high: int, size: int, count: int) -> int:
    """An index of `count`, between two others, both exclusive, whose file may have `size` bytes.

    Between two known files it is interpolated. Beyond them it is extrapolated, and a little more
    so that it may bound the search on that side. Bytes are taken to double within a tenth of the
    settings while one file is known; without any it is a quarter of the way, as few bytes are
    what most searches are for.
    """
    ends = [index for index in (low, high) if known.get(index)]
    if not ends or not size:
        return low + (high - low) // 4
    first = ends[0]
    second = ends[1] if len(ends) == 2 else max(known, key=lambda index: abs(index - first))
    slope = 10 * math.log(2) / count
    if known[second] and known[second] != known[first]:
        slope = math.log(known[second] / known[first]) / (second - first)
    step = math.log(size / known[first]) / slope
    further = 0 if len(ends) == 2 else math.copysign(1 + abs(step) / 8, step)
    return min(max(first + math.floor(step + further), low + 1), high - 1)
