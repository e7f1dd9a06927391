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
_OWN_PREFIXES = ("psm_", "sem.mp-")  # Python's shared memory, 160 to 250 MB each in vLLM, and its semaphores
_KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Record:
    """One running engine, as its file tells it. A process is its pid and its start, because pids come again."""

    owner_pid: int
    owner_started: float  # unix seconds, as psutil reads it
    scratch: str = ""  # the engine's TMPDIR
    engine_pid: int | None = None  # also its session, which every process of the engine is in
    engine_started: float = 0.0
    segments: tuple[str, ...] = ()  # names in /dev/shm

    @classmethod
    def mine(cls) -> "Record":
        return cls(os.getpid(), psutil.Process().create_time())

    def with_engine(self, pid: int) -> "Record":
        return replace(self, engine_pid=pid, engine_started=_started(pid) or 0.0)

    @property
    def owner_lives(self) -> bool:
        return _same_start(_started(self.owner_pid), self.owner_started)

    @property
    def session(self) -> int | None:
        """The engine's session, unless its number now belongs to a stranger."""
        if self.engine_pid is None:
            return None
        leader = _started(self.engine_pid)
        return self.engine_pid if leader is None or _same_start(leader, self.engine_started) else None


def _started(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def _same_start(found: float | None, expected: float) -> bool:
    return found is not None and abs(found - expected) < 1.0


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


def processes_of(socket: Path, session: int | None = None) -> list[psutil.Process]:
    """Live processes of this engine: those that carry its mark, and those of its session.

    The mark is looked for in the raw bytes: vLLM names its processes by writing over their arguments and environment,
    and what a parser then takes for the end comes long before it.
    """
    mark = f"{MARK}={socket}".encode() + b"\0"
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            marked = mark in _proc(process.pid, "environ").read_bytes()
            if (marked or os.getsid(process.pid) == session) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def segments_of(processes: Iterable[psutil.Process]) -> set[str]:
    """Shared memory and semaphores the processes have mapped. Told by inode: glibc maps a semaphore under a passing name."""
    inodes = set()
    for process in processes:
        with contextlib.suppress(OSError):
            for line in _proc(process.pid, "maps").read_text(encoding="utf-8", errors="replace").splitlines():
                if f" {SHARED_MEMORY}/" in line:
                    inodes.add(int(line.split(maxsplit=5)[4]))
    found = set()
    if SHARED_MEMORY.is_dir():
        for file in SHARED_MEMORY.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if file.name.startswith(_OWN_PREFIXES) and file.stat().st_ino in inodes:
                    found.add(file.name)
    return found


def _proc(pid: int, name: str) -> Path:
    return Path("/proc") / str(pid) / name


def note_segments(record_path: Path, socket: Path) -> None:
    """Write down the engine's shared memory while it still can be seen. A full disk keeps nobody from ending an engine."""
    record = read_record(record_path)
    if record is not None:
        found = segments_of(processes_of(socket, record.session)) | set(record.segments)
        with contextlib.suppress(OSError):
            write_record(record_path, replace(record, segments=tuple(sorted(found))))


def sweep(record_path: Path, socket: Path) -> int:
    """Kill what is left of the engine and remove its socket, scratch folder and shared memory. Returns the kills."""
    record = read_record(record_path)
    processes = processes_of(socket, record.session if record else None)
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
