"""What the commands of `archive` do, as functions with the names of their options.

>>> import archive_pipeline as ap
>>> report = ap.ingest("beach", "archive.zarr", ratio=24, workers=0)
>>> [outcome.status for outcome in report.outcomes]
['ingested', 'ingested', 'ingested']

Every error is an `ArchivePipelineError`, but for a `ValueError` where an argument is of no use.
What fails for single images is in the reports, while the other images are done. With `workers`
other than 0 processes are started that import the calling script: it then needs the usual
`if __name__ == "__main__":`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archive_pipeline.arguments import (
    check_choice,
    check_decoding,
    check_folder,
    check_number,
    check_whole,
    check_workers,
    places,
    texts,
)
from archive_pipeline.errors import UsageError, require, require_denoising

if TYPE_CHECKING:
    from archive_pipeline.detection.verification import Verification
    from archive_pipeline.geo.georef import Bbox
    from archive_pipeline.jobs.check import CheckReport
    from archive_pipeline.jobs.ingest import IngestReport
    from archive_pipeline.jobs.ingest_task import Outcome
    from archive_pipeline.jobs.opened import OpenArchive
    from archive_pipeline.jobs.remove import RemoveReport
    from archive_pipeline.jobs.restoring import RestoreReport
    from archive_pipeline.jobs.retire import RetireReport
    from archive_pipeline.pcdc.precision import Precision
    from archive_pipeline.photogrammetry.verification import PhotogrammetryReport

DEFAULT_ARCHIVE = "./archive.zarr"
DEFAULT_RATIO = 100
ALLOCATIONS = ("uniform", "objects", "policy", "greedy")

Count = Callable[[int], None]
"""Told after each image of the number of all."""
Stage = Callable[[str], None]
"""Told what is done before the first image and after the last."""


def _silent(*_: object) -> None:
    pass


def ingest(
    flights: str | Path | Iterable[str | Path],
    archive: str | Path = DEFAULT_ARCHIVE,
    *,
    flight: str | None = None,
    ratio: float | None = None,
    bpp: float | None = None,
    source_ratio: float | None = None,
    model: str | Path | None = None,
    allocation: str = "uniform",
    adapt: int = 0,
    overwrite: bool = False,
    ground_elevation: float | None = None,
    dem: str | Path | None = None,
    poses: str | Path | None = None,
    salvage: bool = False,
    lossless_jpeg: bool = False,
    image: str | Iterable[str] = (),
    detect: Iterable[str] = (),
    device: str = "auto",
    precision: Precision = "auto",
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Callable[[Outcome, int], None] = _silent,
    part: Callable[[str, int, int, int], None] = _silent,
    stage: Stage = _silent,
) -> IngestReport:
    """Archive every image of flight directories; images that the archive has are skipped.

    Args:
        flights: one folder or fsspec URL, or several.
        archive: path or fsspec URL; made if there is none.
        flight: id of a single flight; by default its directory's name.
        ratio: raw bytes (height x width x 3) over archive bytes, 100 by default.
        bpp: instead, archive bits a pixel.
        source_ratio: instead, source file bytes over archive bytes.
        model: name of a shipped model, or a model folder.
        allocation: "uniform", "objects", "policy" or "greedy".
        adapt: updates of the policy on each image.
        overwrite: encode images again that the archive has.
        ground_elevation: metres, for frames without altitude above take-off.
        dem: a raster of the ground's heights, for frames to be projected to.
        poses: positions and directions that photogrammetry found, which beat the frames' tags:
            ODM's shots.geojson (lenses from its cameras.json) or geo.txt,
            OpenSfM's reconstruction.json, Metashape's cameras.xml,
            Pix4D's calibrated_external_camera_parameters_wgs84.txt,
            COLMAP's images.txt or images.bin.
        salvage: archive damaged JPEGs as far as they can be decoded.
        lossless_jpeg: keep JPEGs as the files that they are, to the byte, outside any budget.
        image: only these, by name, are what `lossless_jpeg`, and `overwrite` with it, mean.
        detect: detectors whose detections in the originals are stored.
        device: "auto", "cpu" or "cuda".
        precision: of the codec's large networks: "float32", "bfloat16", or "auto", which is
            bfloat16 where the device has matrix units for it.
        scheduler: address of a Dask scheduler.
        workers: local processes; 0 is this process; by default one a core.
        progress: called after each image with its outcome and the number of images.
        part: called after each shard of a large image: its id, how many are done, how many there
            are, and the number of images.
        stage: called with what is done before the first image and after the last.

    Raises:
        UsageError: arguments exclude each other, or need another.
        FlightError: a flight directory cannot be used.
        ModelError, UtilityError, DetectorError: a network, or what it needs, cannot be had.
        ArchiveError: the archive cannot be written, or no longer.
        ClusterError: there is no such scheduler, or it was lost.
        NotInstalled: packages are missing that only ingest needs.

    >>> import archive_pipeline as ap
    >>> report = ap.ingest("beach", "archive.zarr", ratio=24, workers=0)
    >>> [outcome.status for outcome in report.outcomes]  # they were archived above
    ['skipped', 'skipped', 'skipped']
    """
    given = {"--ratio": ratio, "--bpp": bpp, "--source-ratio": source_ratio}
    budgets = {name: value for name, value in given.items() if value is not None}
    if len(budgets) > 1:
        raise UsageError("--ratio, --bpp and --source-ratio exclude each other")
    for name, value in budgets.items():
        check_number(name, value, 1e-6, 1e9)
    if ground_elevation is not None:
        check_number("--ground-elevation", ground_elevation, -1e5, 1e5)  # metres
    detectors = texts("detect", detect)
    check_choice("allocation", allocation, ALLOCATIONS)
    check_whole("adapt", adapt, 0, 100)
    check_decoding(device, precision, 0, 0)
    check_workers(workers)
    if adapt and allocation != "policy":
        raise UsageError("--adapt updates the policy: it needs --allocation policy")
    if allocation == "objects" and not detectors:
        raise UsageError("--allocation objects needs a detector: --detect MODEL")
    chosen = texts("image", image)
    if chosen and not lossless_jpeg:
        raise UsageError("--image says which JPEGs to keep: it needs --lossless-jpeg")
    directories = places("flights", flights)
    if flight is not None and len(directories) > 1:
        raise UsageError("--flight names a single FLIGHT_DIR")

    require("torch", "archive ingest")
    if lossless_jpeg:
        require("imagecodecs", "--lossless-jpeg")
    from archive_pipeline.flight.locations import location, name_of
    from archive_pipeline.jobs.ingest import ingest as run
    from archive_pipeline.jobs.ingest_task import Budget, IngestOptions

    if flight == "":
        raise UsageError("--flight is empty: leave it out for the directory's name")
    named = [(flight or name_of(p) or "flight", p) for p in map(location, directories)]
    if len({id for id, _ in named}) < len(named):
        raise UsageError("two FLIGHT_DIRs have the same name; ingest one with --flight")
    options = IngestOptions(
        Budget(ratio, bpp, source_ratio) if budgets else Budget(ratio=DEFAULT_RATIO),
        None if model is None else str(model),
        device,
        overwrite,
        ground_elevation,
        detectors,
        allocation,
        adapt,
        precision,
        None if dem is None else str(Path(dem).absolute()),
        None if poses is None else str(Path(poses).absolute()),
        salvage,
        lossless_jpeg,
        chosen,
    )
    return run(
        str(archive),
        named,
        options,
        scheduler=scheduler,
        workers=workers,
        progress=progress,
        part=part,
        stage=stage,
    )


def open(
    archive: str | Path = DEFAULT_ARCHIVE,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    steps: int = 0,
    seed: int = 0,
    realism: float = 1.0,
) -> OpenArchive:
    """Open an archive for reading: flights, images, and pixels with their georeference.

    Args:
        archive: path or fsspec URL.
        device: where pixels are decoded: "auto", "cpu" or "cuda".
        precision: of the codec's large networks: "float32", "bfloat16", or "auto", which is
            bfloat16 where the device has matrix units for it.
        steps: denoising steps; 0 is the deterministic decoder.
        seed: of the denoiser's noise.
        realism: with steps, how much of the detail that they generate is in the pixels, 0 (none,
            the deterministic decoder's) to 1.

    Raises:
        ArchiveError: there is no archive, or of a format that this version does not know.

    >>> import archive_pipeline as ap
    >>> archive = ap.open("archive.zarr")
    >>> archive.flights
    ['beach']
    >>> [image.id for image in archive.images]
    ['DJI_0001.JPG', 'DJI_0002.JPG', 'DJI_0003.JPG']

    An image, or a part of it, in its own pixel grid:

    >>> image = archive["DJI_0002.JPG"]
    >>> image
    OpenImage('beach/DJI_0002.JPG', 720 x 304)
    >>> image.read((100, 50, 64, 32)).values.shape
    (32, 64, 3)

    A bounding box, north up, of all images that show it; `numpy.asarray` takes it, too:

    >>> west, south = image.footprint[3]
    >>> box = (west, south, west + 1e-4, south + 1e-4)
    >>> pixels = archive.window(box)
    >>> pixels.crs, pixels.values.dtype, len(pixels.transform)
    ('EPSG:32615', dtype('uint8'), 6)
    >>> pixels.to_xarray().dims
    ('band', 'y', 'x')
    """
    from archive_pipeline.jobs.opened import OpenArchive

    check_decoding(device, precision, steps, seed, realism)
    if steps and realism:
        require_denoising()
    return OpenArchive(str(archive), device, steps, seed, precision, realism)


def restore(
    archive: str | Path = DEFAULT_ARCHIVE,
    *,
    bbox: Bbox | None = None,
    bbox_crs: str = "EPSG:4326",
    flight: str | None = None,
    image: str | Iterable[str] = (),
    output: str | Path = "restored",
    format: str = "gtiff",
    mosaic: bool = False,
    ortho: bool = False,
    resolution: float | None = None,
    crs: str | None = None,
    max_size: int | None = None,
    overwrite: bool = False,
    steps: int = 0,
    seed: int = 0,
    realism: float = 1.0,
    device: str = "auto",
    precision: Precision = "auto",
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Count = _silent,
    stage: Stage = _silent,
) -> RestoreReport:
    """Write images, or the part of them inside a bounding box, as georeferenced files.

    Images go to `output`/flight/image, a mosaic to `output`/mosaic.tif. A file that is there
    already stays, and its image is among `failed`.

    Args:
        archive: path or fsspec URL.
        bbox: (west, south, east, north) in `bbox_crs`; whole images without one.
        flight: only this flight.
        image: only this image, or these: ids or "flight/id".
        output: folder to write to, outside the archive.
        format: "gtiff", "jpeg" or "png".
        mosaic: one north-up GeoTIFF of all images, made by this process.
        ortho: instead, each image as a north-up GeoTIFF by its true geometry.
        resolution: pixel size of the mosaic in units of its CRS; by default the finest image's.
        crs: of the mosaic; by default the projected one of most images, `bbox_crs` or UTM.
        max_size: pixels on the longer side of a restored image at most; means of pixels make it
            smaller, of an overview where that is fine enough.
        overwrite: replace files that `restore` wrote.
        steps: denoising steps; 0 is the deterministic decoder.
        seed: of the denoiser's noise.
        realism: with steps, how much of the detail that they generate is in the pixels, 0 (none,
            the deterministic decoder's) to 1.
        device: "auto", "cpu" or "cuda".
        precision: of the codec's large networks: "float32", "bfloat16", or "auto", which is
            bfloat16 where the device has matrix units for it.
        scheduler: address of a Dask scheduler.
        workers: local processes; 0 is this process; by default one a core.
        progress: called after each image, or each block of a mosaic, with their number.
        stage: called with what is done before the first image.

    Raises:
        UsageError: the bounding box, a CRS or the resolution is invalid; or options that make no
            sense together, as a mosaic that is no GeoTIFF, or that others shall make.
        ArchiveError: the archive cannot be used, or a name is not in it.
        OutputError: `output` is inside the archive, or a mosaic cannot be written.
        ClusterError: there is no such scheduler, or it was lost.

    >>> import archive_pipeline as ap
    >>> report = ap.restore("archive.zarr", image="DJI_0001.JPG", output="restored", workers=0)
    >>> [file["window"] for file in report.files], report.failed
    ([[0, 0, 720, 304]], [])
    """
    from archive_pipeline.jobs.restore import restore as run
    from archive_pipeline.jobs.selection import Selection

    check_decoding(device, precision, steps, seed, realism)
    if scheduler is None and steps and realism:
        require_denoising()
    check_workers(workers)
    return run(
        str(archive),
        Selection(bbox, bbox_crs, flight, texts("image", image)),
        check_folder("output", output),
        format=format,
        mosaic=mosaic,
        ortho=ortho,
        resolution=resolution,
        crs=crs,
        max_size=max_size,
        overwrite=overwrite,
        steps=steps,
        seed=seed,
        realism=realism,
        precision=precision,
        device=device,
        scheduler=scheduler,
        workers=workers,
        progress=progress,
        stage=stage,
    )


def check(
    archive: str | Path = DEFAULT_ARCHIVE,
    *,
    repair: bool = False,
    overviews: bool = False,
    progress: Count = _silent,
    stage: Stage = _silent,
) -> CheckReport:
    """Verify every checksum, decode every tile, compare sizes and the index with the contents.

    Args:
        archive: path or fsspec URL.
        repair: write the index anew if it does not agree, and remove what interrupted ingests
            left; nothing else.
        overviews: with `repair`, give overviews to images that were archived without.
        progress: called after each image with the number of images.
        stage: called with what is done before the first image and after the last.

    Raises:
        UsageError: overviews are asked for without repair.
        ArchiveError: there is no archive to check, or the index cannot be written.

    >>> import archive_pipeline as ap
    >>> report = ap.check("archive.zarr")
    >>> report.images, report.problems
    (3, [])
    """
    from archive_pipeline.jobs.check import check as run

    return run(str(archive), progress, stage, repair=repair, overviews=overviews)


def remove(
    flight: str,
    image: str | Iterable[str] = (),
    *,
    archive: str | Path = DEFAULT_ARCHIVE,
    yes: bool = False,
    progress: Count = _silent,
    stage: Stage = _silent,
) -> RemoveReport:
    """Take images of a flight out of an archive for good, or all of it with its documents.

    Args:
        flight: its id.
        image: only this image, or these: ids.
        archive: path or fsspec URL.
        yes: remove them; else only tell what would go.
        progress: called after each image and document with their number.
        stage: called with what is done before the first and after the last.

    Raises:
        ArchiveError: there is no such archive, flight or image; or the store fails.

    >>> import archive_pipeline as ap
    >>> report = ap.remove("beach", "DJI_0001.JPG", archive="archive.zarr")
    >>> list(report.images), report.done
    (['beach/DJI_0001.JPG'], False)
    """
    from archive_pipeline.jobs.remove import remove as run

    images = texts("image", image)
    return run(str(archive), flight, images, yes=yes, progress=progress, stage=stage)


def retire(
    flight: str | None = None,
    *,
    archive: str | Path = DEFAULT_ARCHIVE,
    originals: str | Path | None = None,
    require: str | Iterable[str] = (),
    yes: bool = False,
    progress: Count = _silent,
    stage: Stage = _silent,
) -> RetireReport:
    """Delete originals that the archive can stand in for: read, decoded and compared right before.

    Args:
        flight: only this flight's.
        archive: path or fsspec URL.
        originals: folder or s3:// URL below which they lie; by default those that this user
            archived from on this machine.
        require: "detection", "photogrammetry" or "photogrammetry-quick", or several: verdicts that
            each image must have passed.
        yes: delete; else only find out what would go.
        progress: called after each image with the number of images.
        stage: called with what is done before the first.

    Raises:
        UsageError: `require` names another kind.
        ArchiveError: there is no such archive or flight, it cannot be written, or it lies with the
            originals.
        FlightError: the folder of originals holds no images.
    """
    from archive_pipeline.flight.locations import location
    from archive_pipeline.jobs.retire import retire as run
    from archive_pipeline.store.verdicts import KINDS

    kinds = texts("require", require)
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"--require {kind}: there are {', '.join(KINDS)}")
    return run(
        str(archive),
        flight,
        originals=None if originals is None else location(str(originals)),
        require=kinds,
        yes=yes,
        progress=progress,
        stage=stage,
    )


def info(archive: str | Path = DEFAULT_ARCHIVE) -> dict[str, Any]:
    """Flights, images and totals, as `archive info --json` prints them.

    Sizes are bytes, footprints rings of [longitude, latitude] in EPSG:4326, transforms six numbers
    in rasterio's order. Images whose record is damaged are under "damaged".

    Raises:
        ArchiveError: the archive cannot be used.

    >>> import archive_pipeline as ap
    >>> [flight["id"] for flight in ap.info("archive.zarr")["flights"]]
    ['beach']
    """
    from archive_pipeline.jobs.info import describe

    return describe(str(archive))


def verify_detection(
    archive: str | Path = DEFAULT_ARCHIVE,
    *,
    originals: str | Path | None = None,
    labels: str | Path | None = None,
    names: str | Path | None = None,
    model: str | Iterable[str] = (),
    classes: Iterable[str] = (),
    tolerance: float = 0.02,
    confidence: float = 0.25,
    iou: float = 0.5,
    slice: int | None = None,
    report: str | Path | None = None,
    overwrite: bool = False,
    steps: int = 0,
    seed: int = 0,
    realism: float = 1.0,
    device: str = "auto",
    precision: Precision = "auto",
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Count = _silent,
    drawn: Count = _silent,
    stage: Stage = _silent,
) -> Verification:
    """Compare what detectors find in the originals and in the restored images.

    Args:
        archive: path or fsspec URL.
        originals: folder or URL of the original files; by default the folders that this user
            archived from on this machine. What the archive itself names is not followed.
        labels: folder of YOLO labels, the reference; else the originals' detections are.
        names: data.yaml or classes.txt with the labels' class names.
        model: detector, or several: an Ultralytics name, .pt, .onnx, or OpenVINO folder;
            "yolo11s.pt" by default.
        classes: "GROUP" or "GROUP=NAME,..." each: classes judged together.
        tolerance: largest difference of any metric that passes.
        confidence: least confidence of detections that count, 0 to 1.
        iou: least overlap of a detection with its reference object, above 0 to 1.
        slice: side of the slices that detectors see, pixels; by default the model's input size.
        report: folder to write report.html, result.json and two CSV tables to.
        overwrite: replace files of these names that are there, else an error.
        steps: denoising steps; 0 is the deterministic decoder.
        seed: of the denoiser's noise.
        realism: with steps, how much of the detail that they generate is in the pixels, 0 (none,
            the deterministic decoder's) to 1.
        device: "auto", "cpu" or "cuda".
        precision: of the codec's large networks: "float32", "bfloat16", or "auto", which is
            bfloat16 where the device has matrix units for it.
        scheduler: address of a Dask scheduler.
        workers: local processes; 0 is this process; by default one a core.
        progress: called after each image with the number of images.
        drawn: the same for images that the report shows.
        stage: called with what is done before the first image and after the last.

    Raises:
        UsageError: `classes` name nothing.
        ArchiveError: the archive cannot be used.
        DetectorError: a detector cannot be had, or none knows a class that is asked for.
        FlightError: the folder of originals holds no images.
        LabelError: the labels cannot be used.
        ReportError: the report cannot be written.
        ClusterError: there is no such scheduler, or it was lost.

    >>> import archive_pipeline as ap
    >>> found = ap.verify_detection("archive.zarr", model="detector.torchscript", workers=0)
    >>> len(found.images), found.failed
    (3, [])
    """
    from archive_pipeline.detection.detectors import DEFAULT_DETECTOR
    from archive_pipeline.detection.labels import parse_groups
    from archive_pipeline.detection.verification import VerifyOptions
    from archive_pipeline.flight.locations import location
    from archive_pipeline.jobs.verify import verify, versions_of

    check_decoding(device, precision, steps, seed, realism)
    check_workers(workers)
    check_number("tolerance", tolerance, 0, float("inf"))
    check_number("confidence", confidence, 0, 1)
    check_number("iou", iou, 1e-6, 1)
    if slice is not None:
        check_whole("slice", slice, 32, 1 << 16)
    try:
        groups = parse_groups(texts("classes", classes))
    except ValueError as error:
        raise UsageError(str(error)) from error
    models = texts("model", model)
    options = VerifyOptions(
        models or (DEFAULT_DETECTOR,),
        groups,
        None if originals is None else location(str(originals)),
        None if labels is None else Path(labels),
        None if names is None else Path(names),
        tolerance,
        confidence,
        iou,
        slice,
        device,
        steps,
        seed,
        precision,
        realism,
    )
    if report is not None:
        from archive_pipeline.detection.report import prepare_report
        from archive_pipeline.store.archive import Archive

        replace = prepare_report(Path(report), Archive.open(archive).folder, overwrite)
    done = verify(
        str(archive),
        options,
        scheduler=scheduler,
        workers=workers,
        progress=progress,
        stage=stage,
    )
    if report is not None:
        from archive_pipeline.detection.report import write_report

        write_report(done, Path(report), versions_of(done), drawn, replace)
    return done


def verify_photogrammetry(
    archive: str | Path = DEFAULT_ARCHIVE,
    *,
    quick: bool = False,
    originals: str | Path | None = None,
    flight: str | None = None,
    inliers: float = 0.9,
    frame_inliers: float = 0.5,
    shift: float = 0.1,
    moved: float = 0.3,
    centres: float = 0.5,
    features: int = 8192,
    report: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "auto",
    scheduler: str | None = None,
    workers: int | None = None,
    progress: Count = _silent,
    stage: Stage = _silent,
) -> PhotogrammetryReport:
    """Compare tie points, and reconstructions, of originals and restored frames.

    Args:
        archive: path or fsspec URL.
        quick: compare tie points only.
        originals: folder or URL of the original files; by default the folders that this user
            archived from on this machine. What the archive itself names is not followed.
        flight: only this flight.
        inliers: least share of all tie points that is kept, 0 to 1.
        frame_inliers: least share of any frame's that has many, 0 to 1.
        shift: pixels that the points of any frame may shift by.
        moved: pixels that half of the points of any frame may move by.
        centres: ground sample distances that cameras may move by, root mean square.
        features: of a frame at most.
        report: folder to write report.html, result.json and two CSV tables to.
        overwrite: replace files of these names that are there, else an error.
        seed: of all that is random.
        device: "auto", "cpu" or "cuda", where frames are restored.
        precision: of the codec's large networks: "float32", "bfloat16", or "auto", which is
            bfloat16 where the device has matrix units for it.
        scheduler: address of a Dask scheduler.
        workers: local processes; 0 is this process; by default one a core.
        progress: called after each frame's features with the number of frames.
        stage: called with what is done before the first frame and after the last.

    Raises:
        ArchiveError: the archive cannot be used, or has no such flight.
        FlightError: the folder of originals holds no images.
        NotInstalled: a package of the extra `photogrammetry` is missing.
        ReportError: the report cannot be written.
        ClusterError: there is no such scheduler, or it was lost.
    """
    require("pycolmap", "archive verify-photogrammetry", "photogrammetry")
    from archive_pipeline.flight.locations import location
    from archive_pipeline.jobs.verify_photogrammetry import verify_photogrammetry as run
    from archive_pipeline.photogrammetry.report import prepare_report, write_report
    from archive_pipeline.photogrammetry.verdict import Tolerances
    from archive_pipeline.photogrammetry.verification import PhotogrammetryOptions
    from archive_pipeline.store.archive import Archive

    check_decoding(device, precision, 0, seed)
    check_workers(workers)
    for name, value, most in (
        *(("inliers", inliers, 1), ("frame_inliers", frame_inliers, 1)),
        *(("shift", shift, 1e9), ("moved", moved, 1e9), ("centres", centres, 1e9)),
    ):
        check_number(name, value, 0, most)
    check_whole("features", features, 64, 32768)
    options = PhotogrammetryOptions(
        Tolerances(inliers, frame_inliers, shift, moved, centres),
        quick,
        None if originals is None else location(str(originals)),
        flight,
        features,
        seed,
        device,
        precision,
    )
    there = None
    if report is not None:
        there = prepare_report(Path(report), Archive.open(archive).folder, overwrite)
    done = run(
        str(archive),
        options,
        scheduler=scheduler,
        workers=workers,
        progress=progress,
        stage=stage,
    )
    if report is not None and there is not None:
        stage("writing the report")
        write_report(done, Path(report), there)
    return done
