import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission import Admission, Scheduler, Ticket
from gateway.errors import OverloadedError, TenantQueueFullError


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


@given(arrivals=ARRIVALS, slots=st.integers(1, 3), spare=st.integers(0, 2), budget=st.integers(1, 6))
def test_slots_and_budget_hold_and_everybody_is_served(
    arrivals: list[tuple[str, str | None, int]], slots: int, spare: int, budget: int
) -> None:
    turns = Scheduler(slots=slots, max_in_flight=budget, patience_s=1.0, spare_slots=spare)
    running: list[Ticket] = []
    served: set[int] = set()
    now_s = 0.0

    def step() -> None:
        running.extend(turns.admit(now_s))
        assert len(running) <= budget
        assert len({request.adapter for request in running} - {None}) <= max(1, slots - spare)

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
    for number in range(4, 150):
        now_s = number * 0.1
        turns.add(ticket(number, adapter="busy", arrived_s=now_s))
        if running:
            turns.finish(running.pop(0), tokens=1)
        started = turns.admit(now_s)
        running += started
        if any(request.adapter == "quiet" for request in started):
            return
    raise AssertionError("the quiet adapter starved")


def test_half_of_the_slots_go_on_with_full_batches_however_many_adapters_are_impatient() -> None:
    turns = scheduler(slots=4, max_in_flight=99, patience_s=2.0)
    for number, adapter in enumerate("abcd"):
        turns.add(ticket(number, adapter=adapter))
    turns.admit(0.0)
    for number in range(10, 30):
        turns.add(ticket(number, adapter=f"quiet-{number}"))
    for number, adapter in enumerate("abcd", start=40):
        turns.add(ticket(number, adapter=adapter, arrived_s=9.0))
    assert [started.adapter for started in turns.admit(9.0)] == ["c", "d"]


def occupied(*holders: str) -> tuple[Scheduler, list[Ticket]]:
    """A slot taken by an adapter of each tenant named, in this order, and nobody waiting."""
    turns = scheduler(slots=len(holders), max_in_flight=99, patience_s=3.0)
    held = [ticket(number, tenant=tenant, adapter=f"{tenant}-{number}") for number, tenant in enumerate(holders)]
    for number, request in enumerate(held):
        turns.add(request)
        turns.admit(float(number))
    return turns, held


def test_a_tenant_with_fewer_slots_than_another_need_not_be_patient_and_the_others_oldest_adapter_drains() -> None:
    turns, held = occupied("quiet", "loud", "loud", "loud")
    turns.add(ticket(10, tenant="quiet", adapter="second", arrived_s=9.0))
    for number, one in enumerate(held, start=11):
        turns.add(ticket(number, tenant=one.tenant, adapter=one.adapter, arrived_s=9.0))
    assert {started.adapter for started in turns.admit(9.0)} == {"quiet-0", "loud-2", "loud-3"}
    turns.finish(held[1])
    assert turns.admit(9.1)[0].adapter == "second"


def test_a_tenant_that_has_its_part_of_the_slots_is_patient() -> None:
    turns, held = occupied("quiet", "quiet", "loud", "loud")
    turns.add(ticket(10, tenant="quiet", adapter="third", arrived_s=9.0))
    for number, one in enumerate(held, start=11):
        turns.add(ticket(number, tenant=one.tenant, adapter=one.adapter, arrived_s=9.0))
    assert len(turns.admit(9.0)) == 4
    assert not turns.admit(11.9)


def test_an_adapter_that_is_swapped_in_waits_for_nobody_and_one_slot_drains_for_it() -> None:
    turns = scheduler(slots=2)
    busy = [ticket(0, adapter="a"), ticket(1, adapter="b")]
    for request in busy:
        turns.add(request)
    turns.admit(0.0)
    turns.begin_swap("new", 1.0)
    for number, adapter in ((2, "a"), (3, "b")):
        turns.add(ticket(number, adapter=adapter, arrived_s=1.0))
    assert [started.adapter for started in turns.admit(1.0)] == ["b"]
    turns.finish(busy[0])
    assert turns.admit(1.1) == []  # a's slot is the new one's
    turns.end_swap("new")
    assert [started.adapter for started in turns.admit(1.2)] == ["a"]


def test_a_swap_where_a_slot_is_free_drains_nobody() -> None:
    turns = scheduler(slots=2)
    turns.add(ticket(0, adapter="a"))
    turns.admit(0.0)
    turns.begin_swap("new", 1.0)
    turns.add(ticket(1, adapter="a", arrived_s=1.0))
    assert [started.id for started in turns.admit(1.0)] == [1]
    turns.add(ticket(2, adapter="c", arrived_s=1.0))
    assert turns.admit(1.0) == []
    turns.end_swap("new")
    assert [started.adapter for started in turns.admit(1.1)] == ["c"]


def test_a_swap_into_a_spare_slot_drains_nobody() -> None:
    turns = Scheduler(slots=3, max_in_flight=8, patience_s=1.0, spare_slots=1)
    for number, adapter in enumerate(("a", "b", "c")):
        turns.add(ticket(number, adapter=adapter))
    assert [started.adapter for started in turns.admit(0.0)] == ["a", "b"]  # the third slot is for swaps
    turns.begin_swap("new", 0.5)
    for number, adapter in ((3, "a"), (4, "b")):
        turns.add(ticket(number, adapter=adapter, arrived_s=0.5))
    assert [started.adapter for started in turns.admit(0.5)] == ["a", "b"]
    turns.begin_swap("another", 0.6)  # no slot is left for this one
    turns.add(ticket(5, adapter="a", arrived_s=0.6))
    assert turns.admit(0.6) == []


def test_a_long_answer_is_felt_while_it_is_written() -> None:
    turns = scheduler(max_in_flight=2)
    long = ticket(0, tenant="writer")
    turns.add(long)
    turns.add(ticket(1, tenant="reader"))
    turns.admit(0.0)
    turns.add(ticket(2, tenant="writer"))
    turns.add(ticket(3, tenant="reader", arrived_s=1.0))
    turns.charge(long, 300)
    turns.finish(ticket(1, tenant="reader"), tokens=50)
    assert [started.tenant for started in turns.admit(1.0)] == ["reader"]  # 50 tokens against 300, though it came later


def test_a_prompt_is_charged_when_its_turn_comes() -> None:
    turns = scheduler(max_in_flight=1)
    first = ticket(0, tenant="neither")
    turns.add(first)
    turns.admit(0.0)
    for number, tenant, tokens in ((1, "long", 1000), (2, "long", 1000), (3, "short", 10), (4, "short", 10)):
        turns.add(Ticket(number, tenant, "a", number / 10, tokens=tokens))
    order = []
    turns.finish(first)
    for _ in range(4):
        (started,) = turns.admit(1.0)
        order.append(started.tenant)
        turns.finish(started)
    assert order == ["long", "short", "short", "long"]


@given(
    answers=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 200)), min_size=20, max_size=60),
    weight=st.sampled_from([1.0, 2.0, 4.0]),
)
def test_backlogged_tenants_share_by_weight_within_what_is_running(
    answers: list[tuple[int, int]], weight: float
) -> None:
    """Sheng et al., theorem 4.4: the difference is bounded by what may be in flight, however long it goes on."""
    budget, largest = 4, 600
    turns = scheduler(max_in_flight=budget)
    served = {"x": 0.0, "y": 0.0}
    weights = {"x": weight, "y": 1.0}
    running: list[tuple[Ticket, int]] = []
    lengths = dict(enumerate(answers))
    for number, (prompt, _) in lengths.items():
        for tenant in served:
            turns.add(Ticket(2 * number + (tenant == "y"), tenant, "a", 0.0, weights[tenant], prompt))
    while all(turns.waiting_of(tenant) for tenant in served):
        for started in turns.admit(0.0):
            served[started.tenant] += started.tokens / started.weight
            running.append((started, lengths[started.id // 2][1]))
        done, output = running.pop(0)
        for _ in range(output):
            turns.charge(done, 1)
        served[done.tenant] += output / done.weight
        turns.finish(done)
        assert abs(served["x"] - served["y"]) <= 2 * budget * largest


@given(
    queues=st.dictionaries(st.sampled_from("vwxyz"), st.integers(1, 20), min_size=1),
    tenant=st.sampled_from("vwxyz"),
)
def test_no_flood_of_others_puts_more_ahead_than_one_of_each_for_one_of_ones_own(
    queues: dict[str, int], tenant: str
) -> None:
    turns = scheduler()
    number = 0
    for name, count in (queues | {tenant: 3}).items():
        for _ in range(count):
            turns.add(ticket(number, tenant=name))
            number += 1
    others = [count for name, count in queues.items() if name != tenant]
    assert turns.ahead_of_last(tenant) == 2 + sum(min(3, count) for count in others)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def admission(clock: Clock | None = None, **changes: float) -> Admission:
    limits = {"max_queue": 2, "tenant_queue": 2, "longest_wait_s": 30.0} | changes
    return Admission(
        scheduler(max_in_flight=1),
        max_queue=int(limits["max_queue"]),
        tenant_queue=int(limits["tenant_queue"]),
        longest_wait_s=limits["longest_wait_s"],
        clock=clock or time.monotonic,
    )


async def serve(gate: Admission, clock: Clock, *, took_s: float, times: int = 1) -> None:
    for _ in range(times):
        async with gate.turn("acme", "a"):
            clock.now_s += took_s


async def test_a_deadline_that_cannot_be_met_is_refused_at_once_with_the_time_it_lacks() -> None:
    clock = Clock()
    gate = admission(clock, max_queue=10, tenant_queue=10)
    await serve(gate, clock, took_s=2.0)
    async with gate.turn("acme", "a"):
        waiters = [asyncio.create_task(_take(gate)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as refusal:  # three before it and one running, 2 s each
            async with gate.turn("acme", "a", deadline_s=clock.now_s + 5.0):
                pass
        assert refusal.value.retry_after_s == pytest.approx(3.0)
        assert gate.waiting == 3
        waiters.append(asyncio.create_task(_take(gate, deadline_s=clock.now_s + 9.0)))
        await asyncio.sleep(0)
        assert gate.waiting == 4
    await asyncio.gather(*waiters)
    assert gate.in_flight == gate.waiting == 0


async def test_a_flood_does_not_make_anothers_deadline_hopeless() -> None:
    clock = Clock()
    gate = admission(clock, max_queue=50, tenant_queue=50)
    await serve(gate, clock, took_s=1.0)
    async with gate.turn("loud", "a"):
        flood = [asyncio.create_task(_take(gate, tenant="loud")) for _ in range(30)]
        await asyncio.sleep(0)
        quiet = asyncio.create_task(_take(gate, tenant="quiet", deadline_s=clock.now_s + 3.0))
        await asyncio.sleep(0)
        assert not quiet.done()
        with pytest.raises(OverloadedError):
            await _take(gate, tenant="loud", deadline_s=clock.now_s + 3.0)
    await asyncio.gather(quiet, *flood)


async def test_who_leaves_in_the_middle_of_an_answer_makes_the_queue_shorter_too() -> None:
    clock = Clock()
    gate = admission(clock, max_queue=10, tenant_queue=10)
    await serve(gate, clock, took_s=8.0)

    async def stay() -> None:
        async with gate.turn("acme", "a"):
            await asyncio.Event().wait()

    callers = [asyncio.create_task(stay()) for _ in range(6)]
    await asyncio.sleep(0)
    before_s = gate.expected_wait_s(1)
    for caller in callers[:4]:
        clock.now_s += 0.5
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        await asyncio.sleep(0)
    assert gate.expected_wait_s(1) < before_s / 2
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    assert gate.in_flight == gate.waiting == 0


async def test_a_turn_there_is_now_is_taken_whatever_the_estimates_say() -> None:
    clock = Clock()
    gate = admission(clock)
    await serve(gate, clock, took_s=100.0)
    async with gate.turn("acme", "a", deadline_s=clock.now_s + 0.1) as turn:
        assert turn.queue_s == 0.0


async def test_one_whose_deadline_passes_in_the_queue_is_refused_then() -> None:
    gate = admission()
    async with gate.turn("acme", "a"):
        with pytest.raises(OverloadedError):
            async with gate.turn("acme", "a", deadline_s=time.monotonic() + 0.01):
                pass
        assert gate.waiting == 0


async def test_one_tenants_queue_leaves_room_for_anothers() -> None:
    gate = admission(max_queue=4, tenant_queue=2)
    async with gate.turn("loud", "a"):
        waiters = [asyncio.create_task(_take(gate, tenant="loud")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(TenantQueueFullError):
            await _take(gate, tenant="loud")
        waiters.append(asyncio.create_task(_take(gate, tenant="quiet")))
        await asyncio.sleep(0)
        assert gate.waiting == 3
    await asyncio.gather(*waiters)


async def test_an_answer_in_one_piece_is_charged_as_usual_before_and_as_it_was_after() -> None:
    turns = scheduler(max_in_flight=1)
    gate = Admission(turns, max_queue=9, tenant_queue=9, longest_wait_s=9.0)
    async with gate.turn("acme", "a", prompt_tokens=5) as turn:
        turn.output_tokens = 200
        turn.cost(205)
    async with gate.turn("acme", "a", prompt_tokens=5, in_one_piece=True) as turn:
        assert turns._served["acme"] == 205  # counted anew since all were idle
        turn.cost(15)
        assert turns._served["acme"] == 15


async def test_a_full_queue_refuses_with_a_wait() -> None:
    gate = admission(max_queue=1)
    async with gate.turn("acme", "a"):
        waiter = asyncio.create_task(_take(gate))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await _take(gate)
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


async def _take(gate: Admission, *, tenant: str = "acme", deadline_s: float | None = None) -> None:
    async with gate.turn(tenant, "a", deadline_s=deadline_s):
        await asyncio.sleep(0)
