"""One ingest at a time for a flight in a bucket, where processes cannot lock files.

A lease is an object `leases/<flight>`: written only if there is none (S3's conditional write),
written anew every few seconds, removed at the end. Who finds another's waits until it is gone, or
has stayed the same for so long that its owner must have died. No clocks are compared.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from archive_pipeline.store.archive import Archive
from archive_pipeline.store.layout import ArchiveError, quote_name

RENEWED_EVERY = 10.0  # seconds
GIVEN_UP_AFTER = 45.0  # seconds without a renewal: several that failed, not one that was late
LOOK_EVERY = 2.0  # seconds, while another's is there
SETTLED_AFTER = 3.0  # seconds in which others, too, may have taken a dead owner's lease

logger = logging.getLogger(__name__)


class LeaseHeld(ArchiveError):
    """Another process has a lease, and is alive."""


@dataclass
class Leases:
    """Those that this process holds; `check` them before relying on being alone.

    Attributes:
        held: flights that it has leases of; none where there are no leases.
        lost: why others were lost, a line each.
    """

    held: set[str] = field(default_factory=set)
    lost: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise if another process has taken a lease.

        Raises:
            ArchiveError: it has; this one did not renew it in time.
        """
        if self.lost:
            raise ArchiveError(self.lost[0])


def lease_key(flight: str) -> str:
    """Where a flight's lease is, while there is one."""
    return f"leases/{quote_name(flight)}"


@contextmanager
def leased(archive: Archive, flights: Iterable[str], *, patient: bool = True) -> Iterator[Leases]:
    """Be the only process to write these flights, waiting for others; nothing on local disks.

    Args:
        patient: whether to wait for others that are alive.

    Raises:
        ArchiveError: the store fails.
        LeaseHeld: another process has one, and `patient` is not set.
    """
    leases = Leases()
    with ExitStack() as stack:
        # in one order everywhere: no two processes then wait for each other
        for flight in sorted(set(flights)):
            stack.enter_context(_leased(archive, flight, leases, patient))
        yield leases


@contextmanager
def _leased(archive: Archive, flight: str, leases: Leases, patient: bool) -> Iterator[None]:
    key = lease_key(flight)
    owner = {"host": socket.gethostname(), "process": os.getpid(), "token": secrets.token_hex(8)}
    if not _acquire(archive, key, flight, _content(owner, 0), patient):
        yield  # a store without conditional writes: as before, users see to it
        return
    leases.held.add(flight)
    ended = threading.Event()

    def renew() -> None:
        count = 0
        while not ended.wait(RENEWED_EVERY):
            with suppress(ArchiveError):  # perhaps next time
                found = archive.read_key(key)
                # whatever is there, this thread must not die of it
                if found is None or str(owner["token"]).encode() not in found:
                    leases.lost.append(
                        f"{archive.url}: flight {flight}: this ingest stood still and another "
                        "one took over; run it again"
                    )
                    return
                count += 1
                archive.write_key(key, _content(owner, count))

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if not leases.lost:
            with suppress(ArchiveError):  # then it is given up in time
                archive.delete([key])


def _content(owner: dict[str, object], renewals: int) -> bytes:
    return json.dumps({**owner, "renewals": renewals}).encode()


def _acquire(archive: Archive, key: str, flight: str, content: bytes, patient: bool) -> bool:
    """Wait for a lease; False where the store has no conditional writes.

    Raises:
        ArchiveError: the store fails, or will neither show a lease nor take one.
        LeaseHeld: its owner renews it, and `patient` is not set.
    """
    seen: bytes | None = b""
    since, told = time.monotonic(), False
    while not (made := archive.create_key(key, content)):
        if made is None:
            return False
        other = archive.read_key(key)
        now = time.monotonic()
        if other != seen:
            if seen and other and not patient:  # renewed, or another's
                raise LeaseHeld(f"{archive.url}: flight {flight}: {_name(other)}")
            seen, since = other, now
        elif now - since > GIVEN_UP_AFTER:
            archive.write_key(key, content)
            time.sleep(SETTLED_AFTER)
            settled = archive.read_key(key)
            if settled == content:  # who wrote last has it
                return True
            if other is None and settled is None:
                raise ArchiveError(f"{archive.url}: {key} is said to exist, but cannot be read")
        if other is None:  # just removed, or the store thinks so
            time.sleep(LOOK_EVERY / 4)
            continue
        if not told:
            logger.warning("%s: flight %s: waiting for %s", archive.url, flight, _name(other))
            told = True
        time.sleep(LOOK_EVERY)
    return True


def _name(content: bytes) -> str:
    """Who holds a lease, from its content, which anybody may have written."""
    try:
        owner = json.loads(content)
        return f"process {int(owner['process'])} on {str(owner['host'])[:64]!r}, which archives it"
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"{content[:64]!r}"
