"""A note on this machine of the folders that this user archived from.

An archive says of each image where it came from. It may be a stranger's, though, and following it
would open any path and request any URL: what the archive says is shown, and only the folders in
these notes are looked through. They are small files, one a flight's folder and archive, in
`$XDG_STATE_HOME/archive-pipeline/sources`, else `~/.local/state/archive-pipeline/sources`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from archive_pipeline.flight.locations import Location, absolute, location

MOST_NOTES = 1000  # the oldest go


def note_sources(archive_url: str, flights: Iterable[tuple[str, Location]]) -> None:
    """Note folders or URLs that are archived; without a place to write to, nothing happens.

    Args:
        archive_url: the archive's path or URL.
        flights: (flight id, folder or URL).
    """
    # read-only or no home: verification then asks for the folder
    with suppress(OSError, RuntimeError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for flight, place in flights:
            note = {"archive": _name(archive_url), "flight": flight, "source": str(absolute(place))}
            text = json.dumps(note, indent=1)
            path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
            with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
                file.write(text)
            os.replace(file.name, path)  # several commands may write the same
        notes = sorted(folder.glob("*.json"), key=lambda note: note.stat().st_mtime_ns)
        for note_file in notes[:-MOST_NOTES]:
            note_file.unlink(missing_ok=True)


def forget_sources(archive_url: str, flight: str) -> None:
    """Remove the notes of a flight that is no longer archived."""
    with suppress(OSError, RuntimeError):
        for path in _folder().glob("*.json"):
            with suppress(OSError, ValueError, TypeError, KeyError):
                note = json.loads(path.read_text())
                if (note["archive"], note["flight"]) == (_name(archive_url), flight):
                    path.unlink(missing_ok=True)


def noted_sources(archive_url: str) -> dict[str, list[Location]]:
    """Folders and URLs that this user archived from on this machine, by flight id.

    Args:
        archive_url: its own notes count; those of all archives where it has none, as after a move.
    """
    notes = []
    with suppress(OSError, RuntimeError):
        for path in sorted(_folder().glob("*.json")):
            with suppress(OSError, ValueError, TypeError, KeyError):
                note = json.loads(path.read_text())
                notes.append((note["archive"], str(note["flight"]), location(note["source"])))
    own = [note for note in notes if note[0] == _name(archive_url)]
    found: dict[str, list[Location]] = {}
    for _, flight, place in own or notes:
        if place not in found.setdefault(flight, []):
            found[flight].append(place)
    return found


def _folder() -> Path:
    given = os.environ.get("XDG_STATE_HOME", "")
    state = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state"
    return state / "archive-pipeline" / "sources"


def _name(archive_url: str) -> str:
    place = location(archive_url)
    return str(place.resolve()) if isinstance(place, Path) else place.rstrip("/")
