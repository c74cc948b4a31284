"""The `jpeg_file` codec of Zarr v3: one chunk, which is a whole JPEG file, to its pixels.

Registered through the `zarr.codecs` entry point. Its configuration::

    {"name": "jpeg_file", "configuration": {"bytes": 4024770, "salvaged": false}}

A chunk is the JPEG file itself, or its JPEG XL transcoding, which gives the file back to the byte
(ISO/IEC 18181-2, box `jbrd`); its first bytes tell which. `bytes` is the file's length. Pixels are
those that GDAL reads of the file: uint8 (height, width, 1 or 3). Where `salvaged`, the file is
damaged, and its pixels are as far as they can be decoded.

Chunks are written by `ingest` as files: pixels cannot be encoded.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.common import JSON, parse_named_configuration

from archive_pipeline.codec.transcoding import JXL_SIGNATURE, reconstruct
from archive_pipeline.errors import root_cause
from archive_pipeline.stages import stage

NAME = "jpeg_file"
MAX_BYTES = 256 << 20  # of a file, and of the pixels that are decoded of it at once
MAX_PIXEL_BYTES = 1 << 30
KEPT_BYTES = 256 << 20  # of decoded pixels, for the next window of the same frame


@dataclass(frozen=True)
class JPEGFileCodec(ArrayBytesCodec):
    """A whole JPEG file as the one chunk of an array uint8 (height, width, 1 or 3).

    Attributes:
        bytes: length of the file.
        salvaged: the file is damaged, and decoded as far as it can be.

    Raises:
        ValueError: the configuration is malformed, or the array is none of these; on decoding,
            the chunk is no such file.
    """

    is_fixed_size = False

    bytes: int
    salvaged: bool

    def __post_init__(self) -> None:
        if type(self.bytes) is not int or not 0 < self.bytes <= MAX_BYTES:
            raise ValueError(f"{NAME}: bytes must be at most {MAX_BYTES}, got {self.bytes!r}")
        if type(self.salvaged) is not bool:
            raise ValueError(f"{NAME}: salvaged must be true or false, got {self.salvaged!r}")

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        _, configuration = parse_named_configuration(data, NAME)
        if not isinstance(configuration, dict) or configuration.keys() != {"bytes", "salvaged"}:
            raise ValueError(
                f"{NAME}: configuration must hold bytes and salvaged, got {configuration!r}"
            )
        return cls(**configuration)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, JSON]:
        configuration: JSON = {"bytes": self.bytes, "salvaged": self.salvaged}
        return {"name": NAME, "configuration": configuration}

    def validate(self, *, shape: tuple[int, ...], dtype: object, chunk_grid: object) -> None:
        chunk = tuple(getattr(chunk_grid, "chunk_shape", shape))
        if chunk != shape:
            raise ValueError(f"{NAME} codes an image as one chunk, not by {chunk}")
        _check_shape(shape, dtype)

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> Self:
        _check_shape(array_spec.shape, array_spec.dtype)
        return self

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError("the size of a file does not follow from its pixels")

    async def encode(
        self, chunks_and_specs: Iterable[tuple[NDBuffer | None, ArraySpec]]
    ) -> Iterable[Buffer | None]:
        raise ValueError(f"{NAME}: pixels are read from a file, and cannot be written")

    async def decode(
        self, chunks_and_specs: Iterable[tuple[Buffer | None, ArraySpec]]
    ) -> Iterable[NDBuffer | None]:
        return [
            None if data is None else await asyncio.to_thread(self._decode, data, spec)
            for data, spec in chunks_and_specs
        ]

    def _decode(self, stream: Buffer, spec: ArraySpec) -> NDBuffer:
        with stage("decode"):
            pixels = _frames.decode(stream.to_bytes(), self, spec.shape)
        return spec.prototype.nd_buffer.from_numpy_array(pixels)


def file_of(stream: bytes, size: int, pixels: int) -> bytes:
    """The JPEG file that a chunk holds.

    Args:
        size: of the file, in bytes.
        pixels: of its picture.

    Raises:
        ValueError: it holds none of that length.
        NotInstalled: it is kept as JPEG XL, which needs imagecodecs.
    """
    if stream.startswith(JXL_SIGNATURE):
        return reconstruct(stream, size, pixels)
    if not stream.startswith(b"\xff\xd8\xff"):
        raise ValueError("the chunk is neither JPEG nor JPEG XL")
    if len(stream) != size:
        raise ValueError(f"the chunk is a JPEG of {len(stream)} bytes, not {size}")
    return stream


def pixels_of(jpeg: bytes, shape: tuple[int, ...], salvaged: bool) -> NDArray[np.uint8]:
    """Pixels uint8 (height, width, 1 or 3) of a JPEG file, as GDAL reads them.

    Args:
        shape: that they must have.
        salvaged: damage is no error.

    Raises:
        ValueError: it is damaged, or a picture of another shape.
    """
    import rasterio
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    from archive_pipeline.gdal import local_env

    strict = "NO" if salvaged else "YES"
    env = local_env(GDAL_ERROR_ON_LIBJPEG_WARNING=strict, GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR")
    try:
        with env, warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.MemoryFile(jpeg) as memory, memory.open(driver="JPEG") as file:
                found = file.height, file.width, file.count
                if found != shape or {*file.dtypes} != {"uint8"}:
                    raise ValueError(f"a JPEG of {file.dtypes[0]} {found}, not {shape}")
                pixels = np.empty(shape, np.uint8)
                file.read(out=np.moveaxis(pixels, -1, 0))
    except (RasterioError, CPLE_BaseError) as error:
        raise ValueError(f"damaged JPEG: {' '.join(str(root_cause(error)).split())}") from error
    return pixels


class _Frames:
    """Pixels of the frames that were decoded last: the next window is mostly of the same one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[bytes, JPEGFileCodec], NDArray[np.uint8]] = OrderedDict()

    def decode(
        self, stream: bytes, codec: JPEGFileCodec, shape: tuple[int, ...]
    ) -> NDArray[np.uint8]:
        """Pixels of a chunk, not to be changed."""
        key = hashlib.sha256(stream).digest(), codec
        with self._lock:
            held = self._kept.get(key)
            if held is not None and held.shape == shape:
                self._kept.move_to_end(key)
                return held
        jpeg = file_of(stream, codec.bytes, shape[0] * shape[1])
        pixels = pixels_of(jpeg, shape, codec.salvaged)
        pixels.flags.writeable = False
        with self._lock:
            self._kept[key] = pixels
            while len(self._kept) > 1 and sum(p.nbytes for p in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return pixels


_frames = _Frames()


def _check_shape(shape: tuple[int, ...], dtype: object) -> None:
    if len(shape) != 3 or shape[2] not in (1, 3) or math.prod(shape) > MAX_PIXEL_BYTES:
        raise ValueError(f"{NAME} codes (height, width, 1 or 3) of up to 1 GiB, not {shape}")
    if dtype.to_native_dtype() != np.uint8:  # type: ignore[attr-defined]
        raise ValueError(f"{NAME} codes uint8, not {dtype}")
