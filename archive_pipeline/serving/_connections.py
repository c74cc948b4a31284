"""How long a client may do nothing while it is waited for, and how many there may be.

uvicorn closes what asks nothing more after an answer, and nothing else: neither a client that never
ends its request nor one that never reads its answer.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 30.0  # seconds between two looks at a connection
MOST_CONNECTIONS = 1000
OF_FILES = 0.75  # of those that the process may have open; the rest are for the archive


class Connection(H11Protocol):
    """An HTTP connection that is cut if its client keeps the server waiting.

    It is cut where between two looks neither a request was ended nor a byte of an answer taken.
    How long the server itself takes to answer does not count.
    """

    _resumed = 0
    _look_again: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            transport.abort()
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look_again is not None:
            self._look_again.cancel()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        self._resumed += 1
        super().resume_writing()

    def _watch(self) -> None:
        self._look_again = self.loop.call_later(PATIENCE, self._look, self._waiting_for())

    def _look(self, before: tuple[object, ...] | None) -> None:
        if before is not None and self._waiting_for() == before:
            self.transport.abort()  # to close would wait until the client has read
        else:
            self._watch()

    def _waiting_for(self) -> tuple[object, ...] | None:
        """What changes when the client does something; None where the server is to."""
        unread = self.transport.get_write_buffer_size()
        if unread:
            return self.cycle, unread, self._resumed
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            return self.cycle, 0
        return None


def most_connections() -> int:
    """Connections at a time, of so many that files can still be opened."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit
        import resource

        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files != resource.RLIM_INFINITY:
            return min(MOST_CONNECTIONS, int(files * OF_FILES))
    return MOST_CONNECTIONS
