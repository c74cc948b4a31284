"""The benchmark of speed: what it measures is this checkout's, medians, and the table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import benchmark_speed
import pytest
from benchmark_speed import HERE, PEER_CODECS, Sample, measure_peer, summary, table
from click.testing import CliRunner
from golden import reference as ref
from PIL import Image


def sample(codec: str, task: str, run: int, cpu: float, threads: int = 1) -> Sample:
    psnr = 30.0 if task == "decode" else None
    return Sample(codec, task, 24, threads, run, cpu, cpu / threads, 250_000, psnr)


def test_rows_are_medians_a_megapixel() -> None:
    samples = [
        sample(codec, task, run, (factor + run**2) * (1 if task == "encode" else 0.5), threads)
        for codec, factor in ((HERE, 2), ("abc", 6))
        for task in ("encode", "decode")
        for threads in (1, 2)
        for run in range(3)
    ]
    samples.append(Sample("AVIF", "encode", 24, 1, 0, 5, 5, 250_000))
    samples.append(Sample("AVIF", "decode", 24, 1, 0, 1, 1, 250_000))
    rows = summary(samples, 2.0)
    first = rows[0]
    assert (first["codec"], first["ratio"], first["threads"]) == (HERE, 24, 1)
    assert first["encode_cpu_s_per_mp"] == 1.5  # of 2, 3 and 6 seconds
    assert first["decode_cpu_s_per_mp"] == 0.75
    assert first["bits_per_pixel"] == 1
    lines = table(rows).splitlines()
    assert lines[2] == f"| 24 | {HERE} | 1.500 | 0.750 | 1.3 | 2.7 |"
    assert lines[3] == "| 24 | abc | 3.500 | 1.750 | 0.6 | 1.1 |"
    assert lines[4] == "| 24 | AVIF | 2.500 | 0.500 |  |  |"


@pytest.mark.parametrize("name", PEER_CODECS)
def test_peers_get_no_more_bytes(name: str) -> None:
    crops = [ref.texture(96, 64, 1), ref.texture(64, 96, 2)]
    budgets = [1500, 1200]
    samples = measure_peer(name, PEER_CODECS[name], crops, 12, budgets, 2)
    assert [(s.task, s.run) for s in samples] == [
        (task, run) for run in range(2) for task in ("encode", "decode")
    ]
    assert all(0.3 * sum(budgets) < s.bytes <= sum(budgets) for s in samples)
    coarsest = measure_peer(name, PEER_CODECS[name], crops, 12, [3, 3], 1)
    assert coarsest[0].bytes > 6


def test_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_speed.os, "sched_getaffinity", lambda _: {0}, raising=False)
    Image.fromarray(ref.texture(200, 160)).save(tmp_path / "a.png")
    out = tmp_path / "out"
    options = ["--size", "96", "--ratio", "12", "--runs", "2", "--no-peers"]
    result = CliRunner().invoke(
        benchmark_speed.main, [str(out), str(tmp_path / "a.png"), *options], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    found = json.loads((out / "speed.json").read_text())["samples"]
    assert [(s["task"], s["run"]) for s in found] == [
        (task, run) for run in range(2) for task in ("encode", "decode")
    ]
    assert all(s["cpu"] > 0 and s["wall"] > 0 for s in found)
    assert all(0.8 * 2304 < s["bytes"] <= 2304 for s in found if s["task"] == "decode")
    assert all(s["psnr"] > 15 for s in found if s["task"] == "decode")
    [row] = csv.DictReader((out / "speed.csv").open())
    assert float(row["encode_cpu_s_per_mp"]) > 0
    assert HERE in (out / "speed.md").read_text()
