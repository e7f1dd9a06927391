"""How fast a queue empties: turns that end a second while somebody waits. Pure: it is told the time.

Time in which nobody waited says how much was asked for, not how much can be done, and does not count.
"""

from collections import deque

WINDOW_S = 10.0  # of time in which somebody waited
PRIOR_S = 2.0  # how much of that time weighs as much as the estimate there was before it


class DrainRate:
    def __init__(self) -> None:
        self._ends: deque[float] = deque()  # on a clock that runs only while somebody waits
        self._waited_s = 0.0  # that clock, at the last change
        self._changed_s = 0.0
        self._waiting = False

    def note_waiting(self, waiting: bool, now_s: float) -> None:
        """Does anybody wait now? After a pause longer than the window, what was seen before it is forgotten."""
        if waiting == self._waiting:
            return
        if waiting and now_s - self._changed_s > WINDOW_S:
            self._ends.clear()
            self._waited_s = 0.0
        self._waited_s = self._clock(now_s)
        self._waiting, self._changed_s = waiting, now_s

    def note_end(self, now_s: float) -> None:
        """A turn has ended."""
        if self._waiting:
            self._ends.append(self._clock(now_s))

    def per_s(self, now_s: float, *, expected_per_s: float) -> float:
        """Turns a second, leaning on expected_per_s while little has been seen."""
        clock_s = self._clock(now_s)
        while self._ends and self._ends[0] <= clock_s - WINDOW_S:
            self._ends.popleft()
        return (len(self._ends) + expected_per_s * PRIOR_S) / (min(clock_s, WINDOW_S) + PRIOR_S)

    def _clock(self, now_s: float) -> float:
        return self._waited_s + (now_s - self._changed_s if self._waiting else 0.0)
