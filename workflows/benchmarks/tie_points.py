"""Tie points of frames that overlap, as they were and through codecs at equal bytes.

What `archive verify-photogrammetry --quick` finds (the same features, matches and RANSAC), for any
codec. Ours gets its share of the raw bytes for each frame. A peer gets as many bytes as ours took,
and what it left of them for earlier frames: its settings are steps (x265's of 13 % of the bytes),
and it shall not lose by them. In all it takes no more than ours, but where its coarsest setting
does, and less by part of a frame's bytes at most.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click
import numpy as np
from benchmark_crops import CropError, images_of, read_image
from benchmark_rows import Row, read_rows, write_rows
from benchmark_summary import OURS, label, table
from numpy.typing import NDArray
from rate_distortion import Floats, bootstrap_share

from archive_pipeline.errors import NotInstalled, require
from archive_pipeline.flight.read import read_source
from archive_pipeline.flight.source_image import SourceError
from archive_pipeline.geo.pose import CameraPose
from archive_pipeline.pcdc.allocation import BudgetTooSmall
from archive_pipeline.photogrammetry.frames import EVERY_PAIR, Frame, Pair

sys.path.append(str(Path(__file__).resolve().parents[1] / "_shared"))
from coding import Coder, split
from peers import FLIGHT_PEERS, Peer, search
from windows import reader_of

if TYPE_CHECKING:
    from archive_pipeline.photogrammetry.features import Features
    from archive_pipeline.photogrammetry.verdict import Moved

RATIOS = (24.0, 48.0, 100.0)  # of raw bytes to ours
ENOUGH = 0.93  # of the bytes allowed: what is left is used by the next frame
FRAMES = EVERY_PAIR  # of a set: each is matched with each
PAIR_FIELDS = ["set", "ratio", "codec", "one", "two", "original", "restored"]
FRAME_FIELDS = [
    *["set", "ratio", "codec", "frame", "setting", "bytes"],
    *["points", "median_px", "p95_px"],
]

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Plan:
    """What is measured of each set: our coder and how it decodes, peers by name, the seed."""

    coder: Coder
    allocation: str
    steps: int
    peers: tuple[str, ...]
    seed: int
    threads: int


@dataclass(frozen=True)
class Measured:
    """Rows about a set at one ratio: of pairs of frames, and of frames."""

    pairs: list[Row]
    frames: list[Row]


class Overlapping:
    """The first frames of a set, their features, and the tie points of pairs that overlap."""

    def __init__(self, name: str, folder: Path, plan: Plan) -> None:
        """Read the frames.

        Raises:
            CropError: the folder holds no images, or one that cannot be read.
        """
        self.name, self.plan = name, plan
        shot = {path: _frame(name, path) for path in images_of(name, folder)}
        if any(frame.camera.make for frame in shot.values()):  # else a map may lie among them
            shot = {path: frame for path, frame in shot.items() if frame.camera.make}
        self.files = [*shot][:FRAMES]
        self.frames = [shot[path] for path in self.files]
        self.features = [_features(read_image(path, 1)) for path in self.files]
        every = [(i, j) for i in range(len(self.files)) for j in range(i + 1, len(self.files))]
        found, _ = self._compare(self.features, every)
        self.pairs: dict[Pair, int] = {pair: count for pair, count in found.items() if count}

    def measure(self, ratio: float, tell: Callable[[str], None]) -> Measured:
        """Run all codecs over the frames, and match what comes back."""
        frames: dict[str, list[Row]] = {}
        features: dict[str, list[Features]] = {}
        takes = {name: Taken(FLIGHT_PEERS[name]) for name in self.plan.peers}
        for path in self.files:
            pixels = read_image(path, 1)
            for codec, setting, size, restored in self._versions(pixels, ratio, takes):
                row = {"set": self.name, "ratio": ratio, "codec": codec, "frame": path.name}
                frames.setdefault(codec, []).append({**row, "setting": setting, "bytes": size})
                features.setdefault(codec, []).append(_features(restored))
            tell(f"{self.name} {ratio:g}: {path.name}")
        pairs = []
        for codec, found in features.items():
            counts, moved = self._compare(found, list(self.pairs))
            for row, ways in zip(frames[codec], moved, strict=True):
                row |= {"points": ways.points, "median_px": ways.median, "p95_px": ways.p95}
            for (i, j), count in counts.items():
                row = {"set": self.name, "ratio": ratio, "codec": codec}
                row |= {"one": self.files[i].name, "two": self.files[j].name}
                pairs.append({**row, "original": self.pairs[i, j], "restored": count})
        return Measured(pairs, [row for rows in frames.values() for row in rows])

    def _versions(
        self, pixels: Pixels, ratio: float, takes: dict[str, Taken]
    ) -> Iterator[tuple[str, float, int, Pixels]]:
        """Of each codec its name, setting, bytes and what it makes of a frame."""
        plan = self.plan
        streams = plan.coder.encode(split(pixels), int(pixels.size / ratio), plan.allocation)
        size = sum(map(len, streams))
        height, width = pixels.shape[:2]
        yield OURS, ratio, size, plan.coder.decode(streams, (height, width), plan.steps)
        for name, taken in takes.items():
            setting, data = taken.encode(pixels, size)
            yield name, setting, taken.peer.size(data), taken.peer.decode(data)

    def _compare(
        self, features: list[Features], pairs: list[Pair]
    ) -> tuple[dict[Pair, int], list[Moved]]:
        """Tie points of pairs of restored frames, and how far points moved from the originals."""
        from archive_pipeline.photogrammetry.comparison import movements
        from archive_pipeline.photogrammetry.matching import Matcher, image_name, inliers

        numbers = range(len(self.frames))
        with TemporaryDirectory() as folder:
            path = Path(folder) / "features.db"
            matcher = Matcher(path, self.frames, self.plan.seed, self.plan.threads)
            for number in numbers:
                matcher.add(image_name("r", number), features[number])
            names = [(image_name("r", one), image_name("r", two)) for one, two in pairs]
            found = matcher.match(names, lambda count: None)
            counts = [len(inliers(geometry)) for geometry in found.values()]
            moved: list[Moved] = []
            if features is not self.features:
                for number in numbers:
                    matcher.add(image_name("o", number), self.features[number])
                moved = movements(matcher, [*numbers])
        return dict(zip(pairs, counts, strict=True)), moved


class Taken:
    """A peer on its way through a flight: what it may take, and where its search begins."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._left = 0
        self._setting: float | None = None

    def encode(self, pixels: Pixels, size: int) -> tuple[float, bytes]:
        """A setting and its file, of `size` bytes and what earlier frames left of theirs at most.

        Where the coarsest takes more, it is that.
        """
        allowed = size + self._left
        found = search(self.peer, pixels, allowed, at_most=True, start=self._setting, enough=ENOUGH)
        if found is None:
            coarsest = self.peer.settings[0]
            found = coarsest, self.peer.encode(pixels, coarsest)
        self._setting = found[0]
        self._left = max(0, allowed - self.peer.size(found[1]))
        return found


def _frame(name: str, path: Path) -> Frame:
    try:
        source = read_source(path, path.name)
        read_image(path, 1)
    except (SourceError, OSError) as error:
        raise CropError(f"{name}: {path.name} cannot be read") from error
    return Frame(path.name, source.width, source.height, source.camera or CameraPose())


def _features(pixels: Pixels) -> Features:
    from archive_pipeline.photogrammetry.features import find_features

    return find_features(reader_of(pixels), pixels.shape[1], pixels.shape[0])


def check_installed() -> None:
    """Make sure that features can be found and matched.

    Raises:
        click.ClickException: a package is missing.
    """
    try:
        for module in ("cv2", "pycolmap"):
            require(module, "counting tie points", "photogrammetry")
    except NotInstalled as error:
        raise click.ClickException(str(error)) from error


def run(
    out: Path,
    sets: dict[str, Path],
    ratios: tuple[float, ...],
    plan: Plan,
    tell: Callable[[str], None],
) -> tuple[Measured, list[str]]:
    """Measure all sets at all ratios, and keep the rows in tie_points.csv and tie_frames.csv.

    What these hold already is not measured again.

    Args:
        tell: called with a line after each frame.

    Returns:
        All rows, and notes on sets whose frames do not overlap, and ratios that cannot be kept.

    Raises:
        CropError: a folder holds no images, or one that cannot be read.
    """
    done = Measured(read_rows(out / "tie_points.csv"), read_rows(out / "tie_frames.csv"))
    notes = []
    for name, folder in sets.items():
        known = {row["ratio"] for row in done.frames if row["set"] == name}
        left = [ratio for ratio in ratios if ratio not in known]
        if not left:
            continue
        flight = Overlapping(name, folder, plan)
        if not flight.pairs:
            notes.append(f"tie points of {name}: no two of its frames overlap")
            continue
        for ratio in left:
            try:
                found = flight.measure(ratio, tell)
            except BudgetTooSmall as error:
                notes.append(f"tie points of {name} at ratio {ratio:g}: a frame {error}")
                continue
            done = Measured(done.pairs + found.pairs, done.frames + found.frames)
            write_rows(out / "tie_points.csv", PAIR_FIELDS, done.pairs)
            write_rows(out / "tie_frames.csv", FRAME_FIELDS, done.frames)
    return done, notes


# ------------------------------------------------------------------------------- the page


def lines(pairs: list[Row], frames: list[Row], seed: int) -> list[str]:
    """Markdown: a table of each set, a row for each ratio and codec."""
    text = []
    for name in dict.fromkeys(row["set"] for row in pairs):
        here = [row for row in pairs if row["set"] == name]
        members = [row for row in frames if row["set"] == name]
        overlap = len({(row["one"], row["two"]) for row in here})
        count = len({row["frame"] for row in members})
        text += ["", f"## Tie points, {name} ({count} frames, {overlap} pairs overlap)", ""]
        rows = []
        for ratio in sorted({row["ratio"] for row in here}):
            by_codec = {
                codec: tuple(
                    [r for r in some if (r["ratio"], r["codec"]) == (ratio, codec)]
                    for some in (here, members)
                )
                for codec in dict.fromkeys(row["codec"] for row in here)
            }
            rows += [
                [f"{ratio:g}", label(codec), *_cells(*own, *by_codec[OURS], seed)]
                for codec, own in by_codec.items()
                if own[0]
            ]
        header = ["ratio", "codec", "bytes over ours", "tie points", "kept", "more than ours"]
        text += table([*header, "points move"], rows)
    return text


def _cells(
    pairs: list[Row], frames: list[Row], our_pairs: list[Row], our_frames: list[Row], seed: int
) -> list[str]:
    """What a row says of one codec at one ratio, beside ours."""
    kept, whole = columns(pairs)
    ours, _ = columns(our_pairs)
    taken = sum(row["bytes"] for row in frames) / sum(row["bytes"] for row in our_frames)
    more = None if pairs is our_pairs else kept - ours
    cells = [f"{taken:.3f}", *shares(kept, whole, more, seed)]
    ways = [row["median_px"] for row in frames if np.isfinite(row["median_px"])]
    return [*cells, f"{max(ways):.2f} px" if ways else ""]


def shares(kept: Floats, whole: Floats, more: Floats | None, seed: int) -> list[str]:
    """Tie points kept of all of them, their share, and how many more than ours; with intervals."""
    low, high = bootstrap_share(kept, whole, seed)
    share = kept.sum() / whole.sum()
    cells = [f"{kept.sum():.0f} of {whole.sum():.0f}", f"{share:.1%} [{low:.1%}, {high:.1%}]"]
    if more is None:
        return [*cells, ""]
    low, high = bootstrap_share(100 * more, whole, seed)
    return [*cells, f"{100 * more.sum() / whole.sum():+.1f} % [{low:+.1f}, {high:+.1f}]"]


def columns(pairs: list[Row]) -> tuple[Floats, Floats]:
    """Tie points of the restored frames and of the originals, by pair."""
    kept, whole = (np.array([row[k] for row in pairs], float) for k in ("restored", "original"))
    return kept, whole


EXPLAINED = (
    "Matches of SIFT features that agree with one geometry, of a copy of half the size, as "
    "`archive verify-photogrammetry --quick` counts them, between frames that overlap in the "
    "originals: how many restored frames have of them, with 95 % bootstrap intervals over pairs. "
    '"More than ours" is a difference in percent of the originals\'. "Points move": from the '
    "original to the restored frame, the median of the worst frame. Bytes are those of pixels; "
    "peers share ours over the set, frame by frame."
)
