"""An S3 server on loopback (moto's) that writes down every request, and can fail on purpose."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs
from urllib.request import urlopen

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


class _S3Only(DomainDispatcherApplication):
    """Moto looks through its folders, for every request, for the service that is meant."""

    def get_backend_for_host(self, host: str | None) -> str:
        return "moto_api" if host == "moto_api" else "s3"


@dataclass(frozen=True)
class Request:
    """One request: bytes are those of the bodies."""

    method: str
    path: str
    query: dict[str, list[str]]
    range: str | None
    status: int
    sent: int
    received: int

    @property
    def is_list(self) -> bool:
        return "list-type" in self.query


@dataclass
class S3Server:
    """Attributes:
    requests: all that were answered, in the order of their ends.
    refuse: answers a request with this status where it says so.
    before: called with a request's method, path and headers, as WSGI has them, before it is
        answered; it may change the headers.
    """

    requests: list[Request] = field(default_factory=list)
    refuse: Callable[[str, str], int | None] = lambda method, path: None
    before: Callable[[str, str, dict[str, Any]], None] = lambda method, path, environ: None

    def __post_init__(self) -> None:
        self.app = _S3Only(create_backend_app)
        self._port = 0
        self.start()
        # moto keeps buckets for the whole process: those of an earlier server are not this one's
        urlopen(f"{self.url}/moto-api/reset", data=b"").close()

    def start(self) -> None:
        """Listen, on the same port as before if it was stopped; contents are kept."""
        self._server = make_server("127.0.0.1", self._port, self, threaded=True)
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def environ(self) -> dict[str, str]:
        """The environment by which AWS's own tools would find this server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @contextmanager
    def recorded(self) -> Iterator[list[Request]]:
        """The requests that the body makes."""
        start, found = len(self.requests), []
        yield found
        found += self.requests[start:]

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        received = int(environ.get("CONTENT_LENGTH") or 0)
        codes: list[int] = []

        def respond(status: str, headers: list[tuple[str, str]], *args: Any) -> Any:
            codes.append(int(status.split()[0]))
            return start_response(status, headers, *args)

        self.before(method, path, environ)
        refused = self.refuse(method, path)
        if refused is not None:
            environ["wsgi.input"].read(received)
            code = {403: "AccessDenied", 503: "SlowDown"}[refused]
            text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))]
            respond(f"{refused} {code}", headers)
            body = [text]
        else:
            body = list(self.app(environ, respond))
        self.requests.append(
            Request(
                method,
                path,
                parse_qs(environ["QUERY_STRING"], keep_blank_values=True),
                environ.get("HTTP_RANGE"),
                codes[0],
                sum(map(len, body)),
                received,
            )
        )
        return body
