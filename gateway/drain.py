"""Stopping without dropping: no new work, a grace for what runs, then an error for what outlasts it."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import ShuttingDownError
from gateway.respond import send_error

_LOOKS = frozenset(["GET", "HEAD", "OPTIONS"])  # answered to the end, so that whoever watches sees the gateway go


class Drain:
    """Whether the gateway is on its way out, and what still runs."""

    def __init__(self) -> None:
        self.began = False
        self.over = False  # the grace has passed
        self.working = 0  # requests that ask for work, not those that only look
        self._cuttable: set[asyncio.Task[Any]] = set()

    def begin(self) -> None:
        """Take no new work. Safe to call from a signal's handler."""
        self.began = True

    def cut(self) -> None:
        """End what still generates."""
        self.over = True
        for task in self._cuttable:
            task.cancel()

    @contextlib.contextmanager
    def cuttable(self, task: asyncio.Task[Any]) -> Iterator[None]:
        """The task is cancelled by `cut`, while the block lasts; at once where that has been already."""
        self._cuttable.add(task)
        if self.over:
            task.cancel()
        try:
            yield
        finally:
            self._cuttable.discard(task)


class NoNewWork:
    """Pure ASGI middleware: while the gateway drains, every request for work is refused on a connection that closes."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._drain.began:
            await self._last(scope, receive, send)
        elif scope["method"] in _LOOKS:
            await self._app(scope, receive, send)
        else:
            self._drain.working += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._drain.working -= 1

    async def _last(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        if scope["method"] in _LOOKS:
            await self._app(scope, receive, send_closing)
        else:
            await send_error(send_closing, ShuttingDownError())
