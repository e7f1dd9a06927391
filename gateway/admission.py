"""Who goes next on one engine: LoRA slots, requests in flight, fairness between tenants, and a bound on waiting.

`Scheduler` is the decision: it is told what arrives and what ends, and says who may start. It knows no clock and does no
I/O. `Admission` is the thin asynchronous layer that requests wait at.

Distinct adapters in flight never exceed the LoRA slots less the spare one, so the engine never has to skip a request
whose adapter finds no slot. Among those who may start, the tenant with the least weighted tokens served goes first
(the virtual token counter of Sheng et al. 2024, "Fairness in Serving Large Language Models"). A request whose adapter
finds no slot for longer than `patience_s` makes the adapter that has held its slot longest take no new requests until
the slot is free, so busy adapters cannot starve a quiet one.
"""

import asyncio
import itertools
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from gateway.errors import OverloadedError

T = TypeVar("T")


@dataclass(frozen=True)
class Ticket:
    """One request that wants a turn. `adapter` None is the base model, which takes no LoRA slot."""

    id: int
    tenant: str
    adapter: str | None
    arrived_s: float
    weight: float = 1.0


class Scheduler:
    """Pure: the same calls give the same decisions."""

    def __init__(self, *, slots: int, max_in_flight: int, patience_s: float) -> None:
        """slots: distinct adapters that may be in flight at once."""
        self._slots = slots
        self._max_in_flight = max_in_flight
        self._patience_s = patience_s
        self._waiting: dict[tuple[str, str | None], deque[Ticket]] = {}
        self._running: Counter[str | None] = Counter()
        self._running_tenants: Counter[str] = Counter()
        self._since: dict[str, float] = {}  # adapter -> when it took its slot
        self._draining: set[str] = set()
        self._served: dict[str, float] = {}  # tenant -> weighted tokens

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def in_flight(self) -> int:
        return self._running.total()

    @property
    def adapters_in_flight(self) -> frozenset[str]:
        return frozenset(self._since)

    def add(self, ticket: Ticket) -> None:
        """A tenant that comes back from idling is lifted to the least served active one: idling earns no credit.

        And when all were idle nobody is owed anything: a tenant of long standing starts level with a new one.
        """
        if not (self._running or self._waiting):
            self._served.clear()
        if not self._active(ticket.tenant):
            floor = min((self._served[tenant] for tenant in self._served if self._active(tenant)), default=0.0)
            self._served[ticket.tenant] = max(self._served.get(ticket.tenant, 0.0), floor)
        self._waiting.setdefault((ticket.tenant, ticket.adapter), deque()).append(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """The ticket, still waiting, is given up."""
        group = (ticket.tenant, ticket.adapter)
        self._waiting[group].remove(ticket)
        if not self._waiting[group]:
            del self._waiting[group]

    def finish(self, ticket: Ticket, *, tokens: int) -> None:
        """The ticket, once admitted, has ended, having cost `tokens`."""
        self._served[ticket.tenant] = self._served.get(ticket.tenant, 0.0) + tokens / ticket.weight
        _count_down(self._running_tenants, ticket.tenant)
        if _count_down(self._running, ticket.adapter) and ticket.adapter is not None:
            del self._since[ticket.adapter]

    def admit(self, now_s: float) -> list[Ticket]:
        """Every ticket that may start now, in order."""
        admitted = []
        while self.in_flight < self._max_in_flight:
            self._drain_for_the_impatient(now_s)
            ticket = self._choose(now_s)
            if ticket is None:
                break
            self.cancel(ticket)
            self._running[ticket.adapter] += 1
            self._running_tenants[ticket.tenant] += 1
            if ticket.adapter is not None:
                self._since.setdefault(ticket.adapter, now_s)
            admitted.append(ticket)
        return admitted

    def _choose(self, now_s: float) -> Ticket | None:
        slot_free = len(self._since) < self._slots
        heads = [group[0] for group in self._waiting.values()]
        if slot_free and (impatient := self._impatient(now_s)):
            return min(impatient, key=lambda ticket: (ticket.arrived_s, ticket.id))
        startable = [
            head
            for head in heads
            if head.adapter is None
            or (head.adapter in self._since and head.adapter not in self._draining)
            or (head.adapter not in self._since and slot_free)
        ]
        return min(startable, key=lambda head: (self._served[head.tenant], head.arrived_s, head.id), default=None)

    def _impatient(self, now_s: float) -> list[Ticket]:
        return [
            group[0]
            for group in self._waiting.values()
            if group[0].adapter is not None
            and group[0].adapter not in self._since
            and now_s - group[0].arrived_s >= self._patience_s
        ]

    def _drain_for_the_impatient(self, now_s: float) -> None:
        """As many adapters drain as distinct adapters have waited too long, those longest in their slots first.

        One that drains may have a long answer to end, so each doubling of the longest wait makes one more drain. Decided
        anew each time: when nobody is impatient any more, nobody drains.
        """
        impatient = self._impatient(now_s)
        wanted = len({ticket.adapter for ticket in impatient}) - (self._slots - len(self._since))
        if wanted > 0:
            longest_s = max(now_s - ticket.arrived_s for ticket in impatient)
            wanted += int(math.log2(longest_s / self._patience_s))
        oldest_first = sorted(self._since, key=lambda name: (self._since[name], name))
        self._draining = set(oldest_first[: max(0, wanted)])

    def _active(self, tenant: str) -> bool:
        return tenant in self._running_tenants or any(group[0] == tenant for group in self._waiting)


def _count_down(counter: Counter[T], key: T) -> bool:
    """True when none is left."""
    counter[key] -= 1
    if counter[key]:
        return False
    del counter[key]
    return True


@dataclass
class Turn:
    """A request's turn. The relay writes down what it cost."""

    queue_s: float
    tokens: int = 1


class Admission:
    """Where requests wait for their turn on one engine."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        max_queue: int,
        longest_wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._max_queue = max_queue
        self._longest_wait_s = longest_wait_s
        self._clock = clock
        self._ids = itertools.count()
        self._calls: dict[int, asyncio.Future[None]] = {}
        self._admitted: set[int] = set()  # of those still in `_wait`
        self._mean_s = 1.0  # moving average of the time a turn takes

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting

    @property
    def in_flight(self) -> int:
        return self._scheduler.in_flight

    def expected_wait_s(self) -> float:
        """How long one who comes now will wait, from the measured time a turn takes."""
        if not self.waiting:
            return 0.0
        return self._mean_s * self.waiting / max(1, self.in_flight)

    @asynccontextmanager
    async def turn(self, tenant: str, adapter: str | None, *, weight: float = 1.0) -> AsyncIterator[Turn]:
        """Wait for a turn and hold it. Raises OverloadedError when the queue is full or the wait too long."""
        if self.waiting >= self._max_queue:
            raise OverloadedError("Too many requests are waiting.", retry_after_s=self.expected_wait_s())
        arrived_s = self._clock()
        ticket = Ticket(next(self._ids), tenant, adapter, arrived_s, weight)
        await self._wait(ticket)
        turn = Turn(queue_s=self._clock() - arrived_s)
        started_s = self._clock()
        try:
            yield turn
        finally:
            self._mean_s += 0.1 * (self._clock() - started_s - self._mean_s)
            self._scheduler.finish(ticket, tokens=turn.tokens)
            self._pump()

    async def _wait(self, ticket: Ticket) -> None:
        self._scheduler.add(ticket)
        called = self._calls[ticket.id] = asyncio.get_running_loop().create_future()
        self._pump()
        try:
            async with asyncio.timeout(self._longest_wait_s):
                await called
        except BaseException as exc:
            if ticket.id in self._admitted:  # in the same instant: hand the turn back
                self._scheduler.finish(ticket, tokens=0)
            else:
                self._scheduler.cancel(ticket)
            self._pump()
            if isinstance(exc, TimeoutError):
                raise OverloadedError(
                    f"No turn came within {self._longest_wait_s:g} s.", retry_after_s=self.expected_wait_s()
                ) from exc
            raise
        finally:
            del self._calls[ticket.id]
            self._admitted.discard(ticket.id)

    def _pump(self) -> None:
        for ticket in self._scheduler.admit(self._clock()):
            self._admitted.add(ticket.id)
            if not self._calls[ticket.id].done():  # done already means: being cancelled
                self._calls[ticket.id].set_result(None)
