"""What of a file is not archived: it is said, and `archive retire` keeps such a file."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import rasterio
from conftest import Run
from numpy.typing import NDArray
from PIL import Image

from archive_pipeline.flight.jpeg_segments import PICTURES_LEFT_OUT, walk
from archive_pipeline.flight.read import read_source
from archive_pipeline.flight.source_image import SourceError
from archive_pipeline.jobs import ingest_image
from archive_pipeline.jobs._alike import Alike

GREY = np.add.outer(np.arange(60), np.arange(80)).astype(np.uint8)
RGB = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)


def image(pixels: NDArray[np.uint8] = GREY) -> Image.Image:
    return Image.fromarray(pixels)


def animated(path: Path) -> None:
    image().save(path, save_all=True, append_images=[image(GREY[::-1])])


def animated_jxl(path: Path) -> None:
    path.write_bytes(imagecodecs.jpegxl_encode(np.stack([RGB, RGB[::-1]]), lossless=True))


def with_a_film(path: Path) -> None:
    """As phones write it: a picture, and the seconds around it."""
    stream = imagecodecs.jpegxl_encode(RGB, lossless=True, usecontainer=True)
    film = struct.pack(">I4s", 24, b"mpvd") + bytes(16)
    path.write_bytes(stream + film)


def followed(path: Path) -> None:
    image().save(path)
    path.write_bytes(path.read_bytes() + b"another picture")


def converted(path: Path) -> None:
    image(RGB).convert("CMYK").save(path)


def of_two_images(path: Path) -> None:
    form = {"driver": "NITF", "width": 80, "height": 60, "count": 1, "dtype": "uint8"}
    for more in ({"NUMI": "2"}, {"APPEND_SUBDATASET": "YES"}):
        with rasterio.open(path, "w", **form, **more) as file:
            file.write(GREY, 1)


def alpha_and_mask(path: Path) -> None:
    form = {"driver": "GTiff", "width": 80, "height": 60, "count": 2, "dtype": "uint8"}
    env = rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True)
    with env, rasterio.open(path, "w", alpha="YES", **form) as file:
        file.write(np.stack([GREY, GREY]))
        file.write_mask(GREY > 50)


def directory(entries: dict[int, tuple[int, int, int]]) -> bytes:
    table = [struct.pack("<HHII", tag, *entry) for tag, entry in sorted(entries.items())]
    return struct.pack("<H", len(table)) + b"".join(table)


def picture(rows: int, cols: int, at: int, **more: int) -> dict[int, tuple[int, int, int]]:
    """A TIFF directory of a grey picture whose pixels are at an offset."""
    values = {256: cols, 257: rows, 258: 8, 259: 1, 262: 1, 273: at, 277: 1, 278: rows}
    values |= {279: rows * cols} | {int(tag[1:]): value for tag, value in more.items()}
    return {tag: (4, 1, value) for tag, value in values.items()}


def with_sub_ifd(path: Path, kind: int = 0) -> None:
    """A small picture that leads to a larger one, as raw formats do."""
    second = picture(60, 80, 1000, _254=kind)
    first = picture(15, 20, 600, _330=300)
    data = b"II*\0" + struct.pack("<I", 8) + directory(first) + bytes(4)
    data = data.ljust(300, b"\0") + directory(second) + bytes(4)
    data = data.ljust(600, b"\0") + GREY[:15, :20].tobytes()
    path.write_bytes(data.ljust(1000, b"\0") + GREY.tobytes())


def with_a_huge_tag(path: Path) -> None:
    size = (64 << 20) + 1
    first = picture(60, 80, 300) | {37724: (7, size, 300 + GREY.size)}
    data = b"II*\0" + struct.pack("<I", 8) + directory(first) + bytes(4)
    with path.open("wb") as file:
        file.write(data.ljust(300, b"\0") + GREY.tobytes())
        file.truncate(300 + GREY.size + size)


def multi_picture(path: Path) -> None:
    image(RGB).save(path, format="MPO", save_all=True, append_images=[image(RGB[::-1])])


LEFT_OUT: dict[str, Callable[[Path], None]] = {
    "frames.gif": animated,
    "frames.png": animated,
    "frames.jxl": animated_jxl,
    "film.jxl": with_a_film,
    "behind.png": followed,
    "inks.tif": converted,
    "two.ntf": of_two_images,
    "alpha.tif": alpha_and_mask,
    "sub.tif": with_sub_ifd,
    "tag.tif": with_a_huge_tag,
    "pictures.mpo": multi_picture,
}


def test_an_original_stays_of_which_not_all_is_archived(run: Run, tmp_path: Path) -> None:
    """Each of these was deleted with pictures that were nowhere else."""
    flight, url = tmp_path / "odd", tmp_path / "odd.zarr"
    flight.mkdir()
    for name, make in LEFT_OUT.items():
        make(flight / name)
    image().save(flight / "plain.png")
    args = ("--archive", url, "--ratio", 1, "--workers", 0)
    assert run("ingest", flight, *args).code == 0
    done = run("retire", "--archive", url, "--originals", flight, "--yes", "--json")
    reasons = {item["image"].partition("/")[2]: item["reason"] for item in done.json["kept"]}
    assert reasons.keys() == LEFT_OUT.keys()
    assert {r for r in reasons.values() if not r.startswith("not all of it is archived: ")} == set()
    assert [Path(item["path"]).name for item in done.json["files"]] == ["plain.png"]
    assert {p.name for p in flight.iterdir()} == LEFT_OUT.keys()


def test_ingest_says_what_it_leaves_out(tmp_path: Path) -> None:
    for name, make in LEFT_OUT.items():
        make(tmp_path / name)
        source = read_source(tmp_path / name, name)
        assert source.left_out, name
        assert set(source.left_out) <= set(source.warnings)
        assert "left_out" not in source.to_json()


def test_previews_keep_no_original(tmp_path: Path) -> None:
    """Drones write a smaller copy behind the picture, and say so."""
    path = tmp_path / "a.jpg"
    multi_picture(path)
    data = bytearray(path.read_bytes())
    [start] = [at for at in range(len(data)) if data[at : at + 4] == b"MPF\0"]
    order = "<" if data[start + 4 : start + 6] == b"II" else ">"
    table = data.index(struct.pack(order + "HHI", 0xB002, 7, 32), start)
    at = start + 4 + struct.unpack_from(order + "I", data, table + 8)[0] + 16
    for kind, previews in ((0x40010001, True), (0x00020002, False), (0, False)):
        struct.pack_into(order + "I", data, at, kind)
        path.write_bytes(bytes(data))
        assert walk(bytes(data)).previews is previews
        source = read_source(path, "a.jpg")
        assert any(w.endswith(PICTURES_LEFT_OUT) for w in source.warnings)
        assert bool(source.left_out) is not previews


def test_a_reduced_sub_ifd_is_nothing_left_out(tmp_path: Path) -> None:
    with_sub_ifd(tmp_path / "a.tif", kind=1)
    assert read_source(tmp_path / "a.tif", "a.tif").left_out == ()


def test_a_tiff_that_begins_with_its_thumbnail_is_refused(tmp_path: Path) -> None:
    """GDAL reads the first picture; the second was taken for the only one."""
    path = tmp_path / "a.tif"
    first, second = picture(15, 20, 600, _254=1), picture(60, 80, 1000)
    data = b"II*\0" + struct.pack("<I", 8) + directory(first) + struct.pack("<I", 300)
    data = data.ljust(300, b"\0") + directory(second) + bytes(4)
    data = data.ljust(600, b"\0") + GREY[:15, :20].tobytes()
    path.write_bytes(data.ljust(1000, b"\0") + GREY.tobytes())
    with pytest.raises(SourceError, match="a TIFF of 2 pages"):
        read_source(path, "a.tif")


@pytest.mark.parametrize("lost", ["tags", "metadata", "descriptions", "georef"])
def test_an_original_stays_whose_metadata_the_archive_lacks(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """As from a release that kept less."""
    flight, url = tmp_path / "grey", tmp_path / "grey.zarr"
    flight.mkdir()
    form: dict[str, Any] = {"driver": "GTiff", "width": 80, "height": 60, "count": 1}
    form |= {"dtype": "uint8", "crs": "EPSG:32615"}
    place = rasterio.Affine(1, 0, 5e5, 0, -1, 4e6)
    with rasterio.open(flight / "a.tif", "w", transform=place, **form) as file:
        file.write(GREY, 1)
        file.update_tags(pilot="A. N. Other")
        file.update_tags(ns="xml:XMP", **{"xml:XMP": "<x:xmpmeta/>"})
        file.set_band_description(1, "red edge")
    less = {"tags": {}, "metadata": (), "descriptions": (None,)}

    def read(*args: Any) -> Any:
        source = read_source(*args)
        if lost == "georef":
            return replace(source, georef=replace(source.georef, transform=(2.0, 0, 0, 0, 1, 0)))
        return replace(source, **{lost: less[lost]})

    with monkeypatch.context() as patch:
        patch.setattr(ingest_image, "read_source", read)
        assert run("ingest", flight, "--archive", url, "--workers", 0).code == 0
    told = run("retire", "--archive", url, "--originals", flight, "--yes", "--json")
    what = "transform" if lost == "georef" else lost
    [item] = told.json["kept"]
    assert item["reason"].startswith(
        f"the archive has {'other' if what == 'metadata' else 'another'}"
    )
    assert what in item["reason"]
    again = run("ingest", flight, "--archive", url, "--workers", 0, "--overwrite")
    assert again.code == 0, again.err
    assert run("retire", "--archive", url, "--originals", flight, "--yes").code == 0


def water(seed: int, side: int = 1300) -> NDArray[np.uint8]:
    """Ground of little contrast: pixels of one picture of it are within 16 dB of another's."""
    random = np.random.default_rng(seed)
    coarse = random.normal(110, 12, (side // 50, side // 50, 3))
    fine = np.kron(coarse, np.ones((50, 50, 1))) + random.normal(0, 4, (side, side, 3))
    return np.clip(fine, 0, 255).astype(np.uint8)


def problem(restored: NDArray[np.uint8], original: NDArray[np.uint8]) -> str | None:
    alike = Alike()
    height, width, _ = original.shape
    alike.add((0, 0, width, height), restored, original, None)
    return alike.problem()


def test_another_picture_of_little_contrast_is_told(tmp_path: Path) -> None:
    original = water(1)
    path = tmp_path / "a.jpg"
    Image.fromarray(original).save(path, quality=20)
    assert problem(np.asarray(Image.open(path)), original) is None
    other = "its pixels have nothing to do with the original's"
    assert problem(water(2), original) == other
    assert problem(np.full_like(original, 110), original) == other
    # of even ground there is nothing to tell
    even = np.full_like(original, 110)
    assert problem(even + 2, even) is None


def test_one_wrong_tile_is_told() -> None:
    original = water(1)
    near = np.clip(original.astype(int) + 2, 0, 255).astype(np.uint8)
    assert problem(near, original) is None
    for wrong in (np.full((608, 608, 3), 110, np.uint8), water(3)[:608, :608]):
        restored = near.copy()
        restored[608:1216, :608] = wrong
        reason = problem(restored, original)
        assert reason == "pixels 0,608,608,608 have nothing to do with the original's"
    mask = np.full(original.shape[:2], 255, np.uint8)
    mask[608:1216, :608] = 0
    alike = Alike()
    alike.add((0, 0, *original.shape[1::-1]), restored, original, mask)
    assert alike.problem() is None  # what is not shown need not be the same
