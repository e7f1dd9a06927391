"""Run a schedule: start each request at its instant, whatever became of the others, and keep what happened."""

import asyncio
import gc
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loadtests.client import Client, Clock, run_clock
from loadtests.health import Pulse
from loadtests.loads import Closed
from loadtests.record import Outcome, PhaseWindow, Record
from loadtests.schedule import Planned, Workload, windows

RETRY_PAUSE_S = 0.1  # a closed loop on a dead server would otherwise spin
LEAD_S = 0.05  # the clock starts this long before the first request, so that it is not late already


@dataclass
class Execution:
    """A run while it happens; what the live view looks at, and what is left at the end."""

    windows: Sequence[PhaseWindow]
    clock: Clock = field(default_factory=run_clock)
    records: list[Record] = field(default_factory=list)  # finished ones, in the order they finished
    in_flight: int = 0
    pulse: Pulse = field(default_factory=Pulse)
    interrupted: bool = False


async def execute(
    workload: Workload,
    schedule: Sequence[Sequence[Planned]],
    client: Client,
    *,
    stop: asyncio.Event | None = None,
    started: Callable[[Execution], None] = lambda _: None,
) -> Execution:
    """Runs all phases, then waits at most drain_s for answers. Setting `stop` ends it at once, with what there is."""
    stop = stop or asyncio.Event()
    run = Execution(windows(workload.scenario.phases))
    generator = _Generator(workload, schedule, client, run)
    # Collected and set aside, so that no collection of old objects falls into the measured time.
    gc.collect()
    gc.freeze()
    start_s = run.clock() + LEAD_S
    clock = run.clock
    run.clock = lambda: clock() - start_s
    started(run)
    pulse = asyncio.create_task(run.pulse.beat(run.clock))
    work = asyncio.create_task(generator.run())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        run.interrupted = not work.done()
        if work.done():
            work.result()
        else:
            run.windows = cut_windows(run.windows, run.clock())
    finally:
        for task in (work, pulse, stopped):
            task.cancel()
        await asyncio.gather(work, pulse, stopped, return_exceptions=True)
        gc.unfreeze()
    return run


def cut_windows(planned: Sequence[PhaseWindow], at_s: float) -> list[PhaseWindow]:
    """The phases as far as they came when a run was interrupted; those that never began are left out."""
    return [replace(window, end_s=min(window.end_s, at_s)) for window in planned if window.start_s < at_s]


class _Generator:
    """Starts each request on time; every task belongs to the group in run()."""

    def __init__(
        self, workload: Workload, schedule: Sequence[Sequence[Planned]], client: Client, run: Execution
    ) -> None:
        self._workload = workload
        self._schedule = schedule
        self._client = client
        self._run = run
        self._tasks: set[asyncio.Task[object]] = set()

    async def run(self) -> None:
        """Cancelling this cuts off what still runs; its records say so."""
        scenario = self._workload.scenario
        async with asyncio.TaskGroup() as group:
            for index, phase in enumerate(scenario.phases):
                load = scenario.load_of(phase)
                end_s = self._run.windows[index].end_s
                if isinstance(load, Closed):
                    sequence = self._workload.requests(index)
                    for _ in range(load.concurrency):
                        self._start(group, self._caller(sequence, end_s, load.think_s))
                for planned in self._schedule[index]:
                    intended_s = planned.at_s or 0.0
                    await self._sleep_until(intended_s)
                    self._start(group, self._send(planned, intended_s))
                await self._sleep_until(end_s)
            if self._tasks:
                _, late = await asyncio.wait(self._tasks, timeout=scenario.drain_s)
                for task in late:
                    task.cancel()

    def _start(self, group: asyncio.TaskGroup, job: Coroutine[Any, Any, object]) -> None:
        task = group.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _sleep_until(self, at_s: float) -> None:
        # again and again, as timers may fire a little early
        while (wait_s := at_s - self._run.clock()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(wait_s)

    async def _caller(self, sequence: Iterator[Planned], end_s: float, think_s: float) -> None:
        while (now_s := self._run.clock()) < end_s:
            record = await self._send(next(sequence), now_s)
            await asyncio.sleep(think_s if record.outcome is Outcome.OK else max(think_s, RETRY_PAUSE_S))

    async def _send(self, planned: Planned, intended_s: float) -> Record:
        record = Record(planned.id, planned.phase, planned.tenant, planned.adapter, planned.stream, intended_s)
        self._run.in_flight += 1
        try:
            await self._client.send(planned, record, self._run.clock)
        except asyncio.CancelledError:
            record.outcome = Outcome.CANCELLED if self._run.interrupted else Outcome.CENSORED
            raise
        finally:
            self._run.in_flight -= 1
            self._run.records.append(record)
        return record
