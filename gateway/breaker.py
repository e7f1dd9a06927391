"""Whether a replica is worth asking, by how it has answered. Pure: it is told what happened and when.

Consecutive failures open the breaker; after a while one request at a time is let through to try, and an answer closes it.
"""

from dataclasses import dataclass

from gateway.errors import NoReplicaError


@dataclass(frozen=True)
class Attempt:
    """One request on its way to the replica. trial: the one by which an open breaker finds out."""

    trial: bool


class Breaker:
    """All times are seconds on one monotonic clock."""

    def __init__(self, *, failures: int, open_s: float) -> None:
        """failures: in a row, to open it. open_s: how long nobody asks before the next trial."""
        self._limit = failures
        self._open_s = open_s
        self._failures = 0
        self._open_until_s: float | None = None
        self._trying = False
        self.answered_s: float | None = None  # when the replica last gave a whole answer
        self.well_since_s: float | None = None  # its first whole answer after the last time it was not asked

    def state(self, now_s: float) -> str:
        """closed, open, or half-open: the next request is a trial."""
        if self._open_until_s is None:
            return "closed"
        return "half-open" if now_s >= self._open_until_s else "open"

    def admits(self, now_s: float) -> bool:
        state = self.state(now_s)
        return state == "closed" or (state == "half-open" and not self._trying)

    def begin(self, now_s: float) -> Attempt:
        """To be followed by `end`, and by `succeeded` or `failed` before it where the request tells. Raises NoReplicaError."""
        if not self.admits(now_s):
            raise NoReplicaError
        trial = self._open_until_s is not None
        self._trying = self._trying or trial
        return Attempt(trial)

    def end(self, attempt: Attempt) -> None:
        """The request is over, whatever it told: without a verdict the next trial may come at once."""
        if attempt.trial:
            self._trying = False

    def succeeded(self, now_s: float) -> None:
        """A whole answer came."""
        if self.well_since_s is None:
            self.well_since_s = now_s
        self._failures = 0
        self._open_until_s = None
        self.answered_s = now_s

    def failed(self, attempt: Attempt, now_s: float) -> None:
        """The replica's own failure. Those begun before the breaker opened do not keep it open for longer."""
        self._failures += 1
        if attempt.trial or (self._open_until_s is None and self._failures >= self._limit):
            self._open_until_s = now_s + self._open_s
            self.well_since_s = None

    def renew(self, now_s: float) -> None:
        """A new engine process has passed its first look: what was before is not its doing."""
        self.well_since_s = None
        self.succeeded(now_s)
