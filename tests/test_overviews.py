"""Overviews: what they show and take, and what is read from them instead of from the pixels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.warp
import zarr
from conftest import Run, make_flight
from numpy.typing import NDArray
from PIL import Image
from rasterio.transform import Affine

import archive_pipeline as ap
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.geo.georef import Georef, Window
from archive_pipeline.jobs._overviews import SHARE, factors_of, reduced
from archive_pipeline.outputs.reduced import Reduced
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.layout import overview_name
from archive_pipeline.store.overview_writer import OverviewWriter

WIDTH, HEIGHT, RATIO = 1400, 900, 16


@pytest.fixture(scope="module")
def frame(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "coast"
    first, *_, ortho = make_flight(folder, 1, WIDTH, HEIGHT, 3)
    ortho.unlink()
    return first


@pytest.fixture(scope="module")
def kept(frame: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of one frame that has an overview; not to be changed."""
    url = tmp_path_factory.mktemp("kept") / "a.zarr"
    report = ap.ingest(frame.parent, archive=url, ratio=RATIO, workers=0)
    assert not report.to_json()["failed"]
    return url


@pytest.fixture
def own(kept: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(kept, tmp_path / "own.zarr"))


def image_of(url: Path) -> ArchivedImage:
    archive = Archive.open(url)
    (entry,) = archive.images()
    return ArchivedImage(archive, entry)


def folder_of(url: Path) -> Path:
    return url / image_of(url).entry.key


def means(pixels: NDArray, factor: int) -> NDArray:
    h, w = (-(-n // factor) for n in pixels.shape[:2])
    return np.array(
        [
            [
                pixels[r * factor : (r + 1) * factor, c * factor : (c + 1) * factor].mean((0, 1))
                for c in range(w)
            ]
            for r in range(h)
        ]
    )


def break_pixels(url: Path) -> None:
    """Damage all that is coded of the image itself."""
    shard = folder_of(url) / "pixels" / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    shard.write_bytes(data)


def test_which_overviews_images_have() -> None:
    assert factors_of(1216, 900) == ()
    assert factors_of(900, 1217) == (8,)
    assert factors_of(5472, 3648) == (8,)
    assert factors_of(30_000, 30_000) == (8, 64)
    assert factors_of(100_000, 100_000) == (64, 512)  # one of an eighth is too large to be made


def test_an_overview_shows_the_image_and_takes_its_share(kept: Path, frame: Path) -> None:
    image = image_of(kept)
    assert image.entry.overviews == (8,)
    shown = image.read_overview(8, (0, 0, 175, 113))
    with Image.open(frame) as original:
        error = shown - means(np.asarray(original), 8)
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 30
    part = image.read_overview(8, (20, 30, 50, 40))
    np.testing.assert_array_equal(part, shown[30:70, 20:70])
    sizes = [p.stat().st_size for p in (folder_of(kept) / "overview_8").rglob("*") if p.is_file()]
    budget = WIDTH * HEIGHT * 3 / RATIO
    assert sum(sizes) <= SHARE * budget
    assert image.entry.record["archive_bytes"] <= budget


def test_the_group_is_a_zarr_multiscale(kept: Path) -> None:
    group = zarr.open_group(folder_of(kept), mode="r")
    attributes = dict(group.attrs)
    assert "d35379db-88df-4056-af3a-620245f8e347" in [
        convention["uuid"] for convention in attributes["zarr_conventions"]  # type: ignore[union-attr, index]
    ]  # fmt: skip
    first, second = attributes["multiscales"]["layout"]  # type: ignore[index, call-overload]
    assert second["derived_from"] == first["asset"]
    scale, shift = second["transform"]["scale"], second["transform"]["translation"]
    full, small = group[first["asset"]], group[second["asset"]]
    assert isinstance(full, zarr.Array)
    assert isinstance(small, zarr.Array)
    assert small.shape == (*(-(-n // int(s)) for n, s in zip(full.shape, scale, strict=False)), 3)
    assert shift == [3.5, 3.5]
    read = np.asarray(small[:])  # by the codec, as any array
    np.testing.assert_array_equal(read, image_of(kept).read_overview(8, (0, 0, 175, 113)))


def test_means_of_valid_pixels_alone() -> None:
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (43, 61, 3), np.uint8)
    mask = rng.choice(np.array([0, 255], np.uint8), (43, 61))
    mask[8:16, 16:24] = 0
    masked = reduced(lambda w: (pixels[w[1] : w[1] + w[3]], mask[w[1] : w[1] + w[3]]), 61, 43, 8)
    plain = reduced(lambda w: (pixels[w[1] : w[1] + w[3]], None), 61, 43, 8)
    assert np.abs(plain - means(pixels, 8)).max() <= 0.51
    valid = mask[..., None] != 0
    sums, counts = means(pixels * valid, 8), means(np.broadcast_to(valid, pixels.shape), 8)
    expected = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    assert np.abs(masked - expected).max() <= 0.51
    assert not masked[1, 2].any()


@pytest.mark.parametrize("most", [170, 100, 40])
def test_smaller_images_come_from_the_overview(
    run: Run, own: Path, kept: Path, tmp_path: Path, most: int
) -> None:
    whole = run("restore", "--archive", kept, "-o", tmp_path / "w", "--workers", 0, "--json").json
    break_pixels(own)
    args = ("restore", "--archive", own, "--workers", 0, "--json")
    found = run(*args, "-o", tmp_path / "s", "--max-size", most)
    assert found.code == 0, found.err
    (file,), (full,) = found.json["files"], whole["files"]
    with rasterio.open(file["path"]) as small, rasterio.open(full["path"]) as large:
        assert (small.width, small.height) == (most, round(most * HEIGHT / WIDTH))
        pixels, picture = small.read(), Image.fromarray(np.moveaxis(large.read(), 0, 2))
        across, down = WIDTH / small.width, HEIGHT / small.height
        assert small.transform.almost_equals(large.transform @ Affine.scale(across, down), 1e-9)
        assert small.crs == large.crs
        assert file["transform"] == pytest.approx(small.transform[:6], abs=1e-9)
        expected = np.asarray(picture.resize((small.width, small.height), Image.Resampling.BOX))
    error = np.moveaxis(pixels, 0, 2).astype(float) - expected
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 30
    # what is finer than the overview needs the pixels
    assert run(*args, "-o", tmp_path / "l", "--max-size", 400).code == 1


def test_a_small_window_of_a_box(run: Run, kept: Path, tmp_path: Path) -> None:
    west, south, east, north = rasterio.warp.transform_bounds(
        "EPSG:32615", "EPSG:4326", *_bounds(kept, (300, 200, 700, 500))
    )
    args = ("restore", "--archive", kept, "--workers", 0, "--json", "--bbox")
    args = (*args, west, south, east, north)
    (full,) = run(*args, "-o", tmp_path / "w").json["files"]
    for form in ("gtiff", "jpeg", "png"):
        small = run(*args, "-o", tmp_path / form, "--max-size", 60, "--format", form)
        assert small.code == 0, small.err
        (file,) = small.json["files"]
        assert file["window"] == full["window"]
        with rasterio.open(file["path"]) as opened:
            assert max(opened.width, opened.height) == 60
            scale = full["window"][2] / opened.width, full["window"][3] / opened.height
            wanted = Affine(*full["transform"]) @ Affine.scale(*scale)
            assert opened.transform.almost_equals(wanted, 1e-6)
    (picture_file,) = (tmp_path / "jpeg").rglob("*.JPG")
    with Image.open(picture_file) as picture:
        exif = picture.getexif().get_ifd(0x8769)
        assert (exif[0xA002], exif[0xA003]) == picture.size


def _bounds(url: Path, window: tuple[int, int, int, int]) -> tuple[float, float, float, float]:
    """Bounds of some pixels' centres in the image's CRS."""
    transform = Affine(*image_of(url).entry.record["georef"]["transform"])
    left, top, width, height = window
    corners = [transform @ (left + x * width, top + y * height) for x in (0, 1) for y in (0, 1)]
    xs, ys = zip(*corners, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def test_a_coarse_mosaic_comes_from_the_overview(
    run: Run, own: Path, kept: Path, tmp_path: Path
) -> None:
    pitch = np.hypot(*image_of(kept).entry.record["georef"]["transform"][0:4:3])
    args = ("restore", "--mosaic", "--json", "--resolution", 9 * pitch)
    (true,) = run(*args, "--archive", kept, "-o", tmp_path / "a").json["files"]
    break_pixels(own)
    found = run(*args, "--archive", own, "-o", tmp_path / "b")
    assert found.code == 0, found.err
    (file,) = found.json["files"]
    assert (file["transform"], file["crs"]) == (true["transform"], true["crs"])
    with rasterio.open(file["path"]) as opened, rasterio.open(true["path"]) as other:
        np.testing.assert_array_equal(opened.read(), other.read())
        assert (opened.dataset_mask() > 0).mean() > 0.5
    # and shows what the pixels show
    shutil.rmtree(folder_of(own))
    shutil.copytree(folder_of(kept), own / image_of(kept).entry.key)
    _set_record(own, overviews=None)
    (slow,) = run(*args, "--archive", own, "-o", tmp_path / "c").json["files"]
    with rasterio.open(file["path"]) as opened, rasterio.open(slow["path"]) as other:
        both = (opened.dataset_mask() > 0) & (other.dataset_mask() > 0)
        error = (opened.read().astype(float) - other.read())[:, both]
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 26


def _set_record(url: Path, **changes: object) -> None:
    path = folder_of(url) / "zarr.json"
    group = json.loads(path.read_text())
    record = group["attributes"]["archive_pipeline"]
    for name, value in changes.items():
        if value is None:
            record.pop(name)
        else:
            record[name] = value
    path.write_text(json.dumps(group))


def test_damage_is_named_and_harms_nothing_else(run: Run, own: Path, tmp_path: Path) -> None:
    name = image_of(own).entry.id
    (shard,) = (p for p in (folder_of(own) / "overview_8").rglob("0") if p.is_file())
    shard.write_bytes(shard.read_bytes()[:-40])
    checked = run("check", "--archive", own)
    assert checked.code == 1
    assert f"{name}: overview_8" in checked.err
    small = run("restore", "--archive", own, "-o", tmp_path / "s", "--max-size", 100)
    assert small.code == 1
    assert f"{name}: overview_8" in small.err
    assert run("restore", "--archive", own, "-o", tmp_path / "w", "--workers", 0).code == 0
    shutil.rmtree(folder_of(own) / "overview_8")
    assert "overview_8 is damaged: its metadata are missing" in run("check", "--archive", own).err


@pytest.mark.parametrize("overviews", [[3], [64, 8], [8, 8], ["8"], [True], 8, {"8": 1}])
def test_records_that_lie(run: Run, own: Path, overviews: object) -> None:
    _set_record(own, overviews=overviews)
    checked = run("check", "--archive", own)
    assert checked.code == 1
    assert "damaged record: overviews" in checked.err


@pytest.mark.parametrize("again", [False, True], ids=["first", "replaced"])
def test_check_gives_overviews_to_images_archived_without(
    run: Run, frame: Path, tmp_path: Path, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = tmp_path / "old.zarr"
    args = ("ingest", frame.parent, "--archive", url, "--ratio", RATIO, "--workers", 0)
    with monkeypatch.context() as patch:  # as releases before overviews did
        patch.setattr("archive_pipeline.jobs.ingest_image.write_overviews", lambda *_: [])
        assert run(*args).code == 0
        if again:
            assert run(*args, "--overwrite").code == 0
    before = image_of(url)
    pixels, size = before.read((0, 0, WIDTH, HEIGHT)), before.entry.record["archive_bytes"]
    assert before.entry.overviews == ()
    verdict = run("check", "--archive", url, "--overviews")
    assert (verdict.code, "it needs --repair" in verdict.err) == (2, True)
    assert image_of(url).entry.overviews == ()
    done = run("check", "--archive", url, "--repair", "--overviews", "--json")
    assert (done.code, done.json["notes"]) == (0, ["overviews were added to 1 images"])
    image = image_of(url)
    assert image.entry.overviews == (8,)
    np.testing.assert_array_equal(image.read((0, 0, WIDTH, HEIGHT)), pixels)
    stored = sum(f.stat().st_size for f in (url / image.entry.key).rglob("*") if f.is_file())
    assert size < image.entry.record["archive_bytes"] == stored <= size * (1 + SHARE) + 400
    expected = reduced(lambda w: (image.read(w), None), WIDTH, HEIGHT, 8)
    small = image.read_overview(8, (0, 0, *expected.shape[1::-1]))
    assert np.square(small.astype(float) - expected).mean() < 100
    group = json.loads((url / image.entry.key / "zarr.json").read_text())["attributes"]
    assert group["multiscales"]["layout"][1]["asset"] == "overview_8"
    assert len(group["zarr_conventions"]) == 3
    clean = run("check", "--archive", url, "--repair", "--overviews", "--json")
    assert (clean.code, clean.json["notes"]) == (0, ["overviews were added to 0 images"])
    assert run(*args, "--overwrite").code == 0
    whole = run("check", "--archive", url, "--json")
    assert (whole.json["problems"], whole.json["leftover_bytes"]) == ([], 0)


def test_overviews_that_were_not_added_are_leftovers(
    run: Run, frame: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = tmp_path / "old.zarr"
    with monkeypatch.context() as patch:
        patch.setattr("archive_pipeline.jobs.ingest_image.write_overviews", lambda *_: [])
        assert run("ingest", frame.parent, "--archive", url, "--workers", 0).code == 0
    record = (url / image_of(url).entry.key / "zarr.json").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OverviewWriter, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            ap.check(url, repair=True, overviews=True)
    assert (url / image_of(url).entry.key / "zarr.json").read_bytes() == record
    left = run("check", "--archive", url, "--json")
    assert (left.code, left.json["problems"]) == (0, [])
    assert left.json["leftover_bytes"] > 0
    done = run("check", "--archive", url, "--repair", "--overviews", "--json")
    assert (done.code, done.json["leftover_bytes"]) == (0, 0)
    assert image_of(url).entry.overviews == (8,)


def test_an_image_that_is_replaced_has_one_set_of_overviews(
    run: Run, frame: Path, tmp_path: Path
) -> None:
    folder, own = tmp_path / "coast", tmp_path / "a.zarr"
    folder.mkdir()
    shutil.copy(frame, folder)
    args = ("ingest", folder, "--archive", own, "--ratio", RATIO, "--workers", 0, "--overwrite")
    assert run(*args).code == 0
    with Image.open(frame) as picture:
        turned = picture.rotate(180)
        turned.save(folder / frame.name, exif=picture.getexif())
    before = image_of(own).read_overview(8, (0, 0, 175, 113))
    done = run(*args, "--json")
    assert (done.code, done.json["ingested"]) == (0, 1), done.err
    checked = run("check", "--archive", own, "--json").json
    assert (checked["problems"], checked["leftover_bytes"]) == ([], 0)
    after = image_of(own).read_overview(8, (0, 0, 175, 113))
    assert np.abs(after.astype(int) - before[::-1, ::-1]).mean() < 12
    # a smaller one in its place has none
    with Image.open(frame) as picture:
        picture.crop((0, 0, 600, 400)).save(folder / frame.name)
    assert run(*args).code == 0
    assert image_of(own).entry.overviews == ()
    assert not (folder_of(own) / "overview_8").exists()
    checked = run("check", "--archive", own, "--json").json
    assert (checked["problems"], checked["leftover_bytes"]) == ([], 0)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_rasters_of_all_kinds_are_made_smaller(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    heights = rng.normal(100, 5, (90, 120)).astype(np.float32)
    heights[:30, :40] = -9999
    classes = np.repeat(np.repeat(rng.integers(0, 4, (9, 12), np.uint8), 10, 0), 10, 1)
    form = {"driver": "GTiff", "width": 120, "height": 90, "crs": "EPSG:32615"}
    form["transform"] = Affine(0.5, 0, 3e5, 0, -0.5, 3e6)
    folder = tmp_path / "f"
    folder.mkdir()
    with rasterio.open(folder / "h.tif", "w", count=1, dtype="float32", nodata=-9999, **form) as f:
        f.write(heights, 1)
    with rasterio.open(folder / "c.tif", "w", count=1, dtype="uint8", **form) as f:
        f.write(classes, 1)
        f.write_colormap(1, {n: (60 * n, 0, 0, 255) for n in range(4)})
    with rasterio.open(folder / "m.tif", "w", count=5, dtype="uint16", **form) as f:
        f.write(bands := rng.integers(0, 60_000, (5, 90, 120), np.uint16))
    url = tmp_path / "a.zarr"
    assert run("ingest", folder, "--archive", url, "--workers", 0).code == 0
    args = ("restore", "--archive", url, "-o", tmp_path / "o", "--max-size", 12, "--workers", 0)
    done = run(*args)
    assert done.code == 0, done.err
    out = tmp_path / "o" / "f"
    with rasterio.open(out / "h.tif") as f:
        made = f.read(1)
        assert (f.shape, f.res, f.nodata) == ((9, 12), (5.0, 5.0), -9999)
    assert (made[:3, :4] == -9999).all()
    np.testing.assert_allclose(made[3:], heights.reshape(9, 10, 12, 10).mean((1, 3))[3:], rtol=1e-5)
    with rasterio.open(out / "c.tif") as f:
        np.testing.assert_array_equal(f.read(1), classes[5::10, 5::10])
        assert f.colormap(1)[3] == (180, 0, 0, 255)
    with rasterio.open(out / "m.tif") as f:
        wanted = bands.reshape(5, 9, 10, 12, 10).mean((2, 4))
        assert np.abs(f.read() - wanted).max() <= 0.51


def test_smaller_pixels_in_python(run: Run, own: Path, tmp_path: Path) -> None:
    import archive_pipeline as ap

    args = ("restore", "--archive", own, "-o", tmp_path, "--max-size", 120, "--workers", 0)
    (file,) = run(*args, "--json").json["files"]
    west, south, east, north = rasterio.warp.transform_bounds(
        "EPSG:32615", "EPSG:4326", *_bounds(own, (300, 200, 700, 500))
    )
    break_pixels(own)
    opened = ap.open(own)
    (image,) = opened.images
    found = image.read(max_size=120)
    with rasterio.open(file["path"]) as written:
        np.testing.assert_array_equal(np.moveaxis(written.read(), 0, 2), found)
        assert written.transform.almost_equals(Affine(*found.transform), 1e-9)
    box = west, south, east, north
    assert max(image.window(box, max_size=40).shape[:2]) == 40
    pitch = float(np.hypot(*image.transform[0:4:3]))
    mosaic = opened.window(box, resolution=10 * pitch)
    assert mosaic.transform[0] == pytest.approx(10 * pitch)
    for size in (0, 1.5, True, "9"):
        with pytest.raises(ap.ArchivePipelineError, match="is not a number of pixels"):
            image.read(max_size=size)


class Slope:
    """A raster whose values say where they are: red rises by columns, green by rows."""

    def __init__(self, width: int, height: int) -> None:
        georef = Georef("EPSG:32615", (2.0, 0.0, 3e5, 0.0, -2.0, 3e6), method="transform")
        self.source = SourceImage(
            Path("slope.tif"), "slope.tif", "0" * 64, 1, "GTiff", width, height, 2, "float32",
            "none", None, ("gray", "undefined"), {}, georef=georef,
        )  # fmt: skip
        self.window = (0, 0, width, height)
        self.block = (64, 64)
        self.decoder = "lossless"

    def read(self, window: Window) -> NDArray:
        col, row, width, height = window
        rows, cols = np.mgrid[row : row + height, col : col + width] + 0.5
        return np.stack([cols, rows], axis=2).astype(np.float32)

    def read_mask(self, window: Window) -> None:
        return None


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 175, 112.5), (175, 112)),
        ((0, 0, 175, 112.5), (174, 112)),
        ((10.25, 20.5, 130.25, 100.5), (37, 25)),
        ((8, 16, 168, 96), (20, 10)),
    ],
)
def test_smaller_pixels_lie_where_they_say(
    box: tuple[float, float, float, float], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("archive_pipeline.outputs.reduced.READ_PIXELS", 4000)  # in strips
    made = Reduced(Slope(175, 113), box, *size)
    values = made.read(made.window)
    rows, cols = np.mgrid[0 : size[1], 0 : size[0]] + 0.5
    a, b, c, d, e, f = made.source.georef.transform or ()
    x, y = a * cols + b * rows + c, d * cols + e * rows + f
    # all but the outermost, whose means have one side alone
    inner = np.s_[1:-1, 1:-1]
    assert np.abs(values[..., 0] - (x - 3e5) / 2)[inner].max() < 0.05 * (box[2] - box[0]) / size[0]
    assert np.abs(values[..., 1] - (3e6 - y) / 2)[inner].max() < 0.05 * (box[3] - box[1]) / size[1]


def test_sizes_that_make_no_sense(run: Run, kept: Path) -> None:
    assert run("restore", "--archive", kept, "--max-size", 0).code == 2
    for resampled in ("--mosaic", "--ortho"):
        found = run("restore", "--archive", kept, "--max-size", 100, resampled)
        assert (found.code, "--resolution" in found.err) == (2, True)


def test_names_of_overviews() -> None:
    assert overview_name(8) == "overview_8"
