"""`archive restore`: images, or a part of them, as georeferenced files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from archive_pipeline import api
from archive_pipeline.commands._console import (
    Progress,
    counted,
    duration,
    extent,
    seconds_of_work,
)
from archive_pipeline.commands._options import (
    DONE,
    ERROR,
    PARTLY_FAILED,
    common,
    decoding,
    exit_codes,
    parallel,
    say,
    without_pandas,
)


class Restore(click.Command):
    """A command that says what --bbox needs where it has less, as "W,S,E,N" is one argument."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.BadOptionUsage as error:
            if error.option_name != "--bbox":
                raise
            needs = "--bbox takes four numbers with spaces between them: west south east north"
            raise click.BadOptionUsage("--bbox", needs, ctx) from error


@click.command(
    cls=Restore,
    short_help="Write images, or a bounding box of them, as files.",
    epilog=exit_codes(
        {
            DONE: "done, also where nothing in the archive matches",
            ERROR: "error, or no file could be written",
            PARTLY_FAILED: "done, but some images failed, each named with its reason",
        }
    ),
)
@click.option(
    "--bbox",
    type=float,
    nargs=4,
    metavar="W S E N",
    help="Only this area: west south east north; across the antimeridian west is greater than "
    "east.",
)
@click.option(
    "--bbox-crs", default="EPSG:4326", show_default=True, metavar="CRS", help="CRS of --bbox."
)
@click.option("--flight", metavar="ID", help="Only this flight.")
@click.option("--image", multiple=True, metavar="NAME", help="Only this image; may be repeated.")
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
    type=click.Choice(["gtiff", "jpeg", "png"]),
    default="gtiff",
    show_default=True,
    help="Cloud Optimized GeoTIFF, JPEG with the original EXIF and XMP, or PNG.",
)
@click.option("--mosaic", is_flag=True, help="One north-up GeoTIFF of all images.")
@click.option(
    "--ortho",
    is_flag=True,
    help="Each image as a north-up GeoTIFF by its true geometry; for oblique frames.",
)
@click.option(
    "--resolution",
    type=float,
    metavar="METRES",
    help="Pixel size of the mosaic or ortho, in units of its CRS.  [default: the finest image's]",
)
@click.option(
    "--max-size",
    type=click.IntRange(min=1),
    metavar="PIXELS",
    help="Make images smaller: their longer side has so many pixels at most.",
)
@click.option(
    "--crs",
    metavar="CRS",
    help="CRS of the mosaic.  [default: the projected one of most images, or --bbox-crs, or UTM]",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace files that restore wrote; never any others."
)
@decoding
@parallel
@common
def restore(
    archive_url: str,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **options: Any,
) -> None:
    """Write images, or the part of them inside a bounding box, as georeferenced files.

    They go to OUTPUT/FLIGHT/IMAGE, a mosaic to OUTPUT/mosaic.tif. A window keeps the image's own
    pixel grid: a frame flown askew keeps its rotated transform. --mosaic resamples all of them to
    one north-up raster, in this process. Flights restored whole have their logs, lists and other
    documents with them.

    A file that is there already stays, and its image counts as failed; --overwrite replaces those
    that restore wrote, never any others. Nothing is written inside the archive.
    """
    without_pandas()
    bar = Progress("restore", quiet, "block" if options["mosaic"] else "image")
    with bar:
        report = api.restore(archive_url, progress=bar.step, stage=bar.stage, **options)
    for failure in report.failed:
        say(f"Failed: {failure['error']}", err=True)
    for image, reason in report.skipped if not quiet else ():
        say(f"Warning: {image}: {reason}", err=True)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        for file in (*report.files, *report.documents):
            say(file["path"])
        if not report.files and not report.documents and not report.failed:
            box = extent(api.info(archive_url)) if options["bbox"] else None
            hint = f"; its images lie within {box} (west south east north)" if box else ""
            say(f"Nothing in the archive matches{hint}.", err=True)
        elif not quiet:
            files = counted(len(report.files) + len(report.documents), "file")
            say(f"{files} in {duration(report.seconds)}", err=True)
            if report.stages:
                say(f"  {seconds_of_work(report.stages)}", err=True)
    if report.failed:
        sys.exit(PARTLY_FAILED if report.files else ERROR)
