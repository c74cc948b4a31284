"""What a server is started with, and what bounds its work."""

from __future__ import annotations

from dataclasses import dataclass

from archive_pipeline.flight.locations import Location
from archive_pipeline.pcdc.precision import Precision

LOOPBACK = ("127.0.0.1", "localhost", "::1")


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

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK or self.host.startswith("127.")
