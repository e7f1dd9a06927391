"""Lorikeet's gateway, as `lorikeet serve` runs it, before an engine that somebody else has started.

LORIKEET_HOME=… LORIKEET_PORT=… python -m benchmarks.on_echo /tmp/engine.sock
"""

import socket
import sys
from pathlib import Path

from gateway import logs, server
from gateway.app import create_app
from gateway.engines.vllm import VllmEngine
from gateway.services import OnReady
from gateway.settings import Settings


class Outside:
    """Keeps an engine it did not start: an `EngineHost` for one that is simply there."""

    def __init__(self, socket: Path, on_ready: OnReady) -> None:
        self.engine = VllmEngine("echo", socket)
        self.state = "stopped"
        self._on_ready = on_ready

    async def start(self) -> None:
        await self._on_ready(self.engine)
        self.state = "ready"

    async def stop(self) -> None:
        self.state = "stopped"
        await self.engine.close()

    async def restart(self, reason: str) -> None:
        raise RuntimeError(f"The echo engine does not restart: {reason}")


def main() -> None:
    settings = Settings()
    logs.configure("WARNING")
    app = create_app(settings, lambda on_ready: Outside(Path(sys.argv[1]), on_ready))
    with socket.create_server(("127.0.0.1", settings.port)) as listener:
        server.run(app, listener, grace_s=settings.failure.drain_s)


if __name__ == "__main__":
    main()
