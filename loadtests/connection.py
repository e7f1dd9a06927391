"""HTTP/1.1 connections made for measuring: each answer's instants are those at which its bytes came.

A general client wakes a task for every chunk, which costs more processor time than all the rest. Here nothing is a task but
the opening of a connection: an answer is handed over in calls.
"""

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Protocol, cast

import httptools

from loadtests import inbox
from loadtests.alarm import Clock
from loadtests.inbox import Inbox, Link

# uvicorn and Node close a connection that was idle for 5 s; a request sent into its closing would be lost.
KEEP_ALIVE_S = 4.0


class Receiver(Protocol):
    """Takes an answer as it comes; `at_s` is when, by the clock given to `start`."""

    hurries: bool  # to hear of it; else somewhat later is soon enough

    def on_head(self, status: int, headers: Mapping[bytes, bytes], at_s: float) -> None:
        """headers: by lower-case name."""

    def on_body(self, data: bytes, at_s: float) -> float:
        """All that one read brought. Returns how long to read nothing more, in seconds."""

    def on_end(self, at_s: float, error: Exception | None) -> None:
        """The answer is whole, or never will be: BrokenConnectionError, or OSError where no connection can be made."""


class BrokenConnectionError(Exception):
    """The connection ended, or what came over it was not HTTP, before the answer was whole."""


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, free: "Callable[[Connection], None]") -> None:
        """free: told when the next request may come."""
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._free = free
        self._transport: Link | asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._receiver: Receiver | None = None
        self._clock: Clock = time.monotonic
        self._read_s = 0.0  # when the latest bytes came
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._whole = False
        self._until_closed = False  # the answer ends where the connection ends
        self._usable = True

    @property
    def usable(self) -> bool:
        return self._usable and self._transport is not None and not self._transport.is_closing()

    @property
    def address(self) -> str:
        """Of the server."""
        if isinstance(self._transport, Link):
            return self._transport.address
        return "" if self._transport is None else str((self._transport.get_extra_info("peername") or ("",))[0])

    def start(self, request: bytes, receiver: Receiver, clock: Clock) -> None:
        """Send the request. The receiver hears of the end in any case, but where `abort` is called before."""
        assert self._transport is not None  # noqa: S101  it is connected
        self._receiver, self._clock, self._read_s, self._whole = receiver, clock, clock(), False
        if isinstance(self._transport, Link):
            self._transport.hurries = receiver.hurries
        self._transport.write(request)

    def catch_up(self) -> None:
        """Hand over what came up to now."""
        if isinstance(self._transport, Link):
            self._transport.hand_over()

    def abort(self) -> None:
        self._usable, self._receiver = False, None
        if self._transport is not None:
            self._transport.abort()

    def received(self, data: bytes, age_s: float) -> None:
        """age_s: how long ago the bytes came."""
        if self._receiver is None:  # nobody asked, such as a 408 before the server closes; or nobody asks any more
            self.abort()
            return
        self._read_s = max(self._read_s, self._clock() - age_s)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._end(BrokenConnectionError(type(exc).__name__))
            self.abort()
            return
        if self._body:
            self._hand_over()
        if self._whole:
            self._end(None)

    def _hand_over(self) -> None:
        data = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        if self._receiver is None or self._transport is None:
            return
        pause_s = self._receiver.on_body(data, self._read_s)
        if pause_s and not self._whole and not self._transport.is_closing():
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(pause_s, self._resume)

    def _resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _end(self, error: Exception | None) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is None:
            return
        if isinstance(self._transport, Link):
            self._transport.hurries = True  # what nobody asked for must be seen before the next request
        if error is None and self.usable:
            self._free(self)
        receiver.on_end(self._read_s, error)

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport | Link) -> None:
        self._transport = cast(asyncio.Transport | Link, transport)

    def data_received(self, data: bytes) -> None:
        self.received(data, 0.0)

    def connection_lost(self, exc: Exception | None) -> None:
        self._usable = False
        self._read_s = self._clock()
        if exc is None and self._until_closed:
            self._end(None)
        else:
            self._end(BrokenConnectionError(type(exc).__name__ if exc else "ServerDisconnected"))
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
        self._whole = True
        self._until_closed = False
        self._usable &= self._parser.should_keep_alive()


class Exchange:
    """A request on its way, over a connection that is open or being opened."""

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.opening: asyncio.Task[None] | None = None

    def catch_up(self) -> None:
        """The receiver hears of what came up to now, and perhaps of the end."""
        if self.connection is not None:
            self.connection.catch_up()

    def abandon(self) -> None:
        """Closes the connection; the receiver hears nothing more. Only while it has not heard of the end."""
        if self.connection is not None:
            self.connection.abort()
        elif self.opening is not None:
            self.opening.cancel()


class ConnectionPool:
    """Connections to one server: as many as there are requests, used again for KEEP_ALIVE_S."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self._host, self._port, self._tls = host, port, tls
        self._address = ""  # found by the first connection: no later one waits for a name server
        self._inbox = Inbox() if inbox.AVAILABLE and tls is None else None
        self._opening: set[asyncio.Task[None]] = set()
        self._open: set[Connection] = set()
        self._idle: list[tuple[float, Connection]] = []  # since when, the latest last

    def start(self, request: bytes, receiver: Receiver, clock: Clock) -> Exchange:
        """Send the request over a connection that is free, or a new one. The receiver is not called before this returns."""
        exchange = Exchange()
        exchange.connection = self._take()
        if exchange.connection is not None:
            exchange.connection.start(request, receiver, clock)
        else:
            exchange.opening = asyncio.get_running_loop().create_task(self._start(exchange, request, receiver, clock))
            self._opening.add(exchange.opening)
            exchange.opening.add_done_callback(self._opening.discard)
        return exchange

    async def close(self) -> None:
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        for connection in self._open:
            connection.abort()
        await asyncio.gather(*(connection.closed for connection in self._open))
        if self._inbox is not None:
            self._inbox.close()

    def _take(self) -> Connection | None:
        oldest_s = time.monotonic() - KEEP_ALIVE_S
        while self._idle:
            since_s, connection = self._idle.pop()
            if connection.usable and since_s > oldest_s:
                return connection
            connection.abort()
        return None

    def _free(self, connection: Connection) -> None:
        self._idle.append((time.monotonic(), connection))

    async def _start(self, exchange: Exchange, request: bytes, receiver: Receiver, clock: Clock) -> None:
        try:
            exchange.connection = await self._connect()
        except OSError as exc:
            receiver.on_end(clock(), exc)
        else:
            exchange.connection.start(request, receiver, clock)

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        host, self._address = self._address or self._host, ""  # asked for anew if this one fails
        if self._inbox is None:
            name = self._host if self._tls else None
            _, connection = await loop.create_connection(
                lambda: Connection(self._free), host, self._port, ssl=self._tls, server_hostname=name
            )
        else:
            connected = await _connected(host, self._port)
            connection = Connection(self._free)
            connection.connection_made(Link(connected, connection, self._inbox))
        self._address = connection.address
        self._open.add(connection)
        connection.closed.add_done_callback(lambda _: self._open.discard(connection))
        return connection


async def _connected(host: str, port: int) -> socket.socket:
    """To the first of the host's addresses that answers. Raises OSError, of the last one where none does."""
    loop = asyncio.get_running_loop()
    error = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        candidate = socket.socket(family, kind, protocol)
        try:
            candidate.setblocking(False)
            await loop.sock_connect(candidate, address)
        except OSError as exc:
            candidate.close()
            error = exc
        except BaseException:
            candidate.close()
            raise
        else:
            return candidate
    raise error
