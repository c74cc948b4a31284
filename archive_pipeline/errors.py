"""The error to catch, of which each room has its own kinds; and what several of them say."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from importlib import import_module
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
        raise _missing(module, what, extra)


@cache
def importable(module: str) -> bool:
    """Whether a package that only makes things faster is there and works; it is imported.

    One that is installed but broken, as by a NumPy too new for it, is told in the log.
    """
    if find_spec(module) is None:
        return False
    try:
        import_module(module)
    except Exception as error:  # missing libraries, other versions, unknown processors
        reason = " ".join(str(error).split())
        logging.getLogger(__name__).warning(
            "%s is installed but cannot be imported (%s): going on without it", module, reason
        )
        return False
    return True


def require_denoising() -> None:
    """Make sure that what takes denoising steps on CPUs is installed: OpenVINO or PyTorch.

    Raises:
        NotInstalled: neither is.
    """
    if find_spec("torch") is None and not importable("openvino"):
        raise _missing("openvino", "--steps")


def require_encoding() -> None:
    """Make sure that what encodes is installed: PyTorch, and Numba for loops over symbols.

    Raises:
        NotInstalled: one is not, or Numba is broken, which the log then tells.
    """
    require("torch", "encoding")
    if not importable("numba"):
        raise _missing("numba", "encoding")


def _missing(module: str, what: str, extra: str = "ingest") -> NotInstalled:
    return NotInstalled(f"{what} needs {module}: pip install 'archive-pipeline[{extra}]'")


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
