"""Flight directories: listing, source records, pixels and masks, metadata, JPEG segments."""

from __future__ import annotations

import importlib
import io
import json
import random
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image, PngImagePlugin
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

from archive_pipeline.flight.camera_tags import read_pose
from archive_pipeline.flight.find import FlightError, find_flight, find_images
from archive_pipeline.flight.jpeg_segments import (
    TRAILER,
    blank_thumbnail,
    fill_thumbnail,
    read_segments,
    walk,
    write_segments,
)
from archive_pipeline.flight.read import read_pixels, read_source
from archive_pipeline.flight.source_image import SourceError, SourceImage
from archive_pipeline.flight.xmp import read_xmp

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
ORTHO = DATA / "ortho"
BRIGHTON = DATA / "eval" / "brighton_beach"

# CRS, first two and last transform elements that matter, mask, nodata.
ORTHOS = {
    "201404_13SED190110_201404_0x1500m_CL_1.tif": ("EPSG:26913", 519467.4957, "none", None),
    "201404_13SED190110_201404_0x1500m_CL_1_alpha.tif": ("EPSG:26913", 519467.4957, "alpha", None),
    "201404_13SED190110_201404_0x1500m_CL_1_extmask.tif": ("EPSG:26913", 519467.4957, "none", None),
    "201404_13SED190110_201404_0x1500m_CL_1_mask.tif": ("EPSG:26913", 519467.4957, "mask", None),
    "201404_13SED190110_201404_0x1500m_CL_1_nodata.tif": ("EPSG:26913", 519467.4957, "nodata", 0),
    "2018_SJER_3_252000_4107000_image_477.tif": ("EPSG:32611", 252645.951, "nodata", 255),
    "5b90f92da0d7280005fab355_4310.tif": ("EPSG:3395", 13467532.0, "none", None),
    "5dded5bc0140b80006d2e565_23.tif": ("EPSG:3395", -5743476.5, "none", None),
    "OSBS_029.tif": ("EPSG:32617", 404211.9, "nodata", 255),
    "australia.tif": ("EPSG:32753", 278966.322, "nodata", 0),
    "dummy_fotomap_small.tif": ("EPSG:32633", 638838.7015, "alpha", None),
    "pix4d_alpha_nodata.tif": ("EPSG:32750", 297463.30262, "alpha", None),
    "test_tiled.tif": ("EPSG:28992", 127375.0, "none", None),
}

needs_ortho = pytest.mark.skipif(not ORTHO.is_dir(), reason=f"the orthomosaics are not at {ORTHO}")
needs_brighton = pytest.mark.skipif(
    not BRIGHTON.is_dir(), reason=f"the brighton_beach frames are not at {BRIGHTON}"
)


def make_flight(folder: Path, *args: int) -> list[Path]:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return importlib.import_module("make_flight").make_flight(folder, *args)
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def flight(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_flight(tmp_path_factory.mktemp("flight"), 2, 456, 304, 1)


def scene(height: int = 120, width: int = 160, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def save_tiff(path: Path, bands: np.ndarray, **profile: Any) -> Path:
    """Write (bands, height, width) with a UTM grid."""
    count, height, width = bands.shape
    settings = {
        "driver": "GTiff", "count": count, "height": height, "width": width,
        "dtype": bands.dtype.name, "crs": "EPSG:32615",
        "transform": from_origin(325000, 3240000, 0.1, 0.1),
    }  # fmt: skip
    with rasterio.open(path, "w", **{**settings, **profile}) as target:
        target.write(bands)
    return path


def test_find_images_walks_folders_in_order(tmp_path: Path) -> None:
    for name in (
        "b/DJI_0001.JPG", "a/DJI_0001.jpg", "a/DJI_0002.jpg", "ortho.TIF", "ortho.TIF.aux.xml",
        "ortho.tif.msk", "ortho.tif.ovr", "ortho.tfw", "a/Timestamp.MRK", "video.SRT", "notes.txt",
        ".hidden.jpg", ".trash/x.jpg", "a/DJI_0003.DNG", "video.MP4",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "linked.png").symlink_to(tmp_path / "ortho.TIF")
    assert [file.id for file in find_images(tmp_path)] == [
        "a/DJI_0001.jpg", "DJI_0002.jpg", "b/DJI_0001.JPG", "linked.png", "ortho.TIF",
    ]  # fmt: skip
    assert all(Path(file.path).is_file() for file in find_images(tmp_path))
    flight = find_flight(tmp_path)
    assert [document.below for document in flight.documents] == [
        "a/DJI_0003.DNG", "a/Timestamp.MRK", "notes.txt", "video.SRT",
    ]  # fmt: skip
    assert flight.others == ["loop/", "video.MP4"]


def test_find_images_refuses_what_is_no_flight(tmp_path: Path) -> None:
    with pytest.raises(FlightError, match="no such directory"):
        find_images(tmp_path / "missing")
    with pytest.raises(FlightError, match="no images"):
        find_images(tmp_path)
    (tmp_path / "file.jpg").touch()
    with pytest.raises(FlightError, match="a file; a flight is the folder"):
        find_images(tmp_path / "file.jpg")


@needs_ortho
@pytest.mark.parametrize("name", ORTHOS)
def test_real_orthomosaics(name: str) -> None:
    crs, west, mask, nodata = ORTHOS[name]
    source = read_source(ORTHO / name, name)
    assert (source.georef.crs, source.mask, source.nodata) == (crs, mask, nodata)
    assert (source.bands, source.dtype, source.lossy) == (3, "uint8", True)
    assert source.georef.method == "transform"
    assert source.georef.footprint is not None
    assert source.georef.transform is not None
    assert source.georef.transform[2] == pytest.approx(west, abs=1e-3)
    pixels, valid = read_pixels(source)
    with rasterio.open(ORTHO / name) as dataset:
        assert tuple(dataset.transform)[:6] == source.georef.transform
        np.testing.assert_array_equal(np.moveaxis(pixels, -1, 0), dataset.read([1, 2, 3]))
        if mask == "none":
            assert valid is None
        else:
            assert valid is not None
            np.testing.assert_array_equal(valid, dataset.dataset_mask())


@needs_ortho
def test_tiff_documents_come_back_byte_for_byte() -> None:
    path = ORTHO / "dummy_fotomap_small.tif"
    blocks = dict(read_source(path, path.name).metadata)
    assert set(blocks) == {"XMP", "ICC", "EXIF"}
    data = path.read_bytes()
    assert blocks["XMP"] in data
    assert blocks["ICC"] in data
    assert b"<x:xmpmeta" in blocks["XMP"]
    assert blocks["ICC"][36:40] == b"acsp"
    exif = Image.Exif()
    exif.load(blocks["EXIF"])
    assert exif[0x0131] == "GIMP 2.10.30"
    assert exif.get_ifd(0x8769)


@needs_brighton
def test_real_frame() -> None:
    source = read_source(BRIGHTON / "DJI_0020.JPG", "DJI_0020.JPG")
    assert (source.driver, source.width, source.height, source.bands) == ("JPEG", 4000, 2250, 3)
    assert source.georef.crs == "EPSG:32615"
    assert source.georef.method == "camera"
    assert source.captured == "2016-06-23T16:32:13"
    assert source.camera is not None
    assert (source.camera.make, source.camera.model) == ("DJI", "FC300S")
    assert (source.camera.yaw_deg, source.camera.altitude_relative_m) == (44.2, 40.1)
    assert [name for name, _ in source.metadata] == ["APP1", "APP1", "APP2"]
    assert any("further pictures (MPF)" in warning for warning in source.warnings)


def test_made_frame_and_orthomosaic(flight: list[Path]) -> None:
    frame, ortho = read_source(flight[0], "frame"), read_source(flight[-1], "ortho")
    assert frame.camera is not None
    assert frame.camera.model == "FC6310"
    assert frame.captured == "2024-09-12T10:30:00"
    assert frame.warnings == ()
    assert frame.lossy
    assert frame.mask == "none"
    assert -94.80 < frame.camera.lon < -94.79  # type: ignore[operator]
    assert ortho.mask == "mask"
    assert ortho.layout["tiled"]
    assert ortho.georef.crs == "EPSG:32615"
    assert ortho.camera is None
    assert ortho.georef.method == "transform"
    _, mask = read_pixels(ortho)
    assert mask is not None
    assert set(np.unique(mask)) == {0, 255}


def test_made_flight_is_the_same_for_a_seed(tmp_path: Path, flight: list[Path]) -> None:
    again = make_flight(tmp_path, 2, 456, 304, 1)
    assert [a.read_bytes() for a in again] == [b.read_bytes() for b in flight]


def test_source_survives_json(flight: list[Path], tmp_path: Path) -> None:
    dem = np.ones((1, 30, 40), dtype=np.float32)
    nan = save_tiff(tmp_path / "dem.tif", dem, nodata=float("nan"))
    for path in (*flight, nan):
        source = read_source(path, path.name)
        text = json.dumps(source.to_json(), allow_nan=False)
        record = json.loads(text) | {"of a later release": 1}
        if record["camera"] is not None:
            record["camera"]["of a later release"] = [2]
        again = SourceImage.from_json(record, source.metadata)
        for field in fields(source):
            old, new = getattr(source, field.name), getattr(again, field.name)
            assert repr(old) == repr(new), field.name
        assert "metadata" not in source.to_json()


def test_nan_nodata(tmp_path: Path) -> None:
    dem = np.arange(1200, dtype=np.float32).reshape(1, 30, 40)
    dem[0, :5] = np.nan
    path = save_tiff(tmp_path / "dem.tif", dem, nodata=float("nan"))
    source = read_source(path, "dem")
    assert source.mask == "nodata"
    assert np.isnan(source.nodata)
    assert not source.lossy
    assert source.dtype == "float32"
    pixels, mask = read_pixels(source)
    np.testing.assert_array_equal(pixels[..., 0], dem[0])
    assert mask is not None
    assert not mask[:5].any()
    assert (mask[5:] == 255).all()


def test_sixteen_bit_multispectral_keeps_its_band_records(tmp_path: Path) -> None:
    bands = np.random.default_rng(0).integers(0, 65536, (5, 20, 30), dtype=np.uint16)
    path = save_tiff(tmp_path / "ms.tif", bands)
    with rasterio.open(path, "r+") as target:
        target.descriptions = ("blue", "green", "red", "red edge", "nir")
        target.scales, target.offsets = (0.5,) * 5, (1.0, 2.0, 3.0, 4.0, 5.0)
        target.update_tags(FLIGHT="7")
        target.update_tags(ns="SENSOR", gain="2")
        target.update_tags(5, wavelength="840")
    source = read_source(path, "ms")
    assert (source.bands, source.dtype, source.lossy) == (5, "uint16", False)
    assert source.descriptions[3:] == ("red edge", "nir")
    assert source.offsets[4] == 5.0
    assert source.tags[""]["FLIGHT"] == "7"
    assert source.tags["SENSOR"] == {"gain": "2"}
    assert source.band_tags[4][""]["wavelength"] == "840"
    np.testing.assert_array_equal(np.moveaxis(read_pixels(source)[0], -1, 0), bands)


def test_palette_gray_and_wide_alpha_are_lossless(tmp_path: Path) -> None:
    gray = save_tiff(tmp_path / "gray.tif", scene().transpose(2, 0, 1)[:1])
    assert not read_source(gray, "gray").lossy
    path = save_tiff(
        tmp_path / "palette.tif", scene().transpose(2, 0, 1)[:1] // 64, photometric="palette"
    )
    with rasterio.open(path, "r+") as target:
        target.write_colormap(1, {0: (1, 2, 3, 255), 3: (200, 100, 50, 255)})
    source = read_source(path, "palette")
    assert not source.lossy
    assert source.colormap is not None
    assert source.colormap[3] == (200, 100, 50, 255)
    wide = save_tiff(
        tmp_path / "rgba16.tif", np.zeros((4, 8, 8), np.uint16), photometric="rgb", alpha="yes"
    )
    source = read_source(wide, "rgba16")
    assert (source.bands, source.mask, source.colorinterp[3]) == (4, "none", "alpha")


def test_alpha_is_set_aside_exactly(tmp_path: Path) -> None:
    rgba = np.concatenate(
        [scene().transpose(2, 0, 1), np.arange(160, dtype=np.uint8)[None, None].repeat(120, 1)]
    )
    path = save_tiff(tmp_path / "rgba.tif", rgba, photometric="rgb", alpha="yes")
    source = read_source(path, "rgba")
    assert (source.bands, source.mask, source.lossy) == (3, "alpha", True)
    pixels, mask = read_pixels(source, (10, 20, 50, 40))
    np.testing.assert_array_equal(np.moveaxis(pixels, -1, 0), rgba[:3, 20:60, 10:60])
    np.testing.assert_array_equal(mask, rgba[3, 20:60, 10:60])


def test_external_mask(tmp_path: Path) -> None:
    path = save_tiff(tmp_path / "rgb.tif", scene().transpose(2, 0, 1), photometric="rgb")
    mask = np.zeros((120, 160), np.uint8)
    mask[30:, 20:] = 255
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as target:
        target.write_mask(mask)
    assert (tmp_path / "rgb.tif.msk").exists()
    source = read_source(path, "rgb")
    assert source.mask == "mask"
    np.testing.assert_array_equal(read_pixels(source)[1], mask)


def test_gcps_and_odd_crs(tmp_path: Path) -> None:
    gcps = [
        rasterio.control.GroundControlPoint(r, c, 325000 + c, 3240000 - r, 2.5, str(i), "")
        for i, (r, c) in enumerate(((0, 0), (0, 160), (120, 0), (120, 160)))
    ]
    rgb = scene().transpose(2, 0, 1)
    path = tmp_path / "gcps.tif"
    profile = {"driver": "GTiff", "count": 3, "height": 120, "width": 160, "dtype": "uint8"}
    with rasterio.open(path, "w", crs="EPSG:32615", gcps=gcps, **profile) as target:
        target.write(rgb)
    georef = read_source(path, "gcps").georef
    assert georef.method == "gcps"
    assert georef.transform is None
    assert georef.crs == "EPSG:32615"
    assert [p[:5] for p in georef.gcps] == [(g.row, g.col, g.x, g.y, g.z) for g in gcps]
    assert georef.footprint is not None
    proj = "+proj=tmerc +lat_0=29 +lon_0=-94.8 +k=1 +x_0=1000 +y_0=2000 +ellps=GRS80 +units=m"
    odd = save_tiff(tmp_path / "odd.tif", rgb, crs=proj)
    crs = read_source(odd, "odd").georef.crs
    assert crs is not None
    assert not crs.startswith("EPSG")
    assert rasterio.crs.CRS.from_wkt(crs) == rasterio.open(odd).crs


def test_windows_are_checked(flight: list[Path]) -> None:
    source = read_source(flight[0], "frame")
    whole, _ = read_pixels(source)
    part, _ = read_pixels(source, (100, 50, 32, 16))
    np.testing.assert_array_equal(part, whole[50:66, 100:132])
    for window in ((-1, 0, 10, 10), (0, 0, 0, 10), (450, 0, 10, 10), (0, 300, 10, 10)):
        with pytest.raises(ValueError, match="window"):
            read_pixels(source, window)


def test_frames_decode_to_rgb(flight: list[Path]) -> None:
    pixels, mask = read_pixels(read_source(flight[0], "frame"))
    assert mask is None
    assert pixels.shape == (304, 456, 3)
    assert pixels.flags.c_contiguous
    pillow = np.asarray(Image.open(flight[0])).astype(int)
    assert np.abs(pixels - pillow).mean() < 1.0


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[: len(data) // 2] + b"\xff\xd9", "damaged JPEG"),
        (lambda data: data[:300], ""),
        (lambda data: b"", "empty"),
        (lambda data: b"<html><body>404 not found</body></html>", "not an image"),
        (lambda data: bytes(4000), "not an image"),
    ],
)
def test_damaged_frames_are_refused(
    tmp_path: Path, flight: list[Path], damage: Callable[[bytes], bytes], reason: str
) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(damage(flight[0].read_bytes()))
    with pytest.raises(SourceError) as caught:
        read_pixels(read_source(path, "bad"))
    assert caught.value.path == path
    assert reason in caught.value.reason
    assert caught.value.reason
    assert "\n" not in str(caught.value)


def test_a_hole_between_restart_markers_is_refused(tmp_path: Path) -> None:
    data = encode(scene(), restart_marker_rows=1)
    path = tmp_path / "hole.jpg"
    path.write_bytes(data)
    read_pixels(read_source(path, "whole"))
    middle = len(data) * 2 // 3
    path.write_bytes(data[:middle] + bytes(60) + data[middle + 60 :])
    with pytest.raises(SourceError, match="damaged JPEG"):
        read_pixels(read_source(path, "hole"))


def test_missing_files_and_truncated_rasters(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        read_source(tmp_path / "gone.jpg", "gone")
    with pytest.raises(SourceError, match="not a file"):
        read_source(tmp_path, "folder")
    path = save_tiff(tmp_path / "cut.tif", scene().transpose(2, 0, 1))
    source = read_source(path, "cut")
    path.write_bytes(path.read_bytes()[:-20000])
    with pytest.raises(SourceError):
        read_pixels(source)
    png = tmp_path / "cut.png"
    Image.fromarray(scene()).save(png)
    whole = png.read_bytes()
    png.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match="truncated"):
        read_source(png, "png")
    png.write_bytes(whole[:-40] + b"\0\1\2\3" + whole[-36:])
    with pytest.raises(SourceError, match="checksum"):
        read_source(png, "png")


def test_broken_rasters_fail_in_one_way_only(tmp_path: Path) -> None:
    path = save_tiff(tmp_path / "whole.tif", scene().transpose(2, 0, 1), compress="deflate")
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(8):
            data[rng.randrange(600)] = rng.randrange(256)
        path.write_bytes(data)
        with suppress(SourceError):
            source = read_source(path, "broken")
            if source.width * source.height < 10_000_000:
                read_pixels(source)


def test_png_chunks_are_kept(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "over the bay")
    info.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta/>")
    path = tmp_path / "a.png"
    Image.fromarray(scene()).save(path, pnginfo=info, dpi=(300, 300), icc_profile=b"profile")
    source = read_source(path, "a.png")
    blocks = dict(source.metadata)
    assert {"tEXt", "iTXt", "pHYs", "iCCP"} == set(blocks)
    assert blocks["tEXt"] == b"Comment\0over the bay"
    assert any("no position" in warning for warning in source.warnings)


def test_what_follows_a_jpeg_is_kept(tmp_path: Path, flight: list[Path]) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(flight[0].read_bytes() + bytes(5000) + b"tail")
    source = read_source(path, "a")
    assert source.metadata[-1] == (TRAILER, bytes(5000) + b"tail")
    assert source.warnings == ()
    assert list(source.metadata) == read_segments(path)


def test_pictures_that_mpf_declares_are_named_and_the_rest_is_kept(
    tmp_path: Path, flight: list[Path]
) -> None:
    plain = flight[0].read_bytes()
    entries = 2  # the image itself, whose offset is 0, and a preview
    head = 8 + 2 + 12 + 4  # TIFF header, directory of one tag

    def with_mpf(offset: int) -> bytes:
        table = struct.pack("<IIIHHIIIHH", 0, 0, 0, 0, 0, 0, 7, offset, 0, 0)
        directory = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0xB002, 7, 16 * entries, head, 0)
        payload = b"MPF\0" + directory + table
        return plain[:2] + b"\xff\xe2" + struct.pack(">H", len(payload) + 2) + payload + plain[2:]

    start = len(with_mpf(0)) + len(b"before") - (2 + 2 + 2 + 4)  # from MPF's own TIFF header
    path = tmp_path / "a.jpg"
    path.write_bytes(with_mpf(start) + b"before" + b"preview" + b"after")
    source = read_source(path, "a")
    assert source.metadata[-2:] == ((TRAILER, b"before"), (TRAILER, b"after"))
    assert source.warnings == ("7 bytes of further pictures (MPF) are not archived",)


def encode(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def adobe(transform: int) -> tuple[str, bytes]:
    return "APP14", b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform)


def test_segments_go_back_in_order(flight: list[Path]) -> None:
    segments = read_segments(flight[0])
    assert [name for name, _ in segments] == ["APP0", "APP1", "APP1"]
    extra = [*segments, ("APP13", b"Photoshop 3.0\0"), ("COM", b"a word"), (TRAILER, b"end")]
    coded = encode(scene(), comment="the encoder's own")
    out = write_segments(coded, extra)
    assert walk(out).segments == extra[:-1]
    assert out.endswith(b"end")
    assert write_segments(out, extra) == out
    np.testing.assert_array_equal(Image.open(io.BytesIO(out)), Image.open(io.BytesIO(coded)))
    picture = Image.open(io.BytesIO(out))
    assert picture.getexif()[0x0110] == "FC6310"
    assert picture.info["comment"] == b"a word"


@pytest.mark.parametrize(
    "stored", [[], [adobe(0)], [adobe(1)], [adobe(2)], [("APP0", b"JFIF\0\1\1\0\0\1\0\1\0\0")]]
)
@pytest.mark.parametrize("options", [{}, {"keep_rgb": True}])
def test_colours_survive_any_stored_segments(
    stored: list[tuple[str, bytes]], options: dict[str, Any]
) -> None:
    coded = encode(scene(), **options)
    out = write_segments(coded, stored)
    np.testing.assert_array_equal(Image.open(io.BytesIO(out)), Image.open(io.BytesIO(coded)))
    assert adobe(2) not in walk(out).segments


def test_mpf_is_dropped_and_bad_segments_refused() -> None:
    coded = encode(scene())
    assert walk(write_segments(coded, [("APP2", b"MPF\0II*\0")])).segments == []
    for segment in (("APP16", b""), ("EXIF", b""), ("APP1", bytes(65534))):
        with pytest.raises(ValueError, match="JPEG segment"):
            write_segments(coded, [segment])
    for data in (b"", b"\xff\xd8", b"\xff\xd8\xff\xe1\xff", b"nonsense"):
        with pytest.raises(ValueError):
            walk(data)
        with pytest.raises(ValueError):
            write_segments(data, [])


def test_thumbnail_is_blanked_and_filled(flight: list[Path]) -> None:
    exif = read_segments(flight[0])[1][1]
    blank, place = blank_thumbnail(exif)
    assert place is not None
    offset, length = place
    assert exif[offset : offset + 2] == b"\xff\xd8"
    assert not any(blank[offset : offset + length])
    assert blank[:offset] == exif[:offset]
    assert blank[offset + length :] == exif[offset + length :]
    assert blank_thumbnail(blank) == (blank, None)
    filled = fill_thumbnail(blank, scene(480, 640))
    assert len(filled) == len(exif)
    assert filled[:offset] == exif[:offset]
    picture = Image.open(io.BytesIO(filled[offset : offset + length]))
    picture.load()
    assert picture.size == (160, 120)
    # Only what was blanked is filled.
    assert fill_thumbnail(exif, scene()) == exif
    assert read_pose(filled) == read_pose(exif)


@needs_brighton
def test_real_thumbnails_are_found() -> None:
    for path in sorted(BRIGHTON.glob("*.JPG")):
        exif = next(p for n, p in read_segments(path) if n == "APP1" and p[:4] == b"Exif")
        place = blank_thumbnail(exif)[1]
        assert place is not None
        assert place[1] > 4000


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_hostile_exif_is_no_thumbnail() -> None:
    def ifd(entries: list[tuple[int, int, int, int]], following: int) -> bytes:
        body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
        return struct.pack("<H", len(entries)) + body + struct.pack("<I", following)

    head = b"Exif\0\0II*\0" + struct.pack("<I", 8)
    first = ifd([], 14)
    cases = [
        b"", b"Exif\0\0", b"Exif\0\0II*\0", head, head + b"\xff\xff",
        head + ifd([], 8), head + ifd([], 0xFFFFFFFF),
        head + first + ifd([(0x0201, 4, 1, 0xFFFFFFF0), (0x0202, 4, 1, 100)], 0),
        head + first + ifd([(0x0201, 4, 1, 44), (0x0202, 4, 1, 0xFFFFFFF0)], 8),
        head + first + ifd([(0x0201, 4, 1, 0), (0x0202, 4, 1, 30)], 14),
        head + first + ifd([(0x0201, 4, 1, 44), (0x0202, 4, 1, 8)], 14) + b"not JPEG",
    ]  # fmt: skip
    for block in cases:
        assert blank_thumbnail(block) == (block, None)
        read_pose(block, read_xmp([("XMP", block)]))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_random_metadata_never_raises(flight: list[Path]) -> None:
    exif, xmp = (payload for name, payload in read_segments(flight[0]) if name == "APP1")
    rng = random.Random(0)
    for _ in range(200):
        data = bytearray(exif)
        for _ in range(10):
            data[rng.randrange(400)] = rng.randrange(256)
        blank, place = blank_thumbnail(bytes(data))
        assert len(blank) == len(data)
        assert (place is None) == (blank == data)
        read_pose(bytes(data), read_xmp([("XMP", xmp)]))


def test_lossy_is_for_photographs_only() -> None:
    def source(dtype: str, *interp: ColorInterp, bands: int = 3) -> SourceImage:
        names = tuple(item.name for item in interp)
        return SourceImage(Path("a"), "a", "", 1, "GTiff", 8, 8, bands, dtype, colorinterp=names)

    rgb = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    assert source("uint8", *rgb).lossy
    assert source("uint8", *rgb, ColorInterp.alpha).lossy
    assert not source("uint16", *rgb).lossy
    assert not source("uint8", ColorInterp.gray, ColorInterp.undefined, ColorInterp.undefined).lossy
    assert not source("uint8", *rgb, ColorInterp.undefined, bands=4).lossy
