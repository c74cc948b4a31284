"""Names of classes and attribute tables beside a raster come back with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from conftest import Run
from test_outputs import whole

from archive_pipeline.flight.classes import MAX_BYTES
from archive_pipeline.flight.read import read_source
from archive_pipeline.outputs.writers import write_gtiff

CLASSES = """<CategoryNames><Category>grass &amp; moss</Category><Category>Wüste</Category>
</CategoryNames>"""
TABLE = """<GDALRasterAttributeTable tableType="thematic"><FieldDefn index="0"><Name>area</Name>
<Type>1</Type><Usage>0</Usage></FieldDefn><Row index="0"><F>12.5</F></Row>
</GDALRasterAttributeTable>"""
BAND = f'<PAMRasterBand band="2"><Histograms/>{CLASSES}{TABLE}</PAMRasterBand>'


def classified(folder: Path, inside: str) -> Path:
    """A raster of two bands with an `.aux.xml`."""
    folder.mkdir(exist_ok=True)
    path = folder / "Cover.tif"
    form = {"width": 40, "height": 30, "count": 2, "dtype": "uint8", "crs": "EPSG:32632"}
    move = rasterio.Affine(0.5, 0, 5e5, 0, -0.5, 5.26e6)
    with rasterio.open(path, "w", driver="GTiff", transform=move, **form) as out:
        out.write(np.arange(2400, dtype="uint8").reshape(2, 30, 40) % 2)
    (folder / "Cover.tif.aux.xml").write_text(f"<PAMDataset>{inside}</PAMDataset>", "utf-8")
    return path


def elements(path: Path, tag: str) -> list[tuple[str | None, list[tuple[str, str]]]]:
    """Those of an `.aux.xml`, by bands: tags and texts of all below."""
    root = ElementTree.parse(path).getroot()
    return [
        (band.get("band"), [(e.tag, (e.text or "").strip()) for e in found.iter()])
        for band in root.iterfind("PAMRasterBand")
        for found in band.iterfind(tag)
    ]


def test_they_come_back(tmp_path: Path, run: Run) -> None:
    source = classified(tmp_path / "f", BAND)
    assert run("ingest", tmp_path / "f", "--archive", tmp_path / "a.zarr", "--workers", 0).code == 0
    out = tmp_path / "out"
    result = run("restore", "--archive", tmp_path / "a.zarr", "-o", out, "--workers", 0)
    assert result.code == 0, result.err
    for tag in ("CategoryNames", "GDALRasterAttributeTable"):
        (want,) = elements(source.with_name("Cover.tif.aux.xml"), tag)
        assert elements(out / "f" / "Cover.tif.aux.xml", tag) == [want]
    # and as GDAL has them, which rasterio does not show
    rasterio.shutil.copy(out / "f" / "Cover.tif", tmp_path / "x.vrt", driver="VRT")
    (names,) = ElementTree.parse(tmp_path / "x.vrt").getroot().iter("CategoryNames")
    assert [name.text for name in names] == ["grass & moss", "Wüste"]


def test_documents_of_xml_come_back(tmp_path: Path) -> None:
    """Of JPEG 2000's boxes, or in namespaces of the user's own; XMP has a tag of its own."""
    path = classified(tmp_path, "")
    path.with_name("Cover.tif.aux.xml").unlink()
    document = (
        '<?xml version="1.0"?><plan xmlns="http://example.org/p" by="Ada &amp; Bo">'
        "<leg>7</leg></plan>"
    )
    with rasterio.open(path, "r+") as out:
        head, _, tail = document.partition("=")  # rasterio joins them
        out.update_tags(ns="xml:PLAN", **{head: tail})
    source = read_source(path, "Cover.tif")
    assert "<leg>7</leg>" in source.tags["xml:PLAN"]["xml:PLAN"]
    damaged = {"xml:BROKEN": {"xml:BROKEN": "<a>"}, "xml:DEEP": {"xml:DEEP": "<a>" * 5000}}
    deep = {"xml:DEEP": {"xml:DEEP": "<a>" * 5000 + "</a>" * 5000}}
    for number, more in enumerate(({}, damaged, deep)):
        given = replace(source, tags={**source.tags, **more})
        out_path = tmp_path / f"out{number}" / "x.tif"
        write_gtiff(out_path, whole(given))
        with rasterio.open(out_path) as got:
            assert set(got.tag_namespaces()) & {*more, "xml:PLAN"} == {"xml:PLAN"}
            text = got.tags(ns="xml:PLAN")["xml:PLAN"]
        body = document.partition("?>")[2]
        assert "".join(text.split()) == "".join(body.split())  # GDAL indents it


@pytest.mark.parametrize(
    "inside",
    [
        "<broken",
        f'<PAMRasterBand band="{"9" * 5000}">{CLASSES}</PAMRasterBand>',
        f'<PAMRasterBand band="-1">{CLASSES}</PAMRasterBand>',
        f"<PAMRasterBand>{CLASSES}</PAMRasterBand>",
        f'<PAMRasterBand band="1"><CategoryNames>{"<a>" * 4000}{"</a>" * 4000}</CategoryNames>'
        "</PAMRasterBand>",
    ],
)
def test_what_is_none_of_gdals_is_left(tmp_path: Path, inside: str) -> None:
    source = read_source(classified(tmp_path, inside), "Cover.tif")
    assert not [name for name, _ in source.metadata if name == "PAM"]


def test_one_that_is_too_large_is_named(tmp_path: Path) -> None:
    path = classified(tmp_path, BAND + " " * MAX_BYTES)
    source = read_source(path, "Cover.tif")
    assert any("classes in Cover.tif.aux.xml are not kept" in word for word in source.left_out)
