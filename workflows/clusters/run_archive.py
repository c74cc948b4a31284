"""Run an `archive` command on a Dask cluster: what the recipes beside this file share."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dask


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the recipe's options; what follows `--` becomes `command`."""
    own, mark, command = sys.argv[1:], "--", []
    if mark in own:
        own, command = own[: own.index(mark)], own[own.index(mark) + 1 :]
    options = parser.parse_args(own)
    options.command = command
    return options


def add_tls(parser: argparse.ArgumentParser) -> None:
    """Add --tls to a recipe's options."""
    parser.add_argument(
        "--tls",
        type=Path,
        metavar="FOLDER",
        help="with cluster.pem and cluster.key, which all machines see under this path",
    )


def use_tls(folder: Path | None) -> None:
    """Let this process, the members that it starts and the command talk TLS, and nothing else."""
    if folder is None:
        return
    pem, key = (str(folder.absolute() / name) for name in ("cluster.pem", "cluster.key"))
    tls = {"ca-file": pem}
    for role in ("client", "scheduler", "worker"):
        tls |= {f"{role}.cert": pem, f"{role}.key": key}
    dask.config.set({f"distributed.comm.tls.{name}": path for name, path in tls.items()})
    dask.config.set({"distributed.comm.require-encryption": True})
    os.environ["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] = "true"
    for name, path in tls.items():
        variable = name.upper().replace("-", "_").replace(".", "__")
        os.environ[f"DASK_DISTRIBUTED__COMM__TLS__{variable}"] = path


def run(cluster: Any, command: list[str]) -> int:
    """Run the command with the cluster's scheduler; returns its exit code."""
    return subprocess.run([*command, "--scheduler", cluster.scheduler_address]).returncode
