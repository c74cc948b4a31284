"""The `archive` command. Options in, one call, a table or JSON out.

Heavy modules are imported inside the commands: `archive --help` answers at once.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from archive_pipeline import __version__
from archive_pipeline.console import (
    Progress,
    print_info,
    print_ingest,
    print_verification,
    print_warnings,
    seconds_of_work,
)

if TYPE_CHECKING:
    from archive_pipeline.ingest_image import Outcome

PARTLY_FAILED = 3
BELOW_TOLERANCE = 4


@contextmanager
def _errors(verbose: int) -> Iterator[None]:
    """Turn any error into one line and exit code 1; -v shows where it came from."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except Exception as error:
        if verbose:
            raise
        line = " ".join(str(error).split()) or type(error).__name__
        # the project's own errors say all there is to say; others need their type's name
        if not type(error).__module__.startswith("archive_pipeline") and not isinstance(
            error, ValueError
        ):
            line = f"{type(error).__name__}: {line}"
        click.echo(f"Error: {line}", err=True)
        sys.exit(1)


@contextmanager
def _logs(verbose: int, quiet: bool) -> Iterator[None]:
    """Show the package's log on stderr: what -v asks for, or warnings, or errors with -q."""
    handler = logging.StreamHandler()
    logger = logging.getLogger("archive_pipeline")
    logger.setLevel(logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def common(function: Callable[..., None]) -> Callable[..., None]:
    """Options of every command."""

    @click.option(
        "--archive",
        "archive_url",
        default="./archive.zarr",
        envvar="ARCHIVE_STORE",
        show_default=True,
        show_envvar=True,
        help="Path or URL (s3://, memory://, ...) of the archive.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="Only errors and results.")
    @click.option(
        "-v",
        "--verbose",
        count=True,
        help="More detail: Dask's dashboard, workers that die, tracebacks of errors.",
    )
    @functools.wraps(function)
    def wrapped(*args: Any, verbose: int, quiet: bool, **kwargs: Any) -> None:
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # worker processes' too
        with _errors(verbose), _logs(verbose, quiet):
            function(*args, verbose=verbose, quiet=quiet, **kwargs)

    return wrapped


def parallel(function: Callable[..., None]) -> Callable[..., None]:
    """Options of commands that work on many images."""
    for option in (
        click.option(
            "--workers",
            type=click.IntRange(min=0),
            help="Local worker processes; 0 works in this process. By default one a core.",
        ),
        click.option("--scheduler", metavar="ADDRESS", help="Address of a Dask scheduler to use."),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="Where the codec runs.",
        ),
    ):
        function = option(function)
    return function


def decoding(function: Callable[..., None]) -> Callable[..., None]:
    """Options of commands that decode pixels."""
    for option in (
        click.option(
            "--seed",
            type=click.IntRange(0, 2**63 - 1),
            default=0,
            show_default=True,
            help="Seed of the denoiser's noise.",
        ),
        click.option(
            "--steps",
            type=click.IntRange(0, 100),
            default=0,
            show_default=True,
            help="Denoising steps: 0, the deterministic decoder, has the least error; 1 and more "
            "look sharper.",
        ),
    ):
        function = option(function)
    return function


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="archive")
def main() -> None:
    """Keep drone imagery small: archive flights, restore any area as georeferenced pixels."""


@main.command()
@click.argument("flights", nargs=-1, required=True, metavar="FLIGHT_DIR...", type=click.Path())
@click.option("--flight", "name", help="Flight id; by default the directory's name.")
@click.option("--ratio", type=float, help="Raw bytes over archive bytes.  [default: 100]")
@click.option("--bpp", type=float, help="Archive bits a pixel.")
@click.option("--source-ratio", type=float, help="Source file bytes over archive bytes.")
@click.option("--model", help="Shipped model's name or a model folder.")
@click.option(
    "--allocation",
    type=click.Choice(["uniform", "objects", "policy", "greedy"]),
    default="uniform",
    show_default=True,
    help="What decides where an image's bits go: all blocks alike, or those with objects that "
    "--detect finds twice as fine, or the model's learned policy, or the least squared error.",
)
@click.option(
    "--adapt",
    type=click.IntRange(0, 100),
    default=0,
    show_default=True,
    help="With the policy: its updates on each image, judged by decoding (slow; needs the extra "
    "`train`).",
)
@click.option("--overwrite", is_flag=True, help="Encode images again that the archive has.")
@click.option(
    "--ground-elevation",
    type=float,
    metavar="METRES",
    help="Height of the ground, for frames without altitude above take-off.",
)
@click.option(
    "--detect",
    multiple=True,
    metavar="MODEL",
    help="Store what this detector finds in the originals: verify-detection can then do without "
    "them. Counts in the budget; may be repeated.",
)
@parallel
@common
def ingest(
    archive_url: str,
    as_json: bool,
    quiet: bool,
    verbose: int,
    flights: tuple[str, ...],
    name: str | None,
    ratio: float | None,
    bpp: float | None,
    source_ratio: float | None,
    model: str | None,
    allocation: str,
    adapt: int,
    overwrite: bool,
    ground_elevation: float | None,
    detect: tuple[str, ...],
    device: str,
    scheduler: str | None,
    workers: int | None,
) -> None:
    """Archive every image of the flight directories.

    A flight is a folder or an fsspec URL (s3://bucket/flight). Each image takes at most its
    budget, everything stored for it counted. Photographs (8-bit RGB) go through the learned
    codec, everything else is kept losslessly. Ingesting again skips what the archive has, and
    goes on inside a large raster that was interrupted. Exit code 3: some images failed, each is
    named.
    """
    budgets = [value for value in (ratio, bpp, source_ratio) if value is not None]
    if len(budgets) > 1:
        raise click.UsageError("--ratio, --bpp and --source-ratio exclude each other")
    if any(not 0 < value < float("inf") for value in budgets):
        raise click.UsageError("--ratio, --bpp and --source-ratio must be positive")
    if name is not None and len(flights) > 1:
        raise click.UsageError("--flight names a single FLIGHT_DIR")
    if adapt and allocation != "policy":
        raise click.UsageError("--adapt updates the policy: it needs --allocation policy")
    if allocation == "objects" and not detect:
        raise click.UsageError("--allocation objects needs a detector: --detect MODEL")
    from archive_pipeline.sources import location, name_of

    places = [location(text) for text in flights]
    named = [(name or name_of(place) or "flight", place) for place in places]
    if len({flight for flight, _ in named}) < len(named):
        raise click.UsageError("two FLIGHT_DIRs have the same name; ingest one with --flight")

    from archive_pipeline.ingest import ingest as run
    from archive_pipeline.ingest_image import Budget, Options

    options = Options(
        Budget(ratio, bpp, source_ratio) if budgets else Budget(ratio=100),
        model,
        device,
        overwrite,
        ground_elevation,
        detect,
        allocation,
        adapt,
    )
    bar = Progress("ingest", quiet)

    def progress(outcome: Outcome, total: int) -> None:
        if outcome.status == "skipped":
            bar.skip()
        else:
            bar.step(total)
        if outcome.error:
            bar.echo(f"Failed: {outcome.path}: {outcome.error}")

    with bar:
        report = run(
            archive_url,
            named,
            options,
            scheduler=scheduler,
            workers=workers,
            progress=progress,
            part=bar.part,
        )
    if not quiet:
        print_warnings(report, verbose)
    result = report.to_json()
    if as_json:
        click.echo(json.dumps(result))
    else:
        print_ingest(report, result, archive_url)
    if result["failed"]:
        sys.exit(PARTLY_FAILED)


@main.command()
@click.option(
    "--bbox",
    type=float,
    nargs=4,
    metavar="W S E N",
    help="Only this area: west south east north.",
)
@click.option(
    "--bbox-crs", default="EPSG:4326", show_default=True, metavar="CRS", help="CRS of --bbox."
)
@click.option("--flight", metavar="ID", help="Only this flight.")
@click.option(
    "--image", "images", multiple=True, metavar="NAME", help="Only this image; may be repeated."
)
@click.option(
    "-o",
    "--output",
    default="restored",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory to write to.",
)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["gtiff", "jpeg", "png"]),
    default="gtiff",
    show_default=True,
    help="Cloud Optimized GeoTIFF, JPEG with the original EXIF and XMP, or PNG.",
)
@click.option("--mosaic", is_flag=True, help="One north-up GeoTIFF of all images.")
@decoding
@parallel
@common
def restore(
    archive_url: str,
    as_json: bool,
    quiet: bool,
    verbose: int,
    bbox: tuple[float, float, float, float] | None,
    bbox_crs: str,
    flight: str | None,
    images: tuple[str, ...],
    output: Path,
    file_format: str,
    mosaic: bool,
    steps: int,
    seed: int,
    device: str,
    scheduler: str | None,
    workers: int | None,
) -> None:
    """Write images, or the part of them inside a bounding box, as georeferenced files.

    A window keeps the image's own pixel grid: a frame flown askew keeps its rotated transform.
    --mosaic resamples all of them to one north-up raster. Exit code 3: some images failed.
    """
    if mosaic and file_format != "gtiff":
        raise click.UsageError("--mosaic writes a GeoTIFF")

    from archive_pipeline.restore import Selection
    from archive_pipeline.restore import restore as run

    bar = Progress("restore", quiet, "block" if mosaic else "image")
    with bar:
        report = run(
            archive_url,
            Selection(bbox, bbox_crs, flight, images),
            output,
            format=file_format,
            mosaic=mosaic,
            steps=steps,
            seed=seed,
            device=device,
            scheduler=scheduler,
            workers=workers,
            progress=bar.step,
        )
    for failure in report.failed:
        click.echo(f"Failed: {failure['error']}", err=True)
    for image, reason in report.skipped if not quiet else ():
        click.echo(f"Warning: {image}: {reason}", err=True)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        for file in report.files:
            click.echo(file["path"])
        if not report.files and not report.failed:
            click.echo("Nothing in the archive matches.", err=True)
        elif not quiet:
            click.echo(f"{len(report.files)} files in {report.seconds:.1f} s", err=True)
            if report.stages:
                click.echo(f"  {seconds_of_work(report.stages)}", err=True)
    if report.failed:
        sys.exit(PARTLY_FAILED if report.files else 1)


@main.command()
@common
def info(archive_url: str, as_json: bool, quiet: bool, verbose: int) -> None:
    """List flights and images: sizes, positions, ratios.

    Exit code 3: the records of some images are damaged, each is named.
    """
    from archive_pipeline.info import describe

    result = describe(archive_url)
    for failure in result["damaged"]:
        click.echo(f"Damaged: {failure['error']}", err=True)
    if as_json:
        click.echo(json.dumps(result))
    else:
        print_info(result, quiet)
    if result["damaged"]:
        sys.exit(PARTLY_FAILED)


@main.command()
@click.option(
    "--repair", is_flag=True, help="Write the index anew if it does not agree; nothing else."
)
@common
def check(archive_url: str, as_json: bool, quiet: bool, verbose: int, repair: bool) -> None:
    """Verify every checksum, decode every tile, compare the index with the contents.

    Exit code 1 when anything is broken, each thing named. Broken images are mended by ingesting
    them again with --overwrite.
    """
    from archive_pipeline.check import check as run

    bar = Progress("check", quiet)
    with bar:
        report = run(archive_url, progress=bar.step, repair=repair)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        for note in report.notes if not quiet else ():
            click.echo(note, err=True)
        for problem in report.problems:
            click.echo(f"Broken: {problem}", err=True)
        if not report.problems:
            click.echo(f"{archive_url}: {report.images} images are whole")
    if report.problems:
        sys.exit(1)


@main.command()
@click.option(
    "--originals",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the original files lie; by default where they were archived from.",
)
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
    "models",
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
    default=0.02,
    show_default=True,
    help="Largest difference of any metric that passes.",
)
@click.option(
    "--confidence",
    type=click.FloatRange(0, 1),
    default=0.25,
    show_default=True,
    help="Least confidence of detections that count.",
)
@click.option(
    "--iou",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="Least overlap of a detection with its reference object.",
)
@click.option(
    "--slice",
    "slice_side",
    type=click.IntRange(min=32),
    metavar="PIXELS",
    help="Side of the slices that detectors see.  [default: the model's input size]",
)
@click.option(
    "--report",
    "report_dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write report.html, result.json and two CSV tables there.",
)
@decoding
@parallel
@common
def verify_detection(
    archive_url: str,
    as_json: bool,
    quiet: bool,
    verbose: int,
    originals: Path | None,
    labels: Path | None,
    names: Path | None,
    models: tuple[str, ...],
    classes: tuple[str, ...],
    tolerance: float,
    confidence: float,
    iou: float,
    slice_side: int | None,
    report_dir: Path | None,
    steps: int,
    seed: int,
    device: str,
    scheduler: str | None,
    workers: int | None,
) -> None:
    """Compare what detectors find in the originals and in the restored images.

    Passes if no metric of any class differs by more than the tolerance. Exit code 4: some does;
    1: nothing could be compared, which proves nothing; 3: passed, but without some images.
    """
    from archive_pipeline.detectors import DEFAULT_DETECTOR
    from archive_pipeline.labels import parse_groups
    from archive_pipeline.verify import Options, verify

    try:
        groups = parse_groups(classes)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    options = Options(
        models or (DEFAULT_DETECTOR,),
        groups,
        originals,
        labels,
        names,
        tolerance,
        confidence,
        iou,
        slice_side,
        device,
        steps,
        seed,
    )
    if report_dir is not None:
        from archive_pipeline.report import prepare_report, write_report

        prepare_report(report_dir)
    bar = Progress("verify", quiet)
    with bar:
        report = verify(
            archive_url, options, scheduler=scheduler, workers=workers, progress=bar.step
        )
    for failure in report.failed:
        click.echo(f"Failed: {failure['error']}", err=True)
    for line in report.warnings if not quiet else ():
        click.echo(f"Warning: {line}", err=True)
    if report_dir is not None:
        bar = Progress("report", quiet)
        with bar:
            write_report(report, report_dir, bar.step)
    if as_json:
        click.echo(json.dumps(report.to_json(), allow_nan=False))
    else:
        print_verification(report, quiet)
    if report.below_tolerance:
        sys.exit(BELOW_TOLERANCE)
    if not report.passed:
        click.echo(f"Error: nothing is proven: {report.unproven}", err=True)
        sys.exit(1)
    if report.failed:
        sys.exit(PARTLY_FAILED)


if __name__ == "__main__":
    main()
