"""Files that are broken, or unusual, in one thing: the rest of them is archived, and comes back."""

from __future__ import annotations

import io
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import Run
from PIL import Image, ImageCms, TiffImagePlugin
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from test_outputs import noise, whole

from archive_pipeline.flight._metadata_blocks import jp2_blocks, webp_blocks
from archive_pipeline.flight.find import find_images
from archive_pipeline.flight.read import read_pixels, read_source
from archive_pipeline.flight.source_image import XMP_PREFIX, SourceError
from archive_pipeline.outputs.publish import world_file
from archive_pipeline.outputs.writers import write_gtiff, write_jpeg, write_png

XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    b'xmlns:drone-dji="http://www.dji.com/drone-dji/1.0/" drone-dji:RelativeAltitude="+100.00" '
    b'drone-dji:GimbalPitchDegree="-90.00"/></rdf:RDF></x:xmpmeta>'
)


def exif() -> bytes:
    block = Image.Exif()
    block[0x010F] = "DJI"
    block.get_ifd(0x8769)[0xA405] = 24
    block.get_ifd(0x8825).update({1: "N", 2: (47.0, 30.0, 0.0), 3: "E", 4: (8.0, 30.0, 0.0)})
    return block.tobytes()


def jpeg(path: Path, exif: bytes = b"", xmp: bytes = b"") -> bytes:
    """Write a small JPEG; returns its bytes."""
    coded = io.BytesIO()
    Image.fromarray(np.moveaxis(noise(3), 0, -1)).save(coded, "JPEG", exif=exif)
    data = coded.getvalue()
    if xmp:
        payload = XMP_PREFIX + xmp
        head = b"\xff\xe1" + struct.pack(">H", len(payload) + 2)
        data = data[:2] + head + payload + data[2:]
    path.write_bytes(data)
    return data


BROKEN_XMP: dict[str, bytes] = {
    "cut off": XMP[: len(XMP) // 2],
    "not closed": XMP.replace(b"</rdf:RDF>", b""),
    "UTF-16 with a mark": XMP.decode().encode("utf-16"),
    "UTF-16 without one": XMP.decode().encode("utf-16-be"),
    "no UTF-8": XMP.replace(b"+100.00", b"\xff\xfe\xff"),
}


@pytest.mark.parametrize("kind", BROKEN_XMP)
def test_broken_xmp_is_kept_and_fails_nothing(kind: str, tmp_path: Path) -> None:
    jpeg(tmp_path / "a.jpg", exif(), BROKEN_XMP[kind])
    source = read_source(tmp_path / "a.jpg", "a.jpg")
    assert ("APP1", XMP_PREFIX + BROKEN_XMP[kind]) in source.metadata
    assert source.camera is not None
    assert (source.camera.lon, source.camera.lat) == (8.5, 47.5)
    read_pixels(source)


BROKEN_EXIF: dict[str, Callable[[bytearray], None]] = {
    "a directory outside": lambda b: b.__setitem__(slice(10, 14), b"\0\0\xff\xff"),
    "no byte order": lambda b: b.__setitem__(slice(6, 8), b"XX"),
}


@pytest.mark.parametrize("kind", BROKEN_EXIF)
def test_broken_exif_is_kept_and_told(kind: str, tmp_path: Path) -> None:
    block = bytearray(exif())
    BROKEN_EXIF[kind](block)
    jpeg(tmp_path / "a.jpg", bytes(block))
    source = read_source(tmp_path / "a.jpg", "a.jpg")
    assert ("APP1", bytes(block)) in source.metadata
    assert source.warnings[0].startswith("its metadata are damaged, and kept as they are: ")
    read_pixels(source)


def test_a_palette_without_colours_is_a_plain_band(tmp_path: Path) -> None:
    path = tmp_path / "p.tif"
    profile = {"driver": "GTiff", "width": 200, "height": 150, "count": 1, "dtype": "uint8"}
    with rasterio.open(path, "w", **profile) as out:
        out.write(noise(1))
        out.colorinterp = [ColorInterp.palette]
    source = read_source(path, "p.tif")
    assert source.colormap is None
    write_gtiff(tmp_path / "out.tif", whole(source))
    with rasterio.open(tmp_path / "out.tif") as got:
        np.testing.assert_array_equal(got.read(), noise(1))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "junk between segments": lambda d: (
        d[: d.index(b"\xff\xdb")] + b"junk" + d[d.index(b"\xff\xdb") :]
    ),
    "no end marker": lambda d: d[:-2],
    "cut off": lambda d: d[: -len(d) // 4],
    "a wrong marker": lambda d: d[: -len(d) // 4] + b"\xff\xd1" + d[-len(d) // 4 :],
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_jpegs_only_by_request(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(DAMAGES[kind](jpeg(path, exif(), XMP)))
    with pytest.raises(SourceError, match=r"truncated|damaged JPEG"):
        read_pixels(read_source(path, "a.jpg"))
    source = read_source(path, "a.jpg", salvage=True)
    assert source.warnings[0].startswith("damaged, archived as far as it can be decoded: ")
    assert source.georef.crs == "EPSG:32632"
    pixels = read_pixels(source)[0]
    lenient = rasterio.Env(GDAL_ERROR_ON_LIBJPEG_WARNING="NO")
    with lenient, rasterio.open(path) as dataset:
        np.testing.assert_array_equal(np.moveaxis(pixels, -1, 0), dataset.read())


def test_whole_jpegs_are_not_salvaged(tmp_path: Path) -> None:
    jpeg(tmp_path / "a.jpg", exif(), XMP)
    source = read_source(tmp_path / "a.jpg", "a.jpg", salvage=True)
    assert not source.salvaged
    assert not any("damaged" in warning for warning in source.warnings)


def test_bands_that_a_file_cannot_hold_are_no_work(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=200, height=150, count=3, dtype="uint8"
    ) as out:
        out.write(noise(3))
    data = bytearray(path.read_bytes())
    entry = data.index(struct.pack("<HHI", 277, 3, 1))
    struct.pack_into("<H", data, entry + 8, 60000)
    path.write_bytes(data)
    started = time.process_time()
    with pytest.raises(SourceError, match="claims 60000 bands"):
        read_source(path, "a.tif")
    assert time.process_time() - started < 1


def test_white_is_zero_stays_so(tmp_path: Path) -> None:
    path = tmp_path / "w.tif"
    profile = {"driver": "GTiff", "width": 1200, "height": 900, "count": 1, "dtype": "uint8"}
    with rasterio.open(path, "w", **profile, photometric="MINISWHITE") as out:
        out.write(noise(1, width=1200, height=900))
    write_gtiff(tmp_path / "out.tif", whole(read_source(path, "w.tif")))
    with Image.open(tmp_path / "out.tif") as got:
        for page in range(got.n_frames):  # overviews, too
            got.seek(page)
            assert got.tag_v2[262] == 0
    with rasterio.open(tmp_path / "out.tif") as got:
        assert got.overviews(1) == [2, 4]
        assert got.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        np.testing.assert_array_equal(got.read(), noise(1, width=1200, height=900))
    write_png(tmp_path / "out.png", whole(read_source(path, "w.tif")))
    with Image.open(path) as original, Image.open(tmp_path / "out.png") as shown:
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(original))


@pytest.mark.parametrize("mode", ["CMYK", "LAB"])
def test_colours_that_are_converted_are_named(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.moveaxis(noise(3), 0, -1)).convert(mode).save(path)
    assert any("are archived as RGB" in w for w in read_source(path, "a.tif").warnings)


def test_a_transparent_colour_of_rgb_is_a_mask(tmp_path: Path) -> None:
    pixels = np.moveaxis(noise(3), 0, -1).copy()
    pixels[:40, :50] = 0
    pixels[100, :, 0] = 0  # not transparent: only one band is 0
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=(0, 0, 0))
    source = read_source(tmp_path / "a.png", "a.png")
    assert (source.mask, source.nodata) == ("mask", None)
    write_gtiff(tmp_path / "out.tif", whole(source))
    with rasterio.open(tmp_path / "out.tif") as got:
        expected = np.full(pixels.shape[:2], 255)
        expected[:40, :50] = 0
        np.testing.assert_array_equal(got.dataset_mask(), expected)
        np.testing.assert_array_equal(got.read(), np.moveaxis(pixels, -1, 0))


def test_pages_are_named_and_thumbnails_are_none(tmp_path: Path) -> None:
    pages = [Image.fromarray(noise(1)[0] + np.uint8(n)) for n in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(SourceError, match="a TIFF of 3 pages"):
        read_source(tmp_path / "a.tif", "a.tif")
    large = Image.fromarray(noise(1, width=600, height=400)[0])
    small = large.resize((160, 120))
    large.save(tmp_path / "b.tif", save_all=True, append_images=[small])
    flagged = TiffImagePlugin.ImageFileDirectory_v2()
    flagged[254] = 1
    large.resize((300, 200)).save(tmp_path / "overview.tif", tiffinfo=flagged)
    assert read_source(tmp_path / "b.tif", "b.tif").width == 600


def test_case_twins_have_world_files_of_their_own(tmp_path: Path) -> None:
    names = ("a.JPG", "a.jpg", "a.jpeg", "a.Jpg")
    assert len({world_file(tmp_path / name) for name in names}) == 4
    jpeg(tmp_path / "s.jpg", exif(), XMP)
    source = read_source(tmp_path / "s.jpg", "s.jpg")
    for name in ("out/a.JPG", "out/a.jpg"):
        write_jpeg(tmp_path / name, whole(source))
        assert world_file(tmp_path / name).is_file()
    assert len(find_images(tmp_path / "out")) == 2


def test_what_is_not_archived_is_named(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    jpeg(folder / "a.JPG", exif(), XMP)
    for name in ("a.MP4", "b.CUBE", "c.mp4", "unknown"):
        (folder / name).write_bytes(b"payload")
    args = ("ingest", folder, "--archive", tmp_path / "a.zarr", "--workers", 0)
    result = run(*args, "--json")
    assert result.code == 0
    names = ["a.MP4", "b.CUBE", "c.mp4", "unknown"]
    assert result.json["not_archived"] == [f"{folder}/{name}" for name in names]
    assert "4 files are not archived: 1 .cube, 2 .mp4, 1 without suffix" in result.err
    result = run(*args, "-v", "--strict")
    assert result.code == 3
    assert f"Not archived: {folder}/b.CUBE" in result.err


def test_many_bands_have_small_blocks(tmp_path: Path) -> None:
    path, pixels = tmp_path / "cube.tif", noise(1, "uint16", 300, 260) * np.uint16(9)
    cube = np.concatenate([pixels + np.uint16(n) for n in range(80)])
    with rasterio.open(
        path, "w", driver="GTiff", width=300, height=260, count=80, dtype="uint16"
    ) as out:
        out.write(cube)
    write_gtiff(tmp_path / "out.tif", whole(read_source(path, "cube.tif")))
    with rasterio.open(tmp_path / "out.tif") as got:
        np.testing.assert_array_equal(got.read(), cube)
        assert got.block_shapes[0] == (256, 256)  # 10 MB of all bands
        assert got.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"


def test_a_projection_beside_a_world_file(tmp_path: Path) -> None:
    Image.fromarray(noise(1)[0]).save(tmp_path / "a.tif")
    (tmp_path / "a.tfw").write_text("0.5\n0\n0\n-0.5\n500000.25\n5259999.75\n")
    (tmp_path / "A.PRJ").write_text(CRS.from_epsg(32632).to_wkt(version="WKT1_ESRI"))
    source = read_source(tmp_path / "a.tif", "a.tif")
    assert source.georef.crs == "EPSG:32632"
    assert source.georef.transform == (0.5, 0.0, 500000.0, 0.0, -0.5, 5260000.0)
    assert source.georef.footprint is not None
    assert [s.ending for s in find_images(tmp_path)[0].sidecars] == [".tfw", ".PRJ"]
    (tmp_path / "A.PRJ").write_text("nonsense")
    source = read_source(tmp_path / "a.tif", "a.tif")
    assert source.georef.crs is None
    assert any(w.startswith("its A.PRJ is not read") for w in source.warnings)


def test_alpha_and_a_mask(tmp_path: Path) -> None:
    mask = np.full((150, 200), 255, np.uint8)
    mask[:, :50] = 0
    bands = np.concatenate([noise(3), np.full((1, 150, 200), 200, np.uint8)])
    profile = {"driver": "GTiff", "width": 200, "height": 150, "count": 4, "dtype": "uint8"}
    internal = rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True)
    with (
        internal,
        rasterio.open(tmp_path / "a.tif", "w", **profile, photometric="RGB", alpha="YES") as out,
    ):
        out.write(bands)
        out.write_mask(mask)
    source = read_source(tmp_path / "a.tif", "a.tif")
    assert any("alpha and a mask" in warning for warning in source.warnings)
    alpha = read_pixels(source)[1]
    np.testing.assert_array_equal(alpha, np.where(mask > 0, 200, 0))


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_further_pictures_of_an_animation_are_named(suffix: str, tmp_path: Path) -> None:
    pictures = [Image.fromarray(noise(1)[0] // np.uint8(n)) for n in (1, 2, 3)]
    path = tmp_path / f"a{suffix}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    assert "2 further pictures are not archived" in read_source(path, path.name).warnings
    pictures[0].save(path)
    assert not any("further" in warning for warning in read_source(path, path.name).warnings)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("soft", [True, False])
def test_a_soft_mask_is_alpha(tmp_path: Path, dtype: str, soft: bool) -> None:
    path = tmp_path / "a.tif"
    profile = {"driver": "GTiff", "width": 64, "height": 48}
    with rasterio.open(path, "w", count=3, dtype=dtype, photometric="RGB", **profile) as out:
        out.write(noise(3, dtype, 48, 64))
    mask = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    mask = mask if soft else np.where(mask > 100, 255, 0).astype(np.uint8)
    with rasterio.open(f"{path}.msk", "w", count=1, dtype="uint8", **profile) as out:
        out.write(mask, 1)
        out.update_tags(INTERNAL_MASK_FLAGS_1="2")
    source = read_source(path, "a.tif")
    assert source.mask == ("alpha" if soft else "mask")
    assert ("its mask is soft: archived as alpha" in source.warnings) == soft
    write_gtiff(tmp_path / "o.tif", whole(source))
    with rasterio.open(tmp_path / "o.tif") as back:
        assert back.count == 3 + soft
        assert np.array_equal(back.dataset_mask(), mask)
        if soft:
            opaque = 257 if dtype == "uint16" else 1
            assert np.array_equal(back.read(4), mask.astype(dtype) * opaque)


def webp(path: Path, blocks: dict[str, bytes]) -> None:
    pixels = Image.fromarray(np.moveaxis(noise(3), 0, -1))
    names = {"EXIF": "exif", "XMP": "xmp", "ICC": "icc_profile"}
    pixels.save(path, "WEBP", **{names[name]: data for name, data in blocks.items()})


def jp2(path: Path, blocks: dict[str, bytes]) -> None:
    """A JPEG 2000 file with the blocks in boxes behind its header, as others write them."""

    def box(kind: bytes, payload: bytes) -> bytes:
        return struct.pack(">I", 8 + len(payload)) + kind + payload

    coded = io.BytesIO()
    Image.fromarray(np.moveaxis(noise(3), 0, -1)).save(coded, "JPEG2000", no_jp2=False)
    data = coded.getvalue()
    at = data.index(b"jp2c") - 4
    uuids = {
        "EXIF": b"JpgTiffExif->JP2",
        "XMP": bytes.fromhex("be7acfcb97a942e89c71999491e3afac"),
    }
    boxes = b"".join(box(b"uuid", uuids[n] + d) for n, d in blocks.items() if n in uuids)
    header = data.index(b"jp2h") - 4
    size = int.from_bytes(data[header : header + 4], "big")
    inner = data[header + 8 : header + size]
    colr = inner.index(b"colr") - 4
    length = int.from_bytes(inner[colr : colr + 4], "big")
    profile = box(b"colr", b"\2\0\0" + blocks["ICC"])
    inner = inner[:colr] + profile + inner[colr + length :]
    head = data[:header] + box(b"jp2h", inner) + data[header + size : at]
    path.write_bytes(head + boxes + data[at:])


@pytest.mark.parametrize(("name", "make"), [("a.webp", webp), ("a.jp2", jp2)])
def test_documents_in_webp_and_jpeg_2000(tmp_path: Path, name: str, make: Callable) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    blocks = {"EXIF": exif().removeprefix(b"Exif\0\0"), "XMP": XMP, "ICC": profile}
    make(tmp_path / name, blocks)
    source = read_source(tmp_path / name, name)
    found = {kind: data.removeprefix(b"Exif\0\0") for kind, data in source.metadata}
    assert found == blocks
    assert source.camera is not None
    assert (source.camera.lat, source.camera.altitude_relative_m) == (47.5, 100.0)
    write_gtiff(tmp_path / "o.tif", whole(source))
    back = read_source(tmp_path / "o.tif", "o.tif")
    assert {"XMP", "ICC", "EXIF"} <= dict(back.metadata).keys()
    assert dict(back.metadata)["ICC"] == profile
    # cut off or damaged anywhere, nothing is raised for them
    data = (tmp_path / name).read_bytes()
    for end in range(0, len(data), max(1, len(data) // 60)):
        (tmp_path / "cut").write_bytes(data[:end])
        blocks_of = webp_blocks if make is webp else jp2_blocks
        assert all(kind in blocks for kind, _ in blocks_of(tmp_path / "cut"))


def test_a_jpeg_with_more_bytes_than_pixels_is_doubted(
    run: Run, flight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    data = bytearray((flight / "DJI_0001.JPG").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    (folder / "bad.jpg").write_bytes(data)
    shutil.copy(flight / "DJI_0002.JPG", folder / "good.jpg")
    report = run("ingest", folder, "--archive", tmp_path / "a.zarr", "--workers", 0, "--json").json
    doubted, trusted = sorted(report["images"], key=lambda image: image["id"])
    assert any("may be damaged" in warning for warning in doubted["warnings"])
    assert not any("may be damaged" in warning for warning in trusted["warnings"])


def test_heights_that_are_of_no_use_are_named(run: Run, flight: Path, tmp_path: Path) -> None:
    form = {"driver": "GTiff", "width": 20, "height": 20, "count": 1, "dtype": "float32"}
    args = ("ingest", flight, "--archive", tmp_path / "a.zarr", "--workers", 0, "--json", "--dem")
    with rasterio.open(tmp_path / "none.tif", "w", **form) as file:
        file.write(np.zeros((1, 20, 20), np.float32))
    (tmp_path / "text.tif").write_text("heights")
    for name in ("none.tif", "text.tif", "missing.tif"):
        refused = run(*args, tmp_path / name)
        assert (refused.code, name in refused.err) == (2, True), refused.err
    assert not (tmp_path / "a.zarr").exists()
    place = rasterio.Affine(30, 0, 6e5, 0, -30, 32e5)  # 300 km away
    with rasterio.open(
        tmp_path / "far.tif", "w", crs="EPSG:32615", transform=place, **form
    ) as file:
        file.write(np.zeros((1, 20, 20), np.float32))
    report = run(*args, tmp_path / "far.tif").json
    assert all(
        any("--dem do not reach" in warning for warning in image["warnings"])
        for image in report["images"]
    )
