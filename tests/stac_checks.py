"""What STAC objects must be: the core's schemas as pystac has them, and those of extensions.

Extensions' schemas come with no package. These are made here of what their READMEs say of the
fields that archives use: projection v2.0.0, view v1.1.0, perspective-imagery v1.0.0, file v2.1.0
and eo v2.0.0 (https://github.com/stac-extensions).
"""

from __future__ import annotations

import json
from typing import Any

import pystac.validation
from pystac.validation.stac_validator import JsonSchemaSTACValidator

Schema = dict[str, Any]

TEXT, NUMBER, COUNT = {"type": "string"}, {"type": "number"}, {"type": "integer", "minimum": 0}
POSITIVE = {"type": "number", "exclusiveMinimum": 0}


def numbers(*lengths: int, of: Schema = NUMBER) -> Schema:
    return {
        "oneOf": [{"type": "array", "items": of, "minItems": n, "maxItems": n} for n in lengths]
    }


def angle(least: float, most: float) -> Schema:
    return {"type": "number", "minimum": least, "maximum": most}


PROJECTION = {
    "proj:code": {"type": ["string", "null"]},
    "proj:wkt2": {"type": ["string", "null"]},
    "proj:bbox": numbers(4, 6),
    "proj:shape": numbers(2, of={"type": "integer"}),
    "proj:transform": numbers(6, 9),
}
VIEW = {
    **{f"view:{name}": angle(0, 90) for name in ("off_nadir", "incidence_angle")},
    **{f"view:{name}": angle(0, 360) for name in ("azimuth", "sun_azimuth")},
    "view:sun_elevation": angle(-90, 90),
}
INTERIOR = {
    **dict.fromkeys(("camera_id", "camera_manufacturer", "camera_model"), TEXT),
    "sensor_array_dimensions": numbers(2, of={"type": "integer", "exclusiveMinimum": 0}),
    "pixel_spacing": numbers(2, of=POSITIVE),
    "focal_length": POSITIVE,
    "principal_point_offset": numbers(2),
    "field_of_view": POSITIVE | {"maximum": 360},
    "radial_distortion": numbers(4),
    "affine_distortion": numbers(6),
}
PERSPECTIVE = {
    "pers:interior_orientation": {
        "type": "object",
        "properties": INTERIOR,
        "additionalProperties": False,
    },
    "pers:perspective_center": numbers(2, 3),
    "pers:crs": {"type": ["string", "number", "object"]},
    "pers:vertical_crs": {"type": ["string", "number", "object"]},
    "pers:rotation_matrix": numbers(9),
}
FILE = {"file:size": COUNT, "file:checksum": {"type": "string", "pattern": "^[a-f0-9]+$"}}
NAMES = ["red", "green", "blue", "nir", "rededge", "coastal", "yellow", "pan", "cirrus", "lwir"]
EO = {"eo:common_name": {"enum": NAMES}, "eo:cloud_cover": angle(0, 100)}


def only(prefix: str, fields: Schema, **more: Any) -> Schema:
    """An object whose fields of an extension are these, and whatever others."""
    others = {f"^(?!{prefix}:)": {}}
    return {
        "type": "object",
        "properties": fields,
        "patternProperties": others,
        "additionalProperties": False,
        **more,
    }


def extension(url: str, **parts: Schema) -> Schema:
    declared = {"type": "array", "contains": {"const": url}}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": url,
        "type": "object",
        "required": ["stac_extensions", *parts],
        "properties": {"stac_extensions": declared, **parts},
    }


def each(schema: Schema) -> Schema:
    return {"type": "object", "additionalProperties": schema}


def schemas() -> dict[str, Schema]:
    """The extensions' schemas by their identifiers."""
    some_view = {"anyOf": [{"required": [name]} for name in VIEW]}
    together = {"pers:crs": ["pers:perspective_center"], "pers:perspective_center": ["pers:crs"]}
    bands = {"type": "array", "items": only("eo", EO)}
    named = {"required": ["bands"], "properties": {"bands": {"contains": {"required": [*EO][:1]}}}}
    some_eo = {"not": {"additionalProperties": {"not": named}}}
    found = {
        "projection/v2.0.0": {"properties": only("proj", PROJECTION)},
        "view/v1.1.0": {"properties": only("view", VIEW, **some_view)},
        "perspective-imagery/v1.0.0": {
            "properties": only("pers", PERSPECTIVE, dependencies=together)
        },
        "file/v2.1.0": {"assets": each(only("file", FILE))},
        "eo/v2.0.0": {"assets": {**each({"properties": {"bands": bands}}), **some_eo}},
    }
    urls = {name: f"https://stac-extensions.github.io/{name}/schema.json" for name in found}
    return {urls[name]: extension(urls[name], **parts) for name, parts in found.items()}


class Offline(JsonSchemaSTACValidator):
    """pystac's validator, which fetches no schema that it has not."""

    def __init__(self) -> None:
        super().__init__()
        self.schema_cache.update(schemas())

    def _get_schema(self, schema_uri: str) -> Schema:
        assert schema_uri in self.schema_cache, f"no schema of {schema_uri}"
        return self.schema_cache[schema_uri]


VALIDATOR = Offline()


def validate(found: Schema) -> None:
    """Raise what is wrong with an item or a collection, and with its text as JSON."""
    json.dumps(found, allow_nan=False).encode()
    pystac.validation.validate_dict(found, validator=VALIDATOR)
    if found["type"] == "Feature":
        known = (name for name, value in found["properties"].items() if value is not None)
        used = {name.partition(":")[0] for name in known if ":" in name}
        told = " ".join(found["stac_extensions"])
        for prefix, name in (("proj", "projection"), ("view", "view"), ("pers", "perspective")):
            assert prefix not in used or name in told, f"{prefix}: is used, but not declared"


def without_nulls(value: Any) -> Any:
    """An item as stac-geoparquet reads it without the null that it has for what is not known."""
    if isinstance(value, dict):
        known = {k: v for k, v in value.items() if v is not None or k == "datetime"}
        return {k: without_nulls(v) for k, v in known.items()}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value
