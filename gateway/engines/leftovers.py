"""What an engine leaves on the machine when it is killed, found again and taken away: its own, never another's.

Every process of an engine inherits MARK with the path of its socket. Beside the socket lies a record of who runs the
engine, of its scratch folder and of its shared memory, so that the next gateway can clean up after a killed one.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

MARK = "LORIKEET_ENGINE_SOCKET"
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
_SEGMENT_PREFIX = "psm_"  # multiprocessing.shared_memory, 160 to 250 MB each in vLLM
_KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Record:
    """One running engine, as its file tells it. A process is its pid and its start, because pids come again."""

    owner_pid: int
    owner_started: float  # unix seconds, as psutil reads it
    scratch: str = ""  # the engine's TMPDIR
    engine_pid: int | None = None
    segments: tuple[str, ...] = ()  # names in /dev/shm

    @classmethod
    def mine(cls) -> "Record":
        return cls(os.getpid(), psutil.Process().create_time())

    @property
    def owner_lives(self) -> bool:
        try:
            return abs(psutil.Process(self.owner_pid).create_time() - self.owner_started) < 1.0
        except psutil.Error:
            return False


def read_record(path: Path) -> Record | None:
    """None where there is no readable one: a half-written file says no more than a missing one."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Record(**{**fields, "segments": tuple(fields["segments"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_record(path: Path, record: Record) -> None:
    """Atomic, so that a kill never leaves half of it."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(asdict(record)), encoding="utf-8")
    draft.replace(path)


def make_scratch() -> Path:
    """A temporary folder of the engine's own, so that whatever it drops there is known to be its. The path is short:
    vLLM makes Unix sockets in it, and their paths hold 107 bytes.
    """
    return Path(tempfile.mkdtemp(prefix="lorikeet-"))


def processes_of(socket: Path) -> list[psutil.Process]:
    """Live processes that carry this engine's mark, in whatever process group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == str(socket) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def segments_of(processes: Iterable[psutil.Process]) -> set[str]:
    """Shared-memory segments the processes have mapped."""
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
                path = Path(line.split(maxsplit=5)[-1])
                if path.parent == SHARED_MEMORY and path.name.startswith(_SEGMENT_PREFIX) and " " not in path.name:
                    found.add(path.name)
    return found


def note_segments(record_path: Path, socket: Path) -> None:
    """Write down the engine's shared memory while it still can be seen."""
    record = read_record(record_path)
    if record is not None:
        found = segments_of(processes_of(socket)) | set(record.segments)
        write_record(record_path, replace(record, segments=tuple(sorted(found))))


def sweep(record_path: Path, socket: Path) -> int:
    """Kill what is left of the engine and remove its socket, scratch folder and shared memory. Returns the kills."""
    record = read_record(record_path)
    processes = processes_of(socket)
    segments = segments_of(processes) | set(record.segments if record else ())
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=_KILL_TIMEOUT_S)
    for name in segments:
        (SHARED_MEMORY / name).unlink(missing_ok=True)
    if record and record.scratch:
        shutil.rmtree(record.scratch, ignore_errors=True)
    socket.unlink(missing_ok=True)
    record_path.unlink(missing_ok=True)
    return len(processes)
