"""What the gateway adds: the same streamed requests to the engine directly and through the gateway, taking turns.

    lorikeet up && python -m benchmarks.overhead

Both go to the same engine in the same minute; which goes first alternates. Reported are the differences of TTFT and of the
mean gap between two tokens at concurrency 1 and 16, with 95 % bootstrap intervals, and the ratio of the medians.
"""

import argparse
import asyncio
import itertools
from dataclasses import asdict
from typing import Any

import aiohttp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import Timing, interval, lorikeet, percentile, prompt, save, timed_stream
from gateway.engines.profile import BASE_NAME
from gateway.settings import Settings

WAYS = ("direct", "gateway")


async def batch(
    way: str, session: aiohttp.ClientSession, url: str, model: str, key: str, seeds: list[int]
) -> list[Timing]:
    """One request a seed, all at once."""
    common = {"max_tokens": 32, "temperature": 0, "stream": True, "ignore_eos": True}

    def body(seed: int) -> dict[str, Any]:
        asked = common | {"messages": [{"role": "user", "content": prompt(seed)}]}
        if way == "direct":
            return asked | {"model": BASE_NAME, "cache_salt": "bench", "stream_options": {"include_usage": True}}
        return asked | {"model": model}

    headers = {"authorization": f"Bearer {key}"} if way == "gateway" else None
    return list(await asyncio.gather(*(timed_stream(session, url, body(seed), headers) for seed in seeds)))


async def measure(rounds: dict[int, int], key: str, status: dict[str, Any]) -> dict[str, Any]:
    settings = Settings()
    socket = settings.home.run / f"{status['engines'][0]['id']}.sock"
    urls = {"direct": "http://engine/v1/chat/completions", "gateway": f"{status['url']}/v1/chat/completions"}
    seeds = itertools.count(1_000_000)
    results: dict[str, Any] = {}
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket), limit=0)) as direct,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as through,
    ):
        sessions = {"direct": direct, "gateway": through}
        for way in WAYS:
            await batch(way, sessions[way], urls[way], status["base_model"], key, [next(seeds) for _ in range(4)])
        for concurrency, count in rounds.items():
            timings: dict[str, list[list[Timing]]] = {way: [] for way in WAYS}
            for number in track(range(count), description=f"concurrency {concurrency}", console=Console(stderr=True)):
                for way in WAYS if number % 2 else WAYS[::-1]:
                    own = [next(seeds) for _ in range(concurrency)]
                    timings[way].append(await batch(way, sessions[way], urls[way], status["base_model"], key, own))
            results[str(concurrency)] = {way: [[asdict(t) for t in group] for group in timings[way]] for way in WAYS}
    return results


def summarise(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Per concurrency and figure: medians, P95, and the median of the per-round differences with its interval, in ms."""
    rows = []
    for concurrency, ways in results.items():
        for figure in ("ttft_s", "per_token_s"):
            rounds = {way: [np.median([t[figure] for t in group]) * 1000 for group in ways[way]] for way in WAYS}
            flat = {way: [t[figure] * 1000 for group in ways[way] for t in group] for way in WAYS}
            added, low, high = interval([b - a for a, b in zip(rounds["direct"], rounds["gateway"], strict=True)])
            rows.append(
                {
                    "concurrency": int(concurrency),
                    "figure": figure,
                    "direct_p50_ms": float(np.median(flat["direct"])),
                    "gateway_p50_ms": float(np.median(flat["gateway"])),
                    "direct_p95_ms": percentile(flat["direct"], 0.95),
                    "gateway_p95_ms": percentile(flat["gateway"], 0.95),
                    "added_ms": added,
                    "added_low_ms": low,
                    "added_high_ms": high,
                    "ratio": float(np.median(flat["gateway"]) / np.median(flat["direct"])),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="rounds at concurrency 1; a quarter of it at 16")
    rounds = parser.parse_args().rounds
    status = lorikeet("status")
    tenant = lorikeet("tenants", "list")["data"][0]["name"]
    made = lorikeet("keys", "create", "--tenant", tenant, "--scope", "inference", "--name", "benchmark")
    try:
        results = asyncio.run(measure({1: rounds, 16: max(8, rounds // 4)}, made["key"], status))
    finally:
        lorikeet("keys", "revoke", made["id"])
    summary = summarise(results)
    path = save("overhead", {"command": "python -m benchmarks.overhead", "summary": summary, "rounds": results})
    table = Table(
        "concurrency", "figure", "direct P50", "gateway P50", "added (95 % interval)", "ratio", title="milliseconds"
    )
    for row in summary:
        spread = f"{row['added_ms']:+.2f} ({row['added_low_ms']:+.2f} … {row['added_high_ms']:+.2f})"
        table.add_row(
            str(row["concurrency"]),
            row["figure"],
            f"{row['direct_p50_ms']:.2f}",
            f"{row['gateway_p50_ms']:.2f}",
            spread,
            f"{row['ratio']:.3f}",
        )
    Console().print(table, f"Raw figures: {path}")


if __name__ == "__main__":
    main()
