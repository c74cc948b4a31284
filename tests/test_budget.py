"""The byte budget of an image: kept, or named with its excess; nothing grows in silence."""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import zarr
from click.testing import CliRunner
from conftest import Run
from golden import reference as ref
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from archive_pipeline.codec.models import codec_for
from archive_pipeline.codec.zarr_codec import trimmed_tiles
from archive_pipeline.commands.cli import main
from archive_pipeline.flight.pixels import SourcePixels
from archive_pipeline.flight.read import read_pixels, read_source
from archive_pipeline.geo.georef import Window
from archive_pipeline.jobs import ingest_image
from archive_pipeline.pcdc.encoding import encode_tiles
from archive_pipeline.store import layout
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.layout import TILE, ImageEntry


def photo(height: int, width: int, seed: int = 1) -> Image.Image:
    return Image.fromarray(ref.texture(height, width, seed))


def jpeg(image: Image.Image, metadata: int = 0) -> bytes:
    """A JPEG with a segment of so many random bytes, which no compression makes smaller."""
    coded = io.BytesIO()
    image.save(coded, "JPEG", quality=90)
    data, segment = coded.getvalue(), b"Other\0" + np.random.default_rng(0).bytes(metadata)
    if not metadata:
        return data
    return data[:2] + b"\xff\xe7" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]


def ingest(run: Run, folder: Path, url: Path, *more: object) -> dict[str, Any]:
    result = run("ingest", folder, "--archive", url, "--workers", 0, "--json", *more)
    assert result.code == 0, result.err
    report: dict[str, Any] = result.json
    return report


def on_disk(url: Path, entry: ImageEntry) -> int:
    return sum(map(len, files(url / entry.key).values()))


def files(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check_promises(url: Path, report: dict[str, Any], budget: int, source: Path) -> str:
    """Check one image against all that is promised of its bytes; returns its codec."""
    archive = Archive.open(url)
    (entry,) = [e for e in archive.images() if e.id == source.name]
    taken, allowed = entry.record["archive_bytes"], min(budget, source.stat().st_size)
    assert on_disk(url, entry) == taken
    over = [one for one in report["over_budget"] if one["image"] == entry.id]
    pixels, _ = read_pixels(read_source(source, "x"))
    image = ArchivedImage(archive, entry)
    if taken <= allowed:
        assert over == []
    else:
        (told,) = over
        assert told["path"] == str(source)
        assert told["budget_bytes"] == allowed
        assert told["archive_bytes"] == taken
        assert told["excess_bytes"] == taken - allowed
        assert "metadata" in told["reason"]
    if entry.record["codec"] == "lossless":
        np.testing.assert_array_equal(image.read((0, 0, *pixels.shape[1::-1])), pixels)
        return "lossless"
    if entry.record["codec"] == "jpeg":  # whatever was coded of it took more
        assert image.original() == source.read_bytes()
        return "jpeg"
    (shard,) = (url / entry.key / "pixels" / "c").rglob("0/0/0")
    if taken > allowed:  # then nothing smaller can be had
        tiles = [tile for _, _, tile in trimmed_tiles(pixels, TILE)]
        coarsest = encode_tiles(codec_for(entry.record["model"]), tiles, 0, strict=False)
        assert shard.stat().st_size == sum(map(len, coarsest)) + 20 * len(tiles) + 4
    # its bits a pixel are enough to write it again, with zarr alone
    keep = {"array.write_empty_chunks": True}
    with tempfile.TemporaryDirectory() as folder, zarr.config.set(keep):
        copy = shutil.copytree(url / entry.key / "pixels", Path(folder, "pixels"))
        zarr.open_array(copy)[:] = pixels
        assert (copy / "c" / "0" / "0" / "0").stat().st_size <= shard.stat().st_size
    return "pcdc"


@pytest.mark.parametrize(
    ("size", "metadata", "ratio", "kept"),
    [
        ((750, 1000), 20_000, 60, True),
        ((200, 300), 0, 48, True),
        ((200, 300), 0, 160, False),
        ((200, 300), 10_000, 48, False),
        ((300, 400), 0, 10_000, False),
        ((200, 300), 0, 1, True),
    ],
)
def test_small_budgets(
    run: Run, tmp_path: Path, size: tuple[int, int], metadata: int, ratio: int, kept: bool
) -> None:
    folder, url = tmp_path / "f", tmp_path / "a.zarr"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg(photo(*size), metadata))
    report = ingest(run, folder, url, "--ratio", ratio)
    budget = size[0] * size[1] * 3 // ratio
    assert check_promises(url, report, budget, folder / "a.jpg") == "pcdc"
    assert (report["over_budget"] == []) == kept
    if not kept:  # no more than what cannot be left out
        assert report["archive_bytes"] <= max(2 * budget, metadata + 4000)
    assert run("check", "--archive", url).code == 0


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ref.write_model(tmp_path_factory.mktemp("models") / "tiny")


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 120)),
    ratio=st.floats(1, 10_000),
    metadata=st.sampled_from([0, 50, 3000]),
    kind=st.sampled_from(["photo", "flat", "black", "noise"]),
    allocation=st.sampled_from(["uniform", "greedy"]),
)
def test_any_budget_is_kept_or_named(
    tiny_model: Path, run: Run, tmp_path: Path, size: tuple[int, int], ratio: float,
    metadata: int, kind: str, allocation: str,
) -> None:  # fmt: skip
    folder, url = tmp_path / "f", tmp_path / "a.zarr"
    for path in (folder, url):
        shutil.rmtree(path, ignore_errors=True)
    folder.mkdir()
    makers = {"photo": ref.texture, "noise": ref.noise}
    if kind in makers:
        (folder / "a.jpg").write_bytes(jpeg(Image.fromarray(makers[kind](*size, 1)), metadata))
    else:
        Image.new("RGB", size[::-1], 130 if kind == "flat" else 0).save(folder / "a.png")
    more = ("--ratio", ratio, "--model", tiny_model, "--allocation", allocation)
    report = ingest(run, folder, url, *more)
    (source,) = folder.iterdir()
    check_promises(url, report, int(size[0] * size[1] * 3 / ratio), source)


def test_what_cannot_be_smaller_than_its_file(run: Run, tmp_path: Path) -> None:
    """A PNG of a few bytes: its record alone takes more; the pixels take what is least."""
    folder, url = tmp_path / "f", tmp_path / "a.zarr"
    folder.mkdir()
    photo(1, 1).save(folder / "pixel.png")
    Image.new("RGB", (400, 300), (90, 120, 60)).save(folder / "flat.png")
    report = ingest(run, folder, url, "--ratio", 1)
    codecs = {}
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            budget = image.width * image.height * 3
        codecs[path.name] = check_promises(url, report, budget, path)
    assert len(report["over_budget"]) == 2
    assert all("record" in one["reason"] for one in report["over_budget"])
    assert codecs["flat.png"] == "pcdc"


def test_a_mask_larger_than_the_budget(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    folder, url = tmp_path / "f", tmp_path / "a.zarr"
    folder.mkdir()
    image = photo(120, 160).convert("RGBA")
    noise = np.random.default_rng(0).integers(0, 256, (120, 160), np.uint8)
    image.putalpha(Image.fromarray(noise))
    image.save(folder / "a.png")
    report = ingest(run, folder, url, "--ratio", 60, "--model", tiny_model)
    (over,) = report["over_budget"]
    assert over["reason"].startswith("bytes of mask 2")
    assert over["excess_bytes"] > 120 * 160 * 0.9
    check_promises(url, report, 120 * 160 * 3 // 60, folder / "a.png")


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_what_is_lossless_by_contract_has_no_budget(run: Run, tmp_path: Path) -> None:
    folder, url = tmp_path / "f", tmp_path / "a.zarr"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 60_000, (64, 64), np.uint16)
    form = {"driver": "GTiff", "width": 64, "height": 64, "count": 1, "dtype": "uint16"}
    with rasterio.open(folder / "a.tif", "w", **form) as out:
        out.write(noise, 1)
    report = ingest(run, folder, url, "--ratio", 1000)
    assert report["over_budget"] == []
    assert report["images"][0]["codec"] == "lossless"


def test_a_broken_promise_is_told_even_when_quiet(
    run: Run, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    for seed, name in enumerate(("a.jpg", "b.jpg")):  # of the same bytes one would be skipped
        (folder / name).write_bytes(jpeg(photo(100, 100, seed), 5000))
    args = ("ingest", folder, "--workers", 0, "--ratio", 100, "--model", tiny_model)
    quiet = run(*args, "--archive", tmp_path / "a.zarr", "-q")
    assert (quiet.code, quiet.err) == (0, "")
    (line,) = [line for line in quiet.out.splitlines() if "over budget" in line]
    assert "2 images, by " in line
    told = run(*args, "--archive", tmp_path / "b.zarr")
    assert told.code == 0
    lines = [line for line in told.err.splitlines() if line.startswith("Over budget: ")]
    assert [Path(line.split(": ")[1]).name for line in lines] == ["a.jpg", "b.jpg"]
    assert all("may take 300: bytes of metadata 6" in line for line in lines)


def test_overwriting_keeps_the_promises(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    """Metadata of an image that replaces another stand elsewhere until it is committed."""
    folder, url = tmp_path / "f", tmp_path / "a.zarr"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg(photo(90, 120)))
    args = ("--ratio", 200, "--model", tiny_model)
    first = ingest(run, folder, url, *args)
    pixels = Path("flights", "f", "a.jpg", "pixels", "zarr.json")
    before = (url / pixels).read_bytes()
    again = ingest(run, folder, url, *args, "--overwrite")
    (entry,) = Archive.open(url).images()
    (over,) = again["over_budget"]
    assert over["archive_bytes"] == entry.record["archive_bytes"] == on_disk(url, entry)
    # but for the generation and the separator of its shards' keys
    assert 0 < over["archive_bytes"] - first["archive_bytes"] < 40
    assert (url / pixels).read_bytes().replace(b'"."', b'"/"') == before
    assert run("check", "--archive", url).code == 0


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SHARD_TILES", 1)


@pytest.mark.usefixtures("small_shards")
def test_shards_share_the_budget_and_their_excess_adds_up(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = tmp_path / "f", tmp_path / "a.zarr"
    folder.mkdir()
    picture = np.array(photo(300, 900))
    picture[:, 700:] = 0
    Image.fromarray(picture).save(folder / "a.png")
    args = ("--ratio", 1500, "--model", tiny_model)
    report = ingest(run, folder, url, *args)
    (entry,) = Archive.open(url).images()
    (over,) = report["over_budget"]
    budget = 300 * 900 * 3 // 1500
    assert over["budget_bytes"] == budget
    assert over["archive_bytes"] == entry.record["archive_bytes"] == on_disk(url, entry)
    assert over["excess_bytes"] == over["archive_bytes"] - budget
    shards = sorted((url / entry.key / "pixels" / "c").rglob("0/*/0"))
    assert len(shards) == 2
    again = zarr.open_array(shutil.copytree(url / entry.key / "pixels", tmp_path / "again"))
    for col in (0, TILE):  # each within the bits that the array names
        again[:, col : col + TILE] = picture[:, col : col + TILE]

    # an ingest that was killed between them goes on, and ends the same
    other, plain = tmp_path / "b.zarr", SourcePixels.read

    def stops(reader: SourcePixels, window: Window) -> Any:
        if list(other.glob("flights/*/*/pixels/c/*/*/*")):
            raise KeyboardInterrupt
        return plain(reader, window)

    with monkeypatch.context() as patch:
        patch.setattr(ingest_image.SourcePixels, "read", stops)
        words = ["ingest", folder, "--archive", other, "--workers", 0, *args]
        assert CliRunner().invoke(main, [str(w) for w in words]).exit_code == 1
    (first,) = other.glob("flights/*/*/pixels/c/*/*/*")
    written = first.stat().st_mtime_ns
    assert (
        ingest(run, folder, other, *args)["over_budget"][0]["excess_bytes"]
        == (over["excess_bytes"])
    )
    assert first.stat().st_mtime_ns == written
    assert files(other / entry.key) == files(url / entry.key)


@pytest.mark.usefixtures("small_shards")
def test_a_large_image_that_is_mostly_empty_has_its_files_bytes_for_the_rest(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tiles are counted, so that what is not black has the file's bytes to itself."""
    folder, url = tmp_path / "f", tmp_path / "a.zarr"
    folder.mkdir()
    form = {"driver": "GTiff", "width": 3 * TILE, "height": TILE, "count": 3, "dtype": "uint8",
            "tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "JPEG",
            "photometric": "YCBCR"}  # fmt: skip
    with rasterio.open(folder / "a.tif", "w", **form) as out:
        out.write(np.moveaxis(ref.texture(256, 512, 1), 2, 0), window=((0, 256), (0, 512)))
    monkeypatch.setattr("archive_pipeline.flight.pixels.HELD_BYTES", 0)
    size = (folder / "a.tif").stat().st_size
    report = ingest(run, folder, url, "--ratio", 1)
    assert report["over_budget"] == []
    assert 0.9 * size < report["archive_bytes"] <= size
