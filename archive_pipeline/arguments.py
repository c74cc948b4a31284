"""What arguments of the Python API have to be, said in one line as the command line says it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from archive_pipeline.errors import UsageError
from archive_pipeline.pcdc.precision import PRECISIONS

MOST_STEPS = 100  # of the denoiser
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise `UsageError` unless a value is one of those that there are."""
    if value not in choices:
        raise UsageError(f"{name} {value!r} is none of {', '.join(choices)}")


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Raise `UsageError` unless a value is a number within bounds, both included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise UsageError(f"{name} must be a number from {least:g} to {most:g}, not {value!r}")


def check_whole(name: str, value: Any, least: int, most: int) -> None:
    """Raise `UsageError` unless a value is a whole number within bounds, both included."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UsageError(f"{name} must be a whole number from {least} to {most}, not {value!r}")


def check_decoding(device: Any, precision: Any, steps: Any, seed: Any, realism: Any = 1.0) -> None:
    """Raise `UsageError` unless pixels can be decoded so."""
    check_choice("precision", precision, PRECISIONS)
    if not (isinstance(device, str) and _DEVICE.fullmatch(device)):
        raise UsageError(f"device {device!r} is none of auto, cpu, cuda")
    check_whole("steps", steps, 0, MOST_STEPS)
    check_whole("seed", seed, 0, 2**63 - 1)
    check_number("realism", realism, 0, 1)


def check_workers(workers: Any) -> None:
    """Raise `UsageError` unless it is a number of processes, or None for as many as there are."""
    if workers is not None:
        check_whole("workers", workers, 0, 100_000)


def check_folder(name: str, value: str | Path) -> Path:
    """A folder of this machine to write to.

    Raises:
        UsageError: it is a URL, of which a path would be a folder named like `s3:`.
    """
    if _URL.match(str(value)):
        place = "it is written to a folder of this machine"
        raise UsageError(f"{name} {str(value)!r} is a URL; {place}")
    return Path(value)


def texts(name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    """One text, or several, as a tuple.

    Raises:
        UsageError: they are none.
    """
    found = (value,) if isinstance(value, str) else value
    several = tuple(found) if isinstance(found, Iterable) else None
    if several is None or not all(isinstance(v, str) for v in several):
        raise UsageError(f"{name} must be a text or several, not {value!r}")
    return several


def places(name: str, value: str | Path | Iterable[str | Path]) -> tuple[str, ...]:
    """One path or URL, or several, as texts.

    Raises:
        UsageError: they are none.
    """
    found = (value,) if isinstance(value, str | Path) else value
    several = tuple(found) if isinstance(found, Iterable) else ()
    if not several or not all(isinstance(v, str | Path) for v in several):
        raise UsageError(f"{name} must be a path or several, not {value!r}")
    return tuple(map(str, several))
