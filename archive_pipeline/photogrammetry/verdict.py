"""What a comparison of a flight's frames says: numbers, differences, pass or fail."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from archive_pipeline.photogrammetry.alignment import Difference
from archive_pipeline.photogrammetry.control import Control
from archive_pipeline.photogrammetry.frames import Frame, Pair
from archive_pipeline.photogrammetry.reconstruction import Reconstruction

NAMED = 5  # frames that lost most, named with a failure
ENOUGH = 100  # tie points of a frame that are judged by themselves: chance moves fewer too far


@dataclass(frozen=True)
class Tolerances:
    """What passes.

    Attributes:
        inliers: least share of all tie points that is kept.
        frame_inliers: least share of any frame's, of those that have `ENOUGH`.
        shift: pixels that any frame's points may have moved by, in one direction, at most.
        moved: pixels that half of any frame's points may have moved by, in whatever direction.
        centres: ground sample distances that cameras may have moved by, root mean square; if the
            originals' own noise moves them further (`control`), so far.
    """

    inliers: float = 0.9
    frame_inliers: float = 0.5
    shift: float = 0.1
    moved: float = 0.3
    centres: float = 0.5


@dataclass(frozen=True)
class Moved:
    """How far the points of a frame moved from the original to the restored pixels.

    Attributes:
        points: features of the original that were found again.
        median, p95: of their ways, pixels; NaN without points, as the others.
        shift: the ways' median in columns and in rows, pixels.
    """

    points: int
    median: float
    p95: float
    shift: tuple[float, float]

    @property
    def shifted(self) -> float:
        """Length of the shift, pixels."""
        return float(np.hypot(*self.shift))


@dataclass(frozen=True)
class Failure:
    """A difference beyond a tolerance.

    Attributes:
        what: one of "images", "inliers", "frame inliers", "shift", "moved", "centres".
        value, tolerance: what was found, and what would pass.
        frames: names of those that lost most, the worst first.
    """

    what: str
    value: float
    tolerance: float
    frames: list[str]

    def told(self) -> str:
        """The failure in words, without the frames."""
        words = {
            "images": "{0:.0f} images lost, {1:.0f} may be",
            "inliers": "{0:.1%} of the tie points kept, {1:.0%} must be",
            "frame inliers": "{0:.1%} of a frame's tie points kept, {1:.0%} must be",
            "shift": "the points of a frame shifted by {0:.2f} px, {1:g} pass",
            "moved": "half of a frame's points moved by {0:.2f} px or more, {1:g} pass",
            "centres": "cameras moved by {0:.2f} ground sample distances, {1:.3g} pass",
        }
        return words[self.what].format(self.value, self.tolerance)


@dataclass
class FlightReport:
    """Numbers and verdict of one flight.

    Attributes:
        flight: its id.
        frames: those that were compared, by which the rest counts.
        pairs: tie points of both versions of each pair that overlaps in the original.
        moved: of each frame.
        original, restored: reconstructions; None with `quick`, or where there is none.
        difference: between them.
        control: what the original's differs from itself by, where the difference is larger than
            what passes without.
        reason: why nothing is proven, if nothing is.
    """

    flight: str
    frames: list[Frame]
    pairs: dict[Pair, tuple[int, int]] = field(default_factory=dict)
    moved: list[Moved] = field(default_factory=list)
    quick: bool = False
    original: Reconstruction | None = None
    restored: Reconstruction | None = None
    difference: Difference | None = None
    control: Control | None = None
    reason: str | None = None
    failures: list[Failure] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Something was compared, and no difference exceeds its tolerance."""
        return self.reason is None and not self.failures

    @property
    def inliers(self) -> tuple[int, int]:
        """Tie points of all pairs: of the originals and of the restored frames."""
        counts = list(self.pairs.values())
        return sum(a for a, _ in counts), sum(b for _, b in counts)

    def by_frame(self) -> list[tuple[int, int]]:
        """Tie points of each frame in all its pairs, of both versions."""
        counts = np.zeros((len(self.frames), 2), int)
        for pair, both in self.pairs.items():
            counts[list(pair)] += both
        return [(int(a), int(b)) for a, b in counts]

    def worst(self) -> list[int]:
        """Frames by what they lost: those of the least share of tie points first."""
        counts = self.by_frame()
        shares = [b / a if a else 1.0 for a, b in counts]
        return sorted(range(len(shares)), key=lambda i: (shares[i], -counts[i][0], i))

    def registered(self) -> tuple[set[int], set[int]]:
        """Frames that fit to others: registered, with `quick` those that have tie points."""
        if not self.quick:
            both = self.original, self.restored
            one, two = (set() if r is None else set(r.centres) for r in both)
            return one, two
        counts = list(enumerate(self.by_frame()))
        return {i for i, (a, _) in counts if a}, {i for i, (_, b) in counts if b}

    @property
    def judged(self) -> list[Frame]:
        """Frames that the verdict is about: if it is passed, those alone that fitted to others."""
        fitting = self.registered()[0]
        return self.frames if self.failures else [self.frames[i] for i in sorted(fitting)]

    @property
    def centres_m(self) -> float | None:
        """Root mean square of the cameras' ways, metres."""
        return None if self.difference is None else self.difference.moved

    @property
    def centres_gsd(self) -> float | None:
        """The same in ground sample distances of the original's reconstruction."""
        if self.centres_m is None or self.original is None:
            return None
        return self.centres_m / self.original.spacing

    def to_json(self) -> dict[str, Any]:
        """This flight's part of `archive verify-photogrammetry --json`."""
        before, after = self.registered()
        one, two = self.inliers
        return {
            "flight": self.flight,
            "passed": self.passed,
            "proven": self.reason is None,
            "reason": self.reason,
            "frames": len(self.frames),
            "images": {"original": len(before), "restored": len(after)},
            "inliers": {
                "original": one,
                "restored": two,
                "share": _rounded(two / one) if one else None,
            },
            "pairs": [
                {"frames": [self.frames[i].name, self.frames[j].name], "original": a, "restored": b}
                for (i, j), (a, b) in self.pairs.items()
            ],
            "moved": [
                {
                    "image": frame.name,
                    "points": moved.points,
                    "median_px": _rounded(moved.median),
                    "p95_px": _rounded(moved.p95),
                    "shift_px": [_rounded(value) for value in moved.shift],
                }
                for frame, moved in zip(self.frames, self.moved, strict=False)
            ],
            "original": self._model(self.original),
            "restored": self._model(self.restored),
            "difference": self._difference(),
            "control": self._control(),
            "failures": [
                {
                    "what": f.what,
                    "value": _rounded(f.value),
                    "tolerance": f.tolerance,
                    "images": f.frames,
                }
                for f in self.failures
            ],
        }

    @staticmethod
    def _model(model: Reconstruction | None) -> dict[str, Any] | None:
        if model is None:
            return None
        return {
            "images": len(model.centres),
            "points": len(model.points),
            "track_length": _rounded(model.track),
            "reprojection_error_px": _rounded(model.error),
            "ground_sample_distance_m": _rounded(model.spacing, 6),
            "lenses": [
                {"focal_px": _rounded(focal, 2), "radial": _rounded(radial, 6)}
                for focal, radial in model.lenses
            ],
        }

    def _difference(self) -> dict[str, Any] | None:
        if self.difference is None or self.original is None:
            return None
        found, spacing = self.difference, self.original.spacing
        ways = {i: float(np.linalg.norm(offset)) for i, offset in found.offsets.items()}
        return {
            "centres_m": _rounded(self.centres_m, 6),
            "centres_gsd": _rounded(self.centres_gsd),
            "largest_m": _rounded(max(ways.values()), 6),
            "rotations_deg": _rounded(_rms([*found.turns.values()]), 6),
            "scale": _rounded(found.scale, 8),
            "ground_sunk_m": _rounded(found.sunk, 6),
            "surface_m": _rounded(found.surface, 6),
            "surface_gsd": None if found.surface is None else _rounded(found.surface / spacing),
            "surface_cells": found.cells,
            "frames": [
                {
                    "image": self.frames[i].name,
                    "centre_m": _rounded(way, 6),
                    "rotation_deg": _rounded(found.turns[i], 6),
                }
                for i, way in ways.items()
            ],
        }

    def _control(self) -> dict[str, Any] | None:
        if self.control is None or self.original is None:
            return None
        moved = np.array(self.control.moved) / self.original.spacing
        return {
            "noise_px": _rounded(self.control.noise),
            "repeats": len(moved),
            "fell_apart": int(np.isinf(moved).sum()),
            "centres_gsd": {
                "median": _rounded(float(np.median(moved))),
                "largest": _rounded(float(moved.max())),
            },
        }


def _rms(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None or not np.isfinite(value) else round(float(value), digits) + 0.0


def judge(report: FlightReport, tolerances: Tolerances) -> None:
    """Add what fails to a report, or why nothing is proven."""
    before, after = report.registered()
    if not before:
        report.reason = (
            "no frames overlap: no tie points between any two originals"
            if report.quick or not report.pairs
            else "the originals cannot be reconstructed: too few tie points"
        )
        return
    if not report.quick and report.restored is not None and report.difference is None:
        report.reason = "fewer than two frames are in both reconstructions"
    _judge_images(report, before, after)
    _judge_inliers(report, tolerances)
    _judge_moved(report, tolerances)
    _judge_centres(report, tolerances)
    if report.failures:
        report.reason = None  # what fails is proven


def _judge_images(report: FlightReport, before: set[int], after: set[int]) -> None:
    lost = sorted(before - after)
    if lost:
        names = [report.frames[i].name for i in lost[:NAMED]]
        report.failures.append(Failure("images", len(lost), 0, names))


def _judge_inliers(report: FlightReport, tolerances: Tolerances) -> None:
    one, two = report.inliers
    counts, names = report.by_frame(), [frame.name for frame in report.frames]
    shares = {i: counts[i][1] / counts[i][0] for i in report.worst() if counts[i][0]}
    if one and two / one < tolerances.inliers:
        most = [names[i] for i, share in shares.items() if share < 1][:NAMED]
        report.failures.append(Failure("inliers", two / one, tolerances.inliers, most))
    least = tolerances.frame_inliers
    low = [i for i, share in shares.items() if counts[i][0] >= ENOUGH and share < least]
    if low:
        failure = Failure("frame inliers", shares[low[0]], least, [names[i] for i in low[:NAMED]])
        report.failures.append(failure)


def _judge_moved(report: FlightReport, tolerances: Tolerances) -> None:
    for what, value, least in (
        ("shift", "shifted", tolerances.shift),
        ("moved", "median", tolerances.moved),
    ):
        ways = {i: getattr(m, value) for i, m in enumerate(report.moved) if m.points}
        over = sorted((i for i in ways if ways[i] > least), key=lambda i: (-ways[i], i))
        if over:
            names = [report.frames[i].name for i in over[:NAMED]]
            report.failures.append(Failure(what, ways[over[0]], least, names))


def _judge_centres(report: FlightReport, tolerances: Tolerances) -> None:
    value, found, control = report.centres_gsd, report.difference, report.control
    if value is None or found is None or report.original is None:
        return
    passing = tolerances.centres
    if control is not None:
        passing = max(passing, control.most / report.original.spacing)
    if not value <= passing:
        own = {} if control is None else control.ways
        # those that moved most for what they move by themselves
        ways = {
            i: float(np.linalg.norm(way)) / max(own.get(i, 1.0), 1e-9)
            for i, way in found.offsets.items()
        }
        worst = sorted(ways, key=lambda i: (-ways[i], i))[:NAMED]
        names = [report.frames[i].name for i in worst]
        report.failures.append(Failure("centres", value, passing, names))
