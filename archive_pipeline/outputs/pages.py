"""Reports: a page that opens without a network, with tables beside it."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.outputs.paths import OutputError
from archive_pipeline.outputs.publish import (
    NOTHING,
    Stamps,
    existing,
    is_inside,
    publish,
    workdir,
)

PAGE, RESULT = "report.html", "result.json"
# Of cells that spreadsheets compute; the wide forms count in East Asian versions.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


class ReportError(ArchivePipelineError):
    """A report that cannot be written; one line that names the place."""


def prepare_folder(
    directory: Path, files: tuple[str, ...], extra: str, archive: Path | None, overwrite: bool
) -> Stamps:
    """Make a report's folder, and find out early what would fail late.

    Args:
        files: names of what will be written.
        extra: of this package's, that brings what pages are made with.
        archive: the archive's folder, inside which no report is written.
        overwrite: files of these names that are there may be replaced.

    Returns:
        Those files, for `write_files`.

    Raises:
        ReportError: it cannot be written there, files are there, or a package is missing.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ReportError(f"--report needs jinja2: {extra}") from error
    try:
        if archive is not None and is_inside(directory, archive):
            raise ReportError(f"{directory} is inside the archive; choose another --report")
        directory.mkdir(parents=True, exist_ok=True)
        there = {k: v for name in files for k, v in existing(directory / name).items()}
        if there and not overwrite:
            raise ReportError(f"{min(there)} is already there (--overwrite replaces it)")
        with tempfile.TemporaryFile(dir=directory):
            return there
    except OSError as error:
        raise ReportError(f"{directory}: {error.strerror}") from error
    except OutputError as error:
        raise ReportError(str(error)) from error


def write_files(
    directory: Path,
    page: str,
    result: Any,
    tables: Mapping[str, Callable[[TextIO], object]],
    replace: Stamps = NOTHING,
) -> Path:
    """Write a report's files, each whole; the result is JSON that every reader takes.

    Args:
        directory: what `prepare_folder` made.
        tables: what writes each table, by its name.
        replace: what `prepare_folder` returned.

    Returns:
        The page's path.

    Raises:
        ReportError: a file cannot be written, or another is there.
    """
    path = directory / PAGE
    files: dict[str, Callable[[TextIO], object]] = {
        RESULT: lambda file: json.dump(result, file, indent=1, allow_nan=False),
        **tables,
        PAGE: lambda file: file.write(page),
    }
    try:
        with workdir(path) as work:
            for name, write in files.items():
                # file names may hold bytes that are no text
                with open(
                    work / name, "w", encoding="utf-8", errors="backslashreplace", newline=""
                ) as file:
                    write(file)
            for name in files:
                publish(work / name, directory / name, replace)
    except OutputError as error:
        raise ReportError(str(error)) from error
    return path


def render(package: str, **values: Any) -> str:
    """A package's `templates/report.html` with these values, of which all texts are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(package), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(PAGE).render(**values)


class Table:
    """Rows of a CSV that spreadsheets open as data, whatever names are in them.

    A text that they would take for a formula gets an apostrophe before it, as OWASP advises against
    CSV injection, and all texts are quoted, so that none starts a cell of its own where cells end
    at semicolons. Numbers stay as they are, negative ones too.
    """

    def __init__(self, file: TextIO) -> None:
        self._writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)

    def row(self, *cells: object) -> None:
        """Write texts, numbers, and None as an empty cell."""
        self._writer.writerow([self._safe(c) if isinstance(c, str) else c for c in cells])

    @staticmethod
    def _safe(text: str) -> str:
        return f"'{text}" if text.startswith(FORMULA_STARTS) else text
