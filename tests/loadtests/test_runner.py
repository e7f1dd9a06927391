import asyncio
import time
from typing import Any

import numpy as np
import pytest

from loadtests.client import open_client
from loadtests.health import assess
from loadtests.inputs import load_inputs
from loadtests.record import Health, Outcome, PhaseWindow
from loadtests.runner import Execution, cut_windows, execute
from loadtests.schedule import Workload, plan_schedule
from loadtests.stats import nearest_rank
from tests.loadtests.factories import make_scenario
from tests.loadtests.server import DONE, GOOD, ROLE, FakeServer, token


async def run(server: FakeServer, *, stop: asyncio.Event | None = None, **fields: Any) -> tuple[Execution, Health]:
    scenario = make_scenario(**fields)
    workload = Workload(scenario, {"default": ["support"]}, load_inputs(scenario))
    schedule = plan_schedule(workload)
    async with open_client(server.url, {}, timeout_s=30) as client:
        execution = await execute(workload, schedule, client, stop=stop)
    health = assess(
        execution.records,
        execution.pulses,
        execution.windows,
        scheduled=len(schedule[-1]) or None,
        limits=scenario.health,
        tightest_s=None,
    )
    return execution, health


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
    changes = sorted(
        [(record.sent_s, 1) for record in execution.records] + [(record.end_s, -1) for record in execution.records]
    )
    assert max(np.cumsum([change for _, change in changes])) == 3
    assert len(execution.records) > 6


def test_an_interrupted_run_keeps_only_the_phases_it_came_to() -> None:
    planned = [PhaseWindow("a", False, 0, 5), PhaseWindow("b", True, 5, 10), PhaseWindow("c", True, 10, 15)]
    assert cut_windows(planned, 7.0) == [PhaseWindow("a", False, 0, 5), PhaseWindow("b", True, 5, 7.0)]
