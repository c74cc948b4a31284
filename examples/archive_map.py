"""An archive on a map, by tools that know nothing of it: DuckDB, xarray, folium.

    pip install 'archive-pipeline[xarray]' duckdb folium
    python examples/archive_map.py archive.zarr map.html

Prints what a flight holds, and how green its frames are by a few of their pixels. Writes a page
with all footprints; one frame lies on its place. The page loads Leaflet and a background map when
it is opened, nothing is loaded to make it.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import click
import duckdb
import folium
import numpy as np
import xarray

# The index is STAC-GeoParquet; plain DuckDB reads it, its extension `spatial` is not needed.
FLIGHTS = """
    select collection as flight, count(*) as images, min(datetime)::varchar as first,
        round(median(gsd), 3) as metres_a_pixel,
        round(sum("archive:source_bytes") / sum("archive:archive_bytes"), 1) as ratio
    from read_parquet(?) group by collection order by collection
"""
IMAGES = """
    select id, collection, "archive:key" as key, bbox, gsd, "view:off_nadir" as off_nadir
    from read_parquet(?) where bbox.xmin <= bbox.xmax and "archive:codec" = 'pcdc'
    order by collection, id limit ?
"""


def rows(query: str, *values: object) -> list[dict[str, Any]]:
    found = duckdb.execute(query, list(values))
    names = [column[0] for column in found.description]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def greenness(pixels: xarray.DataArray) -> float:
    """Mean excess green, -1 to 2, of pixels uint8 (y, x, band)."""
    red, green, blue = np.moveaxis(pixels.values.astype(float), 2, 0)
    return float(((2 * green - red - blue) / np.maximum(red + green + blue, 1)).mean())


@click.command()
@click.argument("archive", type=click.Path(exists=True, path_type=Path))
@click.argument("page", type=click.Path(path_type=Path))
@click.option("--limit", default=500, show_default=True, help="Frames on the map.")
def main(archive: Path, page: Path, limit: int) -> None:
    """Put the frames of ARCHIVE on a map, the PAGE."""
    index = str(archive / "items.parquet")
    for flight in rows(FLIGHTS, index):
        click.echo(json.dumps(flight))
    features, images = [], rows(IMAGES, index, limit)
    for number, image in enumerate(images):
        group = xarray.open_zarr(archive, group=image["key"], consolidated=False, chunks=None)
        pixels = group["pixels"]
        height, width, _ = pixels.shape
        middle = pixels[height // 2 : height // 2 + 64, width // 2 : width // 2 + 64]
        if number < 8:  # each decodes a tile or a few
            click.echo(f"{image['collection']}/{image['id']}: {greenness(middle):+.3f} green")
        record = group.attrs["archive_pipeline"]
        # names may hold anything, and tooltips are HTML
        told = {name: html.escape(str(image[name])) for name in ("id", "gsd", "off_nadir")}
        ring = {"type": "Polygon", "coordinates": [record["georef"]["footprint"]]}
        features.append({"type": "Feature", "geometry": ring, "properties": told})
    if not images:
        raise click.ClickException(f"{archive}: no frame in it has a place")
    map_of(features, images, archive).save(page)
    click.echo(f"{page}: {len(features)} frames")


def map_of(
    features: list[dict[str, Any]], images: list[dict[str, Any]], archive: Path
) -> folium.Map:
    boxes = [image["bbox"] for image in images]
    south, north = min(b["ymin"] for b in boxes), max(b["ymax"] for b in boxes)
    west, east = min(b["xmin"] for b in boxes), max(b["xmax"] for b in boxes)
    found = folium.Map(max_zoom=22)
    found.fit_bounds([[south, west], [north, east]])
    outlines = {"type": "FeatureCollection", "features": features}
    tooltip = folium.GeoJsonTooltip(["id", "gsd", "off_nadir"])
    folium.GeoJson(outlines, name="frames", tooltip=tooltip).add_to(found)
    import archive_pipeline as ap

    # a frame lies askew: its box, north up, is what a map can show
    first = boxes[0]
    box = (first["xmin"], first["ymin"], first["xmax"], first["ymax"])
    look = ap.open(archive).window(box, resolution=images[0]["gsd"] * 4)
    place = [[box[1], box[0]], [box[3], box[2]]]
    folium.raster_layers.ImageOverlay(look.values, place, name="a box of it").add_to(found)
    folium.LayerControl().add_to(found)
    return found


if __name__ == "__main__":
    main()
