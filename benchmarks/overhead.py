"""What the gateway adds: the same streamed requests to the engine directly and through the gateway, taking turns.

    lorikeet up && python -m benchmarks.overhead

Both go to the base model on one engine in the same minute, at concurrency 1 and 16.
"""

import argparse
import asyncio
from typing import Any

import aiohttp
from rich.console import Console

from benchmarks.common import lorikeet, save, temporary_key
from benchmarks.paired import Way, measure, summarise, table
from gateway.engines.profile import BASE_NAME
from gateway.settings import Settings


async def run(rounds: dict[int, int], key: str, status: dict[str, Any]) -> dict[str, Any]:
    socket = Settings().home.run / f"{status['engines'][0]['id']}.sock"
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket), limit=0)) as direct,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as through,
    ):
        own = {"model": BASE_NAME, "cache_salt": "benchmark", "stream_options": {"include_usage": True}}
        path = "/v1/chat/completions"
        ways = [
            Way("direct", direct, f"http://engine{path}", own),
            Way(
                "gateway",
                through,
                f"{status['url']}{path}",
                {"model": status["base_model"]},
                {"authorization": f"Bearer {key}"},
            ),
        ]
        return await measure(ways, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="rounds at concurrency 1; a quarter of it at 16")
    rounds = parser.parse_args().rounds
    status = lorikeet("status")
    with temporary_key("inference") as key:
        results = asyncio.run(run({1: rounds, 16: max(8, rounds // 4)}, key, status))
    summary = summarise(results)
    path = save("overhead", {"command": "python -m benchmarks.overhead", "summary": summary, "rounds": results})
    Console().print(table(summary, "direct", "gateway"), f"Raw figures: {path}")


if __name__ == "__main__":
    main()
