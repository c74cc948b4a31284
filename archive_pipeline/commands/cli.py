"""The `archive` command. Options in, one call, a table or JSON out.

Heavy modules are imported inside the commands: `archive --help` answers at once.
"""

from __future__ import annotations

import click

from archive_pipeline._version import __version__
from archive_pipeline.commands.check import check
from archive_pipeline.commands.info import info
from archive_pipeline.commands.ingest import ingest
from archive_pipeline.commands.restore import restore
from archive_pipeline.commands.verify_detection import verify_detection


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="archive")
def main() -> None:
    """Keep drone imagery small: archive flights, restore any area as georeferenced pixels."""


for command in (ingest, restore, info, check, verify_detection):
    main.add_command(command)


if __name__ == "__main__":
    main()
