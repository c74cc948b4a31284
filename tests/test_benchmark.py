"""The benchmarks: arithmetic by hand-computed cases, peers by their pixels, a whole tiny run."""

from __future__ import annotations

import csv
import importlib
import math
from dataclasses import replace
from pathlib import Path

import benchmark
import benchmark_frames
import click
import metrics
import numpy as np
import pytest
from benchmark_crops import CropError, choose_crops
from benchmark_summary import cell
from click.testing import CliRunner, Result
from golden import reference as ref
from peers import FRAME_PEERS, PEERS, coded_size, search, within
from PIL import Image
from rate_distortion import Comparison, Curve, Ratio, bootstrap, compare, rate_ratio
from toy_detector import Objects, paint_frame, save_toy_detector
from zoo_peers import ALL_PEERS

LINE = [(0.05 * 2**k, float(k)) for k in range(6)]  # one more of quality a doubling of the rate


# ---------------------------------------------------------------- rates at equal quality


def test_twice_the_bytes_is_a_ratio_of_two() -> None:
    ours = [(0.05, 20.0), (0.11, 24.5), (0.3, 27.0), (0.62, 31.0), (1.2, 32.0)]
    twice = [(2 * rate, quality) for rate, quality in ours]
    ratio = rate_ratio(Curve.of(ours), Curve.of(twice), 0.1, 0.6)
    assert ratio
    assert math.exp(ratio.log) == pytest.approx(2, abs=1e-12)
    assert ratio.share == 1
    inverse = rate_ratio(Curve.of(twice), Curve.of(ours), 0.1, 0.6)
    assert inverse
    assert math.exp(inverse.log) == pytest.approx(0.5, abs=1e-12)


def test_mean_of_a_ratio_that_varies() -> None:
    # the peer's log2 rate rises twice as fast: 0 more at quality 1, 3 more at quality 4
    peer = [(0.1 * 2 ** (2 * k), 1.0 + k) for k in range(4)]
    ratio = rate_ratio(Curve.of(LINE), Curve.of(peer), 0.1, 0.8)
    assert ratio
    assert ratio.log == pytest.approx(1.5 * math.log(2))


def test_only_the_overlap_in_our_range_is_compared() -> None:
    # ours reaches quality 1..4 between 0.1 and 0.8; the peer, at triple rate, ends at 2.5
    peer = [(3 * 0.05 * 2**q, q) for q in (0.0, 1.0, 2.0, 2.5)]
    ratio = rate_ratio(Curve.of(LINE), Curve.of(peer), 0.1, 0.8)
    assert ratio
    assert math.exp(ratio.log) == pytest.approx(3)
    assert ratio.share == pytest.approx(0.5)
    # below our curve's first rate there is nothing to compare, and nothing is made up
    low = rate_ratio(Curve.of(LINE), Curve.of(LINE), 0.001, 0.1)
    assert low == Ratio(0, 1)


@pytest.mark.parametrize(
    "peer",
    [
        [(0.1, 10.0), (0.2, 11.0)],  # better throughout
        [(0.1, -3.0), (0.2, -2.0)],  # worse throughout
        [(0.1, 0.0), (0.2, 1.2)],  # overlaps in less than a tenth of our range
        [(0.1, 2.0)],  # no curve
        [(0.1, math.inf), (0.2, math.inf)],
        [],
    ],
)
def test_no_overlap(peer: list[tuple[float, float]]) -> None:
    assert rate_ratio(Curve.of(LINE), Curve.of(peer), 0.1, 0.8) is None
    assert rate_ratio(Curve.of(peer), Curve.of(LINE), 0.1, 0.8) is None or len(peer) == 2


def test_points_that_cost_more_for_less_are_dropped() -> None:
    curve = Curve.of([(4, 3.0), (1, 1.0), (3, 0.5), (2, 2.0), (2, 1.5), (5, 3.0)])
    assert curve.rate.tolist() == [1, 2, 4]
    assert curve.quality.tolist() == [1, 2, 3]
    assert np.isnan(curve.quality_at(np.array([0.9, 4.1]))).all()


def test_comparison_over_pictures() -> None:
    ratios = [Ratio(math.log(2), 1.0), Ratio(math.log(8), 0.5), None]
    result = compare(ratios, seed=1)
    assert result.ratio == pytest.approx(4)  # geometric mean
    # of resampled pairs a quarter is twice the one, a quarter twice the other
    assert (result.low, result.high) == (pytest.approx(2), pytest.approx(8))
    assert (result.compared, result.pictures, result.share) == (2, 3, 0.75)
    assert cell(result) == "**4.00** [2.00, 8.00] (2 of 3, 75 %)"
    single = compare([Ratio(0.0, 1.0)], seed=1)
    assert single.ratio == 1
    assert math.isnan(single.low)
    assert cell(single) == "**1.00**"
    nothing = compare([None, None], seed=1)
    assert math.isnan(nothing.ratio)
    assert cell(nothing) == "none of 2"


def test_bootstrap_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap(values, seed=5)
    # of a mean: 1.96 standard errors either way
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    assert bootstrap(values, seed=5) == (low, high)
    assert bootstrap(values, seed=6) != (low, high)
    assert bootstrap(np.full(7, 1.5), seed=0) == (1.5, 1.5)


def test_large_share_is_not_mentioned() -> None:
    assert cell(Comparison(1.234, 1.1, 1.4, 9, 9, 0.95)) == "**1.23** [1.10, 1.40]"


# ------------------------------------------------------------------------------- peers


def available(name: str) -> None:
    try:
        PEERS[name].library()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", PEERS)
def test_peer_decodes_to_what_it_was_given(name: str) -> None:
    available(name)
    peer = PEERS[name]
    pixels = ref.texture(192, 200, 5)
    files = [peer.encode(pixels, peer.ladder[k]) for k in (0, len(peer.ladder) // 2, -1)]
    decoded = [peer.decode(file) for file in files]
    assert all(p.shape == pixels.shape and p.dtype == np.uint8 for p in decoded)
    sizes = [peer.size(file) for file in files]
    assert sizes == sorted(sizes)
    assert 8 * sizes[0] / 38400 < 0.6
    assert 8 * sizes[-1] / 38400 > 1.2
    coarse, _, fine = (metrics.psnr(pixels, p) for p in decoded)
    assert coarse + 4 < fine
    assert fine > 30
    # colours in their order, nothing shifted
    for p in decoded[1:]:
        assert np.abs(p.mean((0, 1)) - pixels.mean((0, 1))).max() < 2
    assert list(peer.ladder) == sorted(peer.ladder, reverse=name == "jpegxl")
    assert set(peer.ladder) <= set(peer.settings) or name not in ("jpeg", "webp", "avif")


def test_search_meets_sizes_from_both_sides() -> None:
    peer = replace(
        PEERS["jpeg"],
        settings=range(1, 30),
        encode=lambda _, setting: bytes(10 * int(setting)),
    )
    pixels = ref.constant(8, 8)
    assert search(peer, pixels, 55, at_most=True) == (5, bytes(50))
    assert search(peer, pixels, 50, at_most=True) == (5, bytes(50))
    assert search(peer, pixels, 55, at_most=False) == (6, bytes(60))
    assert search(peer, pixels, 60, at_most=False) == (6, bytes(60))
    assert search(peer, pixels, 9, at_most=True) is None
    assert search(peer, pixels, 300, at_most=False) is None
    for start in (1, 4, 5, 6, 29):
        assert search(peer, pixels, 55, at_most=True, start=start) == (5, bytes(50))
        assert search(peer, pixels, 55, at_most=False, start=start) == (6, bytes(60))
        assert search(peer, pixels, 9, at_most=True, start=start) is None
        assert search(peer, pixels, 300, at_most=False, start=start) is None
    assert search(peer, pixels, 200, at_most=True, start=19, enough=0.9) == (19, bytes(190))
    assert search(peer, pixels, 200, at_most=True, start=19, enough=0.96) == (20, bytes(200))
    assert within(peer, pixels, 55) == bytes(50)
    assert within(peer, pixels, 9) == bytes(10)


@pytest.mark.parametrize("grows", [1.0, 1.07, 1.5])  # from one setting to the next
def test_files_within_sizes_are_the_finest_and_few(grows: float) -> None:
    made: list[float] = []

    def size_of(setting: float) -> int:
        return 100 + int(setting) if grows == 1 else int(100 * grows ** (setting / 4))

    def encode(_: object, setting: float) -> bytes:
        made.append(setting)
        return bytes(size_of(setting))

    peer = replace(PEERS["jpeg"], settings=range(101), encode=encode)
    pixels = ref.constant(8, 8)
    known: dict[int, int] = {}
    sizes = [size_of(setting) + 3 for setting in (95, 70, 44, 43, 20, 3)]
    for size in (*sizes, 10, 10**9):
        found = search(peer, pixels, size, at_most=True)
        made.clear()
        assert within(peer, pixels, size, known) == (found[1] if found else bytes(size_of(0)))
        assert len(made) <= 12
    assert known == {setting: size_of(setting) for setting in known}
    made.clear()
    within(peer, pixels, sizes[2], known)
    assert len(made) == 1  # both neighbours are known
    found = search(peer, pixels, sizes[2], at_most=True)
    made.clear()
    assert found is not None
    assert within(peer, pixels, sizes[2], {}, 44) == found[1]
    assert made[0] == 44
    assert len(made) <= 4


def test_odd_qualities_of_hevc_are_the_next_even_ones() -> None:
    available("hevc")
    pixels = ref.texture(96, 96, 5)
    files = [PEERS["hevc_psnr"].encode(pixels, quality) for quality in (31, 32, 33, 34)]
    assert files[0] == files[1] != files[2] == files[3]
    assert {31, 33}.isdisjoint(PEERS["hevc_psnr"].settings)


def test_boxes_do_not_count() -> None:
    def box(name: bytes, content: bytes) -> bytes:
        return (8 + len(content)).to_bytes(4, "big") + name + content

    inside = box(b"hvcC", bytes(100)) + box(b"colr", bytes(11))
    file = box(b"ftyp", bytes(20)) + box(b"meta", inside) + box(b"mdat", bytes(5000))
    assert coded_size(file) == 5100


# ----------------------------------------------------------------------------- metrics


def test_metrics_of_known_pairs() -> None:
    measures, missing = metrics.load(["psnr", "ssim", "ms_ssim", "ssimulacra2"])
    assert not missing
    a = ref.texture(192, 192, 1)
    b = (a.astype(int) + np.where(a < 128, 4, -4)).astype(np.uint8)
    assert measures["psnr"](a, b) == pytest.approx(10 * math.log10(255**2 / 16), abs=1e-4)
    assert measures["psnr"](a, a) == math.inf
    assert measures["ssim"](a, a) == pytest.approx(1)
    assert measures["ms_ssim"](a, a) == pytest.approx(1)
    assert measures["ssimulacra2"](a, a) == pytest.approx(100)
    worse = ref.noise(192, 192)
    for name, measure in measures.items():
        values = [metrics.METRICS[name].quality(measure(a, x)) for x in (b, worse)]
        assert values[0] > values[1], name


def test_lpips(lpips_weights: None) -> None:
    measures, _ = metrics.load(["lpips"])
    a = ref.texture(192, 192, 1)
    assert measures["lpips"](a, a) == pytest.approx(0, abs=1e-6)
    assert 0.2 < measures["lpips"](a, ref.noise(192, 192)) < 2


@pytest.mark.usefixtures("offline")
def test_weights_that_cannot_be_had_cost_one_line() -> None:
    measures, missing = metrics.load(["lpips", "dists", "psnr"])
    assert list(measures) == ["psnr"]
    assert missing["lpips"].startswith("LPIPS is left out: its weights could not be loaded (")
    assert missing["dists"].startswith("DISTS is left out: its weights could not be loaded (")
    assert "\n" not in "".join(missing.values())


# ------------------------------------------------------------------------------- crops


def test_crops_are_fixed_by_the_seed(tmp_path: Path) -> None:
    for k, size in enumerate([(600, 500), (700, 420), (256, 200)]):
        Image.fromarray(ref.texture(size[1], size[0], k)).save(tmp_path / f"{k}.png")
    crops = choose_crops("a", tmp_path, 6, 200, seed=3)
    assert crops == choose_crops("a", tmp_path, 6, 200, seed=3)
    assert crops != choose_crops("a", tmp_path, 6, 200, seed=4)
    fewer = choose_crops("a", tmp_path, 4, 200, seed=3)
    assert set(fewer) < set(crops)
    # the small image is taken whole, once, at native size only
    [whole] = [c for c in crops if c.path.name == "2.png"]
    assert (whole.scale, whole.width, whole.height) == ("native", 256, 200)
    assert len({c.key for c in crops}) == len(crops)
    assert {c.scale for c in crops} == {"native", "half"}
    for crop in crops:
        pixels = crop.read()
        assert pixels.shape == (crop.height, crop.width, 3)
        full = np.asarray(Image.open(crop.path)).astype(float)
        if crop.scale == "half":
            full = full[: full.shape[0] // 2 * 2, : full.shape[1] // 2 * 2]
            full = (full[::2, ::2] + full[1::2, ::2] + full[::2, 1::2] + full[1::2, 1::2]) / 4
        part = full[crop.row : crop.row + crop.height, crop.col : crop.col + crop.width]
        assert np.abs(pixels - part).max() <= 0.5


def test_folders_that_cannot_be_cropped(tmp_path: Path) -> None:
    with pytest.raises(CropError, match="a: no images in"):
        choose_crops("a", tmp_path, 1, 200, 0)
    Image.fromarray(ref.constant(300, 100)).save(tmp_path / "small.png")
    with pytest.raises(CropError, match=r"a: small\.png is smaller than 176 pixels"):
        choose_crops("a", tmp_path, 1, 200, 0)
    (tmp_path / "broken.png").write_bytes(b"no")
    with pytest.raises(CropError, match=r"a: broken\.png cannot be read"):
        choose_crops("a", tmp_path, 1, 200, 0)


# -------------------------------------------------------------------------- whole runs


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(2):
        Image.fromarray(ref.texture(180, 190, k)).save(folder / f"{k}.png")
    return folder


def run(out: Path, folder: Path, *args: str) -> Result:
    options = [str(out), "--set", f"toy={folder}", "--size", "180", *args]
    return CliRunner().invoke(benchmark.main, options)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_ends_of_a_curve_count_whatever_their_rounding() -> None:
    """Interpolated at its last rate, a curve may come out an ulp above its last quality."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        rates, qualities = np.cumsum(0.1 + rng.random((2, 5)), 1)
        points = list(zip(np.exp(rates), qualities, strict=True))
        ratio = rate_ratio(Curve.of(points[1:4]), Curve.of(points), 0, math.inf)
        assert ratio is not None
        assert math.isfinite(ratio.log)
        assert ratio.share == pytest.approx(1)


@pytest.mark.usefixtures("offline")
def test_tiny_run(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    available("jpegxl")

    def refuse(*_: object) -> bytes:
        raise OSError("disk is made of cheese")

    monkeypatch.setitem(ALL_PEERS, "webp", replace(PEERS["webp"], encode=refuse, ladder=(1, 2)))
    for name, ladder in {"jpeg2000": (0.02, 0.04, 0.2, 0.6, 1.3, 2), "jpegxl": (20, 9, 4)}.items():
        monkeypatch.setitem(ALL_PEERS, name, replace(PEERS[name], ladder=ladder))
    monkeypatch.setattr(benchmark, "OUR_RATES", (0.1, 0.3, 0.6))
    monkeypatch.setattr(benchmark, "SHEET_RATES", (0.6,))
    out = tmp_path / "out"
    codecs = ["--codec", "jpegxl", "--codec", "jpeg2000", "--codec", "webp"]
    codecs += ["--steps", "0", "--steps", "2"]
    result = run(out, pictures, *codecs)
    assert result.exit_code == 0, result.output
    assert "LPIPS is left out: its weights could not be loaded" in result.stderr
    assert "2/2 toy native" in result.stderr

    points = rows(out / "points.csv")
    assert list(points[0]) == benchmark.POINT_FIELDS
    assert {p["codec"] for p in points} == {"pcdc", "pcdc-2", "jpegxl", "jpeg2000"}
    ours, two = ([p for p in points if p["codec"] == c] for c in ("pcdc", "pcdc-2"))
    assert [p["bytes"] for p in ours] == [p["bytes"] for p in two]
    assert all(a["psnr"] != b["psnr"] for a, b in zip(ours, two, strict=True))
    assert len({p["crop"] for p in points}) == 2
    for p in points:
        assert float(p["bpp"]) == pytest.approx(8 * int(p["bytes"]) / (180 * 190), rel=1e-5)
        assert int(p["bytes"]) <= int(p["file_bytes"])
        assert not p["lpips"]
        assert math.isfinite(float(p["ssimulacra2"]))
        if p["codec"] == "pcdc":
            assert float(p["bpp"]) <= float(p["setting"])
    # a rate beyond each end of the range, and no more
    settings = {float(p["setting"]) for p in points if p["codec"] == "jpeg2000"}
    assert settings == {0.04, 0.2, 0.6, 1.3}

    failures = rows(out / "failures.csv")
    assert len(failures) == 4  # two settings of WebP on two pictures
    assert failures[0]["error"] == "OSError: disk is made of cheese"

    ratios = {(r["peer"], r["metric"]): r for r in rows(out / "ratios.csv")}
    assert {m for _, m in ratios} == {"ssimulacra2", "ms_ssim", "psnr", "texture"}
    found = ratios["jpeg2000", "psnr"]
    assert found["crops_compared"] == found["crops"] == "2"
    assert float(found["low"]) <= float(found["ratio"]) <= float(found["high"])
    assert ratios["webp", "psnr"]["crops_compared"] == "0"

    summary = (out / "summary.md").read_text()
    for text in (
        "toy, native size (crops: 2)",
        "| PCDC, steps 2 | ",
        "| JPEG XL | ",
        "none of 2",
        "libjxl",
        "SHA-256",
        "--steps 0 --steps 2",
    ):
        assert text in summary
    assert "webp: OSError: disk is made of cheese (4 times)" in summary
    assert (out / "curves.svg").read_text().startswith("<?xml")
    assert Image.open(out / "curves.png").size[0] > 1000
    [first, second] = sorted((out / "crops").iterdir())
    assert first.name == "toy-native-0_x0_y0-0.60bpp.png"
    assert Image.open(first).size == Image.open(second).size

    # the same again measures nothing again; other settings need another folder
    before = (out / "points.csv").read_bytes()
    monkeypatch.setattr(benchmark.Bench, "measure", None)
    assert run(out, pictures, *codecs).exit_code == 0
    assert (out / "points.csv").read_bytes() == before
    other = run(out, pictures, *codecs, "--seed", "1")
    assert other.exit_code == 1
    assert "holds a run with other settings (seed)" in other.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--set", "x"], 2, "'x' is not NAME=DIR"),
        (["--set", "x=nowhere"], 2, "nowhere is not a directory"),
        (["--set", "toy=."], 2, "toy is given twice"),
        (["--model", "nosuch"], 1, "nosuch: no such model"),
        (["--codec", "gif"], 2, "'gif' is not one of"),
    ],
)
def test_bad_input(
    args: list[str], code: int, message: str, pictures: Path, tmp_path: Path
) -> None:
    result = run(tmp_path / "out", pictures, *args)
    assert result.exit_code == code
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_allocation_by_a_policy_that_is_not_there(pictures: Path, tmp_path: Path) -> None:
    model = ref.write_model(tmp_path / "model")
    args = ("--model", str(model), "--allocation", "policy")
    result = run(tmp_path / "out", pictures, *args)
    assert result.exit_code == 1
    assert "this model has no policy" in result.stderr
    assert not (tmp_path / "out").exists()


def test_missing_library_costs_one_line(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    monkeypatch.setattr(benchmark, "resume", lambda *_: pytest.exit("never"))
    with pytest.raises(ImportError, match="No module named 'pillow_heif'"):
        PEERS["hevc"].library()
    measures, missing = metrics.load(["ssim", "ssimulacra2"])
    assert not measures
    assert missing["ssimulacra2"] == "SSIMULACRA 2 is left out: No module named 'ssimulacra2'"


def test_whole_frames(flight: Path, tmp_path: Path) -> None:
    out = tmp_path / "frames"
    args = [str(out), str(flight), "--ratio", "24", "--peer", "jpeg2000"]
    result = CliRunner().invoke(benchmark_frames.main, args)
    assert result.exit_code == 0, result.output
    found = rows(out / "frames.csv")
    assert [r["codec"] for r in found] == 3 * ["pcdc, steps 0", "jpeg2000"]
    for ours, peer in zip(found[::2], found[1::2], strict=True):
        assert int(ours["bytes"]) <= int(ours["budget"])
        assert int(peer["bytes"]) <= int(ours["bytes"])
        assert min(float(ours["psnr"]), float(peer["psnr"])) > 15
    assert "| 24 | jpeg2000 |" in (out / "table.md").read_text()


def test_avif_of_a_frame_fits_its_bytes() -> None:
    available("avif")
    pixels = ref.texture(96, 96)
    file = benchmark_frames.avif(pixels, 1500)
    assert 1200 < FRAME_PEERS["avif"].size(file) <= 1500
    with pytest.raises(click.ClickException, match="AVIF cannot code a frame in 20 bytes"):
        benchmark_frames.avif(pixels, 20)


def test_detection_table_gives_all_codecs_the_same_budget(flight: Path, tmp_path: Path) -> None:
    detection_table = pytest.importorskip("detection_table")
    pytest.importorskip("ultralytics")
    available("hevc")
    frames = tmp_path / "painted"
    objects: Objects = [("car", 40, 50, 60, 40), ("person", 400, 120, 50, 70)]
    paint_frame(sorted(flight.iterdir())[0], objects, frames / "one.jpg")
    out, toy = tmp_path / "out", save_toy_detector(tmp_path / "toy.torchscript")
    args = [str(out), str(frames), "--model", str(toy), "--source-ratio", "4", "--device", "cpu"]
    result = CliRunner().invoke(detection_table.main, args)
    assert result.exit_code == 0, result.output
    found = rows(out / "detection.csv")
    sizes = {r["codec"]: int(r["bytes"]) for r in found}
    assert list(sizes) == ["uniform", "hevc", "jpeg"]
    budget = (frames / "one.jpg").stat().st_size // 4
    assert all(0.8 * budget < size <= budget for size in sizes.values())
    cars = [r for r in found if r["metric"] == "ratio" and r["class"] == "vehicle"]
    assert [(r["objects"], float(r["restored"])) for r in cars] == 3 * [("1", 1.0)]
