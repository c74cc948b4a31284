"""`archive ingest --allocation` and `--adapt`: rules, budgets, missing and damaged policies."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Run
from golden import reference as ref

from archive_pipeline.codec import models
from archive_pipeline.jobs.check import check
from archive_pipeline.pcdc.allocation import ALLOCATIONS
from archive_pipeline.pcdc.policy import POLICY, pack_policy, policy_digest
from archive_pipeline.store.archive import Archive


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The test model with a policy beside it."""
    folder = ref.write_model(tmp_path / "model")
    (folder / POLICY).write_bytes(pack_policy(ref.tiny_policy()))
    return folder


def test_ingest_allocates_as_asked(run: Run, flight: Path, model: Path, tmp_path: Path) -> None:
    pixels = {}
    for name in (*ALLOCATIONS, "default"):
        url = tmp_path / f"{name}.zarr"
        options = [] if name == "default" else ["--allocation", name]
        done = run(
            *["ingest", flight, "--archive", url, "--bpp", 0.3, "--model", model, *options],
            *["--workers", 0, "--json"],
        )
        assert done.code == 0, done.err
        for image in done.json["images"]:
            assert image["archive_bytes"] <= 0.3 * image["pixels"] / 8
        assert check(str(url)).problems == []
        assert (url / "policies").exists() == (name == "policy")
        records = [entry.record for entry in Archive.open(str(url)).images()]
        policy = policy_digest((model / POLICY).read_bytes()) if name == "policy" else None
        assert {record["allocation"] for record in records} == {
            options[-1] if options else "uniform"
        }
        assert {record.get("policy") for record in records} == {policy}
        first = url / "flights" / flight.name / done.json["images"][0]["id"]
        pixels[name] = (first / "pixels" / "c" / "0" / "0" / "0").read_bytes()
    assert pixels["default"] == pixels["uniform"]
    assert len(set(pixels.values())) == 3


def test_a_model_without_policy(run: Run, flight: Path, tmp_path: Path) -> None:
    model = ref.write_model(tmp_path / "model")
    args = ["ingest", flight, "--archive", tmp_path / "a.zarr", "--bpp", 0.3, "--model", model]
    assert run(*args, "--workers", 0).code == 0
    refused = run(*args, "--overwrite", "--allocation", "policy")
    assert refused.code == 1
    assert "no allocation policy" in refused.err


def test_damaged_policies_are_named(
    run: Run, flight: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = tmp_path / "a.zarr"
    args = ["ingest", flight, "--archive", url, "--bpp", 0.3, "--model", model, "--workers", 0]
    args += ["--allocation", "policy"]
    assert run(*args).code == 0
    (stored,) = (url / "policies").iterdir()
    stored.write_bytes(stored.read_bytes()[:-1] + b"\0")
    problems = check(str(url)).problems
    assert len(problems) == 1
    assert stored.name in problems[0]
    monkeypatch.setattr(models, "_policies", {})  # as in a worker that was just started
    assert run(*args, "--overwrite").code == 0  # stored again
    assert check(str(url)).problems == []
    (model / POLICY).write_bytes(b"none")
    refused = run(*args, "--overwrite")
    assert refused.code == 1
    assert POLICY in refused.err


@pytest.mark.parametrize("rule", [[], ["--allocation", "greedy"]])
def test_adapting_is_for_the_policy(
    rule: list[str], run: Run, flight: Path, tmp_path: Path
) -> None:
    refused = run("ingest", flight, "--archive", tmp_path / "a.zarr", "--adapt", 1, *rule)
    assert refused.code == 2
    assert "--allocation policy" in refused.err


def test_objects_need_a_detector(run: Run, flight: Path, tmp_path: Path) -> None:
    archive = ["--archive", tmp_path / "a.zarr"]
    refused = run("ingest", flight, *archive, "--allocation", "objects")
    assert refused.code == 2
    assert "--detect MODEL" in refused.err
