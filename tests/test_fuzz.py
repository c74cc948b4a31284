"""Hostile bytes: readers of streams, metadata and archives end in their own errors, soon.

Each target is fuzzed by mutations of valid inputs: a bounded number of the same examples in every
run, and under `-m slow` many new ones. Inputs that failed once are kept under `tests/corpus`, by
target, and are tried first.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_flight
from golden import reference as ref
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from archive_pipeline.flight._metadata_blocks import png_blocks, tiff_blocks
from archive_pipeline.flight.camera_tags import read_pose
from archive_pipeline.flight.jpeg_segments import (
    MAX_PAYLOAD,
    blank_thumbnail,
    fill_thumbnail,
    walk,
    write_segments,
)
from archive_pipeline.flight.read import read_source
from archive_pipeline.flight.source_image import EXIF_PREFIX, XMP_PREFIX, SourceError, SourceImage
from archive_pipeline.flight.xmp import read_xmp
from archive_pipeline.geo.camera import locate
from archive_pipeline.jobs.check import check
from archive_pipeline.jobs.info import describe
from archive_pipeline.jobs.ingest import ingest
from archive_pipeline.jobs.ingest_task import Budget, IngestOptions
from archive_pipeline.jobs.restore import restore
from archive_pipeline.jobs.selection import Selection
from archive_pipeline.outputs._documents import exif_tags, set_dimensions
from archive_pipeline.pcdc.bitstream import HEADER_BYTES
from archive_pipeline.pcdc.decoding import Symbols
from archive_pipeline.pcdc.entropy import CorruptStream
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.layout import ArchiveError, pack_metadata, unpack_metadata

CORPUS = Path(__file__).parent / "corpus"
LONG = 20  # times as many examples in a slow run
SIDE = 64  # pixels a side of fuzzed tiles
INTERESTING = [0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]

Target = Callable[[bytes], None]


# ------------------------------------------------------------------------ machinery


def corpus(name: str) -> list[bytes]:
    """Inputs of a target that failed once."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid input with a few bytes changed, cut, doubled, or put in from another one."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        # bytes near the front are the headers that everything depends on
        last = len(data)
        at = min(draw(st.one_of(st.integers(0, 80), st.integers(0, max(last, 1)))), last)
        kind = draw(
            st.sampled_from(["flip", "number", "cut", "drop", "double", "splice", "random"])
        )
        size = draw(st.sampled_from([1, 2, 4, 8]))
        if kind == "flip" and at < last:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "number":
            order = draw(st.sampled_from(["little", "big"]))
            number = draw(st.sampled_from(INTERESTING)) % (1 << 8 * size)
            data[at : at + size] = number.to_bytes(size, order)
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + size]
        elif kind == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        elif kind == "splice":
            other = draw(st.sampled_from(seeds))
            start = draw(st.integers(0, max(len(other) - 1, 0)))
            data[at : at + 64] = other[start : start + 64]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
    return bytes(data)


def one_line(text: object) -> None:
    """What a user is told: something, on one line."""
    assert str(text).strip()
    assert "\n" not in str(text)


def fuzz(target: Target, seeds: list[bytes], examples: int, long: bool) -> None:
    """Try a target on mutations of valid inputs; only exceptions that it lets out fail."""
    for seed in [*seeds, *corpus(target.__name__)]:
        target(seed)
    found = settings(
        max_examples=examples * (LONG if long else 1),
        derandomize=not long,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    found(given(mutated(seeds))(target))()


lengths = pytest.mark.parametrize(
    "long", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["short", "long"]
)


# ----------------------------------------------------------------------- bitstreams


def decode_stream(data: bytes) -> None:
    codec = ref.tiny_codec()
    data = data[:1] + codec.prefix + data[9:]  # of another model it would not even be looked at
    [symbols] = codec.decode_symbols([data], SIDE, SIDE)
    if isinstance(symbols, CorruptStream):
        return one_line(symbols)
    assert isinstance(symbols, Symbols)
    assert symbols.height <= SIDE
    assert symbols.width <= SIDE
    [pixels] = codec.synthesise([symbols])
    assert pixels.shape == (symbols.height, symbols.width, 3)


@cache
def streams() -> list[bytes]:
    entries = ref.load_golden(ref.STREAMS)["streams"].values()
    found = [base64.b64decode(entry["stream"]) for entry in entries]
    sizes = [struct.unpack_from("<HH", stream, 9) for stream in found]
    return [s for s, size in zip(found, sizes, strict=True) if max(size) <= SIDE]


@lengths
def test_streams(long: bool) -> None:
    assert sum(len(stream) > HEADER_BYTES for stream in streams()) >= 2
    with ref.threads(1):
        fuzz(decode_stream, streams(), 300, long)


# ------------------------------------------------------------------------- metadata


def read_blocks(data: bytes) -> None:
    """EXIF, XMP: the camera's pose, the thumbnail, the tags of outputs."""
    for exif, xmp in ((data, b""), (b"", data), (data, data)):
        pose, captured = read_pose(exif, read_xmp([("XMP", xmp)]))
        assert captured is None or "\n" not in captured
        if pose is not None:
            json.dumps(pose.to_json(), allow_nan=False)
            for elevation in (None, 10.0):
                georef, _ = locate(pose, 720, 304, elevation)
                json.dumps(georef.to_json(), allow_nan=False)
    segment = EXIF_PREFIX + data.removeprefix(EXIF_PREFIX)
    blank, place = blank_thumbnail(segment)
    assert len(blank) == len(segment)
    filled = fill_thumbnail(blank, np.zeros((30, 40, 3), np.uint8))
    assert len(filled) == len(segment)
    if place is None:
        assert blank == segment
    assert len(set_dimensions(segment, 7, 8)) == len(segment)
    assert all(key.startswith("EXIF_") for key in exif_tags(data))


@cache
def frame() -> bytes:
    """A small frame with EXIF, a thumbnail and XMP."""
    with tempfile.TemporaryDirectory() as folder:
        first, *_ = make_flight(Path(folder), 1, 96, 64, 3)
        return first.read_bytes()


@cache
def blocks() -> list[bytes]:
    found = [payload for name, payload in walk(frame()).segments if name == "APP1"]
    prefixes = (EXIF_PREFIX, XMP_PREFIX)
    found = [p.removeprefix(x) for p in found for x in prefixes if p.startswith(x)]
    assert len(found) == 2
    return found


@lengths
def test_camera_metadata(long: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz(read_blocks, blocks(), 150, long)


def walk_jpeg(data: bytes) -> None:
    try:
        layout = walk(data)
    except ValueError as error:
        return one_line(error)
    assert layout.end is None or layout.end <= len(data)
    assert sum(len(payload) for _, payload in layout.segments) <= len(data)
    assert all(len(payload) <= MAX_PAYLOAD for _, payload in layout.segments)
    coded = io.BytesIO()
    Image.new("RGB", (8, 8)).save(coded, "JPEG")
    again = walk(write_segments(coded.getvalue(), layout.segments))
    assert again.end is not None


@lengths
def test_jpeg_segments(long: bool) -> None:
    fuzz(walk_jpeg, [frame()], 200, long)


def read_file(suffix: str) -> Target:
    """Everything that ingest reads of a file but its pixels, and its way into an archive."""

    def target(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a" + suffix)
            path.write_bytes(data)
            if suffix == ".tif":
                assert all(len(p) <= len(data) + 4096 for _, p in tiff_blocks(path))
            else:
                try:
                    png_blocks(path)
                except ValueError as error:
                    one_line(error)
            try:
                source = read_source(path, path.name)
            except SourceError as error:
                return one_line(error.reason)
        back = unpack_metadata(pack_metadata(source))
        kept = replace(source, left_out=())  # what is not archived, the archive cannot tell
        assert repr(back) == repr(kept)  # NaN differs from NaN
        json.dumps(source.to_json(), allow_nan=False)

    target.__name__ = f"read_{suffix[1:]}"
    return target


@cache
def rasters() -> dict[str, list[bytes]]:
    """Small files of three formats with metadata."""
    import rasterio

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (64, 96, 3), np.uint8)
    exif = blocks()[0]
    png = io.BytesIO()
    Image.fromarray(pixels[:16, :16]).save(png, "PNG", exif=EXIF_PREFIX + exif)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.tif")
        profile = {"driver": "GTiff", "width": 96, "height": 64, "count": 3, "dtype": "uint8"}
        place = rasterio.Affine(0.1, 0, 300_000, 0, -0.1, 3_240_000)
        with rasterio.open(
            path, "w", **profile, crs="EPSG:32615", transform=place, compress="DEFLATE"
        ) as out:
            out.write(np.moveaxis(pixels, 2, 0))
            out.update_tags(NOTE="fuzzed")
        tiff = path.read_bytes()
        other = Path(folder, "b.tif")
        Image.fromarray(pixels[:8, :8]).save(other, exif=EXIF_PREFIX + exif)
        longer = png.getvalue() + b"x"
        return {
            ".jpg": [frame()],
            ".png": [png.getvalue(), longer],
            ".tif": [tiff, other.read_bytes()],
        }


@lengths
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_source_files(suffix: str, long: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz(read_file(suffix), rasters()[suffix], 60, long)


@pytest.mark.parametrize("offset", [2**62, 2**63, 2**64 - 1])
def test_offsets_beyond_any_file(offset: int) -> None:
    """Of a BigTIFF's directory, and of a document in it."""
    head = b"II+\0\x08\0\0\0"
    entry = struct.pack("<QHHQQ", 1, 700, 1, 100, offset)
    for data in (struct.pack("<8sQ", head, offset), struct.pack("<8sQ", head, 16) + entry):
        read_file(".tif")(data)


def unpack(data: bytes) -> None:
    try:
        source = unpack_metadata(data)
    except (ValueError, KeyError, TypeError):
        return
    assert isinstance(source, SourceImage)


@lengths
def test_packed_metadata(long: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jpg")
        path.write_bytes(frame())
        packed = pack_metadata(read_source(path, "a.jpg"))
    fuzz(unpack, [packed], 200, long)


# ------------------------------------------------------------------------- archives

JUNK = st.one_of(
    st.sampled_from(
        [
            None, True, 0, -1, 1, 2**31, 2**63, 10**30, 1e308, -0.5, float("nan"), "", "..", "/",
            "../../..", "/etc/passwd", "pcdc", "zstd", "uint8", "float64", "line\nbreak", "\udcff",
            "写", [], {}, [[]], [1], [0, 0, 0], [2**40] * 3, [-1, 1, 3], [1, 1, 3], [4096] * 3,
            {"name": "pcdc"}, {"name": "gzip", "configuration": {"level": 99}},
            {"name": "sharding_indexed", "configuration": {}}, {"name": "transpose"},
            {"name": "regular", "configuration": {"chunk_shape": [1, 1, 1]}},
        ]
    ),
    st.text(max_size=20),
    st.integers(-(2**70), 2**70),
    st.floats(),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
    return [path, *(p for key, inner in items for p in places(inner, (*path, key)))]


@st.composite
def altered(draw: st.DrawFn, content: Any) -> Any:
    """A JSON document with some of its values replaced, removed or moved."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(content)))
        if not path:
            continue
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(["junk", "junk", "remove", "swap", "repeat"]))
        if kind == "remove":
            del parent[path[-1]]
        elif kind == "swap":
            source = content
            for key in draw(st.sampled_from(places(content))):
                source = source[key]
            parent[path[-1]] = copy.deepcopy(source)
        elif kind == "repeat" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        else:
            parent[path[-1]] = copy.deepcopy(draw(JUNK))
    return content


def read_archive(url: Path, out: Path) -> None:
    """Everything that commands do with an archive ends in its own errors, inside `out`."""
    try:
        result = describe(str(url))
        json.dumps(result)
        report = check(str(url))
        for problem in report.problems:
            one_line(problem)
        window = Selection(bbox=(-94.7965, 29.284, -94.796, 29.2845))
        for selection in (Selection(images=("DJI_0001.JPG",)), window):
            try:
                restored = restore(str(url), selection, out, overwrite=True, workers=0)
            except ArchiveError:
                continue
            for file in restored.files:
                assert out.resolve() in Path(file["path"]).resolve().parents
    except ArchiveError as error:
        one_line(error)


KEYS = [
    "zarr.json",
    "flights/beach/zarr.json",
    "flights/beach/DJI_0001.JPG/zarr.json",
    "flights/beach/DJI_0001.JPG/pixels/zarr.json",
    "flights/beach/DJI_0001.JPG/metadata/zarr.json",
]


@pytest.fixture(scope="module")
def tiny_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One frame of a single tile, by pcdc: it is read for every example."""
    folder = tmp_path_factory.mktemp("tiny") / "beach"
    *others, _ = make_flight(folder, 1, 96, 64, 3)[::-1]
    for path in others:
        path.unlink()
    options = IngestOptions(Budget(ratio=2))
    ingest(str(folder.parent / "a.zarr"), [("beach", folder)], options, workers=0)
    (entry,) = Archive.open(folder.parent / "a.zarr").images()
    assert entry.record["codec"] == "pcdc"
    return folder.parent / "a.zarr"


@lengths
@pytest.mark.parametrize("key", KEYS)
def test_archives(tiny_archive: Path, tmp_path: Path, key: str, long: bool) -> None:
    url = Path(shutil.copytree(tiny_archive, tmp_path / "own.zarr"))
    path = url / key
    original = json.loads(path.read_text())

    def target(content: Any) -> None:
        path.write_text(json.dumps(content))
        read_archive(url, tmp_path / "out")

    for kept in corpus(f"archive-{path.parent.name}"):
        target(json.loads(kept))
    found = settings(
        max_examples=15 * (LONG if long else 1),
        derandomize=not long,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    found(given(altered(original))(target))()
