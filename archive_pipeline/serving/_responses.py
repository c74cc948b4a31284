"""Answers: JSON of any names, and bytes that browsers ask about again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import orjson
from starlette.requests import Request
from starlette.responses import Response

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
        filename: to save them under; None: they are shown.
    """

    tag: str
    media_type: str
    make: Callable[[], bytes]
    large: bool = False
    filename: str | None = None

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.tag.encode("utf-8", "surrogateescape")).hexdigest()[:32]}"'

    @property
    def headers(self) -> dict[str, str]:
        headers = {"ETag": self.etag, "Cache-Control": REVALIDATE}
        if self.filename is not None:
            headers["Content-Disposition"] = attachment(self.filename)
        return headers


def is_known(request: Request, etag: str) -> bool:
    """Whether the client has what it would be given."""
    told = request.headers.get("if-none-match", "")
    return any(tag.strip().removeprefix("W/") in (etag, "*") for tag in told.split(","))


def attachment(name: str) -> str:
    """The header that a browser saves a file by, under a name that may hold anything."""
    plain = re.sub(r"[^A-Za-z0-9._@,-]", "_", name)[:120] or "file"
    exact = quote(name.encode("utf-8", "replace"), safe="")[:600]
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{exact}"
