"""What a request can fail with, beside the other rooms' errors."""

from __future__ import annotations

from archive_pipeline.errors import ArchivePipelineError


class NotFound(ArchivePipelineError):
    """A flight, an image or a file that is not there: 404."""


class Unavailable(ArchivePipelineError):
    """Something that may work a moment later: 503.

    Attributes:
        seconds: after which to ask again.
    """

    def __init__(self, reason: str, seconds: int = 2) -> None:
        super().__init__(reason)
        self.seconds = seconds


class NoRoom(Unavailable):
    """A full disk."""


class Gone(Exception):
    """The client is not there any more."""
