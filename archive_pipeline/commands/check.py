"""`archive check`: is everything there and whole?"""

from __future__ import annotations

import json
import sys

import click

from archive_pipeline import api
from archive_pipeline.commands._console import (
    Progress,
    counted,
)
from archive_pipeline.commands._options import (
    DONE,
    ERROR,
    common,
    exit_codes,
    say,
    without_pandas,
)


@click.command(
    short_help="Is everything there and whole?",
    epilog=exit_codes(
        {DONE: "everything is whole", ERROR: "something is broken, each thing named"}
    ),
)
@click.option(
    "--repair",
    is_flag=True,
    help="Write the index anew if it does not agree, and remove what interrupted ingests left of "
    "images that were not committed; nothing else.",
)
@click.option(
    "--overviews",
    is_flag=True,
    help="With --repair: give overviews to images that were archived without.",
)
@common
def check(
    archive_url: str, as_json: bool, quiet: bool, verbose: int, repair: bool, overviews: bool
) -> None:
    """Verify every checksum, decode every tile, compare sizes and the index with the contents.

    Broken images are mended by ingesting them again with --overwrite. What interrupted ingests
    left takes room, but breaks nothing: it is told with its bytes.
    """
    without_pandas()
    bar = Progress("check", quiet)
    with bar:
        report = api.check(
            archive_url, repair=repair, overviews=overviews, progress=bar.step, stage=bar.stage
        )
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        for note in report.notes if not quiet else ():
            say(note, err=True)
        for problem in report.problems:
            say(f"Broken: {problem}", err=True)
        if not report.problems:
            say(f"{archive_url}: {counted(report.images, 'whole image')}")
    if report.problems:
        sys.exit(ERROR)
