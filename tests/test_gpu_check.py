"""`workflows/gpu_check.py`, as it is tried where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from golden import reference as ref

SCRIPT = Path(__file__).parents[1] / "workflows" / "gpu_check.py"
SMALL = ("--height", 130, "--width", 200, "--runs", 1, "--frames", 1, "--no-compile")
SMALLER = ("--batch", 2, "--crop", 64, "--steps", 1)


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
        env=ref.subprocess_environment(OMP_NUM_THREADS="1"),
    )


@pytest.mark.slow
def test_all_parts_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = run("--device", "cpu", *SMALL, *SMALLER, "--out", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    for name, result in found.items():
        assert "not_measured" not in result, name
    exact = found["exactness"]
    assert all(exact[f"symbols_equal_{who}_{n}"] for who in ("cpu", "device") for n in (24, 100))
    assert exact["pixels_apart_most_float32_24"] == 0  # the same device twice
    for part in ("coding_24", "coding_100"):
        assert found[part]["encode_mp_s"] > 0
        assert found[part]["decode_mp_s"] > 0
        assert 0 < found[part]["decode_symbol_coder_share"] < 5  # one run beside another's
    assert found["ingest"]["frames"] == 1
    assert found["training_plain"]["steps_s"] > 0
    assert all(line.split()[0] in found for line in done.stdout.splitlines())


def test_without_a_gpu_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run()
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "Error: no CUDA device is available (--device cpu tries the script)"
    )
