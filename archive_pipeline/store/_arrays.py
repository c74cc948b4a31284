"""Arrays of an archive that a stranger may have made: only what ingest writes, and bounded.

Zarr reads any codec that is installed, and a chunk of a few bytes may decode to gigabytes. So an
array's metadata must have the form that `image_writer` gives them, in this release or in one
before; and what a chunk decodes to, and how much is read of its shard, follows from its shape.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from typing import Any

import zarr
from zarr.abc.codec import Codec
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, ShardingCodec
from zarr.core.array_spec import ArrayConfig, ArraySpec
from zarr.core.buffer import Buffer
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.storage import StorePath

from archive_pipeline.codec.jpeg_codec import JPEGFileCodec
from archive_pipeline.codec.zarr_codec import PCDCCodec
from archive_pipeline.store._backends import CompleteStore
from archive_pipeline.store.layout import SEPARATORS

LARGEST_TILE = 608  # pixels a side, in archives of any release
MOST_TILES = 100  # in a shard
MAX_CHUNK = 256 << 20  # bytes
MAX_SHARD = 1 << 30  # bytes of pixels
# Stored, a chunk has a few bytes more than decoded, at most: headers, checksum, place in the shard.
CHUNK_OVERHEAD = 1 << 10
FILE_OVERHEAD = 64 << 10  # of a small JPEG file's transcoding
FRAME = struct.Struct("<4BIII")  # Blosc's header: versions, flags, sizes decoded, of blocks, stored
INDEX_CODECS = ("bytes", "crc32c")
KEYS = [{"name": "default", "configuration": {"separator": s}} for s in SEPARATORS]
BLOSC_FIELDS = {"typesize", "cname", "clevel", "shuffle", "blocksize"}


def open_array(store: Store, key: str, document: bytes, *, sharded: bool) -> zarr.Array:
    """Open an array for reading, whose chunks decode to what its metadata say or not at all.

    Args:
        document: content of its `zarr.json`.
        sharded: whether it is an image in shards, or as one file, or bytes in one chunk.

    Raises:
        ValueError, KeyError, TypeError, ...: the metadata are none that ingest writes.
    """
    content = json.loads(document)
    _check_form(content, sharded)
    metadata = ArrayV3Metadata.from_dict(content)
    metadata = replace(metadata, codecs=tuple(map(_bounded, metadata.codecs)))
    outer = metadata.chunk_grid.chunk_shape  # type: ignore[attr-defined]
    [first, *_] = metadata.codecs
    inner = first.chunk_shape if isinstance(first, ShardingCodec) else outer
    count = math.prod(-(-n // m) for n, m in zip(outer, inner, strict=True))
    itemsize = metadata.dtype.to_native_dtype().itemsize
    most = math.prod(outer) * itemsize + count * CHUNK_OVERHEAD
    whole = isinstance(first, JPEGFileCodec)
    if isinstance(first, JPEGFileCodec):  # a file, which may hold more than pixels
        most = first.bytes + FILE_OVERHEAD
    for shape, limit in ((inner, MAX_SHARD if whole else MAX_CHUNK), (outer, MAX_SHARD)):
        if not 0 < math.prod(shape) * itemsize <= limit:
            raise ValueError(f"tiles of {shape} are empty or larger than allowed")
    path = StorePath(CompleteStore(store, most), key)
    return zarr.Array(zarr.AsyncArray(metadata, path, ArrayConfig.from_dict({})))


def _check_form(content: dict[str, Any], sharded: bool) -> None:
    """Refuse metadata that ingest does not write, before anything is made of them."""
    if (content["zarr_format"], content["node_type"]) != (3, "array"):
        raise ValueError("it is no array of Zarr v3")
    shape, outer = content["shape"], content["chunk_grid"]["configuration"]["chunk_shape"]
    codecs = content["codecs"]
    if not all(_is_shape(one) and len(one) == len(shape) for one in (shape, outer)):
        raise ValueError(f"shapes {shape} and {outer} are malformed")
    if content["chunk_key_encoding"] not in KEYS or content.get("storage_transformers"):
        raise ValueError("its chunks are not stored as those of archives")
    if not sharded:
        if outer != shape:
            raise ValueError(f"chunks of {outer} are not the whole")
        _check_codecs(codecs)
        return
    names = _names(codecs)
    if names == ["jpeg_file", "crc32c"]:
        return  # it looks at its configuration and shapes itself
    if names != ["sharding_indexed"]:
        raise ValueError(f"codecs {names} are not those of an image")
    settings = codecs[0]["configuration"]
    inner = settings["chunk_shape"]
    if not _is_shape(inner) or len(inner) != len(shape) or len(shape) < 2:
        raise ValueError(f"tiles of {inner} are malformed")
    if max(inner[:2]) > LARGEST_TILE or inner[2:] != shape[2:]:
        raise ValueError(f"tiles of {inner} are larger than allowed")
    if math.prod(-(-n // m) for n, m in zip(outer, inner, strict=True)) > MOST_TILES:
        raise ValueError(f"shards of {outer} have more tiles of {inner} than allowed")
    index = settings["index_codecs"]
    if tuple(_names(index)) != INDEX_CODECS or settings.get("index_location", "end") != "end":
        raise ValueError(f"index codecs {_names(index)} are not those of an image")
    _check_codecs(settings["codecs"])


def _check_codecs(codecs: list[dict[str, Any]]) -> None:
    names = _names(codecs)
    if names == ["pcdc", "crc32c"]:
        return  # it looks at its configuration itself
    if names != ["bytes", "blosc", "crc32c"]:
        raise ValueError(f"codecs {names} are none that archives hold")
    settings = codecs[1]["configuration"]
    if settings.keys() > BLOSC_FIELDS or settings["cname"] != "zstd":
        raise ValueError(f"blosc: {settings} is none that archives hold")


def _names(codecs: list[dict[str, Any]]) -> list[str]:
    return [str(codec["name"]) for codec in codecs]


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n > 0 for n in value)


def _bounded(codec: Codec) -> Codec:
    """The same codec; where it is Blosc, one that refuses frames of another size."""
    if isinstance(codec, ShardingCodec):
        return replace(codec, codecs=tuple(map(_bounded, codec.codecs)))
    if isinstance(codec, BloscCodec):
        return BoundedBlosc(
            typesize=codec.typesize,
            cname=codec.cname,
            clevel=codec.clevel,
            shuffle=codec.shuffle,
            blocksize=codec.blocksize,
        )
    return codec


class BoundedBlosc(BloscCodec):
    """Blosc that decodes a chunk only to the size that it must have."""

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        stored = len(chunk_bytes)
        if stored < FRAME.size:
            raise ValueError(f"a Blosc frame of {stored} bytes is shorter than its header")
        head = FRAME.unpack(chunk_bytes[: FRAME.size].to_bytes())
        decoded, said = head[4], head[6]
        expected = math.prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize
        if (decoded, said) != (expected, stored):
            raise ValueError(
                f"a Blosc frame of {said} bytes decodes to {decoded}, not {stored} to {expected}"
            )
        return await super()._decode_single(chunk_bytes, chunk_spec)


def model_of(array: zarr.Array) -> str | None:
    """SHA-256 of the model that an array's pixels are coded with; None where they are lossless."""
    metadata = array.metadata
    assert isinstance(metadata, ArrayV3Metadata)
    [first, *_] = metadata.codecs
    inner = first.codecs if isinstance(first, ShardingCodec) else metadata.codecs
    return next((codec.model for codec in inner if isinstance(codec, PCDCCodec)), None)
