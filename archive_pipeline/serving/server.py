"""The server's process: a socket, its address, a clean end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from archive_pipeline.errors import ArchivePipelineError, require
from archive_pipeline.serving.options import ServeOptions
from archive_pipeline.store.archive import Archive

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

    from archive_pipeline.serving.site import Site

LAST_SECONDS = 3  # that requests have at the end


class ServerError(ArchivePipelineError):
    """A server that cannot be started; one line that says why."""


def serve(options: ServeOptions, ready: Callable[[str], None]) -> None:
    """Serve an archive until the process is interrupted.

    Threads may still work then for clients that have left; who calls this ends the process.

    Args:
        ready: called with the server's address once it answers.

    Raises:
        ArchiveError: there is no such archive.
        ServerError: it cannot listen there.
        NotInstalled: the extra `serve` is not.
    """
    for package in ("fastapi", "uvicorn", "morecantile"):
        require(package, "archive serve", "serve")
    Archive.open(options.archive)
    listening = _listen(options)
    from archive_pipeline.serving.app import make_app
    from archive_pipeline.serving.site import Site

    site = Site(options)
    server = server_of(make_app(options, site))
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    started, ended = server.startup, server.shutdown

    async def startup(sockets: list[socket.socket] | None = None) -> None:
        await started(sockets)
        ready(f"http://{shown}:{port}/")
        threading.Thread(target=_look_ahead, args=(site,), daemon=True).start()

    async def shutdown(sockets: list[socket.socket] | None = None) -> None:
        # requests that take longer are cut off, which is no error
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await ended(sockets)

    # what ends other processes ends this one as Ctrl-C does: with nothing left behind
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server.startup, server.shutdown = startup, shutdown  # type: ignore[method-assign]
    try:
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
    finally:
        site.close()
        site.temporary.cleanup()


def server_of(app: ASGIApp) -> uvicorn.Server:
    """What serves an application by HTTP."""
    import uvicorn

    from archive_pipeline.serving._connections import Connection

    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    return uvicorn.Server(config)


def _listen(options: ServeOptions) -> socket.socket:
    """A socket that listens where the options say."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name != "nt":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((options.host, options.port))
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise ServerError(f"{options.host}:{options.port}: {reason}") from error
    return listening


def _look_ahead(site: Site) -> None:
    """See what is in the archive before somebody asks, and load what decodes its images."""
    with suppress(ArchivePipelineError):
        site.warm()
