"""A caller who leaves a real engine: it works on nothing any more, and what it made until then is charged once."""

import asyncio
import contextlib
import re

import httpx
import pytest
from fastapi import FastAPI

from adapters.ledger import UsageFilter
from adapters.registry import Scope
from gateway.engines.protocol import Engine
from gateway.services import Services
from tests.gateway.conftest import listening

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

RUNNING = re.compile(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)", re.MULTILINE)
LONG = 1500  # tokens: 15 s and more on two cores
MEANWHILE_S = 1.0
DAY_S = 86_400


async def running(engine: Engine) -> float:
    return sum(map(float, RUNNING.findall(await engine.metrics())))


async def until_it_runs(engine: Engine, wanted: bool) -> None:
    async with asyncio.timeout(10):
        while bool(await running(engine)) is not wanted:  # noqa: ASYNC110  another process tells no event
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("stream", [True, False])
async def test_the_engine_stops_working_for_a_caller_who_left_and_who_is_charged_once(
    app: FastAPI, stream: bool
) -> None:
    services: Services = app.state.services
    tenant = f"leaver-{stream}".lower()
    services.registry.create_tenant(tenant)
    _, key = services.registry.create_key(tenant, {Scope.INFERENCE})
    await services.directory.refresh()
    (replica,) = services.fleet.replicas
    body = {
        "model": services.base.name,
        "messages": [{"role": "user", "content": "Count as far as you can."}],
        "max_tokens": LONG,
        "ignore_eos": True,
        "stream": stream,
    }
    async with listening(app) as url:
        async with httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
            asked = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await until_it_runs(replica.engine, True)
            await asyncio.sleep(MEANWHILE_S)
            asked.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asked
        await until_it_runs(replica.engine, False)
    assert replica.admission.in_flight == replica.residency.claimed == 0
    await asyncio.sleep(2 * services.settings.usage.flush_s)
    (day,) = services.ledger.sums(0, 2**32 // DAY_S * DAY_S, DAY_S, only=UsageFilter(tenants=[tenant]))
    assert day.requests == 1
    assert day.prompt_tokens > 5
    assert 1 < day.output_tokens < LONG
