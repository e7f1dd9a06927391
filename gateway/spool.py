"""A file of lines that are not in the database yet: what was appended outlives a kill, a power cut and a database that is away.

Each gateway has one of its own, told apart by a lock that ends with its process; what a killed one left is found and taken
over by the next to start. Synchronous, for one thread at a time.
"""

import contextlib
import fcntl
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

READ_BYTES = 1 << 20


class Spool:
    """Appended at its end, dropped from its beginning. A line torn by a kill in the middle of its write is not there."""

    def __init__(self, file: int) -> None:
        """file: a descriptor, locked, open for reading and writing."""
        self._file = file
        self._start = 0
        self._end = _end_of_lines(file)

    @property
    def empty(self) -> bool:
        return self._start == self._end

    @property
    def size_bytes(self) -> int:
        return self._end - self._start

    def append(self, lines: Sequence[bytes]) -> None:
        """On disk when it returns. Raises OSError, and then none of them is there."""
        data = memoryview(b"".join(line + b"\n" for line in lines))
        place = self._end
        try:
            while data:
                written = os.pwrite(self._file, data, place)
                place, data = place + written, data[written:]
            os.fsync(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise
        self._end = place

    def head(self) -> tuple[list[bytes], int]:
        """Some lines from its beginning, and their size as `drop` wants it."""
        data = os.pread(self._file, min(READ_BYTES, self._end - self._start), self._start)
        while b"\n" not in data and len(data) < self._end - self._start:
            data += os.pread(self._file, READ_BYTES, self._start + len(data))
        whole = data[: data.rfind(b"\n") + 1]
        return whole.split(b"\n")[:-1], len(whole)

    def drop(self, size_bytes: int) -> None:
        """Forget that much of its beginning. A kill before the file is empty brings it all back."""
        self._start += size_bytes
        if self._start >= self._end:
            os.ftruncate(self._file, 0)
            self._start = self._end = 0

    def close(self) -> None:
        os.close(self._file)  # and with it the lock


def claim_spools(folder: Path) -> list[Spool]:
    """One spool or more that nobody else has: every one that a killed gateway left, at least a new one. Raises OSError."""
    claimed: list[Spool] = []
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        path = folder / f"spool-{number}.jsonl"
        existed = path.exists()
        if claimed and not existed:
            return claimed
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            continue
        if not existed:
            _sync_folder(folder)
        claimed.append(Spool(file))
    return claimed


def _end_of_lines(file: int) -> int:
    """Where the last whole line ends; what follows is cut off."""
    size = os.fstat(file).st_size
    end = size
    while end > 0:
        begin = max(0, end - READ_BYTES)
        newline = os.pread(file, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            end = begin + newline + 1
            break
        end = begin
    if end < size:
        os.ftruncate(file, end)
    return end


def _sync_folder(folder: Path) -> None:
    """The file's name outlives a power cut too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
