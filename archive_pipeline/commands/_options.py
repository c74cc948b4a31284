"""What several commands share: options, exit codes, one line for an error."""

from __future__ import annotations

import functools
import logging
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.abc import MetaPathFinder
from typing import Any

import click

from archive_pipeline.errors import ArchivePipelineError, UsageError
from archive_pipeline.pcdc.precision import PRECISIONS

DONE, ERROR, WRONG_USAGE = 0, 1, 2  # what click itself exits with, too
PARTLY_FAILED = 3
BELOW_TOLERANCE = 4
EXIT_CODES = {DONE: "done", ERROR: "error", WRONG_USAGE: "wrong usage"}


def exit_codes(own: dict[int, str]) -> str:
    """The end of a command's help: what its exit codes mean, its own and those of all."""
    lines = [f"  {code}  {meaning}" for code, meaning in sorted((EXIT_CODES | own).items())]
    return "\n".join(["\b", "Exit codes:", *lines])


@contextmanager
def _errors(verbose: int) -> Iterator[None]:
    """Turn any error into one line and exit code 1; -v shows where it came from."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    except Exception as error:
        if verbose or (isinstance(error, BrokenPipeError) and _nobody_reads()):
            raise  # click ends in silence where nobody reads on
        line = " ".join(str(error).split()) or type(error).__name__
        # the project's own errors say all there is to say; others need their type's name
        if not isinstance(error, ArchivePipelineError | ValueError):
            line = f"{type(error).__name__}: {line}"
        say(f"Error: {line}", err=True)
        sys.exit(ERROR)


def _nobody_reads() -> bool:
    """Whether what reads stdout has ended, as in `archive info | head -1`."""
    if not hasattr(select, "poll"):  # Windows
        return False
    stdout = select.poll()
    with suppress(ValueError):
        stdout.register(sys.stdout.fileno(), 0)  # errors are told unasked
    return bool(stdout.poll(0))


@contextmanager
def _logs(verbose: int, quiet: bool) -> Iterator[None]:
    """Show the package's log on stderr: what -v asks for, or warnings, or errors with -q."""
    handler = logging.StreamHandler()
    logger = logging.getLogger("archive_pipeline")
    logger.setLevel(logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def say(line: str, err: bool = False) -> None:
    """Print a line; what a name in it could do to a terminal, or to lines, is escaped."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    click.echo("".join(shown), err=err)


class _NoPandas(MetaPathFinder):
    """Finds nothing where pandas is asked for."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


def without_pandas() -> None:
    """Let pyarrow do without pandas, for whose types it looks when it makes its first array.

    To load it takes a third of a second. No command needs it: only in a process of their own may
    this be decided.
    """
    if "pandas" in sys.modules:
        return
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        import pyarrow

        pyarrow.scalar(0)
    finally:
        sys.meta_path.remove(finder)


class FolderOrURL(click.Path):
    """A folder that there is, or any URL."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        return value if "://" in value else super().convert(value, param, ctx)


originals = click.option(
    "--originals",
    type=FolderOrURL(exists=True, file_okay=False),
    metavar="DIR|URL",
    help="Where the original files lie; by default in the folders that you archived from on this "
    "machine.",
)


def common(function: Callable[..., None]) -> Callable[..., None]:
    """Options of every command."""

    @click.option(
        "--archive",
        "archive_url",
        default="./archive.zarr",
        envvar="ARCHIVE_STORE",
        metavar="PATH|URL",
        show_default=True,
        show_envvar=True,
        help="The archive: a folder, or a URL (s3://, ...).",
    )
    @click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="Only errors and results.")
    @click.option(
        "-v",
        "--verbose",
        count=True,
        help="All warnings, workers that die, a scheduler's dashboard, tracebacks of errors.",
    )
    @functools.wraps(function)
    def wrapped(*args: Any, verbose: int, quiet: bool, **kwargs: Any) -> None:
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # worker processes' too
        with _errors(verbose), _logs(verbose, quiet):
            function(*args, verbose=verbose, quiet=quiet, **kwargs)

    return wrapped


def parallel(function: Callable[..., None]) -> Callable[..., None]:
    """Options of commands that work on many images."""
    for option in (
        click.option(
            "--workers",
            type=click.IntRange(min=0),
            metavar="N",
            help="Local worker processes; 0 works in this process.  [default: one a core]",
        ),
        click.option("--scheduler", metavar="ADDRESS", help="Address of a Dask scheduler to use."),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="Where the codec runs.",
        ),
        click.option(
            "--precision",
            type=click.Choice(PRECISIONS),
            default="auto",
            show_default=True,
            help="Of the codec's large networks; auto is bfloat16 on CPUs with AMX and on GPUs "
            "that have matrix units for it.",
        ),
    ):
        function = option(function)
    return function


def decoding(function: Callable[..., None]) -> Callable[..., None]:
    """Options of commands that decode pixels."""
    for option in (
        click.option(
            "--seed",
            type=int,
            metavar="N",
            default=0,
            show_default=True,
            help="Seed of the denoiser's noise, of which the lowest 32 bits count; with --steps 0 "
            "there is none.",
        ),
        click.option(
            "--realism",
            type=click.FloatRange(0, 1),
            metavar="R",
            default=1.0,
            show_default=True,
            help="With --steps: how much of the detail that they generate is in the pixels; 0 is "
            "none.",
        ),
        click.option(
            "--steps",
            type=click.IntRange(0, 100),
            metavar="N",
            default=0,
            show_default=True,
            help="Denoising steps: 0, the deterministic decoder, has the least error and is for "
            "measuring; 1 gives texture back, invented, for looking at. More gain little, and from "
            "about 30 on they spoil the picture.",
        ),
    ):
        function = option(function)
    return function
