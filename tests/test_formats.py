"""Strangers' files: formats told by their first bytes, nothing elsewhere opened or asked for."""

from __future__ import annotations

import dataclasses
import os
import select
import shutil
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import imagecodecs
import numpy as np
import pyproj
import pytest
import rasterio
import rasterio.shutil
from conftest import Run
from PIL import Image, TiffImagePlugin
from rasterio.transform import from_origin
from test_outputs import make_tiff, noise, whole

from archive_pipeline.flight import _beside
from archive_pipeline.flight.decoded import DECODERS
from archive_pipeline.flight.formats import DRIVERS, open_image
from archive_pipeline.flight.locations import location, open_file, sha256
from archive_pipeline.flight.read import read_pixels, read_source
from archive_pipeline.flight.source_image import SourceError
from archive_pipeline.geo.georef import Georef
from archive_pipeline.jobs._neighbouring import _thumbnail
from archive_pipeline.outputs.writers import write_gtiff, write_png

SIDE = 64
PLACE = {"crs": "EPSG:32615", "transform": from_origin(325000, 3240000, 0.1, 0.1)}
# Name, GDAL's driver, creation options.
WRITTEN: list[tuple[str, str, dict[str, Any]]] = [
    ("a.jpg", "JPEG", {}),
    ("a.png", "PNG", {}),
    ("a.tif", "GTiff", {"compress": "DEFLATE"}),
    ("big.tif", "GTiff", {"BIGTIFF": "YES", "ENDIANNESS": "BIG"}),
    ("cog.tif", "COG", {}),
    ("a.jp2", "JP2OpenJPEG", {"REVERSIBLE": "YES", "QUALITY": "100"}),
    ("a.j2k", "JP2OpenJPEG", {"CODEC": "J2K", "REVERSIBLE": "YES", "QUALITY": "100"}),
    ("a.webp", "WEBP", {"LOSSLESS": "YES"}),
    ("a.gif", "GIF", {}),
    ("a.bmp", "BMP", {}),
    ("a.img", "HFA", {}),
    ("huge.img", "HFA", {"USE_SPILL": "YES"}),
    ("a.ntf", "NITF", {}),
    ("jpeg.ntf", "NITF", {"IC": "C3"}),
    ("j2k.ntf", "NITF", {"IC": "C8"}),
]
LOSSY = {"a.jpg", "a.gif", "jpeg.ntf", "j2k.ntf"}


@pytest.fixture
def bounded() -> Iterator[None]:
    """An error instead of a hang in what opens a pipe or waits for a server."""

    def stop(*_: object) -> None:
        raise TimeoutError("waited for something that never comes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 120)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


class Server:
    """A port of this machine at which nobody answers."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.host = f"127.0.0.1:{listener.getsockname()[1]}"

    def connections(self) -> int:
        """How many have come since the last call."""
        count = 0
        while select.select([self.listener], [], [], 0)[0]:
            self.listener.accept()[0].close()
            count += 1
        return count


@pytest.fixture
def server() -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Server(listener)


def scene(bands: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (bands, SIDE, SIDE), np.uint8)


def save(path: Path, driver: str = "JPEG", **options: Any) -> Path:
    """Write a picture in any of GDAL's formats."""
    staged = path.parent / f".{path.name}.staged"
    bands = 1 if driver == "GIF" else 3
    size = {"width": SIDE, "height": SIDE, "count": bands, "dtype": "uint8"}
    with rasterio.open(staged, "w", driver="GTiff", **size, **PLACE) as out:
        out.write(scene(bands))
    rasterio.shutil.copy(staged, path, driver=driver, **options)
    staged.unlink()
    return path


def vrt(picture: Path) -> str:
    source = f"<SourceFilename>{picture}</SourceFilename><SourceBand>1</SourceBand>"
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{n}"><SimpleSource>{source}</SimpleSource>'
        "</VRTRasterBand>"
        for n in (1, 2, 3)
    )
    return f'<VRTDataset rasterXSize="{SIDE}" rasterYSize="{SIDE}">{bands}</VRTDataset>'


def wms(server: Server) -> str:
    return (
        f'<GDAL_WMS><Service name="TMS"><ServerUrl>http://{server.host}/${{z}}/${{x}}/${{y}}.jpg'
        "</ServerUrl></Service><DataWindow><UpperLeftX>0</UpperLeftX><UpperLeftY>0</UpperLeftY>"
        "<LowerRightX>64</LowerRightX><LowerRightY>-64</LowerRightY><TileLevel>0</TileLevel>"
        "<TileCountX>1</TileCountX><TileCountY>1</TileCountY></DataWindow><BlockSizeX>64"
        "</BlockSizeX><BlockSizeY>64</BlockSizeY><BandsCount>3</BandsCount></GDAL_WMS>"
    )


def overviews_of(place: object) -> str:
    return (
        '<PAMDataset><Metadata domain="OVERVIEWS">'
        f'<MDI key="OVERVIEW_FILE">{place}</MDI></Metadata></PAMDataset>'
    )


def refused(path: Path) -> str:
    """Why a file is not read; it must not be by any way that opens it."""
    with pytest.raises(SourceError) as caught:
        read_source(path, path.name)
    assert caught.value.path == path
    assert "\n" not in caught.value.reason
    assert _thumbnail(path) is None
    return caught.value.reason


# --------------------------------------------------------------------------- formats


@pytest.mark.parametrize(("name", "driver", "options"), WRITTEN, ids=[w[0] for w in WRITTEN])
def test_formats_that_are_read(
    name: str, driver: str, options: dict[str, Any], tmp_path: Path
) -> None:
    path = save(tmp_path / name, driver, **options)
    expected = "GTiff" if driver == "COG" else driver
    source = read_source(path, name)
    assert (source.driver, source.width, source.height) == (expected, SIDE, SIDE)
    pixels, _ = read_pixels(source)
    if name not in LOSSY:
        np.testing.assert_array_equal(np.moveaxis(pixels, 2, 0), scene())
    if name == "huge.img":
        assert path.with_suffix(".ige").is_file()
        return  # it names its other file
    # what it is counts, not what it is called
    other = path.rename(tmp_path / "renamed.jpg")
    again = read_source(other, other.name)
    assert again.driver == expected
    np.testing.assert_array_equal(read_pixels(again)[0], pixels)


def test_the_drivers_are_there() -> None:
    with rasterio.Env() as env:
        assert {driver for _, driver in DRIVERS} <= {*env.drivers(), *DECODERS}


def test_descriptions_are_no_images(tmp_path: Path, server: Server, bounded: None) -> None:
    picture = save(tmp_path / "picture.tif", "GTiff")
    texts = {
        "a VRT description": vrt(picture),
        "a WMS description": wms(server),
        "a WMTS description": f"<GDAL_WMTS><GetCapabilitiesUrl>http://{server.host}/c"
        "</GetCapabilitiesUrl></GDAL_WMTS>",
        "a WCS description": f"<WCS_GDAL><ServiceURL>http://{server.host}/?</ServiceURL>"
        "<CoverageName>a</CoverageName></WCS_GDAL>",
        "a tile index (GTI)": "<GDALTileIndexDataset><IndexDataset>index.gpkg</IndexDataset>"
        "</GDALTileIndexDataset>",
        "an MRF description": "<MRF_META><CachedSource><Source>picture.tif</Source>"
        "</CachedSource></MRF_META>",
        "a PDS label": "PDS_VERSION_ID = PDS3\r\nFILE_NAME = 'picture.tif'\r\nEND\r\n",
        "a STAC description": '{"stac_version": "1.0.0", "type": "Feature", "assets": {"a": '
        f'{{"href": "http://{server.host}/a.tif"}}}}}}',
    }
    path = tmp_path / "a.jpg"
    for kind, text in texts.items():
        for start in ("", "\ufeff \n", "<?xml version='1.0'?>\n"):
            path.write_text(start + text)
            assert refused(path) == f"not an image: {kind}, which refers to other files"
    for data in (b"text", b"\0" * 100, b"%PDF-1.4", b"SQLite format 3\0", b"<svg/>", b"\xff\xd8"):
        path.write_bytes(data)
        assert refused(path).startswith("not an image in a format that is read (JPEG, PNG, TIFF,")
    assert server.connections() == 0


def test_ingest_archives_pictures_only(
    run: Run, tmp_path: Path, server: Server, bounded: None
) -> None:
    """Of a flight with descriptions, a pipe and a device the picture alone is archived."""
    folder = tmp_path / "flight"
    folder.mkdir()
    secret = save(tmp_path / "secret.tif", "GTiff")
    save(folder / "real.png", "JPEG")
    (folder / "vrt.jpg").write_text(vrt(secret))
    (folder / "wms.tif").write_text(wms(server))
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.tif").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(folder / "socket.png"))
        args = ("ingest", folder, "--archive", tmp_path / "a.zarr", "--workers", 0, "--json")
        errors = {
            "vrt.jpg": "not an image: a VRT description, which refers to other files",
            "wms.tif": "not an image: a WMS description, which refers to other files",
            "pipe.jpg": "not a file but a pipe",
            "zero.tif": "not a file but a device",
            "socket.png": "not a file but a socket",
        }
        for _ in range(2):  # the second time a pipe lies where an archived image was
            result = run(*args)
            assert result.code == 3, result.err
            assert {Path(f["path"]).name: f["error"] for f in result.json["failed"]} == errors
            (folder / "real.png").unlink(missing_ok=True)
            os.mkfifo(folder / "real.png")
            errors["real.png"] = (
                "the archive holds another image as flight/real.png; use --overwrite to replace it "
                "or --flight to archive under another name"
            )
    assert server.connections() == 0


def test_only_regular_files_are_opened(tmp_path: Path, bounded: None) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name, kind in (("pipe", "a pipe"), ("link", "a pipe"), (".", "a folder")):
        for opened in (open_file, sha256):
            with pytest.raises(OSError, match=f"not a file but {kind}"):
                opened(tmp_path / name)
    with pytest.raises(OSError, match="a device"):
        open_file(Path("/dev/null"))
    assert location(f"file://{tmp_path}/a%20b.jpg") == tmp_path / "a b.jpg"


# -------------------------------------------------------------------------- sidecars


def test_sidecars_that_count(tmp_path: Path) -> None:
    """A georeference, a world file, a mask with overviews and overviews beside an image."""
    path = save(tmp_path / "a.jpg")
    assert path.with_name("a.jpg.aux.xml").is_file()
    assert read_source(path, "a").georef.crs == "EPSG:32615"
    for suffix, world in ((".jpg", ".jgw"), (".png", ".pgw"), (".tif", ".tfw")):
        plain = tmp_path / f"world{suffix}"
        Image.fromarray(np.moveaxis(scene(), 0, 2)).save(plain)
        plain.with_suffix(world).write_text("0.1\n0\n0\n-0.1\n325000.05\n3239999.95\n")
        transform = read_source(plain, "a").georef.transform
        assert transform == pytest.approx((0.1, 0, 325000, 0, -0.1, 3240000))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:20] = 255
    masked = save(tmp_path / "B.TIF", "GTiff")
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(masked, "r+") as out:
        out.write_mask(mask)
    half = {"width": SIDE // 2, "height": SIDE // 2, "driver": "GTiff", "dtype": "uint8"}
    for name, bands in (("B.TIF.ovr", scene()), ("B.TIF.msk.ovr", mask[None])):
        with rasterio.open(tmp_path / name, "w", count=len(bands), **half) as out:
            out.write(bands[:, ::2, ::2])
    for name in ("B.TIF", "c.jpg"):
        if name == "c.jpg":
            save(tmp_path / name)
            for suffix in (".msk", ".ovr", ".msk.ovr"):
                shutil.copy(f"{masked}{suffix}", tmp_path / f"{name}{suffix}")
        source = read_source(tmp_path / name, name)
        assert source.mask == "mask"
        with open_image(tmp_path / name) as dataset:
            assert dataset.overviews(1) == [2]
        np.testing.assert_array_equal(read_pixels(source)[1], mask)
        assert _thumbnail(tmp_path / name) is not None


@pytest.mark.parametrize("name", [".ovr", ".OVR", ".msk", ".Msk", ".msk.ovr", ".ovr.msk"])
def test_overviews_and_masks_are_pictures(
    name: str, tmp_path: Path, server: Server, bounded: None
) -> None:
    path = save(tmp_path / "a.jpg")
    for text in (vrt(save(tmp_path / "secret.tif", "GTiff")), wms(server)):
        if name.count(".") == 2:
            shutil.copy(tmp_path / "secret.tif", tmp_path / f"a.jpg.{name.split('.')[1]}")
        (tmp_path / f"a.jpg{name}").write_text(text)
        assert f"a.jpg{name} beside it: not an image: a " in refused(path)
    assert server.connections() == 0


@pytest.mark.parametrize(("name", "driver", "options"), WRITTEN, ids=[w[0] for w in WRITTEN])
def test_no_overviews_elsewhere(
    name: str, driver: str, options: dict[str, Any], tmp_path: Path, server: Server, bounded: None
) -> None:
    path = save(tmp_path / name, driver, **options)
    sidecar = Path(f"{path}.aux.xml")
    half = save(tmp_path / "half.tif", "GTiff")
    for place in (half, ":::BASE:::half.tif", f"/vsicurl/http://{server.host}/{name}.tif"):
        sidecar.write_text(overviews_of(place))
        assert "OVERVIEW_FILE" in refused(path)
    sidecar.write_text(overviews_of(half).replace("OVERVIEW_FILE", "&#79;verview_file"))
    assert "OVERVIEW_FILE" in refused(path)
    assert server.connections() == 0


def test_no_overviews_elsewhere_by_a_tiff_itself(
    tmp_path: Path, server: Server, bounded: None
) -> None:
    path = save(tmp_path / "a.tif", "GTiff")
    for number, place in enumerate((tmp_path / "half.tif", f"/vsicurl/http://{server.host}/x")):
        with rasterio.open(path, "r+") as out:
            out.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(place))
        assert "OVERVIEW_FILE" in refused(path)
        picture = save(tmp_path / f"{number}.jpg")
        shutil.copy(path, f"{picture}.ovr")
        assert f"{number}.jpg.ovr beside it: names another file" in refused(picture)
    assert server.connections() == 0


def test_georeferences_ask_no_server(tmp_path: Path, server: Server, bounded: None) -> None:
    path = save(tmp_path / "a.jpg")
    for crs in (f"http://{server.host}/crs", f"/vsicurl/http://{server.host}/crs.prj"):
        Path(f"{path}.aux.xml").write_text(
            f"<PAMDataset><SRS>{crs}</SRS><GeoTransform>1,1,0,1,0,-1</GeoTransform></PAMDataset>"
        )
        assert read_source(path, "a").georef.crs is None
        data = Georef().to_json() | {"crs": crs}
        with pytest.raises(ValueError, match="not a CRS"):
            Georef.from_json(data)
    with pytest.raises(ValueError, match="not a CRS"):
        Georef.from_json(Georef().to_json() | {"crs": str(tmp_path / "crs.prj")})
    assert server.connections() == 0


GRID_WKT = (
    'GEOGCS["x",DATUM["x",SPHEROID["x",6377397,299],EXTENSION["PROJ4_GRIDS","GRID"]],'
    'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]]'
)


@pytest.mark.parametrize("form", ["aux", "cdata", "gcps", "attribute", "prj", "tif", "jxl"])
def test_images_name_no_grids_by_paths(form: str, tmp_path: Path, bounded: None) -> None:
    """PROJ would open what a CRS names, here a pipe that waits for ever."""
    grid = tmp_path / "elsewhere" / "grid.gsb"
    grid.parent.mkdir()
    os.mkfifo(grid)
    bound = pyproj.CRS("+proj=longlat +ellps=bessel +nadgrids=GRID +no_defs").to_wkt()
    path = tmp_path / ("a.tif" if form == "tif" else "a.png")
    if form == "jxl":
        path = tmp_path / "a.jxl"
        path.write_bytes(imagecodecs.jpegxl_encode(np.moveaxis(scene(), 0, 2)))
    elif form == "tif":
        # as ESRI has it; the name is as long as the one that takes its place
        text = GRID_WKT.replace("GRID", "x" * len(str(grid)))
        info = TiffImagePlugin.ImageFileDirectory_v2()
        info[34735] = (1, 1, 0, 2, 1024, 0, 1, 1, 1026, 34737, len(text) + 18, 0)
        info.tagtype[34735] = 3
        info[34737] = f"ESRI PE String = {text}|"
        Image.fromarray(np.moveaxis(scene(), 0, 2)).save(path, tiffinfo=info)
    else:
        Image.fromarray(np.moveaxis(scene(), 0, 2)).save(path)
    for wkt in (bound, GRID_WKT):
        said = wkt.replace("GRID", str(grid))
        place = "<GeoTransform>8,1e-6,0,47,0,-1e-6</GeoTransform>"
        documents = {
            "aux": f"<PAMDataset><SRS>{escape(said)}</SRS>{place}</PAMDataset>",
            "jxl": f"<PAMDataset><SRS>{escape(said).replace('/', '&#47;')}</SRS></PAMDataset>",
            "cdata": f"<PAMDataset><SRS><![CDATA[{said}]]></SRS>{place}</PAMDataset>",
            "gcps": f"<PAMDataset><GCPList Projection={quoteattr(said)}></GCPList></PAMDataset>",
            "attribute": f"<PAMDataset srs={quoteattr(said)}>{place}</PAMDataset>",
        }
        if form in documents:
            Path(f"{path}.aux.xml").write_text(documents[form])
        elif form == "prj":
            path.with_suffix(".pgw").write_text("1e-6\n0\n0\n-1e-6\n8\n47\n")
            path.with_suffix(".prj").write_text(said)
        else:
            data = path.read_bytes()
            assert (b"x" * len(str(grid))) in data
            path.write_bytes(data.replace(b"x" * len(str(grid)), str(grid).encode()))
        assert "names files elsewhere" in refused(path)
        if form == "tif":
            break
    if form == "aux":
        Path(f"{path}.aux.xml").write_text(documents["aux"].replace(str(grid), "BETA2007.gsb"))
        assert read_source(path, "a").georef.transform is not None


def test_records_name_no_grids_by_paths(tmp_path: Path, bounded: None) -> None:
    """PROJ would open what a CRS names, here a pipe that waits for ever."""
    grid = tmp_path / "grid.gsb"
    os.mkfifo(grid)
    geographic = pyproj.CRS("+proj=longlat +ellps=bessel +nadgrids=GRID +no_defs").to_wkt()
    for wkt in (geographic, GRID_WKT):
        data = Georef().to_json() | {"crs": wkt.replace("GRID", str(grid))}
        with pytest.raises(ValueError, match="names files elsewhere"):
            Georef.from_json(data)
        known = Georef().to_json() | {"crs": wkt.replace("GRID", "BETA2007.gsb")}
        assert Georef.from_json(known).crs == known["crs"]
    utm = Georef().to_json() | {"crs": pyproj.CRS(31467).to_wkt()}  # "DHDN / 3-degree ..."
    assert Georef.from_json(utm).crs == utm["crs"]


@pytest.mark.parametrize("name", ["a.jgw", "a.jpg.aux.xml", "a.jpg.ovr", "a.aux", "other.txt"])
def test_pipes_beside_an_image(name: str, tmp_path: Path, bounded: None) -> None:
    path = save(tmp_path / "a.jpg")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert refused(path) == f"{name} beside it is a pipe or a device"


def test_a_folder_is_listed_once_until_it_changes(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, listed = save(tmp_path / "a.jpg"), []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scan(folder))
    for _ in range(3):  # it was changed just now: something else may come in the same instant
        open_image(path).close()
    assert len(listed) == 3
    monkeypatch.setattr(_beside, "SETTLED", -60)
    listed.clear()
    for _ in range(3):
        open_image(path).close()
    assert len(listed) == 1
    time.sleep(0.05)  # more than a tick of the clock of files
    (tmp_path / "A.JPG.Ovr").write_text(wms(server))
    assert "A.JPG.Ovr beside it: not an image: a WMS description" in refused(path)
    (tmp_path / "A.JPG.Ovr").unlink()
    time.sleep(0.05)
    later = tmp_path.parent / f"{tmp_path.name}-later"
    (tmp_path / "a.jgw").symlink_to(later)
    open_image(path).close()
    os.mkfifo(later)  # which changes the folder of the link in nothing
    assert refused(path) == "a.jgw beside it is a pipe or a device"
    assert server.connections() == 0


def test_pipes_that_are_nobodys_sidecars(tmp_path: Path, bounded: None) -> None:
    path = save(tmp_path / "a.jpg")
    for name in (".sync", ".a", "queue", "other.tif"):
        os.mkfifo(tmp_path / name)
    open_image(path).close()
    for name in ("a_rpc", "summary.txt"):
        os.mkfifo(tmp_path / name)
        assert refused(path) == f"{name} beside it is a pipe or a device"
        (tmp_path / name).unlink()


def test_hfa_files_name_only_files_beside_them(tmp_path: Path, bounded: None) -> None:
    path = save(tmp_path / "huge.img", "HFA", USE_SPILL="YES")
    data = path.read_bytes()
    assert data.count(b"huge.ige\0") == 3
    for name in (b"../h.ige", b"/tmp/a.i", b"..\\h.ige"):
        path.write_bytes(data.replace(b"huge.ige", name))
        assert refused(path) == f"refers to a file in another folder: {name.decode()!r}"
    # a dictionary that puts the name elsewhere
    path.write_bytes(data.replace(b"{1:oEmif_String,fileName,", b"{1:oEmif_String,fakeName,"))
    assert refused(path) == "names the file of its pixels in a way that is not known"
    path.write_bytes(data.replace(b"ImgExternalRaster\0", b"Eimg_Whatever_123\0"))
    assert "in a way that is not known" in refused(path)
    path.write_bytes(data)
    os.mkfifo(tmp_path / "pipe.jpg")
    assert refused(path) == "pipe.jpg beside it is a pipe or a device"
    (tmp_path / "pipe.jpg").unlink()
    # overviews in an .rrd, and an .aux of another image
    with rasterio.Env(HFA_USE_RRD=True), rasterio.open(path, "r+") as out:
        out.build_overviews([2])
    assert (tmp_path / "huge.rrd").is_file()
    assert read_source(path, "a").width == SIDE
    tree = struct.unpack_from("<I", data, 16)[0]
    root = struct.unpack_from("<I", data, tree + 8)[0]
    looped = bytearray(data)
    struct.pack_into("<I", looped, root, root)  # an entry that follows itself
    path.write_bytes(looped)
    read_source(path, "a")
    path.write_bytes(data[: root + 20])
    assert "damaged" in refused(path)


def test_auxiliary_files_of_erdas(tmp_path: Path, server: Server, bounded: None) -> None:
    path = save(tmp_path / "a.jpg")
    spill = save(tmp_path / "huge.img", "HFA", USE_SPILL="YES").read_bytes()
    auxiliary = tmp_path / "a.aux"
    auxiliary.write_bytes(save(tmp_path / "b.img", "HFA").read_bytes())
    assert read_source(path, "a").width == SIDE
    auxiliary.write_bytes(spill.replace(b"huge.ige", b"../h.ige"))
    assert "a.aux beside it: refers to a file in another folder" in refused(path)
    auxiliary.write_bytes(b"EHFA_HEADER_TAG" + vrt(tmp_path / "huge.img").encode())
    assert "a.aux beside it: " in refused(path)
    auxiliary.write_text("of LaTeX")
    assert read_source(path, "a").width == SIDE
    auxiliary.write_bytes(save(tmp_path / "c.img", "HFA").read_bytes())
    Path(f"{auxiliary}.ovr").write_text(wms(server))
    assert "a.aux.ovr beside it: not an image: a WMS description" in refused(path)
    assert server.connections() == 0


def test_overviews_of_nitf_files(tmp_path: Path, server: Server, bounded: None) -> None:
    path = save(tmp_path / "a.ntf", "NITF")
    (tmp_path / "a.ntf.r1").write_text(wms(server))
    assert refused(path) == "its overview a.ntf.r1 in a file of its own is not read"
    assert server.connections() == 0


def test_records_of_archives_lead_nowhere(tmp_path: Path, server: Server, bounded: None) -> None:
    """Tags of a stranger's archive, in what is restored and while it is written."""
    source = make_tiff(tmp_path / "a.tif", noise(3))
    for number, domain in enumerate(("OVERVIEWS", "overviews")):
        tags = {domain: {"OVERVIEW_FILE": f"/vsicurl/http://{server.host}/{number}"}}
        hostile = dataclasses.replace(
            source, tags={**source.tags, **tags}, band_tags=(tags, *source.band_tags[1:])
        )
        for write, name in ((write_gtiff, "out.tif"), (write_png, "out.png")):
            out = tmp_path / f"{number}{name}"
            write(out, whole(hostile))
            assert not [p for p in tmp_path.glob(f"{out.name}*") if b"/vsicurl" in p.read_bytes()]
            assert read_source(out, "a").width == source.width
    assert server.connections() == 0
