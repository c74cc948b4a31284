"""`archive info`: what an archive holds."""

from __future__ import annotations

import json
import sys
from typing import Any

import click
import orjson

from archive_pipeline import api
from archive_pipeline.commands._console import (
    Progress,
    print_info,
)
from archive_pipeline.commands._options import (
    PARTLY_FAILED,
    common,
    exit_codes,
    say,
    without_pandas,
)

LISTED = 20  # images of a flight


@click.command(
    short_help="List flights and images, with sizes and positions.",
    epilog=exit_codes(
        {PARTLY_FAILED: "done, but the records of some images are damaged, each named"}
    ),
)
@click.option("--all", "all_images", is_flag=True, help="List every image, however many.")
@common
def info(archive_url: str, as_json: bool, quiet: bool, verbose: int, all_images: bool) -> None:
    """List flights and images: their pixels, the bytes of file and archive, their positions.

    Of each flight the first 20 images are listed; --json has all.
    """
    without_pandas()
    with Progress("info", quiet) as progress:
        progress.stage("looking at images")
        result = api.info(archive_url)
    for failure in result["damaged"]:
        say(f"Damaged: {failure['error']}", err=True)
    if as_json:
        click.echo(_json(result))
    else:
        print_info(result, quiet, None if all_images else LISTED)
    if result["damaged"]:
        sys.exit(PARTLY_FAILED)


def _json(result: dict[str, Any]) -> str:
    """A result as JSON: that of 100,000 images is 50 MB, for which `json` takes a second."""
    try:
        return orjson.dumps(result).decode()
    except TypeError:  # file names that are no text, which it does not take
        return json.dumps(result)
