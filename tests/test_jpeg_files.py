"""JPEG frames that are kept as the files that they are: every kind of them, to the byte."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import rasterio
import simplejpeg
import zarr
from conftest import BRIGHTON, Result, Run
from PIL import Image
from test_bombs import checked

import archive_pipeline as ap
from archive_pipeline.codec import jpeg_codec, transcoding
from archive_pipeline.codec.jpeg_codec import JPEGFileCodec, file_of, pixels_of
from archive_pipeline.codec.transcoding import TranscodingError, recompress, reconstruct
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.layout import ArchiveError

EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\x06\0\0\0\x1a\0\0\0\0\0\0\0Maker\0"


def photo(height: int, width: int) -> np.ndarray:
    """Something with colours, edges and noise."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([x % 256, 2 * y % 256, (x + y) % 256], 2)
    noise = np.random.default_rng(0).integers(-20, 20, waves.shape)
    return np.clip(waves + noise, 0, 255).astype(np.uint8)


PHOTO = photo(203, 317)


def jpeg(pixels: np.ndarray = PHOTO, mode: str = "RGB", **options: Any) -> bytes:
    coded = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(coded, "JPEG", **options)
    return coded.getvalue()


def segment(code: int, payload: bytes) -> bytes:
    return bytes([0xFF, code]) + (len(payload) + 2).to_bytes(2, "big") + payload


def with_segments(data: bytes, *segments: bytes) -> bytes:
    return data[:2] + b"".join(segments) + data[2:]


def mpf(data: bytes, picture: bytes) -> bytes:
    """A JPEG with another picture behind it, which its MPF directory names (CIPA DC-007)."""

    def directory(offset: int) -> bytes:
        entries = struct.pack("<IIIHH", 0x30000, len(data), 0, 0, 0)
        entries += struct.pack("<IIIHH", 0x10000, len(picture), offset, 0, 0)
        number = struct.pack("<HHII", 0xB001, 4, 1, 2)
        table = struct.pack("<HHII", 0xB002, 7, len(entries), 8 + 2 + 24 + 4)
        ifd = struct.pack("<H", 2) + number + table + struct.pack("<I", 0)
        return segment(0xE2, b"MPF\0II*\0\x08\0\0\0" + ifd + entries)

    size = len(directory(0))
    return with_segments(data, directory(len(data) + size - 2 - 8)) + picture


THERMAL = [
    segment(0xE3, np.random.default_rng(n).bytes(60_000)) for n in range(4)
]  # what DJI's and FLIR's segments of 16-bit temperatures are to others
TAKEN: dict[str, Callable[[], bytes]] = {
    "baseline 4:2:0": jpeg,
    "4:4:4": lambda: jpeg(subsampling=0),
    "4:2:2": lambda: jpeg(subsampling=1),
    "4:4:0": lambda: simplejpeg.encode_jpeg(PHOTO, colorsubsampling="440"),
    "progressive": lambda: jpeg(progressive=True),
    "optimised": lambda: jpeg(optimize=True),
    "grey": lambda: jpeg(mode="L"),
    "RGB": lambda: jpeg(keep_rgb=True),
    "restart-marked": lambda: jpeg(restart_marker_blocks=4),
    "restart-marked rows": lambda: jpeg(restart_marker_rows=1),
    "odd-sized": lambda: jpeg(PHOTO[:101, :57]),
    "one pixel": lambda: jpeg(PHOTO[:1, :1]),
    "EXIF, comment": lambda: jpeg(exif=EXIF, comment=b"said"),
    "trailing data": lambda: jpeg() + b"radiometry" * 99,
    "a preview behind it": lambda: mpf(jpeg(), jpeg(PHOTO[::4, ::4])),
    "thermal segments": lambda: with_segments(jpeg(PHOTO[:64, :64]), *THERMAL),
    "fill bytes": lambda: jpeg()[:20] + b"\xff\xff\xff" + jpeg()[20:],
}
AS_THEY_ARE: dict[str, Callable[[], bytes]] = {
    "CMYK": lambda: jpeg(mode="CMYK"),
    "4:1:1": lambda: simplejpeg.encode_jpeg(PHOTO, colorsubsampling="411"),
}
DAMAGED: dict[str, Callable[[], bytes]] = {
    "broken tail": lambda: jpeg()[:-700],
    "no end marker": lambda: jpeg()[:-2],
}


def name_of(kind: str) -> str:
    return f"{kind.replace(':', '').replace(' ', '_')}.JPG"


def ingest(run: Run, folder: Path, url: Path, *more: object) -> Result:
    return run("ingest", folder, "--archive", url, "--workers", 0, "--json", *more)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A flight of every kind of JPEG, and its archive by files; not to be changed."""
    folder = tmp_path_factory.mktemp("jpegs") / "kinds"
    folder.mkdir()
    for kind, make in (TAKEN | AS_THEY_ARE | DAMAGED).items():
        (folder / name_of(kind)).write_bytes(make())
    url = folder.parent / "a.zarr"
    report = ap.ingest(folder, url, workers=0, lossless_jpeg=True, salvage=True)
    assert report.failed == []
    assert {o.codec for o in report.outcomes} == {"jpeg"}
    assert report.over_budget == []
    for outcome in report.outcomes:
        stem = Path(outcome.path).name
        said = " ".join(outcome.warnings)
        assert ("kept as it is" in said) == (stem in map(name_of, AS_THEY_ARE | DAMAGED)), outcome
        assert "not archived" not in said
    return folder, url


def test_every_file_comes_back_to_the_byte(
    run: Run, kept: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, url = kept
    args = ("restore", "--archive", url, "--format", "jpeg", "-o", tmp_path, "--workers", 0)
    assert run(*args).code == 0
    for path in folder.iterdir():
        assert (tmp_path / folder.name / path.name).read_bytes() == path.read_bytes(), path.name
    assert run("check", "--archive", url).code == 0
    assert run(*args).code == run(*args, "--overwrite").code == 0  # the same bytes may stay
    (tmp_path / folder.name / name_of("grey")).write_bytes(jpeg())
    again = run(*args, "--overwrite")
    assert again.code == 3
    assert "never replaced" in again.err


def test_pixels_are_those_of_the_originals(kept: tuple[Path, Path]) -> None:
    """Whole and by windows; for zarr alone, which knows the codec by its entry point."""
    folder, url = kept
    for path in folder.iterdir():
        lenient = path.name in map(name_of, DAMAGED)
        with (
            rasterio.Env(GDAL_ERROR_ON_LIBJPEG_WARNING="NO" if lenient else "YES"),
            rasterio.open(path) as file,
        ):
            expected = np.moveaxis(file.read(), 0, 2)
        pixels = zarr.open(url / "flights" / folder.name / path.name / "pixels")
        np.testing.assert_array_equal(pixels[:], expected)
        np.testing.assert_array_equal(pixels[10:50, 20:40], expected[10:50, 20:40])
        assert pixels.metadata.codecs[0].to_dict()["name"] == "jpeg_file"


def test_what_the_record_has_not_comes_from_the_file(
    run: Run, kept: tuple[Path, Path], tmp_path: Path
) -> None:
    """Thermal segments are stored once, and are in a JPEG of a smaller picture all the same."""
    folder, url = kept
    name = name_of("thermal segments")
    stored = url / "flights" / folder.name / name
    size = sum(path.stat().st_size for path in stored.rglob("*") if path.is_file())
    assert size < (folder / name).stat().st_size + 5000
    args = ("restore", "--archive", url, "--image", name, "-o", tmp_path, "--workers", 0)
    assert run(*args, "--format", "jpeg", "--max-size", 32).code == 0
    smaller = (tmp_path / folder.name / name).read_bytes()
    assert all(one in smaller for one in THERMAL)
    assert Image.open(io.BytesIO(smaller)).size == (32, 32)
    name = name_of("EXIF, comment")
    assert run(*args[:4], name, *args[5:]).code == 0
    with rasterio.open(tmp_path / folder.name / f"{name}.tif") as file:
        assert file.tags()["EXIF_Make"] == "Maker"
        np.testing.assert_array_equal(np.moveaxis(file.read(), 0, 2), rasterio_pixels(PHOTO_EXIF))


PHOTO_EXIF = jpeg(exif=EXIF, comment=b"said")


def rasterio_pixels(data: bytes) -> np.ndarray:
    with rasterio.MemoryFile(data) as memory, memory.open() as file:
        return np.moveaxis(file.read(), 0, 2)


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_flight_of_data_eval_comes_back_to_the_byte(few: bool) -> None:
    if not BRIGHTON.is_dir():
        pytest.skip("no data/eval/brighton_beach beside the project")
    paths = sorted(BRIGHTON.iterdir())
    for path in paths[-1:] if few else paths:
        data = path.read_bytes()
        stream = recompress(data, 4000 * 2250)
        assert reconstruct(stream, len(data), 4000 * 2250) == data
        assert 0.78 < len(stream) / len(data) < 0.85


# ------------------------------------------------------------------ choosing


def test_only_named_frames_are_kept(run: Run, own_flight: Path, tmp_path: Path) -> None:
    url = tmp_path / "a.zarr"
    first = ingest(run, own_flight, url, "--ratio", 16).json
    assert {i["codec"] for i in first["images"]} == {"pcdc"}
    told = ingest(run, own_flight, url, "--lossless-jpeg", "--image", "DJI_0002.JPG")
    assert told.code == 3
    assert "use --overwrite" in told.json["failed"][0]["error"]
    args = ("--lossless-jpeg", "--image", "DJI_0002.JPG", "--overwrite")
    report = ingest(run, own_flight, url, *args).json
    assert (report["ingested"], report["skipped"]) == (1, 2)
    codecs = {entry.id: entry.record["codec"] for entry in Archive.open(url).images()}
    assert codecs == {"DJI_0001.JPG": "pcdc", "DJI_0002.JPG": "jpeg", "DJI_0003.JPG": "pcdc"}
    assert run("check", "--archive", url).code == 0
    image = ap.open(url)["DJI_0002.JPG"]
    assert image.lossless
    assert image.original() == (own_flight / "DJI_0002.JPG").read_bytes()
    assert image.transform is not None
    assert ap.open(url)["DJI_0001.JPG"].original() is None
    again = ingest(run, own_flight, url, "--lossless-jpeg", "--image", "DJI_0002.JPG").json
    assert (again["ingested"], again["skipped"], again["failed"]) == (0, 3, [])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--image", "DJI_0001.JPG"], "needs --lossless-jpeg"),
        (["--lossless-jpeg", "--image", "DJI_001.JPG"], "did you mean DJI_0001.JPG?"),
        (["--lossless-jpeg", "--image", "a.png"], "no JPEG"),
    ],
)
def test_names_that_make_no_sense(
    run: Run, own_flight: Path, tmp_path: Path, args: list[str], said: str
) -> None:
    Image.fromarray(PHOTO).save(own_flight / "a.png")
    result = ingest(run, own_flight, tmp_path / "a.zarr", *args)
    assert result.code == 2
    assert said in result.err
    assert not (tmp_path / "a.zarr").exists()


def test_what_is_no_jpeg_is_told(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    Image.fromarray(PHOTO).save(folder / "a.png")
    (folder / "b.jpg").write_bytes(jpeg())
    Image.fromarray(PHOTO[::-1]).save(folder / "c.jpg", "PNG")
    report = ingest(run, folder, tmp_path / "a.zarr", "--lossless-jpeg").json
    codecs = {i["id"]: i["codec"] for i in report["images"]}
    assert codecs == {"a.png": "pcdc", "b.jpg": "jpeg", "c.jpg": None}
    warnings = {i["id"]: i["warnings"] for i in report["images"]}
    assert "no JPEG: its pixels are coded lossily" in warnings["a.png"]
    assert not any("no JPEG" in warning for warning in warnings["b.jpg"])
    (one,) = report["failed"]
    assert one["path"].endswith("c.jpg")
    assert "no JPEG" in one["error"]


def test_a_damaged_file_fails_unless_it_is_salvaged(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    data = jpeg()
    middle = len(data) // 2
    (folder / "a.jpg").write_bytes(data[:middle] + b"\xff\xd9" + data[middle:])
    (folder / "b.jpg").write_bytes(data)
    report = ingest(run, folder, tmp_path / "a.zarr", "--lossless-jpeg").json
    assert [one["path"][-5:] for one in report["failed"]] == ["a.jpg"]


def test_no_frame_grows(run: Run, tmp_path: Path) -> None:
    """Frames without a budget are kept as files, unasked, where their pixels would take more."""
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "grey.jpg").write_bytes(jpeg(photo(400, 500), "L", quality=80))
    thermal = with_segments(jpeg(photo(256, 320), "L", quality=60), *THERMAL)
    (folder / "thermal.jpg").write_bytes(thermal)
    flat = jpeg(np.full((256, 256, 3), 90, np.uint8), "L")
    (folder / "flat.jpg").write_bytes(flat + bytes(4000))
    report = ingest(run, folder, tmp_path / "a.zarr").json
    codecs = {i["id"]: i["codec"] for i in report["images"]}
    assert codecs == {"flat.jpg": "lossless", "grey.jpg": "jpeg", "thermal.jpg": "jpeg"}
    for image in report["images"]:
        assert image["archive_bytes"] < image["source_bytes"] + 4000
    images = ap.open(tmp_path / "a.zarr")
    for name in ("grey.jpg", "thermal.jpg"):
        assert images[name].original() == (folder / name).read_bytes()
    assert report["over_budget"] == []
    # as they are, so that any install reads them
    stored = tmp_path / "a.zarr/flights/f/grey.jpg/pixels/c/0/0/0"
    assert stored.read_bytes()[:-4] == (folder / "grey.jpg").read_bytes()


# ---------------------------------------------------------------------- hostile


def image_of(url: Path, name: str) -> ArchivedImage:
    archive = Archive.open(url)
    (entry,) = [e for e in archive.images() if e.id == name]
    return ArchivedImage(archive, entry)


@pytest.fixture
def own(tmp_path: Path, run: Run) -> Path:
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg())
    url = tmp_path / "own.zarr"
    assert ingest(run, folder, url, "--lossless-jpeg").code == 0
    return url


def boxes(data: bytes) -> dict[bytes, bytes]:
    """The boxes of a JPEG XL file."""
    found, at = {}, 0
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        found[data[at + 4 : at + 8]] = data[at + 8 : at + (size or len(data))]
        at += size or len(data)
    return found


def box(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data) + 8) + name + data


def huge_frame(jbrd: bytes, side: int) -> bytes:
    """A JPEG XL file of 16 x 16 pixels whose only frame is said to be much larger."""
    bits: list[int] = []

    def put(*fields: tuple[int, int]) -> None:
        for width, value in fields:
            bits.extend(value >> n & 1 for n in range(width))

    def pad() -> None:
        put((-len(bits) % 8, 0))

    put((8, 0xFF), (8, 0x0A), (1, 1), (5, 1), (3, 1))  # signature, 16 x 16
    # image metadata: not XYB, sRGB, no extra channels
    put((1, 0), (1, 0), (1, 0), (2, 0), (1, 1), (2, 0), (1, 0), (1, 1), (2, 0), (1, 1))
    pad()
    # frame header: regular, VarDCT, YCbCr, cropped to this place and size
    put((1, 0), (2, 0), (1, 0), (2, 0), (1, 1), (6, 0), (2, 0), (2, 0), (1, 1))
    put((2, 0), (8, 0), (2, 0), (8, 0), (2, 3), (30, side - 18688), (2, 3), (30, side - 18688))
    put((2, 0), (2, 0), (1, 1), (2, 0), (1, 0), (1, 0), (2, 0), (2, 0), (2, 0), (1, 0))
    pad()
    entries = 2 + (-(-side // 256)) ** 2 + (-(-side // 2048)) ** 2
    put(*[(12, 0)] * entries)
    pad()
    stream = np.packbits(bits, bitorder="little").tobytes() + bytes(1000)
    head = transcoding.JXL_SIGNATURE + box(b"ftyp", b"jxl \0\0\0\0jxl ")
    return head + box(b"jbrd", jbrd) + box(b"jxlc", stream)


def test_a_stream_that_says_little_and_takes_much() -> None:
    """11 kB for which libjxl takes more than 2 GB, if it may."""
    jbrd = boxes(recompress(jpeg(subsampling=0), PHOTO[..., 0].size))[b"jbrd"]
    bomb = huge_frame(jbrd, 20_000)
    assert len(bomb) < 12_000
    code = (
        "import resource, sys; from archive_pipeline.codec.transcoding import *\n"
        "try: reconstruct(sys.stdin.buffer.read(), 12112, 203 * 317)\n"
        "except TranscodingError as error: print(error)\n"
        "import archive_pipeline.codec.transcoding as t; t._close_all()\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=bomb, capture_output=True, check=True)
    *said, megabytes = done.stdout.decode().splitlines()
    assert len(said) == 1
    if sys.platform == "linux":
        assert int(megabytes) < 400
    # and the next request is answered as ever
    assert reconstruct(recompress(jpeg(), 99_999), len(jpeg()), 99_999) == jpeg()


def altered(data: bytes, kind: str) -> bytes:
    """A chunk that is not what the array says."""
    larger = jpeg(photo(400, 600))
    return {
        "truncated": data[: len(data) // 2],
        "no JPEG": bytes(9999),
        "empty": b"",
        "another size": recompress(larger, 240_000),
        "another file": larger,
        "a cut file": jpeg()[: len(jpeg()) // 2],
        "other pixels": imagecodecs.jpegxl_encode(PHOTO, usecontainer=True),
        "of one byte": b"\xff",
    }[kind]


@pytest.mark.parametrize("kind", ["truncated", "no JPEG", "empty", "another size", "another file",
                                  "a cut file", "other pixels", "of one byte"])  # fmt: skip
def test_a_chunk_that_is_something_else(own: Path, run: Run, kind: str) -> None:
    image = image_of(own, "a.jpg")
    path = own / image.entry.key / "pixels/c/0/0/0"
    path.write_bytes(checked(altered(path.read_bytes()[:-4], kind)))
    for read in (lambda: image.read((0, 0, 9, 9)), image.original):
        with pytest.raises(ArchiveError, match=r"^f/a\.jpg: pixels is damaged: ") as told:
            read()
        assert len(str(told.value).splitlines()) == 1
    result = run("check", "--archive", own)
    assert result.code == 1
    assert "Traceback" not in result.out + result.err


def test_one_byte_that_changed(own: Path, run: Run) -> None:
    image = image_of(own, "a.jpg")
    path = own / image.entry.key / "pixels/c/0/0/0"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArchiveError, match="pixels is damaged"):
        image.read((0, 0, 9, 9))
    with pytest.raises(ArchiveError, match="pixels is damaged"):
        image.original()


def test_another_jpeg_of_the_same_size_and_length_is_not_the_original(own: Path, run: Run) -> None:
    image = image_of(own, "a.jpg")
    path = own / image.entry.key / "pixels/c/0/0/0"
    data = bytearray(jpeg())
    data[14] ^= 1  # of its density
    path.write_bytes(checked(bytes(data)))
    with pytest.raises(ArchiveError, match="not the original"):
        image.original()
    result = run("check", "--archive", own)
    assert result.code == 1
    assert "not the original" in result.out + result.err


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("codecs", 0, "configuration", "bytes"), 1 << 40),
        (("codecs", 0, "configuration", "bytes"), "12"),
        (("codecs", 0, "configuration", "salvaged"), 1),
        (("codecs", 0, "configuration", "more"), 1),
        (("shape",), [1 << 20, 1 << 20, 3]),
        (("data_type",), "uint16"),
        (("chunk_grid", "configuration", "chunk_shape"), [100, 100, 3]),
    ],
)
def test_metadata_that_are_not_ingests(own: Path, place: tuple[Any, ...], value: Any) -> None:
    image = image_of(own, "a.jpg")
    path = own / image.entry.key / "pixels/zarr.json"
    content = json.loads(path.read_text())
    part = content
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ArchiveError, match=r"^f/a\.jpg: pixels is damaged: "):
        image.read((0, 0, 9, 9))


def test_random_streams_end_in_an_error_or_the_file(own: Path) -> None:
    stream = recompress(jpeg(), PHOTO[..., 0].size)
    random = np.random.default_rng(1)
    for _ in range(40):
        data = bytearray(stream)
        for at in random.integers(0, len(data), random.integers(1, 4)):
            data[at] = random.integers(256)
        with suppress(ValueError):  # a stream that still gives some file of this size
            pixels_of(file_of(bytes(data), len(jpeg()), PHOTO[..., 0].size), PHOTO.shape, False)


def test_libjxl_that_crashes_takes_nothing_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcoding, "_PIXEL_BYTES", {b"e": 0, b"d": 0})
    monkeypatch.setattr(transcoding, "_BASE_BYTES", 0)
    monkeypatch.setattr(transcoding, "_DATA_TIMES", 0)
    transcoding._close_all()
    if sys.platform == "linux":  # without memory it ends in one way or the other
        with pytest.raises(TranscodingError):
            recompress(jpeg(photo(1500, 1500)), 2_250_000)
    monkeypatch.undo()
    assert reconstruct(recompress(jpeg(), 99_999), len(jpeg()), 99_999) == jpeg()


def test_frames_of_many_pixels_are_not_recompressed() -> None:
    with pytest.raises(TranscodingError, match="megapixels"):
        recompress(jpeg(), transcoding.MAX_PIXELS + 1)


# ---------------------------------------------------------------- plain readers


def test_windows_of_one_frame_decode_it_once(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    plain = jpeg_codec.pixels_of

    def counted(*args: Any) -> np.ndarray:
        decoded.append(args)
        return plain(*args)

    monkeypatch.setattr(jpeg_codec, "pixels_of", counted)
    monkeypatch.setattr(jpeg_codec, "_frames", jpeg_codec._Frames())
    pixels = zarr.open(own / "flights/f/a.jpg/pixels")
    for row in range(0, 200, 20):
        pixels[row : row + 20]
    assert len(decoded) == 1
    monkeypatch.setattr(jpeg_codec, "KEPT_BYTES", 0)  # the last one is kept in any case
    shutil.copytree(own / "flights/f/a.jpg", own / "flights/f/b.jpg")
    for _ in range(3):
        pixels[:9]
    assert len(decoded) == 1
    assert len(jpeg_codec._frames._kept) == 1


def test_without_imagecodecs_it_is_said_what_to_install(own: Path, tmp_path: Path) -> None:
    """Files that are kept as they are need nothing; JPEG XL does."""
    code = (
        "import sys; sys.modules['imagecodecs'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "import archive_pipeline.errors as e\n"
        "e.find_spec = lambda name: None if name == 'imagecodecs' else find(name)\n"
        "from archive_pipeline.commands.cli import main; main()"
    )
    args = ["restore", "--archive", str(own), "-o", str(tmp_path / "out"), "--workers", "0"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode != 0
    assert "f/a.jpg: " in done.stderr
    assert "pip install 'archive-pipeline[jpegxl]'" in done.stderr
    assert "Traceback" not in done.stderr
    path = own / "flights/f/a.jpg/pixels/c/0/0/0"
    path.write_bytes(checked(jpeg()))
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pixels_cannot_be_written(own: Path) -> None:
    pixels = zarr.open(own / "flights/f/a.jpg/pixels", mode="r+")
    with pytest.raises(ValueError, match="cannot be written"):
        pixels[:] = PHOTO
    with pytest.raises(ValueError, match="one chunk"):
        zarr.create_array({}, shape=(64, 64, 3), chunks=(32, 32, 3), dtype="uint8",
                          serializer=JPEGFileCodec(9, False), compressors=None)  # fmt: skip
