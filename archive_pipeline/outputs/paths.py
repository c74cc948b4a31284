"""Where restored files go: names that stay inside the output folder."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.geo.georef import Window

NAME_BYTES = 160
PATH_BYTES = 1024
# Characters that mean something in a path on some system, or to `output_path`; a dot or blank at
# the end, which Windows drops; surrogates, which are not text.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f<>:"\\|?*%@/\ud800-\udfff]|[. ]$')
_SUFFIXES = ".jpg .jpeg .mpo .png .tif .tiff .jp2 .webp .dng .heic .heif .hif .jxl"
_IMAGE_SUFFIXES = frozenset(_SUFFIXES.split())
_SAME_FORMAT = {
    ".jpg": (".jpg", ".jpeg"),
    ".png": (".png",),
    ".tif": (".tif", ".tiff"),
}


class OutputError(ArchivePipelineError):
    """An image that cannot be written as asked; the message is one line and names the image."""


class DiskError(OutputError):
    """A file that cannot be written where it should be: a full disk, say."""


def output_path(
    directory: Path, flight: str, image_id: str, window: Window, full: bool, suffix: str
) -> Path:
    """Return where to write an image: always inside ``directory``, whatever the names hold.

    ``a/DJI_0001.JPG`` of the flight ``beach`` becomes ``beach/a/DJI_0001.JPG`` as JPEG and
    ``beach/a/DJI_0001.JPG.tif`` as GeoTIFF; windows get ``@col,row,widthxheight`` before the
    suffix.  Different flights, ids and windows never share a path (up to case and Unicode
    normalisation on file systems that fold them): characters that are special in paths on any
    common system become ``%XX``, as do ``%`` and ``@`` themselves, and overlong names end in a
    digest.

    Args:
        directory: the output directory; it need not exist.
        flight: the flight's id, the name of a folder; not trusted.
        image_id: the image's id, folders separated by ``/``; not trusted.
        window: ``(col, row, width, height)``.
        full: whether the window is the whole image.
        suffix: ``".tif"``, ``".jpg"`` or ``".png"``.
    """
    *folders, name = image_id.split("/")
    stem, extension = os.path.splitext(name)
    tag = "" if full else "@{},{},{}x{}".format(*window)
    same_format = extension.lower() in _SAME_FORMAT[suffix]
    if same_format and os.path.splitext(stem)[1].lower() not in _IMAGE_SUFFIXES:
        ending = tag + extension
    else:
        # "a.tif" keeps its name, so "a" must not take it.
        stem = name
        ending = ("" if extension.lower() in _IMAGE_SUFFIXES else "@") + tag + suffix
    parts = [_part(folder, folder) for folder in (flight, *folders)]
    if sum(len(part.encode()) + 1 for part in parts) > PATH_BYTES:
        parts, stem = parts[:1], f"{_escape(stem)[: NAME_BYTES // 4]}%-{_digest(image_id)}"
    else:
        stem = _part(stem, image_id)
    return directory.joinpath(*parts, stem + ending)


def document_path(directory: Path, flight: str, path: str) -> Path:
    """Return where to write a flight's document: always inside ``directory``.

    Args:
        directory: the output directory; it need not exist.
        flight: the flight's id; not trusted.
        path: the document's path below the flight, folders separated by ``/``; not trusted.
    """
    parts = [_part(part, path) for part in (flight, *path.split("/"))]
    if sum(len(part.encode()) + 1 for part in parts) > PATH_BYTES:
        parts = [parts[0], f"{parts[-1][: NAME_BYTES // 4]}%-{_digest(path)}"]
    return directory.joinpath(*parts)


def _part(name: str, whole: str) -> str:
    """One component of a path; an overlong one is told apart by the digest of ``whole``."""
    escaped = _escape(name)
    if len(escaped.encode()) > NAME_BYTES:
        return f"{escaped[: NAME_BYTES // 4]}%-{_digest(whole)}"
    # "%-" and a lone "%" are never the result of escaping, hence cannot collide with a name.
    return escaped or "%"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _escape(name: str) -> str:
    """Escape one path component; different names stay different."""
    if name in (".", ".."):
        return name.replace(".", "%2E")
    return _UNSAFE.sub(
        lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass")),
        name,
    )
