"""Verdicts in the archive: kept, shown, void with new pixels, and gone with their images."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from archive_pipeline.geo.pose import CameraPose
from archive_pipeline.jobs import verify_photogrammetry as photogrammetry
from archive_pipeline.jobs._verdicts import keep_verdict
from archive_pipeline.photogrammetry.frames import Frame
from archive_pipeline.photogrammetry.verdict import FlightReport, Moved, Tolerances, judge
from archive_pipeline.photogrammetry.verification import (
    PhotogrammetryOptions,
    PhotogrammetryReport,
)
from archive_pipeline.store.archive import Archive
from archive_pipeline.store.layout import ArchiveError, ImageEntry
from archive_pipeline.store.verdicts import (
    Verdict,
    add_verdict,
    record_digest,
    void_verdicts,
)

NAMES = ["DJI_0001.JPG", "DJI_0002.JPG", "DJI_0003.JPG"]


def entries(url: Path) -> list[ImageEntry]:
    return list(Archive.open(url).images())


def keep(
    url: Path, passed: bool = True, some: slice = slice(None), kind: str = "detection"
) -> None:
    how = {"tolerance": 0.02, "models": [{"model": "best.pt", "sha256": "ab"}]}
    assert keep_verdict(str(url), kind, passed, how, entries(url)[some]) == []


def told(run: Run, url: Path) -> list[dict[str, Any]]:
    [flight] = run("info", "--archive", url, "--json").json["flights"]
    verdicts: list[dict[str, Any]] = flight["verdicts"]
    return verdicts


def problems(run: Run, url: Path) -> list[str]:
    found: list[str] = run("check", "--archive", url, "--json").json["problems"]
    return found


def test_they_are_kept_and_shown(run: Run, own_archive: Path) -> None:
    assert told(run, own_archive) == []
    keep(own_archive)
    [one] = told(run, own_archive)
    assert (one["kind"], one["passed"], one["images"], one["void"]) == ("detection", True, NAMES, 0)
    assert one["how"]["tolerance"] == 0.02
    shown = run("info", "--archive", own_archive).out
    assert "  passed verify-detection by best.pt: 3 images, 20" in shown
    # the latest counts, of each image
    keep(own_archive, False, slice(1, 2))
    first, second = told(run, own_archive)
    assert (first["passed"], first["images"]) == (True, [NAMES[0], NAMES[2]])
    assert (second["passed"], second["images"]) == (False, [NAMES[1]])
    keep(own_archive, kind="photogrammetry")
    assert [v["kind"] for v in told(run, own_archive)] == ["detection"] * 2 + ["photogrammetry"]
    keep(own_archive)
    assert len(told(run, own_archive)) == 2
    assert problems(run, own_archive) == []


def test_new_pixels_void_them(run: Run, own_archive: Path, own_flight: Path) -> None:
    keep(own_archive)
    (own_flight / NAMES[0]).unlink()
    again = ("ingest", own_flight, "--archive", own_archive, "--workers", 0)
    assert run(*again, "--ratio", 16).code == 0  # nothing is new
    assert told(run, own_archive)[0]["images"] == NAMES
    for _ in range(2):  # then the generation is the first one again
        assert run(*again, "--ratio", 16, "--overwrite").code == 0
    assert {entry.generation for entry in entries(own_archive)} == {0}
    [left] = told(run, own_archive)
    assert (left["images"], left["void"]) == ([NAMES[0]], 0)


def test_a_record_that_changed_voids_them(run: Run, own_archive: Path, own_flight: Path) -> None:
    """Even where nobody had them forgotten: an older release, say."""
    old = entries(own_archive)
    digests = {entry.id: record_digest(entry) for entry in old}
    verdict = Verdict("beach", "detection", True, {}, "0", "2026-01-01", digests)
    archive = Archive.open(own_archive, writable=True)
    add_verdict(archive, verdict)
    raw = archive.read_key("verdicts/beach/detection.json")
    assert raw is not None
    args = ("--archive", own_archive, "--workers", 0, "--ratio", 12, "--overwrite")
    assert run("ingest", own_flight, *args).code == 0
    assert told(run, own_archive) == []
    archive.write_key("verdicts/beach/detection.json", raw)
    [one] = told(run, own_archive)
    assert (one["images"], one["void"]) == ([], 3)
    assert "0 images, 3 replaced since" in run("info", "--archive", own_archive).out
    add_verdict(archive, verdict)  # of what is no longer there
    assert told(run, own_archive) == []


def test_they_go_with_their_images(run: Run, own_archive: Path) -> None:
    keep(own_archive)
    keep(own_archive, kind="photogrammetry")
    assert run("remove", "beach", NAMES[1], "--archive", own_archive, "--yes").code == 0
    assert [v["images"] for v in told(run, own_archive)] == [[NAMES[0], NAMES[2]]] * 2
    inside = [p.read_bytes() for p in own_archive.rglob("*") if p.is_file()]
    assert not [data for data in inside if NAMES[1].encode() in data]
    assert run("remove", "beach", "--archive", own_archive, "--yes").code == 0
    assert not (own_archive / "verdicts").exists()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b'{"verdicts": 5}', b'{"verdicts": [{"passed": 1}]}'),
        b"[" * 100_000,
        b'{"verdicts":[{"passed":true,"how":{},"version":"1","date":"2","images":[]}]}',
    ],
)
def test_damaged_ones_are_named_and_stop_nothing(
    run: Run, own_archive: Path, content: bytes
) -> None:
    keep(own_archive)
    (own_archive / "verdicts" / "beach" / "detection.json").write_bytes(content)
    result = run("info", "--archive", own_archive, "--json")
    assert len(result.json["flights"][0]["images"]) == 3
    assert result.code == 3
    assert "beach: damaged verdict of detection" in result.err
    [problem] = problems(run, own_archive)
    assert "damaged verdict" in problem
    keep(own_archive)
    assert problems(run, own_archive) == []
    (own_archive / "verdicts" / "beach" / "detection.json").write_bytes(content)
    void_verdicts(Archive.open(own_archive, writable=True), "beach", [NAMES[0]])
    assert problems(run, own_archive) == []


def test_strange_words_are_no_harm(run: Run, own_archive: Path) -> None:
    how = {"models": 5, "tolerance": ["x"]}
    assert keep_verdict(str(own_archive), "detection", True, how, entries(own_archive)) == []
    assert run("info", "--archive", own_archive).code == 0
    path = own_archive / "verdicts" / "beach" / "detection.json"
    data = json.loads(path.read_text())
    data["verdicts"][0]["date"] = "\x1b[31m" * 3
    path.write_text(json.dumps(data))
    assert "\x1b" not in run("info", "--archive", own_archive).out


def test_a_read_only_archive_is_a_warning(
    own_archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() == 0:  # who may write everywhere

        def refuse(self: Archive, key: str, data: bytes) -> None:
            raise ArchiveError(f"{self.url}: {key}: Read-only file system")

        monkeypatch.setattr(Archive, "write_key", refuse)
    else:
        own_archive.chmod(0o500)
    warnings = keep_verdict(str(own_archive), "detection", True, {}, entries(own_archive))
    own_archive.chmod(0o700)
    assert len(warnings) == 1
    assert "beach: the verdict is not kept in the archive" in warnings[0]


@pytest.mark.parametrize("kept", [95, 10])
def test_frames_that_fit_to_no_others_have_not_passed(
    own_archive: Path, own_flight: Path, run: Run, kept: int
) -> None:
    """Two frames overlap; of the third nothing was compared that could have differed."""
    options = PhotogrammetryOptions(quick=True)
    frames = [Frame(f"beach/{name}", 800, 600, CameraPose(lon=1.0, lat=2.0)) for name in NAMES]
    tasks = [
        photogrammetry.FrameTask(str(own_archive), entry, (), None, frame, options)
        for entry, frame in zip(entries(own_archive), frames, strict=True)
    ]
    found = FlightReport("beach", frames, quick=True, pairs={(0, 1): (100, kept)})
    found.moved = [Moved(200, 0.1, 0.2, (0.0, 0.0))] * 2 + [Moved(0, *[float("nan")] * 2, (0, 0))]
    judge(found, Tolerances())
    report = PhotogrammetryReport(str(own_archive), options)
    photogrammetry._keep(found, tasks, report)
    [verdict] = told(run, own_archive)
    assert verdict["passed"] is found.passed is (kept == 95)
    assert verdict["images"] == (NAMES[:2] if found.passed else NAMES)
    assert len(report.warnings) == found.passed
    if not found.passed:
        return
    assert "nothing is proven of 1 of 3 frames" in report.warnings[0]
    assert report.warnings[0].endswith(f": beach/{NAMES[2]}")
    args = ("--originals", own_flight, "--require", "photogrammetry-quick", "--json")
    done = run("retire", "--archive", own_archive, *args)
    reasons = {item["image"]: item["reason"] for item in done.json["kept"]}
    assert reasons == {f"beach/{NAMES[2]}": "it has no verdict of verify-photogrammetry-quick"}
