"""What a subject may still use: token buckets of one minute's worth, and counts of what is open. Pure but for the clock.

A bucket holds `limit` tokens at most, is full when it is new, and gains limit / 60 tokens a second. What is reserved is
taken from all buckets of a request or from none. When it ends, what it did not use goes back; what it used beyond its
reservation is taken as well, so a bucket can owe up to one minute's worth and the rate holds in the long run.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

WINDOW_S = 60.0
EXACT = 1e-9  # levels closer than this are one: sums of refills are not exact


class Kind(StrEnum):
    """What is counted."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    OPEN = "open"


@dataclass(frozen=True)
class Ask:
    """What one request wants of one limit."""

    key: str  # the bucket's, unique
    kind: Kind
    limit: int  # tokens a minute and at most, or requests open at once
    amount: int


@dataclass(frozen=True)
class Answer:
    """The levels, in the order asked: after the taking, or as they are where one was too low."""

    granted: bool
    levels: tuple[float, ...]  # what is left; of OPEN, how many are open


def level_at(level: float, at_s: float, limit: int, now_s: float) -> float:
    return min(float(limit), level + max(0.0, now_s - at_s) * limit / WINDOW_S)


def suffices(ask: Ask, level: float) -> bool:
    if ask.kind is Kind.OPEN:
        return level + ask.amount <= ask.limit
    return level >= ask.amount - EXACT


def settled(level: float, refund: float, limit: int) -> float:
    """refund: below zero, a further charge."""
    return max(-float(limit), min(float(limit), level + refund))


def wait_s(level: float, amount: float, limit: int) -> float:
    """Until the bucket holds `amount`, if nobody takes anything meanwhile."""
    return max(0.0, amount - level) * WINDOW_S / limit


class Buckets:
    """All of one process, in memory."""

    def __init__(self) -> None:
        self._levels: dict[str, tuple[float, float]] = {}  # key -> level, and when that was
        self._open: Counter[str] = Counter()

    def reserve(self, asks: Sequence[Ask], now_s: float) -> Answer:
        levels = [self._level(ask, now_s) for ask in asks]
        if not all(map(suffices, asks, levels)):
            return Answer(False, tuple(levels))
        for index, ask in enumerate(asks):
            if ask.kind is Kind.OPEN:
                self._open[ask.key] += ask.amount
                levels[index] += ask.amount
            else:
                levels[index] -= ask.amount
                self._levels[ask.key] = levels[index], now_s
        return Answer(True, tuple(levels))

    def settle(self, asks: Sequence[Ask], refunds: Sequence[float], now_s: float) -> None:
        """End a reservation. refunds: for each ask what goes back, below zero what is taken; of OPEN all goes back."""
        for ask, refund in zip(asks, refunds, strict=True):
            if ask.kind is Kind.OPEN:
                self._open[ask.key] -= ask.amount
                if self._open[ask.key] <= 0:
                    del self._open[ask.key]
            elif refund:
                self._levels[ask.key] = settled(self._level(ask, now_s), refund, ask.limit), now_s

    def open(self, key: str) -> int:
        return self._open[key]

    def drop_full(self, now_s: float) -> None:
        """Forget every bucket that is surely full again: a new one is the same."""
        self._levels = {
            key: (level, at_s) for key, (level, at_s) in self._levels.items() if now_s - at_s < 2 * WINDOW_S
        }

    def _level(self, ask: Ask, now_s: float) -> float:
        if ask.kind is Kind.OPEN:
            return self._open[ask.key]
        if ask.key not in self._levels:
            return float(ask.limit)
        level, at_s = self._levels[ask.key]
        return level_at(level, at_s, ask.limit, now_s)
