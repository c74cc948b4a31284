"""Images as STAC items (1.1.0): the columns that `items.parquet` has of them.

https://github.com/radiantearth/stac-geoparquet-spec says how items become rows; `stac_json` makes
JSON of these.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from archive_pipeline.store._camera_columns import CAMERA_COLUMNS, camera_columns
from archive_pipeline.store._columns import NUMBERS, TEXTS, WHOLE_NUMBERS, lists
from archive_pipeline.store.index_rows import (
    BOUNDS,
    CAPTURED,
    GROUP,
    OTHER,
    SCHEMA,
    SIDES,
    TEXT_SCHEMA,
    VERSION,
    as_texts,
    transforms_of,
    words_of,
)
from archive_pipeline.store.layout import overview_name

STAC_VERSION = "1.1.0"
EXTENSIONS = {
    name: f"https://stac-extensions.github.io/{name}/{version}/schema.json"
    for name, version in (
        ("projection", "v2.0.0"),
        ("view", "v1.1.0"),
        ("perspective-imagery", "v1.0.0"),
        ("file", "v2.1.0"),
        ("eo", "v2.0.0"),
    )
}
ZARR = "application/vnd.zarr; version=3"
PARQUET = "application/vnd.apache.parquet"
# Of an image whose time is not known: items must have one. Also 64-bit nanoseconds reach so far.
FIRST, LAST = datetime(1800, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
# Of an image whose place is not known, for readers that take no null: no polygon, and a box that
# nothing meets.
NOWHERE = shapely.to_wkb(shapely.Polygon())
NO_BOX = (180.0, 90.0, -180.0, -90.0)
COLOURS = ("red", "green", "blue")
MAX_BANDS = 64  # that are listed
COMPLEX = {"complex64": "cfloat32", "complex128": "cfloat64"}
DATA_TYPES = {
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("float16", "float32", "float64"),
}
_LOCAL_VERSION = re.compile(r"([0-9a-f]{1,15})-[0-9a-f]+-[0-9a-f]+")  # of a record, see `archive`

_TIME = pa.timestamp("us", "UTC")
_LINK = pa.struct([(name, pa.string()) for name in ("rel", "href", "type")])
_PLACE = [("href", pa.string()), ("type", pa.string()), ("roles", TEXTS)]
_BAND = pa.struct([("name", pa.string()), ("eo:common_name", pa.string())])
_BANDS = pa.list_(pa.field("element", _BAND))
_DATA = pa.struct(
    [*_PLACE, ("file:size", pa.int64()), ("data_type", pa.string()), ("bands", _BANDS)]
)
ASSETS = {"data": _DATA, "overview": pa.struct(_PLACE), "metadata": pa.struct(_PLACE)}
# Derived from the others: in a hostile file lists may be of any length, so these are not read.
DERIVED = {
    "type": pa.string(),
    "stac_version": pa.string(),
    "stac_extensions": TEXTS,
    "datetime": _TIME,
    "start_datetime": _TIME,
    "end_datetime": _TIME,
    "updated": _TIME,
    "gsd": pa.float64(),
    **CAMERA_COLUMNS,
    "proj:shape": WHOLE_NUMBERS,
    "proj:transform": NUMBERS,
    "proj:bbox": NUMBERS,
    "links": pa.list_(pa.field("element", _LINK)),
    "assets": pa.struct(list(ASSETS.items())),
}
FILE_SCHEMA = pa.schema([*TEXT_SCHEMA, *DERIVED.items()])


def to_file(rows: pa.Table) -> pa.Table:
    """Rows of the index as the file has them: STAC items."""
    if not len(rows):
        return FILE_SCHEMA.empty_table()
    columns = dict(zip(SCHEMA.names, as_texts(rows).columns, strict=True))
    unknown = rows["geometry"].is_null()
    columns["geometry"] = pc.if_else(unknown, pa.scalar(NOWHERE, pa.binary()), rows["geometry"])
    nothing = pa.scalar(dict(zip(BOUNDS, NO_BOX, strict=True)), SCHEMA.field("bbox").type)
    columns["bbox"] = pc.if_else(rows["bbox"].is_null(), nothing, rows["bbox"])
    derived = {
        **_times(rows),
        **projections(rows),
        **camera_columns(rows),
        "assets": _assets(rows),
        **_constants(len(rows)),
    }
    derived["stac_extensions"] = _extensions(rows, derived)
    return pa.table(
        [columns.get(name, derived.get(name)) for name in FILE_SCHEMA.names], FILE_SCHEMA
    )


def from_file(rows: pa.Table) -> pa.Table:
    """Rows of a file, whose `SCHEMA` columns were read with all texts as dictionaries."""
    rows = rows.cast(SCHEMA)
    unknown = pc.fill_null(pc.equal(rows["geometry"], pa.scalar(NOWHERE, pa.binary())), False)
    for name in ("geometry", "bbox"):
        known = pc.if_else(unknown, pa.scalar(None, SCHEMA.field(name).type), rows[name])
        rows = rows.set_column(rows.schema.get_field_index(name), name, known)
    return rows


def times_of(rows: pa.Table) -> pa.Array:
    """Times of capture, taken for UTC where they have no offset; null where they are none."""
    texts = rows[CAPTURED].combine_chunks()
    # nearly all are written so, and many times faster read
    quick = pc.strptime(texts, "%Y-%m-%dT%H:%M:%S", "us", error_is_null=True).cast(_TIME)
    sure = pc.fill_null(pc.greater_equal(quick, pa.scalar(FIRST, _TIME)), False)
    others = pc.indices_nonzero(pc.and_(pc.invert(sure), texts.is_valid()))
    found = np.full(len(texts), None, dtype=object)
    for n, text in zip(others.to_pylist(), texts.take(others).to_pylist(), strict=True):
        found[n] = _moment(text)
    return pc.if_else(sure, quick, pa.array(found, _TIME))


def _moment(text: str) -> datetime | None:
    try:
        found = datetime.fromisoformat(text)
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def _times(rows: pa.Table) -> dict[str, pa.Array]:
    times = times_of(rows)
    found = map(_LOCAL_VERSION.fullmatch, rows[VERSION].fill_null("").to_pylist())
    updated = [int(local[1], 16) // 1000 if local else None for local in found]  # us
    return {
        "datetime": times,
        "start_datetime": times.fill_null(pa.scalar(FIRST, _TIME)),
        "end_datetime": times.fill_null(pa.scalar(LAST, _TIME)),
        "updated": pa.array(updated, pa.int64()).cast(_TIME),
    }


def _constants(count: int) -> dict[str, pa.Array]:
    # an item that names its collection must have a link to it: the file's metadata hold them all
    link = {"rel": "collection", "href": "./items.parquet", "type": PARQUET}
    return {
        "type": pa.repeat("Feature", count),
        "stac_version": pa.repeat(STAC_VERSION, count),
        "links": pa.array([[link]], DERIVED["links"]).take(pa.repeat(0, count)),
    }


def projections(rows: pa.Table) -> dict[str, pa.Array]:
    """Where pixels lie, and how large they are on the ground (metres)."""
    six = transforms_of(rows)
    given = np.isfinite(six).all(axis=1)
    width, height = (rows[name].to_numpy() for name in SIDES)
    a, b, c, d, e, f = six.T
    with np.errstate(invalid="ignore", over="ignore"):
        across, along = np.stack([a * width, d * width]), np.stack([b * height, e * height])
        corners = np.stack([0 * across, across, along, across + along])
        low, high = corners.min(axis=0), corners.max(axis=0)
        bounds = np.stack([c + low[0], f + low[1], c + high[0], f + high[1]], axis=1)
        area = np.abs(a * e - b * d)
        gsd = np.sqrt(area) * _metres(rows, f + (low[1] + high[1]) / 2)
        boxed = given & np.isfinite(bounds).all(axis=1)
        measured = given & np.isfinite(gsd) & (gsd > 0)
    return {
        "gsd": pa.array(gsd, mask=~measured),
        "proj:shape": lists(np.column_stack([height, width]).ravel(), np.full(len(rows), 2)),
        "proj:transform": lists(six[given].ravel(), 6 * given),
        "proj:bbox": lists(bounds[boxed].ravel(), 4 * boxed),
    }


def _metres(rows: pa.Table, y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Metres to a unit of each image's CRS, at its middle's y; NaN without a CRS."""
    metres = np.full(len(rows), np.nan)
    for name in ("proj:code", "proj:wkt2"):
        texts, which = words_of(rows[name])
        for n in np.unique(which).tolist():
            unit, of_degrees = _unit(texts[n])
            if unit is not None:
                at = np.flatnonzero(np.equal(which, n))
                # of degrees: the mean of both directions
                shrunk = np.sqrt(np.abs(np.cos(y[at] * unit))) * 6371008.8 if of_degrees else 1.0
                metres[at] = unit * shrunk
    return metres


def _unit(crs: str | None) -> tuple[float | None, bool]:
    """A CRS' unit in metres, or in radians and that it is; None where it is not known."""
    from pyproj import CRS
    from pyproj.exceptions import CRSError

    if crs is None:
        return None, False
    try:
        found = CRS.from_user_input(crs)
        return found.axis_info[0].unit_conversion_factor, found.is_geographic
    except (CRSError, IndexError):  # of a forged one, or of a local one without axes
        return None, False


def _hrefs(rows: pa.Table, end: Any) -> pa.Array:
    """URLs of what the archive holds of images, relative to the index."""
    keys = rows[GROUP].combine_chunks()
    for character, escaped in (("%", "%25"), (" ", "%20")):  # all else a URL takes as it is
        keys = pc.replace_substring(keys, character, escaped)
    return pc.binary_join_element_wise("./", keys, end, "")


def _assets(rows: pa.Table) -> pa.Array:
    count = len(rows)

    def asset(end: str, role: str) -> list[pa.Array]:
        roles = pa.repeat(pa.scalar([role], TEXTS), count)
        return [_hrefs(rows, end), pa.repeat(ZARR, count), roles]

    sizes = rows["archive:archive_bytes"].combine_chunks()
    data = [*asset("", "data"), sizes, *_contents(rows)]
    ends = _finest_overviews(rows)
    overview = asset(pc.fill_null(ends, ""), "overview")
    without = ends.is_null()
    made = [
        pa.StructArray.from_arrays(data, fields=list(_DATA)),
        pa.StructArray.from_arrays(overview, fields=list(ASSETS["overview"]), mask=without),
        pa.StructArray.from_arrays(asset("/metadata", "metadata"), fields=list(ASSETS["metadata"])),
    ]
    return pa.StructArray.from_arrays(made, fields=list(DERIVED["assets"]))


def _finest_overviews(rows: pa.Table) -> pa.Array:
    """Where in an image's group its finest overview is; null without any."""
    words, which = words_of(rows[OTHER])
    # a text inside the JSON has its quotes escaped
    found = [re.search(r'"overviews":\[([0-9]{1,9})', word or "") for word in words]
    names = [f"/{overview_name(int(factor[1]))}" if factor else None for factor in found]
    return pa.array(names, pa.string()).take(pa.array(which))


def _contents(rows: pa.Table) -> list[pa.Array]:
    """Data types and bands."""
    words, which = words_of(rows["archive:dtype"])
    types = [COMPLEX.get(w, w if w in DATA_TYPES else "other") if w else None for w in words]
    counts = rows["archive:bands"].to_numpy()
    coded = pc.equal(rows["archive:codec"].cast(pa.string()), "pcdc").to_numpy()
    kinds, kind = np.unique(np.where(coded, 0, counts), return_inverse=True)
    bands: list[Any] = []
    for n in kinds.tolist():
        if n == 0:
            bands.append([{"name": colour, "eo:common_name": colour} for colour in COLOURS])
        else:
            bands.append([{"name": str(k + 1)} for k in range(n)] if n <= MAX_BANDS else None)
    return [
        pa.array(types, pa.string()).take(pa.array(which)),
        pa.array(bands, _BANDS).take(pa.array(kind)),
    ]


def _extensions(rows: pa.Table, derived: dict[str, pa.Array]) -> pa.Array:
    """Which extensions each item has."""
    given = {name: np.asarray(derived[name].is_valid()) for name in derived}
    coded = pc.equal(rows["archive:codec"].cast(pa.string()), "pcdc")
    columns = {
        "projection": np.ones(len(rows), bool),
        "view": given["view:off_nadir"],
        "perspective-imagery": given["pers:interior_orientation"] | given["pers:crs"],
        "file": np.ones(len(rows), bool),
        "eo": np.asarray(coded.combine_chunks()),
    }
    powers = 1 << np.arange(len(EXTENSIONS))
    combined = np.column_stack([columns[name] for name in EXTENSIONS]) @ powers
    kinds, kind = np.unique(combined, return_inverse=True)
    urls = [[u for u, p in zip(EXTENSIONS.values(), powers, strict=True) if k & p] for k in kinds]
    return pa.array(urls, TEXTS).take(pa.array(kind))
