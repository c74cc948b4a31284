"""Rows of the index, from which images' records can be had again; `stac` makes STAC items of them.

What the columns do not say of a record (mask, warnings, control points, ...) is JSON in one more.
The few records that this does not give back exactly have no version, so that they are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from archive_pipeline.geo.georef import Georef
from archive_pipeline.store.layout import CODECS, MAX_BANDS, MAX_SIDE, ImageEntry

GROUP, IMAGE, FLIGHT, SHA256 = "archive:key", "id", "collection", "archive:sha256"
CAPTURED, OTHER, VERSION = "archive:captured", "archive:other", "archive:version"
_PLACED_BY = re.compile(r'(?<!\\)"placed_by":"([^"\\]+)"')  # in a record's JSON, not in a text
CAMERA, POSE = "archive:camera", "archive:pose"
SPOT = 4  # times that a footprint has a place whose extent is not known
MAX_LONGITUDE = 720.0  # that a footprint may count on to
MAX_INT = (1 << 63) - 1
TRANSFORM, AFFINE = "archive:transform", tuple("abcdef")
BOUNDS = ("xmin", "ymin", "xmax", "ymax")
# Fields of a record's camera that differ from image to image; all else of it is JSON in a column.
PLACE = ("lon", "lat", "altitude_gps_m", "altitude_relative_m", "yaw_deg", "pitch_deg", "roll_deg")
TYPED = {  # fields of a record that have columns of their own
    *("id", "sha256", "width", "height", "bands", "dtype", "codec", "model"),
    *("source_bytes", "archive_bytes", "captured", "camera"),
}
SIDES = ("archive:width", "archive:height")
SIZES = ("archive:source_bytes", "archive:archive_bytes")
TYPED_GEOREF = {"crs", "transform", "footprint"}

_REPEATED = pa.dictionary(pa.int32(), pa.string())  # in memory; in the file they are texts
SCHEMA = pa.schema(
    [
        (IMAGE, pa.string()),
        (FLIGHT, _REPEATED),
        ("geometry", pa.binary()),
        ("bbox", pa.struct([(name, pa.float64()) for name in BOUNDS])),
        ("proj:code", _REPEATED),
        ("proj:wkt2", _REPEATED),
        (GROUP, pa.string()),
        (CAPTURED, pa.string()),
        (SHA256, pa.string()),
        ("archive:codec", _REPEATED),
        ("archive:model", _REPEATED),
        ("archive:width", pa.int64()),
        ("archive:height", pa.int64()),
        ("archive:bands", pa.int64()),
        ("archive:dtype", _REPEATED),
        ("archive:source_bytes", pa.int64()),
        ("archive:archive_bytes", pa.int64()),
        (TRANSFORM, pa.struct([(name, pa.float64()) for name in AFFINE])),
        (CAMERA, _REPEATED),
        (POSE, pa.struct([(name, pa.float64()) for name in PLACE])),
        ("archive:reach", pa.float64()),  # degrees, of the image beyond its bbox; null: unknown
        (OTHER, _REPEATED),
        (VERSION, pa.string()),  # of the record, see `Archive.record_versions`
    ]
)
REPEATED = [field.name for field in SCHEMA if field.type == _REPEATED]
TEXT_SCHEMA = pa.schema([f.with_type(pa.string()) if f.name in REPEATED else f for f in SCHEMA])


def to_rows(images: Iterable[tuple[ImageEntry, str | None]]) -> pa.Table:
    """Rows of images with their records' versions."""
    images = list(images)
    if not images:
        return SCHEMA.empty_table()
    records = [entry.record for entry, _ in images]
    georefs = [record["georef"] for record in records]
    shapes = np.array([_area(georef["footprint"]) for georef in georefs], dtype=object)
    bounds = shapely.bounds(shapes)
    codes = [_text(georef["crs"]) for georef in georefs]
    plain = [code is not None and code.startswith("EPSG:") for code in codes]
    columns: dict[str, Any] = {
        IMAGE: [_text(entry.id) for entry, _ in images],
        FLIGHT: [_text(entry.flight) for entry, _ in images],
        "geometry": shapely.to_wkb(shapes),
        "bbox": [
            dict(zip(BOUNDS, box, strict=True)) if np.isfinite(box).all() else None
            for box in bounds.tolist()
        ],
        "proj:code": [code if p else None for code, p in zip(codes, plain, strict=True)],
        "proj:wkt2": [None if p else code for code, p in zip(codes, plain, strict=True)],
        GROUP: [entry.key for entry, _ in images],
        CAPTURED: [_text(record["captured"]) for record in records],
        SHA256: [_text(record["sha256"]) for record in records],
        "archive:codec": [record["codec"] for record in records],
        "archive:model": [_text(record.get("model")) for record in records],
        "archive:width": [record["width"] for record in records],
        "archive:height": [record["height"] for record in records],
        "archive:bands": [record["bands"] for record in records],
        "archive:dtype": [_text(record["dtype"]) for record in records],
        "archive:source_bytes": [min(record["source_bytes"], MAX_INT) for record in records],
        "archive:archive_bytes": [min(record["archive_bytes"], MAX_INT) for record in records],
        TRANSFORM: [
            georef["transform"] and dict(zip(AFFINE, map(float, georef["transform"]), strict=True))
            for georef in georefs
        ],
        CAMERA: [_camera(record) for record in records],
        POSE: [_pose(record) for record in records],
        "archive:reach": [
            _reach(record, box) for record, box in zip(records, bounds.tolist(), strict=True)
        ],
        OTHER: [json.dumps(_other(record), separators=(",", ":")) for record in records],
        VERSION: [version for _, version in images],
    }
    rows = pa.table(columns, SCHEMA)
    # as texts: 1, 1.0 and true are not the same
    exact = [
        json.dumps(told, sort_keys=True) == json.dumps(record, sort_keys=True)
        for told, record in zip(to_records(rows), records, strict=True)
    ]
    versions = pc.if_else(pa.array(exact, pa.bool_()), rows[VERSION], None)
    return rows.set_column(rows.schema.get_field_index(VERSION), VERSION, versions)


def _text(value: Any) -> str | None:
    return as_text(value) if isinstance(value, str) else None


def as_text(value: str) -> str:
    """A text as Parquet can hold it: bytes that are no text are replaced."""
    return value.encode("utf-8", "replace").decode()


def footprint_of(entry: ImageEntry) -> shapely.Geometry | None:
    """An image's footprint in degrees as GeoJSON has it; None without place."""
    return _area(entry.record["georef"]["footprint"])


def _area(ring: Any) -> shapely.Geometry | None:
    """A footprint as GeoJSON has it."""
    from archive_pipeline.geo.globe import cut_at_antimeridian

    points = [(point[0], point[1]) for point in ring or ()]
    if not points or max(abs(x) for x, _ in points) > MAX_LONGITUDE:
        return None
    try:
        return cut_at_antimeridian(points)
    except shapely.errors.ShapelyError:  # of a forged one
        return None


def _camera(record: dict[str, Any]) -> str | None:
    """What is the same in many images of a record's camera, as JSON."""
    camera = record.get("camera")
    if camera is None:
        return None
    rest = {name: value for name, value in camera.items() if name not in PLACE}
    return json.dumps(rest, separators=(",", ":"))


def _pose(record: dict[str, Any]) -> dict[str, float] | None:
    """Where a record's camera was and looked; in odd ones only what are numbers."""
    camera = record.get("camera")
    if camera is None:
        return None
    given = {name: camera.get(name) for name in PLACE}
    return {name: value for name, value in given.items() if type(value) is float}


def _reach(record: dict[str, Any], bounds: list[float]) -> float | None:
    if not np.isfinite(bounds).all():
        return None
    from archive_pipeline.geo.bounds import reach

    west, south, east, north = bounds
    georef = Georef.from_json(record["georef"])
    return reach(georef, record["width"], record["height"], (west, south, east, north))


def _other(record: dict[str, Any]) -> dict[str, Any]:
    """What of a record no other column says."""
    georef = {k: v for k, v in record["georef"].items() if k not in TYPED_GEOREF}
    other = {k: v for k, v in record.items() if k not in TYPED}
    return other | {"georef": georef}


def to_records(rows: pa.Table) -> list[dict[str, Any]]:
    """The images' records, unchecked.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: the rows are not `sound` or `to_rows`' own.
    """
    records = []
    repeated = (repeated_texts(rows[name]) for name in ("archive:dtype", "archive:model", OTHER))
    for summary, sha256, bands, camera, dtype, model, other in zip(
        to_summaries(rows),
        rows[SHA256].to_pylist(),
        rows["archive:bands"].to_pylist(),
        _cameras(rows),
        *repeated,
        strict=True,
    ):
        rest = json.loads(other)
        georef = {name: summary.pop(name) for name in sorted(TYPED_GEOREF)} | rest["georef"]
        del summary["placed_by"]  # it is in the rest
        known = {"sha256": sha256, "bands": bands, "dtype": dtype}
        if model is not None:
            known["model"] = model
        if camera is not None:
            known["camera"] = camera
        records.append(rest | summary | known | {"georef": georef})
    return records


def _cameras(rows: pa.Table) -> list[dict[str, Any] | None]:
    """Cameras as records have them."""
    texts, numbers = repeated_texts(rows[CAMERA]), poses_of(rows).tolist()
    return [
        None
        if text is None
        else {n: v for n, v in zip(PLACE, pose, strict=True) if v == v} | json.loads(text)
        for text, pose in zip(texts, numbers, strict=True)
    ]


def to_summaries(rows: pa.Table) -> list[dict[str, Any]]:
    """What `archive info` tells of the images, as `summary_of` has it."""
    return [
        {
            "id": id,
            "width": width,
            "height": height,
            "codec": codec,
            "crs": wkt if code is None else code,
            "transform": transform,
            "footprint": footprint,
            "captured": captured,
            "source_bytes": source_bytes,
            "archive_bytes": archive_bytes,
            "placed_by": None if placed is None else placed[1],
        }
        for id, captured, source_bytes, archive_bytes, width, height, codec, code, wkt, transform,
            footprint, placed
        in zip(
            *(rows[name].to_pylist() for name in (IMAGE, CAPTURED, *SIZES, *SIDES)),
            *(repeated_texts(rows[name]) for name in ("archive:codec", "proj:code", "proj:wkt2")),
            _transforms(rows),
            _rings(rows["geometry"]),
            _placed(rows),
            strict=True,
        )
    ]  # fmt: skip


def _placed(rows: pa.Table) -> list[re.Match[str] | None]:
    """Where other fields of records say what placed an image; a quick look, without parsing all."""
    words, which = words_of(rows[OTHER])
    found = [None if word is None else _PLACED_BY.search(word) for word in words]
    return [found[n] for n in which]


def summary_of(record: dict[str, Any]) -> dict[str, Any]:
    """What `archive info` tells of an image: of its record some fields, and of its georeference."""
    georef = record["georef"]
    return {
        **{name: record[name] for name in ("id", "width", "height", "codec")},
        **{name: georef[name] for name in ("crs", "transform", "footprint")},
        **{name: record[name] for name in ("captured", "source_bytes", "archive_bytes")},
        "placed_by": record.get("placed_by"),
    }


def repeated_texts(column: pa.ChunkedArray) -> list[str | None]:
    """Texts that repeat, each made once: many times faster than Arrow's own."""
    words, which = words_of(column)
    return [words[n] for n in which]


def words_of(column: pa.ChunkedArray) -> tuple[list[str | None], list[int]]:
    """Different texts of a column with a None at the end, and the number of each row's."""
    texts = column.combine_chunks()
    words = [*texts.dictionary.to_pylist(), None]
    last = len(words) - 1
    return words, [last if index is None else index for index in texts.indices.to_pylist()]


def _transforms(rows: pa.Table) -> list[Any]:
    """Transforms as records have them."""
    given, numbers = rows[TRANSFORM].is_valid().to_pylist(), transforms_of(rows)
    return [
        six if is_given else None for six, is_given in zip(numbers.tolist(), given, strict=True)
    ]


def _numbers(column: pa.ChunkedArray, names: Iterable[str]) -> NDArray[np.float64]:
    """Fields of a column of structs, float64 (n, fields); NaN where there is none."""
    structs = column.combine_chunks()
    fields = [pc.struct_field(structs, name).to_numpy(zero_copy_only=False) for name in names]
    return np.column_stack(fields).astype(np.float64)


def _rings(column: pa.ChunkedArray) -> list[Any]:
    """Outer rings of polygons from WKB, [[x, y], ...]; None for all that is no polygon.

    A point is a ring that is one place.
    """
    shapes = _geometries(column)
    kinds = shapely.get_type_id(shapes)
    spots = kinds == shapely.GeometryType.POINT
    if spots.any():
        places = np.repeat(shapely.get_coordinates(shapes[spots])[:, None], SPOT, axis=1)
        shapes[spots] = shapely.polygons(places)
    shapes[~spots & (kinds != shapely.GeometryType.POLYGON)] = None
    rings = shapely.get_exterior_ring(shapes)
    points = shapely.get_coordinates(rings).tolist()
    ends = np.cumsum(shapely.get_num_coordinates(rings)).tolist()
    return [
        points[start:end] if end > start else None
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def shapes_of(rows: pa.Table) -> NDArray[Any]:
    """Footprints in degrees as shapely geometries; None where there is none that is valid."""
    return _geometries(rows["geometry"])


def _geometries(column: pa.ChunkedArray) -> NDArray[Any]:
    """Geometries from WKB; None where there is none, or none that is valid."""
    wkb = np.array(column.to_pylist(), dtype=object)  # several times faster than `to_numpy`
    return np.asarray(shapely.from_wkb(wkb, on_invalid="ignore"))


def sound(rows: pa.Table) -> NDArray[np.bool_]:
    """Tell of rows from a file whether their columns are what a record may hold, bool (n,)."""
    mask = np.ones(len(rows), bool)
    for name in (GROUP, SHA256, IMAGE, "archive:dtype", OTHER):
        mask &= rows[name].is_valid().to_numpy()
    limits = (*((name, 1, MAX_SIDE) for name in SIDES), ("archive:bands", 1, MAX_BANDS))
    for name, least, most in (*limits, *((name, 0, MAX_INT) for name in SIZES)):
        inside = pc.and_(pc.greater_equal(rows[name], least), pc.less_equal(rows[name], most))
        mask &= inside.fill_null(False).to_numpy()
    mask &= pc.is_in(rows["archive:codec"].cast(pa.string()), pa.array(CODECS)).to_numpy()
    transforms = np.isfinite(transforms_of(rows)).all(axis=1)
    mask &= transforms | rows[TRANSFORM].is_null().to_numpy()
    shapes = shapes_of(rows)
    finite = np.isfinite(shapely.bounds(shapes)).all(axis=1)
    kinds = shapely.GeometryType.POLYGON, shapely.GeometryType.POINT
    finite &= np.isin(shapely.get_type_id(shapes), kinds)
    return mask & (finite | rows["geometry"].is_null().to_numpy())


def geo_metadata(bounds: NDArray[np.float64]) -> dict[str, Any]:
    """GeoParquet's own metadata of rows with these bounds, as `bounds_of` gives them."""
    from pyproj import CRS

    geometry: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": [],  # not told, which readers take for any
        "crs": CRS.from_user_input("EPSG:4326").to_json_dict(),
        "covering": {"bbox": {name: ["bbox", name] for name in BOUNDS}},
    }
    known = np.isfinite(bounds).all(axis=1)
    if known.any():
        geometry["bbox"] = [*bounds[known, :2].min(0), *bounds[known, 2:].max(0)]
    return {
        "version": "1.1.0",
        "primary_column": "geometry",
        "columns": {"geometry": geometry},
    }


def transforms_of(rows: pa.Table) -> NDArray[np.float64]:
    """Transforms (a, b, c, d, e, f), float64 (n, 6), NaN where there is none."""
    return _numbers(rows[TRANSFORM], AFFINE)


def poses_of(rows: pa.Table) -> NDArray[np.float64]:
    """`PLACE` of the images' cameras, float64 (n, 7), NaN where not known."""
    return _numbers(rows[POSE], PLACE)


def bounds_of(rows: pa.Table) -> NDArray[np.float64]:
    """Bounds of the images' corners in EPSG:4326, float64 (n, 4), NaN where not known."""
    return _numbers(rows["bbox"], BOUNDS)


def reaches_of(rows: pa.Table) -> NDArray[np.float64]:
    """Bounds that hold all of the images, float64 (n, 4), NaN where none are sure to."""
    margins = rows["archive:reach"].to_numpy()
    return bounds_of(rows) + np.column_stack([-margins, -margins, margins, margins])


def have_crs(rows: pa.Table) -> NDArray[np.bool_]:
    """Whether images have a CRS, without which no box meets them, bool (n,)."""
    code, wkt = (rows[name].is_valid().to_numpy() for name in ("proj:code", "proj:wkt2"))
    return code | wkt


def as_texts(rows: pa.Table) -> pa.Table:
    """Rows that are equal if their texts are."""
    return rows.cast(TEXT_SCHEMA).combine_chunks()
