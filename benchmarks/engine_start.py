"""An engine's start on a CPU, its second process forked as the profile asks or spawned as vLLM's CPU platform has it, in turns.

    python -m benchmarks.engine_start

Seconds from launch to ready and from SIGTERM to gone, processor seconds of both, memory of its own, and what either then gives:
tokens a second of eight answers at once. Nothing else should run.
"""

import argparse
import asyncio
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adapters.base import load_spec, prepare_base
from adapters.home import home
from benchmarks.common import interval, percentile, prompt, save, timed_stream
from gateway.engines.cpu_fork import METHOD
from gateway.engines.leftovers import processes_of
from gateway.engines.process import EngineProcess
from gateway.engines.profile import EngineProfile, load_profile

AT_ONCE, TOKENS = 8, 64
SHOWN = {
    "ready_s": "s to ready",
    "stopped_s": "s to gone",
    "processor_s": "processor s",
    "memory_mib": "MiB",
    "tokens_per_s": "tokens/s",
}


def processor_s() -> float:
    """Of this process's children that have ended, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def running_s(socket: Path) -> float:
    """Processor seconds of the engine so far."""
    return sum(sum(process.cpu_times()[:2]) for process in processes_of(socket))


async def tokens_per_s(socket: Path) -> float:
    async def one(number: int) -> int:
        message = {"role": "user", "content": prompt(number)}
        body = {"model": "base", "messages": [message], "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        return (await timed_stream(session, "http://engine/v1/chat/completions", body)).tokens

    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket))) as session:
        await one(0)
        began = time.perf_counter()
        tokens = await asyncio.gather(*(one(number) for number in range(1, AT_ONCE + 1)))
        return sum(tokens) / (time.perf_counter() - began)


async def measure(profile: EngineProfile, model: Path, folder: Path) -> dict[str, float]:
    host = EngineProcess(profile, model, folder / "run", folder / "engine.log")
    used, began = processor_s(), time.perf_counter()
    await host.start()
    ready_s = time.perf_counter() - began
    memory = sum(process.memory_full_info().pss for process in processes_of(host.socket))
    processor = running_s(host.socket)
    speed = await tokens_per_s(host.socket)
    before_stop = running_s(host.socket)
    began = time.perf_counter()
    await host.stop()
    stopped_s = time.perf_counter() - began
    processor += processor_s() - used - before_stop
    return {
        "ready_s": ready_s,
        "stopped_s": stopped_s,
        "processor_s": processor,
        "memory_mib": memory / 2**20,
        "tokens_per_s": speed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    profile, model = load_profile("cpu"), prepare_base(load_spec(), home().models)
    profiles = {
        method: profile.model_copy(update={"env": profile.env | {METHOD: method}}) for method in ("spawn", "fork")
    }
    figures: dict[str, list[dict[str, float]]] = {method: [] for method in profiles}
    with tempfile.TemporaryDirectory() as folder:
        for turn in track(range(parser.parse_args().rounds), description="starts", console=Console(stderr=True)):
            for method in list(profiles)[:: 1 if turn % 2 else -1]:
                figures[method].append(asyncio.run(measure(profiles[method], model, Path(folder))))
    shown = Table("", "spawned", "forked", "ratio")
    ratios: dict[str, Any] = {}
    for name, title in SHOWN.items():
        spawned, forked = ([figure[name] for figure in figures[method]] for method in ("spawn", "fork"))
        value, low, high = interval([ours / theirs for theirs, ours in zip(spawned, forked, strict=True)])
        ratios[name] = {"value": value, "low": low, "high": high}
        middle = (f"{percentile(values, 0.5):.1f}" for values in (spawned, forked))
        shown.add_row(title, *middle, f"{value:.2f} ({low:.2f} … {high:.2f})")
    document = {"command": "python -m benchmarks.engine_start", "ratios": ratios, "rounds": figures}
    Console().print(shown, f"Raw figures: {save('engine_start', document)}")


if __name__ == "__main__":
    main()
