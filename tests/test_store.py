"""The archive's layout: names, budgets to the byte, metadata, hostile and odd contents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import BRIGHTON, Run

from archive_pipeline.store.archive import Archive, absolute, in_process_only
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.layout import (
    SHARD_TILES,
    TILE,
    ArchiveError,
    check_flight,
    grid,
    image_key,
    pack_metadata,
    unpack_metadata,
)

NAMES = [
    "plain.jpg",
    "with space.jpg",
    "Ünï çødé 写真.jpg",
    "100%.jpg",
    "a/b.jpg",
    "%2e%2e",
    "..",
    ".",
    ".hidden",
    "__meta",
    "zarr.json",
    "back\\slash",
    "line\nbreak",
    "undecodable \udcff",
    "写" * 80 + ".jpg",
]


def stored_bytes(image: Path) -> int:
    """Bytes on disk of everything below a folder."""
    return sum(p.stat().st_size for p in image.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_one_node(name: str) -> None:
    head, flight, node = image_key("flight", name).split("/")
    assert (head, flight) == ("flights", "flight")
    assert node.isascii()
    assert node.isprintable()
    assert len(node) < 250
    assert not node.startswith((".", "__"))


def test_names_never_collide() -> None:
    names = [*NAMES, *(n.replace("%", "%25") for n in NAMES if "%" in n), "写" * 81 + ".jpg"]
    keys = {image_key("f", name).casefold() for name in names}
    assert len(keys) == len(set(names))


@pytest.mark.parametrize("name", ["", "x" * 300])
def test_flights_that_cannot_be_stored_are_refused(name: str) -> None:
    with pytest.raises(ArchiveError):
        check_flight(name)


def test_urls() -> None:
    assert in_process_only("memory://a.zarr")
    assert in_process_only("simplecache::memory://a.zarr")
    assert not in_process_only("s3://memory/a.zarr")
    assert absolute("s3://bucket/a") == "s3://bucket/a"
    assert Path(absolute("a.zarr")) == Path.cwd() / "a.zarr"


@pytest.mark.parametrize("rows", [1, 9, 17, 57, 300])
@pytest.mark.parametrize("columns", [101, 111, 841])
def test_no_shard_of_a_large_image_is_a_sliver(rows: int, columns: int) -> None:
    shape = (rows * TILE, (columns - 1) * TILE + 1, 3)
    chunks, shards = grid(shape, 1)
    assert chunks[:2] == (TILE, TILE)
    if rows * columns > SHARD_TILES:
        assert all(s % c == 0 and s // c <= 8 for s, c in zip(shards, chunks, strict=True))
        assert shape[1] % shards[1] >= min(TILE, shape[1] // 2) or columns == 841


def test_metadata_round_trip_and_damage(archive: Path) -> None:
    opened = Archive.open(archive)
    entry = next(opened.images())
    source = ArchivedImage(opened, entry).source
    packed = pack_metadata(source)
    assert unpack_metadata(packed) == source
    rng = np.random.default_rng(0)
    for length in rng.integers(0, len(packed), 50):
        with pytest.raises((ValueError, KeyError, TypeError)):
            unpack_metadata(packed[:length])


def test_layout_and_record(archive: Path) -> None:
    for image in sorted((archive / "flights" / "beach").iterdir()):
        if not image.is_dir():
            continue
        record = json.loads((image / "zarr.json").read_text())["attributes"]["archive_pipeline"]
        assert record["archive_bytes"] == stored_bytes(image)
        array = zarr.open_array(image / "pixels", mode="r")
        assert array.chunks == (TILE, TILE, 3)
        assert array.shards == (TILE, 2 * TILE, 3)
    assert len(list((archive / "models").iterdir())) == 1


@pytest.mark.parametrize("ratio", [16, 24, 48])
def test_small_frames_use_their_budget_and_no_more(
    run: Run, flight: Path, tmp_path: Path, ratio: int
) -> None:
    url = tmp_path / "a.zarr"
    result = run("ingest", flight, "--archive", url, "--ratio", ratio, "--workers", 0, "--json")
    assert result.code == 0
    for image in result.json["images"]:
        assert image["codec"] == "pcdc"
        used = stored_bytes(url / "flights" / "beach" / image["id"])
        assert used == image["archive_bytes"]
        budget = image["raw_bytes"] // ratio
        # a few tiles cannot be tuned as finely as a whole frame's
        assert 0.9 * budget <= used <= budget


needs_brighton = pytest.mark.skipif(
    not BRIGHTON.is_dir(), reason=f"the brighton_beach frames are not at {BRIGHTON}"
)


def _check_budget(run: Run, folder: Path, url: Path, ratio: int) -> None:
    result = run("ingest", folder, "--archive", url, "--ratio", ratio, "--json")
    assert result.code == 0, result.err
    for image in result.json["images"]:
        used = stored_bytes(url / "flights" / folder.name / image["id"])
        assert 0.97 * image["raw_bytes"] / ratio <= used <= image["raw_bytes"] / ratio


@needs_brighton
@pytest.mark.parametrize("ratio", [24, pytest.param(160, marks=pytest.mark.slow)])
def test_budget_of_a_real_frame(run: Run, tmp_path: Path, ratio: int) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "DJI_0018.JPG").symlink_to(BRIGHTON / "DJI_0018.JPG")
    _check_budget(run, folder, tmp_path / "a.zarr", ratio)


@needs_brighton
@pytest.mark.slow
@pytest.mark.parametrize("ratio", [24, 48, 96, 160])
def test_budget_of_a_real_flight(run: Run, tmp_path: Path, ratio: int) -> None:
    _check_budget(run, BRIGHTON, tmp_path / "a.zarr", ratio)


def test_budget_modes(run: Run, own_flight: Path, tmp_path: Path) -> None:
    for path in sorted(own_flight.iterdir())[1:]:
        path.unlink()
    for option, value in (("--bpp", 1.5), ("--source-ratio", 4)):
        url = tmp_path / f"{option}.zarr"
        result = run(
            "ingest", own_flight, "--archive", url, option, value, "--workers", 0, "--json"
        )
        assert result.code == 0, result.err
        (image,) = result.json["images"]
        allowed = (
            image["pixels"] * value / 8 if option == "--bpp" else image["source_bytes"] / value
        )
        assert 0.9 * allowed <= image["archive_bytes"] <= allowed


def test_black_margins_stay_within_the_budget(run: Run, tmp_path: Path) -> None:
    import rasterio

    rng = np.random.default_rng(0)
    pixels = np.zeros((3, 1300, 1900), np.uint8)
    pixels[:, :700, :900] = rng.integers(0, 255, (3, 70, 90)).repeat(10, 1).repeat(10, 2)
    folder = tmp_path / "black"
    folder.mkdir()
    profile = {"driver": "GTiff", "width": 1900, "height": 1300, "count": 3, "dtype": "uint8"}
    with rasterio.open(folder / "a.tif", "w", **profile, photometric="RGB") as file:
        file.write(pixels)
    url = tmp_path / "a.zarr"
    result = run("ingest", folder, "--archive", url, "--workers", 0, "--json")
    assert result.code == 0, result.err
    assert result.json["images"][0]["codec"] == "pcdc"
    assert stored_bytes(url / "flights" / "black" / "a.tif") <= pixels.size / 100
    restored = zarr.open_array(url / "flights/black/a.tif/pixels", mode="r")[:]
    assert not np.asarray(restored)[704:].any()  # whole tiles and margins stay black


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "no archive there"),
        (b"{", "not an archive"),
        (b"[" * 100_000, "not an archive"),
        (b'{"zarr_format":3,"node_type":"group","attributes":{}}', "not an archive"),
        (
            b'{"zarr_format":3,"node_type":"group",'
            b'"attributes":{"archive_pipeline":{"format":99}}}',
            "format 99",
        ),
    ],
)
def test_what_is_no_archive(tmp_path: Path, contents: bytes | None, message: str) -> None:
    if contents is not None:
        (tmp_path / "zarr.json").write_bytes(contents)
    with pytest.raises(ArchiveError, match=message):
        Archive.open(tmp_path)
