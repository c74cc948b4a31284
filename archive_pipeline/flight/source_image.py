"""One source file: everything about it but its pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.flight.locations import Location, location
from archive_pipeline.geo.georef import Georef
from archive_pipeline.geo.pose import CameraPose

TIFF_DRIVERS = ("GTiff", "COG")  # GDAL's
EXIF_PREFIX = b"Exif\0\0"
COMPLEX_INTEGERS = "complex_int16"  # as rasterio names GDAL's CInt16
XMP_PREFIX = b"http://ns.adobe.com/xap/1.0/\0"


class SourceError(ArchivePipelineError):
    """A source image that cannot be read.

    Attributes:
        path: the file.
        reason: one line that says what is wrong with it.
    """

    def __init__(self, path: Location, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class Notes(list[str]):
    """What is odd about a file, one sentence each.

    Attributes:
        left_out: those that say what of it is not archived.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left_out: list[str] = []

    def leave_out(self, *sentences: str) -> None:
        """Say what of the file is not archived."""
        self += sentences
        self.left_out += sentences


@dataclass(frozen=True)
class SourceImage:
    """One source file: everything about it but its pixels.

    Attributes:
        path: the file, or its URL (then pixels are read from a copy on this machine).
        id: its name in the flight, see `find_images`.
        sha256: hex digest of the file's bytes.
        size_bytes: length of the file.
        driver: GDAL's short name of the format, e.g. ``"JPEG"``, ``"GTiff"``, ``"PNG"``.
        width, height: pixels, as stored (EXIF orientation is not applied).
        bands: number of bands, without the alpha band where ``mask == "alpha"``.
        dtype: numpy name of the widest band's type.
        mask: ``"none"``, ``"alpha"``, ``"mask"`` (per-dataset, internal or ``.msk``) or
            ``"nodata"``.
        nodata: nodata value, may be NaN.
        colorinterp: rasterio's name of each band's colour interpretation, alpha included.
        layout: ``photometric`` and ``compression`` (strings or ``None``), ``block_shape``
            ``[rows, cols]``, ``tiled`` (bool), ``overviews`` (list of factors) and
            ``image_structure``, GDAL's items of that name (``INTERLEAVE``, ...); ``bits`` of a
            number or its ``sample`` type where NumPy has none for it.
        descriptions, units, scales, offsets: one entry a band, without alpha.
        colormap: band 1's palette, 256 or 65536 RGBA entries at most; ``None`` without one.
        tags: dataset tags by namespace (``""`` is the default one), derived ones left out.
        band_tags: the same for each band.
        georef: where the pixels lie.
        camera: the camera's pose; ``None`` where the file says nothing of a camera.
        captured: ISO 8601 time of capture, with an offset where the source gives one.
        metadata: byte-for-byte originals ``(name, payload)`` in file order.
        warnings: one sentence for each thing that is odd but did not stop the reading.
        salvaged: the file is damaged, and its pixels are as far as they can be decoded.
        left_out: those of the warnings that say what of the file is not archived; as `read_source`
            finds them, they are not stored.
    """

    path: Location
    id: str
    sha256: str
    size_bytes: int
    driver: str
    width: int
    height: int
    bands: int
    dtype: str
    mask: str = "none"
    nodata: float | int | None = None
    colorinterp: tuple[str, ...] = ()
    layout: dict[str, Any] = field(default_factory=dict)
    descriptions: tuple[str | None, ...] = ()
    units: tuple[str | None, ...] = ()
    scales: tuple[float, ...] = ()
    offsets: tuple[float, ...] = ()
    colormap: tuple[tuple[int, int, int, int], ...] | None = None
    tags: dict[str, dict[str, str]] = field(default_factory=dict)
    band_tags: tuple[dict[str, dict[str, str]], ...] = ()
    georef: Georef = field(default_factory=Georef)
    camera: CameraPose | None = None
    captured: str | None = None
    metadata: tuple[tuple[str, bytes], ...] = ()
    warnings: tuple[str, ...] = ()
    salvaged: bool = False
    left_out: tuple[str, ...] = ()

    @property
    def lossy(self) -> bool:
        """Whether the pixels are photographic: 8-bit RGB once alpha is set aside."""
        rgb = self.colorinterp[:3] == ("red", "green", "blue")
        return self.dtype == "uint8" and self.bands == 3 and rgb

    @property
    def bits(self) -> int | None:
        """Bits of a number, where pixels that are kept exactly have fewer than their type.

        Only TIFF's readers know TIFFs of 12 or 15 bits, as JPEG 2000 files have them.
        """
        bits = self.layout.get("bits")
        most = 32 if self.driver in TIFF_DRIVERS else 8
        return bits if isinstance(bits, int) and 0 < bits < most and not self.lossy else None

    @property
    def complex_integers(self) -> bool:
        """Whether pixels are complex numbers of 16-bit integers, which NumPy has no type for."""
        return self.layout.get("sample") == COMPLEX_INTEGERS

    @property
    def white_is_zero(self) -> bool:
        """Whether the least value of a grey image is white."""
        return self.layout.get("image_structure", {}).get("MINISWHITE") == "YES"

    def to_json(self) -> dict[str, Any]:
        """Return a dict of JSON types with everything but `metadata` and `left_out`."""
        names = [f.name for f in fields(self) if f.name not in ("metadata", "left_out")]
        return {
            **{name: _plain(getattr(self, name)) for name in names},
            "path": self.path if isinstance(self.path, str) else self.path.as_posix(),
            "georef": self.georef.to_json(),
            "camera": None if self.camera is None else self.camera.to_json(),
        }

    @classmethod
    def from_json(
        cls, data: dict[str, Any], metadata: tuple[tuple[str, bytes], ...] = ()
    ) -> SourceImage:
        """Rebuild a source record from `to_json`'s dict and the separately kept `metadata`."""
        camera, nodata, palette = data["camera"], data["nodata"], data["colormap"]
        tuples = ("colorinterp", "descriptions", "units", "band_tags", "warnings")
        numbers = ("scales", "offsets")
        known = {field.name for field in fields(cls)}  # later releases may have more
        return cls(
            **{
                **{name: value for name, value in data.items() if name in known},
                **{name: tuple(data[name]) for name in tuples},
                **{name: tuple(_number(v) for v in data[name]) for name in numbers},
                "path": location(data["path"]),
                "nodata": None if nodata is None else _number(nodata),
                "colormap": None if palette is None else tuple(tuple(c) for c in palette),
                "georef": Georef.from_json(data["georef"]),
                "camera": None if camera is None else CameraPose.from_json(camera),
                "metadata": tuple((name, bytes(payload)) for name, payload in metadata),
            }
        )


def _plain(value: Any) -> Any:
    """Make lists of tuples and strings of the floats that JSON has no numbers for."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _number(value: float | int | str) -> float | int:
    return float(value) if isinstance(value, str) else value
