"""Wake up at an instant to a tenth of a millisecond, without spinning.

Timers of event loops count whole milliseconds: asyncio's come up to one late, uvloop's spin through the last half.
Linux has a timer that is a file, which an event loop can watch (timerfd_create(2)); elsewhere the loop's own serves.
"""

import asyncio
import ctypes
import heapq
import itertools
import math
import os
from types import TracebackType

from loadtests.connection import Clock

_LIBC = ctypes.CDLL(None)
_CLOCK_MONOTONIC = 1
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC


class _Timer(ctypes.Structure):
    """struct itimerspec: the interval of repetition, which stays 0, and the time until it fires."""

    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("wait_s", ctypes.c_long),
        ("wait_ns", ctypes.c_long),
    )


class Alarm:
    """Any number of sleepers on one timer."""

    def __init__(self, clock: Clock, *, exact: bool = hasattr(_LIBC, "timerfd_create")) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._armed_s = math.inf
        self._exact = exact
        self._file = -1

    def __enter__(self) -> "Alarm":
        if self._exact:
            self._file = _LIBC.timerfd_create(_CLOCK_MONOTONIC, _FLAGS)
        if self._file >= 0:
            self._loop.add_reader(self._file, self._ring)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file >= 0:
            self._loop.remove_reader(self._file)
            os.close(self._file)
            self._file = -1

    async def sleep_until(self, at_s: float) -> None:
        """Returns at once when that has passed."""
        if at_s <= self._clock():
            return
        sleeper = self._loop.create_future()
        heapq.heappush(self._sleepers, (at_s, next(self._order), sleeper))
        if at_s < self._armed_s:
            self._arm(at_s)
        await sleeper

    def _arm(self, at_s: float) -> None:
        self._armed_s = at_s
        wait_s = max(at_s - self._clock(), 1e-6)  # a wait of 0 would disarm the timer
        if self._file < 0:
            self._loop.call_later(max(wait_s, 1e-3), self._wake)
            return
        seconds, rest_s = divmod(wait_s, 1)
        timer = _Timer(0, 0, int(seconds), int(rest_s * 1e9))
        _LIBC.timerfd_settime(self._file, 0, ctypes.byref(timer), None)

    def _ring(self) -> None:
        os.read(self._file, 8)
        self._wake()

    def _wake(self) -> None:
        now_s = self._clock()
        while self._sleepers and self._sleepers[0][0] <= now_s:
            _, _, sleeper = heapq.heappop(self._sleepers)
            if not sleeper.done():
                sleeper.set_result(None)
        self._armed_s = math.inf
        if self._sleepers:
            self._arm(self._sleepers[0][0])
