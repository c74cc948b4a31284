"""Streams: header checks, and golden ones that decode to the same symbols for ever."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import reference as ref
from hypothesis import given
from hypothesis import strategies as st

from archive_pipeline.codec.models import shipped
from archive_pipeline.pcdc import entropy
from archive_pipeline.pcdc.bitstream import HEADER_BYTES, MAX_SIDE, Header, parse
from archive_pipeline.pcdc.codec import Codec
from archive_pipeline.pcdc.constants import MAX_IMAGE_STEP, MIN_IMAGE_STEP
from archive_pipeline.pcdc.decoding import Symbols
from archive_pipeline.pcdc.encoding import encode_tiles
from archive_pipeline.pcdc.entropy import CorruptStream
from archive_pipeline.pcdc.model import Model
from archive_pipeline.pcdc.model_files import CONFIG, digest


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with ref.threads(1):  # small tiles wait for a second thread longer than they work
        yield


# ------------------------------------------------------------------------- header


@given(
    model=st.binary(min_size=8, max_size=8),
    height=st.integers(1, MAX_SIDE),
    width=st.integers(1, MAX_SIDE),
    step=st.integers(MIN_IMAGE_STEP, MAX_IMAGE_STEP),
    lanes=st.integers(0, 7),
    table=st.integers(0, 15),
    tail=st.binary(max_size=9),
)
def test_header_round_trip(
    model: bytes, height: int, width: int, step: int, lanes: int, table: int, tail: bytes
) -> None:
    header = Header(model, height, width, step, lanes, table)
    packed = header.pack()
    assert len(packed) == HEADER_BYTES
    assert parse(packed + tail, MAX_SIDE, MAX_SIDE) == (header, tail)


def test_header_bytes_are_as_documented() -> None:
    packed = Header(b"ABCDEFGH", 0x0102, 0x0304, 40, 3, 5).pack()
    assert packed == b"\x01ABCDEFGH\x02\x01\x04\x03\x28\x53"
    assert Header(b"ABCDEFGH", 0, 0).pack() == b"\x01ABCDEFGH\0\0\0\0"


GOOD = Header(b"ABCDEFGH", 100, 200, 40, 3, 5).pack()


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"", "shorter than its header"),
        (GOOD[:12], "shorter than its header"),
        (GOOD[:14], "inside its header"),
        (b"\x02" + GOOD[1:], "format 2 is unknown"),
        (GOOD[:9] + b"\x65\x00" + GOOD[11:], "101x200 pixels, more than its 100x200"),
        (GOOD[:9] + b"\xff\xff\xff\xff" + GOOD[13:], "65535x65535 pixels"),
        (GOOD[:9] + b"\x00\x00" + GOOD[11:], "empty"),
        (GOOD[:9] + b"\0\0\0\0" + GOOD[13:], "empty"),
        (GOOD[:13] + b"\x07" + GOOD[14:], "out of range"),
        (GOOD[:13] + b"\x38" + GOOD[14:], "out of range"),
        (GOOD[:14] + b"\x58", "out of range"),
    ],
)
def test_malformed_headers(stream: bytes, message: str) -> None:
    with pytest.raises(CorruptStream, match=re.escape(message)):
        parse(stream, 100, 200)


def test_format_limit_holds_whatever_the_caller_allows() -> None:
    stream = Header(b"ABCDEFGH", MAX_SIDE + 1, 1, 40).pack()
    with pytest.raises(CorruptStream):
        parse(stream, 10**6, 10**6)


# ------------------------------------------------------------------ golden streams


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    content = ref.load_golden(ref.STREAMS)
    assert content["model"] == digest(ref.tiny_files())
    return content["streams"]


@pytest.fixture(scope="module")
def decoded(golden: dict[str, Any]) -> dict[str, Symbols]:
    """What the golden streams decode to one by one, on one thread."""
    codec = ref.tiny_codec()
    with ref.threads(1):
        out = {k: codec.decode_symbols([stream_of(e)], 4096, 4096)[0] for k, e in golden.items()}
    for name, symbols in out.items():
        assert isinstance(symbols, Symbols), f"{name}: {symbols}"
    return out  # type: ignore[return-value]


def stream_of(entry: dict[str, Any]) -> bytes:
    return base64.b64decode(entry["stream"])


def test_goldens_cover_the_format(decoded: dict[str, Symbols]) -> None:
    model = ref.tiny_codec().model
    assert {(s.height, s.width) for s in decoded.values()} >= {(0, 0), (1, 1), (17, 33), (608, 608)}
    steps = {s.image_step for s in decoded.values() if s.height}
    assert {MIN_IMAGE_STEP, MAX_IMAGE_STEP} < steps
    assert len(steps) >= 8
    assert {n for s in decoded.values() for n in np.unique(s.levels)} == {1, 2, 3, 4, 5}
    assert sum(len(np.unique(s.levels)) > 1 for s in decoded.values()) >= 4
    assert sum(ref.escapes(model, s) > 0 for s in decoded.values() if s.height) >= 4
    assert max(int(np.abs(s.q).max(initial=0)) for s in decoded.values()) > 2000
    assert {stream[14] & 15 for e in GOLDEN_ENTRIES if len(stream := stream_of(e)) > 13} >= {
        0, 1, 2, 3
    }  # fmt: skip


GOLDEN_ENTRIES = list(ref.load_golden(ref.STREAMS)["streams"].values())


def test_goldens_one_by_one(golden: dict[str, Any], decoded: dict[str, Symbols]) -> None:
    for name, entry in golden.items():
        assert ref.matches(entry, decoded[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("threads", [1, 2])
def test_goldens_in_company(
    golden: dict[str, Any], decoded: dict[str, Symbols], threads: int, dtype: torch.dtype
) -> None:
    codec = ref.tiny_codec(dtype)
    streams = [stream_of(e) for e in golden.values()]
    with ref.threads(threads):
        together = codec.decode_symbols(streams, 4096, 4096)
    for name, symbols in zip(golden, together, strict=True):
        assert ref.same(decoded[name], symbols), name  # type: ignore[arg-type]


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "numpy"])
def test_goldens_by_either_loop(
    golden: dict[str, Any],
    decoded: dict[str, Symbols],
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(entropy, "_is_worth_compiling", lambda _: compiled)
    streams = [stream_of(e) for e in golden.values()]
    for name, symbols in zip(
        golden, ref.tiny_codec().decode_symbols(streams, 4096, 4096), strict=True
    ):
        assert ref.same(decoded[name], symbols), name  # type: ignore[arg-type]


def test_goldens_in_another_order(golden: dict[str, Any], decoded: dict[str, Symbols]) -> None:
    backwards = ref.tiny_codec().decode_symbols(
        [stream_of(e) for e in reversed(golden.values())], 4096, 4096
    )
    for name, symbols in zip(reversed(golden), backwards, strict=True):
        assert ref.matches(golden[name], symbols), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_goldens_on_a_gpu(golden: dict[str, Any], decoded: dict[str, Symbols]) -> None:
    codec = Codec(Model(ref.tiny_files(), "cuda"))
    together = codec.decode_symbols([stream_of(e) for e in golden.values()], 4096, 4096)
    for name, symbols in zip(golden, together, strict=True):
        assert ref.same(decoded[name], symbols), name  # type: ignore[arg-type]
        pixels, expected = (c.synthesise([decoded[name]])[0] for c in (codec, ref.tiny_codec()))
        assert np.abs(pixels.astype(int) - expected).max(initial=0) <= 1
    tile = ref.texture(200, 230, 1)
    [stream] = encode_tiles(codec, [tile], 4000)
    a, b = (c.decode_symbols([stream], 200, 230)[0] for c in (codec, ref.tiny_codec()))
    assert isinstance(a, Symbols)
    assert isinstance(b, Symbols)
    assert ref.same(a, b)


def test_golden_in_a_batch_of_64_copies(
    golden: dict[str, Any], decoded: dict[str, Symbols]
) -> None:
    codec = ref.tiny_codec()
    for name in ("texture-17x33", "texture-128x128-0", "crafted-wild-96x96-step30"):
        for symbols in codec.decode_symbols([stream_of(golden[name])] * 64, 4096, 4096):
            assert ref.same(decoded[name], symbols), name  # type: ignore[arg-type]


def test_reference_writer_reproduces_every_stream(
    golden: dict[str, Any], decoded: dict[str, Symbols]
) -> None:
    """The encoder's bytes follow from symbols and header alone, as the format is documented."""
    model = ref.tiny_codec().model
    for name, symbols in decoded.items():
        stream = stream_of(golden[name])
        if symbols.height:
            assert ref.write_stream(model, symbols, stream[14] >> 4, stream[14] & 15) == stream, (
                name
            )


def test_golden_pixels(golden: dict[str, Any], decoded: dict[str, Symbols]) -> None:
    """Pixels are floating-point work: within one level across precisions and years."""
    single, double = ref.tiny_codec(), ref.tiny_codec(torch.float64)
    compared = 0
    for name, symbols in decoded.items():
        [a], [b] = single.synthesise([symbols]), double.synthesise([symbols])
        assert a.shape == b.shape == (symbols.height, symbols.width, 3)
        assert np.abs(a.astype(int) - b).max(initial=0) <= 1, name
        if "pixels" in golden[name]:
            stored = np.frombuffer(base64.b64decode(golden[name]["pixels"]), np.uint8)
            assert np.abs(stored.reshape(a.shape).astype(int) - a).max(initial=0) <= 1, name
            compared += 1
    assert compared >= 3


# --------------------------------------------------------------- the released model


def test_there_are_released_goldens() -> None:
    assert list(ref.RELEASED.glob("*.json"))


@pytest.mark.parametrize("path", sorted(ref.RELEASED.glob("*.json")), ids=lambda p: p.stem)
def test_released_streams_stay_decodable(path: Path) -> None:
    """Of every model ever released: its integer part is kept where the model is superseded."""
    content = ref.load_golden(path)
    codec = ref.decoder_of_part(path.with_suffix(ref.PART).read_bytes(), content["model"])
    streams = [stream_of(e) for e in content["streams"].values()]
    expected = list(content["streams"].values())
    for threads in (1, 2):
        with ref.threads(threads):
            together = codec.decode_symbols(streams, 4096, 4096)
            alone = [codec.decode_symbols([s], 4096, 4096)[0] for s in streams]
        for entry, a, b in zip(expected, together, alone, strict=True):
            assert ref.matches(entry, a)
            assert ref.matches(entry, b)


def test_shipped_models_have_goldens_and_decode_them_to_the_recorded_pixels() -> None:
    for folder in sorted(f for f in shipped().iterdir() if (f / CONFIG).is_file()):
        model = Model.from_folder(folder)
        path = ref.RELEASED / f"{model.sha256[:16]}.json"
        assert path.is_file(), f"{folder.name}: run make_golden.py --released"
        compared = 0
        for dtype in (torch.float32, torch.float64):
            model.networks.to(dtype)
            codec = Codec(model)
            for entry in ref.load_golden(path)["streams"].values():
                [symbols] = codec.decode_symbols([stream_of(entry)], 4096, 4096)
                assert ref.matches(entry, symbols)
                if "pixels" in entry:
                    [pixels] = codec.synthesise([symbols])
                    stored = np.frombuffer(base64.b64decode(entry["pixels"]), np.uint8)
                    difference = stored.reshape(pixels.shape).astype(int) - pixels
                    assert np.abs(difference).max() <= 1
                    compared += 1
        assert compared
