"""Who goes next on one engine: LoRA slots, requests in flight, fairness between tenants, and a bound on waiting.

`Scheduler` is the decision: it is told what arrives and what ends, and says who may start. It knows no clock and does no
I/O. `Admission` is the thin asynchronous layer that requests wait at.

Distinct adapters in flight never exceed the LoRA slots, so the engine never has to skip a request whose adapter finds no
slot; an adapter that is swapped in has one of them. Among those who may start, the tenant with the least weighted tokens
served goes first (the virtual token counter of Sheng et al. 2024, "Fairness in Serving Large Language Models"): its prompt
is charged when its turn comes, its output as it is produced.

A request whose adapter finds no slot for longer than `patience_s` makes another adapter take no new requests until its slot is
free, so busy adapters cannot starve a quiet one: of the tenant that holds most slots, the adapter that has held its own
longest. A tenant that would still hold no more than that one need not be patient: whoever spreads a flood over many adapters
pays for it. At most half of the slots drain at once: what drains computes ever smaller batches, and the throughput lost makes
all wait longer.
"""

import asyncio
import itertools
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from gateway.drain_rate import DrainRate
from gateway.errors import DeadlineUnmetError, OverloadedError, TenantQueueFullError

T = TypeVar("T")

STUCK = 4.0  # times the patience: an adapter that has drained for longer has a long answer to end


@dataclass(frozen=True)
class Ticket:
    """One request that wants a turn. `adapter` None is the base model, which takes no LoRA slot."""

    id: int
    tenant: str
    adapter: str | None
    arrived_s: float
    weight: float = 1.0
    tokens: int = 0  # charged when its turn comes


class Scheduler:
    """Pure: the same calls give the same decisions."""

    def __init__(self, *, slots: int, max_in_flight: int, patience_s: float, spare_slots: int = 0) -> None:
        """slots: distinct adapters that may be in flight at once. spare_slots: of these for swaps only; one is always left."""
        self._slots = slots
        self._spare_slots = min(spare_slots, slots - 1)
        self._max_in_flight = max_in_flight
        self._patience_s = patience_s
        self._waiting: dict[tuple[str, str | None], deque[Ticket]] = {}
        self._waiting_tenants: Counter[str] = Counter()
        self._running: Counter[str | None] = Counter()
        self._running_tenants: Counter[str] = Counter()
        self._since: dict[str, float] = {}  # adapter -> when it took its slot
        self._holder: dict[str, str] = {}  # adapter with a slot -> the tenant that asked
        self._draining: dict[str, float] = {}  # adapter -> since when
        self._served: dict[str, float] = {}  # tenant -> weighted tokens

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def waiting_of(self, tenant: str) -> int:
        return self._waiting_tenants[tenant]

    def ahead_of_last(self, tenant: str) -> int:
        """Waiting requests that will have a turn before the tenant's newest one: its own, and as many of each other tenant,
        since they take turns."""
        own = self._waiting_tenants[tenant]
        others = (count for name, count in self._waiting_tenants.items() if name != tenant)
        return own - 1 + sum(min(count, own) for count in others)

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
        self._waiting_tenants[ticket.tenant] += 1

    def cancel(self, ticket: Ticket) -> None:
        """The ticket, still waiting, is given up."""
        group = (ticket.tenant, ticket.adapter)
        self._waiting[group].remove(ticket)
        if not self._waiting[group]:
            del self._waiting[group]
        _count_down(self._waiting_tenants, ticket.tenant)

    def charge(self, ticket: Ticket, tokens: int) -> None:
        """The ticket, once admitted, has cost so many more; fewer than none when it was charged too much before."""
        self._served[ticket.tenant] += tokens / ticket.weight

    def finish(self, ticket: Ticket, *, tokens: int = 0) -> None:
        """The ticket, once admitted, has ended. tokens: what it cost beyond what was charged before."""
        self.charge(ticket, tokens)
        _count_down(self._running_tenants, ticket.tenant)
        if _count_down(self._running, ticket.adapter) and ticket.adapter is not None:
            self._free(ticket.adapter)

    def begin_swap(self, adapter: str, now_s: float) -> None:
        """The adapter is tried before it serves, and waits for nobody: where all slots are taken, the spare ones too, it is one
        too many, which the engine makes wait, until the adapter longest in its slot has drained.
        """
        self._running[adapter] += 1
        self._since.setdefault(adapter, now_s)

    def end_swap(self, adapter: str) -> None:
        if _count_down(self._running, adapter):
            self._free(adapter)

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
            self.charge(ticket, ticket.tokens)
            if ticket.adapter is not None:
                self._since.setdefault(ticket.adapter, now_s)
                self._holder.setdefault(ticket.adapter, ticket.tenant)
            admitted.append(ticket)
        return admitted

    def _choose(self, now_s: float) -> Ticket | None:
        slot_free = self._free_slots() > 0
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
        held = Counter(self._holder.values())
        most = max(held.values(), default=0)
        return [
            group[0]
            for group in self._waiting.values()
            if group[0].adapter is not None
            and group[0].adapter not in self._since
            and (now_s - group[0].arrived_s >= self._patience_s or held[group[0].tenant] + 1 < most)
        ]

    def _drain_for_the_impatient(self, now_s: float) -> None:
        """As many adapters drain as distinct adapters have waited too long, those of the tenant with most slots first, and of
        these those longest in their slots.

        At most half of the slots, but one that has drained for long has a long answer to end and is not counted. Decided anew
        each time: when nobody is impatient any more, nobody drains.
        """
        wanted = len({ticket.adapter for ticket in self._impatient(now_s)}) - self._free_slots()
        stuck = sum(now_s - began_s > STUCK * self._patience_s for began_s in self._draining.values())
        held = Counter(self._holder.values())
        order = sorted(self._since, key=lambda name: (-held[self._holder.get(name, "")], self._since[name], name))
        chosen = order[: max(0, min(wanted, max(1, self._slots // 2))) + (stuck if wanted > 0 else 0)]
        self._draining = {name: self._draining.get(name, now_s) for name in chosen}

    def _free_slots(self) -> int:
        """For requests: what swaps take comes out of the spare slots first."""
        tried = len(self._since) - len(self._holder)
        return self._slots - len(self._since) - max(0, self._spare_slots - tried)

    def _free(self, adapter: str) -> None:
        del self._since[adapter]
        self._holder.pop(adapter, None)  # one that was only tried had none

    def _active(self, tenant: str) -> bool:
        return tenant in self._running_tenants or tenant in self._waiting_tenants


def _count_down(counter: Counter[T], key: T) -> bool:
    """True when none is left."""
    counter[key] -= 1
    if counter[key]:
        return False
    del counter[key]
    return True


class Turn:
    """A request's turn. The relay tells what it has cost."""

    def __init__(self, queue_s: float, charged: int, charge: Callable[[int], None]) -> None:
        self.queue_s = queue_s
        self.output_tokens = 0
        self.first_token_s: float | None = None  # from the engine's call to its first output
        self._charged = charged
        self._charge = charge

    def cost(self, tokens: int) -> None:
        """The request has cost `tokens` by now, prompt and output together."""
        if tokens != self._charged:
            self._charge(tokens - self._charged)
            self._charged = tokens


class Admission:
    """Where requests wait for their turn on one engine."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        max_queue: int,
        tenant_queue: int,
        longest_wait_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """max_queue, tenant_queue: most requests that may wait, in all and of one tenant."""
        self._scheduler = scheduler
        self._max_queue = max_queue
        self._tenant_queue = tenant_queue
        self._longest_wait_s = longest_wait_s
        self._clock = clock
        self._ids = itertools.count()
        self._calls: dict[int, asyncio.Future[None]] = {}
        self._admitted: set[int] = set()  # of those still in `_wait`
        self._drain = DrainRate()
        self._turn_s: float | None = None  # moving averages over whole answers: the time a turn takes,
        self._first_token_s = 0.0  # the engine's time to its first token,
        self._output_tokens = 0.0  # and the length of an answer

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting

    @property
    def in_flight(self) -> int:
        return self._scheduler.in_flight

    def drain_per_s(self) -> float | None:
        """Turns that end a second while somebody waits; None before the first has ended."""
        if self._turn_s is None:
            return None
        expected_per_s = max(1, self.in_flight) / max(self._turn_s, 1e-3)
        return self._drain.per_s(self._clock(), expected_per_s=expected_per_s)

    def expected_wait_s(self, ahead: int | None = None) -> float:
        """How long it will take until so many who wait have had their turn; all of them, when not told."""
        rate = self.drain_per_s()
        return (self.waiting if ahead is None else ahead) / rate if rate else 0.0

    @asynccontextmanager
    async def turn(
        self,
        tenant: str,
        adapter: str | None,
        *,
        weight: float = 1.0,
        prompt_tokens: int = 0,
        in_one_piece: bool = False,
        deadline_s: float | None = None,
    ) -> AsyncIterator[Turn]:
        """Wait for a turn and hold it.

        prompt_tokens: charged when the turn comes. in_one_piece: nobody will see how far the answer is, so the usual length of
        one is charged as well, and what it really was at its end. deadline_s: on the clock, when the first output is due.
        Raises OverloadedError when the queue is full, the turn did not come in time, or will not by all that was measured
        (DeadlineUnmetError where only the deadline is too soon);
        TenantQueueFullError when the tenant's own share of the queue is full.
        """
        arrived_s = self._clock()
        tokens = prompt_tokens + (round(self._output_tokens) if in_one_piece else 0)
        ticket = Ticket(next(self._ids), tenant, adapter, arrived_s, weight, tokens)
        await self._wait(ticket, deadline_s)
        started_s = self._clock()
        turn = Turn(started_s - arrived_s, tokens, lambda more: self._scheduler.charge(ticket, more))
        try:
            yield turn
            self._note_answer(turn, self._clock() - started_s)
        except asyncio.CancelledError:
            self._drain.note_end(self._clock())
            raise
        finally:
            self._scheduler.finish(ticket)
            self._pump()

    @contextmanager
    def swap(self, adapter: str) -> Iterator[None]:
        """A LoRA slot for an adapter that is tried before it serves, without a turn."""
        self._scheduler.begin_swap(adapter, self._clock())
        try:
            yield
        finally:
            self._scheduler.end_swap(adapter)
            self._pump()

    def _note_answer(self, turn: Turn, took_s: float) -> None:
        self._drain.note_end(self._clock())
        if self._turn_s is None:
            self._turn_s, self._output_tokens = took_s, float(turn.output_tokens)
        self._turn_s += 0.1 * (took_s - self._turn_s)
        self._output_tokens += 0.1 * (turn.output_tokens - self._output_tokens)
        if turn.first_token_s is not None:
            self._first_token_s += 0.1 * (turn.first_token_s - self._first_token_s)

    async def _wait(self, ticket: Ticket, deadline_s: float | None) -> None:
        own_s = math.inf if deadline_s is None else deadline_s
        self._scheduler.add(ticket)
        called = self._calls[ticket.id] = asyncio.get_running_loop().create_future()
        self._pump()
        try:
            if not called.done():
                self._refuse_the_hopeless(ticket, own_s)
            given_up_s = min(ticket.arrived_s + self._longest_wait_s, own_s)
            async with asyncio.timeout(max(0.0, given_up_s - self._clock())):
                await called
        except BaseException as exc:
            if ticket.id in self._admitted:  # in the same instant: hand the turn back
                self._scheduler.finish(ticket, tokens=-ticket.tokens)
            else:
                self._scheduler.cancel(ticket)
            self._pump()
            if isinstance(exc, TimeoutError):
                waited_s = self._clock() - ticket.arrived_s
                late = DeadlineUnmetError if own_s <= given_up_s else OverloadedError
                raise late(f"No turn came within {waited_s:.3g} s.", retry_after_s=self.expected_wait_s()) from exc
            raise
        finally:
            del self._calls[ticket.id]
            self._admitted.discard(ticket.id)

    def _refuse_the_hopeless(self, ticket: Ticket, deadline_s: float) -> None:
        """Told at once, a caller can go elsewhere."""
        if self.waiting > self._max_queue:
            raise OverloadedError("Too many requests are waiting.", retry_after_s=self.expected_wait_s())
        own = self._scheduler.waiting_of(ticket.tenant)
        if own > self._tenant_queue:
            raise TenantQueueFullError(self._tenant_queue, retry_after_s=self.expected_wait_s(own))
        wait_s = self.expected_wait_s(self._scheduler.ahead_of_last(ticket.tenant) + 1)
        spare_s = self._longest_wait_s - wait_s
        own_spare_s = deadline_s - ticket.arrived_s - wait_s - self._first_token_s
        late = DeadlineUnmetError if own_spare_s < spare_s else OverloadedError
        spare_s = min(spare_s, own_spare_s)
        if spare_s < 0:
            raise late(f"A turn is expected in {wait_s:.1f} s only, too late for this request.", retry_after_s=-spare_s)

    def _pump(self) -> None:
        now_s = self._clock()
        for ticket in self._scheduler.admit(now_s):
            self._admitted.add(ticket.id)
            if not self._calls[ticket.id].done():  # done already means: being cancelled
                self._calls[ticket.id].set_result(None)
        self._drain.note_waiting(self.waiting > 0, now_s)
