"""Run an `archive` command on a Dask cluster: what the recipes beside this file share."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the recipe's options; what follows `--` becomes `command`."""
    own, mark, command = sys.argv[1:], "--", []
    if mark in own:
        own, command = own[: own.index(mark)], own[own.index(mark) + 1 :]
    options = parser.parse_args(own)
    options.command = command
    return options


def run(cluster: Any, command: list[str]) -> int:
    """Run the command with the cluster's scheduler; returns its exit code."""
    return subprocess.run([*command, "--scheduler", cluster.scheduler_address]).returncode
