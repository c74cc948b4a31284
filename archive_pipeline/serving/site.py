"""What all routes of a server share: the archive, what was made before, threads."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory, mkdtemp
from typing import TypeVar
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from archive_pipeline.codec.settings import Settings
from archive_pipeline.errors import UsageError, require
from archive_pipeline.jobs.composing import PlacedImage
from archive_pipeline.jobs.decoding import Decoding
from archive_pipeline.jobs.views import View
from archive_pipeline.outputs.paths import DiskError
from archive_pipeline.pcdc.reader.decoder import core_count
from archive_pipeline.serving._errors import NoRoom, NotFound, Unavailable
from archive_pipeline.serving._kept import Kept
from archive_pipeline.serving._original_files import OriginalFiles
from archive_pipeline.serving._responses import Made, Sent, Written, is_known
from archive_pipeline.serving._work import Workers
from archive_pipeline.serving.catalogue import Catalogue, version_of
from archive_pipeline.serving.display import levels_of
from archive_pipeline.serving.options import ServeOptions
from archive_pipeline.store.archived_image import ArchivedImage
from archive_pipeline.store.layout import ImageEntry
from archive_pipeline.store.stored_models import ensure_model, require_denoiser
from archive_pipeline.store.tile_cache import TileCache

T = TypeVar("T")

ENCODED_BYTES = 128 << 20  # of tiles and windows as they were sent
METADATA_BYTES = 64 << 20  # of images that are open
LIGHT, WAITING_LIGHT = 4, 512  # threads that look things up, and requests for that
WAITING = 128  # requests for pixels
MOST_SENT = 16  # files that lie on disk to be sent
NO_ROOM = "the server cannot write the file: its disk may be full"
WAITING_LARGE = 8  # requests for whole images and mosaics; one is made at a time
KEPT_LEVELS = 1000  # images
KEPT_PLACES = 2000  # images and overviews
SLASH = "\0"  # stands for a slash inside a name: names hold no NUL
STEPS = (0, 1)


class Site:
    """An archive that is served.

    Attributes:
        options: what the server was started with.
        catalogue: the archive's images.
        originals: their files, where they are still there.
        placed: images and overviews of them where they lie in Web Mercator.
        tiles: of images, decoded.
    """

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self.catalogue = Catalogue(options.archive)
        self.originals = OriginalFiles(options.archive, options.originals)
        self._light = Workers("look", LIGHT, WAITING_LIGHT)
        self._heavy = Workers("pixels", max(2, core_count()), WAITING)
        self._large = Workers("large", 1, WAITING_LARGE)
        self._sending = 0
        self._encoded: Kept[bytes] = Kept(ENCODED_BYTES)
        self._open: Kept[ArchivedImage] = Kept(METADATA_BYTES)
        self.placed: Kept[PlacedImage] = Kept(KEPT_PLACES)
        self.tiles = TileCache()
        self._levels: Kept[tuple[tuple[float, float] | None]] = Kept(KEPT_LEVELS)

    @property
    def title(self) -> str:
        """What a page is called: the archive's own name."""
        return PurePosixPath(self.options.archive.rstrip("/")).name or self.options.archive

    async def look(self, request: Request, function: Callable[[], T]) -> T:
        """What a function gives that reads little; run by a thread.

        Raises:
            Unavailable, Gone: as `Workers.run` has it.
        """
        return await self._light.run(request, function)

    async def respond(self, request: Request, plan: Callable[[], Made]) -> Response:
        """Answer with bytes: kept ones, or none where the client has them, or new ones.

        Args:
            plan: says what is to be made; it reads little.

        Raises:
            Unavailable, Gone: as `Workers.run` has it.
        """
        made = await self.look(request, plan)
        if is_known(request, made.etag):
            return Response(status_code=304, headers=made.headers)
        body = self._encoded.get(made.etag)
        if body is None:
            workers = self._large if made.large else self._heavy
            body = await workers.run(request, made.make, made.etag)
            self._encoded.put(made.etag, body, len(body))
        return Response(body, media_type=made.media_type, headers=made.headers)

    async def send(self, request: Request, plan: Callable[[], Written]) -> Response:
        """Answer with a file that is written for it, and removed after.

        Raises:
            Unavailable, Gone: as `Workers.run` has it.
        """
        written = await self.look(request, plan)
        if is_known(request, written.headers["ETag"]):
            return Response(status_code=304, headers=written.headers)
        path, done = await self.write(request, written.write, written.large)
        return Sent(path, done, media_type=written.media_type, headers=written.headers)

    async def write(
        self, request: Request, write: Callable[[Path], Path], large: bool
    ) -> tuple[Path, Callable[[], None]]:
        """Write a file into a folder of its own; returns where it is, and what removes it.

        Raises:
            Unavailable, Gone: as `Workers.run` has it.
            NoRoom: the file cannot be written.
        """
        if self._sending >= MOST_SENT:
            raise Unavailable("too many files are being sent")
        try:
            folder, left = Path(mkdtemp(dir=self.temporary.name)), threading.Event()
        except OSError as error:  # a full disk
            raise NoRoom(NO_ROOM) from error
        self._sending += 1

        def done() -> None:
            self._sending -= 1
            left.set()
            shutil.rmtree(folder, ignore_errors=True)

        def job() -> Path:
            try:
                return write(folder)
            except DiskError as error:
                raise NoRoom(NO_ROOM) from error
            finally:
                if left.is_set():  # by whom it was for
                    shutil.rmtree(folder, ignore_errors=True)

        try:
            return await (self._large if large else self._heavy).run(request, job), done
        except BaseException:
            done()
            raise

    def settings(self, steps: int) -> Settings:
        """How pixels are decoded.

        Raises:
            UsageError: so many steps are not served.
            NotInstalled: PyTorch is not, and is needed for them.
        """
        if steps not in STEPS:
            raise UsageError(f"steps {steps} is none of {', '.join(map(str, STEPS))}")
        if steps:
            require("torch", "steps 1")
        return self._settings[steps]

    @cached_property
    def _settings(self) -> dict[int, Settings]:
        return {steps: self.decoding(steps).settings() for steps in STEPS}

    def decoding(self, steps: int) -> Decoding:
        """The same for jobs."""
        return Decoding(self.options.device, steps, 0, self.options.precision)

    def warm(self) -> None:
        """Look at the archive and load the model of its first image that has one.

        Raises:
            Unavailable: the archive cannot be read.
            ArchiveError: the model is damaged.
        """
        from archive_pipeline.codec.models import decoder_for

        now = self.catalogue.now
        models = now.rows["archive:model"].drop_null()
        if len(models):
            sha256 = models[0].as_py()
            ensure_model(now.archive, sha256)
            decoder_for(sha256, self.settings(0))

    def open(self, entry: ImageEntry, steps: int = 0) -> ArchivedImage:
        """An image, open for reading; one for all requests as long as it is the same.

        Raises:
            ArchiveError: its metadata are damaged, or its model has no denoiser for steps.
        """
        key = version_of(entry), steps
        found = self._open.get(key)
        if found is None:
            archive = self.catalogue.archive
            if steps:
                require_denoiser(archive, entry)
            found = ArchivedImage(archive, entry, self.settings(steps), fixed=("georef",))
            weight = 4096 + sum(len(blob) for _, blob in found.source.metadata)
            self._open.put(key, found, weight)
        return found

    def image(self, flight: str, image: str) -> ImageEntry:
        """The image that a path of a request means.

        Raises:
            NotFound: there is none of that name.
            Unavailable: the archive cannot be read.
        """
        return self.catalogue.image(name(flight), name(image))

    def levels(self, entry: ImageEntry) -> tuple[float, float] | None:
        """Which values of an image are black and white, see `levels_of`.

        Raises:
            ArchiveError: its pixels are damaged.
        """
        if entry.record["dtype"] == "uint8":
            return None
        key = version_of(entry)
        known = self._levels.get(key)
        if known is None:
            area = 0, 0, entry.record["width"], entry.record["height"]
            known = (levels_of(View(self.open(entry), area)),)
            self._levels.put(key, known)
        return known[0]

    @cached_property
    def temporary(self) -> TemporaryDirectory[str]:
        """Where files are written that are sent."""
        return TemporaryDirectory(prefix="archive-serve-")

    def close(self) -> None:
        """Begin nothing more."""
        for workers in (self._light, self._heavy, self._large):
            workers.close()


def name(text: str) -> str:
    """A flight's or image's name as a path of a request has it.

    Raises:
        NotFound: no image can have it.
    """
    if len(text) > 4096:
        raise NotFound("a name of that length is not there")
    return text.replace(SLASH, "/")


def href(flight: str, id: str | None = None) -> str:
    """Path of a flight or an image in this server."""
    path = f"/flights/{quote(flight, safe='', errors='surrogateescape')}"
    if id is None:
        return path
    return f"{path}/images/{quote(id, safe='/', errors='surrogateescape')}"
