"""Give up on requests that take too long: many with the same patience, on one timer."""

import asyncio
import time
from collections import deque
from typing import Protocol


class Waiting(Protocol):
    finished: bool

    def give_up(self) -> None: ...


class Patience:
    """Each waiter that is not finished wait_s after it was added is told to give up.

    All wait equally long, so the first to come is the first to go, and a timer is set for it alone: one for each, set and
    cancelled, costs more processor time than sending a request.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[float, Waiting]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, waiting: Waiting) -> None:
        self._waiting.append((time.monotonic() + self._wait_s, waiting))
        if self._timer is None:
            self._timer = self._loop.call_later(self._wait_s, self._look)

    def close(self) -> None:
        """Nobody is told any more."""
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        while self._waiting:
            due_s, waiting = self._waiting[0]
            wait_s = due_s - time.monotonic()
            if not waiting.finished and wait_s > 0:
                self._timer = self._loop.call_later(wait_s, self._look)
                return
            self._waiting.popleft()
            if not waiting.finished:
                waiting.give_up()
