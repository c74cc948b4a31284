"""What the commands that verify share: a report's options, what is told, how they exit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import click

from archive_pipeline.commands._options import BELOW_TOLERANCE, ERROR, PARTLY_FAILED, say


class Verified(Protocol):
    """What a verification found."""

    failed: list[dict[str, str]]
    warnings: list[str]

    @property
    def passed(self) -> bool: ...

    @property
    def below_tolerance(self) -> bool: ...

    @property
    def unproven(self) -> str: ...


def reported(function: Callable[..., None]) -> Callable[..., None]:
    """Options of commands that write a report."""
    for option in (
        click.option(
            "--overwrite",
            is_flag=True,
            help="Replace an earlier report's files; else they are an error.",
        ),
        click.option(
            "--report",
            type=click.Path(file_okay=False, path_type=Path),
            help="Write report.html, result.json and two CSV tables there.",
        ),
    ):
        function = option(function)
    return function


def tell_problems(report: Verified, quiet: bool) -> None:
    """Name images that could not be compared, and what was odd."""
    for failure in report.failed:
        say(f"Failed: {failure['error']}", err=True)
    for line in report.warnings if not quiet else ():
        say(f"Warning: {line}", err=True)


def conclude(report: Verified) -> None:
    """Exit as the verdict says."""
    if report.below_tolerance:
        sys.exit(BELOW_TOLERANCE)
    if not report.passed:
        say(f"Error: nothing is proven: {report.unproven}", err=True)
        sys.exit(ERROR)
    if report.failed:
        sys.exit(PARTLY_FAILED)
