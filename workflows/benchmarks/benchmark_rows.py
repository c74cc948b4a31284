"""Rows of benchmarks' CSV files, and runs that go on where they stopped."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import click

TEXT_FIELDS = {"set", "scale", "crop", "codec", "error", "release", "one", "two", "frame"}

Row = dict[str, Any]


def write_rows(path: Path, fields: list[str], rows: list[Row]) -> None:
    """Write a CSV file, all of it or nothing."""
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    os.replace(part, path)


def read_rows(path: Path) -> list[Row]:
    """Read what `write_rows` wrote; empty values are left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {k: v if k in TEXT_FIELDS else float(v) for k, v in row.items() if v != ""}
            for row in csv.DictReader(file)
        ]


def resume(out: Path, settings: Row) -> None:
    """Note a run's settings, or find that an earlier run in this folder had the same.

    Raises:
        click.ClickException: the folder holds a run with other settings.
    """
    path = out / "run.json"
    settings = json.loads(json.dumps(settings))
    if path.exists():
        before = json.loads(path.read_text())
        other = [k for k in settings if before.get(k) != settings[k]]
        if other:
            raise click.ClickException(
                f"{out} holds a run with other settings ({', '.join(other)}): name another folder"
            )
    else:
        path.write_text(json.dumps(settings, indent=1) + "\n")
