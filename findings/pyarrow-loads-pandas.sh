#!/usr/bin/env bash
# pyarrow: the first call of almost anything loads pandas, if it is installed, though nothing uses it.
#
# `import pyarrow` leaves pandas alone. `pa.scalar(1)`, `pa.array([1])`, an array of NumPy's, an empty
# table of a schema, `to_numpy()`, reading a Parquet file: each of these imports pandas the first time, to
# know its types if it should meet them. That costs a good quarter of a second of processor time in every
# process: a command-line tool that reads a small Parquet file starts the more slowly where somebody also
# installed pandas, and the tool's own imports do not show why. What does not load it:
# `pa.Array.from_buffers`, `to_pylist()`, functions of pyarrow.compute on arrays.
#
# Seen with pyarrow 26.0.1, pandas 3.1.1, numpy 2.4.6, Python 3.11, Linux x86-64: as asserted below; 0.30 to 0.49 s
# of processor time for each of the first kind, at most 0.05 s for the others.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "pyarrow==26.0.1" "pandas==3.1.1" "numpy==2.4.6"
cd "$folder"
venv/bin/python - <<'PYTHON'
import subprocess
import sys

PLAIN = "pa.Array.from_buffers(pa.int64(), 1, [None, pa.py_buffer(bytes(8))])"
LOADING = {
    "scalar": "pa.scalar(1)",
    "array of a list": "pa.array([1])",
    "array of NumPy's": "pa.array(__import__('numpy').zeros(3))",
    "empty table": "pa.schema([('x', pa.int64())]).empty_table()",
    "to_numpy": f"{PLAIN}.to_numpy()",
}
OTHERS = {
    "import alone": "None",
    "from_buffers": PLAIN,
    "to_pylist": f"{PLAIN}.to_pylist()",
    "compute": f"__import__('pyarrow.compute', fromlist=['x']).sum({PLAIN})",
}
for calls, expected in ((LOADING, True), (OTHERS, False)):
    for name, call in calls.items():
        code = (
            "import pyarrow as pa, sys, time\n"
            f"start = time.process_time()\n{call}\n"
            "print('pandas' in sys.modules, round(time.process_time() - start, 2))"
        )
        loaded, seconds = subprocess.check_output([sys.executable, "-c", code], text=True).split()
        print(f"{name:<17} loads pandas: {loaded:<5} {seconds} s")
        assert loaded == str(expected), name
PYTHON
