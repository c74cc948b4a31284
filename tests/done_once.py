"""What hundreds of tests ask for of the same few frames is worked out once a process.

Archiving the small flight again takes seconds of encoding and of matching frames, and gives the
same each time. That it does is proven where nothing is kept: by the tests that call the encoder
itself, and by those of commands in processes of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from archive_pipeline.codec import models
from archive_pipeline.geo import neighbours
from archive_pipeline.pcdc import encoding

if TYPE_CHECKING:
    from archive_pipeline.pcdc.codec import Codec
    from archive_pipeline.pcdc.model import Model

_streams: dict[object, list[bytes]] = {}
_models: dict[str, Model] = {}
_warnings: dict[object, list[tuple[str, str]]] = {}

encode_tiles, load_named = encoding.encode_tiles, models.load_named
neighbour_warnings = neighbours.neighbour_warnings


def contents(array: NDArray[np.uint8] | None) -> tuple[object, ...]:
    if array is None:
        return ()
    return array.shape, hashlib.sha256(np.ascontiguousarray(array)).digest()


def encoded_once(
    codec: Codec,
    tiles: list[NDArray[np.uint8]],
    budget: int,
    worth: encoding.Worth | None = None,
    raised: list[NDArray[np.uint8]] | None = None,
    strict: bool = True,
) -> list[bytes]:
    if worth is not None:
        return encode_tiles(codec, tiles, budget, worth, raised, strict)
    key = (
        *(codec.model.sha256, codec.model.device, codec.model.multiplies_in, budget, strict),
        *map(contents, tiles),
        *("plain" if raised is None else "raised", *map(contents, raised or ())),
    )
    if key not in _streams:
        _streams[key] = encode_tiles(codec, tiles, budget, None, raised, strict)
    return list(_streams[key])


def loaded_once(name: str) -> Model:
    sha256 = models.register(models.read_folder(models.find_folder(name)))
    if sha256 not in _models:
        _models[sha256] = load_named(name)
    return _models[sha256]


def compared_once(
    frames: Sequence[tuple[str, neighbours.Georef, neighbours.Gray | None]], width: int, height: int
) -> list[tuple[str, str]]:
    key = (width, height, *((id, georef, contents(grey)) for id, georef, grey in frames))
    if key not in _warnings:
        _warnings[key] = neighbour_warnings(frames, width, height)
    return list(_warnings[key])


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put these in place where commands find them when they run."""
    monkeypatch.setattr(encoding, "encode_tiles", encoded_once)
    monkeypatch.setattr(models, "load_named", loaded_once)
    monkeypatch.setattr(neighbours, "neighbour_warnings", compared_once)


def unpatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands work it all out."""
    monkeypatch.setattr(encoding, "encode_tiles", encode_tiles)
    monkeypatch.setattr(models, "load_named", load_named)
    monkeypatch.setattr(neighbours, "neighbour_warnings", neighbour_warnings)
