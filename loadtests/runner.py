"""Run a schedule: start each request at its instant, whatever became of the others, and keep what happened."""

import asyncio
import gc
import itertools
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from loadtests.alarm import Alarm, Clock
from loadtests.client import Asking, Client, Message, run_clock
from loadtests.health import Pulse, cpu_wait_s
from loadtests.loads import Closed
from loadtests.priority import real_time
from loadtests.record import Mark, Outcome, PhaseWindow, Record, Sample
from loadtests.schedule import Planned, Workload, windows

RETRY_PAUSE_S = 0.1  # a closed loop on a dead server would otherwise spin
AHEAD = 64  # requests made ready together
DRAIN_STEP_S = 0.02  # how often is looked whether the last answers came
LEAD_S = 0.05  # the clock starts this long before the first request, so that it is not late already


@dataclass(frozen=True)
class Shard:
    """Which part of the load this process sends: every `of`-th request from `number` on."""

    number: int = 0
    of: int = 1

    def share_of(self, callers: int) -> int:
        return len(range(self.number, callers, self.of))


@dataclass
class Execution:
    """A run while it happens; what the live view looks at, and what is left at the end."""

    windows: Sequence[PhaseWindow]
    clock: Clock = field(default_factory=run_clock)
    records: list[Record] = field(default_factory=list)  # finished ones, in the order they finished
    in_flight: int = 0
    pulses: list[Pulse] = field(default_factory=list)  # of each process that sends
    marks: list[Mark] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # what ended the run early, but for an interruption
    waited_for_cpu_s: float = 0.0
    interrupted: bool = False


Beside = Callable[[Execution], Coroutine[Any, Any, None]]


async def execute(
    workload: Workload,
    schedule: Sequence[Sequence[Planned]],
    client: Client,
    *,
    shard: Shard = Shard(),
    start_ns: int | None = None,
    stop: asyncio.Event | None = None,
    jobs: Sequence[Beside] = (),
    watchers: Sequence[Beside] = (),
) -> Execution:
    """Runs all phases, then waits at most drain_s for answers.

    schedule: what this shard sends of each phase. start_ns: when the run begins on the monotonic clock, by default now.
    stop, jobs and watchers: see `conduct`.
    """
    pulse, waited_s = Pulse(), cpu_wait_s()
    with _quiet_memory(), real_time():  # takes up to a second in a large process, so the clock starts after it
        start_ns = time.monotonic_ns() + round(LEAD_S * 1e9) if start_ns is None else start_ns
        run = Execution(windows(workload.scenario.phases), run_clock(start_ns), pulses=[pulse])
        load = _Generator(workload, schedule, client, run, shard).run()
        await conduct(run, load, stop=stop, jobs=jobs, watchers=[lambda run: pulse.beat(run.clock), *watchers])
    run.waited_for_cpu_s = cpu_wait_s() - waited_s
    return run


async def conduct(
    run: Execution,
    load: Coroutine[Any, Any, None],
    *,
    stop: asyncio.Event | None = None,
    jobs: Sequence[Beside] = (),
    watchers: Sequence[Beside] = (),
) -> None:
    """Until the load and the jobs are done; watchers end with them. Setting `stop` ends it at once, with what there is."""

    async def all_work() -> None:
        async with asyncio.TaskGroup() as group:
            for job in (load, *(job(run) for job in jobs)):
                group.create_task(job)

    stop = stop or asyncio.Event()
    work = asyncio.create_task(all_work())
    stopped = asyncio.create_task(stop.wait())
    beside = [asyncio.create_task(watcher(run)) for watcher in watchers]
    try:
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        run.interrupted = not work.done() or bool(run.faults)
        if run.interrupted:
            run.windows = cut_windows(run.windows, run.clock())
    finally:
        for task in (work, stopped, *beside):
            task.cancel()
        await asyncio.gather(work, stopped, *beside, return_exceptions=True)


def cut_windows(planned: Sequence[PhaseWindow], at_s: float) -> list[PhaseWindow]:
    """The phases as far as they came when a run was interrupted; those that never began are left out."""
    return [replace(window, end_s=min(window.end_s, at_s)) for window in planned if window.start_s < at_s]


@contextmanager
def _quiet_memory() -> Iterator[None]:
    """No collection of what is old falls into the measured time; young garbage is collected as ever, but less often."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 1_000_000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _record(planned: Planned, intended_s: float, *, turn: int = 0) -> Record:
    return Record(
        id=planned.id if turn < 2 else f"{planned.id}.t{turn}",
        phase=planned.phase,
        tenant=planned.tenant,
        adapter=planned.adapter,
        stream=planned.stream,
        intended_s=intended_s,
        visit=planned.visit,
        turn=turn,
    )


class _Generator:
    """Starts each request on time; every task belongs to the group in run(), and no request outlives it."""

    def __init__(
        self,
        workload: Workload,
        schedule: Sequence[Sequence[Planned]],
        client: Client,
        run: Execution,
        shard: Shard,
    ) -> None:
        self._workload = workload
        self._schedule = schedule
        self._client = client
        self._run = run
        self._shard = shard
        self._alarm = Alarm(run.clock)
        self._asking: set[Asking] = set()  # requests that no task waits for
        self._tasks: set[asyncio.Task[object]] = set()  # callers, and conversations

    async def run(self) -> None:
        """Cancelling this cuts off what still runs; its records say so."""
        scenario = self._workload.scenario
        with self._alarm:
            try:
                async with asyncio.TaskGroup() as group:
                    for index, phase in enumerate(scenario.phases):
                        load = scenario.load_of(phase)
                        end_s = self._run.windows[index].end_s
                        if isinstance(load, Closed):
                            sequence = itertools.islice(
                                self._workload.requests(index), self._shard.number, None, self._shard.of
                            )
                            for _ in range(self._shard.share_of(load.concurrency)):
                                self._add(group, self._caller(sequence, end_s, load.think_s))
                        self._send_in_turn(group, iter(self._schedule[index]), end_s)
                        await self._alarm.sleep_until(end_s)
                    await self._drain(scenario.drain_s)
            finally:
                for asking in list(self._asking):
                    asking.catch_up()
                for asking in self._asking:
                    asking.abandon()
                    self._cut_off(asking.record)
                    self._keep(asking.record)

    def _send_in_turn(self, group: asyncio.TaskGroup, schedule: Iterator[Planned], end_s: float) -> None:
        """A request of a single turn is no task, and its bytes lie ready: at its instant it only has to be sent."""
        ready: deque[tuple[float, Callable[[], None]]] = deque()

        def prepare(planned: Planned) -> Callable[[], None]:
            intended_s = planned.at_s or 0.0
            if planned.follow_ups:
                return lambda: self._add(group, self._converse(planned, intended_s, end_s))
            record = _record(planned, intended_s)
            return partial(self._begin, self._client.prepare(planned, record, self._run.clock, done=self._answered))

        def send_what_is_due() -> None:
            now_s = self._run.clock()
            while ready and ready[0][0] <= now_s:
                ready.popleft()[1]()
            if not ready:
                ready.extend((planned.at_s or 0.0, prepare(planned)) for planned in itertools.islice(schedule, AHEAD))
            if ready:
                self._alarm.call_at(ready[0][0], send_what_is_due)

        send_what_is_due()

    def _begin(self, asking: Asking) -> None:
        self._run.in_flight += 1
        self._asking.add(asking)
        asking.begin()

    def _answered(self, asking: Asking) -> None:
        self._asking.discard(asking)
        self._keep(asking.record)

    async def _drain(self, wait_s: float) -> None:
        """Wait for answers; what has none by then is cut off."""
        until_s = self._run.clock() + wait_s
        while (self._asking or self._tasks) and self._run.clock() < until_s:
            await self._alarm.sleep_until(min(self._run.clock() + DRAIN_STEP_S, until_s))
        for task in self._tasks:
            task.cancel()

    def _add(self, group: asyncio.TaskGroup, job: Coroutine[Any, Any, object]) -> None:
        task = group.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _caller(self, sequence: Iterator[Planned], end_s: float, think_s: float) -> None:
        while (now_s := self._run.clock()) < end_s:
            record = await self._converse(next(sequence), now_s, end_s)
            served = record.outcome in (Outcome.OK, Outcome.CANCELLED)
            await asyncio.sleep(think_s if served else max(think_s, RETRY_PAUSE_S))

    async def _converse(self, planned: Planned, intended_s: float, end_s: float) -> Record:
        """The request and what follows it; the last record. No turn begins after end_s, nor after one that failed."""
        if not planned.follow_ups:
            record = _record(planned, intended_s)
            await self._send(planned, record)
            return record
        record = _record(planned, intended_s, turn=1)
        messages: list[Message] = [{"role": "user", "content": planned.prompt}]
        answer = await self._send(planned, record, messages)
        for turn, follow_up in enumerate(planned.follow_ups, 2):
            intended_s = (record.end_s or 0.0) + planned.think_s
            if record.outcome is not Outcome.OK or intended_s >= end_s:
                break
            await self._alarm.sleep_until(intended_s)
            record = _record(planned, intended_s, turn=turn)
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": follow_up}]
            answer = await self._send(planned, record, messages)
        return record

    async def _send(self, planned: Planned, record: Record, messages: Sequence[Message] | None = None) -> str:
        self._run.in_flight += 1
        try:
            return await self._client.send(planned, record, self._run.clock, messages=messages)
        except asyncio.CancelledError:
            self._cut_off(record)
            raise
        finally:
            self._keep(record)

    def _cut_off(self, record: Record) -> None:
        record.outcome = Outcome.CANCELLED if self._run.interrupted else Outcome.CENSORED

    def _keep(self, record: Record) -> None:
        self._run.in_flight -= 1
        self._run.records.append(record)
