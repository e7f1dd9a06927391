"""What streams feel while adapters come and go: eight clients stream from one name, first in peace, then under ten swaps.

    lorikeet up && python -m benchmarks.swap

Each swap uploads a new version (timed until it is servable), promotes it and rolls back. Adapters are random, of rank 8 on
every linear layer, so that each upload is a real new one. Reported: failures, longest gaps in peace and under swaps, and
upload-to-servable times. Every answer's x-lorikeet-adapter must be a version that was production while it ran.
"""

import argparse
import asyncio
import itertools
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import Timing, lorikeet, percentile, prompt, save, temporary_key, timed_stream
from gateway.services import base_folder
from gateway.settings import Settings
from tests.factories import make_adapter, zip_folder

NAME = "bench-swap"
CLIENTS = 8


def packed(folder: Path, seed: int, base: Path) -> bytes:
    return zip_folder(make_adapter(folder / str(seed), base, rank=8, alpha=16, seed=seed))


async def upload(client: httpx.AsyncClient, archive: bytes) -> tuple[int, float]:
    """The new version's number and the seconds from sending to ready."""
    began = time.perf_counter()
    answer = await client.post("/v1/adapters?wait=true", data={"name": NAME}, files={"file": ("a.zip", archive)})
    answer.raise_for_status()
    return int(answer.json()["version"]), time.perf_counter() - began


async def stream_for_ever(url: str, headers: dict[str, str], done: list[Timing], failed: list[str], first: int) -> None:
    async with aiohttp.ClientSession() as session:
        for number in itertools.count(first * 100_000):
            body = {"model": NAME, "max_tokens": 48, "temperature": 0, "stream": True}
            asked = body | {"ignore_eos": True, "messages": [{"role": "user", "content": prompt(number, 12)}]}
            try:
                done.append(await timed_stream(session, url, asked, headers))
            except (RuntimeError, aiohttp.ClientError) as exc:
                failed.append(str(exc))


async def window(seconds: float, work: Any, url: str, headers: dict[str, str]) -> tuple[list[Timing], list[str]]:
    """Eight clients for as long as the work takes, at least `seconds`."""
    done: list[Timing] = []
    failed: list[str] = []
    clients = [asyncio.create_task(stream_for_ever(url, headers, done, failed, n)) for n in range(CLIENTS)]
    await asyncio.gather(work, asyncio.sleep(seconds))
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return done, failed


async def measure(swaps: int, key: str, status: dict[str, Any]) -> dict[str, Any]:
    base = base_folder(Settings())
    headers = {"authorization": f"Bearer {key}"}
    url = f"{status['url']}/v1/chat/completions"
    uploads: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        archives = [packed(Path(folder), seed, base) for seed in range(swaps + 1)]
        async with httpx.AsyncClient(base_url=status["url"], headers=headers, timeout=120) as client:
            with suppress(httpx.HTTPStatusError):
                (await client.delete(f"/v1/adapters/{NAME}")).raise_for_status()
            await upload(client, archives[0])
            calm, calm_failed = await window(30, asyncio.sleep(0), url, headers)

            async def churn() -> None:
                for archive in track(archives[1:], description="swaps", console=Console(stderr=True)):
                    version, took_s = await upload(client, archive)
                    uploads.append(took_s)
                    body = {"version": version, "force": True, "reason": "a benchmark of swaps"}
                    (await client.post(f"/v1/adapters/{NAME}/promote", json=body)).raise_for_status()
                    await asyncio.sleep(1.0)
                    (await client.post(f"/v1/adapters/{NAME}/rollback")).raise_for_status()
                    await asyncio.sleep(1.0)

            swapped, swap_failed = await window(30, churn(), url, headers)
            idle = [(await upload(client, packed(Path(folder), 1000 + n, base)))[1] for n in range(10)]
            (await client.delete(f"/v1/adapters/{NAME}")).raise_for_status()
    return {
        "calm": [vars(t) for t in calm],
        "swapped": [vars(t) for t in swapped],
        "failed": {"calm": calm_failed, "swapped": swap_failed},
        "upload_s": {"under_load": uploads, "idle": idle},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=10)
    swaps = parser.parse_args().swaps
    status = lorikeet("status")
    with temporary_key("inference", "adapters:read", "adapters:write") as key:
        results = asyncio.run(measure(swaps, key, status))
    summary: dict[str, Any] = {}
    table = Table("", "answers", "failed", "gap P50", "gap P99", "longest gap", title="longest gap of each stream, ms")
    for name in ("calm", "swapped"):
        gaps = [timing["max_gap_s"] * 1000 for timing in results[name]]
        row: dict[str, float] = {"answers": len(gaps), "failed": len(results["failed"][name])}
        row |= {"p50_ms": percentile(gaps, 0.5), "p99_ms": percentile(gaps, 0.99), "max_ms": max(gaps)}
        summary[name] = row
        table.add_row(name, *(f"{value:.0f}" for value in row.values()))
    summary["ratio_of_longest_gaps"] = summary["swapped"]["max_ms"] / summary["calm"]["max_ms"]
    for name, values in results["upload_s"].items():
        summary[f"upload_{name}_s"] = {"p50": percentile(values, 0.5), "max": max(values)}
    path = save("swap", {"command": "python -m benchmarks.swap", "summary": summary, **results})
    console = Console()
    console.print(table)
    console.print({name: value for name, value in summary.items() if name not in ("calm", "swapped")})
    console.print(f"Raw figures: {path}")


if __name__ == "__main__":
    main()
