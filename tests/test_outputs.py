"""Writers of restored pixels: what was read from a source file comes back in the output."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import os
import struct
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from PIL import Image, ImageCms
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp, MaskFlags

from archive_pipeline.flight.jpeg_segments import blank_thumbnail, read_segments
from archive_pipeline.flight.read import read_pixels, read_source
from archive_pipeline.flight.restored_tag import TIFF_ITEM, mark, png_chunk
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.geo.georef import Window
from archive_pipeline.outputs import _blocks
from archive_pipeline.outputs._blocks import read_windows
from archive_pipeline.outputs.nodata import storable_nodata
from archive_pipeline.outputs.paths import OutputError, output_path
from archive_pipeline.outputs.publish import existing, is_inside, publish
from archive_pipeline.outputs.reduced import Reduced
from archive_pipeline.outputs.writers import write_gtiff, write_jpeg, write_png

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

UTM = "EPSG:32615"
YAWED = rasterio.Affine(0.08, 0.03, 300000.25, 0.03, -0.08, 3250000.5)
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '\n  <a>é</a></x:xmpmeta><?xpacket end="w"?>'
).encode()


@dataclasses.dataclass
class FileRaster:
    """A raster that reads from its source file, with every read recorded."""

    source: SourceImage
    window: Window
    block: tuple[int, int] = (64, 48)
    change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] = lambda pixels: pixels
    reads: list[Window] = dataclasses.field(default_factory=list)
    decoder: str = "pcdc 0123456789ab, steps 1, realism 0.5, seed 7"

    def read(self, window: Window) -> npt.NDArray[Any]:
        self.reads.append(window)
        return self.change(read_pixels(self.source, window)[0])

    def read_mask(self, window: Window) -> npt.NDArray[np.uint8] | None:
        return read_pixels(self.source, window)[1]


def whole(source: SourceImage, **options: Any) -> FileRaster:
    return FileRaster(source, (0, 0, source.width, source.height), **options)


def noise(bands: int, dtype: str = "uint8", width: int = 200, height: int = 150) -> Any:
    values = np.random.default_rng(bands).integers(1, 255, (bands, height, width))
    return values.astype(dtype)


def make_tiff(
    path: Path, pixels: npt.NDArray[Any], mask: npt.NDArray[np.uint8] | None = None, **more: Any
) -> SourceImage:
    """Write a GeoTIFF of (bands, height, width) pixels with rich metadata; read its record."""
    bands, height, width = pixels.shape
    names = more.pop("colorinterp", None)
    profile = {
        "driver": "GTiff",
        "width": width,
        "height": height,
        "count": bands,
        "dtype": pixels.dtype.name,
        "photometric": "RGB" if bands >= 3 else "MINISBLACK",
        "crs": UTM,
        **more,
    }
    if "gcps" not in more:
        profile.setdefault("transform", YAWED)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **profile) as out:
        if names is not None:
            out.colorinterp = names
        if "gcps" not in more and profile["crs"] is not None:
            out.update_tags(AREA_OR_POINT="Point")
        out.update_tags(TIFFTAG_SOFTWARE="flight planner 1.2")
        out.update_tags(ns="SURVEY", operator="Ada")
        out.update_tags(1, note="first", STATISTICS_MEAN="1.0")
        out.update_tags(1, ns="BAND", gain="2")
        out.set_band_description(1, "first band")
        out.units = ["m"] + [""] * (bands - 1)
        out.scales = [0.5] + [1.0] * (bands - 1)
        out.offsets = [-3.0] + [0.0] * (bands - 1)
        out.write(pixels)
        if mask is not None:
            out.write_mask(mask)
    return read_source(path, path.name)


def holes(height: int = 150, width: int = 200) -> npt.NDArray[np.uint8]:
    mask = np.full((height, width), 255, np.uint8)
    mask[20:70, 100:140] = 0
    return mask


SAME = (
    "width", "height", "bands", "dtype", "mask", "nodata", "colorinterp", "descriptions", "units",
    "scales", "offsets", "colormap", "tags", "georef",
)  # fmt: skip


def assert_same_record(got: SourceImage, want: SourceImage) -> None:
    assert got.tags[""].pop(TIFF_ITEM) == mark(FileRaster.decoder)
    want = dataclasses.replace(want, tags={"": {}, **want.tags})
    for name in SAME:
        assert repr(getattr(got, name)) == repr(getattr(want, name)), name
    bare = [
        {
            ns: {k: v for k, v in items.items() if not k.startswith("STATISTICS_")}
            for ns, items in tags.items()
        }
        for tags in want.band_tags
    ]
    assert list(got.band_tags) == (bare if want.lossy else list(want.band_tags))


def rgba(tmp: Path) -> SourceImage:
    names = [*(ColorInterp.red, ColorInterp.green, ColorInterp.blue), ColorInterp.alpha]
    pixels = noise(4)
    pixels[3, :30] = np.arange(30)[:, None]
    return make_tiff(tmp / "rgba.tif", pixels, colorinterp=names)


def palette(tmp: Path) -> SourceImage:
    source = make_tiff(tmp / "palette.tif", noise(1), photometric="PALETTE")
    with rasterio.open(source.path, "r+") as out:
        out.write_colormap(1, {n: (n, 255 - n, 7, 255) for n in range(256)})
    return read_source(source.path, source.id)


def gcps(tmp: Path) -> SourceImage:
    points = [
        GroundControlPoint(r, c, 300000 + c / 10, 3250000 - r / 10, 3.5)
        for r, c in itertools.product((0, 75, 150), (0, 100, 200))
    ]
    return make_tiff(tmp / "gcps.tif", noise(3), gcps=points)


def float_nan(tmp: Path) -> SourceImage:
    pixels = noise(1, "float32") / np.float32(7)
    pixels[0, 30:60, 40:90] = np.nan
    return make_tiff(tmp / "dsm.tif", pixels, nodata=np.nan)


def complex_integers(tmp: Path) -> SourceImage:
    """What radars write; rasterio and NumPy show it as complex64."""
    form = {"width": 200, "height": 150, "count": 1, "dtype": "complex_int16", "crs": UTM}
    with rasterio.open(tmp / "slc.tif", "w", driver="GTiff", transform=YAWED, **form) as out:
        out.update_tags(ns="SURVEY", operator="Ada")
        out.write(noise(1).astype("complex64") * np.complex64(1 - 3j))
    return read_source(tmp / "slc.tif", "slc.tif")


SOURCES: dict[str, Callable[[Path], SourceImage]] = {
    "rgb": lambda tmp: make_tiff(tmp / "rgb.tif", noise(3)),
    "rgba": rgba,
    "mask": lambda tmp: make_tiff(tmp / "mask.tif", noise(3), holes()),
    "palette": palette,
    "gcps": gcps,
    "float_nan": float_nan,
    "int16": lambda tmp: make_tiff(tmp / "i.tif", noise(1, "int16") - np.int16(99), nodata=-9999),
    "multispectral": lambda tmp: make_tiff(tmp / "ms.tif", noise(6, "uint16"), nodata=0),
    "lat_lon": lambda tmp: make_tiff(
        tmp / "ll.tif", noise(3), crs="EPSG:4326",
        transform=rasterio.Affine(1e-6, 0, -94.8, 0, -1e-6, 29.3),
    ),
    "complex": lambda tmp: make_tiff(tmp / "c.tif", noise(1, "complex64")),
    "complex_integers": complex_integers,
    "no_position": lambda tmp: make_tiff(
        tmp / "none.tif", noise(1), crs=None, transform=rasterio.Affine.identity()
    ),
}  # fmt: skip


def test_statistics_are_those_of_all_pixels(tmp_path: Path) -> None:
    """They come back with them (above), not with a part of them or with fewer."""
    source = make_tiff(tmp_path / "dsm.tif", noise(1, "float32"))
    raster = whole(source)
    part = dataclasses.replace(raster, window=(10, 20, 120, 100))
    few = Reduced(raster, (0.0, 0.0, float(source.width), float(source.height)), 50, 40)
    for name, written in {"all": raster, "part": part, "few": few}.items():
        write_gtiff(tmp_path / f"{name}-out.tif", written)
        with rasterio.open(tmp_path / f"{name}-out.tif") as out:
            assert out.tags(1)["note"] == "first"
            assert ("STATISTICS_MEAN" in out.tags(1)) == (name == "all")


@pytest.mark.parametrize(
    ("bits", "dtype", "photometric"),
    [
        (1, "uint8", "MINISWHITE"),
        (1, "uint8", "MINISBLACK"),
        (4, "uint8", "MINISBLACK"),
        (4, "uint8", "MINISWHITE"),
        (12, "uint16", "MINISBLACK"),
        (16, "float32", "MINISBLACK"),
    ],
)
def test_numbers_of_few_bits_stay_so(
    bits: int, dtype: str, photometric: str, tmp_path: Path
) -> None:
    """Scans are shown as black where one of 255 would be white."""
    side = 1200  # with overviews
    values = np.random.default_rng(0).integers(0, 1 << min(bits, 11), (1, side, side))
    form = {"width": side, "height": side, "count": 1, "dtype": dtype, "nbits": bits, "crs": UTM}
    form |= {"photometric": photometric, "transform": YAWED}
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", **form) as out:
        out.write(values.astype(dtype))
    source = read_source(tmp_path / "a.tif", "a.tif")
    write_gtiff(tmp_path / "out.tif", whole(source))
    with rasterio.open(tmp_path / "out.tif") as got:
        np.testing.assert_array_equal(got.read(), values)
        assert got.tags(1, ns="IMAGE_STRUCTURE")["NBITS"] == str(bits)
        assert got.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
    assert dataclasses.replace(source, driver="JP2OpenJPEG").bits == (bits if bits < 8 else None)
    if bits == 1:
        grey = [np.asarray(Image.open(tmp_path / n).convert("L")) for n in ("a.tif", "out.tif")]
        np.testing.assert_array_equal(*grey)
        assert set(np.unique(grey[1])) == {0, 255}
    if bits < 8 and not (bits == 1 and photometric == "MINISBLACK"):
        write_png(tmp_path / "out.png", whole(source))
        with rasterio.open(tmp_path / "out.png") as got:
            white = (1 << bits) - 1
            want = white - values if photometric == "MINISWHITE" else values
            np.testing.assert_array_equal(got.read(), want)


@pytest.mark.parametrize("name", SOURCES)
def test_gtiff_gives_back_pixels_mask_and_record(name: str, tmp_path: Path) -> None:
    source = SOURCES[name](tmp_path)
    out = tmp_path / "out" / "x.tif"
    write_gtiff(out, whole(source))
    got = read_source(out, source.id)
    assert_same_record(got, source)
    assert got.complex_integers == source.complex_integers == (name == "complex_integers")
    pixels, mask = read_pixels(source)
    got_pixels, got_mask = read_pixels(got)
    np.testing.assert_array_equal(got_pixels, pixels)
    np.testing.assert_array_equal(got_mask, mask)
    with rasterio.open(out) as dataset:
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert dataset.block_shapes[0] == (512, 512)
    # The custom namespaces lie in the sidecar.
    assert sorted(os.listdir(out.parent)) == ["x.tif", "x.tif.aux.xml"]


@pytest.mark.parametrize("name", ["rgb", "rgba", "mask", "gcps", "float_nan"])
def test_gtiff_window_lies_where_it_lay(name: str, tmp_path: Path) -> None:
    source = SOURCES[name](tmp_path)
    window = (37, 21, 101, 80)
    out = tmp_path / "window.tif"
    write_gtiff(out, FileRaster(source, window))
    got = read_source(out, source.id)
    pixels, mask = read_pixels(source, window)
    got_pixels, got_mask = read_pixels(got)
    np.testing.assert_array_equal(got_pixels, pixels)
    np.testing.assert_array_equal(got_mask, mask)
    if source.georef.transform:
        corner = rasterio.Affine(*source.georef.transform) @ (37, 21)
        assert rasterio.Affine(*got.georef.transform or ()) @ (0, 0) == pytest.approx(corner)
    else:
        assert [p[:4] for p in got.georef.gcps] == [
            (p[0] - 21, p[1] - 37, *p[2:4]) for p in source.georef.gcps
        ]


def test_gtiff_rpcs_move_with_the_window(tmp_path: Path) -> None:
    coefficients = " ".join(["1"] + ["0"] * 19)
    rpc = {
        "LINE_OFF": "75", "SAMP_OFF": "100", "LAT_OFF": "29", "LONG_OFF": "-94",
        "HEIGHT_OFF": "0", "LINE_SCALE": "75", "SAMP_SCALE": "100", "LAT_SCALE": "0.1",
        "LONG_SCALE": "0.1", "HEIGHT_SCALE": "500", "LINE_NUM_COEFF": coefficients,
        "LINE_DEN_COEFF": coefficients, "SAMP_NUM_COEFF": coefficients,
        "SAMP_DEN_COEFF": coefficients,
    }  # fmt: skip
    path = tmp_path / "rpc.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=200, height=150, count=1, dtype="uint16"
    ) as f:
        f.update_tags(ns="RPC", **rpc)
    write_gtiff(tmp_path / "out.tif", FileRaster(read_source(path, "rpc.tif"), (10, 20, 50, 40)))
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert (dataset.rpcs.line_off, dataset.rpcs.samp_off) == (55, 90)


def test_gtiff_has_overviews_that_respect_the_mask(tmp_path: Path) -> None:
    mask = np.full((900, 1300), 255, np.uint8)
    mask[:450] = 0
    pixels = np.full((3, 900, 1300), 200, np.uint8)
    pixels[:, :450] = 0
    source = make_tiff(tmp_path / "big.tif", pixels, mask)
    write_gtiff(tmp_path / "out.tif", whole(source, block=(512, 512)))
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert dataset.overviews(1) == [2, 4]
        small = dataset.read(1, out_shape=(225, 325), masked=True)
        assert set(np.unique(small.compressed())) == {200}
        assert small.mask[:112].all()
        assert not small.mask[113:].any()


def test_overviews_of_classes_have_the_commonest(tmp_path: Path) -> None:
    """Those by nearest pixels lie half of an overview's pixel beside those of photographs."""
    pixels = np.full((1, 600, 700), 5, np.uint8)
    pixels[:, ::2, ::2] = 1
    make_tiff(tmp_path / "classes.tif", pixels)
    with rasterio.open(tmp_path / "classes.tif", "r+") as out:
        out.write_colormap(1, {1: (255, 0, 0, 255), 5: (0, 255, 0, 255)})
    write_gtiff(tmp_path / "out.tif", whole(read_source(tmp_path / "classes.tif", "classes")))
    with rasterio.open(tmp_path / "out.tif", overview_level=0) as small:
        assert (small.read() == 5).all()


def test_lossy_pixels_never_collide_with_nodata(tmp_path: Path) -> None:
    pixels = noise(3)
    pixels[:, :40] = 0
    source = make_tiff(tmp_path / "nodata.tif", pixels, nodata=0)
    assert source.mask == "nodata"
    assert source.lossy

    def blur(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        values[values < 60] = 0
        values[:, ::7] = 0
        values[:, 3::7] = 9
        return values

    write_gtiff(tmp_path / "out.tif", whole(source, change=blur))
    with rasterio.open(tmp_path / "out.tif") as dataset:
        got, valid = dataset.read(), dataset.dataset_mask()
    np.testing.assert_array_equal(valid, read_pixels(source)[1])
    assert not got[:, :40].any()
    assert (got[:, 40:, ::7].reshape(3, -1).T == (0, 0, 1)).all()


def test_nodata_outside_the_type_matches_nothing() -> None:
    assert storable_nodata(-9999, "uint8") is None
    assert storable_nodata(float("nan"), "int16") is None
    assert storable_nodata(0.5, "uint8") is None
    assert storable_nodata(255.0, "uint8") == 255
    assert storable_nodata(-9999, "float32") == -9999


@pytest.mark.parametrize(("limit", "most"), [("READ_PIXELS", 1), ("READ_BYTES", 3)])
def test_reads_follow_the_tile_grid_and_stay_small(
    monkeypatch: pytest.MonkeyPatch, limit: str, most: int
) -> None:
    monkeypatch.setattr(_blocks, limit, most * 4 * 64 * 48)
    source = SourceImage(Path("x"), "x", "", 0, "GTiff", 5000, 3000, 3, "uint8")
    window = (70, 50, 4000, 2000)
    covered = np.zeros((3000, 5000), np.uint8)
    for col, row, width, height in read_windows(FileRaster(source, window)):
        assert width * height <= 4 * 64 * 48
        assert col % 64 == 0 or col == 70
        assert row % 48 == 0 or row == 50
        covered[row : row + height, col : col + width] += 1
    assert (covered[50:2050, 70:4070] == 1).all()
    assert covered.sum() == 4000 * 2000


def test_failure_leaves_nothing_and_keeps_the_old_file(tmp_path: Path) -> None:
    source = make_tiff(tmp_path / "a.tif", noise(3))

    def fail(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        raise ValueError("damaged tile")

    out = tmp_path / "out" / "x.tif"
    out.parent.mkdir()
    out.write_bytes(b"old")
    for write in (write_gtiff, write_png, write_jpeg):
        with pytest.raises(ValueError, match="damaged tile"):
            write(out, whole(source, change=fail))
    assert os.listdir(out.parent) == ["x.tif"]
    assert out.read_bytes() == b"old"


@pytest.mark.parametrize("taken", ["x.jpg", "x.jpg.aux.xml", "x.jgw"])
def test_what_is_there_stays(taken: str, tmp_path: Path) -> None:
    source = SOURCES["rgb"](tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / taken).write_text("somebody's")
    with pytest.raises(OutputError, match=f"{taken} is already there"):
        write_jpeg(folder / "x.jpg", whole(source))
    assert {p.name: p.read_text() for p in folder.iterdir()} == {taken: "somebody's"}
    seen = existing(folder / "x.jpg")
    write_jpeg(folder / "x.jpg", whole(source), seen)
    assert sorted(os.listdir(folder)) == ["x.jgw", "x.jpg", "x.jpg.aux.xml"]
    assert b"somebody" not in (folder / taken).read_bytes()
    # What came since it was looked at is another file.
    written = {p.name: p.read_bytes() for p in folder.iterdir()}
    flipped = whole(source, change=lambda pixels: 255 - pixels)
    with pytest.raises(OutputError, match="is already there"):
        write_jpeg(folder / "x.jpg", flipped, seen)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == written


def no_links(source: object, target: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
def test_of_several_at_once_one_wins(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:  # as on FAT
        monkeypatch.setattr(os, "link", no_links)
    for number in range(40):
        path = tmp_path / "out" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        start = threading.Barrier(4)

        def attempt(writer: int, path: Path = path, start: threading.Barrier = start) -> bool:
            folder = tmp_path / path.stem / str(writer)
            folder.mkdir(parents=True)
            for name in ("final.jpg", "final.jpg.aux.xml", "final.jgw"):
                (folder / name).write_text(f"by {writer}" * 999)
            start.wait()
            try:
                publish(folder / "final.jpg", path)
            except OutputError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            won = [writer for writer, done in enumerate(pool.map(attempt, range(4))) if done]
        assert len(won) == 1
        found = [p.read_text() for p in path.parent.glob(f"{number}.*")]
        assert found == 3 * [f"by {won[0]}" * 999]


def test_the_same_bytes_count_as_written(tmp_path: Path) -> None:
    source = SOURCES["rgb"](tmp_path)
    write_png(tmp_path / "x.png", whole(source))
    before = (tmp_path / "x.png").stat()
    write_png(tmp_path / "x.png", whole(source))
    after = (tmp_path / "x.png").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    source = SOURCES["rgb"](tmp_path)
    (tmp_path / "real.tif").write_bytes(b"real")
    (tmp_path / "x.tif").symlink_to("real.tif")
    (tmp_path / "y.tif").symlink_to("nowhere.tif")
    for name in ("x.tif", "y.tif"):
        with pytest.raises(OutputError, match=f"{name} is already there"):
            write_gtiff(tmp_path / name, whole(source))
        write_gtiff(tmp_path / name, whole(source), existing(tmp_path / name))
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "real.tif").read_bytes() == b"real"
    assert not (tmp_path / "nowhere.tif").exists()
    (tmp_path / "z.tif").mkdir()
    with pytest.raises(OutputError, match=r"z\.tif is there and is no file"):
        existing(tmp_path / "z.tif")


def test_inside_is_told_through_links(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to("home/a")
    (tmp_path / "loop").symlink_to("loop")
    for inside in (home, home / "a/b/c", tmp_path / "link", tmp_path / "link/none/x"):
        assert is_inside(inside, home)
    for outside in (tmp_path, tmp_path / "home2", home / "../x", tmp_path / "loop" / "x"):
        assert not is_inside(outside, home)


def test_unwritable_folder_is_an_output_error(tmp_path: Path) -> None:
    source = make_tiff(tmp_path / "a.tif", noise(3))
    with pytest.raises(OutputError, match=r"x\.tif: File exists"):
        write_gtiff(tmp_path / "a.tif" / "x.tif", whole(source))


def camera_jpeg(path: Path, width: int = 320, height: int = 240) -> SourceImage:
    """Write a frame with EXIF (thumbnail included), XMP, ICC, a comment and an MPF index."""
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    ramp[..., 1] = np.linspace(0, 255, height)[:, None]
    image = Image.fromarray(ramp.astype(np.uint8))
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "DJI", "FC6310"
    exif.get_ifd(0x8769).update({0xA002: width, 0xA003: height, 0x9003: "2021:06:01 10:00:00"})
    coded = io.BytesIO()
    image.save(
        coded, "JPEG", quality=95, exif=with_thumbnail(exif.tobytes(), image), icc_profile=ICC,
        xmp=XMP, comment=b"over the coast",
    )  # fmt: skip
    path.write_bytes(coded.getvalue())
    source = read_source(path, path.name)
    blanked = tuple(
        (n, blank_thumbnail(p)[0] if n == "APP1" and p.startswith(b"Exif") else p)
        for n, p in source.metadata
    )
    return dataclasses.replace(source, metadata=blanked)


def with_thumbnail(exif: bytes, image: Image.Image) -> bytes:
    """Append an IFD1 with a JPEG thumbnail to an EXIF block."""
    small = io.BytesIO()
    image.resize((160, 120)).save(small, "JPEG", quality=75)
    tiff = bytearray(exif.removeprefix(b"Exif\0\0"))
    order = "<" if tiff[:2] == b"II" else ">"
    first = struct.unpack_from(order + "I", tiff, 4)[0]
    count = struct.unpack_from(order + "H", tiff, first)[0]
    struct.pack_into(order + "I", tiff, first + 2 + 12 * count, len(tiff))
    offset, size = len(tiff) + 30, len(small.getvalue())
    tiff += struct.pack(order + "HHHIIHHIII", 2, 0x201, 4, 1, offset, 0x202, 4, 1, size, 0)
    return b"Exif\0\0" + bytes(tiff) + small.getvalue()


def test_jpeg_carries_the_original_segments(tmp_path: Path) -> None:
    source = camera_jpeg(tmp_path / "DJI_0001.JPG")
    out = tmp_path / "out" / "DJI_0001.JPG"
    write_jpeg(out, whole(source))
    original, restored = read_segments(source.path), read_segments(out)
    assert restored.pop() == ("COM", mark(FileRaster.decoder).encode())
    assert [n for n, _ in restored] == [n for n, _ in original]
    for (name, old), (_, new) in zip(original, restored, strict=True):
        if name == "APP1" and old.startswith(b"Exif"):
            blank, place = blank_thumbnail(old)
            assert place is not None
            assert blank_thumbnail(new) == (blank, place)
            thumbnail = Image.open(io.BytesIO(new[place[0] :]))
            assert thumbnail.size == (160, 120)
        else:
            assert new == old
    pixels, _ = read_pixels(read_source(out, "x"))
    assert np.abs(pixels.astype(int) - read_pixels(source)[0]).mean() < 1.0
    with Image.open(out) as image:
        assert image.layer == [(1, 1, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)]
        assert not image.info.get("progressive")


def test_jpeg_window_tells_its_own_size(tmp_path: Path) -> None:
    source = camera_jpeg(tmp_path / "DJI_0001.JPG")
    out = tmp_path / "w.jpg"
    write_jpeg(out, FileRaster(source, (40, 30, 200, 100)))
    with Image.open(out) as image:
        detail = image.getexif().get_ifd(0x8769)
        assert image.size == (200, 100) == (detail[0xA002], detail[0xA003])
        assert image.getexif()[0x0110] == "FC6310"
        assert image.info["icc_profile"] == ICC
        assert image.info["xmp"] == XMP


@pytest.mark.parametrize("name", ["rgb", "gcps", "lat_lon"])
def test_jpeg_and_png_keep_the_position_beside_them(name: str, tmp_path: Path) -> None:
    source = SOURCES[name](tmp_path)
    raster = FileRaster(source, (0, 0, source.width, source.height))
    for suffix, write in ((".jpg", write_jpeg), (".png", write_png)):
        out = tmp_path / f"out{suffix}"
        write(out, raster)
        with rasterio.open(out) as got, rasterio.open(source.path) as want:
            assert got.crs == want.crs
            assert got.transform == want.transform
            assert [place_of(p) for p in got.gcps[0]] == [place_of(p) for p in want.gcps[0]]
            assert got.gcps[1] == want.gcps[1]
    if source.georef.transform:
        world = [float(line) for line in (tmp_path / "out.jgw").read_text().split()]
        a, b, _, d, e, _ = source.georef.transform
        x, y = rasterio.Affine(*source.georef.transform) @ (0.5, 0.5)
        assert world == pytest.approx([a, d, b, e, x, y], abs=1e-12)


def place_of(point: GroundControlPoint) -> tuple[float, ...]:
    return point.row, point.col, point.x, point.y, point.z


def test_a_file_without_position_loses_old_sidecars(tmp_path: Path) -> None:
    out = tmp_path / "x.jpg"
    write_jpeg(out, whole(SOURCES["rgb"](tmp_path)))
    assert (tmp_path / "x.jgw").exists()
    write_jpeg(out, whole(SOURCES["no_position"](tmp_path)), existing(out))
    assert not (tmp_path / "x.jgw").exists()
    assert not (tmp_path / "x.jpg.aux.xml").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("int16", "not 1-band int16"),
        ("multispectral", "6-band uint16"),
        ("palette", "not palette"),
        ("mask", "transparent pixels"),
        ("rgba", "transparent pixels"),
    ],
)
def test_jpeg_refuses_what_it_cannot_store(name: str, reason: str, tmp_path: Path) -> None:
    source = SOURCES[name](tmp_path)
    with pytest.raises(OutputError, match=f"^{source.id}: .*{reason}"):
        write_jpeg(tmp_path / "out.jpg", whole(source))
    assert not (tmp_path / "out.jpg").exists()


@pytest.mark.parametrize("name", ["rgb", "rgba", "mask", "palette"])
def test_png_is_lossless(name: str, tmp_path: Path) -> None:
    source = SOURCES[name](tmp_path)
    write_png(tmp_path / "out.png", whole(source))
    got = read_source(tmp_path / "out.png", "out.png")
    pixels, mask = read_pixels(source)
    np.testing.assert_array_equal(read_pixels(got)[0], pixels)
    if mask is not None:
        np.testing.assert_array_equal(read_pixels(got)[1], mask)
    assert got.colormap == source.colormap


def test_png_of_16_bits_with_a_mask(tmp_path: Path) -> None:
    source = make_tiff(tmp_path / "deep.tif", noise(3, "uint16") * np.uint16(200), holes())
    write_png(tmp_path / "out.png", whole(source))
    with rasterio.open(tmp_path / "out.png") as dataset:
        np.testing.assert_array_equal(dataset.read([1, 2, 3]), rasterio.open(source.path).read())
        np.testing.assert_array_equal(dataset.read(4), holes().astype(np.uint16) * 257)


@pytest.mark.parametrize("name", ["int16", "float_nan", "multispectral"])
def test_png_refuses_what_it_cannot_store(name: str, tmp_path: Path) -> None:
    source = SOURCES[name](tmp_path)
    with pytest.raises(OutputError, match=f"^{source.id}: PNG"):
        write_png(tmp_path / "out.png", whole(source))


def test_embedded_documents_reach_every_format(tmp_path: Path) -> None:
    source = camera_jpeg(tmp_path / "DJI_0001.JPG")
    for suffix, write in ((".tif", write_gtiff), (".png", write_png), (".jpg", write_jpeg)):
        out = tmp_path / f"a{suffix}"
        write(out, whole(source))
        with Image.open(out) as image:
            assert image.info["icc_profile"] == ICC, suffix
            xmp = image.tag_v2[700] if suffix == ".tif" else image.info["xmp"]
            assert xmp.rstrip(b"\0") == XMP, suffix
            if suffix != ".tif":
                assert image.getexif()[0x010F] == "DJI"
        # On from the output: a copy of a copy still has them.
        again = tmp_path / f"b{suffix}.jpg"
        write_jpeg(again, whole(read_source(out, "again")))
        with Image.open(again) as image:
            assert image.info["icc_profile"] == ICC
            assert image.info["xmp"] == XMP
    with rasterio.open(tmp_path / "a.tif") as dataset:
        assert dataset.tags()["EXIF_Model"] == "FC6310"


def test_png_chunks_come_back(tmp_path: Path) -> None:
    image = Image.fromarray(np.moveaxis(noise(3), 0, -1))
    image.save(tmp_path / "a.png", icc_profile=ICC, dpi=(300, 300), exif=Image.Exif().tobytes())
    source = read_source(tmp_path / "a.png", "a.png")
    write_png(tmp_path / "out.png", whole(source))
    got = read_source(tmp_path / "out.png", "a.png")
    kind, payload = png_chunk(FileRaster.decoder)
    assert got.metadata == (*source.metadata, (kind.decode(), payload))
    assert "iCCP" in dict(got.metadata)
    bomb = b"x\0\0" + zlib.compress(bytes(1 << 26))
    hostile = dataclasses.replace(source, metadata=(("iCCP", b"x\0\0junk"), ("iCCP", bomb)))
    write_gtiff(tmp_path / "out.tif", whole(hostile))


HOSTILE = [
    "..", "../x.jpg", "/etc/passwd", "a/../../x.tif", "a//b.jpg", "./a.jpg", "a/./b.jpg", "", "/",
    "C:\\x.jpg", "..\\x.jpg", "a\0b.jpg", "a\nb.jpg", "x" * 5000 + ".jpg", "y" * 5000 + ".jpg",
    "ü" * 300 + ".tif", "z/" * 3000 + "a.jpg", "z/" * 3001 + "a.jpg", "~/x.jpg", ".", "...",
    "a.jpg", "a.tif", "a.tiff", "a", "a.jpg.tif", "a.jpg.tif.tif", "a@.tif", "a%.tif", "a%2E.tif",
    "a@0,0,8x8.tif", "a.TIF", "名前.jpg",
    "\ud800.jpg", "\udcff.tif", "%", "%/a.jpg", "a.jpg.", "a.jpg ",
    "b/a.jpg", "b", "a.xyz", "a.xyz.tif", "%2E%2E", "CON:x.tif",
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".tif", ".jpg", ".png"])
def test_output_paths_stay_inside_and_apart(suffix: str, tmp_path: Path) -> None:
    seen: dict[Path, object] = {}
    windows = [((0, 0, 8, 8), True), ((0, 0, 8, 8), False), ((0, 8, 8, 8), False)]
    names = [("beach", name) for name in HOSTILE] + [(name, "a.jpg") for name in HOSTILE]
    for (flight, image_id), (window, full) in itertools.product(names, windows):
        path = output_path(tmp_path, flight, image_id, window, full, suffix)
        assert path not in seen, (flight, image_id, seen.get(path))
        seen[path] = flight, image_id, window
        assert path.resolve().is_relative_to(tmp_path.resolve())
        assert path != tmp_path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".aux.xml").touch()
        assert str(path).isprintable()


def test_output_paths_of_honest_ids(tmp_path: Path) -> None:
    name = "a/DJI_0001.JPG"
    window, flight = (5, 6, 70, 80), tmp_path / "beach"

    def path(image_id: str, full: bool, suffix: str) -> Path:
        return output_path(tmp_path, "beach", image_id, window, full, suffix)

    assert path(name, True, ".jpg") == flight / name
    assert path(name, True, ".tif") == flight / "a/DJI_0001.JPG.tif"
    assert path(name, False, ".tif") == flight / "a/DJI_0001.JPG@5,6,70x80.tif"
    assert path("o.tif", False, ".tif") == flight / "o@5,6,70x80.tif"
    # The images of a flight lie together, however long its name is.
    long = [output_path(tmp_path, "x" * 999, name, window, True, ".tif") for name in ("a", "b")]
    assert len({one.parent for one in long}) == 1


def test_per_dataset_mask_is_internal(tmp_path: Path) -> None:
    write_gtiff(tmp_path / "out.tif", whole(SOURCES["mask"](tmp_path)))
    assert not (tmp_path / "out.tif.msk").exists()
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert dataset.mask_flag_enums[0] == [MaskFlags.per_dataset]


@pytest.mark.parametrize("writer", [write_gtiff, write_jpeg, write_png])
@pytest.mark.parametrize("room", ["256k", "2m"], ids=["no-room", "room-for-a-part"])
def test_a_full_disk_is_told_as_such(
    tmp_path: Path, mounted: Callable[[str], Path], writer: Callable[..., None], room: str
) -> None:
    """GDAL tells of a scanline that was not written."""
    source = make_tiff(tmp_path / "a.tif", noise(3, width=1500, height=1000))
    disk = mounted(f"size={room}")
    out = disk / ("out.jpg" if writer is write_jpeg else "out.tif")
    with pytest.raises(OutputError, match=f"^{out}: No space left on device$"):
        writer(out, whole(source))
    assert not list(disk.iterdir())
