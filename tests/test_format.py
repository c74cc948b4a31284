"""The specification of the byte format: its second decoder and its worked example."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from golden import reference as ref
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GOLDEN = ref.load_golden(ref.STREAMS)["streams"]


@pytest.fixture(scope="module")
def decoder() -> ModuleType:
    sys.path.insert(0, str(DOCS))
    try:
        import reference_decoder
    finally:
        sys.path.remove(str(DOCS))
    return reference_decoder


@pytest.fixture(scope="module")
def model(decoder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return decoder.read_model(ref.write_model(tmp_path_factory.mktemp("model")))


def example(name: str) -> str:
    """A code block of the specification, by the comment before it."""
    text = (DOCS / "format.md").read_text()
    found = re.search(rf"<!-- example: {name} -->\n```\n(.*?)```", text, re.DOTALL)
    assert found is not None, name
    return found[1]


def test_the_second_decoder_knows_nothing_of_the_package() -> None:
    text = (DOCS / "reference_decoder.py").read_text()
    imports = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    assert imports == {"hashlib", "json", "sys", "pathlib", "numpy"}


@pytest.mark.parametrize("name", sorted(name for name in GOLDEN if name != "empty"))
def test_both_decoders_agree(decoder: ModuleType, model: Any, name: str) -> None:
    entry = GOLDEN[name]
    stream = base64.b64decode(entry["stream"])
    *_, levels, z, q = decoder.decode_symbols(stream, *model)
    found = [ref.fingerprint(values) for values in (levels, z, q)]
    assert found == [entry["levels"], entry["z"], entry["q"]]
    pixels = decoder.decode(stream, model).astype(int)
    [other] = ref.tiny_codec().decode([stream], entry["height"], entry["width"])
    assert pixels.shape == other.shape
    assert np.abs(pixels - other).max() <= 1


def test_the_second_decoder_reads_the_released_model(decoder: ModuleType, tmp_path: Path) -> None:
    from archive_pipeline.codec.models import DEFAULT_MODEL, find_folder, load_named
    from archive_pipeline.pcdc.codec import Codec
    from archive_pipeline.pcdc.encoding import encode_tiles

    codec = Codec(load_named(DEFAULT_MODEL))
    tile = ref.texture(70, 90, seed=3)
    [stream] = encode_tiles(codec, [tile], 900)
    path = tmp_path / "tile"
    path.write_bytes(stream)
    command = [sys.executable, DOCS / "reference_decoder.py", find_folder(DEFAULT_MODEL), path]
    (tmp_path / "tile.ppm").write_bytes(
        subprocess.run(command, check=True, capture_output=True).stdout
    )
    with Image.open(tmp_path / "tile.ppm") as picture:
        pixels = np.asarray(picture).astype(int)
    [other] = codec.decode([stream], 70, 90)
    difference = np.abs(pixels - other)
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.99


def test_a_damaged_stream_is_no_picture(decoder: ModuleType, model: Any) -> None:
    stream = base64.b64decode(GOLDEN["texture-128x128-0"]["stream"])
    with pytest.raises(ValueError, match="another format or another model"):
        decoder.decode(b"\x02" + stream[1:], model)
    with pytest.raises(ValueError, match=r"ends early|where encoders start"):
        decoder.decode(stream[: len(stream) // 2], model)


def test_the_worked_example(decoder: ModuleType, model: Any) -> None:
    stream = bytes.fromhex(example("stream"))
    assert stream == base64.b64decode(GOLDEN["texture-1x1"]["stream"])
    height, width, step, levels, z, q = decoder.decode_symbols(stream, *model)
    assert (height, width, step, levels.tolist()) == (1, 1, 8, [[5]])

    coder = decoder.Coder(model[1], stream[15:20] + b"\0\0", 1)
    coder.phase([80])
    text = (DOCS / "format.md").read_text()
    before = int(re.search(r"6553 = (\d+)\.", text)[1])  # type: ignore[index]
    assert coder.state == [before << 16]  # with a word of zeros

    said = [line.split() for line in example("z").splitlines()]
    assert said[0] == ["tables", *map(str, decoder.prior(model[1], step))]
    assert said[1] == ["z", *map(str, z.reshape(-1))]

    tables = np.clip(decoder.scale_network(model[1], z, step)[:, 0, 0] + 8, 0, 79)
    limits = model[1]["tables.zero"][tables]
    said = [line.split() for line in example("q").splitlines()]
    assert said[0] == ["tables", *map(str, tables)]
    assert said[1] == ["symbols", *map(str, np.clip(q.reshape(-1), -limits, limits))]
    assert said[2] == ["q", *map(str, q.reshape(-1))]
    assert example("pixel").split() == [str(v) for v in decoder.decode(stream, model)[0, 0]]
