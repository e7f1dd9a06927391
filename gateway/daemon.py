"""The gateway as a background process: one per data folder, found again, stopped whole.

A lock held for the process's life says whether it runs, so neither a crash nor a reused process id can mislead anybody.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from adapters.home import Home
from gateway.client import CommandError
from gateway.engines import leftovers

POLL_S = 0.1


Process = subprocess.Popen[bytes]


class AlreadyRunningError(CommandError):
    """Another gateway holds this data folder."""


@dataclass(frozen=True)
class Running:
    """A live gateway: its process id and the address it listens on."""

    pid: int
    url: str


def pid_file(home: Home) -> Path:
    return home.run / "gateway.pid"


def log_file(home: Home) -> Path:
    return home.logs / "gateway.log"


@contextlib.contextmanager
def hold(home: Home, url: str) -> Iterator[None]:
    """Be this data folder's gateway until the block ends. Raises AlreadyRunningError."""
    home.create()
    with _locked(pid_file(home)) as file:
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "url": url}) + "\n")
        file.flush()
        try:
            yield
        finally:
            pid_file(home).unlink(missing_ok=True)


def _locked(path: Path) -> IO[str]:
    """The file, opened and locked. A look by `find` holds the lock for a moment, and a file may be unlinked meanwhile."""
    for _ in range(20):
        file = path.open("a+", encoding="utf-8")
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()
        time.sleep(POLL_S / 4)
    raise AlreadyRunningError(f"A gateway runs on the data folder {path.parent.parent} already. Stop it: lorikeet down")


def find(home: Home) -> Running | None:
    """The gateway that runs on this data folder, if one does."""
    try:
        with pid_file(home).open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found = json.loads(file.read() or "{}")
                return Running(int(found["pid"]), str(found["url"])) if found else None
    except FileNotFoundError:
        pass
    return None


def start(home: Home) -> Process:
    """`lorikeet serve` in a session of its own, its output appended to the log file."""
    home.create()
    environment = os.environ | {"LORIKEET_HOME": str(home.root)}
    with log_file(home).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "lorikeet", "serve"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )


def worker_file(home: Home) -> Path:
    return home.run / "worker.pid"


def start_worker(home: Home, url: str) -> Process | None:
    """`lorikeet worker` beside the gateway, its output appended to a log of its own; None when one was started and lives."""
    if _worker(home) is not None:
        return None
    with (home.logs / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lorikeet", "worker", "--gateway", url],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"LORIKEET_HOME": str(home.root)},
        )
    created = psutil.Process(process.pid).create_time()
    worker_file(home).write_text(json.dumps({"pid": process.pid, "created": created}), encoding="utf-8")
    return process


def _worker(home: Home) -> psutil.Process | None:
    """The worker that `start_worker` left, if it lives: a reused process id has another time of birth."""
    try:
        noted = json.loads(worker_file(home).read_text(encoding="utf-8"))
        process = psutil.Process(int(noted["pid"]))
        return process if process.create_time() == noted["created"] and process.is_running() else None
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        return None


def stop_worker(home: Home, *, patience_s: float = 20.0) -> bool:
    """End it at once: its job goes on with the next worker from the last checkpoint. Whether one ran."""
    process = _worker(home)
    if process is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
            time.sleep(POLL_S)
            process.terminate()  # the second time: without waiting for a checkpoint
            try:
                process.wait(patience_s)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait(10)
    worker_file(home).unlink(missing_ok=True)
    return process is not None


def tail(path: Path, lines: int = 30) -> str:
    """The end of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64 * 1024))
            return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


@dataclass(frozen=True)
class Stopped:
    """What stopping took."""

    was_running: bool
    killed: int  # processes that did not end by themselves
    left: tuple[str, ...]  # what is still there all the same: processes, sockets, shared memory
    took_s: float


def stop(home: Home, *, patience_s: float) -> Stopped:
    """End the gateway and its engines: asked first, killed after patience_s, and nothing of theirs left behind.

    Engines that an earlier, killed gateway of this data folder left alone are found and ended too.
    """
    began = time.monotonic()
    stop_worker(home)
    running = find(home)
    killed = 0
    if running:
        killed += _end(running.pid, patience_s=patience_s)
    sockets = set(home.run.glob("*.sock")) | {record.with_suffix(".sock") for record in home.run.glob("*.json")}
    shared = leftovers.segments_of(process for socket in sockets for process in leftovers.processes_of(socket))
    for socket in sockets:
        killed += leftovers.sweep(socket.with_suffix(".json"), socket)
    if find(home) is None:
        pid_file(home).unlink(missing_ok=True)
    return Stopped(
        was_running=running is not None,
        killed=killed,
        left=(
            *(f"process {process.pid}" for socket in sockets for process in leftovers.processes_of(socket)),
            *(str(socket) for socket in sockets if socket.exists()),
            *(str(path) for name in shared if (path := leftovers.SHARED_MEMORY / name).exists()),
        ),
        took_s=time.monotonic() - began,
    )


def _end(pid: int, *, patience_s: float) -> int:
    """Returns how many processes had to be killed: 0 when it ended by itself."""
    try:
        process = psutil.Process(pid)
        process.terminate()
        process.wait(patience_s)
    except psutil.NoSuchProcess:
        return 0
    except psutil.TimeoutExpired:
        process.kill()
        process.wait(10)
        return 1
    return 0
