"""HTTP/1.1 connections made for measuring: each answer's instants are those at which its bytes came.

A general client wakes a task for every chunk, which costs more processor time than all the rest. Here nothing is a task but
the opening of a connection: an answer is handed over in calls.
"""

import asyncio
import math
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import httptools

from loadtests import loop
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
        self._link: Link | None = None  # the same, where it is one
        self._parser = httptools.HttpResponseParser(self)
        self._receiver: Receiver | None = None
        self._clock: Clock = time.monotonic
        self._read_s = 0.0  # when the latest bytes came
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._whole = False
        self._until_closed = False  # the answer ends where the connection ends
        self.usable = True  # for another request, once this one is answered

    @property
    def address(self) -> str:
        """Of the server."""
        if not isinstance(self._transport, asyncio.Transport):
            return ""
        return str((self._transport.get_extra_info("peername") or ("",))[0])

    def start(self, request: bytes, receiver: Receiver, clock: Clock) -> None:
        """Send the request. The receiver hears of the end in any case, but where `abort` is called before."""
        self._receiver, self._clock, self._read_s, self._whole = receiver, clock, -math.inf, False
        if self._link is not None:
            self._link.ask(request, hurries=receiver.hurries)
        elif self._transport is not None:
            self._transport.write(request)

    def catch_up(self) -> None:
        """Hand over what came up to now."""
        if self._link is not None:
            self._link.hand_over()

    def abandon(self) -> None:
        self.usable, self._receiver = False, None
        if self._transport is not None:
            self._transport.abort()

    def received(self, pieces: Sequence[tuple[bytes, float]]) -> None:
        """Bytes, and when they came, by the monotonic clock."""
        behind_s = time.monotonic() - self._clock()
        for data, came_s in pieces:
            if self._receiver is None:  # nobody asked, such as a 408 before the server closes; or nobody asks any more
                self.abandon()
                return
            self._read_s = max(self._read_s, came_s - behind_s)
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserError as exc:
                self._end(BrokenConnectionError(type(exc).__name__))
                self.abandon()
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
        if self._link is not None:
            self._link.rest()
        if error is None and self.usable and self._transport is not None and not self._transport.is_closing():
            self._free(self)
        receiver.on_end(self._read_s, error)

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport | Link) -> None:
        self._transport = cast(asyncio.Transport | Link, transport)
        self._link = transport if isinstance(transport, Link) else None

    def data_received(self, data: bytes) -> None:
        self.received([(data, time.monotonic())])

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
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
        self.usable &= self._parser.should_keep_alive()


AddressInfo = tuple[int, int, int, str, tuple[Any, ...]]  # as getaddrinfo gives them


class Exchange(Protocol):
    """A request on its way."""

    def catch_up(self) -> None:
        """The receiver hears of what came up to now, and perhaps of the end."""

    def abandon(self) -> None:
        """Closes the connection; the receiver hears nothing more. Only while it has not heard of the end."""


class Opening:
    """A request whose connection is being opened."""

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.task: asyncio.Task[None] | None = None

    def catch_up(self) -> None:
        if self.connection is not None:
            self.connection.catch_up()

    def abandon(self) -> None:
        if self.connection is not None:
            self.connection.abandon()
        elif self.task is not None:
            self.task.cancel()


class ConnectionPool:
    """Connections to one server: as many as there are requests, used again for KEEP_ALIVE_S."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self._host, self._port, self._tls = host, port, tls
        # found by the first connection: no later one waits for a name server, and asked for anew when one fails
        self._found: AddressInfo | None = None
        self._address = ""  # the same, for connections of the event loop
        waiting = loop.running()
        self._inbox = waiting.inbox if waiting is not None and tls is None else None
        self._opening: set[asyncio.Task[None]] = set()
        self._open: set[Connection] = set()
        self._idle: list[tuple[float, Connection]] = []  # since when, the latest last

    def start(self, request: bytes, receiver: Receiver, clock: Clock) -> Exchange:
        """Send the request over a connection that is free, or a new one. The receiver is not called before this returns."""
        oldest_s = time.monotonic() - KEEP_ALIVE_S
        while self._idle:
            since_s, connection = self._idle.pop()
            if connection.usable and since_s > oldest_s:
                connection.start(request, receiver, clock)
                return connection
            connection.abandon()
        if connecting := self._connecting():
            connecting.start(request, receiver, clock)
            return connecting
        opening = Opening()
        opening.task = asyncio.get_running_loop().create_task(self._start(opening, request, receiver, clock))
        self._opening.add(opening.task)
        opening.task.add_done_callback(self._opening.discard)
        return opening

    def note_gap(self, gap_s: float) -> None:
        """The shortest between two chunks of an answer: 0 where two came at once, infinite where there was one chunk."""
        if self._inbox is not None:
            self._inbox.note_gap(gap_s)

    async def close(self) -> None:
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        for connection in self._open:
            connection.abandon()
        await asyncio.gather(*(connection.closed for connection in self._open))

    def _free(self, connection: Connection) -> None:
        self._idle.append((time.monotonic(), connection))

    async def _start(self, opening: Opening, request: bytes, receiver: Receiver, clock: Clock) -> None:
        try:
            opening.connection = await self._connect()
        except OSError as exc:
            receiver.on_end(clock(), exc)
        else:
            opening.connection.start(request, receiver, clock)

    def _connecting(self) -> Connection | None:
        """To where the last one came, without a task; the request waits for it. None where that is not known."""
        if self._found is None or self._inbox is None:
            return None
        candidate = socket.socket(*self._found[:3])
        candidate.setblocking(False)
        try:
            candidate.connect(self._found[4])
        except BlockingIOError:
            pass
        except OSError:
            candidate.close()
            self._found = None
            return None
        return self._linked(candidate, self._inbox)

    def _linked(self, connected: socket.socket, inbox: Inbox) -> Connection:
        connection = Connection(self._free)
        link = Link(connected, connection, inbox)
        connection.connection_made(link)
        self._open.add(connection)

        def closed(_: object) -> None:
            self._open.discard(connection)
            if not link.sent_bytes:
                self._found = None

        connection.closed.add_done_callback(closed)
        return connection

    async def _connect(self) -> Connection:
        if self._inbox is not None:
            return self._linked(await self._connected(), self._inbox)
        connection = Connection(self._free)
        host, self._address = self._address or self._host, ""
        name = self._host if self._tls else None
        await asyncio.get_running_loop().create_connection(
            lambda: connection, host, self._port, ssl=self._tls, server_hostname=name
        )
        self._address = connection.address
        self._open.add(connection)
        connection.closed.add_done_callback(lambda _: self._open.discard(connection))
        return connection

    async def _connected(self) -> socket.socket:
        """To the first of the host's addresses that answers. Raises OSError, of the last one where none does."""
        running = asyncio.get_running_loop()
        error = OSError(f"{self._host} has no address")
        for place in await running.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM):
            candidate = socket.socket(*place[:3])
            try:
                candidate.setblocking(False)
                await running.sock_connect(candidate, place[4])
            except OSError as exc:
                candidate.close()
                error = exc
            except BaseException:
                candidate.close()
                raise
            else:
                self._found = place
                return candidate
        raise error
