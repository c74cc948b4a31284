"""Where an image lies: by its own georeference, or by where its camera was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import rasterio
from rasterio.crs import CRS
from rasterio.errors import CRSError

from archive_pipeline.flight._beside import beside
from archive_pipeline.flight._metadata_blocks import Block
from archive_pipeline.flight.camera_tags import read_pose
from archive_pipeline.flight.formats import IMAGE_SUFFIXES
from archive_pipeline.flight.locations import open_file
from archive_pipeline.flight.poses import Poses
from archive_pipeline.flight.source_image import EXIF_PREFIX
from archive_pipeline.flight.xmp import read_xmp
from archive_pipeline.geo.camera import locate
from archive_pipeline.geo.georef import Georef
from archive_pipeline.geo.mapping import raster_georef
from archive_pipeline.geo.pose import CameraPose
from archive_pipeline.geo.terrain import Terrain

MAX_PROJECTION = 1 << 16  # bytes of a `.prj`


@dataclass(frozen=True)
class Ground:
    """What places camera frames beside their own tags.

    Attributes:
        elevation: height of flat ground, metres, in the datum of the cameras' GPS altitude, for
            frames that carry no height above take-off.
        terrain: the ground as it is.
        poses: where frames were taken, which beats their tags.
    """

    elevation: float | None = None
    terrain: Terrain | None = None
    poses: Poses | None = None

    def pose(
        self, id: str, camera: CameraPose | None, size: tuple[int, int], notes: list[str]
    ) -> CameraPose | None:
        """A frame's pose: as photogrammetry found it, or as its tags say."""
        if self.poses is None:
            return camera
        given = self.elevation is not None or self.terrain is not None
        found = self.poses.placed(id, camera, size, given)
        if found is None:
            notes.append(f"not in {self.poses.name}: placed by its tags")
        return found or camera


FLAT = Ground()


def placed(
    dataset: rasterio.DatasetReader,
    path: Path,
    id: str,
    metadata: list[Block],
    notes: list[str],
    ground: Ground,
) -> tuple[Georef, CameraPose | None, str | None]:
    """Where an image lies, by its own georeference or its camera's tags; the pose; the time."""
    georef = raster_georef(dataset, _projection(path, notes) if not dataset.crs else None)
    camera, captured = read_pose(_exif(dataset.driver, metadata), read_xmp(metadata))
    if georef.footprint is None:
        camera = ground.pose(id, camera, (dataset.width, dataset.height), notes)
        if camera is not None:
            located, assumptions = locate(
                camera, dataset.width, dataset.height, ground.elevation, ground.terrain
            )
            georef = located if located.footprint is not None else georef
            notes += [*camera.warnings, *assumptions]
        elif georef.method == "none":
            notes.append("no position: neither a georeference nor a camera's tags")
    return georef, camera, captured


def _projection(path: Path, notes: list[str]) -> CRS | None:
    """The CRS in the `.prj` beside an image, as ESRI writes it next to a world file."""
    name = f"{path.stem}.prj".casefold()
    for folded, other in beside(path.parent, IMAGE_SUFFIXES).starting(name):
        if folded == name:
            try:
                with open_file(path.with_name(other)) as file:
                    text = file.read(MAX_PROJECTION).decode("utf-8", "replace")
                crs = CRS.from_wkt(text, morph_from_esri_dialect=True)
                epsg = crs.to_epsg()  # ESRI's names for what EPSG has
                return crs if epsg is None else CRS.from_epsg(epsg)
            except (OSError, CRSError) as error:
                notes.append(f"its {other} is not read: {' '.join(str(error).split())}")
    return None


def _exif(driver: str, metadata: list[Block]) -> bytes:
    """Pick the EXIF block out of a format's metadata; empty where there is none."""
    for name, payload in metadata:
        if name in ("EXIF", "eXIf"):
            return payload
        if driver == "JPEG" and name == "APP1" and payload.startswith(EXIF_PREFIX):
            return payload
    return b""
