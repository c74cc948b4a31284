"""The formats that are read, and the one way in which GDAL is given somebody's file.

By itself GDAL tries some 140 drivers on a file, whatever its name: also those of descriptions that
refer to other files and to servers (VRT, WMS, tile indexes, detached labels). Here the first bytes
choose one driver of a few, and neither a sidecar nor a tag may lead to a file elsewhere:

- beside an image, GDAL opens `NAME.ovr`, `NAME.msk` and `STEM.aux` with any driver it has, and as
  an overview whatever the item OVERVIEW_FILE of `NAME.aux.xml` or of a TIFF's own tags names;
- an HFA file names the file of its pixels (`.ige`) and the one of its overviews;
- a NITF file's overviews may be files of any format beside it (`.r1`, ...).
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from contextlib import suppress
from pathlib import Path

import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from archive_pipeline.flight._beside import beside
from archive_pipeline.flight._grids import check_grids
from archive_pipeline.flight._hfa import companions
from archive_pipeline.flight.decoded import DECODERS, open_decoded
from archive_pipeline.flight.locations import Location, open_file
from archive_pipeline.flight.source_image import SourceError
from archive_pipeline.flight.tiff_directory import check_bands
from archive_pipeline.gdal import local_env

# What drones, cameras and photogrammetry write.  Raw files are documents: GDAL opens only the
# preview inside them.
IMAGE_SUFFIXES = frozenset(
    (
        ".bmp",
        ".btf",
        ".gif",
        ".gtif",
        ".gtiff",
        ".heic",
        ".heif",
        ".hif",
        ".img",
        ".j2c",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpf",
        ".jpg",
        ".jpx",
        ".jxl",
        ".mpo",
        ".ntf",
        ".nitf",
        ".png",
        ".tif",
        ".tiff",
        ".webp",
    )
)

# First bytes and the short name of the GDAL driver for them, whatever the suffix.
DRIVERS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "GTiff"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "JP2OpenJPEG"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "WEBP"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"BM"), "BMP"),
    (re.compile(rb"EHFA_HEADER_TAG\0"), "HFA"),
    (re.compile(rb"NITF0|NSIF0"), "NITF"),
    (re.compile(rb".{4}ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL), "HEIF"),
    (re.compile(rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a"), "JPEGXL"),
)
FORMAT_NAMES = (
    "JPEG, PNG, TIFF, JPEG 2000, WebP, GIF, BMP, Erdas Imagine (HFA), NITF, HEIC, JPEG XL"
)

# What files say near their beginning that describe data in other files or on servers.
_DESCRIPTIONS = (
    (rb"<(OGR)?VRTDataset", "a VRT description"),
    (rb"<GDAL_WMTS", "a WMTS description"),
    (rb"<GDAL_WMS|<WMS_|<WMT_MS_", "a WMS description"),
    (rb"<WCS_", "a WCS description"),
    (rb"<GDALTileIndexDataset", "a tile index (GTI)"),
    (rb"<MRF_META", "an MRF description"),
    (rb"PDS_VERSION_ID|<Product_Observational|CCSD3ZF|Object\s*=\s*IsisCube", "a PDS label"),
    (rb'"stac_version"', "a STAC description"),
)
_HEAD = 4096  # bytes in which a description is looked for

# GDAL gets files of this machine only. Its own limit without a server's answer is ten minutes.
NO_NETWORK = {
    "CPL_VSIL_CURL_ALLOWED_FILENAME": "none",
    "GDAL_HTTP_CONNECTTIMEOUT": "5",
    "GDAL_HTTP_TIMEOUT": "5",
    "GDAL_HTTP_MAX_RETRY": "0",
}

_PART_OF_IMAGE = re.compile(r"(\.(ovr|msk)){1,2}")
_NITF_OVERVIEW = re.compile(r"\.r[0-9]")


def no_network() -> rasterio.Env:
    """GDAL without a network, in a `with` statement."""
    return local_env(**NO_NETWORK)


def open_image(path: Path, complaints: list[str] | None = None) -> rasterio.DatasetReader:
    """Open an image on this machine, with the driver of its first bytes and nothing else.

    Sidecars count (`.aux.xml`, world files, `.ovr`, `.msk`, `.aux`, an HFA file's `.ige`); nothing
    that the dataset is asked for later opens another file.

    Args:
        path: a regular file; its suffix does not matter.
        complaints: takes what GDAL finds wrong with the metadata, which is no reason to fail.

    Returns:
        The dataset, to be closed by the caller, best by a `with` statement.

    Raises:
        SourceError: it is of no format that is read, or refers to other files; one line.
        OSError: it cannot be read, or is a pipe, socket or device.
        RasterioError: GDAL cannot open it.
    """
    driver = image_driver(path)
    if driver == "GTiff":
        try:
            check_bands(path)
        except ValueError as error:
            raise SourceError(path, str(error)) from error
    _check_companions(path, driver)
    dataset = _open(path, driver)
    complaint = settle(dataset)
    if complaint and complaints is not None:
        complaints.append(complaint)
    return dataset


def may_be_photo(path: Location) -> bool:
    """Whether a file may hold an 8-bit RGB picture; only of rasters on this machine it is known."""
    try:
        if not isinstance(path, Path) or image_driver(path) not in ("GTiff", "HFA", "NITF"):
            return True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with open_image(path) as dataset:
                return dataset.count in (3, 4) and {*dataset.dtypes} == {"uint8"}
    except (SourceError, OSError, RasterioError, CPLE_BaseError):
        return True  # the task that reads it says what is wrong


def image_driver(path: Path) -> str:
    """GDAL's driver for a file, by its first bytes.

    Raises:
        SourceError: none of those that are used.
        OSError: it cannot be read, or is no regular file.
    """
    with open_file(path) as file:
        head = file.read(_HEAD)
    for first, driver in DRIVERS:
        if first.match(head):
            return driver
    for pattern, name in _DESCRIPTIONS:
        if re.search(pattern, head):
            raise SourceError(path, f"not an image: {name}, which refers to other files")
    raise SourceError(path, f"not an image in a format that is read ({FORMAT_NAMES})")


def _open(path: Path, driver: str) -> rasterio.DatasetReader:
    with no_network():
        if driver in DECODERS:
            dataset = open_decoded(path, driver)
        else:
            # An HFA file's companions are looked for in its folder only if the path has one.
            dataset = rasterio.open(path.absolute(), driver=driver)
        # Nothing has looked for overviews yet.
        if any(key.upper() == "OVERVIEW_FILE" for key in dataset.tags(ns="OVERVIEWS")):
            dataset.close()
            raise SourceError(path, "names another file for its overviews (OVERVIEW_FILE)")
    return dataset


def settle(dataset: rasterio.DatasetReader) -> str:
    """Have GDAL read all metadata; what it says of them, one line, or nothing.

    Its last complaint would otherwise be raised by the next call, whatever that is about.
    """
    for namespace in ("", "RPC", *dataset.tag_namespaces()):
        with suppress(RasterioError, CPLE_BaseError, UnicodeDecodeError):
            dataset.tags(ns=namespace or None)
    try:
        _ = dataset.colorinterp  # raises what is pending, and forgets it
    except (RasterioError, CPLE_BaseError) as error:
        return " ".join(str(error).split())
    return ""


def _check_companions(path: Path, driver: str) -> None:
    """Refuse an image whose sidecars or own references lead GDAL elsewhere.

    Raises:
        SourceError: one line.
    """
    external = driver == "HFA" and _has_hfa_companions(path)
    name, stem = path.name.casefold(), path.stem.casefold()
    auxiliary = {f"{name}.aux", f"{stem}.aux"} - {name}
    try:
        others = beside(path.parent, IMAGE_SUFFIXES)
    except OSError as error:
        raise SourceError(path, f"its folder cannot be listed: {error.strerror}") from error
    for other in others.odd:
        if other == path.name or not (external or _may_be_sidecar(other, stem)):
            continue
        if _would_block(path.with_name(other)):
            raise SourceError(path, f"{other} beside it is a pipe or a device")
    if driver == "NITF":
        for base in (name, stem):
            for folded, other in others.starting(base):
                if other != path.name and _NITF_OVERVIEW.fullmatch(folded, len(base)):
                    raise SourceError(
                        path, f"its overview {other} in a file of its own is not read"
                    )
    for base in (name, *auxiliary):
        for folded, other in others.starting(base):
            if _PART_OF_IMAGE.match(folded, len(base)):
                _check_part(path, path.with_name(other), folded[len(base) :])
            elif folded == base and base in auxiliary:
                _check_auxiliary(path, path.with_name(other))
    check_grids(path, driver, others)


def _may_be_sidecar(name: str, stem: str) -> bool:
    """Whether GDAL may look for a file beside an image: what has no suffix bears its name."""
    suffix = os.path.splitext(name)[1].casefold()
    return suffix not in IMAGE_SUFFIXES and (suffix != "" or name.casefold().startswith(stem))


def _check_part(image: Path, part: Path, suffixes: str) -> None:
    """Refuse overviews and masks that are no TIFFs of their own."""
    if suffixes.rpartition(".")[2] not in ("ovr", "msk"):
        return  # their `.aux.xml`, which counts as they are opened
    if not _PART_OF_IMAGE.fullmatch(suffixes):
        raise SourceError(image, f"{part.name} beside it belongs to no overview or mask")
    _check_opens(image, part, "GTiff")


def _check_auxiliary(image: Path, part: Path) -> None:
    """Refuse an Erdas `.aux` that names files elsewhere; GDAL looks at no other kind of it."""
    try:
        with open_file(part) as file:
            if not file.read(15).upper().startswith(b"EHFA_HEADER_TAG"):
                return
    except OSError:
        return  # GDAL cannot open it either
    _check_opens(image, part, "HFA")


def _check_opens(image: Path, part: Path, expected: str) -> None:
    try:
        driver = image_driver(part)
        if driver != expected:
            raise SourceError(part, f"a {driver} file, not {expected}")
        if driver == "HFA":
            _has_hfa_companions(part)
        _open(part, driver).close()
    except SourceError as error:
        raise SourceError(image, f"{part.name} beside it: {error.reason}") from error
    except (OSError, RasterioError) as error:
        line = " ".join(str(error).split())
        raise SourceError(image, f"{part.name} beside it cannot be read: {line}") from error


def _would_block(path: Path) -> bool:
    """Whether opening a file may wait for ever: a pipe or a device, or a link to one."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _has_hfa_companions(path: Path) -> bool:
    """Whether an HFA file has its pixels or overviews in other files, all of them beside it."""
    with open_file(path) as file:
        try:
            names = companions(file)
        except ValueError as error:
            raise SourceError(path, str(error)) from error
    for name in names:
        if "/" in name or "\\" in name:
            raise SourceError(path, f"refers to a file in another folder: {name!r}")
    return bool(names)
