"""Object detectors: any Ultralytics model, run over slices of a large image at full resolution.

Ultralytics (AGPL-3.0, the extra `verify`) is imported only when a detector is loaded, and kept
from phoning home, installing packages and writing settings.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from archive_pipeline.detection.boxes import (
    EMPTY,
    NMS_IOU,
    Detections,
    merge_slices,
    slice_rows,
    strips,
)
from archive_pipeline.errors import ArchivePipelineError
from archive_pipeline.flight.locations import sha256
from archive_pipeline.geo.georef import Window

DEFAULT_DETECTOR = "yolo11s.pt"
FLOOR = 0.01  # least confidence that is looked at; mean average precision needs the weak ones too
STORED_FLOOR = 0.1  # the same of what an archive keeps: most finds are weaker, and take space
MAX_SLICE_OBJECTS = 300
BATCH = 8  # slices that a detector takes at once
WHOLE_BYTES = 128 << 20  # an image of so many bytes is held in memory as a whole
EXTRA = "pip install 'archive-pipeline[verify]'"
# Where weights downloaded by name are kept, as for torch.hub.
CACHE = "archive-pipeline"

Read = Callable[[Window], NDArray[np.uint8]]


class DetectorError(ArchivePipelineError):
    """A detector that cannot be had or fails; one line that names it."""


@dataclass(frozen=True)
class DetectorFile:
    """A detector's weights on this machine.

    Attributes:
        name: for people; the file's or folder's name.
        path: of the file or folder.
        sha256: hex digest of the contents: what tells detectors apart.
    """

    name: str
    path: Path
    sha256: str


def find_detectors(names: Iterable[str]) -> list[DetectorFile]:
    """Find weights, downloading those that Ultralytics publishes under the name; each once.

    Args:
        names: paths of .pt, .onnx or .torchscript files or of exported folders (OpenVINO's end
            in _openvino_model), or names such as yolo11s.pt.

    Raises:
        DetectorError: one cannot be found or downloaded, or Ultralytics is not installed.
    """
    import_ultralytics()
    found: dict[str, DetectorFile] = {}
    for name in names:
        path = Path(name)
        if not path.exists():
            path = _downloaded(name)
        try:
            digest = _digest(path)
        except OSError as error:
            raise DetectorError(f"{name}: {error.strerror or error}") from error
        found.setdefault(digest, DetectorFile(path.name, path.absolute(), digest))
    return list(found.values())


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and digests of a folder's files."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        lines = [f"{p.relative_to(path).as_posix()} {_digest(p)}\n" for p in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    return sha256(path)


def _downloaded(name: str) -> Path:
    """Path of published weights, from the cache or the network."""
    downloads = importlib.import_module("ultralytics.utils.downloads")
    file = name if name.endswith(".pt") else f"{name}.pt"
    if file not in downloads.GITHUB_ASSETS_NAMES:
        raise DetectorError(f"{name}: no such file, and no model that Ultralytics publishes")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(home) / CACHE / "detectors" / file
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            downloads.attempt_download_asset(path, retry=0, progress=False)
        except Exception as error:  # what it raises differs between releases
            raise _no_download(name) from error
        if not path.is_file():
            raise _no_download(name)
    return path


def _no_download(name: str) -> DetectorError:
    return DetectorError(
        f"{name}: cannot be downloaded (no network?); give weights that are here: --model PATH"
    )


@cache
def import_ultralytics() -> Any:
    """Import the ultralytics package with everything off that leaves the process.

    Raises:
        DetectorError: it is not installed.
    """
    import torch  # noqa: F401  # before OMP_NUM_THREADS is ultralytics' 1

    # OpenVINO imports this and phones home; it goes without where it is not installed.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        switches = {
            "YOLO_CONFIG_DIR": folder,  # settings are written at import, and never again
            "YOLO_OFFLINE": "true",
            "YOLO_AUTOINSTALL": "false",
            "YOLO_VERBOSE": "false",
            "ULTRALYTICS_SAFE_LOAD": "true",  # weights cannot run code
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # it sets it for good
            "TORCHINDUCTOR_CACHE_DIR": folder,  # torchvision makes one
        }
        # it puts a function of its own in place of Pillow's, for the whole process
        with _environment(switches), _replaced(Image, "open", Image.open):
            try:
                package = importlib.import_module("ultralytics")
                events = importlib.import_module("ultralytics.utils.events")
                importlib.import_module("torchvision")
            except ImportError as error:
                missing = isinstance(error, ModuleNotFoundError)
                reason = "is not installed" if missing else f"cannot be imported ({error})"
                raise DetectorError(f"ultralytics {reason}: {EXTRA}") from error
    logging.getLogger("ultralytics").setLevel(logging.CRITICAL)
    # a program that uses this one may have imported it before
    dict.update(package.settings, sync=False)
    package.settings._save = lambda: None  # exports save them again, where they were
    events.events.enabled = False
    return package


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _own_threads(path: Path) -> Iterator[None]:
    """Load a detector that keeps to this process's share of threads, one worker a core or so.

    Ultralytics sets PyTorch's number itself, and leaves the runtimes of exports at all cores.
    """
    import torch

    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        try:
            if path.is_dir():
                import openvino

                def core(*args: Any, make: Any = openvino.Core) -> Any:
                    made = make(*args)
                    made.set_property("CPU", {"INFERENCE_NUM_THREADS": threads})
                    return made

                stack.enter_context(_replaced(openvino, "Core", core))
            elif path.suffix == ".onnx":
                import onnxruntime

                def session(
                    *args: Any, make: Any = onnxruntime.InferenceSession, **kwargs: Any
                ) -> Any:
                    options = onnxruntime.SessionOptions()
                    options.intra_op_num_threads = threads
                    return make(args[0], options, **kwargs)

                stack.enter_context(_replaced(onnxruntime, "InferenceSession", session))
        except ImportError as error:
            raise DetectorError(f"{path.name}: needs {error.name}: {EXTRA}") from error
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class Detector:
    """A loaded detector; make one with `load_detector`.

    Attributes:
        file: its weights.
        classes: name of each class index.
        input_size: pixels of the input's side.
    """

    def __init__(self, file: DetectorFile, device: str) -> None:
        self.file = file
        yolo = import_ultralytics().YOLO
        try:
            tasks = importlib.import_module("ultralytics.nn.tasks")
            with (
                _own_threads(file.path),
                _replaced(tasks, "SAFE_LOAD", True),  # though it was imported before
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                self._model = yolo(str(file.path))
                self._device = device
                self.input_size = int(np.max(self._model.overrides.get("imgsz", 640)))
                self._predict([np.zeros((self.input_size, self.input_size, 3), np.uint8)])
            self.input_size = int(np.max(self._model.predictor.imgsz))  # an export has its own
            self.classes = {int(k): str(v) for k, v in self._model.names.items()}
        except DetectorError:
            raise
        except Exception as error:  # a library of many backends: anything
            raise self._failed("cannot be loaded", error) from error
        if self._model.task not in ("detect", "obb", "segment", "pose"):
            raise DetectorError(f"{file.name}: finds no objects: its task is {self._model.task}")

    def detect(self, slices: list[NDArray[np.uint8]]) -> list[Detections]:
        """Find objects in images of one shape, uint8 RGB (height, width, 3).

        Raises:
            DetectorError: the detector fails.
        """
        found = []
        try:
            for start in range(0, len(slices), BATCH):
                found += self._predict(slices[start : start + BATCH])
        except Exception as error:
            raise self._failed("fails", error) from error
        return found

    def _predict(self, slices: list[NDArray[np.uint8]]) -> list[Detections]:
        results = self._model.predict(
            [np.ascontiguousarray(pixels[..., ::-1]) for pixels in slices],  # BGR, as OpenCV's
            imgsz=self.input_size,
            conf=FLOOR,
            iou=NMS_IOU,
            max_det=MAX_SLICE_OBJECTS,
            device=self._device,
            verbose=False,
            save=False,
        )
        found = []
        for result in results:
            boxes = result.obb if result.obb is not None else result.boxes
            if boxes is None:
                found.append(EMPTY)
            else:
                columns = (boxes.xyxy, boxes.conf, boxes.cls)
                found.append(Detections.of(*(c.cpu().numpy() for c in columns)))
        return found

    def _failed(self, what: str, error: Exception) -> DetectorError:
        lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
        return DetectorError(
            f"{self.file.name}: {what}: {lines[0] if lines else type(error).__name__}"
        )


@cache
def load_detector(file: DetectorFile, device: str = "auto") -> Detector:
    """Load a detector once a process.

    Args:
        device: "cpu", "cuda", or "auto" for what is there.

    Raises:
        DetectorError: the weights cannot be loaded.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Detector(file, device)


def detect(
    detector: Detector, images: list[Read], width: int, height: int, size: int | None, block: int
) -> list[Detections]:
    """Find the objects in versions of one image, slice by slice at full resolution.

    Where versions have equal pixels, the detector runs once: the same pixels give the same
    objects on any device.

    Args:
        images: for each version, a function from a window to uint8 RGB pixels.
        size: side of a slice in pixels; the detector's input size without one.
        block: rows that are cheap to read at once.

    Returns:
        For each version, its objects in pixels of the whole image.
    """
    if width * height * 3 <= WHOLE_BYTES:
        block = height
    rows = slice_rows(width, height, size or detector.input_size)
    readers = [strips(read, width, height, rows, block) for read in images]
    found: list[list[list[Detections]]] = [[] for _ in images]
    for windows, *pixels in zip(rows, *readers, strict=True):
        wanted: list[NDArray[np.uint8]] = []
        places = []  # for each version and window, where in `wanted` its pixels are
        for version in pixels:
            for index, (col, _, across, _) in enumerate(windows):
                part = version[:, col : col + across]
                first = index  # of the first version
                if version is pixels[0] or not np.array_equal(part, wanted[first]):
                    wanted.append(part)
                    first = len(wanted) - 1
                places.append(first)
        seen = detector.detect(wanted)
        for number in range(len(images)):
            line = []
            for index, (col, row, _, _) in enumerate(windows):
                d = seen[places[number * len(windows) + index]]
                shifted = d.boxes + np.array([col, row, col, row])
                line.append(Detections(shifted, d.scores, d.classes))
            found[number].append(line)
    return [merge_slices(rows, lines) for lines in found]


def whole(read: Read, width: int, height: int) -> Read:
    """The same function over an image that is read once, where it is small enough to be held."""
    if width * height * 3 > WHOLE_BYTES:
        return read
    pixels = read((0, 0, width, height))
    return lambda window: pixels[
        window[1] : window[1] + window[3], window[0] : window[0] + window[2]
    ]


def detect_all(
    files: Iterable[DetectorFile], device: str, read: Read, width: int, height: int, block: int
) -> list[tuple[Detector, Detections]]:
    """What each detector finds in an image, of scores that an archive keeps.

    Raises:
        DetectorError: a detector fails.
    """
    read = whole(read, width, height)
    found = []
    for file in files:
        detector = load_detector(file, device)
        (objects,) = detect(detector, [read], width, height, None, block)
        found.append((detector, objects.where(objects.scores >= STORED_FLOOR)))
    return found


def pack_detections(found: Iterable[tuple[Detector, Detections]]) -> bytes:
    """Serialise what `detect_all` found in an image, for its archive.

    JSON: for each detector its name, the SHA-256 of its weights, the slices' side in pixels, the
    least confidence, and columns of objects (`Detections.to_json`) with their classes' names.
    """
    stored = [
        {
            "name": detector.file.name,
            "sha256": detector.file.sha256,
            "slice": detector.input_size,
            "floor": STORED_FLOOR,
            "classes": {int(k): detector.classes[int(k)] for k in np.unique(objects.classes)},
            "objects": objects.to_json(),
        }
        for detector, objects in found
    ]
    return json.dumps(stored, separators=(",", ":")).encode()


@dataclass(frozen=True)
class StoredDetections:
    """What a detector found in an original at ingest, in slices of `slice` pixels a side.

    `floor` is the least confidence that was kept.
    """

    slice: int
    floor: float
    found: Detections


def unpack_detections(data: bytes) -> dict[str, StoredDetections]:
    """What `pack_detections` stored, by SHA-256 of the detector's weights.

    Raises:
        ValueError, KeyError, TypeError: the data are damaged.
    """
    return {
        str(one["sha256"]): StoredDetections(
            int(one["slice"]), float(one["floor"]), Detections.from_json(one["objects"])
        )
        for one in json.loads(data)
    }
