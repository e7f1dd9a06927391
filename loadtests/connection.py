"""HTTP/1.1 connections made for measuring: the instant is read as bytes are handed over, before anything is done with them.

A general client wakes a task for every chunk, which costs more processor time than all the rest.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Protocol, cast

import httptools

# uvicorn and Node close a connection that was idle for 5 s; a request sent into its closing would be lost.
KEEP_ALIVE_S = 4.0

Clock = Callable[[], float]  # seconds from the beginning of the run


class Receiver(Protocol):
    """Takes an answer as it comes; `at_s` is when, by the clock given to `exchange`."""

    def on_head(self, status: int, headers: Mapping[bytes, bytes], at_s: float) -> None:
        """headers: by lower-case name."""

    def on_body(self, data: bytes, at_s: float) -> float:
        """All that one read brought. Returns how long to read nothing more, in seconds."""


class BrokenConnectionError(Exception):
    """The connection ended, or what came over it was not HTTP, before the answer was whole."""


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._receiver: Receiver | None = None
        self._complete: asyncio.Future[float] | None = None
        self._clock: Clock = time.monotonic
        self._read_s = 0.0  # when the latest bytes came
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._until_closed = False  # the answer ends where the connection ends
        self._usable = True

    @property
    def usable(self) -> bool:
        return self._usable and self._transport is not None and not self._transport.is_closing()

    @property
    def address(self) -> str:
        """Of the server."""
        return "" if self._transport is None else str((self._transport.get_extra_info("peername") or ("",))[0])

    async def exchange(self, request: bytes, receiver: Receiver, clock: Clock) -> float:
        """Send the request; returns the instant at which its answer was whole.

        Cancelling this closes the connection. Raises BrokenConnectionError.
        """
        if self._transport is None or not self.usable:
            raise BrokenConnectionError("ConnectionClosed")
        self._receiver, self._clock = receiver, clock
        self._complete = self._loop.create_future()
        try:
            self._transport.write(request)
            return await self._complete
        except BaseException:
            self.abort()
            raise
        finally:
            self._receiver = self._complete = None

    def abort(self) -> None:
        self._usable = False
        if self._transport is not None:
            self._transport.abort()

    def _settle(self, error: Exception | None = None) -> None:
        if self._complete is None or self._complete.done():
            return
        if error is None:
            self._complete.set_result(self._read_s)
        else:
            self._complete.set_exception(error)

    def _hand_over(self, *, whole: bool = False) -> None:
        if not self._body or self._receiver is None:
            return
        data = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        pause_s = self._receiver.on_body(data, self._read_s)
        if pause_s and not whole and self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
            self._loop.call_later(pause_s, self._resume)

    def _resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._read_s = self._clock()
        if self._receiver is None:  # nobody asked, such as a 408 before the server closes
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._settle(BrokenConnectionError(type(exc).__name__))
            self.abort()
        else:
            self._hand_over()

    def connection_lost(self, exc: Exception | None) -> None:
        self._usable = False
        if exc is None and self._until_closed:
            self._read_s = self._clock()
            self._settle()
        else:
            self._settle(BrokenConnectionError(type(exc).__name__ if exc else "ServerDisconnected"))
        self.closed.set_result(None)

    # What httptools calls

    def on_message_begin(self) -> None:
        self._headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200 and self._receiver is not None:
            self._until_closed = not self._headers.keys() & {b"content-length", b"transfer-encoding"}
            self._receiver.on_head(status, self._headers, self._read_s)

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:
            return  # 100 Continue and its like: the answer is still to come
        self._hand_over(whole=True)
        self._until_closed = False
        self._usable &= self._parser.should_keep_alive()
        self._settle()


class ConnectionPool:
    """Connections to one server: as many as there are requests, used again for KEEP_ALIVE_S."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self._host, self._port, self._tls = host, port, tls
        self._address = ""  # found by the first connection: no later one waits for a name server
        self._open: set[Connection] = set()
        self._idle: list[tuple[float, Connection]] = []  # since when, the latest last

    async def exchange(self, request: bytes, receiver: Receiver, clock: Clock) -> float:
        """As Connection.exchange, over one that is free or a new one. Raises OSError where none can be made."""
        connection = self._take() or await self._connect()
        done_s = await connection.exchange(request, receiver, clock)
        if connection.usable:
            self._idle.append((time.monotonic(), connection))
        return done_s

    async def close(self) -> None:
        for connection in self._open:
            connection.abort()
        await asyncio.gather(*(connection.closed for connection in self._open))

    def _take(self) -> Connection | None:
        oldest_s = time.monotonic() - KEEP_ALIVE_S
        while self._idle:
            since_s, connection = self._idle.pop()
            if connection.usable and since_s > oldest_s:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        host, self._address = self._address or self._host, ""  # asked for anew if this one fails
        _, connection = await loop.create_connection(
            Connection, host, self._port, ssl=self._tls, server_hostname=self._host if self._tls else None
        )
        self._address = connection.address
        self._open.add(connection)
        connection.closed.add_done_callback(lambda _: self._open.discard(connection))
        return connection
