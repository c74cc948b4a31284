"""HEIC and JPEG XL frames, which GDAL does not read here, and raw ones, which nobody decodes."""

from __future__ import annotations

import struct
from pathlib import Path

import imagecodecs
import numpy as np
import pillow_heif
import pyproj
import pytest
import rasterio
from conftest import Run
from PIL import Image
from test_jpeg_files import box, photo

import archive_pipeline as ap
from archive_pipeline import errors
from archive_pipeline.flight import decoded
from archive_pipeline.flight.jpeg_segments import read_segments
from archive_pipeline.flight.read import read_pixels, read_source
from archive_pipeline.flight.source_image import SourceError

XAP = b"http://ns.adobe.com/xap/1.0/\0"


def blocks_of(frame: Path) -> tuple[bytes, bytes]:
    """EXIF (a TIFF structure) and XMP of a JPEG."""
    segments = [payload for name, payload in read_segments(frame) if name == "APP1"]
    (exif,) = (s.removeprefix(b"Exif\0\0") for s in segments if s.startswith(b"Exif"))
    (xmp,) = (s.removeprefix(XAP) for s in segments if s.startswith(XAP))
    return exif, xmp


def as_heic(frame: Path, path: Path) -> None:
    exif, xmp = blocks_of(frame)
    with Image.open(frame) as image:
        heif = pillow_heif.from_pillow(image)
        heif.save(path, quality=80, exif=b"Exif\0\0" + exif, xmp=xmp)


def as_jxl(frame: Path, path: Path) -> None:
    """With EXIF in a box, and XMP in one that Brotli packs, as libjxl's tools have it."""
    exif, xmp = blocks_of(frame)
    with Image.open(frame) as image:
        coded = imagecodecs.jpegxl_encode(np.asarray(image), level=90, usecontainer=True)
    packed = box(b"brob", b"xml " + imagecodecs.brotli_encode(xmp))
    path.write_bytes(coded + box(b"Exif", bytes(4) + exif) + packed)


def test_frames_are_images_with_all_that_they_say(run: Run, flight: Path, tmp_path: Path) -> None:
    folder, url = tmp_path / "f", tmp_path / "a.zarr"
    folder.mkdir()
    frame = flight / "DJI_0001.JPG"
    as_heic(frame, folder / "a.HEIC")
    as_jxl(frame, folder / "b.jxl")
    (folder / "c.dng").write_bytes(b"II*\0raw")
    done = run("ingest", folder, "--archive", url, "--workers", 0, "--ratio", 8, "--json")
    assert done.code == 0, done.err
    assert {i["codec"] for i in done.json["images"]} == {"pcdc"}
    (document,) = done.json["documents"]
    assert "not decoded" in document["warning"]
    expected = read_source(frame, "x")
    exif, xmp = blocks_of(frame)
    for image in ap.open(url).images:
        assert image.transform == pytest.approx(expected.georef.transform)
        assert image.captured == expected.captured
        source = image._opened.reader(image._entry).source
        blocks = dict(source.metadata)
        assert blocks["EXIF"].removeprefix(b"Exif\0\0") == exif
        assert blocks["XMP"] == xmp
    args = ("--archive", url, "-o", tmp_path / "out", "--workers", 0)
    assert run("restore", *args).code == 0
    with rasterio.open(tmp_path / "out/f/a.HEIC.tif") as file, rasterio.open(frame) as own:
        assert file.tags()["EXIF_Model"] == own.tags()["EXIF_Model"]
        error = file.read().astype(float) - own.read()
    assert np.sqrt((error**2).mean()) < 12
    assert run("restore", *args, "--format", "jpeg").code == 0
    with Image.open(tmp_path / "out/f/b.jxl.jpg") as restored, Image.open(frame) as original:
        assert restored.getexif()[0x0110] == original.getexif()[0x0110]
    assert run("check", "--archive", url).code == 0


def test_pixels_are_the_decoders(tmp_path: Path) -> None:
    pixels = photo(48, 70)
    rgba = np.dstack([pixels, pixels[..., :1]])
    wide = pixels.astype(np.uint16) * 256
    cases = {"rgb": pixels, "grey": pixels[..., 0], "rgba": rgba, "wide": wide}
    for name, case in cases.items():
        path = tmp_path / f"{name}.jxl"
        path.write_bytes(imagecodecs.jpegxl_encode(case, lossless=True))
        source = read_source(path, name)
        found, alpha = read_pixels(source)
        assert source.driver == "JPEGXL"
        assert source.lossy == (name in ("rgb", "rgba"))
        np.testing.assert_array_equal(found, np.atleast_3d(case)[..., : found.shape[2]])
        if name == "rgba":
            assert alpha is not None
            np.testing.assert_array_equal(alpha, rgba[..., 3])
    many = np.stack([*np.moveaxis(pixels, 2, 0), *np.moveaxis(255 - pixels[..., :2], 2, 0)])
    path = tmp_path / "many.jxl"  # grey with four channels more: axes were mixed up
    path.write_bytes(imagecodecs.jpegxl_encode(many, lossless=True, planar=True))
    found, _ = read_pixels(read_source(path, "many"))
    np.testing.assert_array_equal(found, np.moveaxis(many, 0, 2))
    path = tmp_path / "wide.heic"
    pillow_heif.from_bytes("RGB;16", (70, 48), wide.tobytes()).save(path, quality=-1)
    source = read_source(path, "wide")
    file = pillow_heif.open_heif(path, convert_hdr_to_8bit=False)
    np.testing.assert_array_equal(read_pixels(source)[0], np.array(file))
    assert (source.dtype, source.lossy, source.driver) == ("uint16", False, "HEIF")


@pytest.mark.parametrize("name", ["a.HEIC", "a.jxl"])
def test_sidecars_count_as_beside_a_tiff(name: str, tmp_path: Path, run: Run) -> None:
    folder, url = tmp_path / "f", tmp_path / "a.zarr"
    folder.mkdir()
    pixels = np.random.default_rng(3).integers(0, 255, (60, 80, 3), np.uint8)
    path = folder / name
    if name.endswith("HEIC"):
        pillow_heif.from_pillow(Image.fromarray(pixels)).save(path)
    else:
        path.write_bytes(imagecodecs.jpegxl_encode(pixels, lossless=True))
    path.with_suffix(".hcw" if name.endswith("HEIC") else ".JLW").write_text(
        "0.1\n0\n0\n-0.1\n325000.05\n3239999.95\n"
    )
    path.with_suffix(".prj").write_text(pyproj.CRS(32615).to_wkt("WKT1_ESRI"))
    mask = np.zeros((60, 80), np.uint8)
    mask[:20] = 255
    form = {"driver": "GTiff", "width": 80, "height": 60, "count": 1, "dtype": "uint8"}
    with rasterio.open(f"{path}.msk", "w", **form) as file:
        file.write(mask, 1)
        file.update_tags(INTERNAL_MASK_FLAGS_1="2")
    items = '<Metadata domain="X"><MDI key="k">v</MDI></Metadata>'
    Path(f"{path}.aux.xml").write_text(f"<PAMDataset>{items}</PAMDataset>")
    path.with_suffix(".xmp").write_text("<x/>")
    source = read_source(path, name)
    assert source.georef.crs == "EPSG:32615"
    assert source.georef.transform == pytest.approx((0.1, 0, 325000, 0, -0.1, 3240000))
    assert source.tags["X"] == {"k": "v"}
    np.testing.assert_array_equal(read_pixels(source)[1], mask)
    done = run("ingest", folder, "--archive", url, "--workers", 0, "--ratio", 4, "--json")
    assert done.code == 0, done.err
    assert [d["document"] for d in done.json["documents"]] == ["a.xmp"]
    Path(f"{path}.aux.xml").write_text("<PAMDataset></PAMDataset>")
    again = run("ingest", folder, "--archive", url, "--workers", 0, "--ratio", 4)
    assert again.code == 3
    assert "sidecar files have changed" in again.err
    Path(f"{path}.aux.xml").write_text(
        '<PAMDataset><Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">/etc/x</MDI></Metadata>'
        "</PAMDataset>"
    )
    with pytest.raises(SourceError, match="OVERVIEW_FILE"):
        read_source(path, name)


def test_further_pictures_are_named(tmp_path: Path) -> None:
    heif = pillow_heif.from_pillow(Image.fromarray(photo(64, 64)))
    heif.add_from_pillow(Image.fromarray(photo(80, 64)))
    heif.save(tmp_path / "a.heic", quality=50, save_all=True)
    source = read_source(tmp_path / "a.heic", "a")
    assert "1 further pictures are not archived" in source.warnings


@pytest.mark.parametrize("name", ["a.heic", "a.jxl"])
def test_damaged_files_are_named(flight: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    (as_heic if name.endswith("heic") else as_jxl)(flight / "DJI_0001.JPG", path)
    data = path.read_bytes()
    for number, broken in enumerate((data[: len(data) // 3], data[:40], data[:30] + bytes(200))):
        path.write_bytes(broken)
        with pytest.raises(SourceError) as told:
            read_source(path, name)
        assert told.value.reason.startswith("truncated: ") or number
        assert len(told.value.reason.splitlines()) == 1
        assert "Traceback" not in told.value.reason


def test_pictures_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jxl"
    path.write_bytes(imagecodecs.jpegxl_encode(np.zeros((3000, 3000, 3), np.uint8)))
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(decoded, "MAX_PIXEL_BYTES", 20 << 20)
    with pytest.raises(SourceError, match="25 MiB of pixels are more than 20"):
        read_source(path, "a")
    monkeypatch.setattr(decoded, "MEMORY", 100 << 20)
    with pytest.raises(SourceError):  # in one way or another, and in one line
        read_source(path, "a")


def test_without_the_package_it_is_said_what_to_install(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").mkdir()
    pillow_heif.from_pillow(Image.fromarray(photo(64, 64))).save(tmp_path / "f/a.heic")
    find = errors.find_spec
    hidden = lambda name: None if name == "pi_heif" else find(name)  # noqa: E731
    monkeypatch.setattr(errors, "find_spec", hidden)
    done = run("ingest", tmp_path / "f", "--archive", tmp_path / "a.zarr", "--workers", 0)
    assert done.code == 3
    (line,) = [line for line in done.err.splitlines() if line.startswith("Failed")]
    assert line.endswith("needs pi_heif: pip install 'archive-pipeline[ingest]'")


def test_boxes_that_lie_about_their_lengths() -> None:
    from archive_pipeline.flight._decoder import blocks

    exif = box(b"Exif", struct.pack(">I", 2) + b"xxII*\0")
    assert list(blocks(exif)) == [("EXIF", b"II*\0")]
    assert list(blocks(exif + struct.pack(">I", 3) + b"xml ab")) == [("EXIF", b"II*\0")]
    assert list(blocks(struct.pack(">I", 1 << 31) + b"xml abc")) == [("XMP", b"abc")]
