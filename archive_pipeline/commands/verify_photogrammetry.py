"""`archive verify-photogrammetry`: did photogrammetry survive?"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from archive_pipeline import api
from archive_pipeline.commands._console import Progress, print_photogrammetry
from archive_pipeline.commands._options import (
    BELOW_TOLERANCE,
    DONE,
    ERROR,
    PARTLY_FAILED,
    common,
    exit_codes,
    originals,
    parallel,
    say,
)
from archive_pipeline.commands._verifying import conclude, reported, tell_problems


def _tolerance(
    name: str, metavar: str, default: float, help: str, most: float | None = None
) -> Callable[[Any], Any]:
    return click.option(
        name,
        type=click.FloatRange(min=0, max=most),
        metavar=metavar,
        default=default,
        show_default=True,
        help=help,
    )


@click.command(
    short_help="Does photogrammetry still get the same?",
    epilog=exit_codes(
        {
            DONE: "passed",
            ERROR: "error, or nothing could be compared, which proves nothing",
            PARTLY_FAILED: "passed, but some images could not be compared: failed, or retired",
            BELOW_TOLERANCE: "below tolerance: some difference is larger",
        }
    ),
)
@click.option("--quick", is_flag=True, help="Compare tie points only; reconstruct nothing.")
@originals
@click.option("--flight", metavar="ID", help="Only this flight.")
@_tolerance("--inliers", "SHARE", 0.9, "Least share of all tie points that is kept.", 1)
@_tolerance(
    "--frame-inliers", "SHARE", 0.5, "Least share of any frame's, of those that have 100.", 1
)
@_tolerance("--shift", "PIXELS", 0.1, "Largest shift of all points of a frame.")
@_tolerance("--moved", "PIXELS", 0.3, "What half of a frame's points may move by.")
@_tolerance(
    "--centres",
    "GSD",
    0.5,
    "Ground sample distances that cameras may move by, root mean square, after fitting one "
    "reconstruction to the other; or as far as the originals' own noise moves them, if that is "
    "further.",
)
@click.option(
    "--features",
    type=click.IntRange(64, 32768),
    metavar="N",
    default=8192,
    show_default=True,
    help="Features of a frame at most.",
)
@click.option(
    "--seed", type=int, metavar="N", default=0, show_default=True, help="Of all that is random."
)
@reported
@parallel
@common
def verify_photogrammetry(
    archive_url: str,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **options: Any,
) -> None:
    """Compare what photogrammetry gets from the originals and from the restored frames.

    Frames are matched with those taken near to them, and reconstructed by COLMAP, the same way
    twice. Passes if no frame is lost and no difference is beyond its tolerance.

    Few frames do not pin their cameras down. Where cameras move further than --centres, the
    originals are reconstructed up to 19 times again, their points moved at random by what the
    adjustment finds them to be off. It fails if the restored frames move cameras further than all
    of these (Monte Carlo test, 5 %).

    Interrupted, it goes on with what it had found when it is run again.
    """
    bar = Progress("verify", quiet)
    with bar:
        report = api.verify_photogrammetry(
            archive_url, progress=bar.step, stage=bar.stage, **options
        )
    tell_problems(report, quiet)
    if not quiet:
        for skipped in report.skipped:
            say(f"Left out: {skipped['image']}: {skipped['reason']}", err=True)
    if as_json:
        click.echo(json.dumps(report.to_json(), allow_nan=False))
    else:
        print_photogrammetry(report, quiet)
    conclude(report)
