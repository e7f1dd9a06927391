import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission import Admission, Scheduler, Ticket
from gateway.errors import OverloadedError


def ticket(number: int, *, tenant: str = "acme", adapter: str | None = "a", arrived_s: float = 0.0) -> Ticket:
    return Ticket(number, tenant, adapter, arrived_s)


def scheduler(*, slots: int = 1, max_in_flight: int = 8, patience_s: float = 2.0) -> Scheduler:
    return Scheduler(slots=slots, max_in_flight=max_in_flight, patience_s=patience_s)


def test_requests_for_one_adapter_run_together() -> None:
    turns = scheduler()
    for number in range(4):
        turns.add(ticket(number))
    assert len(turns.admit(0.0)) == 4


def test_a_second_adapter_waits_for_the_only_slot_and_the_base_does_not() -> None:
    turns = scheduler()
    for number, adapter in enumerate(["a", "b", None]):
        turns.add(ticket(number, adapter=adapter))
    assert [started.adapter for started in turns.admit(0.0)] == ["a", None]


def test_a_busy_adapter_drains_for_one_that_waited_too_long() -> None:
    turns = scheduler(patience_s=2.0)
    first = ticket(0)
    turns.add(first)
    turns.admit(0.0)
    turns.add(ticket(1, adapter="b", arrived_s=0.0))
    turns.add(ticket(2, arrived_s=1.0))
    assert [started.id for started in turns.admit(1.0)] == [2]  # nobody is impatient yet: a may go on
    turns.add(ticket(3, arrived_s=3.0))
    assert turns.admit(3.0) == []  # b has waited for 3 s: a gets no more
    turns.finish(first, tokens=1)
    turns.finish(ticket(2), tokens=1)
    assert [started.adapter for started in turns.admit(3.1)] == ["b"]


def test_the_tenant_served_less_goes_first() -> None:
    turns = scheduler(max_in_flight=1)
    flood = [ticket(number, tenant="loud") for number in range(5)]
    for request in flood:
        turns.add(request)
    turns.admit(0.0)
    turns.add(ticket(9, tenant="quiet"))
    turns.finish(flood[0], tokens=500)
    assert [started.tenant for started in turns.admit(0.0)] == ["quiet"]


def test_idling_earns_no_credit() -> None:
    turns = scheduler(max_in_flight=1)
    worker = [ticket(number, tenant="busy") for number in range(3)]
    turns.add(worker[0])
    turns.admit(0.0)
    turns.add(worker[1])
    turns.finish(worker[0], tokens=1000)
    turns.admit(0.0)
    for number in range(10, 13):
        turns.add(ticket(number, tenant="newcomer"))
    turns.add(worker[2])
    turns.finish(worker[1], tokens=10)
    (started,) = turns.admit(0.0)
    assert started.tenant == "newcomer"
    turns.finish(started, tokens=20)
    assert turns.admit(0.0)[0].tenant == "busy"  # the newcomer started level, it was not owed a thousand tokens


def test_what_was_served_before_all_were_idle_is_not_held_against_anybody() -> None:
    turns = scheduler(max_in_flight=1)
    past = ticket(0, tenant="old")
    turns.add(past)
    turns.admit(0.0)
    turns.finish(past, tokens=1_000_000)
    flood = [ticket(number, tenant="new", arrived_s=1.0) for number in range(1, 4)]
    for request in flood:
        turns.add(request)
    turns.admit(1.0)
    turns.add(ticket(9, tenant="old", arrived_s=2.0))
    turns.finish(flood[0], tokens=100)
    assert [started.tenant for started in turns.admit(2.0)] == ["old"]


ARRIVALS = st.lists(
    st.tuples(st.sampled_from(["x", "y", "z"]), st.sampled_from(["a", "b", "c", "d", None]), st.integers(0, 3)),
    max_size=60,
)


@given(arrivals=ARRIVALS, slots=st.integers(1, 3), budget=st.integers(1, 6))
def test_slots_and_budget_hold_and_everybody_is_served(
    arrivals: list[tuple[str, str | None, int]], slots: int, budget: int
) -> None:
    turns = Scheduler(slots=slots, max_in_flight=budget, patience_s=1.0)
    running: list[Ticket] = []
    served: set[int] = set()
    now_s = 0.0

    def step() -> None:
        running.extend(turns.admit(now_s))
        assert len(running) <= budget
        assert len({request.adapter for request in running} - {None}) <= slots

    for number, (tenant, adapter, ends) in enumerate(arrivals):
        now_s += 0.3
        turns.add(Ticket(number, tenant, adapter, now_s))
        step()
        for _ in range(min(ends, len(running))):
            done = running.pop(0)
            turns.finish(done, tokens=10)
            served.add(done.id)
        step()
    while running:
        now_s += 0.3
        done = running.pop(0)
        turns.finish(done, tokens=10)
        served.add(done.id)
        step()
    assert served == set(range(len(arrivals)))
    assert turns.waiting == turns.in_flight == 0


@given(patience=st.floats(0.5, 5.0))
def test_a_quiet_adapter_is_served_under_endless_traffic_for_another(patience: float) -> None:
    turns = scheduler(patience_s=patience)
    running: list[Ticket] = []
    turns.add(ticket(0))
    running += turns.admit(0.0)
    turns.add(ticket(1, adapter="quiet"))
    for number in range(2, 200):
        now_s = number * 0.1
        turns.add(ticket(number, arrived_s=now_s))
        turns.finish(running.pop(0), tokens=1)
        started = turns.admit(now_s)
        running += started
        if any(request.adapter == "quiet" for request in started):
            assert now_s <= patience + 0.5
            return
    raise AssertionError("the quiet adapter starved")


def test_nobody_drains_for_one_who_left() -> None:
    turns = scheduler(patience_s=2.0)
    turns.add(ticket(0))
    turns.admit(0.0)
    impatient = ticket(1, adapter="b")
    turns.add(impatient)
    turns.add(ticket(2, arrived_s=3.0))
    assert turns.admit(3.0) == []
    turns.cancel(impatient)
    assert [started.id for started in turns.admit(3.1)] == [2]


def test_a_long_answer_on_the_oldest_adapter_does_not_keep_a_quiet_one_waiting() -> None:
    turns = scheduler(slots=2, patience_s=2.0)
    turns.add(ticket(0, adapter="long"))  # in its slot for longest, and never ends
    turns.admit(0.0)
    for number in (1, 2):  # always more than one, so that its slot is never free by chance
        turns.add(ticket(number, adapter="busy"))
    running = turns.admit(0.1)
    turns.add(ticket(3, adapter="quiet"))
    for number in range(4, 100):
        now_s = number * 0.1
        turns.add(ticket(number, adapter="busy", arrived_s=now_s))
        if running:
            turns.finish(running.pop(0), tokens=1)
        started = turns.admit(now_s)
        running += started
        if any(request.adapter == "quiet" for request in started):
            return
    raise AssertionError("the quiet adapter starved")


def admission(**changes: float) -> Admission:
    limits = {"max_queue": 2, "longest_wait_s": 30.0} | changes
    return Admission(
        scheduler(max_in_flight=1), max_queue=int(limits["max_queue"]), longest_wait_s=limits["longest_wait_s"]
    )


async def test_a_full_queue_refuses_with_a_wait() -> None:
    gate = admission(max_queue=1)
    async with gate.turn("acme", "a"):
        waiter = asyncio.create_task(_take(gate))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as refusal:
            await _take(gate)
        assert refusal.value.retry_after_s > 0
    await waiter
    assert gate.in_flight == gate.waiting == 0


async def test_a_wait_too_long_is_refused_and_leaves_nothing_behind() -> None:
    gate = admission(longest_wait_s=0.01)
    async with gate.turn("acme", "a"):
        with pytest.raises(OverloadedError):
            await _take(gate)
    assert gate.in_flight == gate.waiting == 0


async def test_leaving_the_queue_gives_the_place_to_the_next() -> None:
    gate = admission()
    async with gate.turn("acme", "a"):
        leaver, stayer = asyncio.create_task(_take(gate)), asyncio.create_task(_take(gate))
        await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        assert gate.waiting == 1
    await stayer
    assert gate.in_flight == gate.waiting == 0


async def test_a_turn_given_to_one_who_is_leaving_is_handed_on() -> None:
    gate = admission()
    async with gate.turn("acme", "a"):
        leaver, stayer = asyncio.create_task(_take(gate)), asyncio.create_task(_take(gate))
        await asyncio.sleep(0)
        leaver.cancel()  # not yet run: the turn below is given to it in the same instant
    await stayer
    await asyncio.gather(leaver, return_exceptions=True)
    assert gate.in_flight == gate.waiting == 0


async def _take(gate: Admission) -> None:
    async with gate.turn("acme", "a"):
        await asyncio.sleep(0)
