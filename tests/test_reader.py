"""Decoding without PyTorch: the same symbols, nearly the same pixels, and packages left alone."""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BRIGHTON
from golden import reference as ref
from numpy.typing import NDArray
from PIL import Image

import archive_pipeline as ap
from archive_pipeline.codec import models
from archive_pipeline.codec.models import DEFAULT_MODEL, shipped
from archive_pipeline.codec.settings import Settings
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.decoding import Symbols
from archive_pipeline.pcdc.encoding import encode_tiles
from archive_pipeline.pcdc.model import Model
from archive_pipeline.pcdc.model_files import CONFIG, WEIGHTS, ModelError, read, read_folder
from archive_pipeline.pcdc.precision import Precision
from archive_pipeline.pcdc.reader import decoder, scales
from archive_pipeline.pcdc.reader.decoder import Reader
from archive_pipeline.pcdc.transforms import HyperScale, TransformConfig

SIDE = 304
RELEASED = read_folder(shipped() / DEFAULT_MODEL)
GOLDEN = ref.load_golden(ref.STREAMS)["streams"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with ref.threads(1), pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def reader(files: dict[str, bytes], engine: str, precision: Precision = "float32") -> Reader:
    with pytest.MonkeyPatch.context() as patch:
        if engine == "numpy":
            patch.setattr(decoder, "importable", lambda name: False)
        return Reader(files, precision)


@pytest.fixture(scope="module")
def readers() -> dict[str, Reader]:
    return {
        "numpy": reader(RELEASED, "numpy"),
        "openvino": reader(RELEASED, "openvino"),
        "bfloat16": reader(RELEASED, "openvino", "bfloat16"),
    }


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(Model(RELEASED))


def photograph() -> NDArray[np.uint8]:
    if not BRIGHTON.is_dir():
        return ref.texture(SIDE, SIDE)
    with Image.open(sorted(BRIGHTON.iterdir())[0]) as image:
        return np.asarray(image.crop((1000, 700, 1000 + SIDE, 700 + SIDE)))


@pytest.fixture(scope="module")
def streams(codec: Codec) -> dict[int, bytes]:
    """A photograph at three ratios, the first one so fine that its latents are large."""
    tile = photograph()
    return {r: encode_tiles(codec, [tile], tile.size // r)[0] for r in (6, 24, 100)}


# ------------------------------------------------------------------------- symbols


@pytest.mark.parametrize("engine", ["numpy", "openvino"])
def test_golden_streams_decode_to_what_was_recorded(engine: str) -> None:
    read_by = reader(ref.tiny_files(), engine)
    encoded = [base64.b64decode(entry["stream"]) for entry in GOLDEN.values()]
    found = read_by.decode_symbols(encoded, 4096, 4096)
    for entry, symbols in zip(GOLDEN.values(), found, strict=True):
        assert ref.matches(entry, symbols)


@pytest.mark.parametrize("path", sorted(ref.RELEASED.glob("*.json")), ids=lambda p: p.stem)
def test_streams_of_every_release_decode_to_what_was_recorded(path: Path) -> None:
    golden = ref.load_golden(path)
    part = path.with_name(path.stem + ref.PART).read_bytes()
    other = ref.decoder_of_part(part, golden["model"])
    read_by = reader(other.model.files, "numpy")
    read_by.prefix = other.prefix
    encoded = [base64.b64decode(entry["stream"]) for entry in golden["streams"].values()]
    found = read_by.decode_symbols(encoded, 4096, 4096)
    for entry, symbols in zip(golden["streams"].values(), found, strict=True):
        assert ref.matches(entry, symbols)


@pytest.mark.parametrize("largest", [3, 127])
@pytest.mark.parametrize("step", [8, 31, 55])
def test_scale_indices_are_those_of_pytorch(
    codec: Codec, readers: dict[str, Reader], step: int, largest: int
) -> None:
    z = np.random.default_rng(step).integers(-largest, largest + 1, (64, 3, 5))
    [found], [expected] = (d.scale_indices([z], [step]) for d in (readers["numpy"], codec))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(readers["numpy"].prior_index(step), codec.prior_index(step))


@pytest.mark.parametrize("share", [0.02, 1.0], ids=["small-weights", "largest-weights"])
def test_any_weights_give_the_integers_of_pytorch(share: float) -> None:
    """The largest exceed float32's 24 bits, and float64 multiplies."""
    config = TransformConfig(latents=8, hyper_latents=6)
    network, rng = HyperScale(config).eval(), np.random.default_rng(1)
    most = int(share * 1023)
    with torch.no_grad():
        for layer in network.layers:
            shape, biases = tuple(layer.weight.shape), tuple(layer.bias.shape)
            layer.weight.copy_(torch.from_numpy(rng.integers(-most, most + 1, shape)) / 256)
            layer.bias.copy_(torch.from_numpy(rng.integers(-(1 << 20), 1 << 20, biases)) / 4096)
    tensors = {f"h_scale.{name}": t.numpy() for name, t in network.state_dict().items()}
    in_numpy = scales.ScaleNetwork(tensors, config)
    exact = [layer.gain * 4095 < 1 << 24 for layer in in_numpy.layers[:1]]  # type: ignore[attr-defined]
    assert exact == [share < 0.1]
    for step in (8, 55):
        z = rng.integers(-127, 128, (6, 4, 3))
        expected = network.indices(torch.from_numpy(z)[None], torch.tensor([step]))[0].numpy()
        assert len(np.unique(expected)) > 5
        np.testing.assert_array_equal(in_numpy.index(z, step), expected)


def test_a_damaged_stream_is_told_as_by_pytorch(codec: Codec, readers: dict[str, Reader]) -> None:
    [stream] = encode_tiles(codec, [ref.texture(64, 64)], 500)
    damaged = [stream[:40], stream[:-1] + b"\xff", stream]
    told = [
        [type(s) if isinstance(s, Symbols) else str(s) for s in by.decode_symbols(damaged, 64, 64)]
        for by in (codec, readers["numpy"])
    ]
    assert told[0] == told[1]
    assert told[0][2] is Symbols


# -------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("engine", ["numpy", "openvino", "bfloat16"])
@pytest.mark.parametrize("ratio", [6, 24, 100])
def test_pixels_are_those_of_pytorch(
    codec: Codec, readers: dict[str, Reader], streams: dict[int, bytes], engine: str, ratio: int
) -> None:
    [expected] = codec.decode([streams[ratio]], SIDE, SIDE)
    [found] = readers[engine].decode([streams[ratio]], SIDE, SIDE)
    difference = np.abs(found.astype(int) - expected)
    assert (difference <= 1).mean() >= 0.9999
    assert (difference == 0).mean() > (0.8 if engine == "bfloat16" else 0.999)
    if ratio > 6:
        assert abs(error(found) - error(expected)) < 0.02


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_denoised_pixels_are_those_of_pytorch(
    codec: Codec, readers: dict[str, Reader], streams: dict[int, bytes], precision: str, steps: int
) -> None:
    engine = "openvino" if precision == "float32" else precision
    plain, expected = (codec.decode([streams[100]], SIDE, SIDE, n, 5)[0] for n in (0, steps))
    [found] = readers[engine].decode([streams[100]], SIDE, SIDE, steps, 5)
    difference = np.abs(found.astype(int) - expected)
    assert np.abs(plain.astype(int) - expected).mean() > 1.5  # there is something to get wrong
    assert (difference <= 1).mean() >= (0.999 if engine == "bfloat16" else 0.9999)
    assert (difference == 0).mean() > (0.8 if engine == "bfloat16" else 0.999)
    [half] = readers[engine].decode([streams[100]], SIDE, SIDE, steps, 5, 0.5)
    [expected] = codec.decode([streams[100]], SIDE, SIDE, steps, 5, 0.5)
    assert (np.abs(half.astype(int) - expected) <= 1).mean() >= 0.999


@pytest.mark.parametrize("size", [(8, 8), (16, 304), (304, 1), (32, 64)])
def test_tiles_too_small_for_statistics_are_denoised_as_others_are(
    codec: Codec, readers: dict[str, Reader], size: tuple[int, int]
) -> None:
    """The last tiles of an image may be a few pixels wide."""
    tile = photograph()[: size[0], : size[1]]
    symbols = codec.decode_symbols(encode_tiles(codec, [tile], tile.size // 24 + 60), SIDE, SIDE)
    plain, *looks = (
        decode.synthesise(symbols, steps, [5])[0]
        for decode, steps in ((codec, 0), (codec, 1), (readers["openvino"], 1), (codec, 4))
    )
    worst = [np.mean((pixels.astype(float) - tile) ** 2) for pixels in looks]
    assert max(worst) < 1.3 * np.mean((plain.astype(float) - tile) ** 2)
    assert np.abs(looks[0].astype(int) - looks[1]).max() <= 1


@pytest.mark.parametrize("name", ["texture-1x1", "texture-128x128-0"])
def test_denoised_pixels_of_a_model_without_grain(name: str) -> None:
    """Of other widths, one layer a resolution, and a tile of one pixel."""
    files = ref.denoising_files()
    by_pytorch, by_openvino = Codec(Model(files)), reader(files, "openvino")
    symbols = ref.tiny_codec().decode_symbols([base64.b64decode(GOLDEN[name]["stream"])], 128, 128)
    [plain], [expected] = (by_pytorch.synthesise(symbols, n, [5]) for n in (0, 2))
    [found] = by_openvino.synthesise(symbols, 2, [5])
    assert (expected != plain).mean() > 0.1
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.99


def error(pixels: NDArray[np.uint8]) -> float:
    """PSNR against the photograph, in dB."""
    return float(-10 * np.log10(np.mean((pixels.astype(float) - photograph()) ** 2)))


@pytest.mark.parametrize("engine", ["numpy", "openvino"])
@pytest.mark.parametrize("name", ["texture-1x1", "texture-128x128-0"])
def test_pixels_of_golden_streams(engine: str, name: str) -> None:
    """A model without shortcut, of another width, and a tile of one pixel."""
    stream = base64.b64decode(GOLDEN[name]["stream"])
    [expected] = ref.tiny_codec().decode([stream], 4096, 4096)
    [found] = reader(ref.tiny_files(), engine).decode([stream], 4096, 4096)
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.99


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_denoised_pixels_depend_neither_on_company_nor_on_threads(
    streams: dict[int, bytes], precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [*streams.values()] * 2
    one = reader(RELEASED, "openvino", precision)
    alone = [one.decode([s], SIDE, SIDE, 2, 5)[0] for s in batch[:3]]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    together = reader(RELEASED, "openvino", precision).decode(batch, SIDE, SIDE, 2, 5)
    for a, b in zip(alone * 2, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_empty_tile(codec: Codec, readers: dict[str, Reader]) -> None:
    [stream] = encode_tiles(codec, [np.zeros((0, 0, 3), np.uint8)], 100)
    [pixels] = readers["numpy"].decode([stream], SIDE, SIDE)
    assert pixels.shape == (0, 0, 3)


@pytest.mark.parametrize("engine", ["numpy", "openvino", "bfloat16"])
def test_pixels_depend_neither_on_company_nor_on_threads(
    streams: dict[int, bytes], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [*streams.values()] * 2
    kind = "numpy" if engine == "numpy" else "openvino"
    precision: Precision = "bfloat16" if engine == "bfloat16" else "float32"
    alone = [reader(RELEASED, kind, precision).decode([s], SIDE, SIDE)[0] for s in batch[:3]]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    together = reader(RELEASED, kind, precision).decode(batch, SIDE, SIDE)
    for a, b in zip(alone * 2, together, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_decodes(streams: dict[int, bytes]) -> None:
    code = """
import os, pickle, sys
from archive_pipeline.codec.models import DEFAULT_MODEL, find_folder
from archive_pipeline.pcdc.model_files import read_folder
from archive_pipeline.pcdc.reader.decoder import Reader

reader = Reader(read_folder(find_folder(DEFAULT_MODEL)))
streams = pickle.load(sys.stdin.buffer)
before = [tile.tobytes() for tile in reader.decode(streams, 304, 304)]
child = os.fork()
again = [tile.tobytes() for tile in reader.decode(streams, 304, 304)]
if not child:
    os._exit(0 if again == before else 1)
sys.exit(again != before or os.waitpid(child, 0)[1])
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        input=pickle.dumps([*streams.values()]),
        env=ref.subprocess_environment(OMP_NUM_THREADS="2"),
        timeout=60,
    )
    assert done.returncode == 0


# -------------------------------------------------------------------------- models


def test_weights_of_another_shape_are_refused() -> None:
    tiny = ref.tiny_files()
    for old, new in ((b'"width_8": 16', b'"width_8": 8'), (b'"depth_16": 1', b'"depth_16": 2')):
        config = tiny[CONFIG].replace(old, new)
        assert config != tiny[CONFIG]
        for engine in ("numpy", "openvino"):
            with pytest.raises(ModelError, match="cannot be read"):
                reader({**tiny, CONFIG: config}, engine)


def test_damaged_weights_are_refused() -> None:
    tiny = ref.tiny_files()
    for files in ({**tiny, WEIGHTS: tiny[WEIGHTS][:5000]}, {**tiny, CONFIG: b"{}"}):
        with pytest.raises(ModelError):
            Reader(files)


def test_who_decodes_depends_on_the_settings_alone() -> None:
    sha256 = models.register(RELEASED)
    assert sha256 == read(RELEASED).sha256
    decode = models.decoder_for(sha256, Settings())
    assert isinstance(decode, Reader)
    assert decode is models.decoder_for(sha256, Settings(seed=3))
    assert decode is models.decoder_for(sha256, Settings(steps=1))


def test_steps_without_openvino_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = models.register(RELEASED)
    monkeypatch.setattr(models, "importable", lambda name: False)
    assert isinstance(models.decoder_for(sha256, Settings(steps=1)), Codec)
    assert isinstance(models.decoder_for(sha256, Settings(steps=1, realism=0)), Reader)


# ------------------------------------------------------------------------- imports

EXTRAS = ("torch", "diffusers", "cv2", "dask", "distributed", "geopandas", "cryptography")
PLAIN = (*EXTRAS, "openvino")  # what a plain install lacks


def without(names: tuple[str, ...], code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run code as if some packages were not installed."""
    absent = f"import sys; sys.modules.update(dict.fromkeys({names}))\n"
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", absent + code]
    return subprocess.run(
        [*command, *map(str, args)],
        capture_output=True,
        text=True,
        env=ref.subprocess_environment(),
    )


COMMAND = "from archive_pipeline.commands.cli import main; main(sys.argv[1:])"

COMMANDS = """
import json
from archive_pipeline.commands.cli import main
for args in json.loads(sys.argv[1]):
    try:
        main(args)
    except SystemExit as ended:
        assert not ended.code, args
"""


def box_of(archive: Path) -> list[Any]:
    ring = ap.open(archive).images[0].footprint
    assert ring is not None
    longitude, latitude = np.mean(ring[:4], axis=0)
    return [longitude - 1e-5, latitude - 1e-5, longitude + 1e-5, latitude + 1e-5]


def test_an_archive_is_read_without_the_extras(archive: Path, tmp_path: Path) -> None:
    box = box_of(archive)
    commands = [
        ("info", "--archive", archive),
        ("check", "--archive", archive),
        ("restore", "--archive", archive, "-o", tmp_path / "a", "--bbox", *box),
        ("restore", "--archive", archive, "-o", tmp_path / "b"),
        ("restore", "--archive", archive, "-o", tmp_path / "c", "--mosaic", "--bbox", *box),
    ]
    done = without(PLAIN, COMMANDS, json.dumps([[str(a) for a in args] for args in commands]))
    assert done.returncode == 0, done.stderr
    args = ("restore", "--archive", archive, "-o", tmp_path / "d", "--steps", 1)
    done = without(EXTRAS, COMMAND, *args)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "b").rglob("*.tif"))) == 3
    assert (tmp_path / "c" / "mosaic.tif").is_file()

    code = """
import xarray, zarr
group = sys.argv[1] + "/flights/beach/DJI_0001.JPG"
array = zarr.open(group + "/pixels", mode="r")
assert array[50:90, 60:80].any()
lazy = xarray.open_zarr(group, consolidated=False)["pixels"]
assert (lazy[50:90, 60:80].values == array[50:90, 60:80]).all()
"""
    done = without(PLAIN, code, archive)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("args", "needs"),
    [
        (["ingest", "{flight}", "--archive", "{out}"], "torch"),
        (["restore", "--archive", "{archive}", "-o", "{out}", "--device", "cuda"], "torch"),
        (["restore", "--archive", "{archive}", "-o", "{out}", "--workers", "2"], "distributed"),
        (["restore", "--archive", "{archive}", "-o", "{out}", "--steps", "1"], "openvino"),
    ],
)
def test_what_needs_the_extra_says_so(
    archive: Path, flight: Path, tmp_path: Path, args: list[str], needs: str
) -> None:
    places = {"archive": archive, "flight": flight, "out": tmp_path / "out"}
    done = without(PLAIN, COMMAND, *(arg.format(**places) for arg in args))
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert f"needs {needs}: pip install 'archive-pipeline[ingest]'" in line
    assert not (tmp_path / "out").exists()


def test_packages_that_are_broken_are_done_without(
    archive: Path, flight: Path, tmp_path: Path
) -> None:
    """Numba refuses every NumPy that is newer than it knows, OpenVINO some systems."""
    for name in ("numba", "openvino"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "__init__.py").write_text("raise ImportError('too new')\n")
    broken = f"import sys; sys.path.insert(0, {str(tmp_path / 'broken')!r})\n"

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        return without((), broken + COMMAND, *args, "--archive", archive)

    plain = without(PLAIN, COMMAND, "restore", "--archive", archive, "-o", tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr
    done = run("restore", "-o", tmp_path / "restored")
    assert done.returncode == 0, done.stderr
    assert "openvino is installed but cannot be imported (too new)" in done.stderr
    [*files] = sorted((tmp_path / "plain").rglob("*.tif"))
    assert len(files) == 3
    for file in files:
        again = tmp_path / "restored" / file.relative_to(tmp_path / "plain")
        assert again.read_bytes() == file.read_bytes()

    done = without((), broken + COMMAND, "ingest", flight, "--archive", tmp_path / "out")
    assert done.returncode == 1
    assert "numba is installed but cannot be imported (too new)" in done.stderr
    assert "encoding needs numba: pip install 'archive-pipeline[ingest]'" in done.stderr


def test_writing_an_array_without_pytorch_is_refused_by_name(archive: Path) -> None:
    code = """
import numpy, zarr
from archive_pipeline.errors import NotInstalled
array = zarr.open(sys.argv[1] + "/flights/beach/DJI_0001.JPG/pixels", mode="r+")
try:
    array[:] = numpy.ones(array.shape, "uint8")
except NotInstalled as error:
    print(error)
"""
    done = without(PLAIN, code, archive)
    assert "encoding needs torch: pip install 'archive-pipeline[ingest]'" in done.stdout


def test_reading_imports_nothing_that_it_does_not_run(archive: Path, tmp_path: Path) -> None:
    """With everything installed, too."""
    code = """
import sys
from archive_pipeline.commands.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(sorted({name.partition(".")[0] for name in sys.modules} & set("""
    code += f"""{(*EXTRAS, "pandas", "matplotlib", "ultralytics")})))"""
    restore = ["restore", "-q", "--archive", archive, "-o", tmp_path, "--bbox", *box_of(archive)]
    for args in (["info", "--archive", archive], restore, [*restore, "--steps", 1]):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, args)],
            capture_output=True,
            text=True,
            env=ref.subprocess_environment(),
        )
        assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
