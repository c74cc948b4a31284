"""The server's process: a socket, its address, a clean end."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from archive_pipeline.errors import ArchivePipelineError, require
from archive_pipeline.serving._errors import Unavailable
from archive_pipeline.serving.options import ServeOptions
from archive_pipeline.store.archive import Archive

LAST_SECONDS = 3  # that requests have at the end


class ServerError(ArchivePipelineError):
    """A server that cannot be started; one line that says why."""


def serve(options: ServeOptions, ready: Callable[[str], None]) -> None:
    """Serve an archive until the process is interrupted.

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
    import uvicorn

    from archive_pipeline.serving.app import make_app
    from archive_pipeline.serving.site import Site

    site = Site(options)
    app = make_app(options, site)
    config = uvicorn.Config(
        app, log_level="warning", lifespan="off", timeout_graceful_shutdown=LAST_SECONDS
    )
    server = uvicorn.Server(config)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    started = server.startup

    async def startup(sockets: list[socket.socket] | None = None) -> None:
        await started(sockets)
        ready(f"http://{shown}:{port}/")
        threading.Thread(target=_look_ahead, args=(site,), daemon=True).start()

    server.startup = startup  # type: ignore[method-assign]
    try:
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
    finally:
        site.close()
        site.temporary.cleanup()
    _end()


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


def _look_ahead(site: object) -> None:
    """See what is in the archive before somebody asks."""
    from archive_pipeline.serving.site import Site

    assert isinstance(site, Site)
    with suppress(Unavailable):
        _ = site.catalogue.now


def _end() -> None:
    """Leave without waiting for pixels that nobody waits for; nothing is written by now."""
    if any(t.name.startswith(("pixels", "large", "look")) for t in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
