"""From `lorikeet up` on a prepared machine to the first token: stopped and started again a few times.

    lorikeet up && python -m benchmarks.start

Beside each start stands the time of `lorikeet up` while everything runs: what the command itself costs.
"""

import argparse
import time

from rich.console import Console
from rich.progress import track

from benchmarks.common import lorikeet, percentile, save


def seconds(command: str) -> float:
    began = time.perf_counter()
    lorikeet(command)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    figures: dict[str, list[float]] = {"down_s": [], "up_s": [], "up_again_s": []}
    for _ in track(range(parser.parse_args().rounds), description="starts", console=Console(stderr=True)):
        figures["down_s"].append(seconds("down"))
        figures["up_s"].append(seconds("up"))
        figures["up_again_s"].append(seconds("up"))
    summary = {
        name: {"p50": percentile(times, 0.5), "min": min(times), "max": max(times)} for name, times in figures.items()
    }
    path = save("start", {"command": "python -m benchmarks.start", "summary": summary, "rounds": figures})
    Console().print(summary, f"Raw figures: {path}")


if __name__ == "__main__":
    main()
