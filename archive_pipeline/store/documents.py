"""A flight's documents: files that are no images, byte for byte.

Each is an array of bytes in one chunk, `documents/<flight>/<path>`, whose metadata hold its record.
They are written last, by one write, which commits it. A document that is replaced stays until
then: both generations' chunks have names of their own, as those of images have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from archive_pipeline.flight.documents import MAX_BYTES
from archive_pipeline.store._arrays import open_array
from archive_pipeline.store._backends import Stored
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.layout import (
    ATTRIBUTE,
    SEPARATORS,
    ArchiveError,
    RecordError,
    array_generation,
    check_size,
    document_key,
    group_json,
    is_shard,
    quote_name,
    reason_of,
    unquote_name,
)

ROOT = "documents"
MAX_PATH = 4096  # characters
COMPRESSOR = BloscCodec(cname="zstd", clevel=7, shuffle="noshuffle", typesize=1)


@dataclass(frozen=True)
class DocumentEntry:
    """What the archive says of a document.

    Attributes:
        flight: its flight.
        path: its path below the flight's directory, with forward slashes.
        key: its array's path in the store.
        size: bytes of the file.
        sha256: hex digest of them.
        archive_bytes: everything stored for it.
        generation: which of both generations of its chunk is committed.
    """

    flight: str
    path: str
    key: str
    size: int
    sha256: str
    archive_bytes: int
    generation: int


def write_document(archive: Archive, flight: str, path: str, data: bytes) -> DocumentEntry:
    """Store a document; one that is there is replaced in one step.

    To be called by who holds its lock or its flight's lease.

    Args:
        path: below the flight's directory, with forward slashes, no part of it hidden.
        data: its bytes, `MAX_BYTES` at most.

    Raises:
        ArchiveError: it is too large, or the store fails.
    """
    check_size(path, len(data), MAX_BYTES)
    key = document_key(flight, path)
    for group in (ROOT, key.rpartition("/")[0]):
        if archive.read_key(f"{group}/zarr.json") is None:
            archive.write_key(f"{group}/zarr.json", group_json({}))
    standing = _content(archive, key)
    generation = 0 if standing is None else 1 - (array_generation(standing) or 0)
    chunk, content = _draft(path, data, generation)
    archive.write_key(f"{key}/{_chunk_name(generation)}", chunk)
    archive.write_key(f"{key}/zarr.json", content)
    settle_document(archive, key)
    entry = document_at(archive, key)
    assert entry is not None
    return entry


def document_at(archive: Archive, key: str) -> DocumentEntry | None:
    """The document at a key; None where none is committed.

    Raises:
        RecordError: what is there is damaged.
        ArchiveError: the store fails.
    """
    content = _content(archive, key)
    return None if content is None else _entry(key, content)


def document_keys(archive: Archive, flight: str | None = None) -> list[str]:
    """Array paths of a flight's documents, or of all: committed or not, whole or damaged.

    Raises:
        ArchiveError: the store fails.
    """
    if not archive.list_names(ROOT):
        return []  # where there are none, listing all below asks object stores three times
    prefix = ROOT if flight is None else f"{ROOT}/{quote_name(flight)}"
    parts = (key.split("/") for key in archive.stored(prefix))
    return sorted({"/".join(part[:3]) for part in parts if len(part) > 3})


def documents(
    archive: Archive, flight: str | None, damaged: Callable[[str, ArchiveError], None]
) -> Iterator[DocumentEntry]:
    """Committed documents of a flight, or of all, in the order of their names.

    Args:
        damaged: called with the name ("flight/path") and the error of each that is damaged.

    Raises:
        ArchiveError: the store fails.
    """
    for key in document_keys(archive, flight):
        try:
            entry = document_at(archive, key)
        except RecordError as error:
            damaged(document_name(key), error)
            continue
        if entry is not None:
            yield entry


def read_document(archive: Archive, entry: DocumentEntry) -> bytes:
    """A document's bytes, which are those that were archived; if it was replaced, the new ones.

    Raises:
        ArchiveError: it is damaged.
    """
    while True:
        try:
            return _read(archive, entry)
        except ArchiveError:
            now = document_at(archive, entry.key)
            if now is None or now == entry:
                raise
            entry = now


def document_name(key: str) -> str:
    """A document's name ("flight/path") by its array's path, for messages."""
    return unquote_name(key.removeprefix(f"{ROOT}/"))


def document_strays(archive: Archive, key: str) -> dict[str, Stored]:
    """Keys below a document that a killed writer left, and that are no part of it.

    Raises:
        ArchiveError: the store fails.
    """
    content = _content(archive, key)
    generation = None if content is None else array_generation(content)
    if content is not None and generation is None:
        return {}  # damaged: what belongs to it is not known
    own = {f"{key}/zarr.json"}
    if generation is not None:
        own.add(f"{key}/{_chunk_name(generation)}")
    return {
        name: stored
        for name, stored in archive.stored(key).items()
        if name not in own and any(is_shard(name.removeprefix(f"{key}/"), g) for g in (0, 1))
    }


def settle_document(archive: Archive, key: str) -> None:
    """Remove `document_strays`; to be called by who holds the lock or lease.

    Raises:
        ArchiveError: the store fails.
    """
    strays = document_strays(archive, key)
    if strays:
        archive.delete(list(strays))
        archive.prune(key)


def _chunk_name(generation: int) -> str:
    return f"c{SEPARATORS[generation]}0"


def _content(archive: Archive, key: str) -> bytes | None:
    return archive.read_key(f"{key}/zarr.json")


def _draft(path: str, data: bytes, generation: int) -> tuple[bytes, bytes]:
    """A document's chunk and its metadata with the record."""
    stored = np.frombuffer(data or b"\0", np.uint8)  # no array is empty; the record tells the size
    store = MemoryStore()
    array = zarr.create_array(
        store,
        shape=stored.shape,
        dtype=np.uint8,
        chunks=stored.shape,
        fill_value=0,
        filters=None,
        compressors=[COMPRESSOR, Crc32cCodec()],
        dimension_names=("byte",),
        chunk_key_encoding={"name": "default", "separator": SEPARATORS[generation]},
        config={"write_empty_chunks": True},
    )
    array[:] = stored
    chunk, metadata = (
        sync(store.get(name, default_buffer_prototype()))
        for name in (_chunk_name(generation), "zarr.json")
    )
    assert chunk is not None
    assert metadata is not None
    record = {"path": path, "sha256": hashlib.sha256(data).hexdigest(), "source_bytes": len(data)}
    content, total = b"", 0
    while total != len(chunk) + len(content):  # the record tells its own size, too
        total = len(chunk) + len(content)
        attributes = {ATTRIBUTE: {**record, "archive_bytes": total}}
        content = json.dumps(
            {**json.loads(metadata.to_bytes()), "attributes": attributes}, separators=(",", ":")
        ).encode()
    return chunk.to_bytes(), content


def _entry(key: str, content: bytes) -> DocumentEntry:
    flight = unquote_name(key.split("/")[1])
    try:
        record = json.loads(content)["attributes"][ATTRIBUTE]
        path, sha256 = record["path"], record["sha256"]
        sizes = record["source_bytes"], record["archive_bytes"]
        _check(path, sha256, sizes)
        if document_key(flight, path) != key:
            raise ValueError(f"it is the record of {path!r}")
        generation = array_generation(content)
        if generation is None:
            raise ValueError("its chunk has no place")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{document_name(key)}: damaged record: {reason_of(error)}"
        raise RecordError(reason) from error
    return DocumentEntry(flight, path, key, sizes[0], sha256, sizes[1], generation)


def _check(path: Any, sha256: Any, sizes: tuple[Any, ...]) -> None:
    """Refuse a record that no ingest writes (ValueError)."""
    if not isinstance(path, str) or not 0 < len(path) <= MAX_PATH:
        raise ValueError("its path is no text")
    # hidden files are never archived: neither "..", nor what a shell or a desktop reads by itself
    if any(not part or part.startswith(".") for part in path.split("/")):
        raise ValueError(f"its path {path!r} has hidden parts")
    if not isinstance(sha256, str):
        raise ValueError("its digest is no text")
    if not all(type(size) is int and size >= 0 for size in sizes) or sizes[0] > MAX_BYTES:
        raise ValueError(f"{sizes} are no sizes of a document")


def _read(archive: Archive, entry: DocumentEntry) -> bytes:
    content = _content(archive, entry.key)
    try:
        if content is None or array_generation(content) != entry.generation:
            raise ValueError("it was replaced or removed")
        array = open_array(archive.store, entry.key, content, sharded=False)
        if array.dtype != np.uint8 or array.shape != (max(1, entry.size),):
            raise ValueError(f"{array.dtype} {array.shape} contradicts the record")
        data = np.asarray(array[:]).tobytes()[: entry.size]
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ValueError("its SHA-256 is another")
    except ArchiveError:
        raise
    except Exception as error:  # codecs and stores raise what they like
        name = f"{entry.flight}/{entry.path}"
        raise ArchiveError(f"{name}: the document is damaged: {reason_of(error)}") from error
    return data
