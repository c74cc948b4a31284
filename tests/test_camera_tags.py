"""What cameras write of themselves, maker by maker, against an independent calculation."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from conftest import Run
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import IFDRational
from pyproj import Geod, Proj
from rasterio.transform import from_origin
from test_odd_files import jpeg

from archive_pipeline.flight.camera_dialects import DIALECTS
from archive_pipeline.flight.camera_tags import read_pose
from archive_pipeline.flight.placing import Ground
from archive_pipeline.flight.read import read_source
from archive_pipeline.flight.source_image import SourceImage
from archive_pipeline.flight.xmp import EXTENDED_PREFIX, Xmp, read_xmp, xmp_packet
from archive_pipeline.geo.camera import camera_georef, field_of_view_pitch, locate
from archive_pipeline.geo.georef import Georef
from archive_pipeline.geo.mapping import bbox_to_window, pixel_mapping
from archive_pipeline.geo.pose import CameraPose
from archive_pipeline.geo.terrain import Terrain

LON, LAT, HEIGHT = 8.5, 47.5, 120.0
WIDTH, HEIGHT_PX, FOCAL_35 = 200, 150, 24.0
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
URIS = {
    "drone-dji": "http://www.dji.com/drone-dji/1.0/",
    "drone": "http://www.autelrobotics.com/drone/1.0/",
    "drone-yuneec": "http://www.yuneec.com/drone-yuneec/1.0/",
    "drone-parrot": "http://www.parrot.com/drone-parrot/1.0/",
    "drone-skydio": "https://www.skydio.com/drone-skydio/1.0/",
    "Camera": "http://pix4d.com/camera/1.0",
    "Sense": "http://ns.sensefly.com/Camera/1.0/",
    "exif": "http://ns.adobe.com/exif/1.0/",
}


def packet(properties: dict[str, str], form: str = "attributes") -> bytes:
    """XMP with properties, as attributes or elements; a `/` makes a structure."""
    declared = " ".join(f'xmlns:{prefix}="{uri}"' for prefix, uri in URIS.items())
    plain = {k: v for k, v in properties.items() if "/" not in k}
    parts: dict[str, str] = {}
    for key, value in properties.items():
        outer, _, inner = key.partition("/")
        if inner:
            prefix = outer.partition(":")[0]
            parts[outer] = parts.get(outer, "") + f"<{prefix}:{inner}>{value}</{prefix}:{inner}>"
    inside = "".join(f'<{k} rdf:parseType="Resource">{v}</{k}>' for k, v in parts.items())
    attributes = ""
    if form == "attributes":
        attributes = " ".join(f'{k}="{v}"' for k, v in plain.items())
    else:
        inside += "".join(f"<{k}>{v}</{k}>" for k, v in plain.items())
    return (
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{RDF}"><rdf:Description '
        f'rdf:about="" {declared} {attributes}>{inside}</rdf:Description></rdf:RDF></x:xmpmeta>'
    ).encode()


def xmp(properties: dict[str, str], form: str = "attributes") -> Xmp:
    return read_xmp([("XMP", packet(properties, form))])


def exif(
    lat: float | None = LAT, gps: dict[int, Any] | None = None, make: str = "Maker", **detail: Any
) -> bytes:
    block = Image.Exif()
    block[0x010F], block[0x0110] = make, "Model"
    names = {"focal_35": 0xA405, "focal": 0x920A, "zoom": 0xA404, "plane": 0xA20E, "unit": 0xA210}
    found = {"focal_35": 24, **detail}
    block.get_ifd(0x8769).update({names[k]: v for k, v in found.items() if v is not None})
    if lat is not None:
        degrees = {2: (47.0, 30.0, 0.0), 4: (8.0, 30.0, 0.0)}
        block.get_ifd(0x8825).update({1: "N", 3: "E", **degrees})
    for tag, value in (gps or {}).items():
        if value is None:
            del block.get_ifd(0x8825)[tag]
        else:
            block.get_ifd(0x8825)[tag] = value
    return block.tobytes()


def turned(yaw: float, pitch: float, roll: float) -> NDArray[np.float64]:
    """Rotation by yaw, pitch and roll about down, right and forward: columns are the axes."""
    y, p, r = np.radians([yaw, pitch, roll])
    about_down = [[np.cos(y), -np.sin(y), 0], [np.sin(y), np.cos(y), 0], [0, 0, 1]]
    about_right = [[np.cos(p), 0, np.sin(p)], [0, 1, 0], [-np.sin(p), 0, np.cos(p)]]
    about_forward = [[1, 0, 0], [0, np.cos(r), -np.sin(r)], [0, np.sin(r), np.cos(r)]]
    return np.array(about_down) @ np.array(about_right) @ np.array(about_forward)


def on_ground(
    axes: NDArray[np.float64], col: float, row: float, size: tuple[int, int] = (WIDTH, HEIGHT_PX)
) -> tuple[float, float]:
    """Longitude and latitude of a pixel; rows of ``axes`` are right, down, forward in NED."""
    width, height = size
    diagonal = math.hypot(36.0, 24.0) / math.hypot(4.0, 3.0) * 4.0 / FOCAL_35 / width
    ray = np.array([(col - width / 2) * diagonal, (row - height / 2) * diagonal, 1.0]) @ axes
    north, east = ray[:2] * HEIGHT / ray[2]
    geod = Geod(ellps="WGS84")
    azimuth = math.degrees(math.atan2(east, north))
    lon, lat, _ = geod.fwd(LON, LAT, azimuth, math.hypot(east, north))
    return lon, lat


YAW, OFF, ROLL = 37.5, 22.0, 3.25
GIMBAL = {"Yaw": YAW, "Pitch": OFF - 90.0, "Roll": ROLL}
BODY = {"Yaw": YAW, "Pitch": OFF, "Roll": ROLL}


def named(prefix: str, form: str, angles: dict[str, float], more: dict[str, Any]) -> dict[str, str]:
    texts = {f"{prefix}:{form.format(name)}": f"{value:+f}" for name, value in angles.items()}
    return {**texts, **{f"{prefix}:{name}": f"{value:+f}" for name, value in more.items()}}


ROWS: dict[str, tuple[str, dict[str, str]]] = {
    "DJI": ("DJI", named("drone-dji", "Gimbal{}Degree", GIMBAL, {"RelativeAltitude": HEIGHT})),
    "Autel": (
        "Autel Robotics",
        named("drone", "Gimbal{}Degree", GIMBAL, {"RelativeAltitude": HEIGHT}),
    ),
    "Yuneec": ("Yuneec", named("drone-yuneec", "Gimbal{}", GIMBAL, {"AboveHomeAltitude": HEIGHT})),
    "Parrot": (
        "Parrot",
        named("drone-parrot", "Camera{}Degree", GIMBAL, {})
        | {"Camera:AboveGroundAltitude": f"{HEIGHT * 2:.0f}/2"},
    ),
    "Skydio": (
        "Skydio",
        named("drone-skydio", "CameraOrientationNED/{}", GIMBAL, {"RelativeAltitude": HEIGHT}),
    ),
    "senseFly": (
        "senseFly",
        named("Sense", "{}", {**BODY, "Roll": -ROLL}, {"AboveGroundAltitude": HEIGHT}),
    ),
    "Pix4D": ("Sentera", named("Camera", "{}", BODY, {"AboveGroundAltitude": HEIGHT})),
}


def test_every_row_has_a_frame() -> None:
    assert list(ROWS) == [dialect.name for dialect in DIALECTS]


@pytest.mark.parametrize("form", ["attributes", "elements"])
@pytest.mark.parametrize("name", ROWS)
def test_a_frame_of_every_row_lies_where_it_was_taken(name: str, form: str) -> None:
    make, properties = ROWS[name]
    camera, _ = read_pose(exif(make=make), xmp(properties, form))
    assert camera is not None
    assert camera.dialect == name
    assert camera.warnings == ()
    assert camera.yaw_deg == pytest.approx(YAW, abs=0.01)
    georef = camera_georef(camera, WIDTH, HEIGHT_PX)
    forward, right, down = (
        turned(YAW, OFF, ROLL).T
        if name in ("senseFly", "Pix4D")
        else turned(YAW, OFF - 90.0, ROLL).T
    )
    axes = [right, -forward, down] if name in ("senseFly", "Pix4D") else [right, down, forward]
    utm = Proj(georef.crs)
    forward_map = pixel_mapping(georef, inverse=False)
    for col, row in ((0, 0), (WIDTH, 0), (WIDTH, HEIGHT_PX), (0, HEIGHT_PX), (70, 120)):
        x, y = forward_map(np.array([col]), np.array([row]))
        expected = utm(*on_ground(np.array(axes), col, row))
        assert math.dist((x[0], y[0]), expected) < 0.01


def test_angles_of_nobody_known_are_named() -> None:
    unknown = packet({"Camera:BandName": "Red"}).replace(b"Camera:BandName", b"my:CameraYaw")
    unknown = unknown.replace(
        b"<rdf:Description", b'<rdf:Description xmlns:my="http://new.example/"'
    )
    camera, _ = read_pose(exif(), read_xmp([("XMP", unknown)]))
    assert camera is not None
    assert camera.yaw_deg is None
    assert camera.warnings == (
        "angles of an unknown dialect of XMP are not read (http://new.example)",
    )


def test_a_hemisphere_that_exif_lacks_is_in_xmp() -> None:
    bare = {1: None, 3: None}
    signed = {"drone-dji:GpsLatitude": "-47.5", "drone-dji:GpsLongtitude": "-8.5"}
    camera, _ = read_pose(exif(gps=bare), xmp(signed))
    assert camera is not None
    assert (camera.lon, camera.lat, camera.warnings) == (-8.5, -47.5, ())
    camera, _ = read_pose(exif(gps=bare))
    assert camera is not None
    assert (camera.lon, camera.lat) == (8.5, 47.5)
    assert camera.warnings == ("GPS has no hemisphere: north and east are assumed",)
    camera, _ = read_pose(exif(), xmp(signed))
    assert camera is not None
    assert (camera.lon, camera.lat) == (8.5, 47.5)
    assert "m apart" in camera.warnings[0]


@pytest.mark.parametrize(
    "properties",
    [
        {"drone-dji:GpsLatitude": "-33.9", "drone-dji:GpsLongitude": "-70.6"},
        {"drone-skydio:Latitude": "-33.9", "drone-skydio:Longitude": "-70.6"},
        {"exif:GPSLatitude": "33,54.0S", "exif:GPSLongitude": "70,36,0W"},
    ],
)
def test_a_position_that_only_xmp_has(properties: dict[str, str]) -> None:
    camera, _ = read_pose(exif(lat=None), xmp(properties))
    assert camera is not None
    assert (camera.lon, camera.lat) == pytest.approx((-70.6, -33.9))


def rational(value: float) -> IFDRational:
    return IFDRational(round(value * 10**6), 10**6)


# A RedEdge: 5.4 mm, 266.666667 pixels a mm at 1280 pixels (3.75 micrometres).
RED_EDGE = {"focal_35": None, "focal": rational(5.4), "plane": rational(266.666667), "unit": 4}


def test_field_of_view_by_the_focal_plane() -> None:
    camera, _ = read_pose(exif(**RED_EDGE))
    assert camera is not None
    assert field_of_view_pitch(camera, 1280, 960) == pytest.approx(0.00375 / 5.4, rel=1e-6)
    inches = {"plane": rational(266.666667 * 25.4), "unit": 2}
    camera, _ = read_pose(exif(**{**RED_EDGE, **inches}))
    assert camera is not None
    assert field_of_view_pitch(camera, 1280, 960) == pytest.approx(0.00375 / 5.4, rel=1e-6)


def test_calibration_holds_as_long_as_it_is_of_this_image() -> None:
    calibrated = {
        "drone-dji:CalibratedFocalLength": "140.0",
        "drone-dji:CalibratedOpticalCenterX": "103.0",
        "drone-dji:CalibratedOpticalCenterY": "74.0",
    }
    camera, _ = read_pose(exif(), xmp(calibrated))
    assert camera is not None
    assert field_of_view_pitch(camera, WIDTH, HEIGHT_PX) == 1 / 140.0
    assert camera.centre_px == (103.0, 74.0)
    assert field_of_view_pitch(camera, WIDTH * 2, HEIGHT_PX * 2) != 1 / 140.0


def test_digital_zoom_counts_once() -> None:
    # A lens of 24 mm equivalent and a zoom of 2: some write 48 mm of it, some 24.
    pitch = 34.613 / 24 / 1280
    lens = {"focal": rational(5.4), "plane": rational(1 / (5.4 * pitch)), "unit": 4}
    for written in (48, 24):
        camera, _ = read_pose(exif(**lens, focal_35=written, zoom=rational(2.0)))
        assert camera is not None
        assert field_of_view_pitch(camera, 1280, 960) == pytest.approx(pitch / 2, rel=1e-4)


def test_accuracy_and_datum_are_kept_as_they_are_written() -> None:
    rtk = {"RtkFlag": "50", "RtkStdLon": "0.01200", "RtkStdHgt": "0.03", "AltitudeType": "RtkAlt"}
    camera, _ = read_pose(exif(), xmp({f"drone-dji:{k}": v for k, v in rtk.items()}))
    assert camera is not None
    assert camera.survey == rtk
    again = CameraPose.from_json(camera.to_json())
    assert again == camera


def frame(folder: Path, properties: dict[str, str], **tags: Any) -> SourceImage:
    jpeg(folder / "a.jpg", exif(**tags), packet(properties))
    return read_source(folder / "a.jpg", "a.jpg")


def test_a_frame_without_height_is_still_somewhere(tmp_path: Path) -> None:
    source = frame(tmp_path, {})
    georef = source.georef
    assert georef == Georef(footprint=((8.5, 47.5),) * 4, method="point")
    assert not georef.is_mapped
    assert any("no height above ground" in warning for warning in source.warnings)
    whole = (0, 0, source.width, source.height)
    box = (8.4, 47.4, 8.6, 47.6)
    assert bbox_to_window(georef, source.width, source.height, box) == whole
    assert bbox_to_window(georef, source.width, source.height, (8.6, 47.4, 8.7, 47.6)) is None
    metres = (450000.0, 5250000.0, 470000.0, 5270000.0)
    assert bbox_to_window(georef, source.width, source.height, metres, "EPSG:32632") == whole


def test_info_and_boxes_know_the_place(tmp_path: Path, run: Run) -> None:
    folder, archive = tmp_path / "f", tmp_path / "a.zarr"
    folder.mkdir()
    frame(folder, {})
    run("ingest", folder, "--archive", archive, "--workers", 0, "--ratio", 8)
    for _ in range(2):  # from records, then from the index
        result = run("info", "--archive", archive, "--json")
        (image,) = result.json["flights"][0]["images"]
        assert image["footprint"] == [[8.5, 47.5]] * 4
        assert run("check", "--archive", archive, "--repair").code == 0
    assert "extent unknown" in run("info", "--archive", archive).out
    args = ("restore", "--archive", archive, "--workers", 0, "--json", "-o", tmp_path / "o")
    result = run(*args, "--bbox", 8.4, 47.4, 8.6, 47.6)
    (file,) = result.json["files"]
    assert (file["window"], file["crs"]) == ([0, 0, 200, 150], None)
    assert run(*args, "--bbox", 8.6, 47.4, 8.7, 47.6).json["files"] == []
    index = geopandas.read_parquet(archive / "items.parquet")
    assert list(index.geometry) == [shapely.Point(8.5, 47.5)]


def dem(path: Path, slope: float, crs: str = "EPSG:32632") -> Path:
    """A plane that rises to the north, 400 m high at the camera."""
    x, y = Proj(crs)(LON, LAT)
    side = 800
    rows = np.arange(side)[:, None] * np.ones(side)
    heights = 400.0 + slope * (side / 2 - 0.5 - rows)
    with rasterio.open(
        path, "w", driver="GTiff", width=side, height=side, count=1, dtype="float32", crs=crs,
        transform=from_origin(x - side / 2, y + side / 2, 1.0, 1.0),
    ) as out:  # fmt: skip
        out.write(heights.astype("float32"), 1)
    return path


def test_rays_meet_the_ground(tmp_path: Path) -> None:
    terrain = Terrain(str(dem(tmp_path / "dem.tif", 0.2)))
    camera = CameraPose(LON, LAT, None, HEIGHT, 0.0, -60.0, 0.0, FOCAL_35)
    georef, _ = locate(camera, WIDTH, HEIGHT_PX, terrain=terrain)
    x, y = Proj("EPSG:32632")(LON, LAT)
    forward, right, down = turned(0.0, -60.0, 0.0).T
    for row, col, gx, gy, gz, *_ in georef.gcps:
        flat = on_ground(np.array([right, down, forward]), col, row)
        east, north = np.array(Proj("EPSG:32632")(*flat)) - [x, y]
        # along the ray from the camera: height falls, and the plane rises
        share = HEIGHT / (HEIGHT + 0.2 * north)
        assert math.dist((gx, gy), (x + east * share, y + north * share)) < 0.05
        assert gz == pytest.approx(400.0 + 0.2 * north * share, abs=0.05)


def test_a_dem_gives_height_and_says_what_moved(tmp_path: Path) -> None:
    path = dem(tmp_path / "dem.tif", 0.3)
    block = exif(gps={5: b"\0", 6: rational(520.0)})
    angles = {"drone-dji:GimbalPitchDegree": "-90", "drone-dji:GimbalYawDegree": "0"}
    jpeg(tmp_path / "a.jpg", block, packet(angles))
    source = read_source(tmp_path / "a.jpg", "a.jpg", Ground(terrain=Terrain(str(path))))
    assert source.georef.method == "camera"
    (said,) = source.warnings
    assert said.startswith("terrain moved corners by ")
    transform = source.georef.transform
    assert transform is not None
    # 120 m above ground
    assert abs(transform[0]) * WIDTH == pytest.approx(HEIGHT * 34.613 / FOCAL_35, rel=0.03)


def test_xmp_in_parts_arrays_and_broken_packets() -> None:
    bag = packet({}).replace(
        b"</rdf:Description>",
        b"<Camera:BandName><rdf:Seq><rdf:li>Red</rdf:li><rdf:li>NIR</rdf:li></rdf:Seq>"
        b"</Camera:BandName></rdf:Description>",
    )
    assert read_xmp([("XMP", bag)]).values["http://pix4d.com/camera/1.0", "BandName"] == (
        "Red", "NIR",
    )  # fmt: skip
    more = packet({"Camera:Yaw": "12"})
    head = EXTENDED_PREFIX + b"1" * 32 + len(more).to_bytes(4, "big")
    parts = [
        ("APP1", head + (100).to_bytes(4, "big") + more[100:]),
        ("APP1", head + (0).to_bytes(4, "big") + more[:100]),
    ]
    found = read_xmp([("XMP", bag), *parts])
    assert not found.damaged
    assert found.text("http://pix4d.com/camera/1.0", "Yaw") == "12"
    assert read_xmp([("XMP", xmp_packet([("XMP", bag), *parts]))]).values == found.values
    broken = packet({"drone-dji:RelativeAltitude": "+10.5"})[:-30]
    damaged = read_xmp([("XMP", broken)])
    assert damaged.damaged
    assert damaged.text("http://www.dji.com/drone-dji/1.0", "RelativeAltitude") == "+10.5"
    bomb = b'<!DOCTYPE a [<!ENTITY b "bbbb">]>' + packet({"Camera:Yaw": "&b;"})
    assert read_xmp([("XMP", bomb)]).damaged


def test_a_frame_in_png_has_its_xmp_too() -> None:
    coded = io.BytesIO()
    Image.new("RGB", (8, 8)).save(coded, "PNG")
    text = packet({"drone-dji:RelativeAltitude": "7"})
    chunk = b"XML:com.adobe.xmp\0\0\0\0\0" + text
    found = read_xmp([("iTXt", chunk)])
    assert found.text("http://www.dji.com/drone-dji/1.0", "RelativeAltitude") == "7"


@pytest.mark.parametrize("boxed", [False, True])
def test_an_oblique_frame_north_up(boxed: bool, tmp_path: Path, run: Run) -> None:
    folder, archive = tmp_path / "f", tmp_path / "a.zarr"
    folder.mkdir()
    cols, rows = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT_PX))
    ramp = np.stack([cols, rows, np.full_like(cols, 99)], axis=-1).astype(np.uint8)
    angles = {"Yaw": 30.0, "Pitch": -45.0, "Roll": 0.0}
    tags = named("drone-dji", "Gimbal{}Degree", angles, {"RelativeAltitude": HEIGHT})
    Image.fromarray(ramp).save(
        folder / "a.jpg", quality=100, subsampling=0, exif=exif(), xmp=packet(tags)
    )
    run("ingest", folder, "--archive", archive, "--workers", 0, "--bpp", 12)
    forward, right, down = turned(30.0, -45.0, 0.0).T
    axes = np.array([right, down, forward])
    args = ["restore", "--archive", archive, "--ortho", "-o", tmp_path / "o", "--json"]
    if boxed:
        lon, lat = on_ground(axes, WIDTH / 2, HEIGHT_PX / 2)
        args += ["--bbox", lon - 9e-4, lat - 6e-4, lon + 9e-4, lat + 6e-4]
    (file,) = run(*args).json["files"]
    with rasterio.open(file["path"]) as dataset:
        assert (dataset.transform.b, dataset.transform.d) == (0.0, 0.0)
        pixels, shown = dataset.read(), dataset.dataset_mask() > 0
        inverse, utm = ~dataset.transform, Proj(dataset.crs)
    errors = []
    for col in range(10, WIDTH, 20):
        for row in range(10, HEIGHT_PX, 10):
            x, y = utm(*on_ground(axes, col + 0.5, row + 0.5))
            u, v = (int(value) for value in inverse @ (x, y))
            if 0 <= v < shown.shape[0] and 0 <= u < shown.shape[1] and shown[v, u]:
                errors.append(np.abs(pixels[:2, v, u].astype(float) - [col, row]).max())
    assert len(errors) > (10 if boxed else 60)
    # a level is a pixel of the frame; its share of rounding and coding is under one
    assert np.quantile(errors, 0.9) < 1.5
