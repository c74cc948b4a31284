"""Lenses in the words of OpenSfM: those of its own reconstruction, and of ODM's `cameras.json`.

Names and units are from OpenSfM's documentation of its camera models; how ODM writes them is from
its opendm/camera.py and opendm/shots.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from archive_pipeline.geo.lens import Lens, bent, not_read

# projections that are Brown's or OpenCV's fisheye but for tangential terms
UNDERSTOOD = (
    *("perspective", "brown", "simple_radial", "radial"),
    *("fisheye", "fisheye_opencv", "fisheye62", "fisheye624"),
)
BESIDE = "cameras.json"
NO_FILE = f"without {BESIDE} beside it or above its odm_report: distortion is not known"
NO_CAMERA = f"{BESIDE} has no lens of this camera: distortion is not known"


def opensfm_lens(camera: dict[str, Any]) -> Lens | None:
    """The lens of one of OpenSfM's cameras, if that has a focal length."""
    focal = camera.get("focal", camera.get("focal_x"))
    if not focal:
        return None
    kind = str(camera.get("projection_type", "perspective"))
    centre = float(camera.get("c_x", 0.0)), float(camera.get("c_y", 0.0))
    if kind not in UNDERSTOOD:
        return Lens(float(focal), centre, note=not_read(kind))
    radial = [float(camera.get(f"k{n}", 0.0)) for n in range(1, 7)]
    return Lens(float(focal), centre, bent(radial, kind.startswith("fisheye")))


def is_cameras(document: Any) -> bool:
    """Whether this is ODM's `cameras.json`: lenses by names, and no poses."""
    return (
        isinstance(document, dict)
        and bool(document)
        and all(isinstance(one, dict) and "projection_type" in one for one in document.values())
    )


def odm_cameras(shots: Path) -> dict[str, dict[str, Any]] | None:
    """Cameras by names, of ODM's `cameras.json`.

    Args:
        shots: ODM's shots.geojson, beside which it lies, or above whose folder `odm_report`.

    Returns:
        None without the file.

    Raises:
        ValueError: there is one that is none of ODM's.
    """
    folder = shots.absolute().parent
    for path in (folder / BESIDE, folder.parent / BESIDE):
        if path.parent != folder and folder.name != "odm_report":
            continue
        try:
            document = json.loads(path.read_text("utf-8-sig"))
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if not is_cameras(document):
            raise ValueError(f"{path}: holds no lenses of ODM's")
        return {_plain(name): camera for name, camera in document.items()}
    return None


def odm_lens(shot: dict[str, Any], cameras: dict[str, dict[str, Any]] | None) -> Lens | None:
    """The lens of one of ODM's shots.

    Args:
        shot: its properties; earlier releases of ODM do not name its camera.
        cameras: `odm_cameras`.

    Returns:
        With the shot's own focal length: after a flight was split, `cameras.json` has that of one
        part. None where there is none.
    """
    focal = float(shot["focal"]) if shot.get("focal") else None
    lens = None
    if cameras is not None:
        named = "camera" in shot
        camera = cameras.get(_plain(str(shot["camera"]))) if named else _like(shot, cameras)
        lens = None if camera is None else opensfm_lens(camera)
    if focal is None:
        return lens
    return replace(lens or Lens(focal, note=NO_FILE if cameras is None else NO_CAMERA), focal=focal)


def _plain(name: str) -> str:
    """A camera's name without OpenSfM's mark, which cameras.json lacks and shots have."""
    return name.removeprefix("v2 ")


def _like(shot: dict[str, Any], cameras: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The one camera with a shot's size and focal length."""
    if not shot.get("focal"):
        return None
    focal = float(shot["focal"])
    found = [
        camera
        for camera in cameras.values()
        if (camera.get("width"), camera.get("height")) == (shot.get("width"), shot.get("height"))
        and math.isclose(float(camera.get("focal", camera.get("focal_x", 0.0))), focal)
    ]
    return found[0] if len(found) == 1 else None
