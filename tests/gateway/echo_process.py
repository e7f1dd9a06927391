"""A whole gateway process on the stand-in engine, for what only a process shows: python -m tests.gateway.echo_process HOME BASE

Serves as `lorikeet serve` does; the first line on standard output is its address.
"""

import socket
import sys
from pathlib import Path

from gateway import server
from gateway.app import create_app
from gateway.engines.echo import EchoEngine
from gateway.engines.echo_answers import Voice
from gateway.settings import Settings
from tests.gateway.conftest import EchoHost

WORDS = 200  # 4 s: time enough to look at a gateway that drains


def slow_engine() -> EchoEngine:
    engine = EchoEngine(slots=4, token_s=0.02)
    engine.base = Voice("base", "word " * WORDS, b"")
    return engine


def main() -> None:
    settings = Settings.model_validate({"LORIKEET_HOME": Path(sys.argv[1]), "base": sys.argv[2], "engine": "test"})
    app = create_app(settings, lambda on_ready: EchoHost(slow_engine, on_ready))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)  # noqa: T201
        server.run(app, listener, grace_s=settings.failure.drain_s)


if __name__ == "__main__":
    main()
