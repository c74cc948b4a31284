"""Writing restored pixels as Cloud Optimized GeoTIFF, JPEG or PNG.

Every writer works in a hidden folder beside its output and moves the finished file into place, so
a killed restore leaves no half file under a final name; a file that is there already stays.
GeoTIFF and PNG are streamed block by block and may be far larger than memory; a JPEG is composed
in memory.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import rasterio.shutil
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.io import DatasetWriter
from rasterio.windows import Window as RasterioWindow

from archive_pipeline.flight.classes import classes_of
from archive_pipeline.flight.jpeg_segments import fill_thumbnail, write_segments
from archive_pipeline.flight.raster import Raster
from archive_pipeline.flight.restored_tag import MARK, TIFF_ITEM, mark
from archive_pipeline.flight.source_image import EXIF_PREFIX, TIFF_DRIVERS, SourceImage
from archive_pipeline.flight.tiff_tags import Tag
from archive_pipeline.geo.georef import Georef
from archive_pipeline.geo.mapping import window_transform
from archive_pipeline.geo.rpc import with_camera_rpcs
from archive_pipeline.outputs._blocks import COG_BLOCK, read_windows, write_parts
from archive_pipeline.outputs._documents import (
    embedded_documents,
    exif_tags,
    insert_chunks,
    pack_segments,
    png_chunks,
    quiet,
    set_dimensions,
    tiff_tags,
    without_statistics,
)
from archive_pipeline.outputs._samples import (
    as_shown,
    is_photograph,
    packing,
    sample_options,
    staging,
    stored_blocks,
)
from archive_pipeline.outputs._sidecar import MADE_NAMESPACES, auxiliary_xml
from archive_pipeline.outputs._tiff_tags import insert_tags
from archive_pipeline.outputs.nodata import avoid_nodata, storable_nodata
from archive_pipeline.outputs.paths import OutputError
from archive_pipeline.outputs.publish import NOTHING, Stamps, publish, workdir, world_file

MANY_BANDS = 16
JPEG_SIDE = 65535
PNG_LEVEL = 3  # zlib's, of photographs

_STAGE = {
    "driver": "GTiff",
    "tiled": True,
    "sparse_ok": True,
    "bigtiff": "IF_SAFER",
    "num_threads": "ALL_CPUS",
}
_BLOCKS = {"blockxsize": COG_BLOCK, "blockysize": COG_BLOCK}
# DEFLATE rather than ZSTD: photogrammetry tools with their own TIFF readers know it.
_COG = {
    "driver": "COG",
    "compress": "DEFLATE",
    "bigtiff": "IF_SAFER",
    "num_threads": "ALL_CPUS",
}


def write_gtiff(path: Path, raster: Raster, replace: Stamps = NOTHING) -> None:
    """Write a lossless Cloud Optimized GeoTIFF.

    Georeference (transform, GCPs or RPCs, moved to the window, see `geo.rpc`), band descriptions,
    units, scales and offsets, colour interpretation, palette, nodata value, ICC profile, XMP and
    tags are the source's. EXIF and GPS come as TIFF's directories, and a photograph's EXIF also as
    ``EXIF_*`` tags; tags of custom namespaces and names of classes, if any, lie in GDAL's
    ``.aux.xml`` beside the file.
    Statistics come back where the pixels are the source's, all of them: lossy decoding and cutting
    make them wrong.  The mask comes back as it was: as an alpha band, as an internal mask, or as
    the nodata value.

    Pixels are written as read, with two exceptions for photographic sources that have a nodata
    value, where lossy decoding blurs what is nodata: invalid pixels become the nodata value in
    every band, and a valid pixel that decoded to nodata in every band moves by one level in its
    last band.

    Args:
        path: the output file; its folder is created.
        raster: the pixels.
        replace: what may be replaced, see `publish`.

    Raises:
        OutputError: the file cannot be written, or another is there.
    """
    source = raster.source
    embedded = embedded_documents(source)
    profile = _profile(raster)
    if embedded.icc:
        profile["source_icc_profile"] = base64.b64encode(embedded.icc).decode()
    # GDAL's COG driver leaves namespaces of the user's own behind.
    pam = auxiliary_xml(Georef(), source.tags, source.band_tags, classes_of(source.metadata))
    tags = tiff_tags(source, raster.window)
    palette, white = source.colormap is not None, source.white_is_zero
    with cog_writer(path, profile, raster.decoder, palette, pam, replace, tags, white) as stage:
        if source.driver not in TIFF_DRIVERS:
            exif = {k: v for k, v in exif_tags(embedded.exif).items() if k not in stage.tags()}
            _write_tags(stage, {"": exif})
        _stage(stage, raster)


def write_png(path: Path, raster: Raster, replace: Stamps = NOTHING) -> None:
    """Write a PNG of 8 or 16 bits: grey, RGB or palette, with the mask as alpha.

    ICC, EXIF and XMP go into PNG's own chunks; georeference and tags into GDAL's ``.aux.xml``
    beside the file.

    Args:
        path: the output file; its folder is created.
        raster: the pixels.
        replace: what may be replaced, see `publish`.

    Raises:
        OutputError: the image is not uint8 or uint16 with 1 or 3 colour bands, has a palette
            together with a mask, the file cannot be written, or another is there.
    """
    source = raster.source
    if source.dtype not in ("uint8", "uint16"):
        raise OutputError(f"{source.id}: PNG cannot store {source.dtype} pixels; use gtiff")
    own_alpha = "alpha" in source.colorinterp[source.bands - 1 : source.bands]
    if source.bands - own_alpha not in (1, 3):
        raise OutputError(f"{source.id}: PNG stores 1 or 3 bands, not {source.bands}; use gtiff")
    palette = source.colormap is not None
    if palette and (source.mask in ("alpha", "mask") or source.dtype != "uint8"):
        raise OutputError(f"{source.id}: PNG cannot store this palette and its mask; use gtiff")
    alpha = source.mask != "none" and not palette and not own_alpha
    profile = _profile(raster, alpha=alpha)
    with workdir(path) as work:
        staged, plain = work / "stage.tif", work / "plain.png"
        with _open_new(staged, {**_STAGE, **staging(profile), **_BLOCKS, **profile}) as stage:
            _stage(stage, raster, alpha=alpha, shown=True)
        level = {"zlevel": PNG_LEVEL} if is_photograph(profile) else {}
        rasterio.shutil.copy(staged, plain, driver="PNG", **level)
        final = work / "final.png"
        insert_chunks(plain, final, png_chunks(source, raster.decoder))
        pam = Path(f"{plain}.aux.xml")
        if pam.exists():
            pam.rename(f"{final}.aux.xml")
        publish(final, path, replace)


def write_jpeg(path: Path, raster: Raster, replace: Stamps = NOTHING, quality: int = 95) -> None:
    """Write a baseline JPEG (4:4:4) that carries the original file's metadata.

    For a whole image the original segments come back byte for byte, with the EXIF thumbnail made
    again from the restored pixels; what `write_segments` cannot keep true goes.  A window keeps
    them too, since camera, position and time stay true, but EXIF's pixel dimensions are set to
    the window's.  Lens and principal point of a window still refer to the whole frame: give
    photogrammetry whole frames.

    The georeference, which JPEG cannot hold, goes into GDAL's ``.aux.xml`` beside the file, and
    an affine one also into a world file (``.jgw``, see `publish.world_file`).

    Args:
        path: the output file; its folder is created.
        raster: the pixels; the whole window is held in memory.
        replace: what may be replaced, see `publish`.
        quality: libjpeg's quality, 1 to 100.

    Raises:
        OutputError: the image is not uint8 with 1 or 3 bands, has a palette, pixels that are not
            fully opaque or more than 65535 pixels on a side, the file cannot be written, or
            another is there.
    """
    source, (col, row, width, height) = raster.source, raster.window
    if source.dtype != "uint8" or source.bands not in (1, 3) or source.colormap is not None:
        kind = "palette" if source.colormap is not None else f"{source.bands}-band {source.dtype}"
        raise OutputError(
            f"{source.id}: JPEG stores 8-bit grey or RGB pixels, not {kind}; use gtiff"
        )
    if max(width, height) > JPEG_SIDE:
        raise OutputError(f"{source.id}: {width}x{height} pixels exceed JPEG's limit; use gtiff")
    pixels = np.empty((height, width, source.bands), np.uint8)
    for window in read_windows(raster):
        c, r, w, h = window
        mask = raster.read_mask(window)
        if mask is not None and mask.min() < 255:
            raise OutputError(
                f"{source.id}: JPEG cannot store transparent pixels; use gtiff or png"
            )
        pixels[r - row : r - row + h, c - col : c - col + w] = as_shown(source, raster.read(window))
    whole = (col, row, width, height) == (0, 0, source.width, source.height)
    try:
        data = _encode_jpeg(source, pixels, quality, whole, raster.decoder)
    except ValueError as error:
        raise OutputError(f"{source.id}: {error}") from error
    write_jpeg_file(path, raster, data, replace)


def write_jpeg_file(path: Path, raster: Raster, data: bytes, replace: Stamps = NOTHING) -> None:
    """Write a JPEG file of these bytes, with the georeference beside it as `write_jpeg` has it.

    Args:
        path: the output file; its folder is created.
        raster: what it shows.
        data: the file.
        replace: what may be replaced, see `publish`.

    Raises:
        OutputError: the file cannot be written, or another is there.
    """
    with workdir(path) as work:
        final = work / "final.jpg"
        final.write_bytes(data)
        georef = _georef(raster)
        pam = auxiliary_xml(georef)
        if pam:
            (work / "final.jpg.aux.xml").write_text(pam, encoding="utf-8")
        if georef.transform is not None:
            a, b, c_, d, e, f = georef.transform
            centre = (a, d, b, e, c_ + (a + b) / 2, f + (d + e) / 2)
            world_file(final).write_text("".join(f"{value!r}\n" for value in centre))
        publish(final, path, replace)


@contextmanager
def cog_writer(
    path: Path,
    profile: dict[str, Any],
    decoder: str,
    palette: bool = False,
    pam: str = "",
    replace: Stamps = NOTHING,
    tags: Iterable[Tag] = (),
    white_is_zero: bool = False,
) -> Iterator[DatasetWriter]:
    """Give a staging dataset to fill; on leaving, make it a Cloud Optimized GeoTIFF at ``path``.

    Nothing appears at ``path`` when the body raises.  The file says that it was restored, see
    `flight.restored_tag`.

    Args:
        path: the output file; its folder is created.
        profile: rasterio's creation profile: size, count, dtype, georeference, photometric, ...
        decoder: what made the pixels, for the mark.
        palette: pixel values are classes: overviews have the commonest, where others average.
        pam: text of GDAL's ``.aux.xml`` beside the output; none where empty.
        replace: what may be replaced, see `publish`.
        tags: more tags for the file's first directory.
        white_is_zero: grey pixels are said to be so.

    Raises:
        OutputError: the file cannot be written, or another is there.
    """
    with workdir(path) as work:
        staged, plain, final = (work / name for name in ("stage.tif", "plain.tif", "final.tif"))
        side = stored_blocks(profile)
        # Band by band, overviews of many bands need no block of all of them.
        interleave = "band" if profile["count"] > MANY_BANDS else "pixel"
        blocks = {"blockxsize": side, "blockysize": side, "interleave": interleave}
        with _open_new(staged, {**_STAGE, **staging(profile), **blocks, **profile}) as stage:
            stage.update_tags(**{TIFF_ITEM: mark(decoder)})
            yield stage
        size = max(profile["width"], profile["height"])
        factors = [2**n for n in range(1, 32) if size > COG_BLOCK * 2 ** (n - 1)]
        if factors:
            resampling = Resampling.mode if palette else Resampling.average
            with quiet(), rasterio.open(staged, "r+", driver="GTiff") as stage:
                stage.build_overviews(factors, resampling)
        overviews = "AUTO" if factors else "NONE"  # GDAL would make them for small blocks
        options = {**_COG, **packing(profile, palette), "blocksize": side, "overviews": overviews}
        rasterio.shutil.copy(staged, plain, **options)
        insert_tags(plain, final, tags, white_is_zero)
        if pam:
            Path(f"{final}.aux.xml").write_text(pam, encoding="utf-8")
        publish(final, path, replace)


def _profile(raster: Raster, alpha: bool | None = None) -> dict[str, Any]:
    """Return the creation profile of a raster's window; ``alpha`` overrules the source's mask."""
    source, (_, _, width, height) = raster.source, raster.window
    with_alpha = source.mask == "alpha" if alpha is None else alpha
    georef = _georef(raster)
    profile: dict[str, Any] = {
        "width": width,
        "height": height,
        "count": source.bands + with_alpha,
        **sample_options(source, with_alpha),
        "photometric": _photometric(source),
    }
    # An alpha band made from nodata replaces it: GDAL ignores alpha where there is nodata.
    nodata = storable_nodata(source.nodata, source.dtype)
    of_all_bands = source.mask == "mask" and "NODATA_VALUES" in source.tags.get("", {})
    if nodata is not None and not alpha and not of_all_bands:
        profile["nodata"] = nodata
    if georef.crs is not None:
        profile["crs"] = CRS.from_user_input(georef.crs)
    if georef.transform is not None:
        profile["transform"] = rasterio.Affine(*georef.transform)
    elif georef.gcps:
        profile["gcps"] = [GroundControlPoint(*gcp) for gcp in georef.gcps]
    return profile


def _georef(raster: Raster) -> Georef:
    """Where a raster's window lies, in the words that GDAL understands best."""
    _, _, width, height = raster.window
    return with_camera_rpcs(window_transform(raster.source.georef, raster.window), width, height)


def _photometric(source: SourceImage) -> str:
    if source.colormap is not None:
        return "PALETTE"
    if source.colorinterp[:3] == ("red", "green", "blue"):
        return "RGB"
    if source.colorinterp[:4] == ("cyan", "magenta", "yellow", "black"):
        return "CMYK"
    return "MINISBLACK"


def _stage(stage: DatasetWriter, raster: Raster, alpha: bool = False, shown: bool = False) -> None:
    """Fill a staging dataset made from `_profile` with a raster's tags, pixels and mask.

    Args:
        shown: pixels as they are shown where the source's zero is white.
    """
    source = raster.source
    names = list(source.colorinterp) or [interp.name for interp in stage.colorinterp]
    if alpha and "alpha" not in names:
        names = [*names[: source.bands], "alpha"]
    alpha_index = names.index("alpha") if alpha or source.mask == "alpha" else None
    _describe(stage, raster, names, alpha_index)
    colours = [n for n in range(stage.count) if n != alpha_index]
    col, row, _, _ = raster.window
    nodata = stage.nodata if source.lossy else None
    for window in read_windows(raster):
        pixels, mask = raster.read(window), raster.read_mask(window)
        c, r, w, h = window
        target = RasterioWindow(c - col, r - row, w, h)
        if nodata is not None:
            pixels = pixels.copy()
            valid = np.ones((h, w), bool) if mask is None else mask != 0
            pixels[~valid] = nodata
            avoid_nodata(pixels, valid, nodata)
        if shown:
            pixels = as_shown(source, pixels)
        write_parts(stage, np.moveaxis(pixels, 2, 0), [n + 1 for n in colours], target)
        if mask is None:
            mask = np.full((h, w), 255, np.uint8)
        if alpha_index is not None:
            opaque = 257 if source.dtype == "uint16" else 1
            band = mask.astype(source.dtype) * np.dtype(source.dtype).type(opaque)
            stage.write(band, alpha_index + 1, window=target)
        elif source.mask == "mask" and "alpha" not in names:
            stage.write_mask(mask, window=target)


def _describe(
    stage: DatasetWriter, raster: Raster, names: list[str], alpha_index: int | None
) -> None:
    """Write everything about a raster but pixels; must come before them, TIFF needs it so."""
    source = raster.source
    known = ColorInterp.__members__
    stage.colorinterp = [known.get(n, ColorInterp.undefined) for n in names[: stage.count]]
    if source.colormap is not None:
        stage.write_colormap(1, dict(enumerate(source.colormap)))
    same = not source.lossy and raster.window == (0, 0, source.width, source.height)
    every = [source.tags, *source.band_tags]
    tags, *of_bands = every if same else map(without_statistics, every)
    tags = dict(tags)
    if source.mask == "mask":  # which says it of each pixel, decoded lossily or not
        tags[""] = {k: v for k, v in tags.get("", {}).items() if k != "NODATA_VALUES"}
    if source.georef.transform is None:
        # GDAL shifts GCPs at every writing that are said to be points.
        tags[""] = {k: v for k, v in tags.get("", {}).items() if k != "AREA_OR_POINT"}
    _write_tags(stage, tags)
    rpcs = _georef(raster).rpcs
    if rpcs:
        stage.update_tags(ns="RPC", **rpcs)
    units, scales, offsets = [""] * stage.count, [1.0] * stage.count, [0.0] * stage.count
    for band, n in enumerate(n for n in range(stage.count) if n != alpha_index):
        if band < len(source.descriptions) and source.descriptions[band]:
            stage.set_band_description(n + 1, source.descriptions[band])
        if band < len(source.units):
            units[n] = source.units[band] or ""
        if band < len(source.scales):
            scales[n] = source.scales[band]
        if band < len(source.offsets):
            offsets[n] = source.offsets[band]
        if band < len(of_bands):
            _write_tags(stage, of_bands[band], n + 1)
    if any(units):
        stage.units = units
    if any(scale != 1.0 for scale in scales):
        stage.scales = scales
    if any(offsets):
        stage.offsets = offsets


def _write_tags(stage: DatasetWriter, tags: dict[str, dict[str, str]], band: int = 0) -> None:
    for namespace, items in tags.items():
        if namespace.upper() in MADE_NAMESPACES:
            continue
        if namespace.startswith("xml:"):
            # rasterio joins key and value by "="; GDAL wants the bare document.
            splits = [document.partition("=") for document in items.values() if document]
            items = {head: tail for head, _, tail in splits}
        mark_item = "" if namespace else TIFF_ITEM  # of a source that was itself restored
        kept = {k: v for k, v in items.items() if k != mark_item}
        if kept:
            stage.update_tags(band, ns=namespace or None, **kept)


def _encode_jpeg(
    source: SourceImage, pixels: npt.NDArray[np.uint8], quality: int, whole: bool, decoder: str
) -> bytes:
    image = Image.fromarray(pixels[..., 0] if source.bands == 1 else pixels)
    segments = list(source.metadata) if source.driver == "JPEG" else pack_segments(source)
    rgb = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    for index, (name, payload) in enumerate(segments):
        if name == "APP1" and payload.startswith(EXIF_PREFIX):
            if not whole:
                payload = set_dimensions(payload, image.width, image.height)
            segments[index] = (name, fill_thumbnail(payload, rgb))
    coded = io.BytesIO()
    image.save(coded, "JPEG", quality=quality, subsampling=0)
    segments = [(n, data) for n, data in segments if n != "COM" or not data.startswith(MARK)]
    segments.append(("COM", mark(decoder).encode("ascii")))
    return write_segments(coded.getvalue(), segments)


def _open_new(path: Path, profile: dict[str, Any]) -> DatasetWriter:
    with quiet():
        return rasterio.open(path, "w", **profile)
