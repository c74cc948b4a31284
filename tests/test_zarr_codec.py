"""The codec inside Zarr: whole and partial writes, margins, other processes, clear refusals."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from golden import reference as ref
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.registry import get_codec_class
from zarr.storage import LocalStore, MemoryStore

from archive_pipeline.codec import models
from archive_pipeline.codec.zarr_codec import PCDCCodec, trim
from archive_pipeline.pcdc.allocation import BudgetTooSmall
from archive_pipeline.pcdc.bitstream import UnknownModel
from archive_pipeline.pcdc.encoding import encode_tiles
from archive_pipeline.pcdc.entropy import CorruptStream
from archive_pipeline.pcdc.model_files import digest

pytestmark = pytest.mark.usefixtures("done_anew")

TILE = 128
SHA256 = digest(ref.tiny_files())


@pytest.fixture(autouse=True)
def _model() -> Iterator[None]:
    models.register(ref.tiny_files())
    with ref.threads(1), zarr.config.set({"codec_pipeline.batch_size": 1024}):
        yield


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> MemoryStore | LocalStore:
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "a.zarr")


def create(
    store: Any, shape: tuple[int, ...], bits_per_pixel: float = 1.5, **changes: Any
) -> zarr.Array:
    shard = tuple(-(-n // TILE) * TILE for n in shape[:2]) + shape[2:]
    arguments = {
        "shape": shape,
        "chunks": (TILE, TILE, *shape[2:]),
        "shards": shard,
        "dtype": "uint8",
        "serializer": PCDCCodec(SHA256, bits_per_pixel),
        "compressors": [Crc32cCodec()],
        "fill_value": 0,
        "dimension_names": ["y", "x", "band"][: len(shape)],
        **changes,
    }
    return zarr.create_array(store, name="pixels", overwrite=True, **arguments)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


def shard_bytes(store: Any) -> int:
    if isinstance(store, MemoryStore):
        return len(store._store_dict["pixels/c/0/0/0"].to_bytes())
    return (store.root / "pixels" / "c" / "0" / "0" / "0").stat().st_size


# ---------------------------------------------------------------- writes and reads


def test_whole_image(store: Any) -> None:
    frame = ref.texture(300, 420, 1)
    array = create(store, frame.shape)
    array[:] = frame
    pixels = array[:]
    assert pixels.dtype == np.uint8
    assert pixels.shape == frame.shape
    assert psnr(pixels, frame) > psnr(frame, np.broadcast_to(frame.mean((0, 1)), frame.shape)) + 2
    # streams keep the budget; Zarr's index and checksums come on top
    tiles = 12
    assert shard_bytes(store) <= 300 * 420 * 1.5 / 8 + tiles * (16 + 4) + 4
    # a window is the same pixels, whatever else is read with it
    for window in np.s_[:, :], np.s_[5:6, 7:8], np.s_[100:290, 120:260], np.s_[256:, 384:]:
        np.testing.assert_array_equal(array[window], pixels[window])
    again = zarr.open_array(store, path="pixels", mode="r")
    np.testing.assert_array_equal(again[:], pixels)


def test_unsharded_array() -> None:
    frame = ref.texture(200, 130, 2)
    array = create(MemoryStore(), frame.shape, shards=None)
    array[:] = frame
    assert psnr(array[:], frame) > 15


def test_partial_writes_leave_other_tiles_alone(store: Any) -> None:
    frame = ref.texture(256, 256, 3)
    array = create(store, frame.shape)
    array[:TILE, :TILE] = frame[:TILE, :TILE]
    first = array[:TILE, :TILE]
    assert not array[TILE:].any()  # never written: the fill value
    array[TILE:, TILE:] = frame[TILE:, TILE:]
    again = array[:]
    assert not again[:TILE, TILE:].any()
    assert psnr(again[TILE:, TILE:], frame[TILE:, TILE:]) > 15
    np.testing.assert_array_equal(again[:TILE, :TILE], first)  # not coded a second time


def test_unwritten_and_black_images_are_exact(store: Any) -> None:
    array = create(store, (200, 200, 3), bits_per_pixel=0.01)
    assert not array[:].any()
    array[:] = 0
    assert not array[:].any()


@pytest.mark.parametrize("shape", [(128, 129), (1, 1), (130, 257), (250, 5)])
def test_margins_are_exact_and_change_nothing_else(shape: tuple[int, int]) -> None:
    frame = ref.texture(*shape, 4) | 1  # no pixel equals the fill value
    store = MemoryStore()
    array = create(store, (256, 384, 3), bits_per_pixel=400)
    array[: shape[0], : shape[1]] = frame
    out = array[:]
    assert not out[shape[0] :].any()
    assert not out[:, shape[1] :].any()
    whole = create(MemoryStore(), (*shape, 3), bits_per_pixel=400)
    whole[:] = frame
    np.testing.assert_array_equal(out[: shape[0], : shape[1]], whole[:])


def test_fill_value_other_than_zero() -> None:
    frame = np.full((200, 200, 3), 255, np.uint8)
    frame[:90, :150] = ref.texture(90, 150, 5)
    array = create(MemoryStore(), frame.shape, fill_value=255)
    array[:] = frame
    out = array[:]
    np.testing.assert_array_equal(out[90:], frame[90:])
    np.testing.assert_array_equal(out[:, 150:], frame[:, 150:])
    assert psnr(out, frame) > 15


def test_trim() -> None:
    chunk = np.zeros((8, 9, 3), np.uint8)
    assert trim(chunk, 0).shape == (0, 0, 3)
    chunk[2, 5, 1] = 7
    assert trim(chunk, 0).shape == (3, 6, 3)
    assert trim(chunk, 7).shape == (8, 9, 3)
    chunk[:] = 255
    chunk[0, 0, 2] = 0
    assert trim(chunk, 255).shape == (1, 1, 3)


def test_batches_of_one_are_within_the_budget_as_well() -> None:
    frame = ref.texture(256, 256, 6)
    store = MemoryStore()
    with zarr.config.set({"codec_pipeline.batch_size": 1}):
        array = create(store, frame.shape)
        array[:] = frame
        a = array[:]
    np.testing.assert_array_equal(array[:], a)
    assert shard_bytes(store) <= frame.shape[0] * frame.shape[1] * 1.5 / 8 + 4 * 20 + 4


def test_impossible_budget_fails_before_anything_is_stored() -> None:
    store = MemoryStore()
    array = create(store, (100, 100, 3), bits_per_pixel=0.001)
    with pytest.raises(BudgetTooSmall):
        array[:] = ref.texture(100, 100)
    assert not [key for key in store._store_dict if "/c/" in key]


# ----------------------------------------------------------------- other processes

READER = """
import hashlib, json, sys, zarr
group = zarr.open(sys.argv[1], mode="r")
pixels = group["pixels"]
out = {"whole": hashlib.sha256(pixels[:].tobytes()).hexdigest(),
       "window": hashlib.sha256(pixels[40:170, 100:201].tobytes()).hexdigest()}
import xarray
data = xarray.open_zarr(sys.argv[1], consolidated=False)["pixels"]
out["xarray"] = hashlib.sha256(data.values.tobytes()).hexdigest()
out["xarray_window"] = hashlib.sha256(
    data.isel(y=slice(40, 170), x=slice(100, 201)).values.tobytes()).hexdigest()
print(json.dumps(out))
"""


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=ref.subprocess_environment(**environment),
        timeout=600,
    )


def test_zarr_and_xarray_open_it_without_an_import(tmp_path: Path) -> None:
    frame = ref.texture(250, 210, 7)
    path = str(tmp_path / "a.zarr")
    zarr.create_group(path)
    array = create(path, frame.shape)
    array[:] = frame
    pixels = array[:]
    whole = hashlib.sha256(pixels.tobytes()).hexdigest()
    window = hashlib.sha256(pixels[40:170, 100:201].tobytes()).hexdigest()
    ref.write_model(tmp_path / "models" / SHA256)
    assert "archive_pipeline" not in READER
    done = run(READER, path, ARCHIVE_MODEL_PATH=str(tmp_path / "models"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "whole": whole,
        "window": window,
        "xarray": whole,
        "xarray_window": window,
    }
    # and where the model is nowhere to be found, the error says what to do
    done = run(READER, path)
    assert done.returncode
    assert f"UnknownModel: model {SHA256[:12]} is not at hand" in done.stderr
    assert "ARCHIVE_MODEL_PATH" in done.stderr


def test_metadata_opens_without_torch(tmp_path: Path) -> None:
    path = str(tmp_path / "a.zarr")
    zarr.create_group(path)
    create(path, (100, 100, 3))
    script = """
import sys, zarr
array = zarr.open(sys.argv[1])["pixels"]
print(array.shape, type(array.metadata.codecs[0].codecs[0]).__name__, "torch" in sys.modules)
"""
    done = run(script, path)
    assert done.stdout.strip() == "(100, 100, 3) PCDCCodec False", done.stderr


# ----------------------------------------------------------------------- refusals


def test_entry_point_and_configuration_round_trip() -> None:
    assert get_codec_class("pcdc") is PCDCCodec
    codec = PCDCCodec(SHA256, 0.24)
    data = json.loads(json.dumps(codec.to_dict()))
    assert data == {"name": "pcdc", "configuration": {"model": SHA256, "bits_per_pixel": 0.24}}
    assert PCDCCodec.from_dict(data) == codec
    with pytest.raises(NotImplementedError):
        codec.compute_encoded_size(1, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "configuration",
    [
        {},
        {"model": SHA256},
        {"bits_per_pixel": 1.0},
        {"model": SHA256, "bits_per_pixel": 1.0, "quality": 3},
        {"model": "../../etc", "bits_per_pixel": 1.0},
        {"model": SHA256.upper(), "bits_per_pixel": 1.0},
        {"model": SHA256[:-1], "bits_per_pixel": 1.0},
        {"model": SHA256 + "\n", "bits_per_pixel": 1.0},
        {"model": None, "bits_per_pixel": 1.0},
        *({"model": SHA256, "bits_per_pixel": b} for b in (0, -1.0, "1", None, True, [1])),
        {"model": SHA256, "bits_per_pixel": float("nan")},
        {"model": SHA256, "bits_per_pixel": float("inf")},
    ],
)
def test_malformed_configuration(configuration: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^pcdc: "):
        PCDCCodec.from_dict({"name": "pcdc", "configuration": configuration})


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "uint16"}, "uint8, not"),
        ({"dtype": "float32"}, "uint8, not"),
        ({"shape": (256, 256, 4), "chunks": (128, 128, 4)}, "height, width, 3"),
        ({"shape": (256, 256, 3), "chunks": (128, 128, 1)}, "height, width, 3"),
        ({"shape": (256, 256), "chunks": (128, 128)}, "height, width, 3"),
        ({"shape": (2, 256, 256, 3), "chunks": (1, 128, 128, 3)}, "height, width, 3"),
        ({"shape": (8192, 8192, 3), "chunks": (8192, 8192, 3)}, "up to 4096"),
    ],
)
def test_other_arrays_are_refused_when_made(
    changes: dict[str, Any], message: str, sharded: bool
) -> None:
    changes = {"shape": (256, 256, 3), **changes}
    changes["shards"] = changes["shape"] if sharded else None
    changes["dimension_names"] = None
    shape = changes.pop("shape")
    with pytest.raises(ValueError, match=message):
        create(MemoryStore(), shape, **changes)


def test_unknown_model_when_reading() -> None:
    array = create(MemoryStore(), (50, 50, 3), serializer=PCDCCodec("0" * 64, 1.0))
    with pytest.raises(UnknownModel, match="000000000000 is not at hand"):
        array[:] = 1


def test_corrupt_tile_is_an_error_and_others_still_read() -> None:
    store = MemoryStore()
    frame = ref.texture(TILE, 2 * TILE, 8)
    array = create(store, frame.shape, compressors=None, shards=None)
    array[:] = frame
    pixels = array[:]
    key = "pixels/c/0/1/0"
    data = bytearray(store._store_dict[key].to_bytes())
    data[60] ^= 4
    store._store_dict[key] = type(store._store_dict[key]).from_bytes(bytes(data))
    with pytest.raises(CorruptStream, match="tile 1 of 2"):
        array[:]
    np.testing.assert_array_equal(array[:, :TILE], pixels[:, :TILE])


def test_checksum_finds_damage_first() -> None:
    store = MemoryStore()
    array = create(store, (TILE, TILE, 3), shards=None)
    array[:] = ref.texture(TILE, TILE)
    key = "pixels/c/0/0/0"
    data = store._store_dict[key].to_bytes()
    store._store_dict[key] = type(store._store_dict[key]).from_bytes(data[:-1] + b"\0")
    with pytest.raises(ValueError, match="checksum"):
        array[:]


def test_a_tile_larger_than_its_chunk_is_refused() -> None:
    """A stream moved to an array of smaller chunks must not write past them."""
    store = MemoryStore()
    array = create(store, (64, 64, 3), chunks=(64, 64, 3), shards=None, compressors=None)
    array[:] = 9
    [stream] = encode_tiles(models.codec_for(SHA256), [ref.texture(65, 64)], 10_000)
    buffer = type(store._store_dict["pixels/c/0/0/0"])
    store._store_dict["pixels/c/0/0/0"] = buffer.from_bytes(stream)
    with pytest.raises(CorruptStream, match="65x64 pixels, more than its 64x64 tile"):
        array[:]


def test_other_serializers_are_unaffected() -> None:
    array = create(MemoryStore(), (10, 10, 3), serializer=BytesCodec(), shards=None)
    array[:] = 7
    assert (array[:] == 7).all()
