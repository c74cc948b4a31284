#!/usr/bin/env bash
# stac-geoparquet: one item without a place makes a whole file unreadable.
#
# GeoJSON and STAC allow a null geometry (an image whose position nobody knows), and GeoParquet a null
# in the column. `stac_table_to_items` takes a table's geometries to Shapely and asks each for its
# `__geo_interface__`, which None has not: AttributeError, and the items before and behind it cannot be had
# either. An empty polygon in its place is read, as an item of a polygon without coordinates.
#
# Seen with stac-geoparquet 0.8.3, pyarrow 26.0.1, shapely 2.2.0, Python 3.11, Linux x86-64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "stac-geoparquet==0.8.3" "pyarrow==26.0.1" "shapely==2.2.0"
cd "$folder"
venv/bin/python - <<'PYTHON'
from datetime import UTC, datetime

import pyarrow as pa
import shapely
from stac_geoparquet.arrow import stac_table_to_items

BOUNDS = ("xmin", "ymin", "xmax", "ymax")
PLACE, EMPTY = shapely.box(7, 47, 8, 48), shapely.Polygon()


def items(*places: shapely.Geometry | None) -> list[dict]:
    """Items of these places, by way of a table of rows as the specification has them."""
    count = len(places)
    text = pa.string()
    link = pa.struct([("href", text), ("rel", text)])
    asset = pa.struct([("data", pa.struct([("href", text)]))])
    corners = pa.struct([(name, pa.float64()) for name in BOUNDS])
    box = dict(zip(BOUNDS, PLACE.bounds, strict=True))
    table = pa.table(
        {
            "type": ["Feature"] * count,
            "stac_version": ["1.1.0"] * count,
            "stac_extensions": pa.array([[]] * count, pa.list_(text)),
            "id": [f"item-{n}" for n in range(count)],
            "geometry": pa.array([None if p is None else shapely.to_wkb(p) for p in places], pa.binary()),
            "bbox": pa.array([None if p is None else box for p in places], corners),
            "datetime": pa.array([datetime(2024, 5, 1, tzinfo=UTC)] * count, pa.timestamp("us", "UTC")),
            "links": pa.array([[]] * count, pa.list_(link)),
            "assets": pa.array([{}] * count, asset),
            "collection": ["flight"] * count,
        }
    )
    return list(stac_table_to_items(table))


print("both placed:", len(items(PLACE, PLACE)), "items")
try:
    items(PLACE, None)
except AttributeError as error:
    print("one null geometry:", error)
    assert "__geo_interface__" in str(error)
else:
    raise AssertionError("it is read now")
one, empty = items(PLACE, EMPTY)
print("one empty polygon:", empty["geometry"])
assert one["geometry"]["type"] == empty["geometry"]["type"] == "Polygon"
PYTHON
