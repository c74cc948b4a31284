"""Archives of strangers that say little and hold much: refused by a line, within bounded memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import rasterio
from conftest import Run
from golden import reference as ref
from numcodecs.blosc import Blosc
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from archive_pipeline.codec import models
from archive_pipeline.jobs.check import check
from archive_pipeline.jobs.ingest import ingest
from archive_pipeline.jobs.ingest_task import IngestOptions
from archive_pipeline.pcdc.bitstream import UnknownModel
from archive_pipeline.pcdc.model import Model
from archive_pipeline.pcdc.model_files import WEIGHTS, ModelError
from archive_pipeline.pcdc.policy import PolicyError, load_policy
from archive_pipeline.store import _parquet, archived_image, layout
from archive_pipeline.store._backends import TooLarge, read_key
from archive_pipeline.store._parquet_footer import read_footer
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.index import read_index
from archive_pipeline.store.layout import ArchiveError
from archive_pipeline.store.stored_models import read_model, read_policy

SIDE = 700  # four tiles
BOMB = 48 << 20  # bytes that a chunk of some kilobytes decodes to
SPARSE = 1 << 36  # bytes of files that are larger than memory, and take no room on disk
MEMORY = 40 << 20  # bytes that bombs may add to what the same commands take anyway


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One 16-bit image with a nodata mask, lossless; not to be changed."""
    folder = tmp_path_factory.mktemp("bombs")
    pixels = np.random.default_rng(0).integers(0, 99, (1, SIDE, SIDE), np.uint16)
    profile = {"driver": "GTiff", "width": SIDE, "height": SIDE, "count": 1, "dtype": "uint16"}
    place = rasterio.Affine(0.1, 0, 300_000, 0, -0.1, 3_240_000)
    (folder / "flight").mkdir()
    with rasterio.open(
        folder / "flight" / "a.tif", "w", **profile, nodata=0, crs="EPSG:32615", transform=place
    ) as file:
        file.write(pixels)
    url = folder / "a.zarr"
    report = ingest(str(url), [("flight", folder / "flight")], IngestOptions(), workers=0)
    assert [outcome.codec for outcome in report.outcomes] == ["lossless"]
    return url


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "own.zarr"))


def image_of(url: Path) -> ArchivedImage:
    (entry,) = Archive.open(url).images()
    return ArchivedImage(Archive.open(url), entry)


def folder_of(url: Path) -> Path:
    return url / image_of(url).entry.key


def checked(data: bytes) -> bytes:
    """Bytes as the codec crc32c stores them."""
    return data + google_crc32c.value(data).to_bytes(4, "little")


def frame(size: int, typesize: int = 2) -> bytes:
    """A chunk, as it is stored, that decodes to so many zeros."""
    return checked(Blosc("zstd", 9, Blosc.SHUFFLE, typesize=typesize).encode(bytes(size)))


def shard_of(chunks: list[bytes], claimed: int | None = None) -> bytes:
    """A shard of these chunks; `claimed` is what its index says of each chunk's length."""
    index, start = b"", 0
    for chunk in chunks:
        index += struct.pack("<QQ", start, len(chunk) if claimed is None else claimed)
        start += len(chunk)
    return b"".join(chunks) + checked(index)


def read_all(image: ArchivedImage) -> None:
    image.source  # noqa: B018
    image.read((0, 0, SIDE, SIDE))
    image.read_mask((0, 0, SIDE, SIDE))


def put_bombs(url: Path) -> None:
    """Small chunks that decode to much more than their arrays' shapes say."""
    folder = folder_of(url)
    (folder / "mask/c/0/0").write_bytes(shard_of([frame(BOMB, 1)] * 4))
    (folder / "pixels/c/0/0/0").write_bytes(shard_of([frame(BOMB)] * 4))


# ------------------------------------------------------------------------ chunks


def test_chunks_of_another_size_are_named(own: Path) -> None:
    read_all(image_of(own))
    put_bombs(own)
    (folder_of(own) / "metadata/c/0").write_bytes(frame(BOMB, 1))
    problems = check(str(own)).problems
    assert [p.split(": ")[1].split(" ")[0] for p in problems] == ["metadata", "pixels", "mask"]
    assert "more than the" in problems[0]  # itself larger than that array can be
    assert all(f"decodes to {BOMB}, not" in problem for problem in problems[1:])
    assert "row 0 column 0, row 0 column 1, row 1 column 0" in problems[1]


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from Linux's /proc")
def test_memory_stays_what_it_was(made: Path, own: Path, tmp_path: Path) -> None:
    """The largest size of a process: after all commands on the archive, and on the bombs."""
    put_bombs(own)
    assert sum(path.stat().st_size for path in own.rglob("c/**/*") if path.is_file()) < 1 << 20
    code = """if True:
        import sys
        from pathlib import Path
        from click.testing import CliRunner
        from archive_pipeline.commands.cli import main
        out = sys.argv[3]
        for url in sys.argv[1:3]:
            for command in ["check"], ["info"], ["restore", "--workers", "0", "-o", out]:
                done = CliRunner().invoke(main, [*command, "--archive", url])
                assert "Traceback" not in done.stderr, done.stderr
                print(done.exit_code)
            # not ru_maxrss, which knows the size of the process that started this one
            status = Path("/proc/self/status").read_text().partition("VmHWM:")[2]
            print(int(status.split()[0]) << 10)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, made, own, tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *honest, before, check_code, info_code, restore_code, after = map(int, done.stdout.split())
    assert honest == [0, 0, 0]
    assert (check_code, info_code, restore_code) == (1, 0, 1)
    assert after - before < MEMORY


def test_what_the_frame_says_of_itself_is_not_believed(own: Path) -> None:
    """A header that claims the right size, over contents that have another."""
    path = folder_of(own) / "metadata/c/0"
    (size,) = image_of(own).array("metadata").shape
    lying = bytearray(frame(BOMB, 1)[:-4])
    lying[4:8] = size.to_bytes(4, "little")
    path.write_bytes(checked(bytes(lying)))
    with pytest.raises(ArchiveError, match="metadata is damaged"):
        image_of(own).source  # noqa: B018
    path.write_bytes(checked(bytes(lying[:9])))
    with pytest.raises(ArchiveError, match="shorter than its header"):
        image_of(own).source  # noqa: B018


def test_shards_and_tiles_that_are_too_long(own: Path) -> None:
    shard = folder_of(own) / "pixels/c/0/0/0"
    data = shard.read_bytes()
    os.truncate(shard, SPARSE)
    with pytest.raises(ArchiveError, match="pixels is damaged: it has more than the"):
        image_of(own).read((0, 0, SIDE, SIDE))
    with pytest.raises(ArchiveError, match="damaged tile"):  # its index is at the end
        image_of(own).read((0, 0, 9, 9))
    shard.write_bytes(shard_of([b"1234"] * 4, claimed=1 << 50))
    with pytest.raises(ArchiveError, match=f"a tile of {1 << 50} bytes"):
        image_of(own).read((0, 0, 9, 9))
    shard.write_bytes(shard_of([b"1234"] * 4, claimed=(1 << 64) - 1))
    with pytest.raises(ArchiveError):
        image_of(own).read((0, 0, 9, 9))
    shard.write_bytes(data)
    read_all(image_of(own))


Change = Callable[[dict[str, Any]], None]


def inner(change: Callable[[list[Any]], Any]) -> Change:
    return lambda content: change(content["codecs"][0]["configuration"]["codecs"])


def configured(**fields: Any) -> Change:
    return lambda content: content["codecs"][0]["configuration"].update(fields)


GZIP = {"name": "gzip", "configuration": {"level": 1}}
ZSTD = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
NESTED = {
    "name": "sharding_indexed",
    "configuration": {"chunk_shape": [1, 1, 1], "codecs": [BYTES], "index_codecs": [BYTES]},
}
FORMS: dict[str, Change] = {
    "gzip": inner(lambda codecs: codecs.append(GZIP)),
    "zstd": inner(lambda codecs: codecs.__setitem__(1, ZSTD)),
    "lz4": inner(lambda codecs: codecs[1]["configuration"].update(cname="lz4")),
    "blosc twice": inner(lambda codecs: codecs.insert(1, codecs[1])),
    "no checksum": inner(lambda codecs: codecs.pop()),
    "transpose": inner(
        lambda codecs: codecs.insert(
            0, {"name": "transpose", "configuration": {"order": [1, 0, 2]}}
        )
    ),
    "nested": inner(lambda codecs: codecs.__setitem__(slice(None), [NESTED])),
    "numcodecs": inner(lambda codecs: codecs.append({"name": "numcodecs.bz2"})),
    "unsharded": lambda content: content.update(
        codecs=content["codecs"][0]["configuration"]["codecs"]
    ),
    "compressed shard": lambda content: content["codecs"].append(GZIP),
    "compressed index": configured(index_codecs=[BYTES, GZIP, {"name": "crc32c"}]),
    "index first": configured(index_location="start"),
    "tiny tiles": configured(chunk_shape=[1, 1, 1]),
    "no tiles": configured(chunk_shape=[0, 1, 1]),
    "wide tiles": lambda content: (
        content["chunk_grid"]["configuration"].update(chunk_shape=[4096, 4096, 1]),
        configured(chunk_shape=[4096, 4096, 1])(content),
    ),
    "wide shards": lambda content: content["chunk_grid"]["configuration"].update(
        chunk_shape=[608 * 11, 608 * 11, 1]
    ),
    "other keys": lambda content: content.update(
        chunk_key_encoding={"name": "v2", "configuration": {"separator": "."}}
    ),
    "transformers": lambda content: content.update(storage_transformers=[{"name": "x"}]),
    "long": lambda content: content.update(attributes={"x": "x" * (1 << 17)}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_ingest_does_not_write(own: Path, form: str) -> None:
    path = folder_of(own) / "pixels/zarr.json"
    content = json.loads(path.read_text())
    FORMS[form](content)
    path.write_text(json.dumps(content))
    with pytest.raises(ArchiveError, match=r"a\.tif: pixels") as caught:
        image_of(own).array("pixels")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------- keys, documents


@pytest.mark.parametrize(
    "key",
    ["pixels/zarr.json", "metadata/zarr.json", "zarr.json", "metadata/c/0", "mask/c/0/0"],
)
def test_files_larger_than_memory(own: Path, key: str) -> None:
    os.truncate(folder_of(own) / key, SPARSE)
    problems = check(str(own)).problems
    assert 1 <= len(problems) <= 2  # without its record, the index is wrong as well
    assert "more than the" in problems[0]
    assert "a.tif" in problems[0]


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_never_opened(own: Path, tmp_path: Path, kind: str) -> None:
    """A pipe would be waited for, and a device such as /dev/zero never ends."""
    keys = ("metadata/c/0", "mask/c/0/0", "pixels/c/0/0/0")
    for key in keys:
        path = folder_of(own) / key
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/null")
    for args in (["check"], ["restore", "-o", str(tmp_path / "out")]):
        command = [sys.executable, "-m", "archive_pipeline.commands.cli", *args]
        done = subprocess.run(
            [*command, "--archive", own],
            capture_output=True,
            text=True,
            timeout=100,
            env=ref.subprocess_environment(),
        )
        assert done.returncode == 1
        told = done.stdout + done.stderr
        assert told.count("it is no file") == (len(keys) if args == ["check"] else 1)
        assert "a.tif" in told
        assert "Traceback" not in told


def test_other_files_larger_than_memory(archive: Path, tmp_path: Path) -> None:
    url = Path(shutil.copytree(archive, tmp_path / "own.zarr"))
    opened = Archive.open(url)
    (folder,) = (url / "models").iterdir()
    policy = url / "policies" / f"{'0' * 64}.safetensors"
    policy.parent.mkdir()
    policy.touch()
    readers: dict[Path, Callable[[], object]] = {
        path: partial(read_model, opened, folder.name) for path in folder.rglob("*.*")
    }
    assert len(readers) == 4
    readers[policy] = partial(read_policy, opened, "0" * 64)
    readers[url / "items.parquet"] = partial(read_index, opened)
    readers[url / "zarr.json"] = partial(Archive.open, url)
    for path, read in readers.items():
        data = path.read_bytes()
        os.truncate(path, SPARSE)
        with pytest.raises(ArchiveError, match=f"{path.name}: it has more than the"):
            read()
        path.write_bytes(data)


@pytest.mark.parametrize("url", ["{tmp}/a.zarr", "memory://bombs/a.zarr"])
def test_keys_up_to_their_limit(url: str, tmp_path: Path) -> None:
    archive = Archive.create(url.format(tmp=tmp_path))
    archive.write_key("a", b"12345")
    assert archive.read_key("a", 5) == b"12345"
    assert archive.read_key("none", 5) is None
    with pytest.raises(ArchiveError, match="a: it has more than the 4 bytes"):
        archive.read_key("a", 4)
    with pytest.raises(TooLarge):
        sync(read_key(archive.store, "a", default_buffer_prototype(), 4))
    archive.write_key("empty", b"")
    assert archive.read_key("empty", 0) == b""


def test_documents_inside_arrays(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_JSON", "MAX_DOCUMENT"):
        with monkeypatch.context() as patch:
            patch.setattr(layout, name, 9)
            with pytest.raises(ArchiveError, match=r"metadata is damaged.*larger than allowed"):
                image_of(own).source  # noqa: B018
    monkeypatch.setattr(archived_image, "MAX_METADATA", 20)
    with pytest.raises(ArchiveError, match="metadata is damaged: shape"):
        image_of(own).source  # noqa: B018


@pytest.mark.parametrize("name", ["MAX_METADATA", "MAX_JSON"])
def test_ingest_writes_nothing_that_is_not_read(
    name: str, run: Run, flight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, name, 9)
    url = tmp_path / "a.zarr"
    result = run("ingest", flight, "--archive", url, "--workers", 0)
    assert result.code in (1, 3)
    assert "DJI_0001.JPG" in result.err
    assert "larger than the 9 that are allowed" in result.err
    monkeypatch.undo()
    assert not list(Archive.open(url).images())


# ------------------------------------------------------------------------- models


def test_models_of_many_tensors() -> None:
    """A header of a megabyte names more tensors than any network here has."""
    names = json.dumps({str(n): {} for n in range(100_000)}).encode()
    weights = len(names).to_bytes(8, "little") + names
    with pytest.raises(ModelError, match=r"header of .* is larger"):
        Model({**ref.tiny_files(), WEIGHTS: weights})
    with pytest.raises(PolicyError, match=r"header of .* is larger"):
        load_policy(weights, 24)


def test_models_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_files", {})
    monkeypatch.setattr(models, "_codecs", {})
    monkeypatch.delenv(models.SEARCH_PATH, raising=False)
    tiny = ref.tiny_files()
    monkeypatch.setattr(models, "MAX_KEPT", 3 * sum(map(len, tiny.values())))
    first, *others = (
        models.register({**tiny, "config.json": tiny["config.json"] + b" " * n}) for n in range(4)
    )
    assert len({first, *others}) == 4
    assert set(models._files) == set(others[1:])
    kept = models.codec_for(others[-1])
    assert models.codec_for(others[-1]) is kept
    with pytest.raises(UnknownModel):
        models.codec_for(first)


# --------------------------------------------------------------------------- index


def written(rows: dict[str, list[str]], **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table(rows), sink, **options)
    return sink.getvalue().to_pybytes()


def test_footers_of_an_index() -> None:
    """pyarrow's own look at what is in a column ends the process where it is damaged."""
    whole = written({name: ["a", "b"] for name in ("archive:key", "archive:sha256")})
    count, chunks = read_footer(whole)
    expected = pa.parquet.read_metadata(pa.BufferReader(whole))
    assert count == expected.num_rows
    for number, chunk in enumerate(chunks):
        other = expected.row_group(0).column(number)
        assert (chunk.column, chunk.values) == (other.path_in_schema, other.num_values)
        assert chunk.size == other.total_uncompressed_size
        assert (chunk.codec, len(chunk.encodings)) == (1, len(set(other.encodings)))
    rng = random.Random(0)
    length = int.from_bytes(whole[-8:-4], "little")
    for _ in range(2000):
        at = len(whole) - 8 - rng.randrange(1, length)
        damaged = whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
        with suppress(ValueError, pa.ArrowException, OSError):
            _parquet.read_texts(damaged, ("archive:key", "archive:sha256"))
    for footer in (b"\x19" * 5000, b"\x1c" * 5000, b"\xff" * 50, b""):
        with pytest.raises(ValueError, match="footer"):
            read_footer(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def test_index_bombs(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = own / "items.parquet"
    archive = Archive.open(own)
    rows = {"archive:key": ["a"] * 9, "archive:sha256": ["b"] * 9}
    path.write_bytes(written(rows))
    assert read_index(archive) == {"a": "b"}
    path.write_bytes(written(rows, compression="zstd"))
    with pytest.raises(ArchiveError, match="compression 6"):
        read_index(archive)
    long = {"archive:key": ["a" * 9999] * 4000, "archive:sha256": ["b"] * 4000}
    path.write_bytes(written(long, use_dictionary=True))
    assert path.stat().st_size < 1 << 16  # 40 MB of texts
    with pytest.raises(ArchiveError, match="its texts take more than"):
        read_index(archive)
    delta = {"archive:key": "DELTA_BYTE_ARRAY", "archive:sha256": "PLAIN"}
    path.write_bytes(written(long, use_dictionary=False, column_encoding=delta))
    assert path.stat().st_size < 1 << 18
    with pytest.raises(ArchiveError, match=r"encodings \[.*7"):
        read_index(archive)
    monkeypatch.setattr(_parquet, "LEAST", 0)
    monkeypatch.setattr(_parquet, "EXPANSION", 1)
    path.write_bytes(written({k: v * 999 for k, v in rows.items()}))
    with pytest.raises(ArchiveError, match="its columns take more than"):
        read_index(archive)
