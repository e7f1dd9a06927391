"""Hot-swapped or merged? The same requests to an adapter beside its base and to the model it was merged into, taking turns.

    lorikeet up && python -m benchmarks.merged [support@1]

Without a version a random adapter of rank 8 on every linear layer is pushed and used. It is merged into a folder of its
own, served from there by a second gateway and engine with the same profile, and both are asked in alternating rounds at
concurrency 1 and 8. Both engines run all the time; only one is asked at a time.
"""

import argparse
import asyncio
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console

from benchmarks.common import first_tenant, lorikeet, save, temporary_key
from benchmarks.paired import Way, measure, summarise, table
from gateway.services import base_folder
from gateway.settings import Settings
from tests.factories import make_adapter

PORT = 8087


async def run(rounds: dict[int, int], ways: dict[str, tuple[str, str, str]]) -> dict[str, Any]:
    """ways: name -> (url, model, key)."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        asked = [
            Way(name, session, f"{url}/v1/chat/completions", {"model": model}, {"authorization": f"Bearer {key}"})
            for name, (url, model, key) in ways.items()
        ]
        return await measure(asked, rounds)


def random_version(folder: Path) -> str:
    """Push an adapter that no training made: for latency one is like another."""
    made = make_adapter(folder, base_folder(Settings()), rank=8, alpha=16, seed=8)
    pushed = lorikeet("push", str(made), "--name", "bench-merged", "--tenant", first_tenant())
    return str(pushed["id"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", nargs="?", help="such as support@1, of the first tenant; none: a random adapter")
    parser.add_argument("--rounds", type=int, default=40, help="rounds at concurrency 1; a quarter of it at 8")
    asked = parser.parse_args()
    status = lorikeet("status")
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder) / "merged"
        version = asked.version or random_version(Path(folder) / "adapter")
        report = lorikeet("merge", f"{first_tenant()}/{version}", "--out", str(merged))
        environment = os.environ | {
            "LORIKEET_HOME": str(Path(folder) / "home"),
            "LORIKEET_PORT": str(PORT),
            "LORIKEET_BASE": str(merged),
            "LORIKEET_ENGINE": Settings().engine,
        }
        second = lorikeet("up", environment=environment)
        try:
            with temporary_key("inference") as key:
                ways = {
                    "merged": (second["url"], second["base_model"], second["key"]),
                    "hot-swapped": (status["url"], version, key),
                }
                results = asyncio.run(run({1: asked.rounds, 8: max(8, asked.rounds // 4)}, ways))
        finally:
            subprocess.run(["lorikeet", "down"], env=environment, check=False)
    summary = summarise(results)
    document = {
        "command": f"python -m benchmarks.merged {asked.version or ''}".strip(),
        "summary": summary,
        "parity": report,
    }
    path = save("merged", document | {"rounds": results})
    Console().print(table(summary, "merged", "hot-swapped"), f"Raw figures: {path}")


if __name__ == "__main__":
    main()
