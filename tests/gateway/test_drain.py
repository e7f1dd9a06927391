"""SIGTERM to a real gateway process: no new work, running streams end well within the grace, or are told."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson
import pytest

from adapters.base import read_base
from adapters.database import open_database
from adapters.home import Home
from adapters.registry import Registry, load_secret
from gateway.drain import Drain
from tests.gateway.echo_process import WORDS
from tests.gateway.test_generation import chat

pytestmark = pytest.mark.slow


@dataclass
class GatewayProcess:
    process: asyncio.subprocess.Process
    url: str
    key: str
    model: str

    def client(self) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.key}", "openai-project": "acme"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30)

    def signal(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@asynccontextmanager
async def process(home: Path, base: Path, **environment: str) -> AsyncIterator[GatewayProcess]:
    database = open_database(f"sqlite:///{Home(home).create().database}")
    Registry(database, secret=load_secret(Home(home).secret)).create_tenant("acme")
    database.dispose()
    command = [sys.executable, "-m", "tests.gateway.echo_process", str(home), str(base)]
    started = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
    try:
        assert started.stdout is not None
        url = (await started.stdout.readline()).decode().strip()
        assert url, await started.wait()
        async with asyncio.timeout(60), httpx.AsyncClient() as client:
            while not await is_ready(client, url):  # noqa: ASYNC110  another process tells no event
                await asyncio.sleep(0.05)
        yield GatewayProcess(started, url, Home(home).operator_key.read_text().strip(), read_base(base).name)
    finally:
        if started.returncode is None:
            started.kill()
            await started.wait()


async def is_ready(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(f"{url}/readyz")).is_success
    except httpx.TransportError:
        return False


async def read_stream(client: httpx.AsyncClient, model: str, begun: asyncio.Event) -> list[str]:
    async with client.stream("POST", "/v1/chat/completions", json=chat(model, stream=True)) as answer:
        assert answer.status_code == 200
        lines = []
        async for line in answer.aiter_lines():
            begun.set()
            lines += [line.removeprefix("data: ")] if line else []
    return lines


async def test_a_running_stream_ends_well_and_nothing_new_is_taken(tmp_path: Path, tiny_base: Path) -> None:
    async with process(tmp_path / "home", tiny_base) as gateway, gateway.client() as client, gateway.client() as other:
        begun = asyncio.Event()
        stream = asyncio.create_task(read_stream(client, gateway.model, begun))
        await begun.wait()
        gateway.signal()
        async with asyncio.timeout(10):
            while (looked := await other.get("/readyz")).status_code == 200:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert looked.json()["draining"]
        assert looked.headers["connection"] == "close"
        refused = await other.post("/v1/chat/completions", json=chat(gateway.model))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert refused.headers["connection"] == "close"
        assert int(refused.headers["retry-after-ms"]) > 0
        assert refused.headers["x-request-id"].startswith("req_")
        lines = await stream
        assert lines[-1] == "[DONE]"
        assert sum('"content":"' in line for line in lines) >= WORDS
        assert await gateway.process.wait() == 0


@pytest.mark.parametrize("twice", [False, True])
async def test_a_stream_that_outlasts_the_grace_or_a_second_signal_is_told(
    tmp_path: Path, tiny_base: Path, twice: bool
) -> None:
    grace = {"LORIKEET_FAILURE__DRAIN_S": "600" if twice else "0.2"}
    async with process(tmp_path / "home", tiny_base, **grace) as gateway, gateway.client() as client:
        begun = asyncio.Event()
        stream = asyncio.create_task(read_stream(client, gateway.model, begun))
        await begun.wait()
        started_s = time.monotonic()
        gateway.signal()
        if twice:
            await asyncio.sleep(0.2)
            gateway.signal()
        lines = await stream
        assert orjson.loads(lines[-1])["error"]["code"] == "shutting_down"
        assert "[DONE]" not in lines
        assert await gateway.process.wait() == 0
        assert time.monotonic() - started_s < 60


async def test_an_idle_gateway_goes_at_once(tmp_path: Path, tiny_base: Path) -> None:
    async with process(tmp_path / "home", tiny_base) as gateway:
        gateway.signal()
        async with asyncio.timeout(20):
            assert await gateway.process.wait() == 0


async def test_work_that_begins_after_the_cut_is_cut_at_once() -> None:
    drain = Drain()
    drain.cut()
    task = asyncio.create_task(asyncio.sleep(60))
    with drain.cuttable(task), pytest.raises(asyncio.CancelledError):
        await task
