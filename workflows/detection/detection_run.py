"""Detectors over all versions of a flight's images; what was found is kept, and stands.

OUT/found/ has a small JSON file for each image, codec, ratio and detector: bytes and objects. It
says what they follow from: SHA-256 of image, model, policy and detectors, ratio, steps, versions of
the peers' libraries. This package's own version is not among them: take another OUT where
encoder or decoder have changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from detection_codecs import Codec, Flight, Key, Original, digest, keep

from archive_pipeline.detection.boxes import Detections
from archive_pipeline.detection.detectors import (
    FLOOR,
    DetectorFile,
    detect,
    load_detector,
    whole,
)
from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.flight.source_image import SourceImage

FOUND = "found"


@dataclass(frozen=True)
class Found:
    """What a detector found in one version of an image; `bytes` is what the version takes."""

    bytes: int
    objects: Detections


@dataclass
class Run:
    """Detectors over all versions of a flight's images.

    Attributes:
        out: folder of the run.
        detectors: whose finds are wanted.
        tell: called with a line for each version that was looked at.
        failed: errors by the images' ids; these images take part in nothing more.
    """

    out: Path
    flight: Flight
    detectors: tuple[DetectorFile, ...]
    device: str
    tell: Callable[[str], None]
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def images(self) -> list[SourceImage]:
        """Images that have not failed."""
        return [image for image in self.flight.images if image.id not in self.failed]

    def _path(self, codec: Codec, image: SourceImage, ratio: float, file: DetectorFile) -> Path:
        key = self._key(codec, image, ratio, file)
        rate = "" if isinstance(codec, Original) else f"-{ratio:g}"
        name = f"{codec.name}{rate}-{digest(key)}.json"
        return self.out / FOUND / Path(image.id).stem / name

    def _key(self, codec: Codec, image: SourceImage, ratio: float, file: DetectorFile) -> Key:
        own = {"image": image.sha256, "detector": file.sha256, "floor": FLOOR}
        return {**codec.key(ratio), **own}

    def found(
        self, codec: Codec, image: SourceImage, ratio: float, file: DetectorFile
    ) -> Found | None:
        """What is kept of an image; None where nothing is, or the file is damaged."""
        path = self._path(codec, image, ratio, file)
        try:
            data = json.loads(path.read_bytes())
            if data["key"] != self._key(codec, image, ratio, file):
                raise ValueError("of something else")
            return Found(int(data["bytes"]), Detections.from_json(data["objects"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.tell(f"{path}: damaged, made anew ({error})")
            return None

    def missing(self, codec: Codec, ratio: float) -> dict[str, list[DetectorFile]]:
        """Detectors whose finds are not kept yet, by the images' ids."""
        wanted = {
            image.id: [f for f in self.detectors if not self.found(codec, image, ratio, f)]
            for image in self.images
        }
        return {id: files for id, files in wanted.items() if files}

    def fill(self, codec: Codec, ratio: float) -> None:
        """Look for what is not known yet of a codec's images at one ratio."""
        wanted = self.missing(codec, ratio)
        if not wanted:
            return
        self.failed |= {
            id: f"{codec.name}: {error}"
            for id, error in codec.prepare(self.flight, ratio).items()
            if id in wanted
        }
        for image in self.images:
            if image.id in wanted:
                try:
                    self._look(codec, image, ratio, wanted[image.id])
                except ArchivePipelineError as error:
                    self.failed[image.id] = str(error)
                except (OSError, ValueError, RuntimeError) as error:  # of the peers' libraries
                    self.failed[image.id] = f"{codec.name}: {error}"

    def _look(
        self, codec: Codec, image: SourceImage, ratio: float, files: list[DetectorFile]
    ) -> None:
        width, height = image.width, image.height
        with codec.open(self.flight, image, ratio) as (size, read):
            pixels = whole(read, width, height)
            for file in files:
                detector = load_detector(file, self.device)
                (objects,) = detect(detector, [pixels], width, height, detector.input_size, height)
                key = self._key(codec, image, ratio, file)
                data = {"key": key, "bytes": size, "objects": objects.to_json()}
                path = self._path(codec, image, ratio, file)
                keep(path, json.dumps(data, separators=(",", ":")).encode())
        self.tell(f"{codec.name} {ratio:g} {image.id}: {size:,} bytes")
