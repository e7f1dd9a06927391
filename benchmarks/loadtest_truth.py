"""Which load generator tells the truth? Each measures a server whose every answer is known, plain and with a freeze.

    python -m benchmarks.loadtest_truth

The error of a percentile is against what the requests of that very run should have got: nothing of it is sampling. With the
freeze, of two seconds, that counts from the intended start of each request; a closed loop has none, and is compared with what
callers who do not wait for one another would have got at its rate. Tools take turns; nothing else should run meanwhile.
"""

import argparse
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import save
from benchmarks.load_tools import TOOLS, Bench, Load, Measurement, chosen_tools, command_line, measurement_json

Case = tuple[float, bool]  # rate, frozen


def summarise(measurements: Sequence[Measurement]) -> dict[Case, dict[str, dict[str, tuple[float, float, float]]]]:
    """Case -> tool -> figure -> median, lowest and highest error over the rounds."""
    found: dict[Case, dict[str, dict[str, tuple[float, float, float]]]] = {}
    ordered = sorted(measurements, key=lambda m: (m.load.rate_per_s, m.load.frozen))
    for case, some in itertools.groupby(ordered, key=lambda m: (m.load.rate_per_s, m.load.frozen)):
        of_case = list(some)
        found[case] = {
            tool: {
                figure: (statistics.median(errors), min(errors), max(errors))
                for figure in of_case[0].errors
                if (errors := [m.errors[figure] for m in of_case if m.tool == tool])
            }
            for tool in dict.fromkeys(m.tool for m in of_case)
        }
    return found


def table(case: Case, tools: dict[str, dict[str, tuple[float, float, float]]]) -> Table:
    rate, frozen = case
    shown = Table(
        title=f"{rate:g} requests a second, {'frozen for two seconds' if frozen else 'plain'}: error in percent"
    )
    shown.add_column("tool")
    for figure in next(iter(tools.values())):
        shown.add_column(figure, justify="right")
    for tool, figures in tools.items():
        shown.add_row(tool, *(f"{m:+.1%}\n({low:+.1%} … {high:+.1%})" for m, low, high in figures.values()))
    return shown


def summary_json(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    return [
        {
            "rate_per_s": rate,
            "frozen": frozen,
            "tool": tool,
            "errors": {f: list(spread) for f, spread in figures.items()},
        }
        for (rate, frozen), tools in summarise(measurements).items()
        for tool, figures in tools.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[50, 200, 400])
    parser.add_argument("--duration-s", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--locust-environment", type=Path, help="virtual environment with locust; none: make one")
    parser.add_argument("--name", default="loadtest_truth", help="of the file in benchmarks/results")
    asked = parser.parse_args()
    tools, bench = chosen_tools(asked.tools, asked.locust_environment), Bench()
    turns = [
        (tool, Load(rate, asked.duration_s, frozen))
        for turn in range(asked.rounds)
        for rate, frozen in itertools.product(asked.rates, (False, True))
        for tool in (tools[::-1] if turn % 2 else tools)
    ]
    for tool, load in track(turns, description="runs", console=Console(stderr=True)):
        bench.run(tool, load)
    found = {"command": command_line("benchmarks.loadtest_truth", asked), "summary": summary_json(bench.measurements)}
    path = save(asked.name, found | {"runs": [measurement_json(m) for m in bench.measurements]})
    for case, of_tools in summarise(bench.measurements).items():
        Console().print(table(case, of_tools))
    Console().print(f"Raw figures: {path}")


if __name__ == "__main__":
    main()
