"""The command: options, exit codes, pure JSON, errors of one line, start-up time, URLs."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import resource
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import FRAMES, Run, command_line
from PIL import Image

from archive_pipeline.commands._console import extent
from archive_pipeline.jobs import cluster

COMMANDS = ["ingest", "restore", "info", "check"]


@pytest.mark.parametrize("command_name", ["", *COMMANDS])
def test_help_is_quick(command_name: str) -> None:
    args = [a for a in (command_name, "--help") if a]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    out = subprocess.check_output(command_line(*args), text=True)
    # processor time, which a busy machine does not stretch
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 0.5
    assert out.startswith("Usage: ")


def test_heavy_modules_are_imported_late() -> None:
    code = (
        "import sys, archive_pipeline.commands.cli;"
        "heavy = {'torch', 'zarr', 'numpy', 'distributed'};"
        "assert not heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys, archive_pipeline.jobs.info, archive_pipeline.jobs.ingest;"
        "import archive_pipeline.jobs.restore;"
        "assert not {'torch', 'distributed', 'geopandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "args",
    [
        ("ingest",),
        ("ingest", "x", "--ratio", "0"),
        ("ingest", "x", "--ratio", "nan"),
        ("ingest", "x", "--ratio", "10", "--bpp", "1"),
        ("ingest", "x", "y/x"),
        ("ingest", "x", "y", "--flight", "z"),
        ("ingest", "x", "--workers", "-1"),
        ("restore", "--bbox", "1", "2", "3"),
        ("restore", "--mosaic", "--format", "png"),
        ("restore", "--steps", "-1"),
        ("restore", "--bbox-crs", "nonsense"),
        ("restore", "--bbox-crs", "EPSG:5773", "--bbox", "0", "0", "1", "1"),  # heights
        ("restore", "--mosaic", "--scheduler", "tcp://127.0.0.1:9"),
        ("restore", "--mosaic", "--workers", "2"),
        ("restore", "--mosaic", "--crs", "EPSG:0"),
        ("restore", "--mosaic", "--crs", "EPSG:4978"),  # metres from the earth's centre
        ("restore", "--mosaic", "--resolution", "0"),
        ("restore", "--mosaic", "--resolution", "nan"),
        ("restore", "--mosaic", "--resolution", "inf"),
        ("restore", "--resolution", "1"),
        ("restore", "--crs", "EPSG:3857"),
        ("nonsense",),
    ],
)
def test_usage_errors(run: Run, args: tuple[str, ...]) -> None:
    result = run(*args)
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("Error: ")
    assert result.out == ""


@pytest.mark.parametrize("command_name", COMMANDS[1:])
def test_errors_are_one_line(run: Run, tmp_path: Path, command_name: str) -> None:
    url = tmp_path / "none.zarr"
    result = run(command_name, "--archive", url)
    assert (result.code, result.out) == (1, "")
    assert result.err == f"Error: {url}: no archive there\n"
    assert not url.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("restore", "--image", "DJI_001.JPG"), "no image DJI_001.JPG; did you mean DJI_0001.JPG?"),
        (("restore", "--image", "dji_0002.jpg"), "did you mean DJI_0002.JPG?"),
        (("restore", "--flight", "beech"), "no flight beech; did you mean beach?"),
        (("restore", "--flight", "mountain"), "no flight mountain (there are: beach)"),
        (("restore", "--bbox", "-94.8,29.2,-94.7,29.3"), "spaces between them: west south east"),
        (("restore", "--bbox", "29.2", "-94.8", "29.3", "-94.7"), "the order is west south east"),
        (("info", "--archive", "{archive}/../archiv.zarr"), "did you mean archive.zarr?"),
        (("ingest", "{flight}/../beech"), "no such directory; did you mean beach?"),
        (("ingest", "{flight}/DJI_0001.JPG"), "a file; a flight is the folder"),
        (("ingest", "{flight}", "--device", "cuda"), "no CUDA device is available"),
        (("ingest", "{flight}", "--ratoi", "9"), "Did you mean '--ratio'?"),
    ],
)
def test_likely_mistakes(
    run: Run, archive: Path, flight: Path, args: tuple[str, ...], message: str
) -> None:
    import torch

    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    given = [arg.format(archive=archive, flight=flight) for arg in args]
    result = run(*given, env={"ARCHIVE_STORE": str(archive)})
    assert result.code in (1, 2)
    assert result.out == ""
    error = result.err.splitlines()[-1]
    assert error.startswith("Error: ")
    assert message in error


def test_a_box_beside_all_images_is_told_where_they_are(run: Run, archive: Path) -> None:
    boxes = [run("restore", "--archive", archive, "--bbox", 10, 50, 11, 51)]
    (west, south, east, north) = boxes[0].err.partition("within ")[2].split(" (")[0].split()
    assert boxes[0].code == 0
    rings = run("info", "--archive", archive, "--json").json["flights"][0]["images"]
    points = [point for image in rings for point in image["footprint"]]
    assert float(west) <= min(lon for lon, _ in points) < float(west) + 1e-4
    assert float(north) - 1e-4 < max(lat for _, lat in points) <= float(north)
    assert float(south) < float(north)
    assert float(west) < float(east)


@pytest.mark.parametrize(
    ("west", "east", "told"),
    [
        (10.0, 11.0, "10.0000 -5.0000 11.0000 5.0000"),
        (179.0, 181.0, "179.0000 -5.0000 -179.0000 5.0000"),
        (190.0, 191.0, "-170.0000 -5.0000 -169.0000 5.0000"),
        (0.0, 360.0, "-180.0000 -5.0000 180.0000 5.0000"),
    ],
)
def test_the_box_of_all_images_is_one_that_is_taken(west: float, east: float, told: str) -> None:
    ring = [[west, -5.0], [east, -5.0], [east, 5.0], [west, 5.0], [west, -5.0]]
    assert extent({"flights": [{"images": [{"footprint": ring}, {"footprint": None}]}]}) == told


def test_verbose_shows_where_an_error_came_from(command: Run, tmp_path: Path) -> None:
    result = command("info", "--archive", tmp_path / "none.zarr", "-v")
    assert result.code == 1
    assert "Traceback" in result.err


def test_model_errors(run: Run, flight: Path, tmp_path: Path) -> None:
    result = run("ingest", flight, "--archive", tmp_path / "a.zarr", "--model", "none")
    assert result.code == 1
    assert result.err.startswith("Error: none: no such model")
    assert len(result.err.splitlines()) == 1


def test_json_is_all_there_is_on_stdout(
    run: Run, flight: Path, archive: Path, tmp_path: Path
) -> None:
    url = ("--archive", archive)
    for args in (
        ("ingest", flight, *url),
        ("info", *url),
        ("check", *url),
        ("restore", *url, "--workers", 0, "-o", tmp_path),
    ):
        result = run(*args, "--json")
        assert result.code == 0, result.err
        assert isinstance(json.loads(result.out), dict)
        assert result.out.count("\n") == 1


def test_info(run: Run, archive: Path) -> None:
    (flight,) = run("info", "--archive", archive, "--json").json["flights"]
    assert flight["id"] == "beach"
    for image in flight["images"]:
        assert len(image["transform"]) == 6
        assert image["footprint"][0] == image["footprint"][-1]
        assert len(image["footprint"]) == 5
        assert image["crs"] == "EPSG:32615"
    result = run("info", "--archive", archive)
    assert len(result.out.splitlines()) == FRAMES + 3  # flight, totals, model
    assert len(run("info", "--archive", archive, "-q").out.splitlines()) == 2


def test_environment_names_the_archive(run: Run, archive: Path) -> None:
    result = run("check", "--json", env={"ARCHIVE_STORE": str(archive)})
    counted = {"images": FRAMES, "documents": 0, "models": 1, "leftover_bytes": 0}
    assert result.json == {"passed": True, **counted, "problems": [], "notes": []}


def test_file_urls(run: Run, archive: Path, flight: Path, tmp_path: Path) -> None:
    assert run("check", "--archive", archive.as_uri()).code == 0
    url = (tmp_path / "with space.zarr").as_uri()
    result = run("ingest", flight, "--archive", url, "--ratio", 16, "--workers", 0)
    assert result.code == 0, result.err
    assert run("check", "--archive", url).code == 0
    assert (tmp_path / "with space.zarr" / "zarr.json").is_file()


@pytest.mark.parametrize("url", ["nonsense://a.zarr", "http://127.0.0.1:9/a.zarr"])
def test_urls_that_do_not_work(run: Run, url: str) -> None:
    result = run("info", "--archive", url)
    assert result.code == 1
    assert len(result.err.splitlines()) == 1


def test_no_scheduler_answers(
    run: Run, flight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "SCHEDULER_ANSWERS", 1)
    result = run(
        "ingest", flight, "--archive", tmp_path / "a.zarr", "--scheduler", "tcp://127.0.0.1:9",
    )  # fmt: skip
    assert result.code == 1
    assert len(result.err.splitlines()) == 1


def test_a_bar_counts_from_when_its_work_began(monkeypatch: pytest.MonkeyPatch) -> None:
    from archive_pipeline.commands._console import Progress

    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", shown)
    with Progress("ingest", quiet=False) as progress:
        progress.stage("encoding the first of 3")
        progress.since -= 60  # which takes a minute
        progress.step(3)
    assert re.search(r"1/3 \[01:0\d<02:", shown.getvalue())


def test_warnings_of_one_kind_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from archive_pipeline.commands._console import SHOWN_WARNINGS, print_warnings
    from archive_pipeline.jobs.ingest import IngestReport
    from archive_pipeline.jobs.ingest_task import Outcome

    def outcome(path: str, *warnings: str) -> Outcome:
        return Outcome("coast", path, path, "ingested", warnings=warnings)

    alike = [outcome(f"{n}.jpg", f"{1000 + n} bytes of its own are not archived") for n in range(9)]
    other = [outcome("a.jpg", *(f"{chr(65 + n)} is odd" for n in range(SHOWN_WARNINGS)))]
    report = IngestReport([*alike, *other], [], 1.0, 0)
    print_warnings(report, verbose=0)
    first, *rest, last = capsys.readouterr().err.splitlines()
    assert first.startswith("Warning: 0.jpg: 1000 bytes of its own are not archived (and 8 like it")
    assert rest[0] == "Warning: a.jpg: A is odd"
    assert len(rest) == SHOWN_WARNINGS - 1
    assert last == "... and 1 more warning (-v lists all)"
    print_warnings(report, verbose=1)
    assert len(capsys.readouterr().err.splitlines()) == 9 + SHOWN_WARNINGS


def test_info_lists_the_first_images_of_a_large_flight(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from archive_pipeline._version import __version__
    from archive_pipeline.commands._console import print_info

    image = {"width": 4, "height": 3, "codec": "pcdc", "source_bytes": 50, "archive_bytes": 7}
    image["retired"] = False
    images = [{"id": f"{n}.jpg", **image, "footprint": None, "crs": None} for n in range(30)]
    totals = {"images": 30, "source_bytes": 1500, "archive_bytes": 210, "model_bytes": 0}
    result = {"flights": [{"id": "coast", "images": images}], "totals": totals}
    result |= {"written_by": __version__, "models": {"ab" * 32: ["deterministic"]}}
    print_info(result, False, 20)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("coast: 30 images, ")
    assert [line.split()[0] for line in lines[1:21]] == [f"{n}.jpg" for n in range(20)]
    assert lines[21] == "  ... and 10 more (--all lists them)"
    print_info(result | {"written_by": None}, False)
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[-1] == "model abababababab, decoders: deterministic (--steps 0)"
    assert (len(lines), last) == (33, f"made by version 0.1.0, this is {__version__}")


def test_help_and_info_fit_a_terminal(run: Run, archive: Path) -> None:
    for name in ("", *COMMANDS, "verify-detection"):
        shown = run(*([name] if name else []), "--help").out
        assert max(map(len, shown.splitlines())) <= 80, name
        assert "..." not in shown.partition("Commands:")[2].partition("For example:")[0]
        assert not name or "Exit codes:\n" in shown
    info = run("info", "--archive", archive).out.splitlines()
    assert max(map(len, info)) <= 80
    assert info[0].startswith("beach: 3 images, EPSG:32615, ")


def test_shells_can_complete_commands(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("archive")
    environment = {**os.environ, "_ARCHIVE_COMPLETE": "bash_source"}
    done = subprocess.run([command], env=environment, capture_output=True, text=True)
    assert "_archive_completion" in done.stdout
    environment |= {
        "_ARCHIVE_COMPLETE": "bash_complete",
        "COMP_WORDS": "archive restore --mos",
        "COMP_CWORD": "2",
    }
    done = subprocess.run([command], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["plain,--mosaic"]


@pytest.mark.parametrize("option", [(), ("--json",)], ids=["table", "json"])
def test_a_reader_that_ends_is_no_error(archive: Path, option: tuple[str, ...]) -> None:
    """As `head` does."""
    read, write = os.pipe()
    os.close(read)
    command = [*command_line("info"), "--archive", str(archive), *option]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_terminal_is_told_what_is_being_done(tmp_path: Path) -> None:
    """Before the first image and after the last, too; the last of it does not stay."""
    folder, url = tmp_path / "beach", tmp_path / "a.zarr"
    folder.mkdir()
    for number in range(3):  # grey: kept losslessly, which takes no time
        Image.new("L", (40, 30), number).save(folder / f"{number}.png")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    args = command_line("ingest", folder, "--archive", url, "--workers", 0)
    with subprocess.Popen(args, stderr=theirs, stdout=subprocess.DEVNULL) as process:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # the end of a terminal
            while some := os.read(ours, 1 << 16):
                shown += some
    os.close(ours)
    assert process.returncode == 0
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", shown.decode()) if line.strip()]
    assert lines[0] == "ingest: listing files"
    stages = ["looking for new files", "starting", "encoding the first of 3", "writing the index"]
    told = [lines.index(f"ingest: {stage}") for stage in stages]
    assert told == sorted(told)
    assert told[-2] < max(n for n, line in enumerate(lines) if "/3 [" in line) < told[-1]
    assert all(len(line) <= 80 for line in lines if line.startswith("ingest:"))
    assert not shown.decode().split("\r")[-1].strip()  # nothing of it stays


def test_options_that_mean_nothing_alone(run: Run, archive: Path, flight: Path) -> None:
    for args, said in (
        (("restore", "--bbox-crs", "EPSG:32615"), "--bbox-crs is of a --bbox"),
        (("ingest", flight, "--flight", ""), "--flight is empty"),
    ):
        refused = run(*args, "--archive", archive)
        assert (refused.code, said in refused.err) == (2, True), refused.err


def test_a_mosaic_of_nothing_says_why(run: Run, archive: Path, tmp_path: Path) -> None:
    args = ("restore", "--archive", archive, "-o", tmp_path, "--mosaic", "--resolution", 5000)
    refused = run(*args)
    assert refused.code == 1
    assert "where those of size 5000 have centres" in refused.err
    assert "bounding box" not in refused.err
