"""Hours of everything at once on one archive: what was ever committed is there, and right.

    make test-soak                            # two hours on disk, then two on an S3 server
    ARCHIVE_SOAK_MINUTES=10 make test-soak    # ten minutes each
    ARCHIVE_SOAK_SEED=7 ...                   # the seed that a failed run printed

Ingests, overwrites, restores and checks in random order, some side by side, many killed with
SIGKILL, sources edited and damaged between them. After each the archive is read image by image.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import numpy as np
import pytest
import rasterio
from conftest import command_line
from golden import reference as ref
from numpy.typing import NDArray
from PIL import Image
from s3_server import S3Server

from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage

MINUTES = float(os.environ.get("ARCHIVE_SOAK_MINUTES", "120"))
SEED = int(os.environ.get("ARCHIVE_SOAK_SEED", time.time_ns() % 100_000))
WIDTH, HEIGHT = 200, 136
MOST_IMAGES = 40
COMMAND_SECONDS = 1200  # in which a command that nobody kills must end, on a busy machine, too
LOSS = 25.0  # levels by which a coded picture's colour may be off; versions differ by far more

pytestmark = [pytest.mark.soak, pytest.mark.slow]


@dataclass
class Flight:
    """Source files, and all that each of them ever was.

    Attributes:
        contents: by name, {sha256: pixels} of every version.
        current: by name, the SHA-256 of the file now; None while it is damaged.
        committed: by name, the SHA-256 that the archive was last seen to hold.
    """

    folder: Path
    rng: random.Random
    contents: dict[str, dict[str, NDArray]] = field(default_factory=dict)
    current: dict[str, str | None] = field(default_factory=dict)
    committed: dict[str, str] = field(default_factory=dict)

    def add(self) -> None:
        count = len(self.contents)
        if count < MOST_IMAGES:
            self.write(f"{count:03}.tif" if count % 4 == 3 else f"{count:03}.png")

    def write(self, name: str) -> None:
        """Give a file new pixels: one strong colour, unlike that of the version before."""
        old = list(self.contents.get(name, {}).values())
        while True:
            colour = np.array([self.rng.choice((30, 128, 225)) for _ in range(3)])
            if not old or np.abs(old[-1].mean((0, 1))[:3] - colour).max() > 60:
                break
        noise = np.random.default_rng(self.rng.randrange(2**32)).normal(0, 6, (HEIGHT, WIDTH, 3))
        pixels = (colour + noise).clip(0, 255).astype(np.uint8)
        path = self.folder / name
        if name.endswith(".tif"):  # elevations and the like: exact
            pixels = pixels.astype(np.uint16) * 257
            profile = {"driver": "GTiff", "dtype": "uint16", "count": 3, "compress": "deflate"}
            with rasterio.open(path, "w", width=WIDTH, height=HEIGHT, **profile) as file:
                file.write(np.moveaxis(pixels, 2, 0))
        else:
            Image.fromarray(pixels).save(path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.contents.setdefault(name, {})[sha256] = pixels
        self.current[name] = sha256

    def damage(self, name: str) -> None:
        path = self.folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        self.current[name] = None

    def shows(self, name: str, sha256: str, pixels: NDArray) -> bool:
        """Whether pixels are those of one version of an image."""
        version = self.contents[name][sha256]
        if pixels.shape != version.shape or pixels.dtype != version.dtype:
            return False
        if name.endswith(".tif"):
            return np.array_equal(pixels, version)
        return bool(np.abs(pixels.mean((0, 1)) - version.mean((0, 1))).max() < LOSS)


class Soak:
    """One archive, and what is done to it."""

    def __init__(self, url: str, folder: Path, model: Path, rng: random.Random) -> None:
        self.url = url
        self.rng = rng
        self.model = model
        self.flight = Flight(folder / "flight", rng)
        self.flight.folder.mkdir()
        self.scratch = folder
        self.outputs = 0
        self.done: Counter[str] = Counter()
        self.seconds = 10.0  # that an ingest takes

    def start(self, *args: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command_line(*args, "--archive", self.url, "--json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ingest(self, *args: object) -> subprocess.Popen[str]:
        workers = self.rng.choice((0, 0, 2))
        options = ("--model", self.model, "--ratio", 8, "--workers", workers)
        return self.start("ingest", self.flight.folder, *options, *args)

    def finish(self, process: subprocess.Popen[str], *codes: int) -> dict:
        out, err = process.communicate(timeout=COMMAND_SECONDS)
        assert process.returncode in codes, (process.args, process.returncode, out, err)
        return json.loads(out)

    def kill(self, process: subprocess.Popen[str]) -> None:
        """Kill a command at some moment, or it and its workers; it may have ended before."""
        try:
            process.wait(self.rng.uniform(0, 1.2 * self.seconds))
        except subprocess.TimeoutExpired:
            self.done["killed"] += 1
        if self.rng.random() < 0.5:
            process.kill()
        else:
            with suppress(ProcessLookupError):  # it has ended
                os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=COMMAND_SECONDS)

    def step(self) -> None:
        """Change the flight a little, then do one thing to the archive."""
        for _ in range(self.rng.choice((0, 1, 3))):
            self.flight.add()
        names = sorted(self.flight.contents)
        for name in self.rng.sample(names, min(len(names), self.rng.choice((0, 1, 4)))):
            self.flight.write(name)
        if names and self.rng.random() < 0.3:
            self.flight.damage(self.rng.choice(names))
        deeds: list[Callable[[], None]] = [
            self.plain,
            self.overwriting,
            self.killed,
            self.killed,
            self.twice,
            self.beside,
            self.checked,
        ]
        deed = self.rng.choice(deeds)
        deed()
        self.done[deed.__name__] += 1
        self.look()

    def plain(self) -> None:
        started = time.monotonic()
        self.finish(self.ingest(), 0, 3)
        self.seconds = time.monotonic() - started
        for name, sha256 in self.flight.current.items():
            if sha256 is not None and name not in self.flight.committed:
                self.flight.committed[name] = sha256

    def overwriting(self) -> None:
        self.finish(self.ingest("--overwrite"), 0, 3)
        self.all_new()

    def all_new(self) -> None:
        """Now the archive holds every file as it is, but for damaged ones."""
        whole = {name: s for name, s in self.flight.current.items() if s is not None}
        self.flight.committed.update(whole)

    def killed(self) -> None:
        self.kill(self.ingest(*self.rng.choice(((), ("--overwrite",), ("--overwrite",)))))

    def twice(self) -> None:
        both = [self.ingest("--overwrite"), self.ingest("--overwrite")]
        for process in both:
            self.finish(process, 0, 3)
        self.all_new()

    def beside(self) -> None:
        """Restore while images are overwritten: none is missed, each is one of both versions."""
        ingest = self.ingest("--overwrite")
        while True:
            before = dict(self.flight.committed)
            self.outputs += 1
            folder = self.scratch / f"restored-{self.outputs}"
            done = self.finish(
                self.start("restore", "--format", "png", "-o", folder, "--workers", 0), 0
            )
            found = {}
            for file in done["files"]:
                found[file["image"]] = file["path"]
            assert before.keys() <= found.keys(), (before.keys() - found.keys(), done)
            for name, path in found.items():
                if name.endswith(".png"):
                    with Image.open(path) as picture:
                        pixels = np.asarray(picture)
                    versions = {before.get(name), self.flight.current[name]} - {None}
                    assert any(self.flight.shows(name, s, pixels) for s in versions if s), name
                Path(path).unlink()
            if ingest.poll() is not None:
                break
        self.finish(ingest, 0, 3)
        self.all_new()

    def checked(self) -> None:
        """What interrupted ingests left is no problem; the index that they did not write is one."""
        if self.rng.random() < 0.5:
            self.finish(self.start("check", "--repair"), 0)
        else:
            found = self.finish(self.start("check"), 0, 1)
            assert all("items.parquet" in problem for problem in found["problems"]), found

    def look(self) -> None:
        """Read the whole archive: every image is one whole version that it may be."""
        if not self.flight.committed and Archive.create(self.url).flights() == []:
            return
        archive = Archive.open(self.url)
        found = {entry.id: entry for entry in archive.images()}
        lost = self.flight.committed.keys() - found.keys()
        assert not lost, f"lost: {lost}"
        for name, entry in found.items():
            sha256 = entry.record["sha256"]
            may_be = {self.flight.committed.get(name), self.flight.current[name]}
            assert sha256 in may_be, (name, sha256, may_be)
            image = ArchivedImage(archive, entry)
            assert self.flight.shows(name, sha256, image.read((0, 0, WIDTH, HEIGHT))), name
            assert image.source.sha256 == sha256
            self.flight.committed[name] = sha256


@pytest.fixture(params=["disk", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "archive.zarr")
        return
    with pytest.MonkeyPatch.context() as patch:
        server = S3Server()
        for name, value in server.environ.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("soak")
        yield "s3://soak/archive.zarr"
        server.stop()
        fsspec.filesystem("s3").clear_instance_cache()


def test_nothing_is_ever_lost(url: str, tmp_path: Path) -> None:
    print(f"ARCHIVE_SOAK_SEED={SEED}")
    soak = Soak(url, tmp_path, ref.write_model(tmp_path / "model"), random.Random(SEED))
    soak.flight.add()
    soak.plain()
    end = time.monotonic() + 60 * MINUTES
    while time.monotonic() < end:
        soak.step()
    for name, sha256 in soak.flight.current.items():
        if sha256 is None:
            soak.flight.write(name)
    soak.overwriting()
    soak.look()
    assert len(soak.flight.committed) == len(soak.flight.contents)
    soak.finish(soak.start("check", "--repair"), 0)
    last = soak.finish(soak.start("check"), 0)
    print(dict(soak.done), len(soak.flight.contents), "images", last)
    leftovers = [note for note in last.get("notes", []) if "left" in note]
    assert not leftovers
