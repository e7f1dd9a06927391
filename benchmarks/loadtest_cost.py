"""What does a load generator cost? Processor time per request and per chunk, and the highest rate one core keeps up.

    python -m benchmarks.loadtest_cost

The client has the first core to itself, the built-in server the second; nothing else should run meanwhile. Processor time
counts from the first request to the last chunk, so starting up and writing reports cost nothing here. A request and a chunk
are told apart by answers of one chunk and of twenty. A rate is kept up when P99 of the requests reach the server within 5 ms
of their intended start; that needs a schedule, so of locust only the paced users take part.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import save
from benchmarks.load_tools import TOOLS, Bench, Load, Measurement, Tool, chosen_tools, command_line, measurement_json
from loadtests.known_server import CHUNKS

CORES = (0, 1)
LAG_LIMIT_S = 0.005
ANSWERED_SHARE = 0.99
STEP = 1.05  # the search ends when the lowest rate that failed is this close


def highest(kept_up: Callable[[float], bool], start: float, *, step: float = STEP) -> float:
    """The highest rate that was kept up, to within a step: doubling, then halving the ratio. 0 when not even start / 8 was."""
    low, high = 0.0, math.inf
    rate = start
    while not low or high / low > step:
        if not low and rate < start / 8:
            return 0.0
        if kept_up(rate):
            low = rate
        else:
            high = rate
        rate = low * 2 if high == math.inf else high / 2 if not low else math.sqrt(low * high)
    return low


def keeps_up(measurement: Measurement) -> bool:
    lag_s, share = measurement.lag_p99_s, measurement.answered_share
    return lag_s is not None and lag_s < LAG_LIMIT_S and share is not None and share >= ANSWERED_SHARE


def highest_rate(bench: Bench, tool: Tool, start: float, duration_s: float) -> float:
    """A rate counts as kept up when one of two tries was: one hiccup of the machine decides nothing."""

    def tried(rate: float) -> bool:
        load = Load(round(rate), duration_s)
        return any(keeps_up(bench.run(tool, load)) for _ in range(2))

    return round(highest(tried, start))


def costs_us(measurements: Sequence[Measurement], tool: str) -> dict[str, list[float]]:
    """Microseconds of processor time a request of one chunk, of twenty, and a further chunk; one value a round."""
    of = {
        chunks: [m.cpu_s / m.requests * 1e6 for m in measurements if m.tool == tool and m.load.chunks == chunks]
        for chunks in (1, CHUNKS)
    }
    further = [(many - one) / (CHUNKS - 1) for one, many in zip(of[1], of[CHUNKS], strict=True)]
    return {"request of 1 chunk": of[1], f"request of {CHUNKS} chunks": of[CHUNKS], "further chunk": further}


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} … {max(values):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=200, help="at which processor time is taken")
    parser.add_argument("--duration-s", type=float, default=15)
    parser.add_argument("--probe-s", type=float, default=8, help="of each try of the search")
    parser.add_argument("--start", type=float, default=200, help="rate at which the search begins")
    parser.add_argument("--rounds", type=int, default=3, help="of processor time")
    parser.add_argument("--search-rounds", type=int, default=1, help="of the search; a rate is tried twice in any case")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--locust-environment", type=Path, help="virtual environment with locust; none: make one")
    parser.add_argument("--name", default="loadtest_cost", help="of the file in benchmarks/results")
    asked = parser.parse_args()
    tools = chosen_tools(asked.tools, asked.locust_environment)
    costs, searches = Bench(CORES), Bench(CORES)
    rates: dict[str, list[float]] = {tool.name: [] for tool in tools if tool.name != "locust"}
    console = Console(stderr=True)
    turns = itertools.product(range(asked.rounds), (1, CHUNKS), tools)
    for _, chunks, tool in track(list(turns), description="processor time", console=console):
        costs.run(tool, Load(asked.rate, asked.duration_s, chunks=chunks))
    for _, tool in track(
        list(itertools.product(range(asked.search_rounds), tools)), description="highest rate", console=console
    ):
        if tool.name in rates:
            rates[tool.name].append(highest_rate(searches, tool, asked.start, asked.probe_s))
    shown = Table("tool", title=f"Microseconds of processor time at {asked.rate:g}/s, and highest rate of one core")
    summary: dict[str, Any] = {}
    for column in (*costs_us([], ""), "highest rate"):
        shown.add_column(column, justify="right")
    for tool in tools:
        found = costs_us(costs.measurements, tool.name)
        summary[tool.name] = found | {"highest rate": rates.get(tool.name)}
        kept_up = f"{spread(rates[tool.name])}/s" if tool.name in rates else "no schedule"
        shown.add_row(tool.name, *(spread(values) for values in found.values()), kept_up)
    runs = {"runs": [measurement_json(m) for m in costs.measurements + searches.measurements]}
    path = save(asked.name, {"command": command_line("benchmarks.loadtest_cost", asked), "summary": summary} | runs)
    Console().print(shown, f"Raw figures: {path}")


if __name__ == "__main__":
    main()
