"""A process that stands for vLLM to its supervisor: python child.py SOCKET MODE.

It answers /health on a Unix socket and leaves things behind as a killed engine does. Each start is a line in the file
`starts` beside the socket. Modes, joined by '+':
  stubborn     ignores SIGTERM        grandchild   has a child of its own, which ignores SIGTERM
  nameless     has a child without any environment        renamed   writes over its own environment, as vLLM does
  shared       holds a shared-memory segment and a semaphore that nobody unlinks
  temp         drops a file in the temporary folder
  broken       prints a line and exits with code 3       broken2   does so from the second start to the third
  silent       never opens the socket
"""

import multiprocessing
import os
import signal
import socketserver
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def main() -> None:
    socket, modes = Path(sys.argv[1]), set(sys.argv[2].split("+"))
    starts = socket.with_name("starts")
    with starts.open("a") as file:
        file.write(f"{os.getpid()}\n")
    count = len(starts.read_text().splitlines())
    if "broken" in modes or ("broken2" in modes and 2 <= count <= 3):
        sys.stdout.write("no weights here\n")
        sys.exit(3)
    if "stubborn" in modes:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "grandchild" in modes:
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", code])
    if "nameless" in modes:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={})
    if "renamed" in modes:
        import setproctitle

        setproctitle.setproctitle("VLLM::EngineCore")
    if "shared" in modes:
        segment = shared_memory.SharedMemory(create=True, size=4096)
        resource_tracker.unregister(segment._name, "shared_memory")  # type: ignore[attr-defined]
        socket.with_name("segment").write_text(segment.name)
        semaphore = multiprocessing.get_context("spawn").Semaphore()
        name = semaphore._semlock.name.removeprefix("/")  # type: ignore[attr-defined]
        resource_tracker.unregister(f"/{name}", "semaphore")
        socket.with_name("semaphore").write_text(f"sem.{name}")
    if "temp" in modes:
        _, name = tempfile.mkstemp(prefix="vllm_dist_")
        socket.with_name("temp").write_text(name)
    if "silent" in modes:
        time.sleep(600)
    with socketserver.ThreadingUnixStreamServer(str(socket), Health) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
