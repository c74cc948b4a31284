"""What a camera says of itself, as it is stored; `camera` reads it and computes with it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from archive_pipeline.geo.lens import Distortion

# fields of a pose that a record of an image has elsewhere, or not at all
NOT_BRIEF = ("warnings", "survey", "found", "ground_slope", "distortion")


@dataclass(frozen=True)
class CameraPose:
    """What a camera says of its own position, direction and lens.

    Attributes:
        lon, lat: degrees, WGS 84; ``None`` without a GPS position.
        altitude_gps_m: height above the sea (or the ellipsoid: cameras differ), metres.
        altitude_relative_m: height above the take-off point, metres.
        yaw_deg: direction of the image's top, degrees clockwise from true north.
        pitch_deg: -90 looks straight down, 0 at the horizon.
        roll_deg: positive tilts the camera to its right; about the optical axis of a gimbal's
            camera, about the image's upward direction of one in a body.
        focal_35mm: 35 mm-equivalent focal length, mm.
        focal_mm: physical focal length, mm.
        make, model: the camera's names, as written.
        warnings: one sentence for each thing that had to be assumed.
        mount: ``"gimbal"`` or ``"body"``: what yaw, pitch and roll turn, see `camera`.
        dialect: whose words direction and height are in, of `flight.camera_dialects`.
        pixel_mm: side of a pixel of the sensor, mm, of an image of `pixels_wide`.
        pixels_wide: width of the image that the camera wrote.
        focal_px: calibrated focal length, pixels.
        centre_px: calibrated principal point, pixels from the first pixel's outer corner.
        digital_zoom: ratio of the digital zoom, 1 without one.
        survey: accuracy, RTK and datum of the position, as the tags say.
        found: whether photogrammetry found place and direction, not a maker's tags.
        ground_slope: metres that the ground rises a metre east and a metre north, where that is
            known.
        distortion: of the lens, where photogrammetry found one.
    """

    lon: float | None = None
    lat: float | None = None
    altitude_gps_m: float | None = None
    altitude_relative_m: float | None = None
    yaw_deg: float | None = None
    pitch_deg: float | None = None
    roll_deg: float | None = None
    focal_35mm: float | None = None
    focal_mm: float | None = None
    make: str = ""
    model: str = ""
    warnings: tuple[str, ...] = ()
    mount: str = "gimbal"
    dialect: str = ""
    pixel_mm: float | None = None
    pixels_wide: float | None = None
    focal_px: float | None = None
    centre_px: tuple[float, float] | None = None
    digital_zoom: float | None = None
    survey: dict[str, str] = field(default_factory=dict)
    found: bool = False
    ground_slope: tuple[float, float] = (0.0, 0.0)
    distortion: Distortion | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict of JSON types; `from_json` undoes it exactly."""
        return {**asdict(self), "warnings": list(self.warnings)}

    def brief(self) -> dict[str, Any]:
        """What is known of the camera, but for warnings and survey, as a dict of JSON types."""
        given = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in NOT_BRIEF and getattr(self, field.name) != field.default
        }
        if "centre_px" in given:
            given["centre_px"] = list(given["centre_px"])
        return {name: value for name, value in given.items() if _is_known(name, value)}

    @classmethod
    def from_brief(cls, data: dict[str, Any]) -> CameraPose:
        """The pose that `brief` is of.

        Raises:
            ValueError: the data are none of a pose.
        """
        for name, value in data.items():
            if not _is_known(name, value):
                raise ValueError(f"{name} {value!r} is none of a camera")
        return cls.from_json({**data, "warnings": []})

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CameraPose:
        """Rebuild a pose from `to_json`'s dict."""
        centre = data.get("centre_px")
        tuples: dict[str, Any] = {"centre_px": None if centre is None else (centre[0], centre[1])}
        if "ground_slope" in data:
            tuples["ground_slope"] = data["ground_slope"][0], data["ground_slope"][1]
        bent = data.get("distortion")
        tuples["distortion"] = bent and Distortion(tuple(bent["radial"]), bent["fisheye"])
        known = {field.name for field in fields(cls)}  # later releases may have more
        given = {**data, **tuples, "warnings": tuple(data["warnings"])}
        return cls(**{name: value for name, value in given.items() if name in known})


def _is_known(name: str, value: Any) -> bool:
    """Whether a field has a value of its kind, numbers being finite."""
    if name in ("make", "model", "mount", "dialect"):
        return isinstance(value, str)
    if name == "centre_px":
        return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
    return _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
