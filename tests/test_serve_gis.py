"""GDAL, and QGIS where it is installed, read what `archive serve` offers to GIS."""

from __future__ import annotations

import json
import subprocess
import urllib.request
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import Run
from rasterio.enums import Resampling
from rasterio.transform import from_bounds
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform
from test_serve import served  # noqa: F401  a fixture

QGIS_PYTHON = "/usr/bin/python3"  # the one that Debian's PyQGIS is for
TMS = """<GDAL_WMS><Service name="TMS"><ServerUrl>{tiles}</ServerUrl></Service>
<DataWindow><UpperLeftX>-20037508.342789244</UpperLeftX><UpperLeftY>20037508.342789244</UpperLeftY>
<LowerRightX>20037508.342789244</LowerRightX><LowerRightY>-20037508.342789244</LowerRightY>
<TileLevel>{zoom}</TileLevel><TileCountX>1</TileCountX><TileCountY>1</TileCountY>
<YOrigin>top</YOrigin></DataWindow><Projection>EPSG:3857</Projection>
<BlockSizeX>256</BlockSizeX><BlockSizeY>256</BlockSizeY><BandsCount>4</BandsCount></GDAL_WMS>"""
QGIS = """
import json, sys
from qgis.core import (QgsApplication, QgsCoordinateReferenceSystem, QgsMapRendererParallelJob,
    QgsMapSettings, QgsRasterLayer, QgsRectangle)
from qgis.PyQt.QtCore import QSize
source, provider, box, out = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
QgsApplication.setPrefixPath("/usr", True)
app = QgsApplication([], False)
app.initQgis()
layer = QgsRasterLayer(source, "layer", provider)
assert layer.isValid(), layer.error().summary()
settings = QgsMapSettings()
settings.setLayers([layer])
settings.setDestinationCrs(QgsCoordinateReferenceSystem("EPSG:3857"))
settings.setExtent(QgsRectangle(*box))
settings.setOutputSize(QSize(256, 256))
job = QgsMapRendererParallelJob(settings)
job.start()
job.waitForFinished()
assert job.renderedImage().save(out)
print(layer.crs().authid())
"""


def box_of(url: str) -> tuple[float, ...]:
    """A box of 8 units in the middle of what is served, in Web Mercator."""
    west, south, east, north = json.load(urllib.request.urlopen(f"{url}api"))["bounds"]
    x, y = transform("EPSG:4326", "EPSG:3857", [(west + east) / 2], [(south + north) / 2])
    return x[0] - 4, y[0] - 4, x[0] + 4, y[0] + 4


def mosaic_of(archive: Path, run: Run, folder: Path, box: tuple[float, ...]) -> np.ndarray:
    """The box as `restore --mosaic` has it, uint8 (3, 256, 256)."""
    done = run("restore", "--archive", archive, "-o", folder, "--mosaic")
    assert done.code == 0
    options: dict[str, Any] = {"crs": "EPSG:3857", "width": 256, "height": 256}
    options["transform"] = from_bounds(*box, 256, 256)
    with (
        rasterio.open(folder / "mosaic.tif") as file,
        WarpedVRT(file, resampling=Resampling.bilinear, **options) as warped,
    ):
        values: np.ndarray = warped.read((1, 2, 3))
        return values


def alike(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of two pictures."""
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def test_gdal_opens_the_layers(
    served: tuple[str, object],  # noqa: F811
    archive: Path,
    run: Run,
    tmp_path: Path,
) -> None:
    url, _ = served
    box = box_of(url)
    true = mosaic_of(archive, run, tmp_path, box)
    tiles = f"{url}flights/beach/tiles/${{z}}/${{x}}/${{y}}.png"
    for source in (
        f"WMTS:{url}WMTSCapabilities.xml,layer=flights/beach",
        f"WMTS:{url}wmts?service=WMTS&request=GetCapabilities,layer=all",
        TMS.format(tiles=tiles, zoom=22),
    ):
        with rasterio.open(source) as layer:
            assert layer.crs.to_epsg() == 3857
            window = layer.window(*box)
            shape = (4, 256, 256)
            seen = layer.read(window=window, out_shape=shape, resampling=Resampling.bilinear)
        assert seen[3].min() == 255
        assert alike(seen[:3], true) > 0.97
        moved = np.roll(seen[:3], 6, 2)
        assert alike(moved, true) < alike(seen[:3], true) - 0.02


def test_capabilities_are_xml(served: tuple[str, object]) -> None:  # noqa: F811
    url, _ = served
    root = ET.fromstring(urllib.request.urlopen(f"{url}WMTSCapabilities.xml").read())
    spaces = {"w": "http://www.opengis.net/wmts/1.0", "o": "http://www.opengis.net/ows/1.1"}
    names = [e.text for e in root.findall("w:Contents/w:Layer/o:Identifier", spaces)]
    assert names == ["all", "flights/beach"]
    matrices = root.findall("w:Contents/w:TileMatrixSet/w:TileMatrix", spaces)
    assert [m.findtext("o:Identifier", None, spaces) for m in matrices] == [
        str(z) for z in range(25)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["wmts", "xyz"])
def test_qgis_opens_the_layers(
    served: tuple[str, object],  # noqa: F811
    archive: Path,
    run: Run,
    tmp_path: Path,
    provider: str,
) -> None:
    found = subprocess.run([QGIS_PYTHON, "-c", "import qgis.core"], capture_output=True)
    if found.returncode:
        pytest.skip("Debian's python3-qgis is not installed")
    url, _ = served
    box = box_of(url)
    source = (
        "contextualWMSLegend=0&crs=EPSG:3857&dpiMode=7&format=image/png&layers=flights/beach"
        f"&styles=default&tileMatrixSet=WebMercatorQuad&url={url}WMTSCapabilities.xml"
        if provider == "wmts"
        else f"type=xyz&zmin=0&zmax=24&url={url}tiles/{{z}}/{{x}}/{{y}}.png"
    )
    out = tmp_path / "seen.png"
    args = [QGIS_PYTHON, "-c", QGIS, source, "wms", json.dumps(box), str(out)]
    env = {"PATH": "/usr/bin:/bin", "QT_QPA_PLATFORM": "offscreen", "HOME": str(tmp_path)}
    done = subprocess.run(args, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "EPSG:3857" in done.stdout
    with rasterio.open(out) as file:
        seen = file.read((1, 2, 3))
    assert alike(seen, mosaic_of(archive, run, tmp_path / "m", box)) > 0.97
