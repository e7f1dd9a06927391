"""One load test from scenario to files: ask what may be called, plan, run, judge, write."""

import asyncio
import datetime
import json
import os
import platform
import secrets
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from loadtests.client import Client, open_for
from loadtests.errors import LoadTestError, NoModelsError, TargetError
from loadtests.events import play_events
from loadtests.export import write_csv
from loadtests.health import assess, cpu_s
from loadtests.inputs import load_inputs
from loadtests.junit import junit_xml
from loadtests.live import LiveView
from loadtests.record import Health, Run, read_run, write_run
from loadtests.report import render_report
from loadtests.runner import Execution, execute
from loadtests.scenario import Scenario
from loadtests.schedule import Planned, Workload, plan_schedule, save_schedule
from loadtests.scrape import Scraper, scraping_report
from loadtests.shards import execute_sharded
from loadtests.slo import parse_objectives
from loadtests.summary import Summary, is_open_loop, summarise, summary_json, tightest_limit_s

RECORDS, SUMMARY, REPORT, SCHEDULE = "records.jsonl", "summary.json", "report.html", "schedule.jsonl"
TABLE, JUNIT = "records.csv", "junit.xml"


@dataclass(frozen=True)
class Plan:
    """All that is fixed before the first request."""

    workload: Workload
    schedule: list[list[Planned]]

    @property
    def scheduled(self) -> int | None:
        """Requests planned in measured phases; None where a closed loop makes that unknown."""
        scenario = self.workload.scenario
        if not is_open_loop(scenario):
            return None
        return sum(len(some) for phase, some in zip(scenario.phases, self.schedule, strict=True) if phase.measured)


def resolve_keys(scenario: Scenario, given: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The API key of each tenant: from TENANT=KEY (or just KEY, for a single tenant), the scenario, its variable.

    A tenant without a key asks without one. Raises LoadTestError for a key of nobody.
    """
    variables = {tenant.name: scenario.key_variable(tenant) for tenant in scenario.tenants}
    keys = {tenant: environment[variable] for tenant, variable in variables.items() if environment.get(variable)}
    keys |= {tenant: key.get_secret_value() for tenant, key in scenario.keys.items()}
    names = list(variables)
    for text in given:
        tenant, separator, key = text.partition("=")
        if not separator and len(names) == 1:
            tenant, key = names[0], text
        elif not separator or tenant not in names:
            raise LoadTestError(f"--key needs TENANT=KEY with one of the scenario's tenants: {', '.join(names)}.")
        keys[tenant] = key
    return keys


async def plan(scenario: Scenario, client: Client, *, salt: str = "") -> Plan:
    """Asks the server what each tenant may call. salt: of the run, as Workload takes it. Raises TargetError."""
    neighbours = {phase.neighbour.tenant for phase in scenario.phases if phase.neighbour}
    models: dict[str, list[str]] = {}
    for tenant in scenario.tenants:
        wanted = tenant.adapters or scenario.adapters
        named = [] if wanted == "all" else wanted
        models[tenant.name] = list(named)
        if not tenant.share and tenant.name not in neighbours:
            continue  # its key is for events only
        try:
            listed = await client.models(tenant.name)  # even when named: better to fail now than with every request
        except NoModelsError:
            if not named:
                raise
        else:
            models[tenant.name] = list(named) or listed
        if not models[tenant.name]:
            raise TargetError(f"GET /v1/models lists nothing for tenant '{tenant.name}': there is nothing to ask.")
    workload = Workload(scenario, models, load_inputs(scenario), salt=salt)
    return Plan(workload, plan_schedule(workload))


async def plan_only(scenario: Scenario, url: str, keys: Mapping[str, str]) -> Plan:
    async with open_for(scenario, url, keys) as client:
        return await plan(scenario, client)


async def measure(
    scenario: Scenario,
    url: str,
    keys: Mapping[str, str],
    out: Path,
    *,
    calibration: Mapping[str, Any] | None = None,
    view: LiveView | None = None,
) -> tuple[Run, Summary]:
    """Run the scenario and leave its files in `out`. SIGINT or SIGTERM ends it with what there is.

    calibration: how far figures are off on this machine, kept with the run. Raises LoadTestError when nothing can be
    measured.
    """
    scrapers = [Scraper(page, os.environ.get(page.key_env) if page.key_env else None) for page in scenario.scrape]
    salt = secrets.token_hex(8)
    async with open_for(scenario, url, keys) as client:
        planned = await plan(scenario, client, salt=salt)
        await asyncio.to_thread(save_schedule, out / SCHEDULE, planned.schedule)
        started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        environment = describe_environment()
        stop = asyncio.Event()
        with _signals(stop.set):
            events = partial(play_events, phases=scenario.phases, client=client, drain_s=scenario.drain_s)
            watchers = [scraper.watch for scraper in scrapers] + ([view.show] if view else [])
            models = planned.workload.models
            if scenario.shards > 1:
                execution = await execute_sharded(
                    scenario, models, url, keys, out / SCHEDULE, salt=salt, stop=stop, jobs=[events], watchers=watchers
                )
            else:
                execution = await execute(
                    planned.workload, planned.schedule, client, stop=stop, jobs=[events], watchers=watchers
                )
    run = Run(
        scenario=scenario.model_dump(mode="json"),
        url=url,
        started_at=started_at,
        interrupted=execution.interrupted,
        models=models,
        windows=tuple(execution.windows),
        health=health_of(execution, planned),
        environment=environment
        | {
            "salt": salt,
            "processes": scenario.shards,
            "client_cpu_s": round(cpu_s(execution.pulses), 3),
            "waited_for_cpu_s": round(execution.waited_for_cpu_s, 3),
            "scraping": scraping_report(scrapers),
        },
        records=tuple(sorted(execution.records, key=lambda record: record.intended_s)),
        events=tuple(execution.marks),
        samples=tuple(execution.samples),
        calibration=calibration,
    )
    write_run(out / RECORDS, run)
    return run, write_results(out, run)


def health_of(execution: Execution, planned: Plan) -> Health:
    """What ended the run early comes first."""
    scenario = planned.workload.scenario
    health = assess(
        execution.records,
        execution.pulses,
        execution.windows,
        # what an interruption left unsent is not the generator's fault
        scheduled=None if execution.interrupted else planned.scheduled,
        limits=scenario.health,
        tightest_s=tightest_limit_s(parse_objectives(scenario.objectives)),
    )
    return replace(health, faults=(*execution.faults, *health.faults))


def replot(out: Path) -> tuple[Run, Summary]:
    """Judge and draw kept records anew. Raises RecordError."""
    run = read_run(out / RECORDS)
    return run, write_results(out, run)


def write_results(out: Path, run: Run) -> Summary:
    summary = summarise(run)
    text = json.dumps(summary_json(run, summary), indent=2, ensure_ascii=False)
    (out / SUMMARY).write_text(text + "\n", encoding="utf-8")
    (out / REPORT).write_text(render_report(run, summary), encoding="utf-8")
    (out / JUNIT).write_bytes(junit_xml(run, summary))
    write_csv(out / TABLE, run.records)
    return summary


def describe_environment() -> dict[str, Any]:
    """Where the load came from: what a reader needs to trust or repeat a figure."""
    return {
        "lorikeet": _version("lorikeet"),
        "aiohttp": _version("aiohttp"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average_before": [round(value, 2) for value in os.getloadavg()],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
