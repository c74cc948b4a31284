"""`archive serve`: lists, images and windows over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import Run, command_line
from fastapi.testclient import TestClient

import archive_pipeline as ap
from archive_pipeline.serving.app import make_app
from archive_pipeline.serving.options import ServeOptions

LOCAL = "http://127.0.0.1:8000"


def client_of(archive: Path | str, **options: object) -> TestClient:
    app = make_app(ServeOptions(str(archive), **options))  # type: ignore[arg-type]
    return TestClient(app, base_url=LOCAL, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(archive: Path) -> Iterator[TestClient]:
    with client_of(archive) as client:
        yield client


def test_lists(client: TestClient, archive: Path) -> None:
    told = client.get("/api").json()
    assert (told["images"], told["flights"], told["background"]) == (3, 1, None)
    west, south, east, north = told["bounds"]
    assert west < east
    assert south < north
    (flight,) = client.get("/flights").json()
    assert (flight["id"], flight["images"], flight["bounds"]) == ("beach", 3, told["bounds"])
    listed = client.get("/flights/beach/images").json()
    assert listed == client.get("/images").json()
    images = ap.open(archive).images
    assert [image["id"] for image in listed["images"]] == [image.id for image in images]
    assert (listed["matched"], listed["next"]) == (3, None)
    assert listed["images"][0]["footprint"]["type"] == "Polygon"
    assert flight["archive_bytes"] == sum(image["archive_bytes"] for image in listed["images"])


@pytest.fixture
def served(archive: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Address of a server in a process of its own."""
    process = subprocess.Popen(
        command_line("serve", "--archive", archive, "--port", 0, "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.stderr and process.stderr.read()
        yield json.loads(line)["url"], process
    finally:
        process.terminate()
        assert process.wait(timeout=20) == 0


def get(url: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_server_ends_while_it_works(served: tuple[str, subprocess.Popen[str]]) -> None:
    url, process = served
    place = urlsplit(url)
    assert place.hostname is not None
    with socket.create_connection((place.hostname, place.port or 0)) as connection:
        path = b"GET /flights/beach/images/DJI_0001.JPG/file.tif HTTP/1.1"
        connection.sendall(path + b"\r\nHost: 127.0.0.1\r\n\r\n")
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=20) == 0
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()


def test_what_cannot_be_served_is_told_in_one_line(command: Run, archive: Path) -> None:
    for args, code in (
        (("--archive", archive.with_name("none.zarr")), 1),
        (("--archive", archive, "--originals", archive.with_name("none")), 1),
        (("--archive", archive, "--host", "300.300.300.300"), 1),
        (("--archive", archive, "--port", 70000), 2),
        (("--archive", archive, "--background", "https://tiles.example/;x{z}{x}"), 2),
    ):
        done = command("serve", *args)
        assert done.code == code, done.err
        assert "Traceback" not in done.err
        assert done.err.splitlines()[-1].startswith("Error: ")


def test_a_server_starts_and_ends(served: tuple[str, subprocess.Popen[str]]) -> None:
    url, process = served
    assert json.loads(get(f"{url}api")[1])["images"] == 3
    assert get(f"{url}api", Host="evil.example")[0] == 421
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""
