"""What every request passes first: who asks, for which names, and what browsers may do with it."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from archive_pipeline.serving._responses import Json
from archive_pipeline.serving.options import LOOPBACK, ServeOptions
from archive_pipeline.serving.site import SLASH

MOST_REQUESTS = 600  # at a time
MOST_URL = 8192  # bytes


class Door:
    """Passes on requests that name this machine, with their names decoded one by one.

    A slash that is encoded is part of a name, and so is a byte that is no text. Where only this
    machine is served, the host that is asked for must be it: else a stranger's page could have its
    own name lead here, and read what is served.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self._app = app
        self._hosts = {*LOOPBACK, options.host} if options.is_local else None
        self._headers = _headers(options)
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for key, value in self._headers.items():
                    headers.setdefault(key, value)
            elif scope["method"] == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        refused = self._refused(scope)
        if refused is not None:
            await refused(scope, receive, sent)
            return
        path = [unquote(part, errors="surrogateescape") for part in _raw(scope).split("/")]
        inner = {**scope, "path": "/".join(part.replace("/", SLASH) for part in path)}
        if scope["method"] == "HEAD":  # answered as GET is, but for the body
            inner = {**inner, "method": "GET"}
        self._requests += 1
        try:
            await self._app(inner, receive, sent)
        finally:
            self._requests -= 1

    def _refused(self, scope: Scope) -> Json | None:
        told = dict(scope["headers"])
        try:
            host = urlsplit(f"//{told.get(b'host', b'').decode('latin-1')}").hostname
        except ValueError:
            host = None
        if self._hosts is not None and host not in self._hosts:
            return Json({"detail": "this server answers only to its own address"}, 421)
        if scope["method"] not in ("GET", "HEAD", "POST", "OPTIONS"):
            return Json({"detail": "nothing here can be changed"}, 405, {"Allow": "GET, HEAD"})
        if len(_raw(scope)) + len(scope["query_string"]) > MOST_URL:
            return Json({"detail": "the address is too long"}, 414)
        if "\0" in unquote(_raw(scope)):
            return Json({"detail": "a name holds NUL, as none does"}, 404)
        if self._requests >= MOST_REQUESTS:
            return Json({"detail": "the server is busy"}, 503, {"Retry-After": "2"})
        return None


def _raw(scope: Scope) -> str:
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return raw.partition(b"?")[0].decode("latin-1")


def _headers(options: ServeOptions) -> dict[str, str]:
    """What browsers are told: nothing comes from elsewhere but the user's background map."""
    place = urlsplit(options.background or "")
    elsewhere = f" {place.scheme}://{place.netloc}" if place.scheme in ("http", "https") else ""
    elsewhere = elsewhere.replace("{s}", "*").replace("{a-c}", "*")
    policy = {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": f"'self' data: blob:{elsewhere}",
        "connect-src": f"'self'{elsewhere}",
        "worker-src": "'self' blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{key} {value}" for key, value in policy.items()),
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
