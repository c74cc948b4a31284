"""Where restored files go: names that stay inside the output folder, files that appear whole."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import rasterio
from rasterio.errors import RasterioError

from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.geo.georef import Window

NAME_BYTES = 160
PATH_BYTES = 1024
# Characters that mean something in a path on some system, or to `output_path`; a dot or blank at
# the end, which Windows drops; surrogates, which are not text.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f<>:"\\|?*%@/\ud800-\udfff]|[. ]$')
_IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".tif", ".tiff", ".jp2", ".webp", ".dng"))
_SAME_FORMAT = {
    ".jpg": (".jpg", ".jpeg"),
    ".png": (".png",),
    ".tif": (".tif", ".tiff"),
}


class OutputError(ArchivePipelineError):
    """An image that cannot be written as asked; the message is one line and names the image."""


def output_path(directory: Path, image_id: str, window: Window, full: bool, suffix: str) -> Path:
    """Return where to write an image: always inside ``directory``, whatever the id holds.

    ``a/DJI_0001.JPG`` becomes ``a/DJI_0001.JPG`` as JPEG and ``a/DJI_0001.JPG.tif`` as GeoTIFF;
    windows get ``@col,row,widthxheight`` before the suffix.  Different ids and windows never share
    a path (up to case and Unicode normalisation on file systems that fold them): characters that
    are special in paths on any common system become ``%XX``, as do ``%`` and ``@`` themselves,
    and overlong names end in a digest of the id.

    Args:
        directory: the output directory; it need not exist.
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
    digest = hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    # "%-" and a lone "%" are never the result of escaping, hence cannot collide with a name.
    parts = [_escape(part) or "%" for part in folders]
    parts = [
        f"{p[: NAME_BYTES // 4]}%-{digest}" if len(p.encode()) > NAME_BYTES else p for p in parts
    ]
    stem = _escape(stem)
    if len(stem.encode()) > NAME_BYTES:
        stem = f"{stem[: NAME_BYTES // 4]}%-{digest}"
    if sum(len(part.encode()) + 1 for part in parts) > PATH_BYTES:
        parts, stem = [], f"{stem[: NAME_BYTES // 4]}%-{digest}"
    return directory.joinpath(*parts, stem + ending)


@contextmanager
def workdir(path: Path) -> Iterator[Path]:
    """Make a hidden folder beside ``path``, removed afterwards; failures become `OutputError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".restore-", dir=path.parent) as folder,
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        ):
            yield Path(folder)
    except (OSError, RasterioError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OutputError(f"{path}: {' '.join(reason.split())}") from error


def publish(final: Path, path: Path) -> None:
    """Move a finished file and its sidecars into place, the file itself last."""
    sidecars = [(Path(f"{final}.aux.xml"), Path(f"{path}.aux.xml"))]
    if final.suffix == ".jpg":
        sidecars.append((final.with_suffix(".jgw"), path.with_suffix(".jgw")))
    for new, old in sidecars:
        if new.exists():
            os.replace(new, old)
        else:
            # One from an earlier run would lie about the new file.
            old.unlink(missing_ok=True)
    os.replace(final, path)


def _escape(name: str) -> str:
    """Escape one path component; different names stay different."""
    if name in (".", ".."):
        return name.replace(".", "%2E")
    return _UNSAFE.sub(
        lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass")),
        name,
    )
