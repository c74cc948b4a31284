"""`archive serve`: the archive on a map, in a browser and in GIS."""

from __future__ import annotations

import json
import os
import sys

import click

from archive_pipeline.commands._options import DONE, common, exit_codes, say, without_pandas


@click.command(
    short_help="Show the archive on a map, in a browser and in GIS.",
    epilog=exit_codes({}),
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    metavar="N",
    help="Port to listen on; 0 picks a free one.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Address to listen on. Any but this machine's own lets others see the archive.",
)
@click.option(
    "--background",
    metavar="URL",
    help="Tiles of a background map, with {z}, {x} and {y}; nothing else is loaded from elsewhere.",
)
@click.option(
    "--originals",
    metavar="PATH|URL",
    help="Folder of the original files, to compare with.  [default: where you archived from]",
)
@common
def serve(
    archive_url: str,
    as_json: bool,
    quiet: bool,
    verbose: int,
    port: int,
    host: str,
    background: str | None,
    originals: str | None,
) -> None:
    """Serve the archive over HTTP until Ctrl-C: a page with a map, tiles, windows, a catalogue.

    Read only. Nothing is restored: what is looked at is decoded when it is asked for.
    """
    without_pandas()
    from archive_pipeline.flight.locations import location
    from archive_pipeline.serving.options import ServeOptions
    from archive_pipeline.serving.server import serve as run

    place = None if originals is None else location(originals)
    options = ServeOptions(archive_url, host, port, background, place)

    def ready(url: str) -> None:
        if not options.is_local:
            say(
                f"Warning: {host} can be reached from other machines: whoever reaches it sees "
                "all of the archive; there are no passwords",
                err=True,
            )
        if as_json:
            click.echo(json.dumps({"url": url, "archive": archive_url}))
        else:
            say(f"{archive_url} at {url} (Ctrl-C ends it)")

    run(options, ready)
    sys.stdout.flush()
    # without waiting for threads that decode what nobody waits for; nothing is written by now
    os._exit(DONE)
