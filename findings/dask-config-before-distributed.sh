#!/usr/bin/env bash
# dask: `dask.config.set` around the first import of distributed takes all of distributed's settings away.
#
# `with dask.config.set({"distributed.worker.preload": [...]}):` and, inside, `from distributed import
# Client` looks harmless, and works inside. distributed adds its defaults to Dask's configuration when it is
# imported, below the key `distributed`. `set` had made that key for the one setting, so on leaving it
# removes the key with everything that came to lie below it. From then on every cluster, client and Security
# of the process fails with a bare KeyError ('distributed', later 'comm'), in code that has nothing to do
# with the block. Importing distributed before the block is all that it takes.
#
# Seen with dask and distributed 2026.8.0, Python 3.11, Linux x86-64: as asserted below.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "dask==2026.8.0" "distributed==2026.8.0"
cd "$folder"
venv/bin/python - <<'PYTHON'
import subprocess
import sys

BLOCK = """
import dask
{before}
with dask.config.set({{"distributed.worker.preload": []}}):
    from distributed.security import Security
    Security()
    print("inside:", len(dask.config.config["distributed"]), "groups of settings;", end=" ")
print("after:", len(dask.config.config.get("distributed", ())), end="; ")
try:
    Security()
    print("Security() works")
except KeyError as error:
    print("Security() raises KeyError", error)
"""
told = {}
for before in ("pass", "import distributed"):
    code = BLOCK.format(before=before)
    told[before] = subprocess.check_output([sys.executable, "-c", code], text=True).strip()
    print(f"{before:<18} {told[before]}")
assert "after: 0; Security() raises KeyError 'distributed'" in told["pass"]
assert told["import distributed"].endswith("Security() works")
PYTHON
