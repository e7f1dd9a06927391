"""Call or wake up at an instant of a run to a tenth of a millisecond, without spinning.

Timers of asyncio come up to a millisecond late, and uvloop's spin through the last half; those of our own loop do neither.
"""

import asyncio
import time
from collections.abc import Callable
from types import TracebackType

from loadtests import loop

Clock = Callable[[], float]  # seconds from the beginning of the run; as long as the monotonic clock's


class Alarm:
    """Any number of calls and sleepers; after it is left, none is called any more."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._behind_s = time.monotonic() - clock()
        self._loop = asyncio.get_running_loop()
        self._waiting = loop.running()
        self._timers: set[asyncio.TimerHandle] = set()  # on a loop that is not ours

    def __enter__(self) -> "Alarm":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._waiting is not None:
            self._waiting.forget(self)
        for timer in self._timers:
            timer.cancel()

    async def sleep_until(self, at_s: float) -> None:
        """Returns at once when that has passed."""
        if at_s <= self._clock():
            return
        sleeper = self._loop.create_future()
        self.call_at(at_s, lambda: None if sleeper.done() else sleeper.set_result(None))
        await sleeper

    def call_at(self, at_s: float, call: Callable[[], None]) -> None:
        """From the event loop, in any case: later than now even where that has passed."""
        if self._waiting is not None:
            self._waiting.call_at(at_s + self._behind_s, call, self)
            return

        def ring() -> None:
            self._timers.discard(timer)
            call() if self._clock() >= at_s else self.call_at(at_s, call)

        timer = self._loop.call_later(max(at_s - self._clock(), 0.0) + 1e-3, ring)
        self._timers.add(timer)
