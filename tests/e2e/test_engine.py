import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest
import pytest_asyncio

from gateway.engines.leftovers import processes_of
from gateway.engines.process import EngineProcess
from gateway.engines.protocol import Engine
from gateway.errors import EngineUnavailableError
from tests.factories import make_adapter

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

NAME = "acme/support@1-5e1f0001"


@pytest_asyncio.fixture(loop_scope="session")
async def restoring(
    engine_process: EngineProcess, base_model: Path, adapter_folder: Path
) -> AsyncIterator[EngineProcess]:
    """The engine with one adapter loaded that is brought back after a restart."""
    folder = make_adapter(adapter_folder / "support", base_model, rank=8)

    async def restore(engine: Engine) -> None:
        await engine.load(NAME, folder)

    await restore(engine_process.engine)
    engine_process.on_ready = restore
    yield engine_process
    engine_process.on_ready = None
    await engine_process.engine.remove(NAME)


async def answer(engine: Engine) -> str:
    body = {"model": NAME, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    async with engine.open("/v1/completions", orjson.dumps(body)) as response:
        assert response.status == 200
        text: str = orjson.loads(await response.read())["choices"][0]["text"]
    return text


async def stream_and_kill(host: EngineProcess) -> None:
    body = {"model": NAME, "prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    assert host.pid is not None
    async with host.engine.open("/v1/completions", orjson.dumps(body)) as response:
        chunks = response.chunks()
        await anext(chunks)
        os.kill(host.pid, signal.SIGKILL)
        async for _ in chunks:
            pass


async def test_a_killed_engine_comes_back_with_its_adapters(restoring: EngineProcess) -> None:
    before = await answer(restoring.engine)
    restarts = restoring.restarts
    everyone = processes_of(restoring.socket)
    assert len(everyone) == 2  # the engine core is a process of its own, and outlives its parent; a fork needs no other
    with pytest.raises(EngineUnavailableError, match="broke off"):
        await stream_and_kill(restoring)
    await restoring.reached("restarting")
    async with asyncio.timeout(240):
        await restoring.reached("ready")
    assert restoring.restarts == restarts + 1
    assert await answer(restoring.engine) == before
    assert not any(process.is_running() for process in everyone)
