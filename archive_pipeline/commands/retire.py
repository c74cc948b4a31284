"""`archive retire`: originals that are no longer needed."""

from __future__ import annotations

import json
import sys

import click

from archive_pipeline import api
from archive_pipeline.commands._console import Progress, byte_size, counted
from archive_pipeline.commands._options import (
    ERROR,
    PARTLY_FAILED,
    common,
    exit_codes,
    originals,
    say,
)

SHOWN = 20  # files whose names are listed


@click.command(
    short_help="Delete originals that the archive can stand in for.",
    epilog=exit_codes(
        {
            ERROR: "error, or no original can go",
            PARTLY_FAILED: "done, but some originals stay, each named with the reason",
        }
    ),
)
@click.option("--flight", metavar="ID", help="Only this flight's.")
@originals
@click.option(
    "--require",
    multiple=True,
    metavar="KIND[,KIND]",
    help="Verdicts that each image must have passed: detection, photogrammetry, "
    "photogrammetry-quick.",
)
@click.option("--yes", is_flag=True, help="Delete them; without it nothing is, but told.")
@common
def retire(
    archive_url: str,
    as_json: bool,
    quiet: bool,
    verbose: int,
    flight: str | None,
    originals: str | None,
    require: tuple[str, ...],
    yes: bool,
) -> None:
    """Delete original files whose archived images are whole.

    Each image is read, decoded and compared with its original right before that goes: its size,
    mask and metadata must be the same, lossless pixels, too, nothing of it may be left out of the
    archive, and what --require names must have been passed. A file whose SHA-256 is another stays,
    and so does what links lead to, and anything beside the images. The archive keeps a note of what
    went. Without --yes all is checked and nothing deleted.
    Objects at s3:// go only where their bucket deletes on a condition or keeps versions.
    """
    kinds = [kind for given in require for kind in given.split(",") if kind]
    bar = Progress("retire", quiet)
    with bar:
        report = api.retire(
            flight,
            archive=archive_url,
            originals=originals,
            require=kinds,
            yes=yes,
            progress=bar.step,
            stage=bar.stage,
        )
    for item in report.kept:
        say(f"Stays: {item['path'] or item['image']}: {item['reason']}", err=True)
    for note in report.notes:
        say(note, err=True)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        files = report.files
        for file in () if quiet else files if verbose else files[:SHOWN]:
            say(f"{'Deleted' if yes else 'Would delete'}: {file['path']}")
        if len(files) > SHOWN and not verbose and not quiet:
            say(f"... and {len(files) - SHOWN} more (-v lists all)")
        total = f"{counted(len(files), 'original')}, {byte_size(sum(f['bytes'] for f in files))}"
        stay = f"; {len(report.kept)} stay" if report.kept else ""
        gone = f"; {report.already} deleted before" if report.already else ""
        what = "deleted" if yes else "can go: nothing is deleted without --yes"
        say(f"{total} {what}{stay}{gone}")
    if report.kept:
        sys.exit(PARTLY_FAILED if report.files or report.already else ERROR)
