"""What a person sees while a load test runs: one line on standard error, cheap enough not to disturb the measurement."""

import asyncio
from collections import Counter

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loadtests.record import Outcome
from loadtests.runner import Execution
from loadtests.stats import nearest_rank
from loadtests.summary import format_s

REFRESH_S = 0.5
RECENT = 100  # answers the live percentiles look at


class LiveView:
    """Draws an execution until cancelled."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=console,
            auto_refresh=False,  # a drawing thread would compete with the event loop
            transient=True,
        )

    async def show(self, run: Execution) -> None:
        end_s = run.windows[-1].end_s
        with self._progress as progress:
            task = progress.add_task("starting", total=end_s, facts="")
            while True:
                now_s = run.clock()
                phase = next((window.name for window in run.windows if now_s < window.end_s), "last answers")
                progress.update(task, completed=min(max(now_s, 0.0), end_s), description=phase, facts=facts(run))
                progress.refresh()
                await asyncio.sleep(REFRESH_S)


def facts(run: Execution) -> str:
    """Counts, and percentiles of the latest answers."""
    outcomes = Counter(record.outcome for record in run.records)
    bad = len(run.records) - outcomes[Outcome.OK]
    text = f"{outcomes[Outcome.OK]} ok, {run.in_flight} in flight" + (f", [red]{bad} not ok[/red]" if bad else "")
    recent = np.sort([r.ttft_s or r.e2e_s or 0.0 for r in run.records[-RECENT:] if r.outcome is Outcome.OK])
    if len(recent):
        text += f" · latest P50 {format_s(nearest_rank(recent, 50))}, P95 {format_s(nearest_rank(recent, 95))}"
    return text
