"""An archive as Python sees it: flights, images, and pixels with their georeference."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from archive_pipeline.codec.settings import Settings
from archive_pipeline.errors import UsageError, did_you_mean
from archive_pipeline.geo.georef import Affine6, Bbox, Georef, Window
from archive_pipeline.jobs.decoding import Decoding
from archive_pipeline.pcdc.precision import Precision
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.index import read_images
from archive_pipeline.store.layout import ArchiveError, ImageEntry
from archive_pipeline.store.stored_models import require_denoiser

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True, repr=False, eq=False)
class Pixels:
    """Pixels with their place on the ground; NumPy takes them as they are.

    Attributes:
        values: (height, width, bands), of the source's type: uint8 of photographs.
        mask: bool (height, width), true where there are pixels; None where all are.
        georef: where they lie; of oblique frames by control points instead of a transform.
        images: names ("flight/id") of the images that they are from.
    """

    values: NDArray[Any]
    mask: NDArray[np.bool_] | None
    georef: Georef
    images: tuple[str, ...]

    @property
    def crs(self) -> str | None:
        """ "EPSG:n" or WKT2, what rasterio and pyproj take; None without position."""
        return self.georef.crs

    @property
    def transform(self) -> Affine6 | None:
        """(a, b, c, d, e, f): x = a col + b row + c, y = d col + e row + f, in units of `crs`."""
        return self.georef.transform

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.values, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        return f"Pixels({self.values.dtype} {self.shape}, {self.crs}, of {', '.join(self.images)})"

    def to_xarray(self) -> xarray.DataArray:
        """As a DataArray (band, y, x) with `spatial_ref`, as rioxarray writes and reads it.

        Coordinates x and y are those of pixel centres, where rows and columns run along the CRS'
        axes. A mask becomes the coordinate `mask` (y, x).

        Raises:
            ImportError: xarray is not installed.
        """
        import xarray

        from archive_pipeline.jobs._lazy import coordinates

        height, width, bands = self.shape
        coords = coordinates(self.georef, bands, height, width)
        if self.mask is not None:
            coords["mask"] = (("y", "x"), self.mask)
        return xarray.DataArray(np.moveaxis(self.values, 2, 0), coords, ("band", "y", "x"))


class OpenImage:
    """One image of an open archive."""

    def __init__(self, opened: OpenArchive, entry: ImageEntry) -> None:
        self._opened = opened
        self._entry = entry
        self.georef = Georef.from_json(entry.record["georef"])

    @property
    def flight(self) -> str:
        return self._entry.flight

    @property
    def id(self) -> str:
        """Its file's name, with its folder where names repeat in the flight."""
        return self._entry.id

    @property
    def name(self) -> str:
        """ "flight/id", unique in the archive."""
        return f"{self.flight}/{self.id}"

    @property
    def width(self) -> int:
        return int(self._entry.record["width"])

    @property
    def height(self) -> int:
        return int(self._entry.record["height"])

    @property
    def crs(self) -> str | None:
        return self.georef.crs

    @property
    def transform(self) -> Affine6 | None:
        return self.georef.transform

    @property
    def footprint(self) -> tuple[tuple[float, float], ...] | None:
        """Closed ring of (longitude, latitude) through its corners; None without position."""
        return self.georef.footprint

    @property
    def captured(self) -> str | None:
        """Time of capture, ISO 8601."""
        captured: str | None = self._entry.record["captured"]
        return captured

    @property
    def lossless(self) -> bool:
        """Whether its pixels are exactly the source's."""
        return self._entry.record["codec"] in ("lossless", "jpeg")

    def original(self) -> bytes | None:
        """The source file, byte for byte; None where only its pixels are kept.

        Files are kept by `ingest --lossless-jpeg`, and where all else would take more.

        Raises:
            ArchiveError: it is damaged.
        """
        return self._opened.reader(self._entry).original()

    def __repr__(self) -> str:
        return f"OpenImage({self.name!r}, {self.width} x {self.height})"

    def read(self, window: Window | None = None, max_size: int | None = None) -> Pixels:
        """Pixels of a window (col, row, width, height), or all of them.

        Args:
            max_size: pixels on the longer side at most, each the mean of those it stands for; from
                an overview where that is fine enough, so that little is decoded.

        Raises:
            ArchiveError: tiles are damaged, each is named.
            UsageError: the window is not inside the image, or `max_size` is no size.
        """
        from archive_pipeline.geo.mapping import window_transform

        try:
            col, row, width, height = map(operator.index, window or (0, 0, self.width, self.height))
        except (TypeError, ValueError) as error:
            raise UsageError(f"{self.name}: {window!r} is not four whole numbers") from error
        if not (0 <= col < col + width <= self.width and 0 <= row < row + height <= self.height):
            raise UsageError(f"{self.name}: {window} is not inside {self.width} x {self.height}")
        area = (col, row, width, height)
        image = self._opened.reader(self._entry)
        if max_size is not None:
            return self._smaller(image, area, max_size)
        mask = image.read_mask(area)
        return Pixels(
            image.read(area),
            None if mask is None else mask > 0,
            window_transform(self.georef, area),
            (self.name,),
        )

    def _smaller(self, image: ArchivedImage, area: Window, max_size: int) -> Pixels:
        from archive_pipeline.geo.mapping import window_transform
        from archive_pipeline.jobs.views import View, check_size, reduced

        check_size(max_size)
        view = reduced(View(image, area), max_size)
        mask, values = view.read_mask(view.window), view.read(view.window)
        georef = window_transform(view.source.georef, view.window)
        return Pixels(values, None if mask is None else mask > 0, georef, (self.name,))

    def to_xarray(self) -> xarray.DataArray:
        """All of it as a DataArray (band, y, x), of which only what is looked at is decoded.

        With `spatial_ref`, by which rioxarray finds CRS and transform, and the coordinates x and y
        of pixel centres where rows and columns run along the CRS' axes: what rio-tiler's
        `XarrayReader` takes.

        Raises:
            ImportError: xarray is not installed.
        """
        from archive_pipeline.jobs._lazy import lazy_pixels

        return lazy_pixels(self._opened.reader(self._entry))

    def window(self, bbox: Bbox, crs: str = "EPSG:4326", max_size: int | None = None) -> Pixels:
        """The smallest window of its own pixel grid that covers what a box shows of it.

        Args:
            bbox: (west, south, east, north) in `crs`.
            max_size: as `read` has it.

        Raises:
            ArchiveError: the image shows nothing of the box, or its tiles are damaged.
            UsageError: the box or its CRS is invalid.
        """
        window = self._window(bbox, crs)
        if window is None:
            raise ArchiveError(f"{self.name}: shows nothing of {bbox} ({crs})")
        return self.read(window, max_size)

    def _window(self, bbox: Bbox, crs: str) -> Window | None:
        from archive_pipeline.geo.mapping import bbox_to_window

        try:
            return bbox_to_window(self.georef, self.width, self.height, bbox, crs)
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}") from error


class OpenArchive:
    """An archive that is open for reading; see `archive_pipeline.open`.

    Attributes:
        url: where it is.
    """

    def __init__(
        self,
        url: str,
        device: str,
        steps: int,
        seed: int,
        precision: Precision,
        realism: float = 1.0,
    ) -> None:
        self.url = url
        self._archive = Archive.open(url)
        self._decoding = Decoding(device, steps, seed, precision, realism)

    @property
    def flights(self) -> list[str]:
        """Ids of its flights."""
        return self._archive.flights()

    @cached_property
    def images(self) -> list[OpenImage]:
        """Its images, as they were when first asked for, in the order of their names.

        Raises:
            ArchiveError: the record of an image is damaged; `archive check` names all.
        """
        return [OpenImage(self, entry) for entry in read_images(self._archive)]

    def __getitem__(self, name: str) -> OpenImage:
        """The image of this name: "flight/id", or the id where no other flight has it."""
        found = [image for image in self.images if name in (image.name, image.id)]
        if len(found) != 1:
            hint = did_you_mean(name, [n for image in self.images for n in (image.name, image.id)])
            problem = f"is in {len(found)} flights" if found else f"is not there{hint}"
            raise KeyError(f"{self.url}: {name} {problem}")
        return found[0]

    def find(self, bbox: Bbox, crs: str = "EPSG:4326") -> list[OpenImage]:
        """Images that show some of a box (west, south, east, north).

        Raises:
            UsageError: the box or its CRS is invalid.
        """
        return [image for image in self.images if image._window(bbox, crs) is not None]

    def window(
        self,
        bbox: Bbox,
        crs: str = "EPSG:4326",
        *,
        flight: str | None = None,
        resolution: float | None = None,
    ) -> Pixels:
        """A box (west, south, east, north) as one north-up array, of all images that show it.

        What `archive restore --mosaic` writes; one image's own pixels are `OpenImage.window`'s.

        Args:
            resolution: pixel size in units of the array's CRS; by default the finest image's. A
                coarse one comes from overviews, so that little is decoded.

        Raises:
            ArchiveError, OutputError: no image shows the box, or one of them is damaged.
            UsageError: the box or its CRS is invalid.
        """
        import rasterio

        from archive_pipeline.geo.mapping import check_bbox
        from archive_pipeline.jobs.restore import restore
        from archive_pipeline.jobs.selection import Selection

        try:
            check_bbox(bbox, crs)
        except ValueError as error:
            raise UsageError(str(error)) from error
        decoding = self._decoding
        with TemporaryDirectory(prefix="archive-window-") as folder:
            report = restore(
                self.url,
                Selection(bbox, crs, flight),
                Path(folder),
                mosaic=True,
                resolution=resolution,
                steps=decoding.steps,
                seed=decoding.seed,
                realism=decoding.realism,
                precision=decoding.precision,
                device=decoding.device,
            )
            if report.failed:
                raise ArchiveError(report.failed[0]["error"])
            if not report.files:
                raise ArchiveError(f"{self.url}: nothing in it shows {bbox} ({crs})")
            made = report.files[0]
            with rasterio.open(made["path"]) as file:
                values, mask = np.moveaxis(file.read(), 0, 2), file.dataset_mask() > 0
            georef = Georef(made["crs"], tuple(made["transform"]), method="transform")
        images = made["image"]
        return Pixels(values, None if mask.all() else mask, georef, tuple(images))

    def reader(self, entry: ImageEntry) -> ArchivedImage:
        """One of its images for what reads rasters."""
        if self._settings.steps:
            require_denoiser(self._archive, entry)
        return ArchivedImage(self._archive, entry, self._settings, fixed=("georef",))

    @cached_property
    def _settings(self) -> Settings:
        return self._decoding.settings()

    def __repr__(self) -> str:
        return f"OpenArchive({self.url!r})"
