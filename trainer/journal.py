"""What a job's training tells, one JSON line each, on disk: a killed reader or writer loses nothing of it.

The writer may say the same thing again after a kill; every entry has a key, by which its reader knows it.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

JOURNAL_FILE = "journal.jsonl"


@dataclass(frozen=True)
class Entry:
    """key: unique for what is told. kind: phase, step, evaluated, checkpoint, note, finished or failed. at: Unix seconds."""

    key: str
    kind: str
    at: float
    data: dict[str, Any]


class Journal:
    """The one writer of a journal. What a killed one left of a last line goes first."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL_FILE
        whole, end, torn = self._path.read_bytes().rpartition(b"\n") if self._path.is_file() else (b"", b"", b"")
        if torn:
            os.truncate(self._path, len(whole) + len(end))

    def write(self, entry: Entry) -> None:
        """One write: a reader sees a whole line or none."""
        with self._path.open("ab", buffering=0) as file:
            file.write(orjson.dumps(asdict(entry), option=orjson.OPT_APPEND_NEWLINE))


class JournalReader:
    """Follows a journal from its beginning."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL_FILE
        self._read_bytes = 0

    def news(self) -> Iterator[Entry]:
        """What was written since the last call, whole lines only."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._read_bytes)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read_bytes += len(line)
                yield Entry(**orjson.loads(line))
