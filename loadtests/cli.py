"""`lorikeet loadtest`: thin commands over `session`. Exit codes are part of the contract: CI reads nothing else."""

import asyncio
import datetime
import json
import os
import re
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loadtests.calibration import calibrate as measure_calibration
from loadtests.calibration import latest_calibration, save_calibration
from loadtests.compare import Comparison, comparison_json
from loadtests.compare import compare as compare_runs
from loadtests.errors import LoadTestError
from loadtests.live import LiveView
from loadtests.loads import describe_load
from loadtests.loop import new_event_loop
from loadtests.record import Run, read_run
from loadtests.scenario import Scenario, load_scenario
from loadtests.search import Limits, Probe, at_rate
from loadtests.search import save as save_search
from loadtests.search import search as find_rate
from loadtests.session import RECORDS, REPORT, Plan, measure, plan_only, replot, resolve_keys
from loadtests.slo import Verdict
from loadtests.summary import Summary, describe_judgement, describe_wrong, format_s, summary_json

WIDE = 100  # columns of a terminal that shows P99 as well
USAGE = 2  # exit code: nothing was measured, because the scenario, the records or the server address are wrong
COLOURS = {Verdict.PASS: "green", Verdict.MISSED: "red", Verdict.UNDECIDED: "yellow", Verdict.VOID: "magenta"}

app = typer.Typer(no_args_is_help=True, add_completion=False)
T = TypeVar("T")

JsonOption = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON document.")]
ScenarioArgument = Annotated[Path, typer.Argument(metavar="SCENARIO.yaml", help="Such as configs/loadtests/quick.yaml")]
UrlOption = Annotated[
    str | None, typer.Option(envvar="LORIKEET_URL", help="Server to measure, instead of the scenario's.")
]
KeyOption = Annotated[
    list[str] | None,
    typer.Option(help="TENANT=KEY, repeatable; just KEY for a single tenant. Other users see it in the process list."),
]


@app.callback()
def _loadtest() -> None:
    """Measure P95 under load, with an exit code.

    Exit codes: 0 every objective met; 1 an objective missed; 2 wrong usage, or no server to measure;
    3 undecided (too few samples, or interrupted); 4 void (the load generator itself was the bottleneck).
    """


@app.command()
def run(
    scenario_file: ScenarioArgument,
    url: UrlOption = None,
    key: KeyOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for records and report.", file_okay=False)] = None,
    as_json: JsonOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Ask for the models and show the plan; send nothing.")
    ] = False,
) -> None:
    """Send a scenario's load and judge its objectives.

    Leaves records.jsonl, schedule.jsonl, summary.json, report.html, junit.xml and records.csv in --out, by default a
    new folder under LORIKEET_HOME/loadtests. Ctrl-C ends early and writes what there is.

    Exit codes: 0 pass, 1 objective missed, 2 usage, 3 undecided, 4 generator unhealthy.
    """
    try:
        scenario, keys, address = _asked(scenario_file, url, key)
        if dry_run:
            _show_plan(_in_loop(plan_only(scenario, address, keys)), as_json=as_json)
            return
        folder = out or default_folder(scenario.name)
        view, calibration = _live_view(Console(stderr=True)), latest_calibration(lorikeet_home())
        measured, summary = _in_loop(measure(scenario, address, keys, folder, calibration=calibration, view=view))
    except (LoadTestError, OSError) as exc:  # OSError: --out cannot be written
        raise _usage(exc) from exc
    _show(measured, summary, folder, as_json=as_json)
    raise typer.Exit(summary.exit_code)


@app.command()
def search(
    scenario_file: ScenarioArgument,
    url: UrlOption = None,
    key: KeyOption = None,
    start: Annotated[float, typer.Option(min=0.001, help="Arrivals per second to begin with.")] = 1.0,
    lowest: Annotated[float, typer.Option(min=0.001, help="Give up below.")] = 0.1,
    highest: Annotated[float, typer.Option(min=0.001, help="Stop above.")] = 1000.0,
    precision: Annotated[float, typer.Option(min=0.001, help="Of the rate, such as 0.1 for ten percent.")] = 0.1,
    out: Annotated[Path | None, typer.Option(help="Folder for all probes.", file_okay=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the search as one JSON document.")] = False,
) -> None:
    """Find the highest arrival rate at which every objective of a scenario holds.

    Each probe runs the scenario's phases with Poisson arrivals at one rate: doubling until an objective is missed, then
    halving the interval. Every probe's records and report are kept in --out, with search.json beside them.

    Exit codes: 0 found, 1 not even the lowest rate holds or an answer was wrong, 2 usage, 3 unresolved (and why),
    4 generator unhealthy.
    """
    try:
        scenario, keys, address = _asked(scenario_file, url, key)
        folder = out or default_folder(f"{scenario.name}-search")
        limits = Limits(start=start, lowest=min(lowest, start), highest=max(highest, start), precision=precision)
        console = Console(stderr=True, highlight=False)
        calibration = latest_calibration(lorikeet_home())

        async def probe(rate_per_s: float, number: int) -> tuple[Run, Summary]:
            view = _live_view(console)
            place, asked = folder / f"probe-{number:02}", at_rate(scenario, rate_per_s, number)
            return await measure(asked, address, keys, place, calibration=calibration, view=view)

        def told(done: Probe) -> None:
            colour = COLOURS[done.verdict]
            reason = "".join(f" · {escape(text)}" for text in done.reasons[:1])
            verdict = f"[{colour}]{done.verdict.value:>9}[/{colour}]"
            console.print(f"{done.rate_per_s:8.3g}/s {verdict}  {done.good_per_s:.3g} good/s{reason}", soft_wrap=True)

        probes, outcome = _in_loop(find_rate(limits, probe, done=told))
    except LoadTestError as exc:
        raise _usage(exc) from exc
    document = save_search(folder, limits, probes, outcome)
    if as_json:
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        said = "FOUND" if outcome.resolved else "UNRESOLVED"
        Console(highlight=False).print(f"[bold]{said}[/bold]  {escape(outcome.reason)}\n{folder}", soft_wrap=True)
    raise typer.Exit(outcome.exit_code)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an earlier run.")],
    as_json: JsonOption = False,
) -> None:
    """Judge and draw the records of an earlier run anew.

    Exit codes are those of `run`.
    """
    try:
        measured, summary = replot(folder)
    except (LoadTestError, OSError) as exc:
        raise _usage(exc) from exc
    _show(measured, summary, folder, as_json=as_json)
    raise typer.Exit(summary.exit_code)


@app.command()
def calibrate(
    rate: Annotated[
        list[float] | None, typer.Option(min=1, help="Requests per second, repeatable; by default 50 and 200.")
    ] = None,
    duration_s: Annotated[float, typer.Option(min=6, help="Of each run; every rate has two.")] = 20.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is kept as one JSON document.")] = False,
) -> None:
    """Measure the load generator's own error on this machine, and keep it for the reports.

    The load goes to a built-in server whose every answer is known beforehand, once plain and once with a freeze of two
    seconds. Kept in LORIKEET_HOME/loadtests/calibration.json.

    Exit codes: 0 every figure within 2 % of the known one (10 % with the freeze), 1 not, 2 it could not be measured.
    """
    try:
        calibration = _in_loop(
            measure_calibration(rate or [50, 200], duration_s, view=lambda: _live_view(Console(stderr=True)))
        )
    except LoadTestError as exc:
        raise _usage(exc) from exc
    path = save_calibration(lorikeet_home(), calibration)
    if as_json:
        typer.echo(path.read_text(encoding="utf-8"), nl=False)
    else:
        _show_calibration(calibration, path)
    raise typer.Exit(0 if calibration["within_bars"] else 1)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="Folder of the run to compare with.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Folder of the run in question.")],
    metric: Annotated[list[str] | None, typer.Option(help="Such as tpot, repeatable; by default ttft and e2e.")] = None,
    margin: Annotated[str, typer.Option(help="B may be slower by this much, such as 5% or 0.05.")] = "5%",
    per_adapter: Annotated[bool, typer.Option("--per-adapter", help="Each adapter too, by itself.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as one JSON document.")] = False,
) -> None:
    """Is run B slower than run A? Compares their P95s, with a 95 % interval.

    Runs of one scenario are compared request by request. The smallest effect shown is what this comparison could have
    found to be above the margin: a P95 that is worse by less may have gone unnoticed.

    Exit codes: 0 B is not shown to be slower by more than the margin; 1 it is (the lower bound of the ratio B / A is
    above 1 + margin), or it has wrong answers; 2 usage; 3 undecided (too few samples, or B answered fewer requests);
    4 one of the runs is void.
    """
    try:
        comparison = compare_runs(
            read_run(before / RECORDS),
            read_run(after / RECORDS),
            metrics=metric or (),
            margin=_share(margin),
            per_adapter=per_adapter,
        )
    except LoadTestError as exc:
        raise _usage(exc) from exc
    if as_json:
        typer.echo(json.dumps(comparison_json(comparison), indent=2, ensure_ascii=False))
    else:
        _show_comparison(comparison)
    raise typer.Exit(comparison.exit_code)


def _share(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if match is None:
        raise LoadTestError(f"--margin {text}: give a share such as 5% or 0.05.")
    share = float(match[1]) / (100 if match[2] else 1)
    if share > 1 and not match[2]:
        raise LoadTestError(f"--margin {text}: that is {share:.0%}; write {text.strip()}% for {share / 100:g}.")
    return share


def _show_comparison(comparison: Comparison) -> None:
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("P95 of", no_wrap=True, overflow="ellipsis", max_width=32)
    for column in ("A", "B", "B / A", "95 % interval", "smallest effect", "pairs" if comparison.paired else "n"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in comparison.rows:
        ratio, effect = row.ratio, row.smallest_effect
        colour = COLOURS[row.verdict]
        table.add_row(
            escape(f"{row.metric} · {row.adapter}" if row.adapter else row.metric),
            "–" if row.a_s is None else format_s(row.a_s),
            "–" if row.b_s is None else format_s(row.b_s),
            "–" if ratio is None else f"[{colour}]{ratio.value:.3f}[/{colour}]",
            row.note if ratio is None else f"{ratio.low:.3f} to {ratio.high:.3f}",
            "–" if effect is None else f"+{effect - 1:.1%}",
            str(row.samples),
        )
    console.print(table)
    how = "request by request" if comparison.paired else f"unpaired: {comparison.unpaired_because}"
    console.print(f"\nCompared {escape(how)}. Margin {comparison.margin:.3g}.", soft_wrap=True)
    for note in comparison.notes:
        console.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)
    sentence = {
        Verdict.PASS: "B is not shown to be slower by more than the margin.",
        Verdict.MISSED: "B has wrong answers." if comparison.wrong else "B is slower.",
        Verdict.UNDECIDED: "B answered fewer requests." if comparison.fewer_answers else "Too few samples to tell.",
        Verdict.VOID: "The figures cannot be trusted: a load generator was the bottleneck.",
    }[comparison.verdict]
    colour = COLOURS[comparison.verdict]
    console.print(f"[bold {colour}]{comparison.verdict.value.upper()}[/bold {colour}]  {sentence}", soft_wrap=True)


def lorikeet_home() -> Path:
    return Path(os.environ.get("LORIKEET_HOME") or "~/.lorikeet").expanduser()


def default_folder(scenario: str) -> Path:
    home = lorikeet_home()
    return home / "loadtests" / f"{scenario}-{datetime.datetime.now():%Y%m%d-%H%M%S}"  # noqa: DTZ005  for its reader


def _asked(scenario_file: Path, url: str | None, key: list[str] | None) -> tuple[Scenario, dict[str, str], str]:
    """The scenario, each tenant's key, and the server's address. Raises LoadTestError."""
    scenario = load_scenario(scenario_file)
    keys = resolve_keys(scenario, key or [], os.environ)
    address = url or scenario.target.url
    if not re.match(r"https?://", address):
        raise LoadTestError(f"--url {address}: give an address that begins with http:// or https://.")
    return scenario, keys, address


def _live_view(console: Console) -> LiveView | None:
    """Where nobody sees it, it would only cost processor time."""
    return LiveView(console) if console.is_terminal else None


def _in_loop(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


def _usage(exc: Exception) -> typer.Exit:
    Console(stderr=True).print(f"[red]error:[/red] {escape(str(exc))}", highlight=False, soft_wrap=True)
    return typer.Exit(USAGE)


def _show(run: Run, summary: Summary, folder: Path, *, as_json: bool) -> None:
    files = {"records": str(folder / RECORDS), "report": str(folder / REPORT)}
    if as_json:
        typer.echo(json.dumps(summary_json(run, summary) | {"files": files}, indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=24)
    percents = (50.0, 95.0, 99.0) if console.width >= WIDE else (50.0, 95.0)
    figures = [(metric, percent) for metric in ("ttft", "e2e") for percent in percents]
    for column in ("n", "ok", *(f"{metric.upper()} P{percent:g}" for metric, percent in figures)):
        table.add_column(column, justify="right", no_wrap=True)
    for group in summary.groups:
        if group.kind in ("tenant", "phase") and len(summary.of_kind(group.kind)) == 1:
            continue
        cells = [
            format_s(group.metrics[metric].percentiles[percent].value) if metric in group.metrics else "–"
            for metric, percent in figures
        ]
        name = {"overall": "all requests", "adapter": group.name}.get(group.kind, f"{group.kind} {group.name}")
        table.add_row(escape(name), str(group.count), f"{group.success_rate:.1%}", *cells)
    console.print(table)
    console.print()
    for verdict, text in _findings(summary):
        colour = "dim" if summary.verdict is Verdict.VOID else COLOURS[verdict]
        console.print(f"[{colour}]{verdict.value:>9}[/{colour}]  {escape(text)}", soft_wrap=True)
    for working_set in summary.working_sets:
        if cliff := working_set.cliff:
            found = f"{working_set.name}: {cliff.fits} adapters fit, {cliff.size} do not ({cliff.why})"
            console.print(f"[yellow]    cliff[/yellow]  {escape(found)}", soft_wrap=True)
    for error, count in summary.errors[:5]:
        console.print(f"[red]{count:>7} ×[/red]  {escape(error)}", soft_wrap=True)
    for fault in run.health.faults:
        console.print(
            f"[magenta]     void[/magenta]  The load generator could not keep up: {escape(fault)}", soft_wrap=True
        )
    colour = COLOURS[summary.verdict]
    console.print(
        f"\n[bold {colour}]{summary.verdict.value.upper()}[/bold {colour}]  {escape(files['report'])}", soft_wrap=True
    )


def _findings(summary: Summary) -> Iterator[tuple[Verdict, str]]:
    if summary.wrong:
        yield Verdict.MISSED, describe_wrong(summary.wrong)
    for judgement in summary.judgements:
        yield judgement.verdict, describe_judgement(judgement)
    if summary.audit:
        yield from ((summary.audit.verdict, reason) for reason in summary.audit.reasons)


def _show_plan(plan: Plan, *, as_json: bool) -> None:
    scenario = plan.workload.scenario
    planned = [request for phase in plan.schedule for request in phase]
    counts = Counter((request.tenant, request.adapter) for request in planned)
    phases = [
        {
            "phase": phase.name,
            "duration_s": phase.duration_s,
            "load": describe_load(scenario.load_of(phase)),
            "requests": len(some),
        }
        for phase, some in zip(scenario.phases, plan.schedule, strict=True)
    ]
    shares = [{"tenant": tenant, "adapter": adapter, "requests": n} for (tenant, adapter), n in counts.most_common()]
    if as_json:
        typer.echo(json.dumps({"scenario": scenario.name, "phases": phases, "adapters": shares}, indent=2))
        return
    console = Console(highlight=False)
    for phase in phases:
        console.print(f"{phase['phase']}: {phase['duration_s']:g} s, {phase['load']}, {phase['requests']} requests")
    table = Table(box=None, pad_edge=False)
    for column in ("tenant", "adapter", "requests"):
        table.add_column(column)
    for share in shares:
        table.add_row(escape(str(share["tenant"])), escape(str(share["adapter"])), str(share["requests"]))
    console.print(table)


def _show_calibration(calibration: Mapping[str, Any], path: Path) -> None:
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, title="Error of each figure against the known one", title_justify="left")
    table.add_column("", no_wrap=True)
    for column in ("TTFT P50", "P95", "P99", "E2E P50", "P95", "P99", "send lag P99", "CPU"):
        table.add_column(column, justify="right", no_wrap=True)
    for case in calibration["cases"]:
        errors = ["–" if figure["measured_s"] is None else f"{figure['error']:+.1%}" for figure in case["figures"]]
        table.add_row(
            f"{case['rate_per_s']:g}/s {case['kind']}",
            *errors,
            format_s(case["send_lag_p99_s"]),
            f"{case['cpu_share']:.0%}",
            style=None if case["within_bar"] else "red",
        )
    console.print(table)
    late_s = max(case["server_late_p99_s"] for case in calibration["cases"])
    console.print(f"The built-in server itself was late by {format_s(late_s)} at P99.", style="dim")
    bars = " and ".join(f"{limit:.0%} ({kind})" for kind, limit in calibration["bars"].items())
    verdict = "[bold green]WITHIN" if calibration["within_bars"] else "[bold red]OUTSIDE"
    console.print(f"\n{verdict}[/] {bars}  {escape(str(path))}", soft_wrap=True)
