"""Plain TCP connections read with few wake-ups, and answers looked at many at a time.

A process that wakes for a moment finds its caches cold: a request's Python took 24 µs of processor time in a row with others
and ten times that alone. So a wake-up only fetches bytes, and what they say is read LATER_S after, unless somebody waits for
it. The kernel says when bytes came (SO_TIMESTAMPNS, socket(7)), so instants are exact all the same, even where this process
had to wait for the CPU; and so bytes need not be fetched at once either: where several connections had some, all are left
alone for PAUSE_S and then fetched from together.
"""

import asyncio
import select
import socket
import struct
import time
from collections import deque
from typing import Protocol

from loadtests.alarm import Alarm

AVAILABLE = hasattr(select, "epoll")  # elsewhere than on Linux an event loop's own connections have to do
PAUSE_S = 0.001  # what comes over one connection within it may count as one chunk, at the instant of its end
LATER_S = 0.05
AT_ONCE = 8  # connections whose answers are read before anything else gets its turn: a few tenths of a millisecond
READ_BYTES = 65536
_SO_TIMESTAMPNS = 35  # asm-generic/socket.h; what is delivered has the same number
_TIMESPEC = struct.Struct("@qq")
_ANCILLARY_BYTES = socket.CMSG_SPACE(_TIMESPEC.size) if AVAILABLE else 0


class Reader(Protocol):
    """Takes what came over a connection."""

    def received(self, data: bytes, age_s: float) -> None:
        """age_s: how long ago the kernel had it."""

    def connection_lost(self, exc: Exception | None) -> None:
        """None: the other end closed, or we did."""


class Inbox:
    """The connections of one event loop, in which it must be opened and closed."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.links: dict[int, Link] = {}
        self._later: deque[Link] = deque()  # with something to hand over
        self._loop = asyncio.get_running_loop()
        self._alarm = Alarm(time.monotonic)
        self._alarm.__enter__()
        self._watches = False
        self._watch()

    def close(self) -> None:
        """After its connections."""
        self._leave_alone()
        self._alarm.__exit__(None, None, None)
        self.epoll.close()

    def hand_over_later(self, link: "Link") -> None:
        if not self._later:
            self._alarm.call_at(time.monotonic() + LATER_S, self._hand_over)
        self._later.append(link)

    def _hand_over(self) -> None:
        for _ in range(min(len(self._later), AT_ONCE)):
            self._later.popleft().hand_over()
        if self._later:
            self._loop.call_soon(self._hand_over)

    def _watch(self) -> None:
        if not self._watches:
            self._watches = True
            self._loop.add_reader(self.epoll.fileno(), self._fetch)

    def _leave_alone(self) -> None:
        if self._watches:
            self._watches = False
            self._loop.remove_reader(self.epoll.fileno())

    def _fetch(self) -> None:
        if self.epoll.closed:
            return
        events = self.epoll.poll(0)
        now_ns = time.monotonic_ns()
        for number, event in events:
            if link := self.links.get(number):
                if event == select.EPOLLIN:
                    link.fetch(now_ns)
                else:
                    link.happened(event)
        if len(events) > 1 or (events and not self._watches):
            self._leave_alone()
            self._alarm.call_at(now_ns / 1e9 + PAUSE_S, self._fetch)
        else:
            self._watch()


Ancillary = list[tuple[int, int, bytes]]


class Link:
    """What a connection needs of asyncio.Transport, for one socket of an inbox."""

    def __init__(self, connected: socket.socket, reader: Reader, inbox: Inbox) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self.address = str(connected.getpeername()[0])
        self.hurries = True  # somebody waits for what comes
        self._socket = connected
        self._number = connected.fileno()
        self._reader = reader
        self._inbox = inbox
        self._loop = asyncio.get_running_loop()
        self._unsent = b""
        # not handed over: what came, what the kernel says of it, when it was fetched (nanoseconds of the monotonic clock)
        self._arrived: list[tuple[bytes, Ancillary, int]] = []
        self._reads = True
        self._closing = False
        inbox.links[self._number] = self
        inbox.epoll.register(self._number, select.EPOLLIN)

    def is_closing(self) -> bool:
        return self._closing

    def write(self, data: bytes) -> None:
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            self._lose(exc)
            return
        if sent < len(data):
            self._unsent = data[sent:]
            self._register()

    def abort(self) -> None:
        self._lose(None)

    def pause_reading(self) -> None:
        """Not even its end is noticed meanwhile."""
        self._reads = False
        self._register()

    def resume_reading(self) -> None:
        self._reads = True
        self._register()

    def happened(self, event: int) -> None:
        if self._unsent and event & ~select.EPOLLIN:
            data, self._unsent = self._unsent, b""
            self._register()
            self.write(data)
        if self._reads and event & ~select.EPOLLOUT:
            self.fetch(time.monotonic_ns())

    def fetch(self, now_ns: int) -> None:
        """now_ns: of the monotonic clock."""
        try:
            data, ancillary, _, _ = self._socket.recvmsg(READ_BYTES, _ANCILLARY_BYTES)
        except BlockingIOError:
            return
        except OSError as exc:
            self._lose(exc)
            return
        if not data:
            self._lose(None)
            return
        self._arrived.append((data, ancillary, now_ns))
        if self.hurries:
            self.hand_over()
        elif len(self._arrived) == 1:
            self._inbox.hand_over_later(self)

    def hand_over(self) -> None:
        """What came up to now."""
        arrived, self._arrived = self._arrived, []
        for data, ancillary, fetched_ns in arrived:
            age_ns = time.monotonic_ns() - fetched_ns
            self._reader.received(data, max(age_ns, _age_ns(ancillary)) / 1e9)

    def _register(self) -> None:
        """With what it waits for now."""
        if self._closing:
            return
        wanted = (select.EPOLLIN if self._reads else 0) | (select.EPOLLOUT if self._unsent else 0)
        if self._number in self._inbox.links:
            if wanted:
                self._inbox.epoll.modify(self._number, wanted)
            else:  # an epoll tells of a hang-up whether asked or not
                del self._inbox.links[self._number]
                self._inbox.epoll.unregister(self._number)
        elif wanted:
            self._inbox.links[self._number] = self
            self._inbox.epoll.register(self._number, wanted)

    def _lose(self, exc: Exception | None) -> None:
        if self._closing:
            return
        self._closing = True
        if self._inbox.links.pop(self._number, None):
            self._inbox.epoll.unregister(self._number)
        self._socket.close()
        self._loop.call_soon(self._end, exc)

    def _end(self, exc: Exception | None) -> None:
        self.hand_over()
        self._reader.connection_lost(exc)


def _age_ns(ancillary: Ancillary) -> int:
    """Of the latest bytes; 0 where the kernel did not stamp them."""
    for _, kind, stamp in ancillary:
        if kind == _SO_TIMESTAMPNS and len(stamp) == _TIMESPEC.size:
            seconds, nanoseconds = _TIMESPEC.unpack(stamp)
            return time.time_ns() - int(seconds) * 1_000_000_000 - int(nanoseconds)
    return 0
