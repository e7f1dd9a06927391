"""Do an engine harm, as load tests want it done: python -m scripts.chaos drop | kill | freeze SECONDS | unload

drop cuts every connection between gateway and engine while both live on, kill ends the engine's processes, freeze stops them
for a while, unload makes it forget every adapter. Works on the engine of the installation that LORIKEET_HOME names; the
gateway is told nothing.
"""

import argparse
import ctypes
import errno
import os
import signal
import socket
import sys
import time
from pathlib import Path

import httpx

from adapters.home import home
from gateway.engines.leftovers import read_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("drop", "kill", "freeze", "unload"))
    parser.add_argument("seconds", nargs="?", type=float, default=3.0, help="how long it is frozen")
    parser.add_argument("--engine", default="engine-0")
    arguments = parser.parse_args()
    run: Path = home().run
    record = read_record(run / f"{arguments.engine}.json")
    if record is None or record.engine_pid is None:
        sys.exit(f"No engine '{arguments.engine}' runs under {run}.")
    match arguments.what:
        case "drop":
            drop(record.owner_pid, run.absolute() / f"{arguments.engine}.sock")
        case "kill":
            os.killpg(record.engine_pid, signal.SIGKILL)
        case "freeze":
            freeze(record.engine_pid, arguments.seconds)
        case _:
            unload(run / f"{arguments.engine}.sock")


PIDFD_GETFD = 438  # the same number on every architecture that Python runs on, but Alpha's


def drop(gateway: int, engine: Path) -> None:
    try:
        cut = cut_connections(gateway, engine)
    except (OSError, AttributeError) as exc:
        sys.exit(
            f"The gateway's connections cannot be reached ({exc}). It takes a Linux from 5.6 on and the gateway's own user, "
            "who must be allowed to trace its processes: kernel.yama.ptrace_scope is 0, or CAP_SYS_PTRACE is held."
        )
    if not cut:
        sys.exit("The gateway has no connection to the engine open: there is nothing to cut.")


def cut_connections(pid: int, peer: Path) -> int:
    """Shut down, at once and both ways, every connection of the process to the Unix socket at `peer`; how many there were.

    Raises OSError where the kernel refuses, AttributeError where it is no Linux.
    """
    process = os.pidfd_open(pid)
    try:
        found = [duplicate for number in _open_sockets(pid) if (duplicate := _duplicate(process, number))]
    finally:
        os.close(process)
    chosen = [one for one in found if _peer_of(one) == str(peer)]
    for connection in chosen:
        connection.shutdown(socket.SHUT_RDWR)
    for duplicate in found:
        duplicate.close()
    return len(chosen)


def _open_sockets(pid: int) -> list[int]:
    numbers = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if str(entry.readlink()).startswith("socket:"):
                numbers.append(int(entry.name))
        except FileNotFoundError:
            continue  # closed meanwhile
    return numbers


def _duplicate(process: int, number: int) -> socket.socket | None:
    """None for one that was closed meanwhile. Another's socket can be shut down only through a descriptor of one's own."""
    duplicate = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, process, number, 0)
    if duplicate >= 0:
        return socket.socket(fileno=duplicate)
    code = ctypes.get_errno()
    if code == errno.EBADF:
        return None
    raise OSError(code, os.strerror(code))


def _peer_of(connection: socket.socket) -> str:
    try:
        return str(connection.getpeername())
    except OSError:  # it listens, or the other end is gone
        return ""


def freeze(group: int, seconds: float) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that it is thawed even when this is ended early
    os.killpg(group, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.killpg(group, signal.SIGCONT)


def unload(engine_socket: Path) -> None:
    transport = httpx.HTTPTransport(uds=str(engine_socket))
    with httpx.Client(transport=transport, base_url="http://engine", timeout=30) as engine:
        for model in engine.get("/v1/models").raise_for_status().json()["data"]:
            if model.get("parent"):  # an adapter
                engine.post("/v1/unload_lora_adapter", json={"lora_name": model["id"]}).raise_for_status()


if __name__ == "__main__":
    main()
