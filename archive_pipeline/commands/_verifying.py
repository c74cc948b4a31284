"""What the commands that verify share: a report's options, what is told, how they exit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import click

from archive_pipeline.commands._console import counted
from archive_pipeline.commands._options import BELOW_TOLERANCE, ERROR, PARTLY_FAILED, say

DAY = 10  # characters of a time that tell its day


class Verified(Protocol):
    """What a verification found."""

    failed: list[dict[str, str]]
    warnings: list[str]
    retired: list[dict[str, Any]]

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
    flights: dict[str, list[dict[str, Any]]] = {}
    for image in report.retired:
        flights.setdefault(image["flight"], []).append(image)
    for flight, images in flights.items():
        say(f"Not compared: {flight}: {retired_line(images)}", err=True)
    for failure in report.failed:
        say(f"Failed: {failure['error']}", err=True)
    for line in report.warnings if not quiet else ():
        say(f"Warning: {line}", err=True)


def retired_line(images: list[dict[str, Any]]) -> str:
    """What is told of images whose originals `archive retire` has deleted, and what they passed."""
    days = sorted({image["deleted"][:DAY] for image in images} - {""})
    on = f" on {days[0]}" if days else ""
    until = f" to {days[-1]}" if len(days) > 1 else ""
    counts: dict[tuple[str, str], list[str]] = {}
    for image in images:
        for verdict in image["verdicts"]:
            what = "passed" if verdict["passed"] else "failed"
            counts.setdefault((what, verdict["kind"]), []).append(verdict["date"][:DAY])
    stand = ", ".join(
        f"{len(dates)} {what} verify-{kind}, last on {max(dates)}"
        for (what, kind), dates in sorted(counts.items(), reverse=True)
    )
    of = counted(len(images), "image")
    return (
        f"the originals of {of} were deleted by archive retire{on}{until}; "
        f"verdicts that stand of them: {stand or 'none'}"
    )


def conclude(report: Verified) -> None:
    """Exit as the verdict says."""
    if report.below_tolerance:
        sys.exit(BELOW_TOLERANCE)
    if not report.passed:
        say(f"Error: nothing is proven: {report.unproven}", err=True)
        sys.exit(ERROR)
    if report.failed or report.retired:
        sys.exit(PARTLY_FAILED)
