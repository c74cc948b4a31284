"""Answers: JSON of any names, and bytes that browsers ask about again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

# what is shown now may be replaced: ask each time, which is quick
REVALIDATE = "no-cache"
MEDIA_TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "webp": "image/webp",
    "tif": "image/tiff; application=geotiff",
}


class Json(Response):
    """JSON, of file names that are no text as well; numbers that are none become null."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        try:
            return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
        except TypeError:  # file names that are no text
            return json.dumps(content).encode()


@dataclass(frozen=True)
class Made:
    """Bytes that a request is answered with, made when they are needed.

    Attributes:
        tag: a text that changes whenever the bytes do.
        media_type: of the bytes.
        make: makes them; in a worker's thread.
        large: whether to make them takes much memory.
    """

    tag: str
    media_type: str
    make: Callable[[], bytes]
    large: bool = False

    @property
    def etag(self) -> str:
        return etag_of(self.tag)

    @property
    def headers(self) -> dict[str, str]:
        return {"ETag": self.etag, "Cache-Control": REVALIDATE}


@dataclass(frozen=True)
class Written:
    """A file that a request is answered with, written when it is needed.

    Attributes:
        tag, media_type, large: as `Made` has them.
        filename: to save it under.
        write: writes it into a folder, and tells where; in a worker's thread.
    """

    tag: str
    media_type: str
    write: Callable[[Path], Path]
    large: bool
    filename: str

    @property
    def headers(self) -> dict[str, str]:
        return {
            "ETag": etag_of(self.tag),
            "Cache-Control": REVALIDATE,
            "Content-Disposition": attachment(self.filename),
        }


class Sent(FileResponse):
    """A file that goes once it is sent, or once nobody waits for it."""

    def __init__(self, path: Path, done: Callable[[], None], **options: Any) -> None:
        super().__init__(path, **options)
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


def etag_of(tag: str) -> str:
    """A header that changes whenever a text does."""
    return f'"{hashlib.sha256(tag.encode("utf-8", "surrogateescape")).hexdigest()[:32]}"'


def is_known(request: Request, etag: str) -> bool:
    """Whether the client has what it would be given."""
    told = request.headers.get("if-none-match", "")
    return any(tag.strip().removeprefix("W/") in (etag, "*") for tag in told.split(","))


def attachment(name: str) -> str:
    """The header that a browser saves a file by, under a name that may hold anything."""
    plain = re.sub(r"[^A-Za-z0-9._@,-]", "_", name)[:120] or "file"
    exact = quote(name.encode("utf-8", "replace"), safe="")[:600]
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{exact}"
