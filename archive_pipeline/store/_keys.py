"""The keys of an archive's store, read and written whole; what fails is one kind of error."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from archive_pipeline.store._backends import (
    Stored,
    TooLarge,
    create_key,
    delete_keys,
    list_keys,
    local_folder,
    read_file,
    read_key,
)
from archive_pipeline.store.layout import MAX_DOCUMENT, ArchiveError, StoreError, reason_of


class Keys:
    """A store of keys with bytes.

    Attributes:
        url, store: where it is.
    """

    def __init__(self, url: str, store: Store) -> None:
        self.url = url
        self.store = store

    @property
    def folder(self) -> Path | None:
        """Its folder on this machine's file systems; None of an archive that is elsewhere."""
        return local_folder(self.store)

    def read_key(self, key: str, most: int = MAX_DOCUMENT) -> bytes | None:
        """Contents of a key, None where there is none.

        Args:
            most: bytes that it has at most: an archive may be a stranger's.

        Raises:
            ArchiveError: it is larger.
            StoreError: the store fails.
        """
        try:
            if isinstance(self.store, LocalStore):
                return read_file(self.store.root / key, most)
            buffer = sync(read_key(self.store, key, default_buffer_prototype(), most))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None
        except TooLarge as error:
            raise ArchiveError(f"{self.url}: {key}: {error}") from error
        except Exception as error:  # what a store raises depends on its backend
            raise StoreError(f"{self.url}: {key}: {reason_of(error)}") from error
        return None if buffer is None else buffer.to_bytes()

    def write_key(self, key: str, data: bytes) -> None:
        """Write a key whole.

        Raises:
            ArchiveError: the store fails.
        """
        try:
            sync(self.store.set(key, default_buffer_prototype().buffer.from_bytes(data)))
        except Exception as error:  # what a store raises depends on its backend
            raise ArchiveError(f"{self.url}: {key}: {reason_of(error)}") from error

    def create_key(self, key: str, data: bytes) -> bool | None:
        """Write a key in a bucket if it is not there; False if it is, None if that cannot be had.

        Raises:
            ArchiveError: the store fails.
        """
        try:
            return sync(create_key(self.store, key, data))
        except Exception as error:  # what a store raises depends on its backend
            raise ArchiveError(f"{self.url}: {key}: {reason_of(error)}") from error

    def list_names(self, prefix: str) -> list[str]:
        """Names directly below a prefix, sorted."""

        async def collect() -> list[str]:
            return [name async for name in self.store.list_dir(prefix)]

        try:
            return sorted(sync(collect()))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as error:  # what a store raises depends on its backend
            raise ArchiveError(f"{self.url}: {prefix}: {reason_of(error)}") from error

    def stored(self, prefix: str) -> dict[str, Stored]:
        """All keys below a prefix.

        Raises:
            ArchiveError: the store fails.
        """
        try:
            return sync(list_keys(self.store, prefix))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except Exception as error:  # what a store raises depends on its backend
            raise ArchiveError(f"{self.url}: {prefix}: {reason_of(error)}") from error

    def size_of(self, prefix: str) -> int:
        """Bytes of all keys below a prefix."""
        return sum(key.size for key in self.stored(prefix).values())

    def delete(self, keys: Collection[str]) -> None:
        """Remove keys of one node, its record or metadata first: half removed is invisible.

        Raises:
            ArchiveError: the store fails.
        """
        first = min((key for key in keys if key.endswith("/zarr.json")), key=len, default=None)
        try:
            for some in ([first] if first else [], [key for key in keys if key != first]):
                if some:
                    sync(delete_keys(self.store, some))
        except Exception as error:  # what a store raises depends on its backend
            raise ArchiveError(f"{self.url}: {reason_of(error)}") from error

    def prune(self, prefix: str) -> None:
        """Remove folders below a prefix that hold no keys; only local file systems have any."""
        if not isinstance(self.store, LocalStore):
            return
        for folder, _, _ in os.walk(self.store.root / prefix, topdown=False):
            with suppress(OSError):  # it is not empty
                os.rmdir(folder)
