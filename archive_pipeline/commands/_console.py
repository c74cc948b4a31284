"""What the `archive` command shows people: progress, and results as text."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from archive_pipeline._version import __version__
from archive_pipeline.commands._options import say

if TYPE_CHECKING:
    from archive_pipeline.detection.verification import Verification
    from archive_pipeline.jobs.ingest import IngestReport

SHOWN_WARNINGS = 20  # kinds of them


class Progress:
    """A progress bar on stderr where that is a terminal, else nothing."""

    def __init__(self, label: str, quiet: bool, unit: str = "image") -> None:
        self.label = label
        self.unit = unit
        self.shown = not quiet and sys.stderr.isatty()
        self.bar: Any = None
        self.status: Any = None
        self.before = 0

    def _start(self, total: int) -> None:
        if self.bar is None:
            from tqdm import tqdm

            self._end_status()
            self.bar = tqdm(
                total=total,
                initial=self.before,
                desc=self.label,
                unit=self.unit,
                file=sys.stderr,
                smoothing=0.1,  # workers finish in bursts
            )

    def step(self, total: int) -> None:
        if self.shown:
            self._start(total)
            self.bar.update()

    def part(self, name: str, done: int, parts: int, total: int) -> None:
        """Show how far a large raster is, while its image counts for nothing yet."""
        if self.shown:
            self._start(total)
            self.bar.set_postfix_str(f"{name}: {done} of {parts} shards" if done < parts else "")

    def stage(self, name: str) -> None:
        """Show what is done before the first image, or after the last."""
        if not self.shown:
            return
        if self.bar is not None:
            self.bar.set_postfix_str(name)
            return
        if self.status is None:
            from tqdm import tqdm

            self.status = tqdm(bar_format="{desc}", leave=False, file=sys.stderr)
        self.status.set_description_str(f"{self.label}: {name}")

    def _end_status(self) -> None:
        if self.status is not None:
            self.status.close()
            self.status = None

    def skip(self) -> None:
        """Count something that took no time: the remaining time is that of the others."""
        self.before += 1
        if self.bar is not None:
            self.bar.initial += 1
            self.bar.update()

    def echo(self, line: str) -> None:
        """Print a line to stderr above the bar."""
        for shown in (self.bar, self.status):
            if shown is not None:
                shown.clear()
        say(line, err=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._end_status()
        if self.bar is not None:
            self.bar.set_postfix_str("")
            self.bar.close()


def print_warnings(report: IngestReport, verbose: int) -> None:
    """Print what is odd: each kind of it once with an example, unless all are asked for."""
    own = [f"{o.path}: {warning}" for o in report.outcomes for warning in o.remarks]
    if not verbose:
        kinds: dict[str, list[str]] = {}
        for outcome in report.outcomes:
            for warning in outcome.remarks:
                kind = re.sub(r"\d+", "#", warning)  # the same but for its numbers
                kinds.setdefault(kind, []).append(f"{outcome.path}: {warning}")
        own = [
            first + (f" (and {len(more)} like it; -v lists all)" if more else "")
            for first, *more in kinds.values()
        ]
    lines = own + [f"{warned.path}: {warned.warning}" for warned in report.neighbours]
    shown = lines if verbose else lines[:SHOWN_WARNINGS]
    for line in shown:
        say(f"Warning: {line}", err=True)
    if len(shown) < len(lines):
        say(f"... and {len(lines) - len(shown)} more warnings (-v lists all)", err=True)


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


def print_ingest(report: IngestReport, result: dict[str, Any], archive_url: str) -> None:
    say(
        f"{archive_url}: {result['ingested']} ingested, {result['skipped']} skipped, "
        f"{len(result['failed'])} failed in {result['seconds']:.1f} s"
    )
    if report.workers_lost:
        say(f"  {report.workers_lost} workers died, {report.retries} images were tried again")
    if not result["ingested"]:
        return
    stored = result["archive_bytes"]
    pixels = sum(o.pixels for o in report.outcomes if o.status == "ingested")
    say(
        f"  {_size(result['source_bytes'])} of files, {_size(result['raw_bytes'])} of pixels "
        f"-> {_size(stored)}"
    )
    say(
        f"  ratio to pixels {result['raw_bytes'] / stored:.1f}, "
        f"to files {result['source_bytes'] / stored:.1f}, {8 * stored / pixels:.3f} bits a pixel"
    )
    lossless = sum(o.codec == "lossless" for o in report.outcomes)
    if lossless:
        say(f"  {lossless} of the images stored losslessly")
    if report.over_budget:
        excess = sum(over.excess_bytes for _, over in report.over_budget)
        images = (
            "1 image takes"
            if len(report.over_budget) == 1
            else (f"{len(report.over_budget)} images take")
        )
        say(f"  over budget: {images} {_size(excess)} more than allowed")
    say(f"  models, once an archive: {_size(result['model_bytes'])}")
    say(f"  {result['megapixels_per_second']:.2f} megapixels a second, {report.workers} at a time")
    say(f"  {seconds_of_work(report.stages)}")


def seconds_of_work(stages: dict[str, float]) -> str:
    """Where the time went, in words."""
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items())
    return f"seconds of work: {spent}"


def counted(number: int, noun: str) -> str:
    """A number of things: 1 file, 2 files."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def print_info(result: dict[str, Any], quiet: bool, most: int | None = None) -> None:
    """Print what `jobs.info.describe` found.

    Args:
        most: images of a flight that are listed; all where None.
    """
    for flight in result["flights"]:
        images = flight["images"]
        source, archived = (
            sum(image[name] for image in images) for name in ("source_bytes", "archive_bytes")
        )
        sizes = f", {_size(source)} of files -> {_size(archived)}" if images else ""
        say(f"{flight['id']}: {counted(len(images), 'image')}{sizes}")
        for image in images[:most] if not quiet else ():
            ring = image["footprint"]
            where = "no position"
            if ring:
                lon = sum(p[0] for p in ring[:-1]) / (len(ring) - 1)
                lon = (lon + 180) % 360 - 180
                lat = sum(p[1] for p in ring[:-1]) / (len(ring) - 1)
                where = f"{lon:.6f} {lat:.6f}  {image['crs'] or 'extent unknown'}"
            say(
                f"  {image['id']:<28} {image['width']}x{image['height']}  {image['codec']:<8} "
                f"{_size(image['source_bytes']):>9} -> {_size(image['archive_bytes']):>9}  {where}"
            )
        if not quiet and most is not None and len(images) > most:
            say(f"  ... and {len(images) - most} more (--all lists them)")
    totals = result["totals"]
    say(
        f"{counted(totals['images'], 'image')}, {_size(totals['source_bytes'])} of files -> "
        f"{_size(totals['archive_bytes'])}, models {_size(totals['model_bytes'])}"
    )
    if result["written_by"] != __version__:
        say(f"made by version {result['written_by'] or '0.1.0'}, this is {__version__}")


def print_verification(report: Verification, quiet: bool) -> None:
    from archive_pipeline.detection.metrics import METRICS

    def number(value: float | None, sign: str = "") -> str:
        return f"{value:{sign}.3f}" if value is not None else "-"

    for model in report.models:
        say(f"{model.model}: {model.images} images, reference: {model.reference}")
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
        f"{len(report.images)} images compared, {len(report.failed)} not, in {report.seconds:.1f} s"
    )
    if report.seconds_per_frame is not None and not quiet:
        memory = report.peak_memory and f", {_size(report.peak_memory)} of memory at most"
        say(f"{report.seconds_per_frame:.1f} s of a worker for 20 megapixels{memory or ''}")


def _size(count: float) -> str:
    """A number of bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
