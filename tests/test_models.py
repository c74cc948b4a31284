"""Model folders: what is damaged is refused, soon; integer layers are exact."""

from __future__ import annotations

import itertools
import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import reference as ref
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from archive_pipeline.codec import models
from archive_pipeline.pcdc.bitstream import UnknownModel
from archive_pipeline.pcdc.constants import WEIGHT_LIMIT
from archive_pipeline.pcdc.layers import IntegerConv2d
from archive_pipeline.pcdc.model import Model, build_files
from archive_pipeline.pcdc.model_files import CONFIG, MAX_BYTES, WEIGHTS, ModelError, digest
from archive_pipeline.pcdc.transforms import TransformCodec, TransformConfig

Tensors = dict[str, Tensor]


def with_config(**changes: object) -> dict[str, bytes]:
    files = ref.tiny_files()
    config = {**json.loads(files[CONFIG]), **changes}
    return {**files, CONFIG: json.dumps(config).encode()}


def with_tensors(change: Callable[[Tensors], object]) -> dict[str, bytes]:
    files = ref.tiny_files()
    tensors = load(files[WEIGHTS])
    change(tensors)
    return {**files, WEIGHTS: save(tensors)}


def refused(files: dict[str, bytes], message: str | None = None) -> None:
    started = time.process_time()
    with pytest.raises(ModelError, match=message):
        Model(files)
    assert time.process_time() - started < 5


# ----------------------------------------------------------------------- identity


def test_digest_is_stable() -> None:
    assert digest({CONFIG: b"{}", WEIGHTS: b"weights"}) == (
        "9ec0cdbf409d290232d4880f3811897c2575ea24bc891a672ba9b1e4b6e9d9f5"
    )


def test_digest_covers_every_byte_and_nothing_else() -> None:
    files = ref.tiny_files()
    original = digest(files)
    assert digest({**files, "README.md": b"a card"}) == original
    assert digest({**files, CONFIG: files[CONFIG] + b" "}) != original
    assert digest({**files, WEIGHTS: files[WEIGHTS][:-1]}) != original


def test_folder_round_trip(tmp_path: Path) -> None:
    model = Model.from_folder(ref.write_model(tmp_path))
    assert model.sha256 == digest(ref.tiny_files())
    assert not model.networks.training
    assert not any(p.requires_grad for p in model.networks.parameters())


# ------------------------------------------------------------------------- damage


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000, -1])
def test_truncated_weights(keep: int) -> None:
    files = ref.tiny_files()
    refused({**files, WEIGHTS: files[WEIGHTS][:keep]})


def test_weights_with_a_damaged_header() -> None:
    files = ref.tiny_files()
    weights = bytearray(files[WEIGHTS])
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = weights.copy()
        damaged[int(rng.integers(0, 9))] = int(rng.integers(256))
        damaged[int(rng.integers(9, 4000))] ^= 1 << int(rng.integers(8))
        try:
            Model({**files, WEIGHTS: bytes(damaged)})
        except ModelError:
            continue  # nothing else may be raised; a few flips change nothing that matters


def test_header_that_claims_exabytes() -> None:
    files = ref.tiny_files()
    refused({**files, WEIGHTS: (1 << 62).to_bytes(8, "little") + files[WEIGHTS][8:]})


def test_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    witness = tmp_path / "executed"

    class Attack:
        def __reduce__(self) -> tuple:
            return Path.touch, (witness,)

    folder = ref.write_model(tmp_path / "model")
    (folder / WEIGHTS).write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ModelError):
        Model.from_folder(folder)
    torch.save({"a": Attack()}, folder / WEIGHTS)
    with pytest.raises(ModelError):
        Model.from_folder(folder)
    assert not witness.exists()


@pytest.mark.parametrize(
    "config",
    [b"", b"{", b"[]", b"null", b"3", b"{}", b'{"format": 1}', b"\xff\xfe", b"[" * 100_000],
)
def test_malformed_config(config: bytes) -> None:
    refused({**ref.tiny_files(), CONFIG: config})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("latents", 10**9),
        ("hyper_latents", 10**18),
        ("width_8", 1025),
        ("width_16", 10**30),
        ("depth_8", 33),
        ("depth_16", 10**9),
        ("latents", 0),
        ("latents", -24),
        ("latents", 24.0),
        ("latents", "24"),
        ("latents", None),
        ("depth_8", True),
    ],
)
def test_absurd_config(name: str, value: object) -> None:
    refused(with_config(**{name: value}), "out of range")


def test_config_of_another_kind() -> None:
    refused(with_config(format="pcdc-transform-9"), "unknown format")
    refused(with_config(format=["pcdc-transform-1"]))
    refused(with_config(format="pcdc-transform-2"), "incomplete")  # names its edge_kernel
    refused(with_config(format="pcdc-transform-2", edge_kernel=2), "edge_kernel")
    refused(with_config(format="pcdc-transform-2", edge_kernel=3), "size mismatch")
    refused(with_config(format="pcdc-transform-3", edge_kernel=3), "incomplete")  # its shortcut
    refused(with_config(format="pcdc-transform-3", edge_kernel=1, shortcut=2), "shortcut")
    refused(with_config(format="pcdc-transform-3", edge_kernel=1, shortcut=True), "shortcut")
    refused(with_config(format="pcdc-transform-3", edge_kernel=1, shortcut=1), "shortcut")
    refused(with_config(format="pcdc-transform-4", edge_kernel=1, shortcut=0), "not float16")
    named = {"format": "pcdc-transform-5", "edge_kernel": 1, "shortcut": 0}
    refused(with_config(**named), "incomplete")  # its extra_depth_16
    refused(with_config(**named, extra_depth_16=33), "out of range")
    refused(with_config(**named, extra_depth_16=0), "not float16")
    refused(with_config(edge_kernel=1), "edge_kernel")  # the first format did not name it
    refused(with_config(extra=1), "extra")
    refused(with_config(latents=32))  # allowed, but not what the weights are
    refused(with_config(width_16=1024, depth_16=32))
    incomplete = json.loads(ref.tiny_files()[CONFIG])
    del incomplete["depth_8"]
    refused({**ref.tiny_files(), CONFIG: json.dumps(incomplete).encode()}, "incomplete")


def set_item(name: str, value: float, at: int = 0) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[at] = value

    return change


def replace(name: str, f: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.__setitem__(name, f(tensors[name]).contiguous())


FIRST = "g_a.net.1.weight"
SCALE = "h_scale.layers.0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FIRST), FIRST),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (replace(FIRST, lambda t: t[:-1]), "size mismatch"),
        (replace(FIRST, lambda t: t[..., 0]), "size mismatch"),
        (replace(FIRST, lambda t: t.half()), f"{FIRST} is float16, not float32"),
        (replace(FIRST, lambda t: t.double()), f"{FIRST} is float64, not float32"),
        (replace(FIRST, lambda t: t.int()), None),
        (set_item(FIRST, float("nan")), "not finite"),
        (set_item("g_s.net.0.bias", float("inf")), "not finite"),
        (set_item("prior.knots", float("nan")), "not finite"),
        (set_item(f"{SCALE}.weight", 0.001), "off their grid"),
        (set_item(f"{SCALE}.weight", 4.0), "off their grid"),
        (set_item(f"{SCALE}.bias", 1e30), "off their grid"),
        (set_item("prior.knots", 0.3), "off their grid"),
        (set_item("prior.knots", 1e9), "off their grid"),
        (lambda t: t.pop("tables.size"), "tables.size"),
        (set_item("tables.frequency", 0), "tables"),
        (set_item("tables.frequency", -5), "tables"),
        (set_item("tables.size", 2**31 - 1), "tables"),
        (set_item("tables.zero", 0, at=40), "tables"),
        (replace("tables.frequency", lambda t: t.long() << 50), "tables"),
        (replace("tables.size", lambda t: t[:-1]), "tables"),
        (replace("tables.size", lambda t: t[0]), "tables"),
        (replace("tables.frequency", lambda t: t.bfloat16()), None),
    ],
)
def test_wrong_tensors(change: Callable[[Tensors], object], message: str | None) -> None:
    refused(with_tensors(change), message)


def test_tables_of_other_counts() -> None:
    def cut(keep: int) -> Callable[[Tensors], object]:
        def change(t: Tensors) -> None:
            n = int(t["tables.size"][:keep].sum())
            t["tables.frequency"] = t["tables.frequency"][:n].clone()
            t["tables.size"], t["tables.zero"] = t["tables.size"][:keep], t["tables.zero"][:keep]
            t["tables.size"], t["tables.zero"] = t["tables.size"].clone(), t["tables.zero"].clone()

        return change

    refused(with_tensors(cut(80)), "number of tables")
    refused(with_tensors(cut(20)), "number of tables")
    assert Model(with_tensors(cut(81))).level_tables == 1


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        Model.from_folder(tmp_path)
    folder = ref.write_model(tmp_path / "model")
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(MAX_BYTES[WEIGHTS] + 1)
    with pytest.raises(ModelError, match="larger"):
        Model.from_folder(folder)


# ------------------------------------------------------------------------- search


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget models that other tests made known."""
    monkeypatch.setattr(models, "_files", {})
    monkeypatch.setattr(models, "_codecs", {})
    monkeypatch.setattr(models, "_readers", {})
    monkeypatch.setattr(models, "_digests", {})
    monkeypatch.delenv(models.SEARCH_PATH, raising=False)


@pytest.mark.usefixtures("fresh")
def test_models_are_found_on_the_search_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = digest(ref.tiny_files())
    with pytest.raises(UnknownModel, match=f"{sha256[:12]}.*{models.SEARCH_PATH}"):
        models.codec_for(sha256)
    broken = tmp_path / "a-broken"
    broken.mkdir()
    (broken / CONFIG).write_text("{}")  # no weights: passed over
    folder = ref.write_model(tmp_path / "tiny")
    monkeypatch.setenv(models.SEARCH_PATH, f"/nowhere:{tmp_path}")
    codec = models.codec_for(sha256)
    assert codec.model.sha256 == sha256
    assert models.is_known(sha256)
    (folder / WEIGHTS).unlink()
    assert models.codec_for(sha256) is codec


@pytest.mark.usefixtures("fresh")
def test_a_folder_that_changed_is_not_taken_for_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ref.write_model(tmp_path)
    monkeypatch.setenv(models.SEARCH_PATH, str(tmp_path))
    with pytest.raises(UnknownModel):
        models.codec_for("0" * 64)  # every folder has been looked at
    (folder / CONFIG).write_bytes(ref.tiny_files()[CONFIG] + b"\n")
    with pytest.raises(UnknownModel):
        models.codec_for(digest(ref.tiny_files()))


@pytest.mark.usefixtures("fresh")
def test_registered_and_named_models(tmp_path: Path) -> None:
    sha256 = models.register(ref.tiny_files())
    assert models.codec_for(sha256) is models.codec_for(sha256)
    folder = ref.write_model(tmp_path / "m")
    assert models.load_named(str(folder)).sha256 == sha256
    with pytest.raises(ModelError, match="nothing-of-this-name: no such model"):
        models.load_named("nothing-of-this-name")


@pytest.mark.usefixtures("fresh")
def test_damaged_registered_model() -> None:
    sha256 = models.register({CONFIG: b"{}", WEIGHTS: b""})
    with pytest.raises(ModelError):
        models.codec_for(sha256)


def test_devices() -> None:
    assert models.find_device("cpu") == "cpu"
    found = models.find_device("auto")
    assert found == ("cuda" if torch.cuda.is_available() else "cpu")
    if found == "cpu":
        with pytest.raises(ValueError, match="no CUDA"):
            models.find_device("cuda")


# --------------------------------------------------------------- integer convolution


def reference_convolution(layer: IntegerConv2d, x: np.ndarray) -> np.ndarray:
    """The layer's documented arithmetic in Python's unbounded integers."""
    weight = [
        [[[round(v * 256) for v in row] for row in c] for c in o] for o in layer.weight.tolist()
    ]
    bias = [round(v * 4096) for v in layer.bias.tolist()]
    k = layer.weight.shape[-1]
    n, cin, height, width = x.shape
    out = np.zeros((n, len(bias), height, width), object)
    places = itertools.product(range(n), range(len(bias)), range(height), range(width))
    for b, o, i, j in places:
        total = bias[o]
        for c, di, dj in itertools.product(range(cin), range(k), range(k)):
            y, z = i + di - k // 2, j + dj - k // 2
            if 0 <= y < height and 0 <= z < width:
                total += weight[o][c][di][dj] * int(x[b, c, y, z])
        shifted = (total + (1 << layer.shift >> 1)) >> layer.shift
        out[b, o, i, j] = min(max(shifted, 0), layer.ceiling)
    return out.astype(np.int64)


def random_layer(rng: np.random.Generator, kernel: int, cin: int, last: bool) -> IntegerConv2d:
    layer = IntegerConv2d(cin, 4, kernel, **({"shift": 12, "ceiling": 79} if last else {}))
    limit = WEIGHT_LIMIT
    with torch.no_grad():
        layer.weight.copy_(
            torch.from_numpy(rng.integers(-limit, limit + 1, tuple(layer.weight.shape))) / 256
        )
        layer.bias.copy_(torch.from_numpy(rng.integers(-(1 << 22), (1 << 22) + 1, 4)) / 4096)
    return layer


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kernel=st.sampled_from([1, 3]),
    cin=st.integers(1, 5),
    last=st.booleans(),
    largest=st.sampled_from([15, 4095]),
)
def test_integer_convolution_is_exact(
    seed: int, kernel: int, cin: int, last: bool, largest: int
) -> None:
    rng = np.random.default_rng(seed)
    layer = random_layer(rng, kernel, cin, last).eval()
    x = rng.integers(-largest, largest + 1, (2, cin, 4, 3))
    expected = reference_convolution(layer, x)
    got = layer.integer_forward(torch.from_numpy(x).double())
    np.testing.assert_array_equal(got.numpy(), expected)
    if largest == 15:  # sums below 2^24: the training path is exact as well
        trained = layer(torch.from_numpy(x).float()).detach().numpy()
        np.testing.assert_array_equal(trained, expected)


def test_scale_network_is_exact_whatever_the_order() -> None:
    """One thread or two, one tile or many, float32 or float64 weights: the same indices."""
    networks = [ref.tiny_codec(d).model.networks for d in (torch.float32, torch.float64)]
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.integers(-127, 128, (3, 8, 5, 4)))
    step = torch.tensor([8, 31, 55])
    with ref.threads(1):
        expected = networks[0].h_scale.indices(z, step)
        for net in networks:
            alone = [net.h_scale.indices(z[i : i + 1], step[i : i + 1]) for i in range(3)]
            assert torch.equal(torch.cat(alone), expected)
    with ref.threads(2):
        assert torch.equal(networks[1].h_scale.indices(z, step), expected)
    assert len(expected.unique()) > 20


def test_training_path_agrees_with_the_coding_path() -> None:
    network = ref.tiny_codec().model.networks.h_scale
    z = torch.from_numpy(np.random.default_rng(0).integers(-9, 10, (1, 8, 6, 6)))
    step = torch.tensor([30])
    with ref.threads(1), torch.no_grad():
        difference = network(z.float(), step) - network.indices(z, step)
    # float32 sums may round a half the other way now and then
    assert (difference != 0).float().mean() < 0.01
    assert difference.abs().max() <= 1


def test_release_keeps_the_integers() -> None:
    """Weights snapped on export are the integers that were trained with, also read again."""
    torch.manual_seed(0)
    trained = TransformCodec(TransformConfig(12, 8, 16, 16, 1, 1))
    with torch.no_grad():
        trained.prior.knots.uniform_(0, 5)
        for layer in trained.h_scale.layers:
            layer.weight.mul_(1.3)
            layer.bias.normal_(0, 10)
        trained.h_scale.layers[0].weight.view(-1)[:2] = torch.tensor([100.0, -100.0])  # clipped
    files = build_files(trained)
    read = Model(files).networks
    for a, b in zip(trained.h_scale.layers, read.h_scale.layers, strict=True):
        for x, y in zip(a._integers(), b._integers(), strict=True):
            assert torch.equal(x, y)
            assert torch.equal(y, y.round())
    again = build_files(read)
    assert again == files
    # the rest to within half precision, stored in half the bytes
    assert all(p.dtype == torch.float32 for p in read.parameters())
    stored = load(files[WEIGHTS])
    for name, value in trained.g_s.state_dict().items():
        assert stored[f"g_s.{name}"].dtype == torch.float16
        torch.testing.assert_close(read.g_s.state_dict()[name], value, rtol=2**-10, atol=1e-7)
    z, step = torch.randint(-20, 21, (1, 8, 3, 3)), torch.tensor([20])
    with ref.threads(1):
        assert torch.equal(trained.eval().h_scale.indices(z, step), read.h_scale.indices(z, step))
    for g in range(8, 56):
        exact = read.double().prior(torch.tensor([g]))
        assert torch.equal(read.float().prior(torch.tensor([g])).double(), exact)
