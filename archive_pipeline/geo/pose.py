"""What a camera says of itself, as it is stored; `camera` reads it and computes with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CameraPose:
    """What a camera says of its own position, direction and lens.

    Attributes:
        lon, lat: degrees, WGS 84; ``None`` without a GPS position.
        altitude_gps_m: height above the sea (or the ellipsoid: cameras differ), metres.
        altitude_relative_m: height above the take-off point, metres.
        yaw_deg: direction of the image's top, degrees clockwise from true north.
        pitch_deg: -90 looks straight down, 0 at the horizon.
        roll_deg: about the optical axis, positive tilts the camera to its right.
        focal_35mm: 35 mm-equivalent focal length, mm.
        focal_mm: physical focal length, mm.
        make, model: the camera's names, as written.
        warnings: one sentence for each thing that had to be assumed.
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

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict of JSON types; `from_json` undoes it exactly."""
        return {**asdict(self), "warnings": list(self.warnings)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CameraPose:
        """Rebuild a pose from `to_json`'s dict."""
        return cls(**{**data, "warnings": tuple(data["warnings"])})
