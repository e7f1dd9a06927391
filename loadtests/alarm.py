"""Call or wake up at an instant to a tenth of a millisecond, without spinning.

Timers of event loops count whole milliseconds: asyncio's come up to one late, uvloop's spin through the last half.
Linux has a timer that is a file, which an event loop can watch (timerfd_create(2)); elsewhere the loop's own serves.
"""

import asyncio
import ctypes
import heapq
import itertools
import math
import os
from collections.abc import Callable
from types import TracebackType

Clock = Callable[[], float]  # seconds from the beginning of the run

_LIBC = ctypes.CDLL(None)
_SET = getattr(_LIBC, "timerfd_settime", None)  # looked up once: nothing here is called more often
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
    """Any number of calls and sleepers on one timer."""

    def __init__(self, clock: Clock, *, exact: bool = hasattr(_LIBC, "timerfd_create")) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._armed_s = math.inf
        self._exact = exact
        self._file = -1
        self._timer = _Timer()
        self._timer_address = ctypes.byref(self._timer)

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
        self.call_at(at_s, lambda: None if sleeper.done() else sleeper.set_result(None))
        await sleeper

    def call_at(self, at_s: float, call: Callable[[], None]) -> None:
        """From the event loop, in any case: later than now even where that has passed."""
        heapq.heappush(self._calls, (at_s, next(self._order), call))
        if at_s < self._armed_s:
            self._arm(at_s)

    def _arm(self, at_s: float) -> None:
        """Sets the timer anew, by which it also stops to ring."""
        self._armed_s = at_s
        wait_s = max(at_s - self._clock(), 1e-6) if at_s < math.inf else 0.0  # 0 disarms
        if self._file < 0 or _SET is None:
            if wait_s:
                self._loop.call_later(max(wait_s, 1e-3), self._ring)
            return
        seconds = int(wait_s)
        self._timer.wait_s, self._timer.wait_ns = seconds, int((wait_s - seconds) * 1e9)
        _SET(self._file, 0, self._timer_address, None)

    def _ring(self) -> None:
        now_s = self._clock()
        due = []
        while self._calls and self._calls[0][0] <= now_s:
            due.append(heapq.heappop(self._calls)[2])
        self._armed_s = math.inf
        for call in due:
            call()
        if self._armed_s == math.inf or (self._calls and self._calls[0][0] < self._armed_s):
            self._arm(self._calls[0][0] if self._calls else math.inf)
