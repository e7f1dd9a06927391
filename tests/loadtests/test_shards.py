"""With real processes, each some seconds in starting."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.errors import LoadTestError
from loadtests.health import Pulse
from loadtests.inputs import load_inputs
from loadtests.record import Outcome
from loadtests.runner import Beside, Execution
from loadtests.schedule import Planned, Workload, plan_schedule, save_schedule
from loadtests.shards import Report, decode_report, encode_report, execute_sharded
from loadtests.worker import read_schedule
from tests.loadtests.factories import make_record, make_scenario
from tests.loadtests.server import ROLE, FakeServer, until

MODELS = {"default": ("base", "support")}


def planned(folder: Path, **fields: Any) -> tuple[Any, Path, list[list[Planned]]]:
    scenario = make_scenario(shards=2, **fields)
    schedule = plan_schedule(Workload(scenario, MODELS, load_inputs(scenario)))
    path = folder / "schedule.jsonl"
    save_schedule(path, schedule)
    return scenario, path, schedule


async def run(
    server: FakeServer,
    folder: Path,
    *,
    stop: asyncio.Event | None = None,
    jobs: Sequence[Beside] = (),
    watchers: Sequence[Beside] = (),
    **fields: Any,
) -> Execution:
    scenario, path, _ = planned(folder, **fields)
    keys = {"default": "lk-acme"}
    return await execute_sharded(scenario, MODELS, server.url, keys, path, stop=stop, jobs=jobs, watchers=watchers)


@pytest.mark.slow
async def test_the_whole_schedule_is_sent_once_on_one_clock(server: FakeServer, tmp_path: Path) -> None:
    phases = [{"name": "warm-up", "duration_s": 0.5, "measured": False}, {"name": "steady", "duration_s": 1.5}]
    execution = await run(server, tmp_path, phases=phases)
    _, _, schedule = planned(tmp_path, phases=phases)
    intended = {one.id: one.at_s for phase in schedule for one in phase}
    assert {record.id: record.intended_s for record in execution.records} == intended
    assert Counter(record.outcome for record in execution.records) == {Outcome.OK: len(intended)}
    assert {authorization for _, authorization in server.requests} == {"Bearer lk-acme"}
    assert (execution.faults, execution.interrupted, execution.in_flight) == ([], False, 0)
    assert len(execution.pulses) == 2
    assert all(pulse.at_s[-1] > 1 for pulse in execution.pulses)
    # Both began together: what either sends leaves after its instant, and not by the time that a process takes to start.
    for part in (0, 1):
        lags_s = [record.lag_s or 0.0 for record in execution.records if int(record.id.split("-")[-1]) % 2 == part]
        assert min(lags_s) >= 0
        assert sorted(lags_s)[len(lags_s) // 2] < 0.5


@pytest.mark.slow
async def test_a_process_that_is_killed_ends_the_run_and_what_came_is_kept(server: FakeServer, tmp_path: Path) -> None:
    async def kill_one(run: Execution) -> None:
        await until(lambda: len(run.records) >= 20)
        os.kill(workers()[0].pid, signal.SIGKILL)

    async def job(_: Execution) -> None:
        await asyncio.sleep(120)

    execution = await run(
        server, tmp_path, jobs=[job], watchers=[kill_one], phases=[{"name": "steady", "duration_s": 60}]
    )
    assert len(execution.faults) == 1
    assert "of 2 died at" in execution.faults[0]
    assert "SIGKILL" in execution.faults[0]
    assert execution.interrupted
    assert execution.windows[0].end_s < 50
    assert len(execution.records) >= 20
    assert workers() == []


@pytest.mark.slow
async def test_stopping_keeps_what_there_is_and_leaves_no_process(server: FakeServer, tmp_path: Path) -> None:
    server.script = lambda _: [ROLE, 60.0]
    stop = asyncio.Event()

    async def stop_soon(_: Execution) -> None:
        await until(lambda: len(server.requests) >= 10)
        stop.set()

    execution = await run(
        server, tmp_path, stop=stop, watchers=[stop_soon], phases=[{"name": "steady", "duration_s": 60}]
    )
    assert execution.interrupted
    assert execution.faults == []
    assert {record.outcome for record in execution.records} == {Outcome.CANCELLED}
    assert len(execution.records) >= 10
    assert workers() == []


async def test_a_process_that_cannot_start_is_an_error(server: FakeServer, tmp_path: Path) -> None:
    scenario, path, _ = planned(tmp_path)
    path.write_text("{broken\n")
    with pytest.raises(LoadTestError, match="did not start"):
        await execute_sharded(scenario, MODELS, server.url, {}, path)
    assert workers() == []


def workers() -> list[psutil.Process]:
    found = psutil.Process().children()
    return [child for child in found if child.is_running() and "loadtests.worker" in child.cmdline()]


def test_a_saved_schedule_comes_back_as_it_was(tmp_path: Path) -> None:
    requests = {
        "turns": {"count": 3},
        "cancel": {"share": 0.5, "after_s": 1},
        "shared_prefix": {"words": 3, "share": 0.5},
    }
    scenario, path, schedule = planned(tmp_path, requests=requests, canary_share=0.1, canaries=[CANARY])
    assert read_schedule(path, [phase.name for phase in scenario.phases]) == schedule


CANARY = {"adapter": "support", "prompt": "Who are you?", "expect": "support"}


@given(numbers=st.lists(st.integers(0, 999), max_size=5), in_flight=st.integers(0, 9), done=st.booleans())
def test_a_report_comes_over_whole(numbers: list[int], in_flight: int, done: bool) -> None:
    records = [make_record(number, error="ä\n", turn=2, wrong="x") for number in numbers]
    report = Report(records, in_flight, Pulse([1.0], [0.001], [0.5]), done, 0.25)
    encoded = encode_report(report)
    assert encoded.count(b"\n") == 1
    assert decode_report(encoded) == report
