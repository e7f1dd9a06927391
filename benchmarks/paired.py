"""Two ways to ask the same thing, taking turns: rounds alternate in who goes first, so that the machine's moods hit both."""

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import Timing, interval, percentile, prompt, timed_stream

FIGURES = ("ttft_s", "per_token_s", "e2e_s")


@dataclass(frozen=True)
class Way:
    """One way to ask: where, and what the body says besides the prompt."""

    name: str
    session: aiohttp.ClientSession
    url: str
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)

    async def ask(self, seed: int, max_tokens: int) -> Timing:
        asked = {"max_tokens": max_tokens, "temperature": 0, "stream": True, "ignore_eos": True} | dict(self.body)
        messages = [{"role": "user", "content": prompt(seed)}]
        return await timed_stream(self.session, self.url, asked | {"messages": messages}, self.headers)


async def measure(ways: Sequence[Way], rounds: Mapping[int, int], *, max_tokens: int = 32) -> dict[str, Any]:
    """rounds: concurrency -> rounds. The answer: concurrency -> way -> rounds -> timings."""
    seeds = itertools.count(1_000_000)

    async def batch(way: Way, concurrency: int) -> list[dict[str, float]]:
        own = [next(seeds) for _ in range(concurrency)]
        return [asdict(timing) for timing in await asyncio.gather(*(way.ask(seed, max_tokens) for seed in own))]

    for way in ways:
        await batch(way, 4)  # connections opened, adapters loaded
    results: dict[str, Any] = {}
    for concurrency, count in rounds.items():
        found: dict[str, list[list[dict[str, float]]]] = {way.name: [] for way in ways}
        for number in track(range(count), description=f"concurrency {concurrency}", console=Console(stderr=True)):
            for way in ways if number % 2 else ways[::-1]:
                found[way.name].append(await batch(way, concurrency))
        results[str(concurrency)] = found
    return results


def summarise(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per concurrency and figure, in ms: P50 and P95 of both ways, and the median over rounds of their difference and of
    their ratio, with 95 % bootstrap intervals.
    """
    rows = []
    for concurrency, ways in results.items():
        first, second = ways
        for figure in FIGURES:
            rounds = {way: [float(np.median([t[figure] for t in group])) * 1000 for group in ways[way]] for way in ways}
            flat = {way: [t[figure] * 1000 for group in ways[way] for t in group] for way in ways}
            pairs = list(zip(rounds[first], rounds[second], strict=True))
            row: dict[str, Any] = {"concurrency": int(concurrency), "figure": figure}
            for way in ways:
                row[way] = {"p50_ms": percentile(flat[way], 0.5), "p95_ms": percentile(flat[way], 0.95)}
            row["added_ms"] = dict(zip(("value", "low", "high"), interval([b - a for a, b in pairs]), strict=True))
            row["ratio"] = dict(zip(("value", "low", "high"), interval([b / a for a, b in pairs]), strict=True))
            rows.append(row)
    return rows


def table(summary: Sequence[Mapping[str, Any]], first: str, second: str) -> Table:
    shown = Table(
        "at once", "figure", f"{first} P50 / P95", f"{second} P50 / P95", "added", "ratio", title="milliseconds"
    )
    for row in summary:
        added, ratio = row["added_ms"], row["ratio"]
        shown.add_row(
            str(row["concurrency"]),
            row["figure"].removesuffix("_s"),
            f"{row[first]['p50_ms']:.1f} / {row[first]['p95_ms']:.1f}",
            f"{row[second]['p50_ms']:.1f} / {row[second]['p95_ms']:.1f}",
            f"{added['value']:+.2f} ({added['low']:+.2f} … {added['high']:+.2f})",
            f"{ratio['value']:.3f} ({ratio['low']:.3f} … {ratio['high']:.3f})",
        )
    return shown
