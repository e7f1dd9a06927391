"""Plain TCP connections read with few wake-ups, and answers looked at many at a time.

A process that wakes for a moment finds its caches cold: a request's Python took 24 µs of processor time in a row with others
and ten times that alone. So a wake-up only fetches bytes, and what they say is read when the answer is whole, together with
other answers, unless somebody waits for it. The kernel says when bytes came (SO_TIMESTAMPNS, socket(7)), so instants are exact
all the same, even where this process had to wait for the CPU; and so bytes need not be fetched at once either. But one fetch
brings all that came over a connection, with the instant of its end: chunks that come within one pause count as one. So a
pause is shorter than the gaps that answers lately had between their chunks.
"""

import asyncio
import math
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

AVAILABLE = hasattr(select, "epoll")  # elsewhere than on Linux an event loop's own connections have to do
PAUSE_S = 0.001  # while nothing is known of gaps, or somebody waits
LONGEST_PAUSE_S = 0.016
PAUSE_SHARE = 0.75  # of the shortest gap between two chunks
ANSWERS = 32  # that tell of the gaps
LATER_S = 0.1  # between two looks for whole answers
PIECES = 256  # are read even if their answer is not whole
AT_ONCE_NS = 400_000  # in which answers are read before anything else gets its turn
READ_BYTES = 65536
EVENTS = 256  # fetched with one call
_LAST_CHUNK = b"0\r\n\r\n"
_SO_TIMESTAMPNS = 35  # asm-generic/socket.h; what is delivered has the same number
_TIMESPEC = struct.Struct("@qq")
_ANCILLARY_BYTES = socket.CMSG_SPACE(_TIMESPEC.size) if AVAILABLE else 0


class Reader(Protocol):
    """Takes what came over a connection."""

    def received(self, pieces: Sequence[tuple[bytes, float]]) -> None:
        """Bytes, and when the kernel had them, by the monotonic clock."""

    usable: bool  # set to False when the connection ends, whoever ends it

    def connection_lost(self, exc: Exception | None) -> None:
        """None: the other end closed, or we did."""


class Inbox:
    """The connections of one event loop, which asks `fetch` of it: when something came, or at `look_s`."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.links: dict[int, Link] = {}
        self.watches = True  # else what comes is left alone
        self.look_s = math.inf  # when to fetch in any case
        self.glance_s = math.inf  # from when on to fetch if the process is awake anyhow
        self.hurried = 0  # connections of which somebody waits for an answer
        self.writing: set[Link] = set()  # with something unsent, for which nothing may pause
        self._came_s = -math.inf  # when something was fetched
        self._pause_s = PAUSE_S
        self._gaps_s: deque[float] = deque(maxlen=ANSWERS)
        self._unread: dict[Link, None] = {}  # with something to hand over, in the order in which it came
        self._ripe: deque[Link] = deque()  # those of them to hand over now
        self._sort_s = math.inf  # when to look for those

    def close(self) -> None:
        """After its connections."""
        self.epoll.close()

    def note_gap(self, gap_s: float) -> None:
        """The shortest between two chunks of an answer: 0 where two came at once, infinite where there was one chunk."""
        self._gaps_s.append(gap_s)
        self._pause_s = min(max(PAUSE_SHARE * min(self._gaps_s), PAUSE_S), LONGEST_PAUSE_S)

    @property
    def pause_s(self) -> float:
        return PAUSE_S if self.hurried else self._pause_s

    def hand_over_later(self, link: "Link", now_s: float) -> None:
        if not self._unread:
            self._sort_s = now_s + LATER_S
        self._unread[link] = None

    def fetch(self) -> None:
        events = self.epoll.poll(0, EVENTS)
        now_ns = time.monotonic_ns()
        for number, event in events:
            if link := self.links.get(number):
                if event == select.EPOLLIN:
                    link.fetch(now_ns)
                else:
                    link.happened(event)
        now_s, pause_s = now_ns / 1e9, self.pause_s
        self.watches = bool(self.writing) or now_s - self._came_s > 2 * pause_s
        if events:
            self._came_s = now_s
        self.glance_s = now_s + PAUSE_S
        self.look_s = self._sort_s + LONGEST_PAUSE_S if self.watches else now_s + pause_s
        if now_s >= self._sort_s:
            self._sort(now_ns)

    def _sort(self, now_ns: int) -> None:
        """Hand over what is whole, or for long enough all there is: in portions, for a request may fall due meanwhile."""
        now_s = now_ns / 1e9
        if not self._ripe:
            before_ns = now_ns - round(LATER_S * 1e9)
            self._ripe.extend([link for link in self._unread if link.is_ripe(before_ns)])
            for link in self._ripe:
                del self._unread[link]
        until_ns = now_ns + AT_ONCE_NS
        while self._ripe and time.monotonic_ns() < until_ns:
            self._ripe.popleft().hand_over()
        if self._ripe:
            self._sort_s = self.look_s = self.glance_s = now_s
        else:
            self._sort_s = now_s + LATER_S if self._unread else math.inf
            if self.watches:
                self.look_s = self._sort_s + LONGEST_PAUSE_S


Ancillary = list[tuple[int, int, bytes]]


class Link:
    """What a connection needs of asyncio.Transport, for one socket of an inbox."""

    def __init__(self, connected: socket.socket, reader: Reader, inbox: Inbox) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self.hurries = True  # what comes must be seen at once
        self._socket = connected
        self._number = connected.fileno()
        self._reader = reader
        self._inbox = inbox
        self._loop = asyncio.get_running_loop()
        self._waited_for = False
        self._unsent = b""
        self.sent_bytes = 0
        # not handed over: what came, what the kernel says of it, when it was fetched (nanoseconds of the monotonic clock)
        self._arrived: list[tuple[bytes, Ancillary, int]] = []
        self._reads = True
        self._closing = False
        inbox.links[self._number] = self
        inbox.epoll.register(self._number, select.EPOLLIN)

    def is_closing(self) -> bool:
        return self._closing

    def is_ripe(self, before_ns: int) -> bool:
        """Whether to hand over: all that will come soon is here, as far as can be seen from outside."""
        if not self._arrived or len(self._arrived) >= PIECES:
            return True
        data, _, fetched_ns = self._arrived[-1]
        return data.endswith(_LAST_CHUNK) or fetched_ns <= before_ns

    def rest(self) -> None:
        """Nothing is expected; what comes all the same must be seen before the next request."""
        self.hurries = True
        if self._waited_for:
            self._waited_for = False
            self._inbox.hurried -= 1

    def ask(self, request: bytes, *, hurries: bool) -> None:
        """hurries: somebody waits for the answer."""
        self.hurries = hurries
        if hurries:
            self._waited_for = True
            self._inbox.hurried += 1
        self.write(request)

    def write(self, data: bytes) -> None:
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            self._lose(exc)
            return
        self.sent_bytes += sent
        if sent < len(data):
            self._unsent = data[sent:]
            self._inbox.writing.add(self)
            self._inbox.watches = True
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
            self._inbox.writing.discard(self)
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
            self._inbox.hand_over_later(self, now_ns / 1e9)

    def hand_over(self) -> None:
        """What came up to now."""
        if not self._arrived:
            return
        arrived, self._arrived = self._arrived, []
        behind_ns = time.time_ns() - time.monotonic_ns()
        self._reader.received(
            [
                (data, min(_stamp_ns(ancillary, fetched_ns + behind_ns) - behind_ns, fetched_ns) / 1e9)
                for data, ancillary, fetched_ns in arrived
            ]
        )

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
        self._reader.usable = False
        self._inbox.writing.discard(self)
        self.rest()
        if self._inbox.links.pop(self._number, None):
            self._inbox.epoll.unregister(self._number)
        self._socket.close()
        self._loop.call_soon(self._end, exc)

    def _end(self, exc: Exception | None) -> None:
        self.hand_over()
        self._reader.connection_lost(exc)


def _stamp_ns(ancillary: Ancillary, otherwise_ns: int) -> int:
    """When the latest bytes came, by the wall clock."""
    for _, kind, stamp in ancillary:
        if kind == _SO_TIMESTAMPNS and len(stamp) == _TIMESPEC.size:
            seconds, nanoseconds = _TIMESPEC.unpack(stamp)
            return int(seconds) * 1_000_000_000 + int(nanoseconds)
    return otherwise_ns
