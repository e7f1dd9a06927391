"""What a person sees while a load test runs: a few lines on standard error, cheap enough not to disturb the measurement."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from loadtests.record import Outcome, Record
from loadtests.runner import Execution
from loadtests.stats import percentile_of
from loadtests.summary import format_s

REFRESH_S = 0.5  # one drawing takes about a millisecond
RECENT = 200  # requests the live percentiles look at
FEWEST = 10  # of an adapter's among them, before it is called slow


class LiveView:
    """Draws an execution until cancelled."""

    def __init__(self, console: Console) -> None:
        self._console = console

    async def show(self, run: Execution) -> None:
        end_s = run.windows[-1].end_s
        progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            auto_refresh=False,
        )
        task = progress.add_task("starting", total=end_s)
        tally = Tally()
        # a drawing thread would compete with the event loop
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                now_s = run.clock()
                phase = next((window.name for window in run.windows if now_s < window.end_s), "last answers")
                progress.update(task, completed=min(max(now_s, 0.0), end_s), description=phase)
                lines = [Text.from_markup(line, overflow="ellipsis") for line in describe(run, tally)]
                live.update(Group(progress, *lines), refresh=True)
                await asyncio.sleep(REFRESH_S)


class Tally:
    """Counts a growing list, looking at each record once."""

    def __init__(self) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self.wrong = 0
        self._seen = 0

    def take_in(self, records: Sequence[Record]) -> None:
        for record in records[self._seen :]:
            self.outcomes[record.outcome] += 1
            self.wrong += bool(record.wrong)
        self._seen = len(records)


def describe(run: Execution, tally: Tally) -> Iterator[str]:
    """A line each, with markup: what came of the requests, how quick the latest were, what was done to the server."""
    tally.take_in(run.records)
    counts = [f"{tally.outcomes[Outcome.OK]} ok", f"{run.in_flight} in flight"]
    for outcome, colour in ((Outcome.REFUSED, "yellow"), (Outcome.CANCELLED, "dim"), (Outcome.FAILED, "red")):
        if count := tally.outcomes[outcome]:
            counts.append(f"[{colour}]{count} {outcome.value}[/{colour}]")
    if tally.wrong:
        counts.append(f"[bold red]{tally.wrong} wrong[/bold red]")
    yield ", ".join(counts)
    if latest := _latest([record for record in run.records[-RECENT:] if record.outcome is Outcome.OK]):
        yield latest
    if run.marks:
        mark = run.marks[-1]
        how = f"[red]{escape(mark.error)}[/red]" if mark.error else f"done in {format_s(mark.end_s - mark.start_s)}"
        yield f"{escape(mark.name)} at {mark.start_s:.1f} s: {how}"


def _latest(records: Sequence[Record]) -> str:
    waits: dict[str, list[float]] = defaultdict(list)
    for record in records:
        wait_s = record.ttft_s if record.stream else record.e2e_s
        if wait_s is not None:
            waits[record.adapter].append(wait_s)
    if not waits:
        return ""
    everything = percentile_of([wait_s for some in waits.values() for wait_s in some], 95)
    middle = percentile_of([wait_s for some in waits.values() for wait_s in some], 50)
    lag = percentile_of([record.lag_s or 0.0 for record in records], 99)
    text = f"latest: P50 {format_s(middle)}, P95 {format_s(everything)}"
    medians = {adapter: percentile_of(some, 50) for adapter, some in waits.items() if len(some) >= FEWEST}
    if len(medians) > 1:
        slowest = max(medians, key=lambda adapter: medians[adapter])
        text += f", slowest {escape(slowest)} (P50 {format_s(medians[slowest])})"
    return f"{text}; sent at most {format_s(lag)} late"
