"""The page of `archive serve` in a browser: Debian's Chromium, by Playwright."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pytest
import rasterio
from conftest import HEIGHT, WIDTH, command_line, make_flight
from numpy.typing import NDArray
from PIL import Image
from pyproj import Transformer

import archive_pipeline as ap

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

playwright = pytest.importorskip("playwright.sync_api", reason="the extra dev is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no chromium on this machine", allow_module_level=True)

HOSTILE = '<img src=x onerror="document.title=1">#?%41&+ü.JPG'
LATER = "<b>later#1 %2F"
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def shown(archive: Path, flight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of `flight`, a later flight over the same ground, and two odd images."""
    folder = tmp_path_factory.mktemp("shown")
    url = Path(shutil.copytree(archive, folder / "shown.zarr"))
    later = folder / LATER
    *_, ortho = make_flight(later, 1, WIDTH, HEIGHT, 4)
    ortho.unlink()
    (later / HOSTILE).write_bytes(next(flight.glob("*.JPG")).read_bytes())
    Image.new("RGB", (64, 48), "teal").save(later / "nowhere.png")
    ap.ingest(later, str(url), ratio=16, workers=0)
    return url


@pytest.fixture(scope="module")
def address(shown: Path) -> Iterator[str]:
    yield from served(shown)


def served(archive: Path) -> Iterator[str]:
    """Address of a server in a process of its own."""
    process = subprocess.Popen(
        command_line("serve", "--archive", archive, "--port", 0, "--json"),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Open]:
    """Open the page, and at the end tell of anything that went wrong in it."""
    troubles: list[str] = []
    contexts = []

    def call(fragment: str = "", size: tuple[int, int] = (1280, 800), at: str = address) -> Page:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda m: m.type == "error" and troubles.append(m.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append(dialog.message))
        page.on(
            "request",
            lambda r: r.url.startswith((at, "blob:")) or troubles.append(f"foreign: {r.url}"),
        )
        page.on("response", lambda r: r.status < 400 or troubles.append(f"{r.status} {r.url}"))
        page.goto(at + fragment)
        page.wait_for_selector("html[data-ready]")
        return page

    yield call
    for context in contexts:
        context.close()
    assert troubles == []


def link(image: Any) -> str:
    """An image in the page's address."""
    return f"image={quote(quote(image.flight, safe=''))}/{quote(image.id)}"


def names(page: Page) -> list[str]:
    page.wait_for_selector("#list a, #list .empty")
    return page.locator("#list .name").all_inner_texts()


def on_map(page: Page, lon: float, lat: float) -> tuple[float, float]:
    """Where a place is on the screen, by the address, which tells the map's middle and zoom."""
    page.wait_for_function("() => location.hash.includes('at=')")
    fragment = page.evaluate("new URLSearchParams(location.hash.slice(1)).get('at')")
    centre_lon, centre_lat, zoom = map(float, fragment.split(","))
    box = page.locator("#map").bounding_box()
    assert box is not None
    pixels = 256 * 2**zoom

    def up(degrees: float) -> float:
        return float(np.log(np.tan(np.pi / 4 + np.radians(degrees) / 2)) / (2 * np.pi))

    x = box["x"] + box["width"] / 2 + (lon - centre_lon) / 360 * pixels
    y = box["y"] + box["height"] / 2 - (up(lat) - up(centre_lat)) * pixels
    return x, y


def picture(page: Page, selector: str, box: tuple[int, int, int, int]) -> NDArray[np.float64]:
    """Pixels of the screen, (height, width, 3): a box from an element's middle."""
    at = page.locator(selector).bounding_box()
    assert at is not None
    x, y = round(at["x"] + at["width"] / 2), round(at["y"] + at["height"] / 2)
    clip = {"x": x + box[0], "y": y + box[1], "width": box[2], "height": box[3]}
    shot = Image.open(io.BytesIO(page.screenshot(clip=clip)))  # type: ignore[arg-type]
    return np.asarray(shot.convert("RGB"), np.float64)


def test_a_frame_is_found_on_the_map_and_opened(opened: Open, shown: Path) -> None:
    page = opened()
    assert len(names(page)) == 6
    assert "6 images in 2 flights" in page.inner_text("#totals")
    first = ap.open(shown).images[0]
    assert first.footprint is not None
    lon, lat = np.mean(first.footprint[:4], axis=0)
    for step in range(100):  # until the outlines are there
        x, y = on_map(page, lon, lat)
        page.mouse.move(x + step % 2, y)
        page.wait_for_timeout(100)
        if page.is_visible("#tip"):
            break
    assert page.inner_text("#tip").endswith(".JPG")
    page.mouse.click(*on_map(page, lon, lat))
    page.wait_for_selector("#detail .facts")
    name = page.inner_text("#detail h2")
    assert name in [image.id for image in ap.open(shown).images]
    assert "image=" in page.url
    page.wait_for_function("() => document.querySelector('.preview canvas').width > 16")
    page.go_back()
    page.wait_for_selector("#list a:visible")
    page.go_forward()
    page.wait_for_selector("#detail .facts")
    page.keyboard.press("Escape")
    page.wait_for_selector("#browse:visible")
    assert page.locator("#detail").is_hidden()


def test_search_and_filters(opened: Open) -> None:
    page = opened("#text=nowhere")
    assert names(page) == ["nowhere.png"]
    assert page.input_value("#text") == "nowhere"
    page.fill("#text", "no such name")
    page.wait_for_selector("#list .empty")
    page.click("#list .empty button")
    page.wait_for_selector("#list a")
    assert len(names(page)) == 6
    page.select_option("#flight", LATER)
    page.wait_for_function("() => document.querySelectorAll('#list a').length === 3")
    page.fill("#from", "2031-01-01")
    page.wait_for_selector("#list .empty")
    assert "flight=%3Cb%3Elater" in page.url
    assert "from=2031-01-01" in page.url


def test_names_are_text(opened: Open) -> None:
    page = opened("#text=onerror")
    assert names(page) == [HOSTILE]
    page.click("#list a")
    page.wait_for_selector("#detail .facts")
    assert page.inner_text("#detail h2") == HOSTILE
    page.keyboard.press("c")
    page.wait_for_selector("#compare:visible")
    page.wait_for_selector("#compare .busy", state="hidden")
    assert page.inner_text("#compare h2") == HOSTILE
    assert page.locator("b", has_text="later").count() == 0
    assert page.locator("img").count() == 0
    assert page.title() != "1"


def test_the_original_against_the_restored(opened: Open, shown: Path) -> None:
    image = next(i for i in ap.open(shown).images if i.flight == LATER and i.id.startswith("DJI"))
    # pixels as they are, around the middle, which is where the screen's is
    page = opened(f"#{link(image)}&mode=compare&px={WIDTH / 2},{HEIGHT / 2},1")
    handle = page.locator("#compare [role=slider]")
    handle.wait_for()
    assert handle.get_attribute("aria-valuenow") == "50"
    page.wait_for_selector("#compare .busy", state="hidden")
    box = (64, -64, 128, 96)
    row, col = HEIGHT // 2 + box[1], WIDTH // 2 + box[0]
    area = slice(row, row + box[3]), slice(col, col + box[2])
    with rasterio.open(shown.parent / LATER / image.id) as file:
        original = file.read().transpose(1, 2, 0).astype(np.float64)[area]
    restored = np.asarray(image.read().values, np.float64)[area]
    seen = {}
    for key, side in (("End", "original"), ("Home", "restored")):
        handle.focus()
        page.keyboard.press(key)
        page.wait_for_timeout(500)
        seen[side] = picture(page, "#compare .canvas", box)
    assert handle.get_attribute("aria-valuenow") == "0"
    assert handle.get_attribute("aria-valuetext").startswith("0 % Original")  # type: ignore[union-attr]

    # each side shows its own pixels, as they are
    assert np.abs(original - restored).mean() > 1
    np.testing.assert_array_equal(seen["original"], original)
    np.testing.assert_array_equal(seen["restored"], restored)
    page.keyboard.press("Escape")
    page.wait_for_selector("#compare", state="hidden")


def test_a_box_is_drawn_and_downloaded(opened: Open, shown: Path, tmp_path: Path) -> None:
    page = opened()
    page.keyboard.press("b")
    page.wait_for_selector("#card:visible")
    footprint = ap.open(shown).images[0].footprint
    assert footprint is not None
    lon, lat = np.mean(footprint[:4], axis=0)
    x, y = on_map(page, lon, lat)
    page.mouse.move(x - 30, y - 20)
    page.mouse.down()
    page.mouse.move(x + 10, y + 10)
    page.mouse.move(x + 30, y + 20)
    page.mouse.up()
    page.wait_for_function("() => location.hash.includes('bbox=')")
    bbox = page.evaluate("new URLSearchParams(location.hash.slice(1)).get('bbox')")
    west, south, east, north = map(float, bbox.split(","))
    assert west < lon < east
    assert south < lat < north
    page.wait_for_selector("#card .button:not([disabled])")
    with page.expect_download() as mosaic:
        page.click("#card .button.first")
    mosaic.value.save_as(tmp_path / "page.tif")
    ap.restore(str(shown), bbox=(west, south, east, north), mosaic=True, output=tmp_path / "cli")
    with (
        rasterio.open(tmp_path / "page.tif") as ours,
        rasterio.open(tmp_path / "cli" / "mosaic.tif") as theirs,
    ):
        assert ours.crs == theirs.crs
        assert ours.transform == theirs.transform
        np.testing.assert_array_equal(ours.read(), theirs.read())
    page.wait_for_function(
        "() => document.querySelector('#card [role=status]:last-child') !== null"
    )
    with page.expect_download() as frames:
        page.click("#card .button:not(.first)")
    with zipfile.ZipFile(str(frames.value.path())) as zipped:
        assert zipped.testzip() is None
        assert all(Image.open(zipped.open(n)).format == "JPEG" for n in zipped.namelist())
        assert len(zipped.namelist()) >= 1


def test_detections_lie_where_the_transform_puts_them(opened: Open, shown: Path) -> None:
    image = next(i for i in ap.open(shown).images if i.flight == "beach")
    assert image.crs is not None
    assert image.transform is not None
    a, b, c, d, e, f = image.transform
    to_degrees = Transformer.from_crs(image.crs, 4326, always_xy=True)
    page = opened()
    for col, row in ((0, 0), (WIDTH, 0), (200, 250), (WIDTH, HEIGHT)):
        found = page.evaluate(
            """async ([path, col, row]) => {
                const { pixelsToMap } = await import("/page/selected.js");
                const image = await (await fetch(path)).json();
                return ol.proj.toLonLat(pixelsToMap(image)(col, row));
            }""",
            [f"/flights/{image.flight}/images/{image.id}", col, row],
        )
        expected = to_degrees.transform(a * col + b * row + c, d * col + e * row + f)
        assert found == pytest.approx(expected, abs=2e-7)  # 2 cm


def test_two_flights_below_a_swipe(opened: Open) -> None:
    page = opened("#mode=dates")
    handle = page.locator("#stage > .swipe [role=slider]")
    handle.wait_for()
    assert page.locator(".side.left").inner_text().startswith(("beach", LATER))
    assert "left=" in page.url
    handle.focus()
    page.keyboard.press("Shift+ArrowLeft")
    assert handle.get_attribute("aria-valuenow") == "40"
    page.keyboard.press("Escape")
    handle.wait_for(state="detached")


def test_a_phone_scrolls_one_way(opened: Open, shown: Path) -> None:
    image = ap.open(shown).images[0]
    page = opened("", (390, 844))
    name = link(image)
    for fragment, ready in (
        ("", "#list a"),
        ("mode=dates", "#card select"),
        ("mode=box", "#card .button"),
        (name, "#detail .facts"),
        (f"{name}&mode=compare", "#compare .canvas"),
    ):
        page.evaluate("fragment => (location.hash = fragment)", fragment)
        page.wait_for_selector(f"{ready}:visible")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        beyond = page.evaluate(
            """[...document.querySelectorAll("body *")].filter((node) => {
                const { right, width } = node.getBoundingClientRect();
                return width > 0 && right > 391 && !node.closest(".hidden, #map, .canvas");
            }).map((node) => node.outerHTML.slice(0, 80))"""
        )
        assert beyond == [], fragment
        if fragment == "mode=box":  # both downloads can be pressed as soon as the box is drawn
            box = page.locator("#card .button").last.bounding_box()
            assert box is not None
            assert box["y"] + box["height"] <= 844


def test_what_is_not_there_is_told(opened: Open, browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.goto(f"{address}#image=beach/no-such.JPG")
    page.wait_for_selector("#detail [role=alert]")
    assert "not in the archive" in page.inner_text("#detail [role=alert]")
    page.close()


def test_an_archive_without_positions(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (96, 64), "olive").save(tmp_path / "photos" / "one.png")
    ap.ingest(tmp_path / "photos", str(tmp_path / "p.zarr"), workers=0)
    for at in served(tmp_path / "p.zarr"):
        page = opened(at=at)
        assert names(page) == ["one.png"]
        assert "tells where it was taken" in page.inner_text("#map-note")
        page.click("#list a")
        page.wait_for_selector("#detail .facts")
        page.close()


def test_a_busy_server_is_asked_again(opened: Open, browser: Browser, address: str) -> None:
    page = browser.new_page()
    busy: list[Any] = []

    def answer(route: Any) -> None:
        busy.append(route)
        if len(busy) < 4:
            body = json.dumps({"detail": "the server is busy"})
            route.fulfill(status=503, headers={"Retry-After": "0"}, body=body)
        else:
            route.continue_()

    page.route("**/images?*", answer)
    page.goto(address)
    page.wait_for_function("() => document.querySelector('#notice').textContent.includes('busy')")
    page.wait_for_selector("#list a")
    assert page.inner_text("#notice") == ""
    page.close()
