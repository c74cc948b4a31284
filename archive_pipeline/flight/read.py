"""Source files read through GDAL: their pixels, masks and metadata."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window as RasterWindow

from archive_pipeline.errors import root_cause
from archive_pipeline.flight._embedded import embedded
from archive_pipeline.flight._metadata_blocks import Block
from archive_pipeline.flight.decoded import DECODERS
from archive_pipeline.flight.formats import no_network, open_image, settle
from archive_pipeline.flight.jpeg_segments import walk
from archive_pipeline.flight.locations import Location, sha256
from archive_pipeline.flight.placing import FLAT, Ground, placed
from archive_pipeline.flight.source_image import (
    COMPLEX_INTEGERS,
    Notes,
    SourceError,
    SourceImage,
)
from archive_pipeline.gdal import local_env
from archive_pipeline.geo.georef import Window

T = TypeVar("T")
# Tag namespaces that GDAL derives from the file and that are kept in a better place.
DERIVED_NAMESPACES = frozenset(
    ("IMAGE_STRUCTURE", "DERIVED_SUBDATASETS", "SUBDATASETS", "OVERVIEWS", "RPC")
)
# Copies of what `SourceImage.metadata` holds byte for byte, for the formats it reads.
EMBEDDED_NAMESPACES = frozenset(("EXIF", "xml:XMP", "COLOR_PROFILE"))
EMBEDDED_DRIVERS = frozenset(("JPEG", "GTiff", "COG", "PNG", "WEBP", "JP2OpenJPEG", *DECODERS))

# Colours that GDAL converts to RGB.
CONVERTED = frozenset(("CMYK", "YCbCrK", "CIELAB", "ICCLAB", "ITULAB"))

DOUBTED_PIXELS = 1 << 26
DOUBTED_DENSITY = 256  # pixels for a byte of a file, of which no photograph has so many
CHECKED_ROWS = 512  # that are looked through at a time

# MB of GDAL's block cache unless the user says otherwise; its own value is a share of the machine's
# memory, which every worker process would take.
os.environ.setdefault("GDAL_CACHEMAX", "256")


def read_source(path: Path, id: str, ground: Ground = FLAT, salvage: bool = False) -> SourceImage:
    """Read everything about an image but its pixels.

    PNG checksums are verified; other formats are checked as `read_pixels` reads them.

    Args:
        path: the file.
        id: its id in the flight, see `find_images`.
        ground: what frames are projected to.
        salvage: a damaged JPEG is taken as far as it can be decoded.

    Raises:
        SourceError: the file cannot be read, is damaged, or is no image; one clear line.
    """
    path = Path(path)
    sha256, size = _digest(path)
    complaints: list[str] = []
    with _reading(path), open_image(path, complaints) as dataset:
        if dataset.count == 0:
            raise SourceError(path, "holds no raster of its own, only subdatasets")
        damage = _damage(path, dataset) if salvage else ""
        notes = Notes()
        metadata = embedded(path, dataset, bool(damage), notes)
        if not damage and dataset.driver == "JPEG":
            notes += _doubts(path, dataset.width * dataset.height)
        if damage:
            notes.append(f"damaged, archived as far as it can be decoded: {damage}")
        notes += [f"its metadata are damaged, and kept as they are: {c}" for c in complaints]
        source = _describe(dataset, path, id, sha256, size, metadata, notes, ground)
    return replace(source, salvaged=True) if damage else source


def read_pixels(
    source: SourceImage, window: Window | None = None
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8] | None]:
    """Read an image's pixels and mask, whole or in a window.

    Args:
        source: what `read_source` returned.
        window: ``(col, row, width, height)`` inside the image; the whole image without one.

    Returns:
        Pixels of ``source.dtype``, shape (height, width, bands), alpha left out where
        ``source.mask == "alpha"``, and the mask: ``None`` where there is none, else uint8
        (height, width): alpha as it is (0 to 255), or 255 where a dataset mask or the nodata value
        says valid and 0 elsewhere.

    Raises:
        SourceError: the file is gone or damaged.
        ValueError: the window is empty or leaves the image.
    """
    col, row, width, height = window or (0, 0, source.width, source.height)
    if min(col, row) < 0 or min(width, height) < 1:
        raise ValueError(f"window {window} is not inside the image")
    if col + width > source.width or row + height > source.height:
        raise ValueError(f"window {window} leaves the {source.width} x {source.height} image")
    with open_dataset(source) as dataset:
        return read_window(dataset, source, (col, row, width, height))


def open_dataset(source: SourceImage) -> rasterio.DatasetReader:
    """Open a source for `read_window`.

    Raises:
        SourceError: the file is gone, or is another.
    """
    with _reading(source.path), _strict(source):
        dataset = open_image(Path(source.path))
        if (dataset.width, dataset.height) != (source.width, source.height):
            dataset.close()
            raise SourceError(source.path, "has changed since it was listed")
        return dataset


def read_window(
    dataset: rasterio.DatasetReader, source: SourceImage, window: Window
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8] | None]:
    """What `read_pixels` returns, of a dataset that is open.

    Raises:
        SourceError: the file is damaged.
    """
    col, row, width, height = window
    area = RasterWindow(col, row, width, height)
    bands, alpha = _bands(dataset)
    pixels = np.empty((height, width, len(bands)), source.dtype)
    with _reading(source.path), _strict(source):
        try:
            dataset.read(bands, window=area, out=np.moveaxis(pixels, -1, 0))
        except (RasterioError, CPLE_BaseError) as error:
            if dataset.driver != "JPEG":
                raise
            reason = f"damaged JPEG: {_reason(source.path, error)}"
            raise SourceError(source.path, reason) from error
        mask = None
        if source.mask == "alpha":
            soft = alpha is None
            mask = dataset.read_masks(1, window=area) if soft else dataset.read(alpha, window=area)
            flags = dataset.mask_flag_enums[0]
            if not soft and MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags:
                mask[dataset.read_masks(1, window=area) == 0] = 0
        elif source.mask != "none":
            mask = dataset.dataset_mask(window=area)
    return pixels, mask


def _describe(
    dataset: rasterio.DatasetReader,
    path: Path,
    id: str,
    sha256: str,
    size: int,
    metadata: list[Block],
    notes: Notes,
    ground: Ground,
) -> SourceImage:
    bands, alpha = _bands(dataset)
    structure = dataset.tags(ns="IMAGE_STRUCTURE")
    interps, palette = dataset.colorinterp, _palette(dataset)
    if structure.get("MINISWHITE") == "YES" and palette is not None:
        interps, palette = (ColorInterp.gray,), None  # GDAL shows a grey image so

    def chosen(values: Sequence[T]) -> tuple[T, ...]:
        return tuple(values[band - 1] for band in bands)

    flags = dataset.mask_flag_enums[0]
    mask = _mask_kind(dataset, alpha is not None, notes)
    if mask == "alpha" and alpha is None:
        interps = (*interps, ColorInterp.alpha)
    # Not the values themselves: NaN differs from NaN.
    if len({repr(value) for value in dataset.nodatavals}) > 1:
        notes.leave_out("bands have different nodata values; the first band's is kept")

    georef, camera, captured = placed(dataset, path, id, metadata, notes, ground)
    if structure.get("SOURCE_COLOR_SPACE") in CONVERTED and "red" in [i.name for i in interps]:
        notes.leave_out(f"its {structure['SOURCE_COLOR_SPACE']} pixels are archived as RGB")
    rows, cols = dataset.block_shapes[0]
    return SourceImage(
        path=path,
        id=id,
        sha256=sha256,
        size_bytes=size,
        driver=dataset.driver,
        width=dataset.width,
        height=dataset.height,
        bands=len(bands),
        dtype=_widest(chosen(dataset.dtypes)),
        mask=mask,
        nodata=None if mask == "mask" and MaskFlags.nodata in flags else dataset.nodata,
        colorinterp=tuple(interp.name for interp in interps),
        layout={
            "photometric": structure.get("SOURCE_COLOR_SPACE"),
            "compression": structure.get("COMPRESSION"),
            "block_shape": [rows, cols],
            "tiled": cols != dataset.width,
            # A JPEG's are only what its decoder can scale to.
            "overviews": [] if dataset.driver == "JPEG" else dataset.overviews(1),
            "image_structure": structure,
            **_samples(dataset),
        },
        descriptions=chosen(dataset.descriptions),
        units=chosen(dataset.units),
        scales=chosen(dataset.scales),
        offsets=chosen(dataset.offsets),
        colormap=palette,
        tags=_tags(dataset, 0, notes),
        band_tags=tuple(_tags(dataset, band, notes) for band in bands),
        georef=georef,
        camera=camera,
        captured=captured,
        metadata=tuple(metadata),
        warnings=tuple(notes),
        left_out=tuple(notes.left_out),
    )


def _mask_kind(dataset: rasterio.DatasetReader, alpha: bool, notes: Notes) -> str:
    """Where an image says which pixels are valid: "alpha", "mask", "nodata" or "none"."""
    flags = dataset.mask_flag_enums[0]
    masked = MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags
    if alpha:
        if masked:
            notes.leave_out("it has alpha and a mask: alpha is archived as 0 where the mask is")
        return "alpha"
    if masked and dataset.colorinterp[0] != ColorInterp.palette and _is_soft(dataset):
        notes.append("its mask is soft: archived as alpha")
        return "alpha"
    if masked:
        return "mask"  # also of pixels that are nodata in every band (NODATA_VALUES)
    return "nodata" if MaskFlags.nodata in flags else "none"


def _is_soft(dataset: rasterio.DatasetReader) -> bool:
    """Whether a mask beside an image says how much of pixels is valid, which no GeoTIFF's can."""
    if dataset.dtypes[0] not in ("uint8", "uint16"):
        return False
    if not any(name.casefold().endswith(".msk") for name in dataset.files):
        return False
    for row in range(0, dataset.height, CHECKED_ROWS):
        mask = dataset.read_masks(1, window=RasterWindow(0, row, dataset.width, CHECKED_ROWS))
        if ((mask > 0) & (mask < 255)).any():
            return True
    return False


def _strict(source: SourceImage | None = None) -> rasterio.Env:
    """libjpeg's warnings as errors, but for a salvaged image: it would fill gaps with grey."""
    salvaged = source is not None and source.salvaged
    return local_env(GDAL_ERROR_ON_LIBJPEG_WARNING="NO" if salvaged else "YES")


def _damage(path: Path, dataset: rasterio.DatasetReader) -> str:
    """What is wrong with a JPEG that can be salvaged; empty where nothing is."""
    if dataset.driver != "JPEG":
        return ""
    try:
        if walk(path.read_bytes()).end is None:
            return "truncated: the JPEG ends inside its image data"
        with _strict(), open_image(path) as strict:
            for row in range(0, strict.height, CHECKED_ROWS):
                strict.read(window=RasterWindow(0, row, strict.width, CHECKED_ROWS))
    except ValueError as error:
        return str(error)
    except (RasterioError, CPLE_BaseError) as error:
        settle(dataset)  # libjpeg has more to say, which another call would raise
        return _reason(path, error)
    return ""


def _doubts(path: Path, pixels: int) -> list[str]:
    """A word on a JPEG in which more lies than its pixels take: they may be others.

    Bytes that changed inside a scan mostly give wrong pixels and no error. libjpeg notices it at
    the scan's end, which GDAL does not read.

    Args:
        pixels: of the picture; libjpeg holds six bytes for each of a progressive one.
    """
    if pixels > min(DOUBTED_PIXELS, DOUBTED_DENSITY * path.stat().st_size):
        return []
    import simplejpeg

    try:  # an eighth as large: nearly all of the work is in what is not needed
        simplejpeg.decode_jpeg(path.read_bytes(), "GRAY", min_height=1, min_width=1, strict=True)
    except ValueError as error:
        reason = str(error)
        if "extraneous bytes before marker" in reason:
            return [f"it may be damaged, look at it: {reason}"]
    return []


@contextmanager
def _reading(path: Location) -> Iterator[None]:
    """Turn whatever GDAL and the system say about ``path`` into one `SourceError`."""
    try:
        with no_network(), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            # Of broken EXIF, which counts as absent.
            warnings.filterwarnings("ignore", module="PIL")
            yield
    except (OSError, RasterioError, CPLE_BaseError) as error:
        raise SourceError(path, _reason(path, error)) from error


def _reason(path: Location, error: BaseException) -> str:
    """Find the most telling message: GDAL's own is at the end of the chain of causes."""
    error = root_cause(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    if "not recognized as being in a supported" in text:
        return "damaged: it starts like an image, but GDAL does not recognise it"
    for name in (str(Path(path).absolute()), str(path), Path(path).name):
        text = text.replace(f"'{name}'", "the file").removeprefix(f"{name}:").strip()
    return text or type(error).__name__


def _digest(path: Path) -> tuple[str, int]:
    try:
        digest, size = sha256(path), path.stat().st_size
    except FileNotFoundError as error:
        raise SourceError(path, "no such file") from error
    except OSError as error:
        raise SourceError(path, error.strerror or str(error)) from error
    if size == 0:
        raise SourceError(path, "the file is empty")
    return digest, size


def _bands(dataset: rasterio.DatasetReader) -> tuple[list[int], int | None]:
    """Return the 1-based numbers of the bands that hold pixels, and that of the alpha band.

    Only a single 8-bit alpha beside other bands is set aside; any other kind stays a band, exact.
    """
    bands = list(dataset.indexes)
    interps = dataset.colorinterp  # asked once: each time it goes through all bands
    alphas = [band for band in bands if interps[band - 1] == ColorInterp.alpha]
    if len(alphas) != 1 or len(bands) == 1 or dataset.dtypes[alphas[0] - 1] != "uint8":
        return bands, None
    return [band for band in bands if band != alphas[0]], alphas[0]


def _palette(dataset: rasterio.DatasetReader) -> tuple[tuple[int, int, int, int], ...] | None:
    if dataset.colorinterp[0] != ColorInterp.palette:
        return None
    try:
        palette = dataset.colormap(1)
    except ValueError:  # it is said to be one, and has no colours
        return None
    return tuple(tuple(palette[index]) for index in sorted(palette))


def _samples(dataset: rasterio.DatasetReader) -> dict[str, Any]:
    """How numbers are stored that NumPy has no type for, see `SourceImage.layout`."""
    if {*dataset.dtypes} == {COMPLEX_INTEGERS}:
        return {"sample": COMPLEX_INTEGERS}
    bits = dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", "")
    return {"bits": int(bits)} if bits.isdecimal() else {}


def _widest(dtypes: Sequence[str]) -> str:
    # GDAL's complex integers have no numpy type; complex64 holds the 16-bit ones exactly.
    known = [{COMPLEX_INTEGERS: "complex64"}.get(dtype, dtype) for dtype in dtypes]
    return np.result_type(*(np.dtype(dtype) for dtype in known)).name


def _tags(dataset: rasterio.DatasetReader, band: int, notes: Notes) -> dict[str, dict[str, str]]:
    """Read all tags of the dataset (band 0) or of a band by namespace, derived ones left out."""
    embedded = dataset.driver in EMBEDDED_DRIVERS
    found = {}
    for namespace in ("", *dataset.tag_namespaces(band)):
        if namespace in DERIVED_NAMESPACES or (embedded and namespace in EMBEDDED_NAMESPACES):
            continue
        try:
            items = dataset.tags(band, ns=namespace or None)
        except UnicodeDecodeError:  # rasterio takes all items of a namespace for UTF-8, or none
            name = namespace or "default"
            notes.leave_out(f"tags of the {name} namespace are not kept: they are not UTF-8")
            continue
        if dataset.driver == "JPEG" and namespace == "":
            items = {key: value for key, value in items.items() if not key.startswith("EXIF_")}
        if items:
            found[namespace] = dict(items)
    return found
