"""Images as STAC items: valid whatever they are, read by others, and true of the camera."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import zarr
from conftest import FRAMES, Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.transform import from_origin
from stac_checks import validate, without_nulls
from test_index import RECORDS, Record, make_record, place, put

from archive_pipeline.geo.camera import camera_georef
from archive_pipeline.geo.georef import Georef
from archive_pipeline.geo.mapping import with_footprint
from archive_pipeline.geo.pose import CameraPose
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.index import KEY, current_rows, is_current, look, write_index
from archive_pipeline.store.index_rows import to_rows
from archive_pipeline.store.layout import ImageEntry, image_key
from archive_pipeline.store.stac_json import collections, items

pystac = pytest.importorskip("pystac")
XSS = "<img src=x onerror=alert(1)>"
NAMES = ("with space.JPG", f"{XSS}.JPG", "100MEDIA/DJI_0001.JPG", "Überflug 100%.JPG", "日本.TIF")


def rows_of(archive: Archive) -> pa.Table:
    return pa.concat_tables(current_rows(look(archive, in_rows=True)))


def oblique() -> Georef:
    pose = CameraPose(
        lon=8.5, lat=47.5, altitude_relative_m=80.0, yaw_deg=30.0, pitch_deg=-50.0, focal_35mm=24.0
    )
    return camera_georef(pose, 360, 304)


def odd_records() -> dict[str, Record]:
    """Images of all kinds by the flights that they are in."""
    spot = Georef(footprint=((8.5, 47.5),) * 4, method="point")
    fiji = with_footprint(Georef("EPSG:4326", (1e-3, 0, 179.9, 0, -1e-3, -17.0)), 360, 304)
    pole = with_footprint(Georef("EPSG:3995", (1e4, 0, -1.8e6, 0, -1e4, 1.5e6)), 360, 304)
    wkt = pytest.importorskip("pyproj").CRS.from_user_input(
        "+proj=tmerc +lon_0=8.5 +ellps=GRS80 +units=us-ft"
    )
    local = with_footprint(Georef(wkt.to_wkt(), (1.0, 0, 0, 0, -1.0, 17e6)), 360, 304)
    found = {f"name{n}": make_record(name) for n, name in enumerate(NAMES)}
    return found | {
        XSS: make_record("a.JPG"),
        "a b/c%2F": make_record("a.JPG"),
        "nowhere": make_record("a.JPG", georef=Georef()),
        "spot": make_record("a.JPG", georef=spot, captured=None),
        "fiji": make_record("a.tif", georef=fiji),
        "pole": make_record("a.tif", georef=pole),
        "feet": make_record("a.tif", georef=local),
        "oblique": make_record("a.JPG", georef=oblique(), overviews=[8, 64]),
        "never": make_record("a.JPG", captured="0000:00:00 00:00:00"),
        "zoned": make_record("a.JPG", captured="2026-05-06T07:08:09.5+12:00"),
        "early": make_record("a.JPG", captured="0001-01-01T00:00:00+14:00"),
        "heights": make_record("a.tif", codec="lossless", model=None, bands=1, dtype="float32"),
        "many": make_record("a.tif", codec="lossless", bands=400, dtype="complex64"),
        "camera": make_record("a.JPG", camera={"make": XSS, "focal_mm": 1e-320, "lon": 1e9}),
    }


@pytest.fixture
def odd(tmp_path: Path) -> Archive:
    archive = Archive.create(tmp_path / "a.zarr")
    for flight, record in odd_records().items():
        put(archive, flight, record)
    write_index(archive)
    assert is_current(archive)
    return archive


# ---------------------------------------------------------------------- valid


def test_odd_images_are_valid_items(odd: Archive) -> None:
    found = {item["collection"]: item for item in items(rows_of(odd))}
    assert found.keys() == odd_records().keys()
    for item in found.values():
        validate(item)
        pystac.Item.from_dict(item)
    assert [found[f"name{n}"]["id"] for n in range(len(NAMES))] == list(NAMES)
    assert found["nowhere"]["geometry"] is None
    assert found["spot"]["geometry"] == {"type": "Point", "coordinates": (8.5, 47.5)}
    west, _, east, _ = found["fiji"]["bbox"]
    assert (west, east) == pytest.approx((179.9, -179.74))
    assert found["fiji"]["geometry"]["type"] == "MultiPolygon"
    times = {flight: item["properties"] for flight, item in found.items()}
    assert times["zoned"]["datetime"] == "2026-05-05T19:08:09.500000Z"
    for flight in ("never", "early", "spot"):
        assert times[flight]["datetime"] is None
        assert times[flight]["start_datetime"] < "1801" < "2199" < times[flight]["end_datetime"]
    assert times["feet"]["gsd"] == pytest.approx(0.3048, rel=1e-4)
    assert times["fiji"]["gsd"] == pytest.approx(108.69, rel=1e-3)  # at 17 degrees south
    data = {flight: item["assets"]["data"] for flight, item in found.items()}
    assert [band["name"] for band in data["heights"]["bands"]] == ["1"]
    assert data["many"].keys() & {"bands", "data_type"} == {"data_type"}
    assert data["many"]["data_type"] == "cfloat32"
    assert found["oblique"]["assets"]["overview"]["href"].endswith("/a.JPG/overview_8")
    assert "overview" not in found["fiji"]["assets"]


def test_collections_are_valid(odd: Archive) -> None:
    found = collections(rows_of(odd))
    assert found.keys() == odd_records().keys()
    for flight, collection in found.items():
        validate(collection)
        assert (collection["id"], pystac.Collection.from_dict(collection).id) == (flight, flight)
    assert found["nowhere"]["extent"]["spatial"]["bbox"] == [[-180.0, -90.0, 180.0, 90.0]]
    assert found["never"]["extent"]["temporal"]["interval"] == [[None, None]]
    assert found["camera"]["summaries"]["instruments"] == [XSS]
    told = json.loads(pq.read_schema(Path(odd.url) / KEY).metadata[b"stac-geoparquet"])
    assert told["collections"] == found


def test_assets_are_where_they_are_said_to_be(odd: Archive) -> None:
    for item, entry in zip(items(rows_of(odd)), odd.images(), strict=True):
        href = item["assets"]["data"]["href"]
        assert href.isascii()
        assert " " not in href
        assert unquote(href) == f"./{entry.key}"
        assert (Path(odd.url) / unquote(href) / "zarr.json").is_file()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(RECORDS, min_size=1, max_size=3))
def test_whatever_records_hold_the_items_are_valid(records: list[Record]) -> None:
    entries = [ImageEntry("f", r["id"], image_key("f", r["id"]), r) for r in records]
    rows = to_rows((entry, "v") for entry in entries)
    for found in (*items(rows), *collections(rows).values()):
        validate(found)


# ------------------------------------------------------------------- by others


RUSTAC = """
import asyncio, json, os, rustac, sys
async def read():
    return await rustac.read(sys.argv[1])
print(json.dumps(asyncio.run(read())["features"]), flush=True)
os._exit(0)  # its threads sometimes abort a process that ends
"""


def by_rustac(path: Path) -> list[dict[str, Any]]:
    pytest.importorskip("rustac")
    command = [sys.executable, "-c", RUSTAC, str(path)]
    found = subprocess.run(command, capture_output=True, check=True, timeout=120)
    return list(json.loads(found.stdout))


def by_stac_geoparquet(path: Path) -> list[dict[str, Any]]:
    arrow = pytest.importorskip("stac_geoparquet.arrow")
    return [without_nulls(item) for item in arrow.stac_table_to_items(pq.read_table(path))]


@pytest.mark.parametrize("read", [by_rustac, by_stac_geoparquet])
def test_others_read_valid_items(odd: Archive, read: Any) -> None:
    expected = items(rows_of(odd))
    found = read(Path(odd.url) / KEY)
    for item, ours in zip(found, expected, strict=True):
        validate(item)
        assert (item["id"], item["collection"]) == (ours["id"], ours["collection"])
        geometry, assets = json.dumps(item["geometry"]), json.dumps(item["assets"], sort_keys=True)
        nowhere = {"type": "Polygon", "coordinates": []}
        assert geometry == json.dumps(ours["geometry"] or nowhere)
        assert assets == json.dumps(ours["assets"], sort_keys=True)
        for name, value in ours["properties"].items():
            if name not in ("datetime", "start_datetime", "end_datetime", "updated"):
                assert json.dumps(item["properties"][name]) == json.dumps(value), name
        assert pystac.Item.from_dict(item).datetime == pystac.Item.from_dict(ours).datetime


def test_duckdb_and_geopandas_read_them(odd: Archive) -> None:
    duckdb, geopandas = pytest.importorskip("duckdb"), pytest.importorskip("geopandas")
    path = Path(odd.url) / KEY
    frame = geopandas.read_parquet(path).set_index("collection")
    empty = {flight: shape.is_empty for flight, shape in frame.geometry.items()}
    assert empty == {f: f == "nowhere" for f in odd_records()}
    query = """select collection, assets.data.href, datetime from '{}' where bbox.xmin <= 8.6
        and bbox.xmax >= 8.4 and bbox.ymin <= 47.6 and bbox.ymax >= 47.4 order by 1"""
    found = duckdb.sql(query.format(path)).fetchall()
    assert [row[0] for row in found] == ["oblique", "spot"]
    assert found[0][1] == "./flights/oblique/a.JPG"
    placed = "select count(*) from '{}' where bbox.xmin <= 180 and bbox.xmax >= -179"
    assert duckdb.sql(placed.format(path)).fetchall() == [(len(frame) - 1,)]


# ---------------------------------------------------------------- what they say


def test_real_frames(archive: Path) -> None:
    found = items(rows_of(Archive.open(archive)))
    assert len(found) == FRAMES
    for item, entry in zip(found, Archive.open(archive).images(), strict=True):
        validate(item)
        told, record = item["properties"], entry.record
        assert told["proj:transform"] == record["georef"]["transform"]
        assert told["proj:shape"] == [record["height"], record["width"]]
        assert told["datetime"] == record["captured"] + "Z"
        assert told["instruments"] == ["DJI FC6310"]
        assert item["assets"]["data"]["file:size"] == record["archive_bytes"]
        assert item["assets"]["data"]["type"] == "application/vnd.zarr; version=3"
        group = zarr.open(archive / item["assets"]["data"]["href"])
        assert group["pixels"].shape == (record["height"], record["width"], 3)
        assert zarr.open(archive / item["assets"]["metadata"]["href"]).ndim == 1
        _, _, east, north = told["proj:bbox"]
        corners = np.array([told["proj:transform"]]).reshape(2, 3) @ corners_of(record)
        assert (east, north) == pytest.approx(tuple(corners.max(axis=1)))


def corners_of(record: Record) -> Any:
    width, height = record["width"], record["height"]
    return np.array([[0, width, 0, width], [0, 0, height, height], [1, 1, 1, 1]])


def seen_by(told: dict[str, Any], ground: Any) -> Any:
    """Pixels (n, 2) at which an item's camera sees points of the ground, by photogrammetry's rules.

    Args:
        ground: x, y, z (n, 3) in the CRS of its perspective centre.
    """
    interior = told["pers:interior_orientation"]
    turned = np.array(told["pers:rotation_matrix"]).reshape(3, 3)
    x, y, z = turned @ (ground - np.array(told["pers:perspective_center"])).T
    focal, (dx, dy) = interior["focal_length"], interior["principal_point_offset"]
    width, height = interior["sensor_array_dimensions"]
    across, up = -focal * x / z + dx, -focal * y / z + dy
    spacing = np.array(interior["pixel_spacing"])
    return np.column_stack([across, -up]) / spacing + np.array([width, height]) / 2


@pytest.mark.parametrize("mount", ["gimbal", "body"])
@pytest.mark.parametrize("where", [(8.5, 47.5), (-70.1, -33.0), (30.0, 85.0), (12.0, -83.0)])
def test_the_camera_sees_the_ground_where_the_image_has_it(
    where: tuple[float, float], mount: str
) -> None:
    """Far from the middle of its zone true north is degrees off the grid's."""
    pose = CameraPose(
        *where,
        altitude_gps_m=480.0,
        altitude_relative_m=80.0,
        yaw_deg=213.0,
        pitch_deg=-55.0,
        roll_deg=4.0,
        focal_35mm=24.0,
        focal_mm=8.8,
        centre_px=(190.0, 145.0),
        mount=mount,
    )
    georef = camera_georef(pose, 360, 304)
    assert len(georef.gcps) == 16
    record = make_record("a.JPG", georef=georef, camera=pose.brief())
    (item,) = items(to_rows([(ImageEntry("f", "a.JPG", "flights/f/a.JPG", record), None)]))
    validate(item)
    told = item["properties"]
    points = np.array(georef.gcps, dtype=object)
    ground = np.column_stack([points[:, 2:4], np.full(16, 400.0)]).astype(float)
    off = seen_by(told, ground) - points[:, [1, 0]].astype(float)
    # the projection's scale moves them by less than one part in a hundred
    assert np.abs(off).max() < 2.0
    assert told["view:off_nadir"] == pytest.approx(35.2, abs=0.3)
    assert told["pers:crs"] == int((georef.crs or "").removeprefix("EPSG:"))
    assert told["view:azimuth"] == pytest.approx(213.0, abs=8.0)


def test_a_camera_without_height_has_a_place_in_degrees() -> None:
    pose = CameraPose(lon=8.5, lat=47.5, yaw_deg=10.0, pitch_deg=-90.0, make="DJI", model="X")
    record = make_record("a.JPG", georef=Georef(), camera=pose.brief())
    (item,) = items(to_rows([(ImageEntry("f", "a.JPG", "flights/f/a.JPG", record), None)]))
    validate(item)
    told = item["properties"]
    assert (told["pers:perspective_center"], told["pers:crs"]) == ([8.5, 47.5], 4326)
    assert "pers:rotation_matrix" not in told
    assert "view:azimuth" not in told  # it looks straight down
    assert told["view:off_nadir"] == pytest.approx(0.0, abs=1e-6)


# ------------------------------------------------------------ of odd real files


def test_odd_rasters_become_valid_items(run: Run, tmp_path: Path) -> None:
    """Palettes, 16 bits, many bands; without position, without time."""
    folder = tmp_path / "odd flight #1"
    folder.mkdir()
    rng = np.random.default_rng(0)
    size = {"width": 70, "height": 50, "driver": "GTiff"}
    placed = {"crs": "EPSG:32615", "transform": from_origin(5e5, 3.2e6, 0.5, 0.5)}
    grey = rng.integers(0, 256, (1, 50, 70)).astype("uint8")
    with rasterio.open(folder / "palette.tif", "w", count=1, dtype="uint8", **size) as file:
        file.write(grey)
        file.write_colormap(1, {n: (n, 255 - n, 0, 255) for n in range(256)})
    size |= placed
    with rasterio.open(folder / "<b>16 bit.tif", "w", count=5, dtype="uint16", **size) as file:
        file.write(np.repeat(grey, 5, axis=0).astype("uint16") * 200)
    with rasterio.open(folder / "Höhe.tif", "w", count=1, dtype="float32", **size) as file:
        file.write(grey.astype("float32"))
    url = tmp_path / "a.zarr"
    result = run("ingest", folder, "--archive", url, "--workers", 0, "--json")
    assert result.code == 0, result.err
    path = url / KEY
    found = {item["id"]: item for item in items(rows_of(Archive.open(url)))}
    assert found.keys() == {"palette.tif", "<b>16 bit.tif", "Höhe.tif"}
    for item in (*found.values(), *by_rustac(path), *by_stac_geoparquet(path)):
        validate(item)
    assert found["<b>16 bit.tif"]["assets"]["data"]["data_type"] == "uint16"
    assert len(found["<b>16 bit.tif"]["assets"]["data"]["bands"]) == 5
    assert found["palette.tif"]["geometry"] is None
    assert found["Höhe.tif"]["properties"]["gsd"] == pytest.approx(0.5)
    assert set(collections(rows_of(Archive.open(url)))) == {"odd flight #1"}


def test_an_index_without_images(tmp_path: Path) -> None:
    archive = Archive.create(tmp_path / "a.zarr")
    assert write_index(archive) == 0
    assert by_rustac(tmp_path / "a.zarr" / KEY) == []


def test_records_of_earlier_releases_have_no_camera() -> None:
    record = make_record("a.JPG", georef=place(5e5, 3.2e6))
    (item,) = items(to_rows([(ImageEntry("f", "a.JPG", "flights/f/a.JPG", record), None)]))
    validate(item)
    assert not [name for name in item["properties"] if name.startswith(("view:", "pers:"))]
