"""`archive serve` and clients that ask nothing, never end asking, or never read the answer."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from archive_pipeline.serving import _connections
from archive_pipeline.serving.app import make_app
from archive_pipeline.serving.options import ServeOptions
from archive_pipeline.serving.server import server_of
from archive_pipeline.serving.site import Site

PATIENCE = 0.4
LONG = 10 * PATIENCE  # by then a client that does nothing is gone
ASK = b"GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
FRAME = ASK % b"/flights/beach/images/DJI_0001.JPG/window.tif"

Start = Callable[[ASGIApp], int]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts the HTTP server of an application, with little patience and small buffers."""
    monkeypatch.setattr(_connections, "PATIENCE", PATIENCE)
    with ExitStack() as stack:

        def begin(app: ASGIApp) -> int:
            listening = stack.enter_context(socket.socket())
            # what the kernel takes of an answer that nobody reads
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            listening.bind(("127.0.0.1", 0))
            server = server_of(app)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()

            def end() -> None:
                server.should_exit = True
                thread.join()

            stack.callback(end)
            while not server.started:
                time.sleep(0.01)
            port: int = listening.getsockname()[1]
            return port

        yield begin


@pytest.fixture
def site(archive: Path) -> Iterator[Site]:
    site = Site(ServeOptions(str(archive)))
    yield site
    site.close()
    site.temporary.cleanup()


def connect(port: int) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    client.settimeout(LONG)
    client.connect(("127.0.0.1", port))
    return client


def rest(client: socket.socket, pause: float = 0.0) -> bytes:
    """What comes until either side ends the connection."""
    found = b""
    with suppress(ConnectionError):
        while piece := client.recv(16384):
            found += piece
            time.sleep(pause)
    return found


def is_cut_while(client: socket.socket, send: bytes) -> bool:
    """Whether a client that sends so much again and again is cut off."""
    until = time.monotonic() + LONG
    try:
        while time.monotonic() < until:
            client.sendall(send)
            time.sleep(PATIENCE / 8)
    except ConnectionError:
        return True
    return False


def test_who_asks_nothing_is_cut(start: Start, site: Site) -> None:
    with connect(start(make_app(site.options, site))) as client:
        began = time.monotonic()
        assert rest(client) == b""
        assert PATIENCE <= time.monotonic() - began < LONG


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /api HTTP/1.1\r\nX: ",
        b"POST /items HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n",
        # it is answered, and goes on sending what nobody asked for
        b"GET /api HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n",
        ASK % b"/api" + b"GET /",  # the next one never ends
    ],
    ids=["head", "body", "body that nobody reads", "second request"],
)
def test_who_never_ends_asking_is_cut(start: Start, site: Site, begin: bytes) -> None:
    with connect(start(make_app(site.options, site))) as client:
        reader = threading.Thread(target=rest, args=(client,))
        client.sendall(begin)
        reader.start()
        assert is_cut_while(client, b"x")
    reader.join()


@pytest.mark.parametrize("requests", [1, 20])
def test_who_never_reads_is_cut_and_leaves_nothing(start: Start, site: Site, requests: int) -> None:
    port = start(make_app(site.options, site))
    with connect(port) as client:
        client.sendall(FRAME * requests)
        client.settimeout(60)  # the model is loaded first
        assert client.recv(1, socket.MSG_PEEK)
        folder = Path(site.temporary.name)
        assert any(folder.iterdir())  # the file that is sent
        time.sleep(LONG)
        got = rest(client)
        assert b" 200 OK" in got
        assert len(got) < 200_000  # and no end of it
        assert not any(folder.iterdir())
    with connect(port) as client:
        client.sendall(FRAME.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert len(rest(client)) > 200_000


def test_who_reads_slowly_gets_everything(start: Start) -> None:
    size = 1_000_000

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(size)})

    with connect(start(app)) as client:
        client.sendall(ASK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") % b"/")
        began = time.monotonic()
        assert len(rest(client, PATIENCE / 8)) > size
        assert time.monotonic() - began > 5 * PATIENCE


def test_who_waits_for_the_server_is_not_cut(start: Start) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in range(2):
            await asyncio.sleep(4 * PATIENCE)
            await send({"type": "http.response.body", "body": b"x", "more_body": piece < 1})

    with connect(start(app)) as client:
        client.settimeout(20 * PATIENCE)
        client.sendall(ASK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") % b"/")
        assert rest(client).count(b"x\r\n") == 2


def test_there_are_only_so_many_connections(
    start: Start, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_connections, "PATIENCE", 60)
    monkeypatch.setattr(_connections, "MOST_CONNECTIONS", 5)
    port = start(make_app(site.options, site))
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(port)) for _ in range(5)]
        time.sleep(0.1)
        with connect(port) as another:
            assert rest(another) == b""
        clients[0].sendall(ASK % b"/api")
        assert b" 200 OK" in clients[0].recv(1000)
        clients[1].close()
        time.sleep(0.1)
        with connect(port) as another:
            another.sendall(ASK % b"/api")
            assert b" 200 OK" in another.recv(1000)


@pytest.mark.skipif(os.name == "nt", reason="no such limit")
def test_connections_leave_files_to_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    for limit, most in ((256, 192), (1 << 20, 1000), (resource.RLIM_INFINITY, 1000)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert _connections.most_connections() == most
