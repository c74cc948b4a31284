"""Threads of one process, each with settings of its own: none sees another's."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from threading import Barrier
from typing import TypeVar

import numpy as np
import pytest
import zarr
from golden import reference as ref
from numpy.typing import NDArray
from PIL import Image
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from archive_pipeline.codec import models
from archive_pipeline.codec.settings import DEFAULT, Settings
from archive_pipeline.codec.zarr_codec import PCDCCodec, with_settings
from archive_pipeline.jobs.ingest import ingest
from archive_pipeline.jobs.ingest_task import Budget, IngestOptions
from archive_pipeline.jobs.restore import restore
from archive_pipeline.jobs.selection import Selection
from archive_pipeline.pcdc.constants import BLOCK_SIDE
from archive_pipeline.pcdc.policy import pack_policy
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage

pytestmark = pytest.mark.usefixtures("done_anew")

T = TypeVar("T")
ROUNDS = 3


def side_by_side(works: list[Callable[[], T]]) -> list[list[T]]:
    """What each work gives, several times over, while threads do all of them at once."""
    together = Barrier(len(works))

    def repeat(work: Callable[[], T]) -> list[T]:
        results = []
        for _ in range(ROUNDS):
            together.wait(timeout=60)
            results.append(work())
        return results

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(repeat, works))


@pytest.fixture(scope="module")
def denoising(flight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive by the test model with its denoiser."""
    folder = tmp_path_factory.mktemp("denoising")
    for name, content in ref.denoising_files().items():
        (folder / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "model" / name).write_bytes(content)
    options = IngestOptions(Budget(bpp=0.3), str(folder / "model"), "cpu")
    report = ingest(str(folder / "a.zarr"), [("beach", flight)], options, workers=0)
    assert {outcome.status for outcome in report.outcomes} == {"ingested"}
    return folder / "a.zarr"


def test_restoring_with_other_steps_and_seeds(denoising: Path, tmp_path: Path) -> None:
    image = next(Archive.open(denoising).images()).id
    settings = [(0, 0, 1.0), (1, 0, 1.0), (1, 7, 1.0), (1, 7, 0.5), (2, 7, 1.0)]

    def restored(steps: int, seed: int, realism: float) -> bytes:
        report = restore(
            str(denoising),
            Selection(images=(image,)),
            Path(mkdtemp(dir=tmp_path)),
            format="png",
            steps=steps,
            seed=seed,
            realism=realism,
            device="cpu",
            workers=0,
        )
        with Image.open(report.files[0]["path"]) as picture:
            return picture.tobytes()

    alone = [restored(*how) for how in settings]
    assert len(set(alone)) == len(settings)
    assert restored(2, 7, 0.0) == alone[0]
    works = [partial(restored, *how) for how in settings]
    for expected, found in zip(alone, side_by_side(works), strict=True):
        assert found == [expected] * ROUNDS


def test_one_images_settings_are_not_anothers(denoising: Path) -> None:
    """In the same thread, and of arrays that Zarr opened by itself."""
    archive = Archive.open(denoising)
    entry = next(archive.images())
    window = (0, 0, entry.record["width"], entry.record["height"])
    plain = ArchivedImage(archive, entry)
    noisy = ArchivedImage(archive, entry, Settings(steps=1, seed=3))
    first, second = plain.read(window), noisy.read(window)
    assert (first != second).any()
    np.testing.assert_array_equal(plain.read(window), first)
    opened = zarr.open_array(denoising, path=f"{entry.key}/pixels", mode="r")
    np.testing.assert_array_equal(opened[:], first)
    array = noisy.array("pixels")
    assert array.metadata == opened.metadata
    assert array.metadata.to_dict() == opened.metadata.to_dict()
    np.testing.assert_array_equal(array[:], second)


def raise_all(tiles: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Half of the first tile's blocks two levels finer."""
    raised = [
        np.zeros([-(-side // BLOCK_SIDE) for side in tile.shape[:2]], np.uint8) for tile in tiles
    ]
    raised[0][:2] = 2
    return raised


def test_encoding_with_other_allocations() -> None:
    sha256 = models.register(ref.tiny_files())
    latents = models.codec_for(sha256).model.networks.config.latents
    policy = models.register_policy(pack_policy(ref.tiny_policy()), latents)
    frame = ref.texture(192, 256, 4)

    def encoded(settings: Settings) -> bytes:
        store = MemoryStore()
        array = zarr.create_array(
            store,
            shape=frame.shape,
            chunks=(128, 128, 3),
            shards=(256, 256, 3),
            dtype="uint8",
            serializer=PCDCCodec(sha256, 0.5),
            compressors=[Crc32cCodec()],
            fill_value=0,
        )
        with_settings(array, settings)[:] = frame
        return store._store_dict["c/0/0/0"].to_bytes()

    settings = [
        DEFAULT,
        Settings(allocation="greedy"),
        Settings(allocation="policy", policy=policy),
        Settings(allocation="objects", raised=raise_all),
    ]
    with zarr.config.set({"codec_pipeline.batch_size": 1024}):
        alone = [encoded(one) for one in settings]
        assert len(set(alone)) == len(settings)
        found = side_by_side([partial(encoded, one) for one in settings])
    for expected, results in zip(alone, found, strict=True):
        assert results == [expected] * ROUNDS


def test_pixels_need_no_set_up(denoising: Path) -> None:
    """`zarr.open` in a process that has imported nothing else of ours."""
    archive = Archive.open(denoising)
    entry = next(archive.images())
    code = (
        "import hashlib, sys, zarr; a = zarr.open(sys.argv[1], mode='r')[sys.argv[2]]; "
        "print(hashlib.sha256(a[:].tobytes()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, denoising, f"{entry.key}/pixels"],
        env=ref.subprocess_environment(ARCHIVE_MODEL_PATH=str(denoising / "models")),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    window = (0, 0, entry.record["width"], entry.record["height"])
    expected = ArchivedImage(archive, entry).read(window)
    assert done.stdout.strip() == hashlib.sha256(expected.tobytes()).hexdigest()
