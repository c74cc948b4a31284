"""Zarr stores at any URL, used so that an object store sees few requests."""

from __future__ import annotations

import asyncio
import glob
import math
import os
import stat
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from zarr.abc.store import (
    ByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from archive_pipeline.flight.locations import remote_options


@dataclass(frozen=True)
class Stored:
    """What a listing says of one key: its bytes, and a token that changes with its contents."""

    size: int
    version: str | None = None


class Folder(LocalStore):
    """A folder's files; pipes and devices, which a stranger's archive may lead to, are none."""

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        with suppress(FileNotFoundError, NotADirectoryError):
            mode = os.stat(self.root / key).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise OSError("it is no file")
        return await super().get(key, prototype, byte_range)


def is_url(path: str) -> bool:
    """Whether a path is an fsspec URL."""
    return "://" in path or "::" in path


def open_store(url: str, read_only: bool) -> Store:
    """Open a path or URL as a Zarr store; nothing is read yet.

    Raises:
        ImportError: the package for this kind of URL is not installed.
        ValueError: the URL is malformed, or of an unknown kind.
    """
    if url.startswith("file://"):
        url = url2pathname(urlsplit(url).path)  # zarr's own local store writes atomically
    if not is_url(url):
        return Folder(url, read_only=read_only)
    options = remote_options(url)
    return FsspecStore.from_url(url, storage_options=options, read_only=read_only)


def has_versions(store: Store) -> bool:
    """Whether listings of a store may tell versions."""
    return isinstance(store, FsspecStore)


def local_folder(store: Store) -> Path | None:
    """The folder of a store on this machine's file systems."""
    if isinstance(store, LocalStore):
        return store.root
    if isinstance(store, FsspecStore):
        from fsspec.implementations.local import LocalFileSystem

        if isinstance(getattr(store.fs, "sync_fs", store.fs), LocalFileSystem):
            return Path(store.path)
    return None


class TooLarge(ValueError):
    """A key that holds more bytes than it may."""


async def read_key(store: Store, key: str, prototype: BufferPrototype, most: int) -> Buffer | None:
    """Contents of a key, by one request; None where there is none.

    Raises:
        TooLarge: it has more than `most` bytes; not much more than those are read.
        Exception: of any kind that the store's backend has.
    """
    if isinstance(store, FsspecStore):  # to ask for its size would be a request of its own
        found = await store.get(key, prototype, RangeByteRequest(0, most + 1))
        size = 0 if found is None else len(found)
    else:
        size = await store.getsize(key)
        found = await store.get(key, prototype) if size <= most else None
    if size > most:
        raise TooLarge(f"it has more than the {most} bytes that it may have")
    return found


def read_file(path: Path, most: int) -> bytes:
    """Contents of a file, many times faster than `read_key` has them by an event loop.

    Raises:
        TooLarge: it has more than `most` bytes.
        OSError: it cannot be read, or is no file; nothing waits for the other end of a pipe.
    """
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is no file")
        data = file.read(min(found.st_size, most) + 1)
    if len(data) > most:
        raise TooLarge(f"it has more than the {most} bytes that it may have")
    return data


def look_at_records(root: Path, flights: Collection[str], before: float) -> dict[str, str | None]:
    """Versions of the records of a local archive, by a look at each file, none being read.

    A version is a file's time of modification, size and inode. A record is replaced by another
    file, so two that were there at once differ in the inode; a later one may have the same inode
    again, but not a time before the last look.

    Args:
        flights: names of the flights' folders.
        before: time by the file system's clock, ns: None stands for what was modified since, which
            may change once more and look the same.

    Returns:
        {image's group: version}, in the order of the names. None also stands for what cannot be
        looked at.

    Raises:
        OSError: a flight's folder cannot be read.
    """
    versions: dict[str, str | None] = {}
    for flight in flights:
        folder = os.path.join(root, "flights", flight)
        try:
            names = sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            continue
        for name in names:
            try:
                found = os.stat(f"{folder}/{name}/zarr.json")
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError:  # reading it will tell why
                versions[f"flights/{flight}/{name}"] = None
                continue
            settled = found.st_mtime_ns < before
            version = f"{found.st_mtime_ns:x}-{found.st_size:x}-{found.st_ino:x}"
            versions[f"flights/{flight}/{name}"] = version if settled else None
    return versions


async def list_keys(store: Store, prefix: str) -> dict[str, Stored]:
    """All keys below a prefix, by one listing where the store's listings tell sizes."""
    if isinstance(store, FsspecStore):
        found = await store.fs._find(f"{store.path}/{prefix}", detail=True)
        return {
            name.removeprefix(f"{store.path}/"): Stored(info["size"], info.get("ETag"))
            for name, info in found.items()
        }
    keys = {}
    async for key in store.list_prefix(prefix):
        with suppress(FileNotFoundError):  # another writer's temporary file
            keys[key] = Stored(await store.getsize(key))
    return keys


async def delete_keys(store: Store, keys: Collection[str]) -> None:
    """Remove keys, by one request for all of them where the store can."""
    if isinstance(store, FsspecStore):
        paths = [f"{store.path}/{key}" for key in keys]
        if any(map(glob.has_magic, paths)):  # fsspec would take them for patterns
            await asyncio.gather(*map(store.fs._rm_file, paths))
        else:
            await store.fs._rm(paths)
        return
    for key in keys:
        await store.delete(key)


async def create_key(store: Store, key: str, data: bytes) -> bool | None:
    """Write a key if it is not there; False if it is, None where no store can promise that.

    Raises:
        Exception: of any kind that the store's backend has.
    """
    if not isinstance(store, FsspecStore):
        return None
    try:
        await store.fs._pipe_file(f"{store.path}/{key}", data, mode="create")
    except (NotImplementedError, TypeError):
        return None
    except FileExistsError:  # it may be gone again by now
        return False
    except Exception:  # other backends tell "it is there" by errors of many kinds
        if await store.exists(key):
            return False
        raise
    return True


class MissingShard(Exception):
    """A shard that was written is gone; its argument is the shard's key."""


class CompleteStore(WrapperStore[Store]):
    """A store to read an array from of which every shard was written, by a stranger perhaps.

    Zarr takes a shard that is absent or empty for fill values; here it is an error.

    Args:
        most: bytes that a shard has at most.

    Raises:
        MissingShard: on reading a shard that is not there.
        TooLarge: on reading one that is larger.
        ValueError: on reading more of one.
    """

    def __init__(self, store: Store, most: int) -> None:
        super().__init__(store)
        self._most = most

    def _with_store(self, store: Store) -> CompleteStore:
        return CompleteStore(store, self._most)

    async def get(
        self,
        key: str,
        prototype: BufferPrototype,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        if byte_range is None:
            try:
                found = await read_key(self._store, key, prototype, self._most)
            except (FileNotFoundError, NotADirectoryError):
                found = None
        else:
            size = _length(byte_range)
            if size > self._most:
                raise ValueError(f"its shard's index names a tile of {size} bytes")
            found = await self._store.get(key, prototype, byte_range)
        if not found:
            raise MissingShard(key)
        return found


def _length(byte_range: ByteRequest) -> float:
    """Bytes that a request gives at most."""
    if isinstance(byte_range, RangeByteRequest):
        return byte_range.end - byte_range.start
    return byte_range.suffix if isinstance(byte_range, SuffixByteRequest) else math.inf
