import asyncio
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.client import open_client
from loadtests.health import assess
from loadtests.inputs import load_inputs
from loadtests.record import Health, Outcome, PhaseWindow
from loadtests.runner import RETRY_PAUSE_S, Beside, Execution, Shard, cut_windows, execute
from loadtests.schedule import Workload, plan_schedule
from loadtests.stats import nearest_rank
from tests.loadtests.factories import make_scenario
from tests.loadtests.server import DONE, GOOD, ROLE, FakeServer, token

pytestmark = pytest.mark.slow  # whole runs


async def run(
    server: FakeServer,
    *,
    stop: asyncio.Event | None = None,
    jobs: Sequence[Beside] = (),
    watchers: Sequence[Beside] = (),
    **fields: Any,
) -> tuple[Execution, Health]:
    scenario = make_scenario(**fields)
    workload = Workload(scenario, {"default": ["support"]}, load_inputs(scenario))
    schedule = plan_schedule(workload)
    async with open_client(server.url, {}, timeout_s=30) as client:
        execution = await execute(workload, schedule, client, stop=stop, jobs=jobs, watchers=watchers)
    health = assess(
        execution.records,
        execution.pulses,
        execution.windows,
        scheduled=len(schedule[-1]) or None,
        limits=scenario.health,
        tightest_s=None,
    )
    return execution, health


def max_open(execution: Execution) -> int:
    starts = [(record.sent_s or 0.0, 1) for record in execution.records]
    ends = [(record.end_s or 0.0, -1) for record in execution.records]
    return int(max(np.cumsum([change for _, change in sorted(starts + ends)])))


def p75_ttft(execution: Execution) -> float:
    return nearest_rank(np.sort([record.ttft_s or 0.0 for record in execution.records]), 75)


@pytest.mark.slow
async def test_a_stall_of_the_server_shows_in_an_open_loop_and_hides_in_a_closed_one(server: FakeServer) -> None:
    server.frozen_s = (0.3, 1.0)
    phases = [{"name": "steady", "duration_s": 2}]
    opened, _ = await run(server, phases=phases)
    server.requests.clear()
    closed, _ = await run(server, phases=phases, load={"kind": "closed", "concurrency": 1})
    assert all(record.outcome is Outcome.OK for record in opened.records + closed.records)
    assert len(opened.records) == 80
    assert p75_ttft(opened) > 0.3  # half of all requests met the stall
    assert p75_ttft(closed) < p75_ttft(opened) / 2  # one request met it, and 30 others did not


async def test_a_stall_of_the_generator_counts_from_the_intended_start_and_makes_it_unhealthy(
    server: FakeServer,
) -> None:
    loop = asyncio.get_running_loop()
    loop.call_later(0.5, time.sleep, 0.5)
    limits = {"send_lag_p99_ms": 50, "loop_lag_p99_ms": 9e5, "cpu_share": 9, "offered_share": 0.01}
    execution, health = await run(server, health=limits)
    late = max(execution.records, key=lambda record: record.lag_s or 0)
    assert late.lag_s is not None
    assert late.lag_s > 0.2
    assert late.ttft_s is not None
    assert late.ttft_sent_s is not None
    assert late.ttft_s - late.ttft_sent_s > 0.2
    assert health.send_lag_p99_s > 0.2
    assert any("send lag" in fault for fault in health.faults)


async def test_the_clock_starts_when_the_generator_is_ready(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtests.runner.gc.collect", lambda: time.sleep(1.0))  # as in a process that holds much
    execution, _ = await run(server, phases=[{"name": "steady", "duration_s": 0.5}])
    assert min(record.lag_s or 0.0 for record in execution.records) < 0.4


async def test_warm_up_is_kept_apart_and_answers_after_the_end_are_waited_for(server: FakeServer) -> None:
    server.script = lambda _: [ROLE, 0.6, token("a", "stop"), DONE]
    phases = [{"name": "warm-up", "duration_s": 0.3, "measured": False}, {"name": "steady", "duration_s": 0.3}]
    execution, health = await run(server, phases=phases)
    assert {record.phase for record in execution.records} == {"warm-up", "steady"}
    assert all(record.outcome is Outcome.OK for record in execution.records)
    assert (health.offered, health.scheduled) == (12, 12)


async def test_what_is_not_answered_when_the_run_ends_is_censored(server: FakeServer) -> None:
    server.script = lambda _: [ROLE, 30.0]
    execution, _ = await run(server, drain_s=0.1, phases=[{"name": "steady", "duration_s": 0.3}])
    assert {record.outcome for record in execution.records} == {Outcome.CENSORED}
    assert len(execution.records) == 12
    assert execution.in_flight == 0


async def test_stopping_leaves_what_there_is(server: FakeServer) -> None:
    stop = asyncio.Event()

    def answer_ten(_: object) -> list[bytes | float]:
        if len(server.requests) == 20:
            asyncio.get_running_loop().call_later(0.5, stop.set)
        return GOOD if len(server.requests) <= 10 else [ROLE, 60.0]

    server.script = answer_ten
    execution, _ = await run(server, stop=stop, phases=[{"name": "steady", "duration_s": 30}])
    assert execution.interrupted
    assert 0.4 < execution.windows[0].end_s < 25  # rates are over the time that was really measured
    assert {record.outcome for record in execution.records} == {Outcome.OK, Outcome.CANCELLED}


async def test_a_closed_loop_never_has_more_requests_open_than_callers(server: FakeServer) -> None:
    execution, _ = await run(server, load={"kind": "closed", "concurrency": 3})
    assert max_open(execution) == 3
    assert len(execution.records) > 6


async def test_a_caller_that_would_have_left_asks_again_at_once(server: FakeServer) -> None:
    execution, _ = await run(
        server, load={"kind": "closed", "concurrency": 1}, requests={"cancel": {"share": 1, "after_s": 9}}
    )
    assert {record.outcome for record in execution.records} == {Outcome.CANCELLED}
    pauses_s = [after.intended_s - (before.end_s or 0.0) for before, after in pairwise(execution.records)]
    assert min(pauses_s) < RETRY_PAUSE_S


TURNS = {"prompts": {"kind": "builtin"}, "turns": {"count": 3, "think_s": 0.05}}


@pytest.mark.slow
async def test_each_turn_of_a_conversation_carries_what_was_said_and_starts_when_the_user_has_thought(
    server: FakeServer,
) -> None:
    execution, health = await run(
        server, requests=TURNS, load={"kind": "constant", "rate_per_s": 4}, phases=[{"name": "steady", "duration_s": 2}]
    )
    turns = {record.id: record for record in execution.records}
    assert turns.keys() >= {"steady-0", "steady-0.t2", "steady-0.t3"}
    assert [turns[f"steady-0{suffix}"].turn for suffix in ("", ".t2", ".t3")] == [1, 2, 3]
    assert {record.outcome for record in execution.records} == {Outcome.OK}
    for before, after in (("steady-0", "steady-0.t2"), ("steady-0.t2", "steady-0.t3")):
        end_s = turns[before].end_s
        assert end_s is not None
        assert turns[after].intended_s == pytest.approx(end_s + 0.05)
        assert (turns[after].lag_s or 0.0) >= 0
    longest = max((body["messages"] for body, _ in server.requests), key=len)
    assert [message["role"] for message in longest] == ["user", "assistant", "user", "assistant", "user"]
    assert longest[1]["content"] == "abc"
    assert health.offered == health.scheduled == 8


@pytest.mark.slow
async def test_a_turn_that_fails_ends_its_conversation(server: FakeServer) -> None:
    server.script = lambda body: GOOD if len(body["messages"]) == 1 else [token("a"), DONE]
    execution, _ = await run(
        server, requests=TURNS, load={"kind": "constant", "rate_per_s": 2}, phases=[{"name": "steady", "duration_s": 3}]
    )
    assert {record.turn for record in execution.records} == {1, 2}
    assert {record.outcome for record in execution.records if record.turn == 2} == {Outcome.FAILED}


async def test_no_turn_begins_after_its_phase(server: FakeServer) -> None:
    thoughtful = TURNS | {"turns": {"count": 2, "think_s": 0.5}}
    execution, _ = await run(server, requests=thoughtful, phases=[{"name": "steady", "duration_s": 0.2}])
    assert {record.turn for record in execution.records} == {1}


async def test_clients_that_leave_or_read_slowly_are_told_apart(server: FakeServer) -> None:
    server.script = lambda _: [ROLE, token("a"), 0.5, token("b", "stop"), DONE]
    leaving = {"cancel": {"share": 0.5, "after_s": 0.2}, "slow_readers": {"share": 0.5, "pause_s": 0.1}}
    execution, health = await run(server, requests=leaving)
    outcomes = [record.outcome for record in execution.records]
    assert set(outcomes) == {Outcome.OK, Outcome.CANCELLED}
    assert 5 < outcomes.count(Outcome.CANCELLED) < 35
    assert {record.slow for record in execution.records} == {True, False}
    assert health.offered == 40


async def test_a_run_lasts_until_its_jobs_are_done_and_its_watchers_end_with_it(server: FakeServer) -> None:
    ended: list[str] = []

    async def job(run: Execution) -> None:
        await asyncio.sleep(0.8 - run.clock())
        ended.append("job")

    async def watcher(_: Execution) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("watcher")

    await run(server, jobs=[job], watchers=[watcher], phases=[{"name": "steady", "duration_s": 0.2}])
    assert ended == ["job", "watcher"]


async def test_the_callers_of_a_closed_loop_are_shared_out_and_so_are_their_questions(server: FakeServer) -> None:
    scenario = make_scenario(load={"kind": "closed", "concurrency": 3}, phases=[{"name": "steady", "duration_s": 0.5}])
    workload = Workload(scenario, {"default": ["support"]}, load_inputs(scenario))
    async with open_client(server.url, {}, timeout_s=30) as client:
        shards = [await execute(workload, [[]], client, shard=Shard(number, 2)) for number in range(2)]
    assert [max_open(shard) for shard in shards] == [2, 1]
    numbers = [[int(record.id.split("-")[1]) for record in shard.records] for shard in shards]
    assert [{number % 2 for number in some} for some in numbers] == [{0}, {1}]


@given(callers=st.integers(0, 50), shards=st.integers(1, 12))
def test_no_caller_is_lost_or_doubled_between_shards(callers: int, shards: int) -> None:
    shares = [Shard(number, shards).share_of(callers) for number in range(shards)]
    assert sum(shares) == callers
    assert max(shares) - min(shares) <= 1


def test_an_interrupted_run_keeps_only_the_phases_it_came_to() -> None:
    planned = [PhaseWindow("a", False, 0, 5), PhaseWindow("b", True, 5, 10), PhaseWindow("c", True, 10, 15)]
    assert cut_windows(planned, 7.0) == [PhaseWindow("a", False, 0, 5), PhaseWindow("b", True, 5, 7.0)]
