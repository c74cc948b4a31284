"""`archive verify-detection`: did detection survive?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from archive_pipeline import api
from archive_pipeline.commands._console import (
    Progress,
    print_verification,
)
from archive_pipeline.commands._options import (
    BELOW_TOLERANCE,
    DONE,
    ERROR,
    PARTLY_FAILED,
    common,
    decoding,
    exit_codes,
    originals,
    parallel,
)
from archive_pipeline.commands._verifying import conclude, reported, tell_problems


@click.command(
    short_help="Do detectors still see what they saw?",
    epilog=exit_codes(
        {
            DONE: "passed",
            ERROR: "error, or nothing could be compared, which proves nothing",
            PARTLY_FAILED: "passed, but some images could not be compared: failed, or retired",
            BELOW_TOLERANCE: "below tolerance: some metric differs by more",
        }
    ),
)
@originals
@click.option(
    "--labels",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="YOLO labels (.txt), the reference; without them the originals' detections are.",
)
@click.option(
    "--names",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="data.yaml or classes.txt with the labels' class names; else looked for beside them.",
)
@click.option(
    "--model",
    multiple=True,
    metavar="NAME|PATH",
    help="Detector: an Ultralytics name, .pt, .onnx, or OpenVINO folder; may be repeated.  "
    "[default: yolo11s.pt]",
)
@click.option(
    "--classes",
    multiple=True,
    metavar="GROUP[=NAME,...]",
    help="Classes judged together; may be repeated.  [default: vehicle, person, building]",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    metavar="D",
    default=0.02,
    show_default=True,
    help="Largest difference of any metric that passes.",
)
@click.option(
    "--confidence",
    type=click.FloatRange(0, 1),
    metavar="C",
    default=0.25,
    show_default=True,
    help="Least confidence of detections that count.",
)
@click.option(
    "--iou",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="IOU",
    default=0.5,
    show_default=True,
    help="Least overlap of a detection with its reference object.",
)
@click.option(
    "--slice",
    type=click.IntRange(min=32),
    metavar="PIXELS",
    help="Side of the slices that detectors see.  [default: the model's input size]",
)
@reported
@decoding
@parallel
@common
def verify_detection(
    archive_url: str,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **options: Any,
) -> None:
    """Compare what detectors find in the originals and in the restored images.

    Passes if no metric of any group of classes differs by more than the tolerance.
    """
    bar, drawing = Progress("verify", quiet), Progress("report", quiet)

    def drawn(total: int) -> None:
        bar.close()
        drawing.step(total)

    with bar, drawing:
        report = api.verify_detection(
            archive_url, progress=bar.step, drawn=drawn, stage=bar.stage, **options
        )
    tell_problems(report, quiet)
    if as_json:
        click.echo(json.dumps(report.to_json(), allow_nan=False))
    else:
        print_verification(report, quiet)
    conclude(report)
