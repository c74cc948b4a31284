"""`archive ingest`: flights into an archive."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from archive_pipeline import api
from archive_pipeline.commands._console import (
    Progress,
    print_ingest,
    print_left_out,
    print_over_budget,
    print_warnings,
)
from archive_pipeline.commands._options import (
    PARTLY_FAILED,
    common,
    exit_codes,
    parallel,
    say,
)

if TYPE_CHECKING:
    from archive_pipeline.jobs.ingest_task import Outcome


@click.command(
    short_help="Archive the images of flight directories.",
    epilog=exit_codes({PARTLY_FAILED: "done, but some images failed, each named with its reason"}),
)
@click.argument("flights", nargs=-1, required=True, metavar="FLIGHT_DIR...", type=click.Path())
@click.option("--flight", "name", metavar="ID", help="Flight id; by default the directory's name.")
@click.option(
    "--ratio",
    type=float,
    metavar="R",
    help="Bytes of raw pixels over archive bytes.  [default: 100]",
)
@click.option("--bpp", type=float, metavar="B", help="Instead: archive bits a pixel.")
@click.option(
    "--source-ratio",
    type=float,
    metavar="R",
    help="Instead: bytes of the source file over archive bytes.",
)
@click.option(
    "--model",
    metavar="NAME|PATH",
    help="Shipped model, or a model folder.  [default: the shipped one]",
)
@click.option(
    "--allocation",
    type=click.Choice(api.ALLOCATIONS),
    default="uniform",
    show_default=True,
    help="What decides where an image's bits go: all blocks alike, or those with objects that "
    "--detect finds twice as fine, or the model's learned policy, which favours vehicles for "
    "detectors to come and needs none, or the least squared error.",
)
@click.option(
    "--adapt",
    type=click.IntRange(0, 100),
    metavar="N",
    default=0,
    show_default=True,
    help="With the policy: its updates on each image, judged by decoding and, with --detect, by "
    "what that finds (slow; needs the extra `train`).",
)
@click.option("--overwrite", is_flag=True, help="Encode images again that the archive has.")
@click.option(
    "--ground-elevation",
    type=float,
    metavar="METRES",
    help="Height of the ground, for frames without altitude above take-off.",
)
@click.option(
    "--dem",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False),
    help="Project frames to the ground of this raster of heights, in any CRS, not to a plane.",
)
@click.option(
    "--poses",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False),
    help="Place frames by what photogrammetry found, not by their tags: ODM's shots.geojson or "
    "geo.txt, OpenSfM's reconstruction.json, Metashape's cameras.xml, COLMAP's images.txt or .bin, "
    "Pix4D's calibrated_external_camera_parameters_wgs84.txt.",
)
@click.option(
    "--salvage",
    is_flag=True,
    help="Archive damaged JPEGs as far as they can be decoded, with a warning.",
)
@click.option(
    "--lossless-jpeg",
    is_flag=True,
    help="Keep JPEGs as the files that they are, to the byte, a fifth smaller. No budget applies.",
)
@click.option(
    "--image",
    multiple=True,
    metavar="NAME",
    help="With --lossless-jpeg: only this one, the others by the codec; --overwrite then replaces "
    "no other. May be repeated.",
)
@click.option(
    "--strict", is_flag=True, help="Exit code 3 also if other files of the flight are not archived."
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
    strict: bool,
    **options: Any,
) -> None:
    """Archive every image of the flight directories.

    A flight is a folder or a URL (s3://bucket/flight). Ingesting it again skips what the archive
    has, and goes on where an ingest was interrupted.

    Photographs (8-bit RGB) go through the learned codec. Each takes at most its budget, with
    everything that is stored for it, and no more than its file. Metadata and mask are kept byte
    for byte. Where these leave too little, the pixels are coded as coarsely as can be, and the
    image and the excess are named; that is no failure.

    Everything else (elevation, multispectral, 16 bit) is kept losslessly, without a budget. So are
    the files beside the images: logs, lists, missions, and frames in formats that are not decoded.
    """
    bar = Progress("ingest", quiet)

    def progress(outcome: Outcome, total: int) -> None:
        if outcome.status == "skipped":
            bar.skip()
        else:
            bar.step(total)
        if outcome.error:
            bar.echo(f"Failed: {outcome.path}: {outcome.error}")

    with bar:
        report = api.ingest(
            flights,
            archive_url,
            flight=name,
            progress=progress,
            part=bar.part,
            stage=bar.stage,
            **options,
        )
    for document in report.documents:
        if document.error:
            say(f"Failed: {document.path}: {document.error}", err=True)
    if not quiet:
        print_warnings(report, verbose)
        print_over_budget(report, verbose)
        print_left_out(report, verbose)
    result = report.to_json()
    if as_json:
        click.echo(json.dumps(result))
    else:
        print_ingest(report, result, archive_url)
    if result["failed"] or (strict and report.left_out):
        sys.exit(PARTLY_FAILED)
