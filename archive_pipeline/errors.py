"""The error to catch, of which each room has its own kinds; and what several of them say."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec


class ArchivePipelineError(Exception):
    """Something that cannot be done; one line that names the file, image or place, and why."""


class UsageError(ArchivePipelineError, ValueError):
    """Arguments, or options, that make no sense together; one line that names them."""


class NotInstalled(ArchivePipelineError, ImportError):
    """A package that not all installs have; one line that names the extra that brings it."""


def require(module: str, what: str, extra: str = "ingest") -> None:
    """Make sure that a package is installed, which the plain install leaves out.

    Args:
        module: its name for `import`.
        what: is to be done, as the first words of the error.
        extra: of this package's, which has it.

    Raises:
        NotInstalled: it is not there.
    """
    if find_spec(module) is None:
        raise NotInstalled(f"{what} needs {module}: pip install 'archive-pipeline[{extra}]'")


def require_denoising() -> None:
    """Make sure that what takes denoising steps on CPUs is installed: OpenVINO or PyTorch.

    Raises:
        NotInstalled: neither is.
    """
    if find_spec("torch") is None:
        require("openvino", "--steps")


def root_cause(error: BaseException) -> BaseException:
    """The first of the errors that led to one; GDAL says there what happened, and only there."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """What to put behind an error about a name that there is not; empty where none is like it."""
    import difflib

    by_case = {known.casefold(): known for known in names}
    close = difflib.get_close_matches(name.casefold(), by_case, n=1)
    return f"; did you mean {by_case[close[0]]}?" if close else ""
