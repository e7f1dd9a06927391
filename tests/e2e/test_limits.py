"""Limits that count what a real engine made."""

import httpx
import pytest
from fastapi import FastAPI

from adapters.registry import LimitKind, LimitSubject, Scope
from gateway.services import Services
from tests.gateway.conftest import listening

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

TOKENS_A_MINUTE = 300


async def test_tokens_are_settled_by_what_was_made_and_a_refusal_says_when_to_come_back(app: FastAPI) -> None:
    services: Services = app.state.services
    services.registry.create_tenant("counted")
    _, key = services.registry.create_key("counted", {Scope.INFERENCE})
    services.registry.set_limits(
        LimitSubject(LimitKind.TENANT, "counted"), {"tokens_per_minute": TOKENS_A_MINUTE, "requests_per_minute": 100}
    )
    await services.directory.refresh()
    body = {"model": services.base.name, "messages": [{"role": "user", "content": "Count."}], "ignore_eos": True}
    async with (
        listening(app) as url,
        httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client,
    ):
        ended = await client.post("/v1/chat/completions", json=body | {"max_tokens": 200, "stop": ["a", "e", "i"]})
        assert ended.headers["x-ratelimit-limit-tokens"] == str(TOKENS_A_MINUTE)
        usage = ended.json()["usage"]
        assert usage["completion_tokens"] < 100  # it had 200 set aside
        second = await client.post("/v1/chat/completions", json=body | {"max_tokens": 8})
        left = int(second.headers["x-ratelimit-remaining-tokens"])
        assert left > TOKENS_A_MINUTE - 200
        refused = await client.post("/v1/chat/completions", json=body | {"max_tokens": left})
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 0 < int(refused.headers["retry-after-ms"]) <= 60_000
