"""A verification of an archive by photogrammetry: its settings, and what was found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from archive_pipeline._version import __version__
from archive_pipeline.flight.locations import Location
from archive_pipeline.photogrammetry.features import FEATURES
from archive_pipeline.photogrammetry.verdict import FlightReport, Tolerances


@dataclass(frozen=True)
class PhotogrammetryOptions:
    """Settings of a verification, as the command line has them.

    Attributes:
        tolerances: what passes.
        quick: whether to do without reconstructions.
        originals: folder or URL in which the originals lie; by default the folders that this user
            archived from on this machine.
        flight: only this one.
        features: of a frame at most.
        seed: of all that is random.
        device, precision: how the images are restored, as in `restore.restore`.
    """

    tolerances: Tolerances = field(default_factory=Tolerances)
    quick: bool = False
    originals: Location | None = None
    flight: str | None = None
    features: int = FEATURES
    seed: int = 0
    device: str = "auto"
    precision: Any = "auto"


@dataclass
class PhotogrammetryReport:
    """Outcome of a verification.

    Attributes:
        archive: its URL.
        flights: numbers and verdict of each.
        failed: {"image", "error"} of each image that could not be compared.
        skipped: {"image", "reason"} of images that are no frames with a position.
        warnings: what is odd, a line each.
        retired: {"flight", "image", "deleted": when, "verdicts": [{"kind", "passed", "date"}]} of
            each image that could not be compared as `archive retire` has deleted its original.
        seconds: that it took; `peak_memory`: most bytes that a worker's process held.
    """

    archive: str
    options: PhotogrammetryOptions
    flights: list[FlightReport] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    retired: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory: int | None = None

    @property
    def passed(self) -> bool:
        """Every flight was compared, and no difference exceeds its tolerance."""
        return bool(self.flights) and all(flight.passed for flight in self.flights)

    @property
    def below_tolerance(self) -> bool:
        """Some difference exceeds its tolerance."""
        return any(flight.failures for flight in self.flights)

    @property
    def unproven(self) -> str:
        """Why a verification without failures has not passed."""
        reasons = [f"{f.flight}: {f.reason}" for f in self.flights if f.reason is not None]
        return "; ".join(reasons) or "there are no images"

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        if self.passed:
            return "passed"
        return "failed" if self.below_tolerance else "not proven"

    def to_json(self) -> dict[str, Any]:
        """The contract of `archive verify-photogrammetry --json`."""
        tolerances = self.options.tolerances
        return {
            "version": __version__,
            "passed": self.passed,
            "quick": self.options.quick,
            "seed": self.options.seed,
            "features": self.options.features,
            "tolerances": dict(vars(tolerances)),
            "flights": [flight.to_json() for flight in self.flights],
            "failed": self.failed,
            "skipped": self.skipped,
            "retired": self.retired,
            "warnings": self.warnings,
            "seconds": round(self.seconds, 2),
            "peak_memory": self.peak_memory,
        }
