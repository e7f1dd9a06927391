"""Against processes of their own, each a script that says on its output what befalls its connections."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from scripts.chaos import cut_connections

ENGINE = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("listens", flush=True)
taken = [listener.accept()[0] for _ in range(2)]
print("took two", flush=True)
print([one.recv(1) for one in taken], flush=True)
print(listener.accept()[0].recv(5), flush=True)
"""

GATEWAY = """
import socket, sys
def connected(path):
    one = socket.socket(socket.AF_UNIX)
    one.connect(path)
    return one
to_engine, to_other = [connected(sys.argv[1]) for _ in range(2)], connected(sys.argv[2])
tcp = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(tcp.getsockname())
print("connected", flush=True)
print([one.recv(1) for one in to_engine], flush=True)
to_other.settimeout(0.1)
try:
    to_other.recv(1)
except TimeoutError:
    client.send(b"x")
    print(tcp.accept()[0].recv(1), flush=True)
connected(sys.argv[1]).send(b"again")
"""


@contextmanager
def running(code: str, *arguments: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_connections_to_the_engine_are_cut_and_only_those_and_new_ones_can_be_made(tmp_path: Path) -> None:
    own, other = tmp_path / "engine-0.sock", tmp_path / "engine-1.sock"
    with ExitStack() as processes:
        engine, beside = (processes.enter_context(running(ENGINE, path)) for path in (own, other))
        assert said(engine) == said(beside) == "listens"
        gateway = processes.enter_context(running(GATEWAY, own, other))
        assert said(gateway) == "connected"
        assert said(engine) == "took two"
        try:
            assert cut_connections(gateway.pid, own) == 2
        except PermissionError:
            pytest.skip("this kernel lets nobody trace")
        assert said(engine) == said(gateway) == "[b'', b'']"
        assert said(gateway) == "b'x'"
        assert said(engine) == "b'again'"


def test_a_process_that_is_gone_has_no_connections_to_cut(tmp_path: Path) -> None:
    with running("") as process:
        process.wait()
    with pytest.raises(ProcessLookupError):
        cut_connections(process.pid, tmp_path / "engine-0.sock")
