"""What stands between a client and an engine, and what it costs: nothing, Lorikeet, LiteLLM's proxy, vLLM's Rust router.

    python -m benchmarks.gateway

All of them before one echo engine, in turns within each round: the gateway alone on the first core, engine and client on the
second. LiteLLM and the router come from the package index, each into an environment of its own under the data folder.
"""

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httptools
import httpx
import numpy as np
import orjson
import psutil
import uvloop
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adapters.home import Home, home
from adapters.registry import Registry, Scope, load_secret, open_database
from benchmarks.common import ROOT, interval, percentile, save, serving
from benchmarks.load_tools import command_line
from gateway.engines.profile import BASE_NAME
from loadtests.priority import real_time

GATEWAY_CORE, CLIENT_CORE = 0, 1
PEERS = {"litellm": "litellm[proxy]==1.100.0", "vllm-router": "vllm-router==0.1.17"}
CONCURRENCY = (1, 16, 64)
LATE_S = 0.1  # a frame that comes later than this after its turn is a stall
FRAME_S = 0.02
STREAM_S = 6.0


@dataclass(frozen=True)
class Way:
    """One way to the engine. process: what is measured; None for the direct way."""

    name: str
    port: int
    headers: Mapping[str, str]
    model: str
    process: psutil.Process | None

    def request(self, **fields: Any) -> bytes:
        body = orjson.dumps({"model": self.model, "messages": [{"role": "user", "content": "Say something."}]} | fields)
        head = [
            "POST /v1/chat/completions HTTP/1.1",
            "host: 127.0.0.1",
            "content-type: application/json",
            f"content-length: {len(body)}",
            *(f"{name}: {value}" for name, value in self.headers.items()),
        ]
        return "\r\n".join(head).encode() + b"\r\n\r\n" + body

    def cpu_s(self) -> float:
        """Processor time of the process and all its children so far."""
        if self.process is None:
            return 0.0
        every = [self.process, *self.process.children(recursive=True)]
        return float(sum(sum(one.cpu_times()[:2]) for one in every))


class Caller(asyncio.Protocol):
    """One keep-alive connection; knows when each piece of an answer came and when it was whole."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[int] | None = None
        self.pieces: list[float] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.pieces.append(time.perf_counter())
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(self._parser.get_status_code())

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError("the connection was closed within an answer"))

    async def ask(self, request: bytes) -> float:
        """Seconds until the answer was whole. Raises RuntimeError for any status but 200."""
        self._done = asyncio.get_running_loop().create_future()
        self.pieces.clear()
        began = time.perf_counter()
        self.transport.write(request)
        status = await self._done
        if status != 200:
            raise RuntimeError(f"status {status}")
        return time.perf_counter() - began


@asynccontextmanager
async def callers(way: Way, count: int) -> AsyncIterator[list[Caller]]:
    loop = asyncio.get_running_loop()
    made = [(await loop.create_connection(Caller, "127.0.0.1", way.port))[1] for _ in range(count)]
    try:
        yield made
    finally:
        for caller in made:
            caller.transport.close()


async def closed_loop(way: Way, concurrency: int, seconds: float) -> dict[str, Any]:
    """So many callers, each asking again as soon as it was answered. Latencies in seconds."""
    request = way.request(max_tokens=16)
    latencies: list[float] = []

    async def go_on(caller: Caller) -> None:
        while time.perf_counter() < end:
            latencies.append(await caller.ask(request))

    async with callers(way, concurrency) as made:
        cpu_s, began = way.cpu_s(), time.perf_counter()
        end = began + seconds
        await asyncio.gather(*(go_on(caller) for caller in made))
        took_s = time.perf_counter() - began
    return {
        "p50_s": percentile(latencies, 0.5),
        "p99_s": percentile(latencies, 0.99),
        "requests": len(latencies),
        "per_s": len(latencies) / took_s,
        "cpu_s": way.cpu_s() - cpu_s,
    }


async def latest_frame_s(way: Way, streams: int) -> float:
    """The longest wait of any stream for its next piece, less the time between two frames; seconds."""
    request = way.request(stream=True, max_tokens=round(STREAM_S / FRAME_S))

    async def one(caller: Caller, delay_s: float) -> float:
        await asyncio.sleep(delay_s)
        began = time.perf_counter()
        await caller.ask(request)
        return float(max(np.diff([began, *caller.pieces]))) - FRAME_S

    async with callers(way, streams) as made:
        gaps = await asyncio.gather(*(one(caller, number / streams) for number, caller in enumerate(made)))
    return float(max(gaps))


async def stall_free_streams(way: Way, sizes: Sequence[int]) -> dict[str, Any]:
    """The largest size at which no frame came late, growing until one does in two tries."""
    tried: dict[int, list[float]] = {}
    held = 0
    for size in sizes:
        tried[size] = []
        for _ in range(2):
            with suppress(ConnectionError, RuntimeError):
                tried[size].append(await latest_frame_s(way, size))
                if tried[size][-1] <= LATE_S:
                    held = size
                    break
        if held != size:
            break
    return {"streams": held, "latest_s": tried}


# The ways


@contextmanager
def running(
    name: str, command: Sequence[str], port: int, folder: Path, *, core: int, path: str, environment: Mapping[str, str]
) -> Iterator[psutil.Process]:
    health = f"http://127.0.0.1:{port}{path}"
    with serving(command, health, folder / f"{name}.log", environment=os.environ | dict(environment), core=core) as it:
        yield it


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def peer(name: str) -> Path:
    """The bin folder of an environment that holds one of the others; made on first use."""
    folder = home().create().root / "benchmarks" / name
    if not (folder / "made").exists():
        Console(stderr=True).print(f"Installing {PEERS[name]} into {folder}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(folder / "bin/pip"), "install", "--quiet", PEERS[name]], check=True)
        (folder / "made").touch()
    return folder / "bin"


@contextmanager
def lorikeet(engine: Path, folder: Path) -> Iterator[Way]:
    own = Home(folder / "home").create()
    with suppress(OSError):
        own.models.rmdir()
    own.models.symlink_to(home().create().models)
    database = open_database(f"sqlite:///{own.database}")
    registry = Registry(database, secret=load_secret(own.secret))
    registry.create_tenant("bench", limits={"max_in_flight": 10_000})
    key = registry.create_key("bench", {Scope.INFERENCE})[1]
    database.dispose()
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.on_echo", str(engine)]
    environment = {
        "LORIKEET_HOME": str(own.root),
        "LORIKEET_PORT": str(port),
        "LORIKEET_ENGINE": str(profile_for_many(folder)),
        "LORIKEET_LIMITS__MAX_IN_FLIGHT": "10000",
        "LORIKEET_REQUESTS__MAX_QUEUE": "10000",
    }
    with running("lorikeet", command, port, folder, core=GATEWAY_CORE, path="/readyz", environment=environment) as it:
        headers = {"authorization": f"Bearer {key}"}
        models = httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=headers).json()["data"]
        yield Way("lorikeet", port, headers, models[0]["id"], it)


def profile_for_many(folder: Path) -> Path:
    """The CPU profile, but with room for as many requests at once as the benchmark has."""
    profile = yaml.safe_load((ROOT / "configs/engines/cpu.yaml").read_text(encoding="utf-8"))
    path = folder / "wide.yaml"
    path.write_text(yaml.safe_dump(profile | {"max_in_flight": 10_000}), encoding="utf-8")
    return path


@contextmanager
def litellm(engine_port: int, folder: Path) -> Iterator[Way]:
    port = free_port()
    config = folder / "litellm.yaml"
    upstream = {"model": f"openai/{BASE_NAME}", "api_base": f"http://127.0.0.1:{engine_port}/v1", "api_key": "none"}
    config.write_text(yaml.safe_dump({"model_list": [{"model_name": "echo", "litellm_params": upstream}]}))
    command = [str(peer("litellm") / "litellm"), "--config", str(config), "--port", str(port), "--host", "127.0.0.1"]
    environment = {"LITELLM_LOG": "ERROR", "LITELLM_MASTER_KEY": "sk-bench", "LITELLM_TELEMETRY": "False"}
    with running(
        "litellm", command, port, folder, core=GATEWAY_CORE, path="/health/liveliness", environment=environment
    ) as it:
        yield Way("litellm", port, {"authorization": "Bearer sk-bench"}, "echo", it)


@contextmanager
def vllm_router(engine_port: int, folder: Path) -> Iterator[Way]:
    port = free_port()
    command = [
        *(str(peer("vllm-router") / "vllm-router"), "--worker-urls", f"http://127.0.0.1:{engine_port}"),
        *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())),
    ]
    with running("vllm-router", command, port, folder, core=GATEWAY_CORE, path="/health", environment={}) as it:
        yield Way("vllm-router", port, {}, BASE_NAME, it)


async def measure(ways: Sequence[Way], rounds: int, seconds: float, tell: Callable[[str], None]) -> dict[str, Any]:
    found: dict[str, Any] = {way.name: {str(number): [] for number in CONCURRENCY} for way in ways}
    for way in ways:
        await closed_loop(way, 4, 1.0)  # warm
    for concurrency in CONCURRENCY:
        for _ in track(range(rounds), description=f"{concurrency} at once", console=Console(stderr=True)):
            for way in ways:
                found[way.name][str(concurrency)].append(await closed_loop(way, concurrency, seconds))
    for way in ways:
        tell(f"streams: {way.name}")
        sizes = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512]
        found[way.name]["streams"] = await stall_free_streams(way, sizes)
    return found


def summarise(found: Mapping[str, Any]) -> dict[str, Any]:
    """Added latency is the median over rounds of gateway less direct; requests per core from the process's own time."""
    summary: dict[str, Any] = {}
    for name, figures in found.items():
        rows: dict[str, Any] = {"streams": figures["streams"]["streams"]}
        for concurrency in map(str, CONCURRENCY):
            rounds, direct = figures[concurrency], found["direct"][concurrency]
            rows[concurrency] = {
                "per_s": interval([one["per_s"] for one in rounds]),
                "per_core_s": interval([one["requests"] / one["cpu_s"] for one in rounds])
                if rounds[0]["cpu_s"]
                else None,
            } | {
                f"added_{rank}_ms": interval(
                    [1000 * (one[f"{rank}_s"] - other[f"{rank}_s"]) for one, other in zip(rounds, direct, strict=True)]
                )
                for rank in ("p50", "p99")
            }
        summary[name] = rows
    return summary


def table(summary: Mapping[str, Any]) -> Table:
    shown = Table("way", "at once", "added P50 ms", "added P99 ms", "requests/s", "requests/s a core", "streams")
    for name, rows in summary.items():
        for concurrency in map(str, CONCURRENCY):
            row = rows[concurrency]
            figures = (row["added_p50_ms"], row["added_p99_ms"], row["per_s"], row["per_core_s"])
            cells = ["" if one is None else f"{one[0]:.2f} ({one[1]:.2f} … {one[2]:.2f})" for one in figures]
            shown.add_row(name, concurrency, *cells, str(rows["streams"]))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    given = parser.parse_args()
    console = Console()
    for name in PEERS:
        peer(name)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        engine, port = folder / "engine.sock", free_port()
        command = [sys.executable, "-m", "benchmarks.echo_server", "--socket", str(engine), "--port", str(port)]
        os.sched_setaffinity(0, {CLIENT_CORE})
        with (
            running("echo", command, port, folder, core=CLIENT_CORE, path="/health", environment={}),
            lorikeet(engine, folder) as ours,
            litellm(port, folder) as theirs,
            vllm_router(port, folder) as router,
            real_time(),
        ):
            direct = Way("direct", port, {}, BASE_NAME, None)
            found = uvloop.run(measure((direct, ours, theirs, router), given.rounds, given.seconds, console.print))
    summary = summarise(found)
    path = save("gateway", {"command": command_line("benchmarks.gateway", given), "summary": summary, "rounds": found})
    console.print(table(summary), f"Raw figures: {path}")


if __name__ == "__main__":
    main()
