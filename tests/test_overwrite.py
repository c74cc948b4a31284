"""Overwriting: the old image stays until the new one is committed, whatever fails or is killed."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import rasterio
import zarr
from conftest import FRAMES, Run
from numpy.typing import NDArray
from rasterio.transform import from_origin
from test_faults import tree
from test_s3 import hurried  # noqa: F401
from test_store import stored_bytes
from zarr.storage import FsspecStore, LocalStore

from archive_pipeline.flight.find import ImageFile
from archive_pipeline.jobs import ingest_image
from archive_pipeline.jobs.check import check
from archive_pipeline.jobs.ingest_image import StoreFailed
from archive_pipeline.jobs.ingest_task import IngestOptions, IngestTask
from archive_pipeline.jobs.restore import restore
from archive_pipeline.jobs.selection import Selection
from archive_pipeline.store import _backends, leftovers
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.index import read_images, write_index
from archive_pipeline.store.layout import PLAN, STAGED, ArchiveError, image_key
from archive_pipeline.store.leases import leased

ID, KEY = "dsm.tif", image_key("f", "dsm.tif")
SIDES = (40, 50)  # of the image, one tile
FIRST = "flights/beach/DJI_0001.JPG"
Killed = type("Killed", (BaseException,), {})
DAMAGES = [b"{", b'{"attributes":{"archive_pipelinf":{}}}']  # of records


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "LINGER", 0.0)


@pytest.fixture(scope="module")
def model() -> str:
    from archive_pipeline.codec.models import DEFAULT_MODEL, load_named

    return load_named(DEFAULT_MODEL).sha256


class Image:
    """A small raster of 16 bits, archived losslessly; with a mask if it has a nodata value."""

    def __init__(self, path: Path, seed: int, nodata: int | None) -> None:
        self.path = path
        rng = np.random.default_rng(seed)
        self.pixels: NDArray[Any] = rng.integers(1, 60_000, SIDES).astype(np.uint16)
        self.pixels[:5, :7] = 7
        profile = {"driver": "GTiff", "width": SIDES[1], "height": SIDES[0], "count": 1}
        place = {"crs": "EPSG:32615", "transform": from_origin(3e5, 3e6, 1 + seed, 1)}
        with rasterio.open(path, "w", **profile, **place, dtype="uint16", nodata=nodata) as file:
            file.write(self.pixels, 1)
        self.has_mask = nodata is not None

    def put(self, url: str, model: str, *, settled: bool = True) -> ingest_image.Outcome:
        """Archive it in place of what is there, as a worker and then the client do."""
        held = None
        with suppress(ArchiveError):  # a damaged record is replaced, too
            held = Archive.open(url).entry(KEY)
        task = IngestTask(
            url, "f", ID, ImageFile(ID, ID, self.path),
            IngestOptions(overwrite=True, device="cpu"),
            None if held is None else held.record["sha256"], model,
        )  # fmt: skip
        outcome = ingest_image.ingest_image(task)
        if outcome.replaced and settled:
            replaced = leftovers.Replaced(Archive.reopen(url, writable=True))
            replaced.add(KEY)
            replaced.collect(wait=True)
        return outcome


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Image, Image]:
    """Two images of one size; only the first has a mask."""
    folder = tmp_path_factory.mktemp("images")
    return Image(folder / "old.tif", 1, 7), Image(folder / "new.tif", 2, None)


def seen(url: str, images: tuple[Image, ...]) -> Image:
    """The image that is committed, after every look at it by which readers could tell."""
    archive = Archive.open(url)
    (entry,) = archive.images()
    opened = ArchivedImage(archive, entry)
    (image,) = (i for i in images if opened.source.path == i.path)
    assert opened.source.sha256 == entry.record["sha256"]
    window = (0, 0, SIDES[1], SIDES[0])
    assert np.array_equal(opened.read(window)[..., 0], image.pixels)
    mask = opened.read_mask(window)
    assert (mask is not None) == image.has_mask
    assert mask is None or np.array_equal(mask == 0, image.pixels == 7)
    return image


def seen_plainly(url: str, images: tuple[Image, ...]) -> Image:
    """The image that any Zarr reader sees."""
    group = zarr.open_group(Archive.open(url).store, path=KEY, mode="r")
    pixels = np.asarray(group["pixels"][:])[..., 0]
    (image,) = (i for i in images if np.array_equal(pixels, i.pixels))
    assert image.has_mask or "mask" not in group
    return image


def problems(url: str) -> list[str]:
    """What `check` finds; the index is not written by a worker."""
    write_index(Archive.open(url, writable=True))
    return check(url).problems


def stray(url: str) -> dict[str, int]:
    """Keys below the image that are no part of it, with their bytes."""
    archive = Archive.open(url)
    found = archive.stored(KEY)
    return {key: found[key].size for key in leftovers.leftovers(archive, KEY, found)}


class Faults:
    """Counts what changes a store, and lets the n-th change and perhaps all after it fail."""

    def __init__(self) -> None:
        self.fail: Callable[[], None] = lambda: None
        self.at, self.count, self.only = -1, 0, False

    def change(self) -> None:
        self.count += 1
        if self.count == self.at or (self.count > self.at >= 0 and not self.only):
            self.fail()

    @contextmanager
    def failing(self, at: int, fail: Callable[[], None], only: bool = False) -> Iterator[None]:
        self.at, self.count, self.only, self.fail = at, 0, only, fail
        try:
            yield
        finally:
            self.at = -1


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    faults = Faults()

    def counted(kind: type, name: str) -> None:
        plain = getattr(kind, name)

        async def changed(*args: Any, **kwargs: Any) -> Any:
            faults.change()
            return await plain(*args, **kwargs)

        monkeypatch.setattr(kind, name, changed)

    for kind in (LocalStore, FsspecStore):
        counted(kind, "set")
    counted(LocalStore, "delete")
    plain = _backends.delete_keys

    async def delete_keys(store: Any, keys: Any) -> None:
        for key in keys if isinstance(store, FsspecStore) else ():  # may end between two of them
            faults.change()
            await plain(store, [key])
        if not isinstance(store, FsspecStore):
            await plain(store, keys)

    monkeypatch.setattr("archive_pipeline.store._keys.delete_keys", delete_keys)
    return faults


def die() -> None:
    raise Killed


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def denied() -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


Urls = Iterator[str]


@pytest.fixture(params=["local", "memory", "s3"])
def urls(request: pytest.FixtureRequest, tmp_path: Path) -> Urls:
    """New URLs, one kind of store each time."""
    if request.param == "s3":
        request.getfixturevalue("server")
    start = {"local": f"{tmp_path}/", "memory": f"memory://{tmp_path.name}-", "s3": "s3://drones/o"}
    return (f"{start[request.param]}{number}.zarr" for number in range(1000))


@pytest.mark.parametrize("fail", [die, full, denied])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["mask goes", "mask comes"])
def test_whatever_fails_one_of_both_is_there(
    urls: Urls, images: tuple[Image, Image], model: str, faults: Faults,
    fail: Callable[[], None], order: tuple[int, int],
) -> None:  # fmt: skip
    old, new = (images[i] for i in order)
    results = []
    # the server is slow: each kind of failure takes its third of the places there
    first = next(urls)
    stride = 3 if first.startswith("s3:") else 1
    start = 1 + [die, full, denied].index(fail) % stride
    for at in range(start, 100, stride):
        url = next(urls)
        Archive.create(url)
        assert old.put(url, model).error is None
        # a killed process changes nothing more; one that goes on tries to leave no traces
        with faults.failing(at, fail, only=fail is denied):
            try:
                outcome = new.put(url, model)
                results.append("failed" if outcome.error else "done")
            except (Killed, StoreFailed):
                results.append("ended")
            reached = faults.count >= at
        there = seen(url, images)
        assert seen_plainly(url, images) in images
        results[-1] += " new" if there is new else " old"
        if results[-1] == "done new" and not stray(url):
            assert seen_plainly(url, images) is new
        if at % 4 == 1:
            assert problems(url) == []
        assert new.put(url, model).error is None
        assert seen(url, images) is seen_plainly(url, images) is new
        assert stray(url) == {}
        (entry,) = Archive.open(url).images()
        assert entry.record["archive_bytes"] == Archive.open(url).size_of(KEY)
        if not reached:
            break
    assert results[0].endswith("old")
    assert results[-1] == "done new"
    assert len(results) > 12 // stride
    assert "failed new" not in results
    # once it is committed it stays: old ones first, then new ones
    assert results == sorted(results, key=lambda text: text.endswith("new"))


def test_killed_at_every_change(
    tmp_path: Path, images: tuple[Image, Image], model: str, faults: Faults
) -> None:
    old, new = images
    ends = []
    for at in range(1, 100):
        url = str(tmp_path / f"{at}.zarr")
        Archive.create(url)
        old.put(url, model)
        child = os.fork()
        if child == 0:
            with faults.failing(at, lambda: os._exit(9)):
                new.put(url, model)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        there = seen(url, images)
        assert seen_plainly(url, images) in images
        ends.append((code, there is new))
        if at % 4 == 1:
            assert problems(url) == []
        noted, before = sum(stray(url).values()), stored_bytes(tmp_path / f"{at}.zarr" / KEY)
        write_index(Archive.open(url, writable=True))
        report = check(url)
        assert report.leftover_bytes == noted
        assert [f"f/{ID}: {noted} bytes left" in note for note in report.notes] == [True] * bool(
            noted
        )
        report = check(url, repair=True)
        assert (report.problems, report.leftover_bytes, stray(url)) == ([], 0, {})
        assert seen(url, images) is seen_plainly(url, images) is there
        (entry,) = Archive.open(url).images()
        after = stored_bytes(tmp_path / f"{at}.zarr" / KEY)
        assert after == entry.record["archive_bytes"]
        # but for metadata of other lengths that became the array's own
        assert abs(before - after - noted) <= 40
        if code == 0:
            break
    assert ends == sorted(ends, key=lambda end: (end[0] == 0, end[1]))
    assert ends[-1] == (0, True)
    assert (9, True) in ends
    assert (9, False) in ends


@pytest.fixture
def twins(tmp_path: Path) -> tuple[Image, Image]:
    """Two images of one size without a mask: one may take the other's place while it is open."""
    first, second = (Image(tmp_path / f"{seed}.tif", seed, None) for seed in (1, 2))
    return first, second


def shown(pixels: NDArray[Any], images: tuple[Image, ...]) -> Image:
    (image,) = (i for i in images if np.array_equal(pixels, i.pixels))
    return image


WHOLE = (0, 0, SIDES[1], SIDES[0])


def test_readers_beside_a_writer_see_whole_images(
    tmp_path: Path, twins: tuple[Image, Image], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "LINGER", 0.5)
    url = str(tmp_path / "a.zarr")
    Archive.create(url)
    twins[0].put(url, model)
    held = ArchivedImage(Archive.open(url), next(Archive.open(url).images()))
    ended = threading.Event()

    def plain() -> Image:
        pixels = np.asarray(zarr.open_array(tmp_path / "a.zarr" / KEY / "pixels", mode="r")[:])
        return shown(pixels[..., 0], twins)

    def own() -> Image:
        (entry,) = Archive.open(url).images()
        opened = ArchivedImage(Archive.open(url), entry)
        source, first = opened.source, opened.entry
        image = shown(opened.read(WHOLE)[..., 0], twins)
        assert opened.entry.record["georef"]["transform"][0] == 2 + twins.index(image)
        # it may be replaced between two calls, and then says so
        assert opened.entry is not first or source.path == image.path
        return image

    def open_all_the_time() -> Image:
        image = shown(held.read(WHOLE)[..., 0], twins)
        assert held.entry.record["georef"]["transform"][0] == 2 + twins.index(image)
        return image

    def restored() -> Image:
        report = restore(url, Selection(), tmp_path / "out", workers=0, overwrite=True)
        assert report.failed == []
        with rasterio.open(report.files[0]["path"]) as file:
            image = shown(file.read(1), twins)
            step = 2 + twins.index(image)  # with its own georeference
            assert file.transform.a == report.files[0]["transform"][0] == step
        return image

    def listed() -> Image:
        (entry,) = read_images(Archive.open(url))
        return twins[int(entry.record["georef"]["transform"][0]) - 2]

    found: dict[Callable[[], Image], list[Any]] = {}

    def loop(look: Callable[[], Image]) -> None:
        while not ended.is_set():
            try:
                found.setdefault(look, []).append(look())
            except BaseException as error:  # told below, all of them
                found.setdefault(look, []).append(error)

    looks = [plain, own, open_all_the_time, restored, listed]
    threads = [threading.Thread(target=loop, args=(look,)) for look in looks]
    for thread in threads:
        thread.start()
    for turn in range(1, 5):
        assert twins[turn % 2].put(url, model).replaced
    ended.set()
    for thread in threads:
        thread.join()
    for look in looks:
        assert [one for one in found[look] if not isinstance(one, Image)] == [], look
        assert set(found[look]) == set(twins), look


def test_a_file_is_of_one_image_though_it_was_replaced_meanwhile(
    tmp_path: Path, twins: tuple[Image, Image], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "a.zarr")
    Archive.create(url)
    twins[0].put(url, model)
    plain = ArchivedImage.read
    reads = []

    def read(self: ArchivedImage, window: Any) -> Any:
        col, row, width, height = window
        assert height > 1
        upper = plain(self, (col, row, width, height // 2))
        if not reads:
            twins[1].put(url, model)
        reads.append(window)
        lower = plain(self, (col, row + height // 2, width, height - height // 2))
        return np.concatenate([upper, lower])

    monkeypatch.setattr(ArchivedImage, "read", read)
    report = restore(url, Selection(), tmp_path / "out", workers=0, overwrite=True)
    assert len(reads) == 2  # the second time all of the new one
    with rasterio.open(report.files[0]["path"]) as file:
        assert np.array_equal(file.read(1), twins[1].pixels)
        assert file.transform.a == 3
    assert report.files[0]["transform"][0] == 3
    # a mosaic has its place computed already
    reads.clear()
    twins[0].put(url, model)
    report = restore(url, Selection(), tmp_path / "mosaic", mosaic=True)
    assert report.files == []
    (failure,) = report.failed
    assert f"f/{ID}: replaced by another image while it was read" in failure["error"]


def test_one_of_another_size_is_not_taken_for_it(
    tmp_path: Path, images: tuple[Image, Image], model: str
) -> None:
    url = str(tmp_path / "a.zarr")
    Archive.create(url)
    images[0].put(url, model)
    held = ArchivedImage(Archive.open(url), next(Archive.open(url).images()))
    assert held.source.mask == "nodata"
    images[1].put(url, model)
    with pytest.raises(ArchiveError, match=r"replaced by another image .*; read it again"):
        held.read(WHOLE)


@pytest.mark.parametrize(
    "damages",
    [
        DAMAGES,  # in turn; each of them at every place takes as long again
        *(pytest.param(DAMAGES[n : n + 1], marks=pytest.mark.slow) for n in range(len(DAMAGES))),
    ],
)
def test_a_damaged_record_is_replaced_only_by_a_whole_image(
    tmp_path: Path, images: tuple[Image, Image], model: str, faults: Faults, damages: list[bytes]
) -> None:
    """Plain readers still see its pixels."""
    old, new = images
    ends = []
    for at, damage in zip(range(1, 100), itertools.cycle(damages), strict=False):
        url = str(tmp_path / f"{at}.zarr")
        Archive.create(url)
        new.put(url, model)
        old.put(url, model)  # the second generation
        (tmp_path / f"{at}.zarr" / KEY / "zarr.json").write_bytes(damage)
        with faults.failing(at, die), suppress(Killed):
            new.put(url, model)
        pixels = zarr.open_array(tmp_path / f"{at}.zarr" / KEY / "pixels", mode="r")[:]
        ends.append(shown(np.asarray(pixels)[..., 0], images) is new)
        check(url, repair=True)  # touches nothing of an image with a damaged record
        assert new.put(url, model).error is None
        assert seen(url, images) is seen_plainly(url, images) is new
        assert stray(url) == {}
        if faults.count < at:
            break
    assert ends == sorted(ends)
    assert not ends[0]
    assert ends[-1]


def _damage_scan(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) * 2 // 3
    data[middle : middle + 2] = b"\xff\xd9"  # the image ends here
    path.write_bytes(data)


def test_a_damaged_frame_costs_nothing_that_is_archived(
    run: Run, own_archive: Path, own_flight: Path, tmp_path: Path
) -> None:
    args = ("--archive", own_archive, "--ratio", 16, "--workers", 0, "--overwrite", "--json")
    before = tree(own_archive)
    _damage_scan(own_flight / "DJI_0001.JPG")
    others = [path for path in own_flight.iterdir() if path.name != "DJI_0001.JPG"]
    for path in others:
        path.unlink()
    result = run("ingest", own_flight, *args)
    assert result.code == 3
    assert tree(own_archive) == before
    assert run("info", "--archive", own_archive, "--json").json["totals"]["images"] == FRAMES
    checked = run("check", "--archive", own_archive, "--json")
    assert (checked.code, checked.json["images"], checked.json["notes"]) == (0, FRAMES, [])
    assert checked.json["leftover_bytes"] == 0


def test_overwriting_keeps_to_the_budget_and_leaves_nothing(
    run: Run, own_flight: Path, tmp_path: Path
) -> None:
    for path in sorted(own_flight.iterdir())[1:]:
        path.unlink()
    url = tmp_path / "a.zarr"
    args = ("--archive", url, "--workers", 0, "--overwrite", "--json")
    trees = []
    for ratio, generation in ((16, 0), (20, 1), (16, 0)):
        result = run("ingest", own_flight, *args, "--ratio", ratio)
        assert result.code == 0, result.err
        (image,) = result.json["images"]
        assert (image["codec"], image["replaced"]) == ("pcdc", bool(trees))
        used = stored_bytes(url / FIRST)
        assert used == image["archive_bytes"] <= image["raw_bytes"] // ratio
        assert used >= 0.9 * image["raw_bytes"] / ratio
        entry = Archive.open(url).entry(FIRST)
        assert entry is not None
        assert entry.generation == generation
        checked = run("check", "--archive", url, "--json")
        assert (checked.code, checked.json["notes"]) == (0, [])
        trees.append(tree(url))
    assert trees[2] == trees[0]  # as if nothing had happened, byte for byte


def test_a_full_disk_deletes_nothing_that_is_committed(
    run: Run, own_archive: Path, own_flight: Path, faults: Faults
) -> None:
    before = tree(own_archive)
    args = ("--archive", own_archive, "--ratio", 16, "--workers", 0, "--overwrite")
    with faults.failing(4, full):
        result = run("ingest", own_flight, *args)
    assert result.code == 1
    assert "No space left on device" in result.err
    found = tree(own_archive)
    assert {key: found.get(key) for key in before} == before
    assert run("check", "--archive", own_archive).code == 0


# ----------------------------------------------------------- leftovers


@pytest.fixture
def begun(own_archive: Path) -> Path:
    """An archive with what was left of one image that is committed, and of one that is not."""
    own = own_archive / "flights" / "beach"
    shutil.copytree(own / "DJI_0002.JPG", own / "DJI_0009.JPG")
    (own / "DJI_0009.JPG" / "zarr.json").unlink()
    shutil.rmtree(own / "DJI_0009.JPG" / "metadata")  # killed before it was written
    (own / "DJI_0001.JPG" / "pixels" / "c.0.0.0").write_bytes(b"begun")
    (own / "DJI_0001.JPG" / "pixels" / STAGED).write_bytes(b"{}")
    (own / "DJI_0001.JPG" / "pixels" / "c" / "0" / "0" / "0.ab.partial").write_bytes(b"killed")
    return own_archive


def test_check_tells_of_leftovers_and_removes_them(run: Run, begun: Path, archive: Path) -> None:
    sizes = {
        "DJI_0001.JPG": len(b"begun" + b"{}" + b"killed"),
        "DJI_0009.JPG": stored_bytes(begun / "flights" / "beach" / "DJI_0009.JPG"),
    }
    before = tree(begun)
    result = run("check", "--archive", begun, "--json")
    assert (result.code, result.json["problems"]) == (0, [])
    assert result.json["leftover_bytes"] == sum(sizes.values())
    assert result.json["notes"] == [
        f"beach/{name}: {size} bytes left by an interrupted ingest; --repair removes them"
        for name, size in sizes.items()
    ]
    assert tree(begun) == before
    told = run("check", "--archive", begun)
    assert told.err.splitlines() == result.json["notes"]
    mended = run("check", "--archive", begun, "--repair", "--json")
    assert (mended.code, mended.json["leftover_bytes"]) == (0, 0)
    assert mended.json["notes"] == [
        f"beach/{name}: {size} bytes left by an interrupted ingest were removed"
        for name, size in sizes.items()
    ]
    assert tree(begun) == tree(archive)
    assert not (begun / "flights" / "beach" / "DJI_0009.JPG").exists()
    assert run("check", "--archive", begun, "--json").json["notes"] == []


def test_repair_leaves_what_is_being_written(run: Run, begun: Path, archive: Path) -> None:
    before = tree(begun)
    opened = Archive.open(begun)
    repair = ("check", "--archive", begun, "--repair", "--json")
    with opened.exclusive("flights/beach/DJI_0009.JPG"), opened.exclusive(FIRST):
        result = run(*repair)
    assert result.code == 0
    assert [note.partition("stay: ")[2] for note in result.json["notes"]] == [
        "it is being written"
    ] * 2
    assert result.json["leftover_bytes"] > 0
    assert tree(begun) == before
    # between two tries of a large image nobody holds it
    (begun / "flights" / "beach" / "DJI_0009.JPG" / PLAN).write_bytes(b"{}")
    with opened.writing():
        result = run(*repair)
        assert "an ingest is running, which may go on with it" in result.json["notes"][1]
        assert "were removed" in result.json["notes"][0]
        assert "nor leftovers looked for" in run("check", "--archive", begun).err
    assert run(*repair).json["leftover_bytes"] == 0
    assert tree(begun) == tree(archive)


def test_without_locks_repair_removes_nothing(
    run: Run, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(begun)
    monkeypatch.setattr("archive_pipeline.locks._lock", lambda *_: False)
    result = run("check", "--archive", begun, "--repair", "--json")
    assert result.code == 0
    assert all("nothing here tells whether" in note for note in result.json["notes"])
    assert tree(begun) == before


def test_leftovers_in_buckets_go_only_without_an_ingest(
    run: Run, begun: Path, request: pytest.FixtureRequest
) -> None:
    for name in ("server", "hurried"):
        request.getfixturevalue(name)
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    url = "s3://drones/leftovers.zarr"
    fs.put(f"{begun}/", f"{url}/", recursive=True)
    held = Archive.open(url, writable=True)
    with leased(held, ["beach"]):
        result = run("check", "--archive", url, "--repair", "--json")
        told = run("check", "--archive", url, "--json").json
    assert len(result.json["notes"]) == len(told["notes"]) == 2
    assert all("an ingest of its flight is running" in n for n in result.json["notes"])
    assert all("is running, or was killed" in note for note in told["notes"])
    assert result.json["leftover_bytes"] == told["leftover_bytes"] > 0
    # of one that was killed the lease remains, too
    fs.pipe_file(f"{url}/leases/beach", b'{"host": "gone", "process": 7}')
    mended = run("check", "--archive", url, "--repair", "--json")
    assert mended.json["leftover_bytes"] == 0
    assert len([n for n in mended.json["notes"] if "were removed" in n]) == 2
    assert not fs.find(f"{url}/flights/beach/DJI_0009.JPG")
    assert not fs.find(f"{url}/leases")


def test_what_may_have_lost_its_record_is_never_removed(run: Run, own_archive: Path) -> None:
    record = own_archive / FIRST / "zarr.json"
    kept = tree(own_archive / FIRST)
    del kept["zarr.json"]
    record.unlink()
    (own_archive / "flights" / "beach" / "notes").mkdir()
    (own_archive / "flights" / "beach" / "notes" / "mine.txt").write_text("not the archive's")
    first = run("check", "--archive", own_archive, "--repair", "--json")
    assert first.code == 1
    assert any("its record is missing" in line for line in first.json["problems"])
    for _ in range(2):  # the index does not list it any more
        again = run("check", "--archive", own_archive, "--repair", "--json")
        assert any("its record is missing" in line for line in again.json["notes"])
    (own_archive / "items.parquet").unlink()
    run("check", "--archive", own_archive, "--repair")
    assert tree(own_archive / FIRST) == kept
    assert (own_archive / "flights" / "beach" / "notes" / "mine.txt").exists()
    record.write_text("{}")
    assert run("check", "--archive", own_archive, "--repair").code == 1


@pytest.mark.parametrize("damage", [lambda b: b[:-4], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_damaged_model_is_written_again(
    command: Run, own_archive: Path, own_flight: Path, damage: Callable[[bytes], bytes]
) -> None:
    (weights,) = own_archive.glob("models/*/model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(damage(whole))
    for path in sorted(own_flight.iterdir())[1:]:
        path.unlink()
    args = ("--archive", own_archive, "--ratio", 16, "--workers", 0, "--overwrite")
    done = command("ingest", own_flight, *args)
    assert done.code == 0, done.err
    assert weights.read_bytes() == whole


def test_a_model_that_is_gone_is_missed_and_stored_again(
    run: Run, own_archive: Path, flight: Path
) -> None:
    """Also by a process that has it from elsewhere, and though no image is to be archived."""
    before = tree(own_archive / "models")
    shutil.rmtree(own_archive / "models")
    broken = run("check", "--archive", own_archive, "--json")
    assert broken.code == 1
    assert broken.json["problems"][0].endswith("3 images cannot be decoded without it")
    again = run("ingest", flight, "--archive", own_archive, "--workers", 0, "--json")
    assert (again.code, again.json["skipped"]) == (0, 3)
    assert run("check", "--archive", own_archive).code == 0
    assert tree(own_archive / "models") == before
