"""What a server is started with, and what bounds its work."""

from __future__ import annotations

import re
from dataclasses import dataclass

from archive_pipeline.errors import UsageError
from archive_pipeline.flight.locations import Location
from archive_pipeline.pcdc.precision import Precision

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_PLACES = "".join(f"(?=.*{{{name}}})" for name in ("z", "x", "-?y"))
_TILES = re.compile(rf"https?://[A-Za-z0-9.:\[\]{{}}-]+(?={_PLACES})/[!-~]+")


@dataclass(frozen=True)
class ServeOptions:
    """What a server is started with.

    Attributes:
        archive: path or URL.
        host: address that it listens on.
        port: 0 picks a free one.
        background: URL of a background map's tiles, with {z}, {x} and {y}; None without one.
        originals: where original files are looked for; None: where this user archived from.
        device, precision: how pixels are decoded, see `jobs`.
    """

    archive: str
    host: str = "127.0.0.1"
    port: int = 8000
    background: str | None = None
    originals: Location | None = None
    device: str = "auto"
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        """Refuse a background map that is none.

        Raises:
            UsageError: its URL is no web address, or lacks a placeholder.
        """
        if self.background is not None and not _TILES.fullmatch(self.background):
            raise UsageError(
                f"--background {self.background!r} is not http(s)://... with {{z}}, {{x}} and {{y}}"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK or self.host.startswith("127.")
