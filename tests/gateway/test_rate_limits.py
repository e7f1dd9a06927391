"""Limits over HTTP: headers, refusals, what the official client makes of them, and an auditor's verdict."""

import asyncio
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapters.registry import LimitKind, LimitSubject, Scope
from gateway.engines.echo import EchoEngine
from loadtests.audit import audit_limits
from loadtests.client import open_client
from loadtests.inputs import load_inputs
from loadtests.runner import execute
from loadtests.schedule import Workload, plan_schedule
from loadtests.slo import Verdict
from tests.factories import make_adapter, zip_folder
from tests.gateway.conftest import Gateway, listening, running_gateway
from tests.loadtests.factories import make_scenario

TENANT = LimitSubject(LimitKind.TENANT, "acme")
LIMIT_HEADERS = {
    f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
}


async def limit(gateway: Gateway, subject: LimitSubject = TENANT, **changes: float | None) -> None:
    await gateway.key(subject.tenant)
    await asyncio.to_thread(gateway.services.registry.set_limits, subject, changes)
    await gateway.services.directory.refresh()


def body(gateway: Gateway, **fields: Any) -> dict[str, Any]:
    return {"model": gateway.services.base.name, "messages": [{"role": "user", "content": "Hi"}], **fields}


async def chat(client: httpx.AsyncClient, gateway: Gateway, **fields: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=body(gateway, **fields))


def limit_headers(answer: httpx.Response) -> set[str]:
    return LIMIT_HEADERS & set(answer.headers)


async def test_answers_tell_the_limits_only_where_there_are_some(gateway: Gateway) -> None:
    async with await gateway.client() as client:
        assert limit_headers(await chat(client, gateway)) == set()
        await limit(gateway, requests_per_minute=60, tokens_per_minute=100_000)
        for fields in ({}, {"stream": True}):
            answer = await chat(client, gateway, max_tokens=100, **fields)
            assert answer.status_code == 200
            assert limit_headers(answer) == LIMIT_HEADERS
        assert (answer.headers["x-ratelimit-limit-requests"], answer.headers["x-ratelimit-limit-tokens"]) == (
            "60",
            "100000",
        )
        assert answer.headers["x-ratelimit-remaining-requests"] == "58"
        assert answer.headers["x-ratelimit-reset-requests"] == "2s"
        assert 99_700 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 99_900
        assert answer.headers["x-ratelimit-reset-tokens"].endswith("ms")


async def test_a_refusal_says_when_to_come_again(gateway: Gateway) -> None:
    await limit(gateway, requests_per_minute=1)
    async with await gateway.client() as client:
        assert (await chat(client, gateway)).status_code == 200
        refused = await chat(client, gateway)
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("requests", "rate_limit_exceeded", None)
    assert "Rate limit reached for tenant acme on requests per min (RPM): Limit 1, Used 1" in error["message"]
    assert 55_000 < int(refused.headers["retry-after-ms"]) <= 60_000
    assert 55 < int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert "x-should-retry" not in refused.headers


async def test_errors_of_limited_callers_tell_the_limits_too(tmp_path: Path, tiny_base: Path) -> None:
    async with running_gateway(tmp_path / "home", tiny_base, requests={"queue_s": 0.05}) as gateway:
        await limit(gateway, requests_per_minute=10)
        async with await gateway.client() as client:
            gateway.host.state = "restarting"
            answer = await chat(client, gateway)
            gateway.host.state = "ready"
    assert answer.status_code == 503
    assert answer.headers["x-ratelimit-remaining-requests"] == "9"


async def test_what_an_answer_did_not_use_is_given_back(gateway: Gateway) -> None:
    await limit(gateway, tokens_per_minute=2000)
    async with await gateway.client() as client:
        for _ in range(5):
            answer = await chat(client, gateway, max_tokens=1500)
            assert answer.status_code == 200, answer.text
        too_large = await chat(client, gateway, max_tokens=3000)
        assert too_large.status_code == 429
        assert too_large.json()["error"]["code"] == "rate_limit_exceeded"
        assert too_large.headers["x-should-retry"] == "false"
        counted = await client.post("/tokenize", json={"model": gateway.services.base.name, "prompt": "Hi"})
        assert counted.status_code == 200


async def test_a_caller_that_leaves_gives_its_tokens_and_its_place_back(tmp_path: Path, tiny_base: Path) -> None:
    async with running_gateway(
        tmp_path / "home", tiny_base, engine=lambda: EchoEngine(slots=4, token_s=0.05)
    ) as gateway:
        await limit(gateway, tokens_per_minute=2000, max_in_flight=1)
        key = await gateway.key()
        async with listening(gateway.app) as url:
            async with httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"}) as client:
                with pytest.raises(httpx.ReadTimeout):
                    await client.post("/v1/chat/completions", json=body(gateway, max_tokens=1500), timeout=0.1)
                for _ in range(100):
                    answer = await client.post("/v1/chat/completions", json=body(gateway, max_tokens=1500), timeout=30)
                    if answer.status_code == 200:
                        break
                    await asyncio.sleep(0.05)
                assert answer.status_code == 200


async def test_the_official_client_waits_as_told_and_then_gets_its_answer(gateway: Gateway) -> None:
    await limit(gateway, requests_per_minute=60)
    key = await gateway.key()
    async with listening(gateway.app) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as hasty:
            ask = partial(hasty.completions.create, model=gateway.services.base.name, prompt="Hi", max_tokens=1)
            answers = await asyncio.gather(*(ask() for _ in range(60)))
            assert len(answers) == 60
            before_s = time.monotonic()
            with pytest.raises(openai.RateLimitError) as refused:
                await asyncio.gather(*(ask() for _ in range(30)))
        assert (refused.value.code, refused.value.type) == ("rate_limit_exceeded", "requests")
        told_s = int(refused.value.response.headers["retry-after-ms"]) / 1000
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=3) as patient:
            await patient.completions.create(model=gateway.services.base.name, prompt="Hi", max_tokens=1)
        assert time.monotonic() - before_s >= told_s - 0.01


async def test_a_spent_budget_is_not_asked_again(tmp_path: Path, tiny_base: Path) -> None:
    prices = {"prices": {"input": 1000.0, "output": 1000.0}}
    async with running_gateway(tmp_path / "home", tiny_base, usage=prices) as gateway:
        await limit(gateway, monthly_budget=0.01)
        key, asked = await gateway.key(), 0

        async def count(_: object) -> None:
            nonlocal asked
            asked += 1

        hooks: Any = {"request": [count]}
        async with (
            listening(gateway.app) as url,
            openai.AsyncOpenAI(
                base_url=f"{url}/v1",
                api_key=key,
                max_retries=3,
                http_client=openai.DefaultAsyncHttpxClient(event_hooks=hooks),
            ) as client,
        ):
            await client.completions.create(model=gateway.services.base.name, prompt="Hi " * 20)
            with pytest.raises(openai.RateLimitError) as refused:
                await client.completions.create(model=gateway.services.base.name, prompt="Hi")
    assert (refused.value.code, refused.value.type) == ("insufficient_quota", "insufficient_quota")
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert asked == 2


async def test_an_upload_beyond_the_tenants_room_is_refused_for_good(gateway: Gateway, tmp_path: Path) -> None:
    await limit(gateway, max_adapters=1)
    async with await gateway.client() as client:

        async def upload(name: str, seed: int) -> httpx.Response:
            folder = make_adapter(tmp_path / f"{name}-{seed}", gateway.base, seed=seed)
            files = {"file": ("a.zip", zip_folder(folder))}
            return await client.post("/v1/adapters?wait=true", data={"name": name}, files=files)

        first = await upload("one", 1)
        assert first.status_code == 201
        refused = await upload("two", 2)
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "room_used_up"
        assert refused.headers["x-should-retry"] == "false"
        size = first.json()["size_bytes"]
        await limit(gateway, max_stored_bytes=2 * size - 1)
        refused = await upload("one", 3)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "room_used_up")
        assert len((await client.get("/v1/adapters/one/versions")).json()["data"]) == 1
        await limit(gateway, max_stored_bytes=3 * size)
        assert (await upload("one", 3)).status_code == 201


async def test_a_revoked_key_ends_within_a_second_at_every_gateway(tmp_path: Path, tiny_base: Path) -> None:
    database = f"sqlite:///{tmp_path / 'shared.db'}"
    home = tmp_path / "one"
    async with running_gateway(home, tiny_base, database_url=database) as one:
        (tmp_path / "two").mkdir()
        (tmp_path / "two" / "secret").write_bytes((home / "secret").read_bytes())
        async with running_gateway(tmp_path / "two", tiny_base, database_url=database) as two:
            key = await one.key()
            headers = {"authorization": f"Bearer {key}"}
            async with one.anonymous(headers) as first, two.anonymous(headers) as second:
                await until_status(second, 200, within_s=1.0)
                (known,) = await asyncio.to_thread(one.services.registry.keys, "acme")
                async with two.operator() as operator:
                    gone = await operator.delete(f"/v1/organization/projects/acme/api_keys/{known.id}")
                    assert gone.status_code == 200, gone.text
                assert (await second.get("/v1/models")).status_code == 401
                await until_status(first, 401, within_s=1.0)


async def until_status(client: httpx.AsyncClient, status: int, *, within_s: float) -> None:
    """within_s: of the clock the gateways share; a machine that stalls stalls them all."""
    for _ in range(round(within_s / 0.05)):
        if (await client.get("/v1/models")).status_code == status:
            return
        await asyncio.sleep(0.05)
    assert (await client.get("/v1/models")).status_code == status


async def test_an_archived_tenants_keys_and_adapters_stop(gateway: Gateway) -> None:
    async with await gateway.client() as client, gateway.operator() as operator:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await operator.post("/v1/organization/projects/acme/archive")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
    async with gateway.operator("acme") as acting:
        assert (await acting.get("/v1/models")).status_code == 404


@pytest.mark.slow
async def test_a_load_tests_auditor_finds_the_limit_exactly_kept(tmp_path: Path, tiny_base: Path) -> None:
    async with running_gateway(tmp_path / "home", tiny_base, limits={"max_in_flight": 1000}) as gateway:
        await limit(gateway, requests_per_minute=120)
        key = await gateway.key("acme", frozenset({Scope.INFERENCE}))
        scenario = make_scenario(
            tenants=[{"name": "acme"}],
            limits={"acme": {"requests_per_minute": 120, "burst": 120}},
            load={"kind": "constant", "rate_per_s": 70},
            phases=[{"name": "steady", "duration_s": 4, "audit": True}],
        )
        workload = Workload(scenario, {"acme": [gateway.services.base.name]}, load_inputs(scenario))
        async with listening(gateway.app) as url, open_client(url, {"acme": key}, timeout_s=30) as client:
            run = await execute(workload, plan_schedule(workload), client)
        found = audit_limits(run.records, ["steady"], scenario.limits)
    assert found is not None
    assert found.reasons == []
    assert found.verdict is Verdict.PASS
    (row,) = found.tenants
    assert row.refused > 50
    assert row.told == row.refused
