"""A machine of one's own: a data folder, a port, and the commands typed on it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Machine:
    """A data folder of its own, on which commands are typed."""

    def __init__(self, home: Path, base: Path) -> None:
        self.home = home
        self.environment = os.environ | {
            "LORIKEET_HOME": str(home),
            "LORIKEET_PORT": str(free_port()),
            "LORIKEET_BASE": str(base),
            "LORIKEET_ENGINE": "test",
        }

    def run(self, *arguments: str, expect: int = 0) -> str:
        command = [sys.executable, "-m", "lorikeet", *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def processes(self) -> list[int]:
        """Whoever has this data folder in its environment or its arguments, the test itself aside."""
        found = []
        for process in psutil.process_iter():
            try:
                words = [*process.cmdline(), *process.environ().values()]
            except psutil.Error:
                continue
            if process.pid != os.getpid() and any(str(self.home) in word for word in words):
                found.append(process.pid)
        return found
