"""One of several processes that send a load: `python -m loadtests.worker`, started and spoken to by shards.py.

Standard input: the job, then the instant at which to begin, each a line; where it ends, the run is to stop. Standard
output: a line when ready, then reports.
"""

import asyncio
import sys
from pathlib import Path

import orjson

from loadtests.client import open_for
from loadtests.health import Pulse
from loadtests.inputs import load_inputs
from loadtests.loop import new_event_loop
from loadtests.runner import Execution, Shard, execute
from loadtests.scenario import Scenario
from loadtests.schedule import Planned, Workload
from loadtests.shards import LINE_BYTES, Job, Report, encode_report

REPORT_EVERY_S = 0.25


def main() -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_work())


async def _work() -> None:
    orders, reports = await _pipes()
    said = orjson.loads(await orders.readline())
    job = Job(**{**said, "shard": Shard(**said["shard"])})
    scenario = Scenario.model_validate(job.scenario)
    workload = Workload(scenario, job.models, load_inputs(scenario), salt=job.salt)
    schedule = read_schedule(Path(job.schedule), [phase.name for phase in scenario.phases])
    async with open_for(scenario, job.url, job.keys) as client:
        client.marks.update(planned.mark for phase in schedule for planned in phase)
        part = [phase[job.shard.number :: job.shard.of] for phase in schedule]
        del schedule
        reports.write(b"ready\n")
        start_ns = await orders.readline()
        if not start_ns:
            return
        stop = asyncio.Event()
        stopping = asyncio.create_task(_stop_at_the_end_of(orders, stop))
        reporter = Reporter(reports)
        run = await execute(
            workload,
            part,
            client,
            shard=job.shard,
            start_ns=int(start_ns),
            stop=stop,
            watchers=[reporter.watch],
        )
        stopping.cancel()
    reporter.report(run, done=True)
    await reports.drain()
    reports.close()


class Reporter:
    """Tells what is new."""

    def __init__(self, reports: asyncio.StreamWriter) -> None:
        self._reports = reports
        self._records = 0
        self._beats = 0

    async def watch(self, run: Execution) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            self.report(run)

    def report(self, run: Execution, *, done: bool = False) -> None:
        pulse, before = run.pulses[0], self._beats
        new = Pulse(pulse.at_s[before:], pulse.lag_s[before:], pulse.cpu_s[before:])
        said = Report(run.records[self._records :], run.in_flight, new, done, run.waited_for_cpu_s if done else 0.0)
        self._records, self._beats = len(run.records), len(pulse.at_s)
        self._reports.write(encode_report(said))


def read_schedule(path: Path, phases: list[str]) -> list[list[Planned]]:
    """What save_schedule wrote, by phase."""
    planned: dict[str, list[Planned]] = {name: [] for name in phases}
    with path.open("rb") as file:
        for line in file:
            fields = orjson.loads(line)
            planned[fields["phase"]].append(Planned(**{**fields, "follow_ups": tuple(fields["follow_ups"])}))
    return list(planned.values())


async def _stop_at_the_end_of(orders: asyncio.StreamReader, stop: asyncio.Event) -> None:
    await orders.read()
    stop.set()


async def _pipes() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader(limit=LINE_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sys.stdout)
    transport.set_write_buffer_limits(0)  # so that draining means that all is written
    return orders, asyncio.StreamWriter(transport, protocol, None, loop)


if __name__ == "__main__":
    main()
