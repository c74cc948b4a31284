"""What releases were measured to do, in two CSV files beside a model's card.

`benchmark.csv` has a row for each release, crop, codec and setting, `tie_points.csv` one for each
release, ratio, codec and pair of frames. Rows of other codecs belong to no release. So a release
can be compared with an earlier one without running that one again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmark_rows import Row, read_rows, write_rows
from benchmark_summary import OURS
from metrics import METRICS

POINTS, TIES = "benchmark.csv", "tie_points.csv"
POINT_FIELDS = [
    *["release", "set", "scale", "crop", "width", "height"],
    *["codec", "setting", "bpp", *METRICS],
]
TIE_FIELDS = ["release", "set", "ratio", "codec", "one", "two", "original", "restored"]
DIGITS = 12  # of a release's SHA-256


def is_ours(codec: str) -> bool:
    """Whether rows of a codec belong to a release."""
    return codec == OURS or codec.startswith(f"{OURS}-")


def record(folder: Path, release: str, points: list[Row], ties: list[Row]) -> None:
    """Keep a release's rows, and those of the peers that ran beside it.

    They replace what is known of the same release, crop and codec, or the same set and ratio.

    Args:
        folder: the model's, where its card is.
        release: SHA-256 of the model.
        points: as in the benchmark's points.csv, all with the deterministic decoder and `OURS`, or
            with N denoising steps and `OURS`-N.
        ties: as in tie_points.csv.
    """
    _merge(folder / POINTS, POINT_FIELDS, release, points, _crop)
    _merge(folder / TIES, TIE_FIELDS, release, ties, _set)


def read(folder: Path) -> tuple[list[Row], list[Row]]:
    """Rows of both files; none where there is no file."""
    return read_rows(folder / POINTS), read_rows(folder / TIES)


def _crop(row: Row) -> tuple[object, ...]:
    names = ("set", "scale", "crop", "width", "height", "codec")
    return row.get("release", ""), *(row[name] for name in names)


def _set(row: Row) -> tuple[object, ...]:
    return row.get("release", ""), row["set"], float(row["ratio"]), row["codec"]


def _merge(
    path: Path,
    fields: list[str],
    release: str,
    rows: list[Row],
    key: Callable[[Row], tuple[object, ...]],
) -> None:
    if not rows:
        return
    new = []
    for row in rows:
        kept = {name: row[name] for name in fields if name in row}
        new.append({**kept, "release": release[:DIGITS] if is_ours(row["codec"]) else ""})
    known = {key(row) for row in new}
    write_rows(path, fields, [row for row in read_rows(path) if key(row) not in known] + new)
