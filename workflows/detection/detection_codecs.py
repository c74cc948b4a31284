"""What gives images back at a source ratio: the originals, archives, other codecs.

What is coded stays in the run's folder: OUT/archive.zarr has a flight for each allocation and
ratio, OUT/peers the files of other codecs.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from archive_pipeline.codec.models import load_named, read_policy
from archive_pipeline.detection.detectors import Read, find_detectors
from archive_pipeline.detection.labels import Labels
from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.flight.find import FlightError, find_images
from archive_pipeline.flight.read import read_source
from archive_pipeline.flight.source_image import SourceError, SourceImage
from archive_pipeline.jobs.decoding import Decoding
from archive_pipeline.jobs.ingest import ingest
from archive_pipeline.jobs.ingest_task import Budget, IngestOptions
from archive_pipeline.jobs.originals import original_pixels
from archive_pipeline.pcdc.model_files import ModelError
from archive_pipeline.pcdc.policy import policy_digest
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.layout import image_key

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
from peers import FRAME_PEERS, within
from windows import reader_of

Key = dict[str, Any]
ARCHIVE, PEERS = "archive.zarr", "peers"
DIGITS = 16  # of a key's digest, in names of files and flights


class ImageFailed(ArchivePipelineError):
    """An image that a codec or detector cannot take; one line that names it."""


@dataclass(frozen=True)
class Flight:
    """A folder of images, and those of them that are compared.

    Attributes:
        name: of the flight, as labels know it.
        folder: holds these images and no others.
        images: their sources.
    """

    name: str
    folder: Path
    images: tuple[SourceImage, ...]


@contextmanager
def chosen(
    folder: Path, names: tuple[str, ...], labels: Labels | None, tell: Callable[[str], None]
) -> Iterator[Flight]:
    """The flight's images that are to be compared, in a folder that holds no others.

    What cannot be compared is told: images without labels, files that are damaged, and pixels
    other than 8-bit RGB.

    Raises:
        FlightError: there is none.
    """
    for name in names:
        if not (folder / name).is_file():
            raise FlightError(f"{folder / name}: no such file")
    sources = []
    files = find_images(folder)
    for file in files:
        if names and file.below not in names:
            continue
        if labels is not None and labels.find(folder.name, file.id) is None:
            tell(f"{file.path}: left out: no labels")
            continue
        try:
            source = read_source(Path(file.path), file.id)
        except SourceError as error:
            tell(f"{error}; left out")
            continue
        if source.bands != 3 or source.dtype != "uint8":
            tell(f"{file.path}: left out: it is not 8-bit RGB")
            continue
        sources.append((file.below, source))
    if not sources:
        raise FlightError(f"{folder}: no image there that could be compared")
    if len(sources) == len(files):
        yield Flight(folder.name, folder, tuple(source for _, source in sources))
        return
    with tempfile.TemporaryDirectory() as work:
        links = Path(work, folder.name)
        for below, source in sources:
            (links / below).parent.mkdir(parents=True, exist_ok=True)
            (links / below).symlink_to(Path(source.path).absolute())
        ids = {file.below: file.id for file in find_images(links)}
        own = tuple(replace(source, id=ids[below]) for below, source in sources)
        yield Flight(folder.name, links, own)


class Codec(Protocol):
    """What gives an image back at a source ratio."""

    name: str

    def key(self, ratio: float) -> Key:
        """All that its pixels follow from, beside the image."""

    def prepare(self, flight: Flight, ratio: float) -> dict[str, str]:
        """Code what can only be coded together; returns errors by the images' ids."""

    def open(self, flight: Flight, image: SourceImage, ratio: float) -> Any:
        """A context manager with an image's bytes and what reads its pixels, (int, Read)."""


def digest(key: Key) -> str:
    """A name for a key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:DIGITS]


def keep(path: Path, data: bytes) -> None:
    """Write a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    os.replace(part, path)


@dataclass(frozen=True)
class Original:
    """The images as they are."""

    name: str = "original"

    def key(self, ratio: float) -> Key:
        return {"codec": self.name}

    def prepare(self, flight: Flight, ratio: float) -> dict[str, str]:
        return {}

    @contextmanager
    def open(self, flight: Flight, image: SourceImage, ratio: float) -> Iterator[tuple[int, Read]]:
        with original_pixels(image) as read:
            assert read is not None
            yield image.size_bytes, read


@dataclass(frozen=True)
class Archived:
    """Images of an archive, by one way to spread bits, decoded with a number of steps.

    Attributes:
        out: folder of the run.
        name: in tables.
        options: how they are archived, but for the budget.
        model: SHA-256 of the codec's model; `identity`: what else tells the streams, by name.
    """

    out: Path
    name: str
    options: IngestOptions
    model: str
    identity: tuple[tuple[str, str], ...] = ()
    steps: int = 0

    def _stored(self, ratio: float) -> Key:
        key = {"allocation": self.options.allocation, "model": self.model, **dict(self.identity)}
        return {**key, "ratio": ratio}

    def key(self, ratio: float) -> Key:
        return {**self._stored(ratio), "steps": self.steps}

    def _flight(self, ratio: float) -> str:
        return f"{self.options.allocation}-{ratio:g}-{digest(self._stored(ratio))}"

    def prepare(self, flight: Flight, ratio: float) -> dict[str, str]:
        options = replace(self.options, budget=Budget(source_ratio=ratio))
        flights = [(self._flight(ratio), flight.folder)]
        # workers would load models and detectors anew for each ratio
        done = ingest(str(self.out / ARCHIVE), flights, options, workers=0)
        return {o.id: o.error for o in done.outcomes if o.error is not None}

    @contextmanager
    def open(self, flight: Flight, image: SourceImage, ratio: float) -> Iterator[tuple[int, Read]]:
        archive = Archive.open(str(self.out / ARCHIVE))
        key = image_key(self._flight(ratio), image.id)
        entry = archive.entry(key)
        if entry is None or entry.record["sha256"] != image.sha256:
            raise ImageFailed(f"{image.id}: not archived as {self.name}")
        settings = Decoding(self.options.device, self.steps, 0, "auto").settings()
        yield archive.size_of(key), ArchivedImage(archive, entry, settings).read


@dataclass(frozen=True)
class PeerCodec:
    """Another codec at its finest setting within the same budget (`peers.FRAME_PEERS`).

    Its coarsest setting may take more than that.
    """

    out: Path
    name: str
    latest: dict[float, int] = field(default_factory=dict)  # setting of the last image, by ratio

    def key(self, ratio: float) -> Key:
        peer = FRAME_PEERS[self.name]
        return {"codec": self.name, "ratio": ratio, "library": peer.library(), "set": peer.note}

    def prepare(self, flight: Flight, ratio: float) -> dict[str, str]:
        return {}

    @contextmanager
    def open(self, flight: Flight, image: SourceImage, ratio: float) -> Iterator[tuple[int, Read]]:
        peer = FRAME_PEERS[self.name]
        name = digest({**self.key(ratio), "image": image.sha256})
        path = self.out / PEERS / f"{self.name}-{ratio:g}" / f"{Path(image.id).stem}-{name}"
        if path.is_file():
            data = path.read_bytes()
        else:
            budget = Budget(source_ratio=ratio).bytes_for(image)
            with original_pixels(image) as read:
                assert read is not None
                pixels = read((0, 0, image.width, image.height))
            with self._sizes(image) as known:
                data = within(peer, pixels, budget, known, self.latest.get(ratio))
            self.latest[ratio] = max((i for i, n in known.items() if n <= budget), default=0)
            keep(path, data)
        yield peer.size(data), reader_of(peer.decode(data))

    @contextmanager
    def _sizes(self, image: SourceImage) -> Iterator[dict[int, int]]:
        """Sizes of an image's files by setting (`within`), which searches at other ratios begin
        with; kept on disk."""
        key = {name: value for name, value in self.key(0).items() if name != "ratio"}
        name = digest({**key, "image": image.sha256})
        path = self.out / PEERS / "sizes" / f"{self.name}-{name}.json"
        known: dict[int, int] = {}
        with suppress(OSError, ValueError, TypeError):  # not there yet, or damaged
            known = {int(index): int(size) for index, size in json.loads(path.read_bytes())}
        try:
            yield known
        finally:
            keep(path, json.dumps(sorted(known.items())).encode())


def archived(
    out: Path,
    allocations: tuple[str, ...],
    objects: str | None,
    codec_model: str,
    device: str,
    decoders: tuple[int, ...],
) -> list[Codec]:
    """The archives that are asked for, each decoded with each number of steps.

    Args:
        allocations: "policy" is the model's.
        objects: a detector for the allocation "objects".

    Raises:
        ModelError: there is no such model, or it has no policy.
        DetectorError: there is no such detector.
    """
    model = load_named(codec_model)
    plain = IngestOptions(model=codec_model, device=device)
    made = []
    for name in dict.fromkeys(allocations):
        identity: tuple[tuple[str, str], ...] = ()
        if name == "policy":
            policy = read_policy(codec_model, model.networks.config.latents)
            if policy is None:
                raise ModelError(f"{codec_model}: this model has no allocation policy")
            identity = (("policy", policy_digest(policy)),)
        made.append((name, replace(plain, allocation=name), identity))
    if objects:
        (file,) = find_detectors([objects])
        options = replace(plain, detect=(objects,), allocation="objects")
        made.append(("objects", options, (("detect", file.sha256),)))
    return [
        Archived(out, name if n == 0 else f"{name}-{n}", options, model.sha256, identity, n)
        for name, options, identity in made
        for n in dict.fromkeys(decoders)
    ]
