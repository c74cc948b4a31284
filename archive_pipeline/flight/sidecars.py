"""Files beside an image that GDAL reads with it: where it lies, its mask, its tags."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os.path import splitext

from archive_pipeline.flight.locations import Location, sha256

TIFF, JPEG = (".btf", ".gtif", ".gtiff", ".tif", ".tiff"), (".jfif", ".jpe", ".jpeg", ".jpg")
JPEG2000, NITF = (".j2c", ".j2k", ".jp2", ".jpf", ".jpx"), (".nitf", ".ntf")
# Behind the whole name, whatever the format. Overviews (.ovr) are no part of what is archived.
APPENDED = (".aux.xml", ".aux", ".msk")
# In place of the extension, by the image's format; a `.prj` is read here, not by GDAL.
DECODED = (".heic", ".heif", ".hif", ".jxl")
WORLD_FILES = frozenset((*TIFF, *JPEG, *JPEG2000, *NITF, *DECODED, ".bmp", ".gif", ".mpo", ".png"))
REPLACED = {
    **dict.fromkeys(TIFF, (".tab", ".xml", ".imd", ".rpb", ".rpc", "_rpc.txt")),
    **dict.fromkeys(JPEG, (".tab",)),
    **dict.fromkeys(JPEG2000, (".imd", ".rpb", ".rpc", "_rpc.txt")),
    **dict.fromkeys(NITF, (".hdr", ".rpb", "_rpc.txt")),
    ".img": (".ige",),
}
# Bytes of one that is text; masks and the like are as large as they are.
MAX_TEXT = 64 << 20
RASTERS = (".aux", ".ige", ".msk")


@dataclass(frozen=True)
class Sidecar:
    """A file that belongs to an image.

    Attributes:
        ending: its name without the image's stem, as written: ``".pgw"``, ``".png.aux.xml"``.
        path: where it is.
        size: bytes; ``None`` where the listing did not tell.
    """

    ending: str
    path: Location
    size: int | None = None

    @property
    def is_too_large(self) -> bool:
        """Whether it cannot be what its name says."""
        raster = self.ending.casefold().endswith(RASTERS)
        return not raster and self.size is not None and self.size > MAX_TEXT


def endings(name: str) -> Iterator[str]:
    """What the names of an image's sidecars may have behind its stem, in small letters.

    GDAL looks for them without regard to letter case.
    """
    extension = splitext(name)[1].casefold()
    for appended in APPENDED:
        yield extension + appended
    if extension in WORLD_FILES:
        yield from world_files(extension)
        yield ".prj"
    yield ".aux"
    yield from REPLACED.get(extension, ())


def world_files(extension: str) -> tuple[str, ...]:
    """What the names of world files have in place of an image's extension, the first that is."""
    return f"{extension[:2]}{extension[-1]}w", f"{extension}w", ".wld"


def digest(sidecars: Iterable[Sidecar]) -> str:
    """Hex SHA-256 over the sidecars' endings and bytes; empty without any.

    The same for an image that was renamed together with them.

    Raises:
        OSError: one cannot be read.
    """
    lines = sorted(f"{s.ending.casefold()} {sha256(s.path)}\n" for s in sidecars)
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else ""
