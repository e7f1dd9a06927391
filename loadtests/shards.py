"""A load that one core cannot send: the schedule cut over several processes, their records brought together again.

All of them begin at one instant of the monotonic clock, which the processes of a machine share, and every one sends its
raw records here as they end: nothing is averaged, and what a process that dies had sent is kept.
"""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from loadtests.client import run_clock
from loadtests.errors import LoadTestError
from loadtests.health import Pulse
from loadtests.record import Outcome, Record
from loadtests.runner import Beside, Execution, Shard, conduct
from loadtests.scenario import Scenario
from loadtests.schedule import windows

LEAD_S = 0.5  # from the last process being ready to the run's beginning
STOP_S = 10.0  # within which a process that was told to stop hands over what it has
LINE_BYTES = 2**28  # a message holds the records of a quarter of a second


@dataclass(frozen=True)
class Job:
    """What a process is told, on its standard input: keys must not be seen in the list of processes, nor on a disk."""

    scenario: Mapping[str, Any]
    models: Mapping[str, Sequence[str]]
    url: str
    keys: Mapping[str, str]
    schedule: str  # file with the whole of it
    salt: str  # of the run
    shard: Shard


@dataclass(frozen=True)
class Report:
    """What a process says every quarter of a second: what is new since it said so before."""

    records: Sequence[Record]
    in_flight: int
    pulse: Pulse
    done: bool
    waited_for_cpu_s: float


def encode_report(report: Report) -> bytes:
    return orjson.dumps(report) + b"\n"


def decode_report(line: bytes) -> Report:
    said = orjson.loads(line)
    records = [Record(**{**fields, "outcome": Outcome(fields["outcome"])}) for fields in said.pop("records")]
    return Report(records=records, pulse=Pulse(**said.pop("pulse")), **said)


async def execute_sharded(
    scenario: Scenario,
    models: Mapping[str, Sequence[str]],
    url: str,
    keys: Mapping[str, str],
    schedule: Path,
    *,
    salt: str = "",
    stop: asyncio.Event | None = None,
    jobs: Sequence[Beside] = (),
    watchers: Sequence[Beside] = (),
) -> Execution:
    """As runner.execute, in scenario.shards processes; jobs and watchers run in this one.

    schedule: file that save_schedule wrote. salt: that it was planned with. A process that dies ends the run: `faults` then
    says so, and the records that came until then are kept. Raises LoadTestError when a process does not start.
    """
    stop = stop or asyncio.Event()
    fields = scenario.model_dump(mode="json")
    shards = [Shard(number, scenario.shards) for number in range(scenario.shards)]
    started = [Job(fields, models, url, keys, str(schedule), salt, shard) for shard in shards]
    async with _processes(started) as processes:
        await asyncio.gather(*(process.ready() for process in processes))
        start_ns = time.monotonic_ns() + round(LEAD_S * 1e9)
        pulses = [process.pulse for process in processes]
        run = Execution(windows(scenario.phases), run_clock(start_ns), pulses=pulses)
        follow = [asyncio.create_task(process.follow(run, start_ns)) for process in processes]

        async def load() -> None:
            await asyncio.wait(follow, return_when=asyncio.FIRST_EXCEPTION)
            run.faults += [str(task.exception()) for task in follow if task.done() and task.exception()]
            if run.faults:
                stop.set()

        try:
            await conduct(run, load(), stop=stop, jobs=jobs, watchers=watchers)
        finally:
            for process in processes:
                process.stop()
            await asyncio.wait(follow, timeout=STOP_S)
            for task in follow:
                task.cancel()
            await asyncio.gather(*follow, return_exceptions=True)
    return run


@asynccontextmanager
async def _processes(jobs: Sequence[Job]) -> "AsyncIterator[list[_Process]]":
    processes: list[_Process] = []
    try:
        for job in jobs:
            processes.append(await _Process.start(job))  # noqa: PERF401  those before one that fails must be ended
        yield processes
    finally:
        for process in processes:
            await process.end()


class _Process:
    """One process that sends."""

    def __init__(self, process: asyncio.subprocess.Process, shard: Shard) -> None:
        self.pulse = Pulse()
        self._process = process
        self._name = f"process {shard.number + 1} of {shard.of}"
        self._in_flight = 0

    @classmethod
    async def start(cls, job: Job) -> "_Process":
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "loadtests.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES,
            start_new_session=True,  # Ctrl-C is for us, who then tell them
        )
        started = cls(process, job.shard)
        started._tell(orjson.dumps(asdict(job)))
        return started

    async def ready(self) -> None:
        """Returns when it has planned everything. Raises LoadTestError."""
        if not await self._hear():
            raise LoadTestError(f"Load generator {self._name} did not start; its message stands above.")

    async def follow(self, run: Execution, start_ns: int) -> None:
        """Let it begin, and take in what it says until it is done. Raises LoadTestError when it dies before."""
        self._tell(str(start_ns).encode())
        done = False
        while not done:
            line = await self._hear()
            if not line.endswith(b"\n"):
                code = await self._process.wait()
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                raise LoadTestError(f"{self._name} died at {run.clock():.1f} s ({how}); the records stop there")
            report = decode_report(line)
            run.records += report.records
            run.in_flight += report.in_flight - self._in_flight
            run.waited_for_cpu_s += report.waited_for_cpu_s
            self._in_flight, done = report.in_flight, report.done
            self.pulse.extend(report.pulse)

    def stop(self) -> None:
        """It cuts off what still runs, and says so."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    async def end(self) -> None:
        self.stop()
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    def _tell(self, line: bytes) -> None:
        assert self._process.stdin is not None  # noqa: S101  a pipe
        self._process.stdin.write(line + b"\n")

    async def _hear(self) -> bytes:
        assert self._process.stdout is not None  # noqa: S101  a pipe
        return await self._process.stdout.readline()
