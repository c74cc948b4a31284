"""A flight's originals and restored frames, compared: tie points, and perhaps reconstructions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from archive_pipeline.photogrammetry.alignment import difference, in_metres, level
from archive_pipeline.photogrammetry.control import Keypoints, run_control
from archive_pipeline.photogrammetry.frames import Frame, Pair, choose_pairs, places
from archive_pipeline.photogrammetry.matching import Matcher, image_name, inliers
from archive_pipeline.photogrammetry.reconstruction import Reconstruction, reconstruct_once
from archive_pipeline.photogrammetry.resuming import Results
from archive_pipeline.photogrammetry.verdict import FlightReport, Moved, Tolerances, judge

Geometries = dict[Pair, Any]


def compare(
    flight: str,
    members: Mapping[int, Frame],
    matcher: Matcher,
    tolerances: Tolerances,
    *,
    quick: bool,
    seed: int,
    scratch: Path,
    threads: int,
    results: Results,
    stage: Callable[[str], None],
) -> FlightReport:
    """Compare a flight's frames, whose features the matcher has.

    Pairs that do not overlap in the originals are not looked at in the restored frames.

    Args:
        flight: its id.
        members: its frames by their numbers among the matcher's images.
        quick: whether to do without reconstructions.
        seed: of all that is random.
        scratch: a folder for temporary files.
        threads: to repeat reconstructions with.
        results: what an interrupted run had found.
        stage: called with what is done.
    """
    frames, numbers = list(members.values()), list(members)
    report = FlightReport(flight, frames, quick=quick)
    pairs = choose_pairs(frames)
    before = _tie_points(matcher, "o", numbers, pairs, f"{flight}: originals", stage)
    overlapping = [pair for pair in pairs if len(inliers(before[pair]))]
    after = _tie_points(matcher, "r", numbers, overlapping, f"{flight}: restored frames", stage)
    report.pairs = {p: (len(inliers(before[p])), len(inliers(after[p]))) for p in overlapping}
    stage(f"{flight}: how far points moved")
    report.moved = movements(matcher, numbers)
    if not quick and overlapping:
        points = {p: [matcher.keypoints(image_name(p, n)) for n in numbers] for p in ("o", "r")}
        where = places(frames)

        def model(version: str, keypoints: Keypoints) -> Reconstruction | None:
            found = before if version == "o" else after
            good = {pair: found[pair] for pair in overlapping if len(inliers(found[pair]))}
            return reconstruct_once(results, frames, where, keypoints, good, seed, scratch)

        both = points["o"], points["r"]
        _reconstruct(report, model, both, tolerances.centres, seed, threads, stage)
    judge(report, tolerances)
    return report


def _reconstruct(
    report: FlightReport,
    model: Callable[[str, Keypoints], Reconstruction | None],
    points: tuple[Keypoints, Keypoints],
    centres: float,
    seed: int,
    threads: int,
    stage: Callable[[str], None],
) -> None:
    """Reconstruct both versions, and the originals again where cameras moved further than passes.

    Args:
        model: reconstructs "o" or "r" from points wherever they lie.
        points: of the originals and of the restored frames.
        centres: ground sample distances.
    """
    flight, frames = report.flight, report.frames
    stage(f"{flight}: reconstructing the originals")
    original = model("o", points[0])
    stage(f"{flight}: reconstructing the restored frames")
    report.restored = model("r", points[1])
    if original is not None:
        report.original = in_metres(level(original, frames), places(frames))
    if report.original is not None and report.restored is not None:
        report.difference = difference(report.original, report.restored)
    if report.original is not None and (report.centres_gsd or 0) > centres:
        report.control = run_control(
            report.original,
            points[0],
            partial(model, "o"),
            report.centres_m or 0,
            seed,
            threads,
            lambda last: stage(f"{flight}: reconstructing the originals again, {last} times"),
        )


def _tie_points(
    matcher: Matcher,
    prefix: str,
    numbers: list[int],
    pairs: list[Pair],
    title: str,
    stage: Callable[[str], None],
) -> Geometries:
    """COLMAP's geometries of pairs of frames, as they were ("o") or restored ("r")."""
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        stage(f"{title}: tie points of {done} of {len(pairs)} pairs")

    step(0)
    names = [image_name(prefix, number) for number in numbers]
    found = matcher.match([(names[one], names[two]) for one, two in pairs], step)
    return dict(zip(pairs, found.values(), strict=True))


def movements(matcher: Matcher, numbers: list[int]) -> list[Moved]:
    """How far each frame's points moved: those that one geometry takes to the restored frame."""
    names = [(image_name("o", number), image_name("r", number)) for number in numbers]
    found = matcher.match(names, lambda number: None)
    moved = []
    for (one, two), geometry in zip(names, found.values(), strict=True):
        pairs = inliers(geometry)
        ways = matcher.keypoints(two)[pairs[:, 1]] - matcher.keypoints(one)[pairs[:, 0]]
        if not len(ways):
            nan = float("nan")
            moved.append(Moved(0, nan, nan, (nan, nan)))
            continue
        median, p95 = np.percentile(np.hypot(*ways.T), [50, 95])
        right, down = np.median(ways, axis=0)
        moved.append(Moved(len(ways), float(median), float(p95), (float(right), float(down))))
    return moved
