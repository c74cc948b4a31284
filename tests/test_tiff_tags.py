"""Tags of TIFFs: read, kept, and written into Cloud Optimized GeoTIFFs that stay so."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image, TiffImagePlugin
from rasterio.windows import Window
from test_outputs import FileRaster, noise, whole

from archive_pipeline.flight.read import read_source
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.flight.tiff_directory import first_directory
from archive_pipeline.flight.tiff_tags import MAKER_NOTE, Tag, exif_block, pack, read_block
from archive_pipeline.flight.xmp import EXTENDED_PREFIX
from archive_pipeline.outputs.writers import write_gtiff, write_jpeg

needs_exiftool = pytest.mark.skipif(shutil.which("exiftool") is None, reason="no exiftool")
BLACK_LEVEL, OPCODES, SERIAL, PRIVATE = 50714, 51022, 50735, 65000


def tags() -> TiffImagePlugin.ImageFileDirectory_v2:
    """What a multispectral camera writes: calibration, private tags, EXIF and GPS."""
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    for number, kind, value in (
        (271, 2, "MicaSense"),
        (272, 2, "RedEdge-M"),
        (274, 3, 3),
        (BLACK_LEVEL, 3, (4800, 4801, 4802, 4803)),
        (OPCODES, 7, bytes(range(200))),
        (SERIAL, 2, "RM01-1234567"),
        (PRIVATE, 12, (0.25, -1e-9, 3.0)),
    ):
        ifd.tagtype[number] = kind
        ifd[number] = value
    exif = Image.Exif()
    third = TiffImagePlugin.IFDRational(31, 20000)
    exif.get_ifd(0x8769).update({0x829A: third, 0x9003: "2024:05:01 10:00:00"})
    exif.get_ifd(0x8825).update({1: "S", 2: (33.0, 54.0, 0.5), 3: "W", 4: (70.0, 36.0, 0.25)})
    ifd[0x8769], ifd[0x8825] = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
    return ifd


def multispectral(path: Path, size: int = 200) -> SourceImage:
    image = Image.fromarray(noise(1, "uint16", size, size)[0] * np.uint16(200))
    image.save(path, tiffinfo=tags())
    return read_source(path, path.name)


def exiftool(path: Path) -> dict[str, Any]:
    """What exiftool reads, but for storage, the file and GDAL's own tags."""
    args = ["exiftool", "-j", "-n", "-G1", "-a", "-b", path]
    found: dict[str, Any] = json.loads(subprocess.run(args, capture_output=True).stdout)[0]
    storage = (
        "BitsPerSample", "BlockHeight", "Compression", "GDALMetadata", "ImageHeight", "ImageWidth",
        "NewSubfileType", "PhotometricInterpretation", "PlanarConfiguration", "Predictor",
        "RowsPerStrip", "SampleFormat", "SamplesPerPixel", "StripByteCounts", "StripOffsets",
        "SubfileType", "TileByteCounts", "TileLength", "TileOffsets", "TileWidth", "GDALNoData",
    )  # fmt: skip
    kept = ("IFD0", "ExifIFD", "GPS", "XMP")
    return {
        k: v
        for k, v in found.items()
        if k.partition(":")[0].startswith(kept) and k.partition(":")[2] not in storage
    }


@needs_exiftool
@pytest.mark.parametrize("size", [200, 1300])
def test_exiftool_reads_the_same_tags(size: int, tmp_path: Path) -> None:
    source = multispectral(tmp_path / "a.tif", size)
    write_gtiff(tmp_path / "out.tif", whole(source))
    original, restored = exiftool(tmp_path / "a.tif"), exiftool(tmp_path / "out.tif")
    assert original["IFD0:BlackLevel"] == "4800 4801 4802 4803"
    assert original["GPS:GPSLatitudeRef"] == "S"
    assert restored == original


def test_the_file_stays_cloud_optimized(tmp_path: Path) -> None:
    source = multispectral(tmp_path / "a.tif", 1300)
    write_gtiff(tmp_path / "out.tif", whole(source))
    with rasterio.open(tmp_path / "out.tif") as got, rasterio.open(tmp_path / "a.tif") as want:
        np.testing.assert_array_equal(got.read(), want.read())
        assert got.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert got.overviews(1) == [2, 4]
        assert got.tags(ns="EXIF")["EXIF_DateTimeOriginal"] == "2024:05:01 10:00:00"
    with open(tmp_path / "out.tif", "rb") as file:
        assert file.read(8)[:4] == b"II*\0"
        offset = struct.unpack("<I", (file.seek(4), file.read(4))[1])[0]
        directory = first_directory(file)
        assert directory is not None
        file.seek(8)
        size = int(file.read(43)[30:36])
        # directories come first, in the order of overviews, and all pixels behind them
        assert offset == 8 + 43 + size + (43 + size) % 2
        assert offset < directory.following
        assert directory.following < directory.number(file, 324)
    with rasterio.open(tmp_path / "out.tif", OVERVIEW_LEVEL=1) as small:
        assert small.read(window=Window(0, 0, 100, 100)).std() > 100  # means of 4 x 4 pixels


def test_a_window_tells_its_own_size(tmp_path: Path) -> None:
    image = Image.fromarray(np.moveaxis(noise(3), 0, -1))
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0xA002: 200, 0xA003: 150})
    image.save(tmp_path / "a.jpg", exif=exif)
    source = read_source(tmp_path / "a.jpg", "a.jpg")
    write_gtiff(tmp_path / "out.tif", FileRaster(source, (40, 30, 100, 50)))
    with Image.open(tmp_path / "out.tif") as got:
        detail = got.getexif().get_ifd(0x8769)
        assert (detail[0xA002], detail[0xA003]) == (100, 50) == got.size


def test_names_that_a_camera_filled_up_are_opened_without_warnings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DJI's FC300S writes its name in 32 bytes; libtiff calls it truncated, whenever it is read."""
    exif = Image.Exif()
    exif[0x010F] = "DJI" + "\0" * 28
    exif[0x0110] = "FC300S" + "\0" * 25
    Image.fromarray(np.moveaxis(noise(3), 0, -1)).save(tmp_path / "a.jpg", exif=exif)
    source = read_source(tmp_path / "a.jpg", "a.jpg")
    with caplog.at_level("WARNING"):
        write_gtiff(tmp_path / "out.tif", whole(source))
        with rasterio.open(tmp_path / "out.tif") as got:
            assert got.tags()["EXIF_Make"] == "DJI"
    assert "null byte" not in caplog.text
    with Image.open(tmp_path / "out.tif") as image:
        assert (image.getexif()[0x010F], image.getexif()[0x0110]) == ("DJI", "FC300S")
    write_jpeg(tmp_path / "out.jpg", whole(source))
    with Image.open(tmp_path / "out.jpg") as image, Image.open(tmp_path / "a.jpg") as original:
        assert image.info["exif"] == original.info["exif"]


def test_values_are_kept_byte_for_byte_in_both_orders(tmp_path: Path) -> None:
    inner = (Tag(0x829A, 5, 1, struct.pack(">II", 1, 640)),)
    kept = [
        Tag(BLACK_LEVEL, 3, 3, struct.pack(">3H", 1, 2, 3)),
        Tag(OPCODES, 7, 7, b"opcodes"),
        Tag(PRIVATE, 12, 2, struct.pack(">2d", 0.1, -7.5)),
        Tag(0x8769, 4, 1, b"", inner),
    ]
    storage = [Tag(256, 3, 1, struct.pack(">H", 9)), Tag(273, 4, 1, struct.pack(">I", 9))]
    block = exif_block(io.BytesIO(pack([*kept, *storage], ">")))
    assert block[:4] == b"MM\0*"
    found = {tag.number: tag for tag in read_block(block)}
    assert list(found) == [0x8769, BLACK_LEVEL, OPCODES, PRIVATE]
    assert struct.unpack("<3H", found[BLACK_LEVEL].value) == (1, 2, 3)
    assert found[OPCODES].value == b"opcodes"
    assert struct.unpack("<2d", found[PRIVATE].value) == (0.1, -7.5)
    assert found[0x8769].inside == (Tag(0x829A, 5, 1, struct.pack("<II", 1, 640)),)


@pytest.mark.parametrize(("place", "stays"), [(900, True), (120, False), (60_000, False)])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_makers_note_lies_where_it_lay(
    tmp_path: Path, order: str, place: int, stays: bool
) -> None:
    """Many count from the file's start what lies in them: else nobody could read them."""
    entries = (2, 1, 2, 12, place + 30, 9, 7, 0, 0)  # and one without any value
    inner = struct.pack(order + "HHHIIHHIII", *entries, 0) + b"lens no. 1\0\0"
    note = Tag(MAKER_NOTE, 7, len(inner), inner)
    detail = Tag(0x8769, 4, 1, b"", (Tag(0x829A, 5, 1, struct.pack(order + "II", 1, 640)), note))
    exif = pack([Tag(271, 2, 5, b"SONY\0"), detail], order)
    at = exif.index(inner)
    room = b"\0" * (place - len(exif))
    moved = exif.replace(struct.pack(order + "I", at), struct.pack(order + "I", place))
    exif = (moved + room)[:place] + inner
    assert exif.count(inner) == 1 + (place > len(moved))
    coded = io.BytesIO()
    Image.fromarray(np.moveaxis(noise(3), 0, -1)).save(coded, "JPEG", exif=b"Exif\0\0" + exif)
    (tmp_path / "a.jpg").write_bytes(coded.getvalue())
    write_gtiff(tmp_path / "out.tif", whole(read_source(tmp_path / "a.jpg", "a.jpg")))
    with Image.open(tmp_path / "out.tif") as got:
        exif_of = got.getexif()
        assert exif_of[271] == "SONY"
        written_note = exif_of.get_ifd(0x8769)[MAKER_NOTE]
        assert float(exif_of.get_ifd(0x8769)[0x829A]) == 1 / 640
    written = (tmp_path / "out.tif").read_bytes()
    assert (written.find(inner) == place) == stays
    assert written_note[:10] == inner[:10]
    (at,) = struct.unpack_from(order + "I", written_note, 10)
    assert written[at : at + 12] == b"lens no. 1\0\0"
    with rasterio.open(tmp_path / "out.tif") as got:
        assert got.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        got.read()


@pytest.mark.parametrize(
    "note",
    [
        b"DJI\0\1\0 no directory at all",
        struct.pack("<HHHIII", 1, 1, 2, 12, 18, 0) + b"lens no. 1\0\0",  # counted from itself
        struct.pack("<HHHIII", 1, 1, 99, 12, 138, 0) + b"lens no. 1\0\0",
        struct.pack("<HHHIII", 1, 1, 2, 13, 138, 0) + b"lens no. 1\0\0",
        b"\1\0\1\0",
    ],
)
def test_other_notes_stay_byte_for_byte(note: bytes) -> None:
    detail = Tag(0x8769, 4, 1, b"", (Tag(MAKER_NOTE, 7, len(note), note, place=120),))
    first = [Tag(number, 2, 9, b"12345678\0") for number in range(271, 290)]
    (found,) = read_block(pack([*first, detail], "<"))[-1].inside or ()
    assert found.value == note


def test_directories_that_lead_in_circles(tmp_path: Path) -> None:
    entries = struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<HHII", 271, 2, 1 << 30, 8)
    loop = struct.pack("<2sHIH", b"II", 42, 8, 2) + entries + struct.pack("<I", 8)
    assert len(exif_block(io.BytesIO(loop))) < 200


def test_xmp_in_parts_is_one_packet_in_a_tiff(tmp_path: Path) -> None:
    def packet(name: str, value: str) -> bytes:
        return (
            '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
            'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
            f'rdf:about="" xmlns:my="http://example.org/my/" my:{name}="{value}"/></rdf:RDF>'
            "</x:xmpmeta>"
        ).encode()

    coded = io.BytesIO()
    Image.fromarray(noise(1)[0]).save(coded, "JPEG", xmp=packet("first", "1"))
    data, extended = coded.getvalue(), packet("second", "2" * 100)
    for start in (50, 0):  # parts may come in any order
        part = extended[start : start + 50] if start == 0 else extended[start:]
        payload = EXTENDED_PREFIX + b"0" * 32 + struct.pack(">II", len(extended), start) + part
        data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + data[2:]
    (tmp_path / "a.jpg").write_bytes(data)
    write_gtiff(tmp_path / "out.tif", whole(read_source(tmp_path / "a.jpg", "a.jpg")))
    with rasterio.open(tmp_path / "out.tif") as got:
        xmp = got.tags(ns="xml:XMP")
        text = "=".join(next(iter(xmp.items())))
    assert 'my:first="1"' in text
    assert f'my:second="{"2" * 100}"' in text
