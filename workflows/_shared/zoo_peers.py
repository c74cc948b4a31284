"""Models of CompressAI's zoo as further codecs to compare with.

Their weights are downloaded by CompressAI, or lie in $TORCH_HOME/hub/checkpoints under the names
that it gives them. They are pickles of a stranger's making: load only those you trust.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import struct
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np
from peers import PEERS, Peer, Pixels

QUALITIES = {
    "bmshj2018-factorized": 8,
    "bmshj2018-hyperprior": 8,
    "mbt2018-mean": 8,
    "mbt2018": 8,
    "cheng2020-anchor": 6,
    "cheng2020-attn": 6,
}
"""Architectures that are trained for squared error, and how many qualities each has."""
MULTIPLE = 64  # sides that all of them take
HEADER = struct.Struct("<BHHB")  # quality, height, width, strings


def _zoo() -> ModuleType:
    return importlib.import_module("compressai.zoo")


@cache
def _model(name: str, quality: int) -> Any:
    """A model of the zoo, with its weights; whatever goes wrong there is raised."""
    return _zoo().image_models[name](quality=quality, pretrained=True, progress=False).eval()


def _version(name: str) -> str:
    """The library's version.

    Raises:
        ImportError: it is not installed, or the weights cannot be had.
    """
    _zoo()
    try:
        _model(name, 1)
    except Exception as error:  # of downloads, files, pickles
        reason = " ".join(str(error).split())
        place = "$TORCH_HOME/hub/checkpoints, by default in ~/.cache/torch"
        raise ImportError(
            f"its weights cannot be had ({reason}); they belong in {place}"
        ) from error
    return f"CompressAI {importlib.metadata.version('compressai')}"


def _encode(pixels: Pixels, quality: float, name: str) -> bytes:
    import torch

    height, width = pixels.shape[:2]
    more = (0, -height % MULTIPLE), (0, -width % MULTIPLE), (0, 0)
    padded = np.pad(pixels, more, mode="edge").transpose(2, 0, 1)
    with torch.no_grad():
        coded = _model(name, int(quality)).compress(torch.from_numpy(padded)[None].float() / 255)
    strings = [one for [one] in coded["strings"]]
    lengths = struct.pack(f"<{len(strings)}I", *map(len, strings))
    header = HEADER.pack(int(quality), height, width, len(strings))
    shape = struct.pack("<HH", *coded["shape"])
    return header + lengths + shape + b"".join(strings)


def _parts(data: bytes) -> tuple[int, int, int, tuple[int, int], list[bytes]]:
    quality, height, width, count = HEADER.unpack_from(data)
    at = HEADER.size
    lengths = struct.unpack_from(f"<{count}I", data, at)
    shape = struct.unpack_from("<HH", data, at + 4 * count)
    at += 4 * count + 4
    strings = []
    for length in lengths:
        strings.append(data[at : at + length])
        at += length
    return quality, height, width, (shape[0], shape[1]), strings


def _decode(data: bytes, name: str) -> Pixels:
    import torch

    quality, height, width, shape, strings = _parts(data)
    with torch.no_grad():
        made = _model(name, quality).decompress([[one] for one in strings], shape)["x_hat"]
    pixels = (made[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return np.ascontiguousarray(pixels[:height, :width].numpy())


def _size(data: bytes) -> int:
    """Bytes of the strings, as CompressAI's own evaluation counts them."""
    return sum(map(len, _parts(data)[4]))


def zoo_peer(name: str) -> Peer:
    """A model of the zoo, by its architecture's name, trained for squared error."""
    return Peer(
        name,
        "squared error; bytes of its strings alone",
        partial(_version, name),
        range(1, QUALITIES[name] + 1),
        range(1, QUALITIES[name] + 1),
        partial(_encode, name=name),
        partial(_decode, name=name),
        _size,
    )


ALL_PEERS = {**PEERS, **{f"compressai:{name}": zoo_peer(name) for name in QUALITIES}}
