"""What the `archive` command shows people: progress, and results as text."""

from __future__ import annotations

import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from os.path import splitext
from typing import TYPE_CHECKING, Any

from archive_pipeline._version import __version__
from archive_pipeline.commands._options import say

if TYPE_CHECKING:
    from archive_pipeline.detection.verification import Verification
    from archive_pipeline.jobs.ingest import IngestReport
    from archive_pipeline.photogrammetry.verification import PhotogrammetryReport

SHOWN_WARNINGS = 20  # kinds of them


class Progress:
    """One line on stderr where that is a terminal, else nothing: a stage's name, or a bar.

    Nothing of it stays: the result says what was done.
    """

    def __init__(self, label: str, quiet: bool, unit: str = "image") -> None:
        self.label = label
        self.unit = unit
        self.shown = not quiet and sys.stderr.isatty()
        self.line: Any = None  # tqdm's
        self.has_bar = False
        self.before = 0
        self.since = time.time()  # when the last stage began; tqdm's clock

    def _show(self, bar: bool, **options: Any) -> None:
        """Put another line in the place of the one that is shown, unless that is of the kind."""
        if self.line is not None and self.has_bar == bar:
            return
        from tqdm import tqdm

        self.close()
        self.line = tqdm(leave=False, file=sys.stderr, **options)
        self.has_bar = bar

    def close(self) -> None:
        """Take away the line that is shown; another may follow."""
        if self.line is not None:
            self.line.close()
        self.line, self.has_bar = None, False

    def _bar(self, total: int) -> None:
        if self.has_bar:
            return
        self._show(
            True,
            total=total,
            initial=self.before,
            desc=self.label,
            unit=self.unit,
            smoothing=0.1,  # workers finish in bursts
            delay=1e-6,  # shown when it knows when the first was begun
        )
        self.line.start_t = self.line.last_print_t = self.since
        self.line.refresh()

    def step(self, total: int) -> None:
        if self.shown:
            self._bar(total)
            self.line.update()

    def part(self, name: str, done: int, parts: int, total: int) -> None:
        """Show how far a large raster is, while its image counts for nothing yet."""
        if self.shown:
            self._bar(total)
            self.line.set_postfix_str(f"{name}: {done} of {parts} parts" if done < parts else "")

    def stage(self, name: str) -> None:
        """Show what is done before the first image is, or after the last."""
        self.since = time.time()
        if self.shown:
            self._show(False, bar_format="{desc}")
            self.line.set_description_str(f"{self.label}: {name}")

    def skip(self) -> None:
        """Count something that took no time: the remaining time is that of the others."""
        self.before += 1
        if self.has_bar:
            self.line.initial += 1
            self.line.update()

    def echo(self, line: str) -> None:
        """Print a line to stderr above the one that is shown."""
        if self.line is not None:
            self.line.clear()
        say(line, err=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def print_warnings(report: IngestReport, verbose: int) -> None:
    """Print what is odd: each kind of it once with an example, unless all are asked for."""
    own = [f"{warned.path}: {warned.warning}" for warned in report.remarks]
    if not verbose:
        kinds: dict[str, list[str]] = {}
        for warned in report.remarks:
            kind = re.sub(r"\d+", "#", warned.warning)  # the same but for its numbers
            kinds.setdefault(kind, []).append(f"{warned.path}: {warned.warning}")
        own = [
            first + (f" (and {len(more)} like it; -v lists all)" if more else "")
            for first, *more in kinds.values()
        ]
    lines = own + [f"{warned.path}: {warned.warning}" for warned in report.neighbours]
    shown = lines if verbose else lines[:SHOWN_WARNINGS]
    for line in shown:
        say(f"Warning: {line}", err=True)
    if len(shown) < len(lines):
        more = counted(len(lines) - len(shown), "more warning")
        say(f"... and {more} (-v lists all)", err=True)


def print_over_budget(report: IngestReport, verbose: int) -> None:
    """Print which images take more than they may, and why."""
    over = report.over_budget
    shown = over if verbose else over[:SHOWN_WARNINGS]
    for path, image in shown:
        say(
            f"Over budget: {path}: takes {image.archive_bytes} bytes, may take "
            f"{image.budget_bytes}: {image.reason}",
            err=True,
        )
    if len(shown) < len(over):
        say(f"... and {len(over) - len(shown)} more over budget (-v lists all)", err=True)


def print_left_out(report: IngestReport, verbose: int) -> None:
    """Print what of the flights is not archived: how many files of each kind, or their names."""
    if not report.left_out:
        return
    listed = _kinds(report.left_out)
    files = counted(len(report.left_out), "file")
    verb = "is" if len(report.left_out) == 1 else "are"
    say(f"{files} {verb} not archived: {listed}", err=True)
    for path in report.left_out if verbose else ():
        say(f"Not archived: {path}", err=True)


def _kinds(paths: Iterable[str]) -> str:
    """How many files of each suffix there are, and links to folders."""
    kinds = Counter(
        "linked folder" if path.endswith("/") else splitext(path)[1].lower() or "without suffix"
        for path in paths
    )
    return ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))


def print_ingest(report: IngestReport, result: dict[str, Any], archive_url: str) -> None:
    say(
        f"{archive_url}: {result['ingested']} ingested, {result['skipped']} skipped, "
        f"{len(result['failed'])} failed in {duration(result['seconds'])}"
    )
    kept = [document for document in report.documents if document.status == "ingested"]
    if kept:
        read, stored = (sum(getattr(d, n) for d in kept) for n in ("source_bytes", "archive_bytes"))
        listed = _kinds(d.path for d in kept)
        files = counted(len(kept), "file")
        say(f"  {files} kept byte for byte ({listed}): {byte_size(read)} -> {byte_size(stored)}")
    if report.workers_lost:
        again = f"{counted(report.retries, 'image')} tried again"
        say(f"  {counted(report.workers_lost, 'worker')} died, {again}")
    if not result["ingested"]:
        return
    stored = result["archive_bytes"]
    pixels = sum(o.pixels for o in report.outcomes if o.status == "ingested")
    files, raw = byte_size(result["source_bytes"]), byte_size(result["raw_bytes"])
    say(f"  {files} of files, {raw} of pixels -> {byte_size(stored)}")
    say(
        f"  ratio to pixels {result['raw_bytes'] / stored:.1f}, "
        f"to files {result['source_bytes'] / stored:.1f}, {8 * stored / pixels:.3f} bits a pixel"
    )
    lossless = sum(o.codec == "lossless" for o in report.outcomes)
    if lossless:
        say(f"  {lossless} of the images stored losslessly")
    whole = sum(o.codec == "jpeg" for o in report.outcomes)
    if whole:
        say(f"  {whole} of the images kept as their JPEG files, byte for byte, outside the budget")
    if report.over_budget:
        excess = sum(over.excess_bytes for _, over in report.over_budget)
        images = counted(len(report.over_budget), "image")
        say(f"  over budget: {images}, by {byte_size(excess)}")
    if result["model_bytes"]:
        say(f"  models, stored once: {byte_size(result['model_bytes'])}")
    say(f"  {result['megapixels_per_second']:.2f} megapixels a second, {report.workers} at a time")
    say(f"  {seconds_of_work(report.stages)}")


def seconds_of_work(stages: dict[str, float]) -> str:
    """Where the time went, in words."""
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items())
    return f"seconds of work: {spent}"


def counted(number: int, noun: str) -> str:
    """A number of things: 1 file, 2 files."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time for people: 12.3 s, 4 min 5 s, 2 h 3 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def print_info(result: dict[str, Any], quiet: bool, most: int | None = None) -> None:
    """Print what `jobs.info.describe` found.

    Args:
        most: images of a flight that are listed; all where None.
    """
    for flight in result["flights"]:
        images = flight["images"]
        said = [f"{flight['id']}: {counted(len(images), 'image')}", *_crs_of(images)]
        if images:
            source, archived = (
                sum(image[name] for image in images) for name in ("source_bytes", "archive_bytes")
            )
            said.append(f"{byte_size(source)} of files -> {byte_size(archived)}")
        say(", ".join(said))
        if quiet:
            continue
        documents = flight.get("documents", [])
        if documents:
            stored = sum(document["archive_bytes"] for document in documents)
            files, kinds = counted(len(documents), "file"), _kinds(d["path"] for d in documents)
            say(f"  {files} kept byte for byte, {byte_size(stored)}: {kinds}")
        for verdict in flight.get("verdicts", []):
            say(f"  {_verdict_line(verdict)}")
        retired = sum(image["retired"] for image in images)
        if retired:
            say(f"  {counted(retired, 'original')} deleted by archive retire: keep this archive")
        for line in _table([_cells(image) for image in images[:most]]):
            say(line)
        if most is not None and len(images) > most:
            say(f"  ... and {len(images) - most} more (--all lists them)")
    totals = result["totals"]
    say(
        f"{counted(totals['images'], 'image')}, {byte_size(totals['source_bytes'])} of files -> "
        f"{byte_size(totals['archive_bytes'])}, models {byte_size(totals['model_bytes'])}"
    )
    if not quiet:
        steps = {"deterministic": "--steps 0", "diffusion": "--steps 1"}
        for sha256, decoders in result["models"].items():
            told = ", ".join(f"{name} ({steps[name]})" for name in decoders) or "none"
            say(f"model {sha256[:12]}, decoders: {told}")
    if result["written_by"] != __version__:
        say(f"made by version {result['written_by'] or '0.1.0'}, this is {__version__}")


def _verdict_line(verdict: dict[str, Any]) -> str:
    """What a verification said, of how many images, and of how many it no longer counts."""
    told = f"{'passed' if verdict['passed'] else 'failed'} verify-{verdict['kind']}"
    models = verdict["how"].get("models")
    known = models if isinstance(models, list) else []  # the archive may be a stranger's
    by = ", ".join(
        str(model["model"]) for model in known if isinstance(model, dict) and "model" in model
    )
    void = f", {verdict['void']} replaced since" if verdict["void"] else ""
    images = counted(len(verdict["images"]), "image")
    return f"{told}{f' by {by}' if by else ''}: {images}{void}, {verdict['date'][:10]}"


def _cells(image: dict[str, Any]) -> tuple[str, ...]:
    """What is told of an image, its centre as longitude and latitude."""
    centre = "no position"
    if ring := image["footprint"]:
        lon, lat = (sum(point[n] for point in ring[:-1]) / (len(ring) - 1) for n in (0, 1))
        unknown = "" if image["crs"] else "  extent unknown"
        centre = f"{(lon + 180) % 360 - 180:.6f} {lat:.6f}{unknown}"
    placed_by = image.get("placed_by")
    if placed_by is not None and not placed_by.endswith(" tags"):
        centre += f"  by {placed_by}"
    size = f"{image['width']}x{image['height']}"
    sizes = byte_size(image["source_bytes"]), "->", byte_size(image["archive_bytes"])
    return (image["id"], size, image["codec"], *sizes, centre)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of cells below each other; names to the left, numbers of bytes to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = "<<<><><"  # `_cells`
    lines = []
    for row in rows:
        cells = [f"{c:{side}{width}}" for c, side, width in zip(row, aligned, widths, strict=True)]
        name, size, codec, source, arrow, archived, centre = cells
        lines.append(f"  {name}  {size}  {codec}  {source} {arrow} {archived}  {centre}".rstrip())
    return lines


def _crs_of(images: list[dict[str, Any]]) -> list[str]:
    """The CRS of a flight's images, if any has one; how many there are, if they differ."""
    found = sorted({image["crs"] for image in images if image["crs"]})
    if len(found) < 2:
        return [crs if crs.startswith("EPSG:") else "a CRS without code" for crs in found]
    return [f"{len(found)} CRSs"]


def extent(result: dict[str, Any]) -> str | None:
    """The box that holds all images of `archive info`, as --bbox takes it; None without any."""
    rings = [image["footprint"] for flight in result["flights"] for image in flight["images"]]
    points = [point for ring in rings if ring for point in ring]
    if not points:
        return None
    west, south = (math.floor(1e4 * min(p[n] for p in points)) / 1e4 for n in (0, 1))
    east, north = (math.ceil(1e4 * max(p[n] for p in points)) / 1e4 for n in (0, 1))
    if east - west >= 360:
        west, east = -180, 180
    elif east > 180:  # a ring counts on across the antimeridian; a box's west is then the greater
        west, east = west - 360 if west >= 180 else west, east - 360
    return " ".join(f"{degrees:.4f}" for degrees in (west, south, east, north))


def print_verification(report: Verification, quiet: bool) -> None:
    from archive_pipeline.detection.metrics import METRICS

    def number(value: float | None, sign: str = "") -> str:
        return f"{value:{sign}.3f}" if value is not None else "-"

    for model in report.models:
        say(f"{model.model}: {counted(model.images, 'image')}, reference: {model.reference}")
        if not quiet:
            say(f"  {'':<24}" + "".join(f"{name:>11}" for name in METRICS))
            for group, delta in model.delta.items():
                for label, row, sign in (
                    ("original", model.original[group], ""),
                    ("restored", model.restored[group], ""),
                    ("difference", delta, "+"),
                ):
                    cells = "".join(f"{number(row[name], sign):>11}" for name in METRICS)
                    say(f"  {group[:12]:<12} {label:<11}{cells}")
        for group, failures in model.failed_groups.items():
            listed = ", ".join(f"{f.metric} {f.difference:+.3f}" for f in failures)
            images = failures[0].images
            where = f"; most in {', '.join(images)}" if images else ""
            say(f"  below tolerance: {model.model}: {group}: {listed}{where}")
    verdict = "passed" if report.passed else "failed" if report.below_tolerance else "not proven"
    say(
        f"{verdict}: differences up to {report.options.tolerance:g} pass; "
        f"{counted(len(report.images), 'image')} compared, "
        f"{len(report.failed) + len(report.retired)} not, "
        f"in {duration(report.seconds)}"
    )
    if report.seconds_per_frame is not None and not quiet:
        memory = report.peak_memory and f", {byte_size(report.peak_memory)} of memory at most"
        say(f"{report.seconds_per_frame:.1f} s of a worker for 20 megapixels{memory or ''}")


def print_photogrammetry(report: PhotogrammetryReport, quiet: bool) -> None:
    """Print what a verification by photogrammetry found."""
    for flight in report.flights:
        told = flight.to_json()
        say(f"{flight.flight}: {counted(told['frames'], 'frame')}")
        for line in () if quiet or not flight.pairs else _photogrammetry_lines(told):
            say(f"  {line}")
        for failure in flight.failures:
            where = f"; most in {', '.join(failure.frames)}" if failure.frames else ""
            say(f"  below tolerance: {failure.told()}{where}")
    say(
        f"{report.verdict}; {counted(sum(len(f.frames) for f in report.flights), 'frame')} "
        f"compared, {len(report.failed) + len(report.retired)} not, in {duration(report.seconds)}"
    )


def _photogrammetry_lines(told: dict[str, Any]) -> list[str]:
    """What is told of a flight, of its part of the JSON."""
    images, ties, moved = told["images"], told["inliers"], told["moved"]
    lines = [
        f"tie points of {counted(len(told['pairs']), 'pair')}: {ties['original']}, restored "
        f"{ties['restored']} ({ties['share']:.1%})"
    ]
    medians = sorted(m["median_px"] for m in moved if m["median_px"] is not None)
    if medians:
        middle, most = medians[len(medians) // 2], max(m["p95_px"] or 0 for m in moved)
        lines.append(f"points moved by {middle:.2f} px (median), 95 % by up to {most:.2f} px")
    one, two, apart = told["original"], told["restored"], told["difference"]
    if one is not None:
        two = two or {"images": 0, "points": 0, "reprojection_error_px": math.nan}
        lines.append(f"registered: {images['original']} frames, restored {images['restored']}")
        lines.append(
            f"points in space: {one['points']}, restored {two['points']}; reprojection error "
            f"{one['reprojection_error_px']:.2f} px, restored {two['reprojection_error_px']:.2f}"
        )
    if apart is not None:
        lines.append(
            f"cameras moved by {apart['centres_m']:.4f} m = {apart['centres_gsd']:.2f} ground "
            f"sample distances (RMS), turned by {apart['rotations_deg']:.4f} degrees"
        )
    own = told["control"]
    if own is not None:
        largest = own["centres_gsd"]["largest"]
        most = f"by up to {largest:.2f}" if largest is not None else "anywhere: they fell apart"
        lines.append(
            f"the originals' own noise, {own['noise_px']:.2f} px, moved them {most} "
            f"({counted(own['repeats'], 'repeat')})"
        )
    return lines


def byte_size(count: float) -> str:
    """A number of bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
