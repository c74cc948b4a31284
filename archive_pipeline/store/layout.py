"""What is where in an archive, and how: keys, records, metadata, the grid of tiles and shards.

`archive_pipeline.store.archive` draws the whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote, unquote

import numpy as np
import zarr

from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.geo.georef import Georef, Window

FORMAT = 1
ATTRIBUTE = "archive_pipeline"
TILE = 608  # divides 5472 x 3648; other sizes end in narrower tiles
SHARD_TILES = 100  # an image of at most so many tiles is one shard
LARGE_SHARD_SIDE = 8  # tiles a side of the shards of larger images
CODECS = ("pcdc", "lossless", "jpeg")
MAX_SIDE = 1 << 24
MAX_BANDS = 1 << 16
MAX_METADATA = 64 << 20  # bytes of an image's `metadata` array
MAX_JSON = 16 << 20  # of a document inside an image's arrays: Python takes twenty times as much
MAX_DOCUMENT = 4 << 20  # of a record and other small keys
MAX_NAME = 240  # bytes of a node's name; file systems end at 255
LOSSLESS_CHUNK_BYTES = 4 << 20
# A shard is held in memory, three times over where it does not compress: none has more bytes of
# pixels than one of photographs, and one of so many bands that tiles are smaller has half of that.
SHARD_BYTES = SHARD_TILES * TILE * TILE * 3
# An image's arrays exist in two generations, which alternate: one is committed while the next is
# written beside it. Their shards' names tell them apart, by the separator in "c/0/0" and "c.0.0".
SEPARATORS: tuple[Literal["/"], Literal["."]] = ("/", ".")
STAGED = "zarr.next.json"  # an array's metadata until the image is committed that replaces another
TOP_LEVEL = {
    *("zarr.json", "flights", "documents", "models", "policies", "items.parquet"),
    *("verdicts", "retired"),
}
OVERVIEW_STEP = 8  # between an image and its overview, and from one overview to the next
OVERVIEW_FACTORS = tuple(OVERVIEW_STEP**n for n in range(1, 6))
WRITTEN = {"pixels", "mask", "metadata", "detections", "zarr.json", "unfinished.json"}
PLAN = "unfinished.json"  # what a large image is written from, while it is


class ArchiveError(ArchivePipelineError):
    """An archive, or an image in it, that cannot be used; one line that names it."""


class StoreError(ArchiveError):
    """A store that fails, which says nothing of what it holds: another time it may not."""


def reason_of(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):  # its text is the bare key
        return f"{error} is missing"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class RecordError(ArchiveError):
    """An image's record that is damaged."""


def check_size(what: str, size: int, most: int) -> None:
    """Refuse what an archive cannot hold, as nobody would read it again.

    Raises:
        ArchiveError: it has more bytes than it may.
    """
    if size > most:
        raise ArchiveError(f"{what} of {size} bytes is larger than the {most} that are allowed")


@dataclass(frozen=True)
class ImageEntry:
    """What the archive's metadata say of one committed image (cheap to list).

    Attributes:
        flight, id: its names.
        key: its group's path in the store.
        record: the `archive_pipeline` attribute: sha256, width, height, bands, dtype, codec
            ("pcdc", "lossless", or "jpeg" of an image kept as its file), model, source_bytes,
            archive_bytes, georef, captured, mask,
            detectors (SHA-256 of those whose detections are stored; absent without any),
            source_version (changes with a source at a URL or its sidecars), sidecars (digest of
            the source's, "" where it had none; absent in archives of earlier releases),
            camera (what `geo.pose.CameraPose.brief` gives; absent where nothing is known of one,
            and in archives of earlier releases),
            overviews (what each is smaller by, a side, from the finest on; absent without any),
            generation (absent means 0),
            placed_by (what told where a camera was: "DJI tags", "OpenSfM"; absent of others).
    """

    flight: str
    id: str
    key: str
    record: dict[str, Any]

    @property
    def detectable(self) -> bool:
        """Whether its pixels are what detectors take: three bands of 8 bits."""
        return self.record["dtype"] == "uint8" and self.record["bands"] == 3

    @property
    def generation(self) -> int:
        """Which of an image's two generations of arrays is committed."""
        return int(self.record.get("generation", 0))

    @property
    def overviews(self) -> tuple[int, ...]:
        """What each of its overviews is smaller by, a side, from the finest on."""
        return tuple(self.record.get("overviews", ()))

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays that the image has."""
        mask = ("mask",) if self.record["mask"] != "none" else ()
        detections = ("detections",) if self.record.get("detectors") else ()
        overviews = map(overview_name, self.overviews)
        return ("pixels", "metadata", *mask, *detections, *overviews)


# ------------------------------------------------------------------- keys


def image_key(flight: str, image_id: str) -> str:
    """Store path of an image's group; ids may hold any characters."""
    return f"flights/{quote_name(flight)}/{_node_name(image_id)}"


def document_key(flight: str, path: str) -> str:
    """Store path of a document's array, by its path below the flight's directory."""
    return f"documents/{quote_name(flight)}/{_node_name(path)}"


def _node_name(id: str) -> str:
    """The name of a node; of an overlong one the record holds the whole."""
    name = quote_name(id)
    if len(name) > MAX_NAME:
        return f"{name[: MAX_NAME - 40]}~{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    return name


def check_flight(flight: str) -> None:
    """Refuse a flight id that cannot be stored.

    Raises:
        ArchiveError: it is empty or too long.
    """
    if not 0 < len(quote_name(flight)) <= MAX_NAME:
        raise ArchiveError(f"{flight!r} is too long or empty for a flight's name; use --flight")


def overview_name(factor: int) -> str:
    """Name of the array of an image made smaller by a factor a side."""
    return f"overview_{factor}"


def policy_key(sha256: str) -> str:
    return f"policies/{sha256}.safetensors"


def quote_name(name: str) -> str:
    quoted = quote(name, safe=" ()+,-=@_.~", errors="surrogateescape")
    # no hidden, relative or reserved node names
    reserved = quoted[:1] in (".", "_") or quoted == "zarr.json"
    return f"%{ord(quoted[0]):02X}{quoted[1:]}" if reserved else quoted


def unquote_name(name: str) -> str:
    return unquote(name, errors="surrogateescape")


def image_name(key: str) -> str:
    """An image's name ("flight/id") by its group's path, for messages."""
    return unquote_name(key.removeprefix("flights/"))


def damaged_record(key: str, error: BaseException) -> RecordError:
    return RecordError(f"{image_name(key)}: damaged record: {reason_of(error)}")


# ---------------------------------------------------- records and metadata


def record_json(record: dict[str, Any], conventions: dict[str, Any]) -> bytes:
    return group_json({ATTRIBUTE: record, **conventions})


def sized_record_json(
    record: dict[str, Any], conventions: dict[str, Any], others: int
) -> tuple[bytes, dict[str, Any]]:
    """`record_json` of a record whose `archive_bytes` count it, too; and that record.

    Args:
        others: bytes of everything else that is stored for the image.
    """
    total = others
    while True:
        sized = {**record, "archive_bytes": total}
        content = record_json(sized, conventions)
        if total == others + len(content):
            return content, sized
        total = others + len(content)


def group_json(attributes: dict[str, Any]) -> bytes:
    group = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    return json.dumps(group, separators=(",", ":")).encode()


def is_model(name: object) -> bool:
    """Whether this is how models are named: a SHA-256, in lower case."""
    return isinstance(name, str) and re.fullmatch("[0-9a-f]{64}", name, re.ASCII) is not None


def check_record(record: dict[str, Any]) -> None:
    """Refuse a record whose fields are not what readers rely on (ValueError, KeyError, ...)."""
    limits = {"width": MAX_SIDE, "height": MAX_SIDE, "bands": MAX_BANDS}
    for name, limit in limits.items():
        if type(record[name]) is not int or not 0 < record[name] <= limit:
            raise ValueError(f"{name} {record[name]!r} is out of range")
    for name in ("source_bytes", "archive_bytes"):
        if type(record[name]) is not int or record[name] < 0:
            raise ValueError(f"{name} {record[name]!r} is not a size")
    if record["codec"] not in CODECS:
        raise ValueError(f"codec {record['codec']!r} is unknown")
    if record["codec"] == "pcdc" and not is_model(record.get("model")):
        raise ValueError(f"model {record.get('model')!r} is no SHA-256")
    if record["mask"] not in ("none", "alpha", "mask", "nodata"):
        raise ValueError(f"mask {record['mask']!r} is unknown")
    if not all(isinstance(record[name], str) and record[name] for name in ("id", "sha256")):
        raise ValueError("id and sha256 are not names")
    for name in ("source_version", "sidecars"):
        if not isinstance(record.get(name), str | None):
            raise ValueError(f"{name} is not a text")
    placed_by = record.get("placed_by")
    if placed_by is not None and not re.fullmatch(r"[A-Za-z0-9 .-]{1,60}", placed_by):
        raise ValueError("placed_by is not a source")
    if not isinstance(record["captured"], str | None):
        raise ValueError("captured is not a time")
    if not isinstance(record.get("camera"), dict | None):
        raise ValueError("its camera is none")
    detectors = record.get("detectors", [])
    if not isinstance(detectors, list) or not all(isinstance(d, str) for d in detectors):
        raise ValueError("detectors are not names")
    overviews = record.get("overviews", [])
    if not isinstance(overviews, list) or overviews != sorted(
        {f for f in overviews if type(f) is int and f in OVERVIEW_FACTORS}
    ):
        raise ValueError(f"overviews {overviews!r} are none")
    if type(record.get("generation", 0)) is not int or record.get("generation", 0) not in (0, 1):
        raise ValueError("generation is neither 0 nor 1")
    np.dtype(record["dtype"])
    georef = Georef.from_json(record["georef"])
    if not isinstance(georef.crs, str | None):
        raise ValueError("its CRS is not a text")
    numbers = [*(georef.transform or ()), *(x for point in georef.footprint or () for x in point)]
    if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        raise ValueError("its georeference is not finite")
    if georef.transform is not None and len(georef.transform) != 6:
        raise ValueError("its transform has not six numbers")
    if georef.footprint is not None and len(georef.footprint) < 4:
        raise ValueError("its footprint is not a ring")


def pack_metadata(source: SourceImage) -> bytes:
    """Serialise a source record and its byte-for-byte originals: a JSON index, then the blobs.

    Raises:
        ArchiveError: they are larger than `unpack_metadata` takes.
    """
    record = json.dumps(source.to_json(), separators=(",", ":")).encode()
    blobs = [("record", record), *source.metadata]
    index = json.dumps([[n, len(b)] for n, b in blobs], separators=(",", ":")).encode()
    check_size("its index of metadata", len(index), MAX_DOCUMENT)
    check_size("its record", len(record), MAX_JSON)
    packed = struct.pack("<I", len(index)) + index + b"".join(b for _, b in blobs)
    check_size("its metadata", len(packed), MAX_METADATA)
    return packed


def unpack_metadata(data: bytes) -> SourceImage:
    """Reverse `pack_metadata`.

    Raises:
        ValueError, KeyError, TypeError: the data are damaged, or larger than archives hold.
    """
    if len(data) < 4:
        raise ValueError("metadata end early")
    (length,) = struct.unpack_from("<I", data)
    if length > MAX_DOCUMENT:
        raise ValueError(f"an index of {length} bytes is larger than allowed")
    index = json.loads(data[4 : 4 + length])
    position = 4 + length
    blobs: list[tuple[str, bytes]] = []
    for name, size in index:
        if type(size) is not int or not 0 <= size <= len(data) - position:
            raise ValueError("metadata end early")
        blobs.append((str(name), data[position : position + size]))
        position += size
    if len(blobs[0][1]) > MAX_JSON:
        raise ValueError(f"a record of {len(blobs[0][1])} bytes is larger than allowed")
    return SourceImage.from_json(json.loads(blobs[0][1]), tuple(blobs[1:]))


# ------------------------------------------------------------- generations


def array_generation(metadata: bytes) -> int | None:
    """The generation that an array's metadata are of, None where they are damaged."""
    try:
        separator = json.loads(metadata)["chunk_key_encoding"]["configuration"]["separator"]
        return SEPARATORS.index(separator)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def is_shard(name: str, generation: int) -> bool:
    """Whether a key below an array is a shard of a generation."""
    separator = re.escape(SEPARATORS[generation])
    return re.fullmatch(rf"c({separator}[0-9]+)+", name) is not None


def strays(
    key: str, found: Collection[str], generation: int | None, arrays: Collection[str] | None
) -> list[str]:
    """Keys below an image that are no part of it, of those that writers of images make.

    Args:
        key: the image's group.
        found: all keys below it.
        generation: of the image; None without one.
        arrays: names of the image's arrays; any where None.
    """
    other = []
    for stored in found:
        name, _, rest = stored.removeprefix(f"{key}/").partition("/")
        known = name in WRITTEN or re.fullmatch(r"overview_[0-9]+", name)
        if not known and not name.endswith(".partial"):
            continue  # somebody else's
        if generation is None:
            other.append(stored)
            continue
        is_part = rest == "zarr.json" or is_shard(rest, generation)
        if stored != f"{key}/zarr.json" and not (is_part and (arrays is None or name in arrays)):
            other.append(stored)
    return other


# --------------------------------------------------------- tiles and shards


def overview_shape(height: int, width: int, factor: int) -> tuple[int, int]:
    """(height, width) of an overview: the last row and column may stand for fewer pixels."""
    return -(-height // factor), -(-width // factor)


def grid(shape: tuple[int, ...], itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunks and shards of an image array (height, width[, bands])."""
    rest = shape[2:]
    side, pixel = TILE, itemsize * math.prod(rest)
    while side > 64 and side * side * pixel > LOSSLESS_CHUNK_BYTES:
        side //= 2
    rows, columns = -(-shape[0] // side), -(-shape[1] // side)
    room = SHARD_BYTES if side == TILE else SHARD_BYTES // 2
    most = min(SHARD_TILES, max(1, room // (side * side * pixel)))
    if rows * columns > most:
        limit = min(LARGE_SHARD_SIDE, math.isqrt(most))
        rows, columns = _shard_side(rows, limit), _shard_side(columns, limit)
    return (side, side, *rest), (rows * side, columns * side, *rest)


def _shard_side(tiles: int, limit: int) -> int:
    """Tiles a side of a large image's shards: the last shard is not a sliver.

    Shards share the budget by their pixels, and a few pixels' share is not enough for a stream.
    """
    if tiles <= limit:
        return tiles
    sides = range(max(1, limit // 2), limit + 1)
    return max(sides, key=lambda side: ((tiles - 1) % side, side))


def shard_windows(array: zarr.Array) -> Iterator[Window]:
    """Windows (col, row, width, height) that cover an image array a whole shard at a time."""
    height, width = array.shape[:2]
    rows, cols = (array.shards or array.chunks)[:2]
    for row in range(0, height, rows):
        for col in range(0, width, cols):
            yield col, row, min(cols, width - col), min(rows, height - row)


def shard_count(array: zarr.Array) -> int:
    """Number of an array's shards."""
    outer = array.shards or array.chunks
    return math.prod(-(-n // s) for n, s in zip(array.shape, outer, strict=True))
