"""The `archive` command. Options in, one call, a table or JSON out.

Heavy modules are imported inside the commands: `archive --help` answers at once.
"""

from __future__ import annotations

import atexit
import gc

import click

from archive_pipeline._version import __version__
from archive_pipeline.commands.check import check
from archive_pipeline.commands.info import info
from archive_pipeline.commands.ingest import ingest
from archive_pipeline.commands.remove import remove
from archive_pipeline.commands.restore import restore
from archive_pipeline.commands.retire import retire
from archive_pipeline.commands.serve import serve
from archive_pipeline.commands.verify_detection import verify_detection
from archive_pipeline.commands.verify_photogrammetry import verify_photogrammetry

EXAMPLE = """\b
For example:
  archive ingest flight_dir
  archive info
  archive restore --bbox -94.7963 29.2842 -94.7958 29.2846
"""


class InOrderOfUse(click.Group):
    """A group that lists its commands as they were added, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=InOrderOfUse,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXAMPLE,
)
@click.version_option(__version__, prog_name="archive")
def main() -> None:
    """Keep drone imagery small: archive flights, restore any area as georeferenced pixels."""
    # A process that ends needs no search for cycles among all objects of all packages.
    atexit.register(gc.freeze)


for command in (
    ingest,
    restore,
    info,
    serve,
    check,
    verify_detection,
    verify_photogrammetry,
    retire,
    remove,
):
    main.add_command(command)


if __name__ == "__main__":
    main()
