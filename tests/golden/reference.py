"""An independent, slow writer of PCDC streams, and the fixtures that several test files share.

The writer follows the format's documentation and knows nothing of the codec's encoder, so what
it writes may hold any symbols: extreme ones, escapes, any level map.
"""

from __future__ import annotations

import base64
import hashlib
import json
import lzma
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from archive_pipeline.pcdc import entropy
from archive_pipeline.pcdc.bitstream import MODEL_BYTES, Header
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.constants import FIRST_CODED_SCALE, LEVEL_OFFSETS, SCALE_COUNT
from archive_pipeline.pcdc.decoding import Symbols
from archive_pipeline.pcdc.model import Model, stored_as
from archive_pipeline.pcdc.model_files import (
    CONFIG,
    DENOISER_CONFIG,
    DENOISER_WEIGHTS,
    FORMATS,
    WEIGHTS,
)
from archive_pipeline.pcdc.policy import Policy, PolicyConfig
from archive_pipeline.pcdc.transforms import TransformCodec, TransformConfig

GOLDEN = Path(__file__).resolve().parent
TINY = GOLDEN / "model"
STREAMS = GOLDEN / "streams.json"
RELEASED = GOLDEN / "released"
PACKED = WEIGHTS + ".xz"
PART = ".entropy.xz"
DENOISER_WIDTHS = {"latents": 24, "features": 4, "width_8": 32, "width_16": 64, "layers": 1}
PART_BITS = 12  # scale weights, biases and prior knots are multiples of 2^-12


@cache
def tiny_files() -> dict[str, bytes]:
    """Files of the test model; its weights are kept packed because most of them are zero."""
    return {
        CONFIG: (TINY / CONFIG).read_bytes(),
        WEIGHTS: lzma.decompress((TINY / PACKED).read_bytes()),
    }


@cache
def denoising_files() -> dict[str, bytes]:
    """The test model with an untrained denoiser that does change its input."""
    from archive_pipeline.pcdc.denoiser import Denoiser  # diffusers takes seconds

    torch.manual_seed(0)
    denoiser = Denoiser(**DENOISER_WIDTHS)
    torch.nn.init.normal_(denoiser.unet.conv_out.weight, std=0.003)
    tensors = {k: v.half().contiguous() for k, v in denoiser.state_dict().items()}
    return {
        **tiny_files(),
        DENOISER_CONFIG: json.dumps({"_class_name": "Denoiser", **DENOISER_WIDTHS}).encode(),
        DENOISER_WEIGHTS: save_tensors(tensors),
    }


@cache
def tiny_codec(dtype: torch.dtype = torch.float32) -> Codec:
    """The test model's codec, its networks in any precision; shared, so not to be altered."""
    model = Model(tiny_files())
    model.networks.to(dtype)
    return Codec(model)


@cache
def tiny_policy() -> Policy:
    """A policy for the test model, of random weights, that prefers various levels."""
    latents = tiny_codec().model.networks.config.latents
    torch.manual_seed(5)
    policy = Policy(PolicyConfig(latents, 8, 16, rate=(3.0, -0.03), slope=(-12.0, 0.1)))
    with torch.no_grad():
        policy.importance_of.weight.normal_(0, 6)
    return policy.eval().requires_grad_(False)


def write_model(folder: Path) -> Path:
    """Unpack the test model as an ordinary model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tiny_files().items():
        (folder / name).write_bytes(content)
    return folder


def entropy_part(model: Model) -> bytes:
    """Pack what entropy decoding depends on: integers, a small share of a model's bytes."""
    tensors = load_tensors(model.files[WEIGHTS])
    kept = {}
    for name, value in tensors.items():
        if name.startswith(("h_scale.", "prior.")):
            scaled = (value.double() * 2**PART_BITS).round()
            assert torch.equal(scaled / 2**PART_BITS, value.double())
            kept[name] = scaled.int()
        elif name.startswith("tables."):
            kept[name] = value
    config = {"config": model.files[CONFIG].decode()}
    return lzma.compress(save_tensors(kept, config), preset=9 | lzma.PRESET_EXTREME)


def decoder_of_part(packed: bytes, sha256: str) -> Codec:
    """A codec that decodes the symbols (not the pixels) of a model's streams from its part."""
    data = lzma.decompress(packed)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    config = header["__metadata__"]["config"]
    widths = json.loads(config)
    kind = widths.pop("format")
    with torch.device("meta"):
        shapes = TransformCodec(TransformConfig(**widths, **FORMATS[kind])).state_dict()
    tensors = {n: torch.zeros(value.shape, dtype=stored_as(n, kind)) for n, value in shapes.items()}
    for name, value in load_tensors(data).items():
        scaled = (value.double() / 2**PART_BITS).float()
        tensors[name] = value if name.startswith("tables.") else scaled
    model = Model({CONFIG: config.encode(), WEIGHTS: save_tensors(tensors)})
    model.sha256 = sha256
    return Codec(model)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def subprocess_environment(**extra: str) -> dict[str, str]:
    """The environment without any model path, with `extra`."""
    kept = {k: v for k, v in os.environ.items() if k != "ARCHIVE_MODEL_PATH"}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


# ------------------------------------------------------------------------ pictures


def texture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Something like ground from above: fractal noise, a few roofs with sharp edges, a road."""
    rng = np.random.default_rng(seed)
    out = np.full((height, width, 3), 110.0)
    yy, xx = np.mgrid[:height, :width]
    side = max(height, width, 1)
    for octave in range(1, 8):
        n = 2**octave + 1
        coarse = rng.normal(size=(n, n, 3)) * 90 / 2 ** (0.8 * octave)
        y, x = yy / side * (n - 1.001), xx / side * (n - 1.001)
        i, j = y.astype(int), x.astype(int)
        fy, fx = (y - i)[..., None], (x - j)[..., None]
        top = coarse[i, j] * (1 - fx) + coarse[i, j + 1] * fx
        bottom = coarse[i + 1, j] * (1 - fx) + coarse[i + 1, j + 1] * fx
        out += top * (1 - fy) + bottom * fy
    for _ in range(max(1, height * width // 8000)):
        top, left = int(rng.integers(-8, max(height, 1))), int(rng.integers(-8, max(width, 1)))
        h, w = rng.integers(4, 60, 2)
        out[max(top, 0) : top + h, max(left, 0) : left + w] = rng.uniform(0, 255, 3)
    out[np.abs(yy - 0.4 * xx - rng.uniform(0, side)) < 5] = 190
    out += rng.normal(size=out.shape) * 3
    return out.clip(0, 255).astype(np.uint8)


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def constant(height: int, width: int, value: int = 90) -> NDArray[np.uint8]:
    return np.full((height, width, 3), value, np.uint8)


def spots(height: int, width: int) -> NDArray[np.uint8]:
    """Black with a few white rectangles: far from what the networks expect."""
    out = np.zeros((height, width, 3), np.uint8)
    out[::97, ::53] = 255
    out[height // 3 : height // 3 + 16, width // 2 : width // 2 + 16] = 255
    return out


# ---------------------------------------------------------------- reference writer


def scale_indices(model: Model, symbols: Symbols) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Table indices of z and of q, as the format defines them."""
    step = torch.tensor([symbols.image_step])
    prior = model.networks.prior(step)[0].numpy().astype(np.int64)
    z_index = np.broadcast_to(prior[:, None, None], symbols.z.shape)
    base = model.networks.h_scale.indices(torch.from_numpy(symbols.z)[None], step)[0].numpy()
    height, width = symbols.q.shape[1:]
    offsets = np.array(LEVEL_OFFSETS)[symbols.levels.astype(int) - 1]
    offsets = np.kron(offsets, np.ones((2, 2), int))[:height, :width]
    q_index = np.clip(base[:, :height, :width].astype(np.int64) - offsets, 0, SCALE_COUNT - 1)
    return z_index, q_index


def write_stream(
    model: Model, symbols: Symbols, level_table: int = 0, lanes_log2: int = 0
) -> bytes:
    """Write one stream; symbols without a code are taken to be zero."""
    tables = model.tables
    z_index, q_index = scale_indices(model, symbols)
    residuals, before = [], 2
    for y, row in enumerate(symbols.levels.tolist()):
        for x, level in enumerate(row):
            before = symbols.levels[y - 1, 0] - 1 if x == 0 and y else before
            residuals.append((level - 1 - int(before)) % 5)
            before = level - 1
    index = q_index[q_index >= FIRST_CODED_SCALE]
    q = symbols.q[q_index >= FIRST_CODED_SCALE]
    limit = tables.limit(index)
    phases = [
        (np.full(len(residuals), SCALE_COUNT + level_table), np.array(residuals)),
        (z_index[z_index >= FIRST_CODED_SCALE], symbols.z[z_index >= FIRST_CODED_SCALE]),
        (index, np.clip(q, -limit, limit)),
    ]
    [payload] = entropy.encode(tables, [[phase] for phase in phases], 1 << lanes_log2)
    escapes = entropy.pack_escapes((np.abs(q) - limit)[np.abs(q) >= limit])
    prefix = bytes.fromhex(model.sha256)[:MODEL_BYTES]
    header = Header(
        prefix, symbols.height, symbols.width, symbols.image_step, lanes_log2, level_table
    )
    return header.pack() + payload + escapes


def random_symbols(
    model: Model, height: int, width: int, image_step: int, seed: int, *, spread: float = 1.0
) -> Symbols:
    """Symbols as their tables expect them, times `spread`, with any level map and some escapes."""
    rng = np.random.default_rng(seed)
    config = model.networks.config
    h, w = -(-height // 16), -(-width // 16)
    z = np.zeros((config.hyper_latents, -(-h // 4), -(-w // 4)), np.int64)
    levels = rng.integers(1, 6, (-(-h // 2), -(-w // 2))).astype(np.uint8)
    q = np.zeros((config.latents, h, w), np.int64)
    symbols = Symbols(height, width, image_step, levels, z, q)
    z_index, _ = scale_indices(model, symbols)
    bound = np.where(z_index < FIRST_CODED_SCALE, 0, model.tables.limit(z_index) - 1)
    symbols.z = np.clip(
        np.rint(rng.normal(size=z.shape) * 2 ** ((z_index - 32) / 8)), -bound, bound
    )
    symbols.z = symbols.z.astype(np.int64)
    _, q_index = scale_indices(model, symbols)
    drawn = rng.normal(size=q.shape) * 2 ** ((q_index - 32) / 8) * spread
    drawn[rng.random(q.shape) < 0.002] *= 300  # escapes, of one and of more bytes
    symbols.q = np.rint(drawn).astype(np.int64).clip(-32768, 32768)
    symbols.q[q_index < FIRST_CODED_SCALE] = 0
    return symbols


def escapes(model: Model, symbols: Symbols) -> int:
    _, index = scale_indices(model, symbols)
    beyond = np.abs(symbols.q) >= model.tables.limit(index)
    return int((beyond & (index >= FIRST_CODED_SCALE)).sum())


# ------------------------------------------------------------------------- records


def fingerprint(values: NDArray[Any]) -> str:
    """SHA-256 of an integer array, whatever type holds it."""
    data = np.ascontiguousarray(values.astype("<i4"))
    return hashlib.sha256(repr(data.shape).encode() + data.tobytes()).hexdigest()


def record(stream: bytes, symbols: Symbols) -> dict[str, Any]:
    """What a golden file keeps of a stream."""
    nonzero = np.flatnonzero(symbols.q)[:4]
    return {
        "stream": base64.b64encode(stream).decode(),
        "height": symbols.height,
        "width": symbols.width,
        "image_step": symbols.image_step,
        "levels": fingerprint(symbols.levels),
        "z": fingerprint(symbols.z),
        "q": fingerprint(symbols.q),
        "first_q": [[int(i), int(symbols.q.reshape(-1)[i])] for i in nonzero],
    }


def matches(entry: dict[str, Any], symbols: object) -> bool:
    """Whether decoded symbols are those that were recorded."""
    if not isinstance(symbols, Symbols):
        raise AssertionError(f"stream does not decode: {symbols}")
    stream = base64.b64decode(entry["stream"])
    return record(stream, symbols) == {
        k: v for k, v in entry.items() if k not in ("pixels", "note")
    }


def load_golden(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def same(a: Symbols, b: Symbols) -> bool:
    """Whether two tiles' symbols are identical."""
    return (
        (a.height, a.width, a.image_step) == (b.height, b.width, b.image_step)
        and np.array_equal(a.levels, b.levels)
        and np.array_equal(a.z, b.z)
        and np.array_equal(a.q, b.q)
    )
