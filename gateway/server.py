"""The HTTP server of a gateway process: uvicorn, which at SIGTERM goes on listening while the gateway drains."""

import gc
import signal
import socket
import sys
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from gateway.drain import Drain

CUT_S = 5.0  # for the last error events to reach their callers


class DrainingServer(uvicorn.Server):
    """The first signal begins the drain, a second ends the grace at once, a third the process without stopping engines."""

    def __init__(self, config: uvicorn.Config, drain: Drain, *, grace_s: float) -> None:
        super().__init__(config)
        self._drain = drain
        self._grace_s = grace_s
        self._grace_ends_s = 0.0
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """What is there now stays. Looking through it again for garbage took 110 ms, twice a second under load."""
        await super().startup(sockets)
        gc.collect()
        gc.freeze()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._captured_signals.append(sig)
        self._signals += 1
        self._drain.begin()
        self._grace_ends_s = time.monotonic() + (self._grace_s if self._signals == 1 else 0.0)
        if self._signals > 2:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn every 0.1 s."""
        if self._drain.began and not self.should_exit:
            late_s = time.monotonic() - self._grace_ends_s
            if late_s >= 0 and not self._drain.over:
                self._drain.cut()
            self.should_exit = self._drain.working == 0 or late_s >= CUT_S
        return await super().on_tick(counter)


def run(app: FastAPI, listener: socket.socket, *, grace_s: float) -> bool:
    """Serve until told to stop; whether it had started. grace_s: what running answers get then.

    SIGTERM ends the process by SystemExit once everything is closed.
    """
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,  # what there was to wait for has been waited for
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again when it is done, for `finally`s
    server = DrainingServer(config, app.state.drain, grace_s=grace_s)
    server.run(sockets=[listener])
    return server.started
