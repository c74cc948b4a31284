"""What an ingest is asked for, image by image, and what became of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from archive_pipeline.flight.find import ImageFile
from archive_pipeline.flight.locations import Location
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.jobs._jpeg_files import is_named_jpeg
from archive_pipeline.pcdc.precision import Precision

if TYPE_CHECKING:
    from archive_pipeline.detection.detectors import DetectorFile


@dataclass(frozen=True)
class Budget:
    """What an image may take, everything stored for it counted. Exactly one field is set.

    Attributes:
        ratio: raw bytes (height x width x 3) over archive bytes.
        bpp: archive bits a pixel.
        source_ratio: bytes of the source file over archive bytes.
    """

    ratio: float | None = None
    bpp: float | None = None
    source_ratio: float | None = None

    def bytes_for(self, source: SourceImage) -> int:
        """Bytes allowed for an image."""
        pixels = source.width * source.height
        if self.bpp is not None:
            return int(pixels * self.bpp / 8)
        if self.source_ratio is not None:
            return int(source.size_bytes / self.source_ratio)
        assert self.ratio is not None
        return int(pixels * 3 / self.ratio)


@dataclass(frozen=True)
class IngestOptions:
    """Settings of an ingest, as the command line has them."""

    budget: Budget = field(default_factory=lambda: Budget(ratio=100))
    model: str | None = None  # shipped name or folder; the default model without one
    device: str = "auto"
    overwrite: bool = False
    ground_elevation: float | None = None
    detect: tuple[str, ...] = ()  # detectors whose finds in the originals are stored
    allocation: str = "uniform"  # of `ALLOCATIONS`, or "objects" for what `detect` finds
    adapt: int = 0  # updates that the policy is given on every image
    precision: Precision = "auto"  # of the codec's large networks
    dem: str | None = None  # a raster of the ground's heights
    poses: str | None = None  # a file of what photogrammetry found
    salvage: bool = False  # damaged JPEGs as far as they can be decoded
    lossless_jpeg: bool = False  # JPEGs as the files that they are, byte for byte
    images: tuple[str, ...] = ()  # those that `lossless_jpeg` means, and `overwrite` then; else all


@dataclass(frozen=True)
class IngestTask:
    """One image to archive.

    Attributes:
        id: of the image that it becomes.
        file: what it is made of.
        replaces: SHA-256 of the file whose image it replaces; None where there is none yet.
    """

    archive: str
    flight: str
    id: str
    file: ImageFile
    options: IngestOptions
    replaces: str | None = None
    model: str = ""  # SHA-256 of a model that is in the archive; none where none is needed
    policy: str = ""  # SHA-256 of a policy that is in the archive, where allocation is by it
    detectors: tuple[DetectorFile, ...] = ()

    @property
    def path(self) -> Location:
        """Where the file is."""
        return self.file.path

    @property
    def keeps_file(self) -> bool:
        """Whether the image is archived as the file that it is, if that is a JPEG."""
        return self.options.lossless_jpeg and is_named_jpeg(self.file.name)


@dataclass(frozen=True)
class OverBudget:
    """An image that takes more bytes than it may, since less cannot be had.

    Attributes:
        image: its id.
        budget_bytes: what it may take: its budget, or the size of its file where that is less.
        archive_bytes, excess_bytes: what it takes, and by how much that is more.
        reason: what takes them, in one line.
    """

    image: str
    budget_bytes: int
    archive_bytes: int
    excess_bytes: int
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What became of one image.

    `error` is None unless it failed; `reason` says why a file was skipped that the archive does not
    have under an id of its own; `replaced` whether another image stood in its place, what remains
    of which is to be removed.
    """

    flight: str
    id: str
    path: str
    status: str  # "ingested" | "skipped" | "failed"
    error: str | None = None
    reason: str | None = None
    codec: str | None = None
    warnings: tuple[str, ...] = ()
    source_bytes: int = 0
    raw_bytes: int = 0
    archive_bytes: int = 0
    pixels: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, see `IngestReport.stages`
    over_budget: OverBudget | None = None
    replaced: bool = False

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know of an image that did not fail."""
        if self.reason is None:
            return self.warnings
        return (f"skipped: it {self.reason}", *self.warnings)
