"""An event loop that sees to a measurement before anything else, with as little processor time as can be.

A wake-up costs more than what is done in it: with nothing to do, 60 to 130 µs through uvloop or asyncio, 30 µs without them,
for each finds the caches cold. So the requests of a run are sent and their answers fetched right where the loop waits, and
asyncio hears of it only where a task is concerned.
"""

import asyncio
import heapq
import itertools
import math
import select
import selectors
import time
from collections.abc import Callable, Mapping
from contextvars import Context
from typing import Any, TypeVarTuple

from loadtests.inbox import AVAILABLE, Inbox

Call = Callable[[], None]
Ts = TypeVarTuple("Ts")


class Waiting(selectors.BaseSelector):
    """Where the loop waits: until asyncio has something to do, calls that fall due and bytes that come are seen to here."""

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.leaves = False  # asyncio has something to do
        self.on_error: Callable[[Exception], None]
        self._selector = selectors.DefaultSelector()
        self._calls: list[tuple[float, int, Call, object]] = []
        self._order = itertools.count()
        self._files = [self._selector.fileno()]
        self._all_files = [*self._files, self.inbox.epoll.fileno()]

    def call_at(self, at_s: float, call: Call, owner: object = None) -> None:
        """at_s: of the monotonic clock."""
        heapq.heappush(self._calls, (at_s, next(self._order), call, owner))

    def forget(self, owner: object) -> None:
        """None of its calls is made any more."""
        self._calls = [entry for entry in self._calls if entry[3] is not owner]
        heapq.heapify(self._calls)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        until_s = math.inf if timeout is None else time.monotonic() + timeout
        self.leaves = False
        inbox = self.inbox
        while True:
            wake_s = min(until_s, inbox.look_s, self._calls[0][0] if self._calls else math.inf)
            wait_s = None if wake_s == math.inf else max(0.0, wake_s - time.monotonic())
            # select counts in microseconds, epoll in milliseconds; and an epoll can be selected on
            ready, _, _ = select.select(self._all_files if inbox.watches else self._files, (), (), wait_s)
            now_s = time.monotonic()
            try:
                while self._calls and self._calls[0][0] <= now_s:
                    heapq.heappop(self._calls)[2]()
                if now_s >= inbox.glance_s or self._all_files[1] in ready:
                    inbox.fetch()
            except Exception as exc:  # noqa: BLE001  as of any call of an event loop
                self.on_error(exc)
            if self.leaves or now_s >= until_s or self._files[0] in ready:
                return self._selector.select(0)

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._selector.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._selector.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._selector.modify(fileobj, events, data)

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._selector.get_key(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._selector.get_map()

    def close(self) -> None:
        self.inbox.close()
        self._selector.close()


class Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.waiting = Waiting()
        self.waiting.on_error = self._report
        super().__init__(self.waiting)

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        self.waiting.leaves = True
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        self.waiting.leaves = True
        return super().call_at(when, callback, *args, context=context)

    def _report(self, exc: Exception) -> None:
        self.call_exception_handler({"message": "A call of the load generator failed.", "exception": exc})


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Ours where there is epoll; elsewhere the usual one, on which a generator works too, only less exactly."""
    return Loop() if AVAILABLE else asyncio.new_event_loop()


def running() -> Waiting | None:
    """That of the running loop, where it is one of ours."""
    loop = asyncio.get_running_loop()
    return loop.waiting if isinstance(loop, Loop) else None
