"""The index gives what the records say: whatever changes, however old, damaged or copied it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FRAMES, Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archive_pipeline.geo.bounds import DATUM_MARGIN
from archive_pipeline.geo.georef import Georef
from archive_pipeline.geo.mapping import bbox_to_window, outline, with_footprint
from archive_pipeline.jobs.info import describe
from archive_pipeline.jobs.selection import Selection, select
from archive_pipeline.store import index
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.index import differences, is_current, look, read_images, write_index
from archive_pipeline.store.index_rows import (
    CAMERA,
    OTHER,
    SCHEMA,
    TRANSFORM,
    VERSION,
    summary_of,
    to_records,
    to_rows,
    to_summaries,
)
from archive_pipeline.store.layout import ATTRIBUTE, ArchiveError, ImageEntry, group_json, image_key
from archive_pipeline.store.stac import to_file

HOUR = 3_600_000_000_000  # ns
Record = dict[str, Any]


def make_record(id: str, **fields: Any) -> Record:
    georef = fields.pop("georef", None) or place(500_000, 3_200_000)
    return {
        "id": id,
        "sha256": f"{abs(hash(id)):064x}"[:64],
        "width": 360,
        "height": 304,
        "bands": 3,
        "dtype": "uint8",
        "mask": "none",
        "codec": "pcdc",
        "model": "f" * 64,
        "source_bytes": 100_000,
        "archive_bytes": 5_000,
        "captured": "2026-05-06T07:08:09",
        "georef": georef.to_json(),
        "warnings": [],
        **fields,
    }


def place(
    x: float, y: float, crs: str = "EPSG:32615", size: float = 0.05, turn: float = 0.3
) -> Any:
    """The georeference of a frame whose first corner is at (x, y)."""
    c, s = size * np.cos(turn), size * np.sin(turn)
    transform = (float(c), float(s), float(x), float(s), -float(c), float(y))
    return with_footprint(Georef(crs, transform, method="camera"), 360, 304)


def put(archive: Archive, flight: str, record: Record, age: int = HOUR) -> Path:
    """Commit an image that has nothing but a record, some time ago."""
    key = f"{image_key(flight, record['id'])}/zarr.json"
    archive.write_key(key, group_json({ATTRIBUTE: record}))
    path = Path(archive.url) / key
    settle(path, age)
    return path


def settle(path: Path, age: int = HOUR) -> None:
    time = path.stat().st_mtime_ns - age
    os.utime(path, ns=(time, time))


@pytest.fixture
def opened(tmp_path: Path) -> Archive:
    """An indexed archive of two flights; its records are an hour old."""
    archive = Archive.create(tmp_path / "a.zarr")
    for flight in ("alpha", "beta"):
        archive.create_flight(flight)
        for number in range(5):
            georef = place(500_000 + 10 * number, 3_200_000 if flight == "alpha" else 3_300_000)
            put(archive, flight, make_record(f"DJI_{number}.JPG", georef=georef))
    write_index(archive)
    return archive


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Group paths of the records that are read from now on."""
    keys: list[str] = []
    entry = Archive.entry

    def note(self: Archive, key: str) -> ImageEntry | None:
        keys.append(key)
        return entry(self, key)

    monkeypatch.setattr(Archive, "entry", note)
    return keys


def told(archive: Archive) -> tuple[list[ImageEntry], list[str]]:
    """What the index and a look at the files give."""
    damaged: list[str] = []
    return list(read_images(archive, None, lambda name, error: damaged.append(name))), damaged


def true(archive: Archive) -> tuple[list[ImageEntry], list[str]]:
    """What the records give."""
    damaged: list[str] = []
    return list(archive.images(None, lambda name, error: damaged.append(name))), damaged


# ------------------------------------------------------------------- freshness


def test_no_record_is_read_that_the_index_has(opened: Archive, read: list[str]) -> None:
    assert len(told(opened)[0]) == 10
    assert describe(opened.url)["totals"]["images"] == 10
    assert is_current(opened)
    assert read == []
    window = place(500_000, 3_300_000).footprint
    west, south = np.min(window, 0)
    east, north = np.max(window, 0)
    chosen, _ = select(opened, Selection((west, south, east, north)))
    assert {entry.flight for entry, _ in chosen} == {"beta"}
    assert read == []
    put(opened, "beta", make_record("new.JPG"))
    assert not is_current(opened)
    read.clear()
    assert write_index(opened) == 11
    assert read == ["flights/beta/new.JPG"]
    assert is_current(opened)
    assert told(opened) == true(opened)


def test_whatever_changes_is_seen(opened: Archive) -> None:
    root = Path(opened.url)
    put(opened, "alpha", make_record("DJI_1.JPG", archive_bytes=6_000), age=0)
    put(opened, "alpha", make_record("DJI_11.JPG"), age=0)
    put(opened, "gamma", make_record("DJI_2.JPG"), age=2 * HOUR)
    (root / "flights/beta/DJI_3.JPG/zarr.json").unlink()
    shutil.rmtree(root / "flights/beta/DJI_4.JPG")
    (root / "flights/beta/DJI_0.JPG/zarr.json").write_text("{")
    (root / "flights/beta/DJI_1.JPG/zarr.json").write_bytes(group_json({}))
    (root / "flights/beta/.DS_Store").write_text("")
    (root / "flights/notes.txt").write_text("")
    entries, damaged = told(opened)
    assert (entries, damaged) == true(opened)
    assert [e.id for e in entries if e.flight == "beta"] == ["DJI_2.JPG"]
    assert damaged == ["beta/DJI_0.JPG"]
    assert not is_current(opened)
    assert write_index(opened) == len(entries)
    assert is_current(opened)
    assert told(opened) == (entries, damaged)


def test_a_record_that_was_just_written_may_change_within_a_tick(
    opened: Archive, read: list[str]
) -> None:
    """On file systems whose times are coarse two records may look the same, inode included."""
    path = put(opened, "alpha", make_record("DJI_7.JPG", archive_bytes=6_000), age=0)
    write_index(opened)
    before = path.stat()
    with open(path, "r+b") as file:
        file.write(group_json({ATTRIBUTE: make_record("DJI_7.JPG", archive_bytes=7_000)}))
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
    after = path.stat()
    same = ("st_mtime_ns", "st_size", "st_ino")
    assert [getattr(before, name) for name in same] == [getattr(after, name) for name in same]
    read.clear()
    assert told(opened) == true(opened)
    assert read.count("flights/alpha/DJI_7.JPG") == 2  # one of them by `true`
    assert not is_current(opened)
    write_index(opened)
    settle(path)
    write_index(opened)
    read.clear()
    told(opened)
    assert read == []


def test_a_record_of_the_same_time_and_size_is_another_file(opened: Archive) -> None:
    path = Path(opened.url) / "flights/alpha/DJI_1.JPG/zarr.json"
    before = path.stat()
    georef = place(500_010, 3_200_000)
    put(opened, "alpha", make_record("DJI_1.JPG", archive_bytes=6_000, georef=georef))
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (before.st_mtime_ns, before.st_size)
    assert told(opened) == true(opened)
    assert {e.record["archive_bytes"] for e in told(opened)[0]} == {5_000, 6_000}


def test_times_in_the_future_are_not_trusted(opened: Archive) -> None:
    path = put(opened, "alpha", make_record("DJI_1.JPG"), age=-HOUR)
    write_index(opened)
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"5000", b"9999"))
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert told(opened) == true(opened)


def test_the_index_of_a_copy_holds(opened: Archive, tmp_path: Path, read: list[str]) -> None:
    copy = Archive.open(shutil.copytree(opened.url, tmp_path / "copy.zarr"), writable=True)
    assert len(told(copy)[0]) == 10
    assert read == []
    assert not is_current(copy)  # by the files' inodes
    put(copy, "alpha", make_record("DJI_1.JPG", archive_bytes=6_000), age=0)
    assert told(copy) == true(copy)
    write_index(copy)
    assert is_current(copy)
    without_times = tmp_path / "plain.zarr"
    shutil.copytree(opened.url, without_times, copy_function=shutil.copyfile)
    assert told(Archive.open(without_times)) == true(Archive.open(without_times))


# ------------------------------------------------------- damaged, old and hostile


def rows_of(archive: Archive) -> pa.Table:
    contents = look(archive, damaged=lambda name, error: None, in_rows=True)
    return pa.concat_tables(index.current_rows(contents))


def test_an_index_of_an_older_release(opened: Archive) -> None:
    """Its columns were others; it is passed over, and written anew."""
    rows = rows_of(opened).drop_columns([OTHER, "archive:reach"])
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    opened.write_key(index.KEY, sink.getvalue().to_pybytes())
    assert told(opened) == true(opened)
    assert index.is_outdated(opened)
    assert not is_current(opened)
    assert differences(opened, opened.images()) == {}
    put(opened, "alpha", make_record("DJI_1.JPG", sha256="0" * 64))
    assert differences(opened, opened.images()) == {"flights/alpha/DJI_1.JPG": True}
    write_index(opened)
    assert is_current(opened)


HOSTILE: dict[str, Any] = {
    "archive:width": [None, 0, -1, 1 << 40],
    TRANSFORM: [dict.fromkeys("abcdef"), dict.fromkeys("abcdef", float("nan"))],
    "geometry": [b"", b"\x01\x02", b"\xff" * 93],
    "archive:codec": [None, "pickle"],
    "archive:bands": [None, 0, 1 << 40],
    "archive:dtype": [None, "x"],
    "archive:source_bytes": [None, -1],
    "id": [None, "../../escape", "other.JPG"],
    CAMERA: ["", "[]", "7", "[" * 100_000],
    OTHER: [None, "", "[]", "7", '{"georef":7}', "[" * 100_000, '{"georef":{"gcps":7}}', "{}"],
    VERSION: [None, "", "x"],
}


def with_column(rows: pa.Table, name: str, values: list[Any]) -> pa.Table:
    at = rows.schema.get_field_index(name)
    return rows.set_column(at, name, pa.array(values, rows.schema.field(name).type))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_rows_are_passed_over(opened: Archive, name: str) -> None:
    expected = true(opened)
    for value in HOSTILE[name]:
        rows = to_file(rows_of(opened))
        values = rows[name].to_pylist()
        values[3] = value
        rows = with_column(rows, name, values)
        metadata = {index.PLACE: index._place(opened).encode()}
        sink = pa.BufferOutputStream()
        pq.write_table(rows.replace_schema_metadata(metadata), sink)
        opened.write_key(index.KEY, sink.getvalue().to_pybytes())
        assert index.look(opened).place == index._place(opened)
        assert told(opened) == expected
        assert describe(opened.url)["totals"]["images"] == 10
        if name != VERSION:
            assert differences(opened, opened.images()) == {expected[0][3].key: True}
        write_index(opened)


def test_an_index_that_holds_far_more_than_its_size(opened: Archive) -> None:
    rows = to_file(rows_of(opened))
    rows = pa.concat_tables([rows] * 1000)
    rows = with_column(rows, "archive:other", ["x" * 100_000] * len(rows))
    sink = pa.BufferOutputStream()
    metadata = {index.PLACE: index._place(opened).encode()}
    pq.write_table(rows.replace_schema_metadata(metadata), sink)
    opened.write_key(index.KEY, sink.getvalue().to_pybytes())
    assert len(opened.read_key(index.KEY) or b"") < 1 << 20  # a gigabyte of texts
    assert look(opened).place is None
    assert told(opened) == true(opened)
    with pytest.raises(ArchiveError, match="its texts take more than"):
        differences(opened, opened.images())


def test_an_index_cut_short_or_with_flipped_bits(opened: Archive) -> None:
    whole, expected = opened.read_key(index.KEY) or b"", true(opened)
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 40).tolist():
        flipped = whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :]
        for damaged in (whole[:at], flipped):
            opened.write_key(index.KEY, damaged)
            assert len(told(opened)[0]) == 10
            assert describe(opened.url)["totals"]["images"] == 10
    opened.write_key(index.KEY, whole)
    assert told(opened) == expected


# ------------------------------------------------------------------------ rows

TEXTS = st.text(st.characters(codec=None), max_size=8)
# a record of other surrogates than those of a file name's odd bytes is refused as damaged
IDS = st.text(
    st.one_of(
        st.characters(codec="utf-8"), st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF)
    ),
    min_size=1,
    max_size=8,
)
NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**20), 10**20)
)
RINGS = st.lists(st.lists(NUMBERS, min_size=2, max_size=3), min_size=4, max_size=6)
GEOREFS = st.fixed_dictionaries(
    {
        "crs": st.one_of(st.none(), st.just("EPSG:32615"), TEXTS.map("PROJCRS[{}".format)),
        "transform": st.one_of(st.none(), st.lists(NUMBERS, min_size=6, max_size=6)),
        "gcps": st.lists(st.tuples(*[NUMBERS] * 5, TEXTS, TEXTS).map(list), max_size=4),
        "rpcs": st.one_of(st.none(), st.dictionaries(TEXTS, TEXTS, max_size=2)),
        "footprint": st.one_of(st.none(), RINGS),
        "method": st.sampled_from(["none", "transform", "gcps", "camera", "rpcs"]),
    }
)
ANGLES = st.floats(-400, 400)
CAMERAS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("yaw_deg", "pitch_deg", "roll_deg", "lon", "lat"), ANGLES),
        **dict.fromkeys(("altitude_gps_m", "focal_mm", "focal_px", "digital_zoom"), NUMBERS),
        **dict.fromkeys(("make", "model", "mount", "dialect"), TEXTS),
        "centre_px": st.lists(NUMBERS, min_size=2, max_size=2),
        "strange": TEXTS,
    },
)
RECORDS = st.fixed_dictionaries(
    {
        "id": IDS,
        "sha256": TEXTS.filter(bool),
        "width": st.integers(1, 1 << 24),
        "height": st.integers(1, 1 << 24),
        "bands": st.integers(1, 1 << 16),
        "dtype": st.sampled_from(["uint8", "uint16", "float32", None]),
        "mask": st.sampled_from(["none", "alpha"]),
        "codec": st.sampled_from(["pcdc", "lossless"]),
        "source_bytes": st.integers(0, 1 << 70),
        "archive_bytes": st.integers(0, 1 << 40),
        "captured": st.one_of(st.none(), TEXTS),
        "georef": GEOREFS,
    },
    optional={
        "model": st.one_of(TEXTS, st.none(), st.integers()),
        "warnings": st.lists(TEXTS),
        "camera": CAMERAS,
    },
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(RECORDS, max_size=3))
def test_rows_give_the_records_or_say_that_they_do_not(records: list[Record]) -> None:
    entries = [ImageEntry("f", r["id"], image_key("f", r["id"]), r) for r in records]
    rows = to_rows((entry, "v") for entry in entries)
    assert rows.schema == SCHEMA
    back, summaries = to_records(rows), to_summaries(rows)
    for record, version, other, summary in zip(
        records, rows[VERSION].to_pylist(), back, summaries, strict=True
    ):
        if version is not None:
            assert json.dumps(other, sort_keys=True) == json.dumps(record, sort_keys=True)
            assert json.dumps(summary) == json.dumps(summary_of(record))


def test_records_of_real_frames_are_in_their_rows(archive: Path, run: Run) -> None:
    entries = list(Archive.open(archive).images())
    rows = to_rows((entry, "v") for entry in entries)
    assert rows[VERSION].to_pylist() == ["v"] * FRAMES
    assert np.isfinite(rows["archive:reach"].to_numpy()).all()
    assert to_records(rows) == [entry.record for entry in entries]


def test_other_readers_see_plain_columns(opened: Archive) -> None:
    geopandas = pytest.importorskip("geopandas")
    path = Path(opened.url) / index.KEY
    frame = geopandas.read_parquet(path)
    assert (len(frame), frame.crs.to_epsg()) == (10, 4326)
    assert frame["archive:codec"].tolist() == ["pcdc"] * 10
    west, south, east, north = frame.geometry.iloc[0].bounds
    assert 5 >= len(geopandas.read_parquet(path, bbox=(west, south, east, north))) >= 1
    duckdb = pytest.importorskip("duckdb")
    query = f"select sum(\"archive:archive_bytes\"), min(bbox.xmin) from '{path}'"
    ((total, least),) = duckdb.sql(query).fetchall()
    assert (total, least) == (50_000, frame.geometry.bounds.minx.min())


# ------------------------------------------------------------------- selection

CRSS = {  # with a place that each is made for
    "EPSG:32615": (500_000, 3_200_000, 1.0),
    "EPSG:32660": (830_000, 1_000_000, 1.0),  # at the antimeridian
    "EPSG:25833": (400_000, 5_800_000, 1.0),
    "EPSG:4326": (179.99, 10.0, 1e-5),
    "EPSG:4269": (-95.0, 29.0, 1e-5),
    "EPSG:3857": (1_000_000, 8_000_000, 1.0),
    "EPSG:3995": (0.0, 0.0, 100.0),  # around the pole
    "EPSG:2193": (1_700_000, 5_400_000, 1.0),
    "EPSG:26715": (500_000, 3_200_000, 1.0),  # NAD27
}


def georefs(rng: np.random.Generator, count: int) -> Iterator[Georef]:
    """Random georeferences: frames and large ones, by transform, control points or none at all."""
    for _ in range(count):
        crs = str(rng.choice(list(CRSS)))
        x, y, unit = CRSS[crs]
        size = unit * 10 ** rng.uniform(-2, 3.5)
        x, y = x + rng.normal(0, 20_000) * unit, y + rng.normal(0, 20_000) * unit
        turn = rng.choice([0.0, rng.uniform(0, 7)])
        c, s = float(size * np.cos(turn)), float(size * np.sin(turn))
        georef = Georef(crs, (c, s, float(x), s, -c, float(y)), method="transform")
        kind = rng.integers(6)
        if kind == 0:
            corners = [(0, 0), (0, 30), (20, 0), (20, 30), (10, 14)]
            gcps = tuple(
                (
                    r,
                    k,
                    x + c * k + s * r + float(rng.normal(0, size)),
                    y + s * k - c * r,
                    0.0,
                    "",
                    "",
                )
                for r, k in corners
            )
            method = str(rng.choice(["camera", "gcps"]))
            georef = Georef(crs, gcps=gcps, method=method)
        if kind == 1:
            yield georef  # a transform, but no footprint
        elif kind == 2:
            yield Georef(rng.choice([crs, None]), method="none")
        else:
            yield with_footprint(georef, 30, 20)


GEOGRAPHIC = ("EPSG:4326", "OGC:CRS84", "EPSG:4267", "EPSG:4269")


def boxes(rng: np.random.Generator, images: list[Georef]) -> Iterator[tuple[Any, str]]:
    """Boxes beside, on and across images, and at their very edges, in many CRSs."""
    for georef in images:
        crs = str(rng.choice(["EPSG:4326", *GEOGRAPHIC, *CRSS, georef.crs or "EPSG:4326"]))
        try:
            points = np.column_stack(outline(georef, 30, 20, crs))
        except ValueError:
            continue
        extent = np.ptp(points, axis=0)
        if rng.integers(2):  # where an edge reaches farthest
            low = high = points[np.argmax(points @ rng.choice([[1, 0], [0, 1], [-1, 0], [0, -1]]))]
            extent = extent * 10 ** rng.uniform(-6, -2)
        else:
            low, high = points.min(0), points.max(0)
        reach = np.maximum(extent, 1e-9) * 10 ** rng.uniform(-2, 1)
        low, high = low - abs(rng.normal(0, reach)), high + abs(rng.normal(0, reach))
        if rng.integers(2):
            low, high = np.array([low, high]) + rng.normal(0, reach)
        if crs in GEOGRAPHIC:
            low, high = (np.clip(v, [-180, -90], [180, 90]) for v in (low, high))
            turn = rng.choice([0, 0, 0, 360, -360])  # longitudes may count on
            if low[0] + turn >= -360 and high[0] + turn <= 360:
                low, high = low + np.array([turn, 0]), high + np.array([turn, 0])
        if (low < high).all():
            yield (*low.tolist(), *high.tolist()), crs


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))]
)
def test_a_box_meets_the_same_images_with_and_without_the_index(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    archive = Archive.create(tmp_path / "a.zarr")
    images = list(georefs(rng, 50))
    records = [
        make_record(f"{n:03}.tif", georef=g, width=30, height=20) for n, g in enumerate(images)
    ]
    for record in records:
        put(archive, "f", record)
    write_index(archive)
    contents = look(archive)
    assert sum(isinstance(image, int) for image in contents.images.values()) > 30
    left_out, chosen = 0, 0
    for bbox, crs in boxes(rng, images):
        expected = {}
        for record, georef in zip(records, images, strict=True):
            window = bbox_to_window(georef, 30, 20, bbox, crs)
            if window is not None:
                expected[record["id"]] = window
        found, failed = select(archive, Selection(bbox, crs))
        assert failed == []
        assert {entry.id: window for entry, window in found} == expected, (bbox, crs)
        left_out += len(images) - len(contents.near(bbox, crs))
        chosen += len(expected)
    assert chosen > 0
    assert left_out > 0


@pytest.mark.parametrize(
    ("georef", "box"),
    [
        # 90 km wide: the middle of its upper edge lies 200 m further north than the corners
        (
            Georef("EPSG:32633", (3000.0, 0.0, 455_000.0, 0.0, -3000.0, 5_760_000.0)),
            lambda x, y: (14.99, y.max() - 1e-5, 15.01, y.max() + 1e-4),
        ),
        # on both sides of the antimeridian
        (
            Georef("EPSG:32660", (100.0, 0.0, 828_000.0, 0.0, -100.0, 1_000_000.0)),
            lambda x, y: (x.max() + 1e-5, y.min(), 180.0, y.max()),
        ),
        # around the pole, further north than any of its corners and edges
        (
            Georef("EPSG:3995", (10_000.0, 0.0, -150_000.0, 0.0, -10_000.0, 100_000.0)),
            lambda x, y: (10.0, 89.99, 20.0, 89.999),
        ),
    ],
    ids=["curved", "antimeridian", "pole"],
)
def test_images_whose_corners_do_not_bound_them(
    tmp_path: Path, georef: Georef, box: Callable[[Any, Any], Any]
) -> None:
    archive = Archive.create(tmp_path / "a.zarr")
    placed = with_footprint(replace(georef, method="transform"), 30, 20)
    put(archive, "f", make_record("a.tif", georef=placed, width=30, height=20))
    write_index(archive)
    assert placed.footprint is not None
    corners = np.array(placed.footprint)
    bbox = box(*outline(placed, 30, 20, "EPSG:4326"))
    inside = (corners >= bbox[:2]) & (corners <= bbox[2:])
    assert not inside.all(axis=1).any()
    # the pole's neighbourhood is not told apart by the exact look, either
    expected = bbox_to_window(placed, 30, 20, bbox) is not None
    assert bool(select(archive, Selection(bbox))[0]) == expected
    assert look(archive).near(bbox, "EPSG:4326") == {"flights/f/a.tif"}


def test_boxes_whose_longitudes_count_on(opened: Archive) -> None:
    ring = place(500_000, 3_300_000).footprint
    (west, south), (east, north) = np.min(ring, 0), np.max(ring, 0)
    assert east < 0
    for box in (
        (west, east),
        (west + 360, east + 360),
        (170.0, east),
        (-180.0, east),
        (west, 10.0),
    ):
        chosen, _ = select(opened, Selection((box[0], south, box[1], north)))
        assert "DJI_0.JPG" in {entry.id for entry, _ in chosen}, box
    assert select(opened, Selection((170.0, south, -179.0, north))) == ([], [])


def test_a_damaged_record_is_told_whatever_the_box(opened: Archive) -> None:
    path = Path(opened.url) / "flights/alpha/DJI_1.JPG/zarr.json"
    path.write_text("[")
    for selection in (
        Selection(),
        Selection((0.0, 0.0, 1.0, 1.0)),
        Selection(images=("DJI_1.JPG",)),
    ):
        _, failed = select(opened, selection)
        assert [f["image"] for f in failed] == ["alpha/DJI_1.JPG"]
    assert [f["image"] for f in describe(opened.url)["damaged"]] == ["alpha/DJI_1.JPG"]


def test_an_image_on_another_datum_is_let_through_nearby(tmp_path: Path) -> None:
    """Which way from NAD27 to WGS 84 is taken depends on the grids that are installed."""
    archive = Archive.create(tmp_path / "a.zarr")
    put(archive, "f", make_record("a.tif", georef=place(500_000, 3_200_000, "EPSG:26715")))
    write_index(archive)
    (bounds,) = look(archive).rows["bbox"].to_pylist()
    west, beside = bounds["xmax"] + DATUM_MARGIN / 2, bounds["xmax"] + 2 * DATUM_MARGIN
    south, north = bounds["ymin"], bounds["ymax"]
    near, far = (west, south, beside, north), (beside, south, beside + 1, north)
    assert look(archive).near(near, "EPSG:4326") == {"flights/f/a.tif"}
    assert look(archive).near(far, "EPSG:4326") == set()
