"""The STAC API of `archive serve`: valid, paged, searched by clients, hostile questions refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import command_line
from fastapi.testclient import TestClient
from stac_checks import validate
from test_index import make_record, place, put
from test_serve import LOCAL, client_of
from test_stac import XSS, odd_records

from archive_pipeline.store.archive import Archive
from archive_pipeline.store.index import write_index

MANY = 25
FIELD = 500_000, 3_200_000  # where flight "line" begins, in its CRS
BOX = "-96,28,-90,30"


@pytest.fixture(scope="module")
def odd_url(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of odd images, and of a flight of `MANY`; none has pixels."""
    archive = Archive.create(tmp_path_factory.mktemp("stac") / "a.zarr")
    for flight, record in odd_records().items():
        put(archive, flight, record)
    for n in range(MANY):
        georef = place(FIELD[0] + 4.0 * n, FIELD[1])
        captured = f"2026-05-{n + 1:02}T12:00:00"
        put(archive, "line", make_record(f"DJI_{n:03}.JPG", georef=georef, captured=captured))
    write_index(archive)
    return Path(archive.url)


@pytest.fixture(scope="module")
def client(odd_url: Path) -> Iterator[TestClient]:
    with client_of(odd_url) as client:
        yield client


def pages(client: TestClient, method: str, url: str, body: Any = None) -> Iterator[dict[str, Any]]:
    """All pages of a search, by their links alone."""
    while True:
        answer = client.request(method, url, json=body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("application/geo+json")
        page = answer.json()
        yield page
        following = [link for link in page["links"] if link["rel"] == "next"]
        if not following:
            return
        (link,) = following
        assert link["method"] == method
        url, body = link["href"], link.get("body")


def ids(*found: dict[str, Any]) -> list[str]:
    return [item["id"] for page in found for item in page["features"]]


# ------------------------------------------------------------------------ found


def test_landing_page_leads_everywhere(client: TestClient) -> None:
    landing = client.get("/stac").json()
    validate(landing | {"stac_extensions": []})
    assert client.get("/stac/conformance").json()["conformsTo"] == landing["conformsTo"]
    links = {link["rel"]: link["href"] for link in landing["links"]}
    assert links.keys() >= {"self", "root", "data", "conformance", "search", "service-desc"}
    for rel in ("self", "data", "conformance", "search", "service-desc"):
        assert client.get(links[rel]).status_code == 200, rel
    assert "/stac/search" in client.get(links["service-desc"]).json()["paths"]


def test_every_collection_and_item_is_valid_and_where_its_links_say(client: TestClient) -> None:
    found = client.get("/stac/collections").json()["collections"]
    assert {collection["id"] for collection in found} == {*odd_records(), "line"}
    count = 0
    for collection in found:
        validate(collection)
        links = {link["rel"]: link["href"] for link in collection["links"]}
        assert client.get(links["self"]).json() == collection
        for page in pages(client, "GET", links["items"] + "?limit=10"):
            for item in page["features"]:
                validate(item)
                count += 1
                own = {link["rel"]: link["href"] for link in item["links"]}
                assert client.get(own["self"]).json() == item
                assert own["collection"] == links["self"]
                assert item["collection"] == collection["id"]
    assert count == MANY + len(odd_records())


def test_pages_hold_every_item_once(client: TestClient) -> None:
    expected = [f"DJI_{n:03}.JPG" for n in range(MANY)]
    for method, url, body in (
        ("GET", "/stac/search?collections=line&limit=4", None),
        ("GET", "/items?collections=line&limit=4", None),
        ("GET", "/stac/collections/line/items?limit=4", None),
        ("POST", "/stac/search", {"collections": ["line"], "limit": 4, "strange": {"a": 1}}),
    ):
        found = list(pages(client, method, url, body))
        assert ids(*found) == expected
        assert [page["numberReturned"] for page in found] == [4] * 6 + [1]
        assert {page["numberMatched"] for page in found} == {MANY}
    assert len(ids(client.get("/stac/search?limit=99999").json())) == MANY + len(odd_records())


def test_searches(client: TestClient) -> None:
    def found(**query: Any) -> list[str]:
        by_address = client.get("/stac/search", params={"limit": 100, **query}).json()
        body = {
            name: [float(v) for v in value.split(",")]
            if name == "bbox"
            else value.split(",")
            if name in ("ids", "collections")
            else value
            for name, value in query.items()
        }
        by_body = client.post("/stac/search", json={"limit": 100, **body}).json()
        assert ids(by_address) == ids(by_body)
        return ids(by_address)

    assert set(found(bbox="179.95,-18,-179.9,-16")) == {"a.tif"}
    assert found(bbox=BOX, collections="line,none") == [f"DJI_{n:03}.JPG" for n in range(MANY)]
    assert found(datetime="2026-05-03T00:00:00Z/2026-05-04T23:00:00Z", collections="line") == [
        "DJI_002.JPG",
        "DJI_003.JPG",
    ]
    assert found(datetime="2026-05-25T00:00:00Z/..", collections="line") == ["DJI_024.JPG"]
    assert found(ids="DJI_004.JPG,DJI_001.JPG,other") == ["DJI_001.JPG", "DJI_004.JPG"]
    assert found(collections=XSS) == ["a.JPG"]
    assert found(collections="none") == []
    assert found(bbox="0,0,1,1") == []


def test_intersects(client: TestClient) -> None:
    (item,) = client.get("/stac/search?ids=DJI_010.JPG").json()["features"]
    spot = {"type": "Point", "coordinates": middle(item)}
    body = {"intersects": spot, "collections": ["line"], "limit": 2}
    found = list(pages(client, "POST", "/stac/search", body))
    assert "DJI_010.JPG" in ids(*found)
    assert 1 < len(ids(*found)) < MANY
    assert len(found) > 1
    assert len({page["numberMatched"] for page in found}) == 1


def middle(item: dict[str, Any]) -> list[float]:
    west, south, east, north = item["bbox"]
    return [(west + east) / 2, (south + north) / 2]


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("bbox=1,2,3", 422),
        ("bbox=a,b,c,d", 422),
        ("bbox=nan,0,1,1", 422),
        ("bbox=0,50,1,40", 422),
        ("datetime=yesterday", 422),
        ("datetime=2026-05-05T00:00:00Z/2026-05-01T00:00:00Z", 422),
        ("limit=0", 422),
        ("limit=many", 422),
        (f"token={'x' * 3000}", 422),
        ("token=../../etc", 200),
        ("ids=" + ",".join("x" * 2 for _ in range(1001)), 422),
    ],
)
def test_bad_questions_are_refused_in_one_line(client: TestClient, query: str, status: int) -> None:
    for path in ("/stac/search", "/items"):
        answer = client.get(f"{path}?{query}")
        assert answer.status_code == status, answer.text
        if status != 200:
            assert answer.json().keys() == {"detail"}
            assert "\n" not in answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[",
        b"7",
        b"[]",
        b'{"bbox": [1, 2]}',
        b'{"bbox": ["a", 0, 1, 1]}',
        b'{"bbox": [1e999, 0, 1, 1]}',
        b'{"limit": -1}',
        b'{"ids": "one"}',
        b'{"intersects": {"type": "Point"}}',
        b'{"intersects": {"type": "Polygon", "coordinates": []}}',
        b'{"intersects": {"type": "Point", "coordinates": [0, 0]}, "bbox": [0, 0, 1, 1]}',
        b'{"intersects": {"type": "Polygon", "coordinates": [[[0,0],[1,1],[0,1],[1,0],[0,0]]]}}',
        b"[" * 100_000,
        b'{"ids": ["' + b"x" * 300_000 + b'"]}',
    ],
    ids=lambda body: body[:30].decode(),
)
def test_bad_bodies_are_refused_in_one_line(client: TestClient, body: bytes) -> None:
    answer = client.post("/stac/search", content=body)
    assert answer.status_code == (422 if body else 200), answer.text
    assert body == b"" or answer.json().keys() == {"detail"}


def test_what_is_not_there(client: TestClient) -> None:
    for path in (
        "/stac/collections/none",
        "/stac/collections/none/items",
        "/stac/collections/line/items/none",
        "/stac/collections/line/items/" + quote("../../zarr.json", safe=""),
        f"/stac/collections/{quote(XSS, safe='')}/items/b",
        "/stac/nothing",
    ):
        answer = client.get(path)
        assert (answer.status_code, answer.json().keys()) == (404, {"detail"}), path


def test_who_may_know_where_the_archive_is(odd_url: Path) -> None:
    def data(**options: Any) -> dict[str, Any]:
        with client_of(odd_url, **options) as client:
            (item,) = client.get("/stac/search?ids=DJI_000.JPG").json()["features"]
        return dict(item["assets"])

    assert data()["data"]["href"] == f"{odd_url.as_uri()}/flights/line/DJI_000.JPG"
    others = data(host="0.0.0.0")
    assert others.keys() & {"data", "metadata"} == set()
    assert str(odd_url) not in json.dumps(others)


# ---------------------------------------------------------------------- clients


def test_assets_are_served(archive: Path) -> None:
    with client_of(archive) as client:
        (item, *_) = client.get("/stac/search").json()["features"]
        validate(item)
        for part in ("thumbnail", "geotiff", "jpeg", "tiles"):
            asset = item["assets"][part]
            answer = client.get(asset["href"])
            assert answer.status_code == 200, (part, answer.text)
            told = answer.headers["content-type"].partition(";")[0]
            assert told == asset["type"].partition(";")[0]


def test_pystac_client_searches(odd_url: Path) -> None:
    pystac_client = pytest.importorskip("pystac_client")
    process = subprocess.Popen(
        command_line("serve", "--archive", odd_url, "--port", 0, "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        client = pystac_client.Client.open(
            json.loads(process.stdout.readline())["url"].rstrip("/") + "/stac"
        )
        assert {found.id for found in client.get_collections()} == {*odd_records(), "line"}
        for method in ("GET", "POST"):
            search = client.search(
                method=method, collections=["line"], limit=7, bbox=[-96, 28, -90, 30]
            )
            assert len(list(search.items())) == search.matched() == MANY
            dated = client.search(method=method, datetime="2026-05-03", collections=["line"])
            assert [item.id for item in dated.items()] == ["DJI_002.JPG"]
        flights = {collection.id: collection for collection in client.get_collections()}
        for flight, record in odd_records().items():
            collection = flights[flight]
            (item,) = collection.get_items()
            assert (item.id, collection.id) == (record["id"], flight)
            again = collection.get_item(item.id)
            assert again is not None
            assert (again.id, again.properties) == (item.id, item.properties)
    finally:
        process.kill()
        process.wait()


def test_links_are_of_the_address_that_was_asked(client: TestClient) -> None:
    assert client.get("/stac").json()["links"][0]["href"] == f"{LOCAL}/stac"
