"""The benchmark of texture: a tiny run, decoders by steps and strength, judges that are away."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from golden import reference as ref
from PIL import Image

torch = pytest.importorskip("torch")
bench = pytest.importorskip("benchmark_texture", reason="needs the `benchmark` extra")
crowds = pytest.importorskip("patch_distances", reason="needs the `benchmark` extra")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(ref.texture(192, 200, 1)).save(folder / "a.png")
    return folder


def run(out: Path, folder: Path, *args: str) -> Result:
    options = [str(out), "--set", f"toy={folder}", "--size", "192", "--codec", "jpeg", *args]
    return CliRunner().invoke(bench.main, options)


@pytest.mark.usefixtures("offline")
def test_tiny_run(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    args = ["--rate", "0.1", "--rate", "1.5", "--peer-rate", "4"]
    args += ["--decoder", "0", "--decoder", "1", "--decoder", "1:0.5", "--decoder", "1:0"]
    result = run(out, pictures, *args)
    assert result.exit_code == 0, result.output
    for judge in ("LPIPS is", "DISTS is", "KID and FID are"):
        assert f"{judge} left out: " in result.stderr

    with (out / "texture.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["rate"], row["codec"]): row for row in rows}
    names = ["pcdc", "pcdc-1", "pcdc-1-0.5", "pcdc-1-0"]
    # JPEG cannot be as coarse as 0.1 bits a pixel
    assert list(found) == [
        *(("0.1", n) for n in names),
        *(("1.5", n) for n in [*names, "jpeg"]),
        ("4", "jpeg"),
    ]
    for rate in ("0.1", "1.5"):
        plain, looks, half, none = (found[rate, name] for name in names)
        judged = [k for k in plain if k != "codec"]
        assert [none[k] for k in judged] == [plain[k] for k in judged]
        assert len({row["psnr"] for row in (plain, looks, half)}) == 3
        assert float(plain["bpp"]) <= float(rate)
        octaves = [float(plain[name]) for name in bench.OCTAVES]
        assert float(plain["texture"]) == pytest.approx(sum(octaves[:2]) / 2, rel=1e-4)
    assert int(found["1.5", "jpeg"]["bytes"]) <= int(found["1.5", "pcdc"]["bytes"])
    assert float(found["0.1", "pcdc"]["texture"]) > float(found["1.5", "pcdc"]["texture"])

    page = (out / "texture.md").read_text()
    assert "| PCDC, steps 1, realism 0.5 |" in page
    assert "toy, native size (crops: 1)" in page
    assert "KID and FID are left out" in page
    assert sorted(p.name[-11:] for p in (out / "crops").iterdir()) == ["0.10bpp.png", "1.50bpp.png"]

    before = (out / "texture.csv").read_bytes()
    monkeypatch.setattr(bench.Bench, "decoded", None)
    assert run(out, pictures, *args).exit_code == 0
    assert (out / "texture.csv").read_bytes() == before
    assert (
        "holds a run with other settings (seed)" in run(out, pictures, *args, "--seed", "1").stderr
    )


@pytest.mark.parametrize("value", ["one", "1:2", "-1", "1:x", "101", "1:-0.1"])
def test_decoders_that_are_none(value: str, pictures: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "out", pictures, "--decoder", value)
    assert result.exit_code == 2
    assert value in result.output


def test_patches_cover_the_pictures() -> None:
    columns = np.arange(128, dtype=np.uint8)[None, :, None].repeat(96, 0).repeat(3, 2)
    cut = crowds.patches([columns, columns])
    assert cut.shape == (2 * 2 * 3, 3, 64, 64)
    assert cut[:, 0, 0, 0].tolist() == 2 * [0, 32, 64, 0, 32, 64]
