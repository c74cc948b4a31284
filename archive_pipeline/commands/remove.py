"""`archive remove`: images taken out for good."""

from __future__ import annotations

import json

import click

from archive_pipeline import api
from archive_pipeline.commands._console import Progress, byte_size, counted
from archive_pipeline.commands._options import common, exit_codes, say

SHOWN = 20  # images whose names are listed


class _Remove(click.Command):
    """Says what to do about names of images that look like options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            hint = "names that begin with a dash come behind --"
            raise click.UsageError(f"{error.format_message()} ({hint})", ctx) from error


@click.command(
    cls=_Remove,
    short_help="Take images out for good.",
    epilog=exit_codes({}),
)
@click.argument("flight")
@click.argument("image", nargs=-1)
@click.option("--yes", is_flag=True, help="Remove them; without it nothing is, but told.")
@common
def remove(
    archive_url: str,
    as_json: bool,
    quiet: bool,
    verbose: int,
    flight: str,
    image: tuple[str, ...],
    yes: bool,
) -> None:
    """Remove images of a FLIGHT, or all of it with its documents, from the archive for good.

    Pixels, metadata, overviews, detections and their rows of the index go, and models that nothing
    uses any more. They cannot be brought back from the archive. Without --yes it only tells what
    would go. Originals and restored files stay; so do earlier versions of objects in buckets that
    keep them, and documents that name an image. Names that begin with a dash come behind `--`, the
    last of the options.
    """
    bar = Progress("remove", quiet)
    with bar:
        report = api.remove(
            flight, image, archive=archive_url, yes=yes, progress=bar.step, stage=bar.stage
        )
    if as_json:
        click.echo(json.dumps(report.to_json()))
        return
    names = [*report.images, *report.documents]
    for name in () if quiet else names if verbose else names[:SHOWN]:
        say(f"{'Removed' if yes else 'Would remove'}: {name}")
    if len(names) > SHOWN and not verbose and not quiet:
        say(f"... and {len(names) - SHOWN} more (-v lists all)")
    for note in () if quiet else report.notes:
        say(note, err=True)
    parts = [counted(len(report.images), "image")]
    if report.documents:
        parts.append(counted(len(report.documents), "document"))
    if report.models:
        parts.append(counted(len(report.models), "model"))
    total = f"{', '.join(parts)}, {byte_size(report.bytes)}"
    say(f"{archive_url}: {total} removed" if yes else f"{total}: nothing is removed without --yes")
