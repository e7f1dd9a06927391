"""What is charged, shown and told over HTTP, on the stand-in engine."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import sqlalchemy as sa
import typer
from openai.types.admin.organization.usage_completions_response import DataResultOrganizationUsageCompletionsResult
from openai.types.admin.organization.usage_costs_response import DataResultOrganizationCostsResult
from typer.testing import CliRunner

from adapters.database import open_database, writing
from adapters.ledger import Entry
from adapters.models import ChangeRow, KeyRow
from adapters.registry import Scope
from gateway.cli.usage import By, since_s, totals
from gateway.engines.echo import EchoEngine
from lorikeet import app as commands
from tests.gateway.conftest import Gateway, listening, running_gateway
from tests.gateway.test_generation import Publish, chat, publisher

PRICES = {"prices": {"input": 1e6, "cached": 0.0, "output": 2e6}, "flush_s": 0.02}
LONG = " ".join(f"word{number}" for number in range(400))
DAY_S = 86_400


@pytest.fixture
async def metered(tmp_path: Path, tiny_base: Path) -> AsyncIterator[Gateway]:
    """One unit of money for a token of the prompt, two for one of the answer."""
    async with running_gateway(tmp_path / "home", tiny_base, usage=PRICES) as running:
        yield running


@pytest.fixture
def put(metered: Gateway, tmp_path: Path) -> Publish:
    return publisher(metered, tmp_path)


async def charged(gateway: Gateway, request_id: str) -> Entry:
    """The request's row, once it has ended and is in the database."""
    for _ in range(500):
        entry = gateway.services.ledger.entry(request_id)
        if entry is not None:
            return entry
        await asyncio.sleep(0.01)
    raise AssertionError("no row")


async def one_row(gateway: Gateway) -> Entry:
    for _ in range(500):
        if request_id := asked_for(gateway):
            return await charged(gateway, request_id)
        await asyncio.sleep(0.01)
    raise AssertionError("nothing reached the engine")


def asked_for(gateway: Gateway) -> str | None:
    """The last request that reached the engine, and was not the canary's."""
    found = [seen.headers["x-request-id"] for seen in gateway.engine.requests if "x-request-id" in seen.headers]
    return found[-1] if found else None


async def test_a_plain_answer_is_charged_as_the_engine_counted(metered: Gateway, put: Publish) -> None:
    await put("support", text="one two three")
    async with await metered.client() as client:
        answer = await client.post("/v1/chat/completions", json=chat("support"))
    entry = await charged(metered, answer.headers["x-request-id"])
    used = answer.json()["usage"]
    assert (entry.prompt_tokens, entry.output_tokens) == (used["prompt_tokens"], used["completion_tokens"]) == (4, 3)
    assert (entry.tenant, entry.model, entry.version, entry.requested) == ("acme", "acme/support", 1, "support")
    assert (entry.outcome, entry.stream, entry.estimated, entry.cost) == ("ok", False, False, 10.0)
    assert entry.key_id in {key.id for key in metered.services.registry.keys("acme")}
    moments = [
        entry.queued_s,
        entry.admitted_s,
        entry.loaded_s,
        entry.sent_s,
        entry.first_s,
        entry.last_s,
        entry.ended_s,
    ]
    assert all(moment is not None for moment in moments)
    assert moments == sorted(moments, key=float)  # type: ignore[arg-type]


async def test_a_stream_is_charged_alike_whether_or_not_its_usage_was_asked_for(metered: Gateway, put: Publish) -> None:
    await put("support", text="one two three")
    async with await metered.client() as client:
        answer = await client.post("/v1/chat/completions", json=chat("support", stream=True))
    assert b'"usage"' not in answer.content
    entry = await charged(metered, answer.headers["x-request-id"])
    assert (entry.prompt_tokens, entry.output_tokens, entry.stream, entry.cost) == (4, 3, True, 10.0)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_caller_that_leaves_is_charged_what_was_made_until_then(
    tmp_path: Path, tiny_base: Path, stream: bool
) -> None:
    async with running_gateway(
        tmp_path / "home", tiny_base, engine=lambda: EchoEngine(slots=4, token_s=0.02), usage=PRICES
    ) as gateway:
        await publisher(gateway, tmp_path)("support", text=LONG)
        async with listening(gateway.app) as url, httpx.AsyncClient(base_url=url) as client:
            client.headers["authorization"] = f"Bearer {await gateway.key()}"
            with pytest.raises(httpx.TimeoutException):
                async with asyncio.timeout(5):
                    await leave(client, chat("support", stream=stream))
            entry = await one_row(gateway)
    assert gateway.engine.aborted == 1
    assert (entry.outcome, entry.prompt_tokens, entry.estimated) == ("cancelled", 4, False)
    assert 1 <= entry.output_tokens < 200
    assert entry.cost == 4 + 2 * entry.output_tokens


async def leave(client: httpx.AsyncClient, body: dict[str, object]) -> None:
    """After half a second, whatever has come."""
    timeout = httpx.Timeout(0.5)
    async with client.stream("POST", "/v1/chat/completions", json=body, timeout=timeout) as answer:
        begun = time.monotonic()
        async for _ in answer.aiter_bytes():
            if time.monotonic() - begun > 0.3:
                raise httpx.ReadTimeout("enough")


async def test_an_engine_that_dies_mid_stream_leaves_an_estimate_that_says_so(tmp_path: Path, tiny_base: Path) -> None:
    async with running_gateway(
        tmp_path / "home", tiny_base, engine=lambda: EchoEngine(slots=4, token_s=0.01), usage=PRICES
    ) as gateway:
        await publisher(gateway, tmp_path)("support", text=LONG)
        async with await gateway.client() as client:
            asked = asyncio.create_task(client.post("/v1/chat/completions", json=chat("support", stream=True)))
            while not gateway.engine.in_flight:  # noqa: ASYNC110 - the engine has no event for it
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            gateway.engine.die()
            answer = await asked
        entry = await charged(gateway, answer.headers["x-request-id"])
    events = answer.content.count(b"word")
    assert (entry.outcome, entry.estimated, entry.output_tokens) == ("engine_unavailable", True, events)
    assert entry.prompt_tokens > 0


async def test_a_refused_request_has_a_row_and_costs_nothing(metered: Gateway, put: Publish) -> None:
    await put("support")
    metered.host.state = "restarting"
    async with await metered.client() as client:
        answer = await client.post(
            "/v1/chat/completions", json=chat("support"), headers={"x-lorikeet-deadline-ms": "50"}
        )
        assert answer.status_code == 503
        entry = await charged(metered, answer.headers["x-request-id"])
        assert (entry.sent_s, entry.cost, entry.outcome) == (None, 0.0, answer.json()["error"]["code"])
        listing = await client.get("/v1/organization/usage/completions", params={"start_time": 0, "limit": 1})
    assert all(bucket["results"] == [] for bucket in listing.json()["data"])


async def test_counting_tokens_is_no_generation(metered: Gateway, put: Publish) -> None:
    await put("support")
    async with await metered.client() as client:
        answer = await client.post("/tokenize", json={"model": "support", "prompt": "a b c"})
    assert answer.json()["count"] == 3
    assert await metered.services.usage.find(answer.headers["x-request-id"]) is None


async def ask(gateway: Gateway, tenant: str, model: str = "support", times: int = 1) -> str:
    async with await gateway.client(tenant) as client:
        for _ in range(times):
            answer = await client.post("/v1/chat/completions", json=chat(model))
            assert answer.status_code == 200, answer.text
    await charged(gateway, answer.headers["x-request-id"])
    return answer.headers["x-request-id"]


def today() -> int:
    return int(time.time()) // DAY_S * DAY_S


async def test_the_official_client_reads_usage_and_costs(metered: Gateway, put: Publish) -> None:
    await put("support", text="one two three")
    await put("support", tenant="beta", text="one")
    await ask(metered, "acme", times=2)
    await ask(metered, "beta")
    key = metered.settings.home.operator_key.read_text().strip()
    async with listening(metered.app) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", admin_api_key=key) as client:
        resource = client.admin.organization.usage
        page = await resource.completions(start_time=today(), group_by=["project_id", "model"], bucket_width="1d")
        spent = await resource.costs(start_time=today(), group_by=["project_id"])
    results = [result for bucket in page.data for result in bucket.results]
    assert all(isinstance(result, DataResultOrganizationUsageCompletionsResult) for result in results)
    assert [(r.project_id, r.model, r.num_model_requests, r.input_tokens, r.output_tokens) for r in results] == [  # type: ignore[union-attr]
        ("acme", "acme/support", 2, 8, 6),
        ("beta", "beta/support", 1, 4, 1),
    ]
    amounts = {r.project_id: r.amount for bucket in spent.data for r in bucket.results}  # type: ignore[union-attr]
    assert {name: (amount.value, amount.currency) for name, amount in amounts.items()} == {  # type: ignore[union-attr]
        "acme": (20.0, "usd"),
        "beta": (6.0, "usd"),
    }
    assert isinstance(spent.data[-1].results[0], DataResultOrganizationCostsResult)


async def test_a_tenant_sees_its_own_usage_with_any_key_and_nobody_elses(metered: Gateway, put: Publish) -> None:
    await put("support")
    await put("support", tenant="beta")
    await ask(metered, "acme")
    await ask(metered, "beta")

    async def seen(client: httpx.AsyncClient, **params: str) -> list[str]:
        answer = await client.get(
            "/v1/organization/usage/completions",
            params={"start_time": today(), "group_by": "project_id", **params},
        )
        assert answer.status_code == 200, answer.text
        return [result["project_id"] for bucket in answer.json()["data"] for result in bucket["results"]]

    async with await metered.client("beta", frozenset({Scope.ADAPTERS_READ})) as beta, metered.operator() as operator:
        assert await seen(beta) == ["beta"]
        assert await seen(beta, project_ids="acme") == []
        assert await seen(operator) == ["acme", "beta"]
        assert await seen(operator, project_ids="acme") == ["acme"]
    async with metered.operator("acme") as acting:
        assert await seen(acting) == ["acme"]
    assert (await metered.anonymous().get("/v1/organization/costs?start_time=0")).status_code == 401


async def test_a_key_with_neither_a_tenant_nor_the_scope_admin_sees_and_may_nothing(
    metered: Gateway, put: Publish
) -> None:
    """None is made any more, but a registry may hold one."""
    await put("support")
    request_id = await ask(metered, "acme")
    lost = await metered.key("beta")
    database = open_database(metered.settings.registry_url)
    with writing(database) as session:
        session.execute(sa.update(KeyRow).where(KeyRow.tenant == "beta").values(tenant=None))
        session.execute(sa.update(ChangeRow).values(value=ChangeRow.value + 1))
    database.dispose()
    await metered.services.directory.refresh()
    headers = {"authorization": f"Bearer {lost}"}
    async with metered.anonymous(headers) as alone, metered.anonymous(headers | {"openai-project": "acme"}) as acting:
        for path in ("organization/costs?start_time=0", f"requests/{request_id}", "adapters", "models"):
            for client in (alone, acting):
                answer = await client.get(f"/v1/{path}")
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "permission_denied"), path


async def test_costs_by_line_item_add_up(metered: Gateway, put: Publish) -> None:
    await put("support", text="one two three")
    await ask(metered, "acme")
    async with await metered.client() as client:
        answer = await client.get("/v1/organization/costs", params={"start_time": today(), "group_by[]": "line_item"})
    items = {result["line_item"]: result["amount"]["value"] for result in answer.json()["data"][-1]["results"]}
    assert items == {"acme/support, input": 4.0, "acme/support, output": 6.0}


async def test_pages_of_buckets_follow_each_other_without_gap(metered: Gateway) -> None:
    path, start, found, page = "/v1/organization/usage/completions", 1_700_000_040, [], None
    async with metered.operator() as client:
        for _ in range(4):
            query = f"start_time={start + 7}&end_time={start + 601}&bucket_width=1m&limit=3"
            answer = (await client.get(f"{path}?{query}" + (f"&page={page}" if page else ""))).json()
            found += [(bucket["start_time"], bucket["end_time"]) for bucket in answer["data"]]
            page = answer["next_page"]
            assert answer["has_more"] is (page is not None)
    assert found == [(start + 60 * number, start + 60 * number + 60) for number in range(11)]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("", "start_time"),
        ("start_time=-1", "start_time"),
        ("start_time=x", "start_time"),
        ("start_time=0&bucket_width=2d", "bucket_width"),
        ("start_time=0&limit=32", "limit"),
        ("start_time=0&group_by=colour", "group_by"),
        ("start_time=0&colour=red", "colour"),
        ("start_time=0&batch=true", "batch"),
    ],
)
async def test_what_cannot_be_answered_is_named(metered: Gateway, query: str, param: str) -> None:
    async with metered.operator() as client:
        answer = await client.get(f"/v1/organization/usage/completions?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_a_request_tells_where_its_time_went(tmp_path: Path, tiny_base: Path) -> None:
    async with running_gateway(
        tmp_path / "home", tiny_base, engine=lambda: EchoEngine(slots=4, token_s=0.03), usage=PRICES
    ) as gateway:
        await publisher(gateway, tmp_path)("support", text="a b c d e f g h")
        request_id = await ask(gateway, "acme")
        async with await gateway.client() as client:
            told = (await client.get(f"/v1/requests/{request_id}")).json()
    assert [moment["event"] for moment in told["timeline"]] == [
        *("received", "queued", "admitted", "loaded", "sent", "first_token", "last_token", "ended")
    ]
    after = [moment["after_ms"] for moment in told["timeline"]]
    assert after == sorted(after)
    assert sum(told["parts_ms"].values()) == pytest.approx(after[-1], abs=0.1)
    assert told["slowest"]["part"] == "first_token"  # of a plain answer the first token is seen with the last
    assert (told["status"], told["adapter"], told["replica"]) == ("ok", "acme/support@1", "echo")


async def test_a_request_in_flight_is_told_of_too(tmp_path: Path, tiny_base: Path) -> None:
    async with running_gateway(tmp_path / "home", tiny_base, usage=PRICES) as gateway:
        await publisher(gateway, tmp_path)("support")
        gateway.engine.stall()
        async with await gateway.client() as client:
            asked = asyncio.create_task(client.post("/v1/chat/completions", json=chat("support")))
            while (request_id := asked_for(gateway)) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            async with asyncio.timeout(30):  # until it has waited for longer than the adapter's load took
                told = (await client.get(f"/v1/requests/{request_id}")).json()
                while told["slowest"]["part"] != "first_token":
                    await asyncio.sleep(0.05)
                    told = (await client.get(f"/v1/requests/{request_id}")).json()
            gateway.engine.wake()
            await asked
    assert (told["status"], told["in_progress"]) == ("in_progress", True)
    assert told["timeline"][-1]["event"] == "sent"


async def test_anothers_request_cannot_be_told_from_one_that_never_was(metered: Gateway, put: Publish) -> None:
    await put("support")
    request_id = await ask(metered, "acme")
    async with await metered.client("beta") as beta, metered.operator() as operator:
        foreign, unknown = [await beta.get(f"/v1/requests/{name}") for name in (request_id, "req_0")]
        assert foreign.status_code == unknown.status_code == 404
        assert foreign.text.replace(request_id, "req_0") == unknown.text
        assert (await operator.get(f"/v1/requests/{request_id}")).status_code == 200


async def test_the_commands_show_usage_and_a_request(
    metered: Gateway, put: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put("support", text="one two three")
    request_id = await ask(metered, "acme", times=3)
    monkeypatch.setenv("LORIKEET_HOME", str(metered.settings.home.root))
    monkeypatch.delenv("LORIKEET_API_KEY", raising=False)

    async def run(*arguments: str) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, commands, arguments)
        assert result.exit_code == 0, (result.output, result.exception)
        return result.stdout

    async with listening(metered.app) as url:
        monkeypatch.setenv("LORIKEET_URL", url)
        by_adapter = json.loads(await run("usage", "--by", "adapter", "--json"))["data"]
        assert by_adapter == [
            {
                "adapter": "acme/support",
                "requests": 3,
                "input_tokens": 12,
                "input_cached_tokens": 0,
                "output_tokens": 9,
                "cost": {"value": 30.0, "currency": "usd"},
            }
        ]
        assert json.loads(await run("usage", "--tenant", "beta", "--json"))["data"] == []
        assert "acme" in await run("usage", "--by", "tenant", "--since", "2d")
        assert "Slowest:" in await run("requests", request_id)
        assert json.loads(await run("requests", request_id, "--json"))["id"] == request_id


def test_a_table_adds_up_the_buckets() -> None:
    def bucket(start: int, requests: int) -> dict[str, Any]:
        amounts = dict.fromkeys(("input_tokens", "input_cached_tokens", "output_tokens"), 1)
        result = amounts | {"num_model_requests": requests, "project_id": "acme", "model": "acme/support"}
        return {"start_time": start, "results": [result | {"amount": {"value": 0.5, "currency": "eur"}}]}

    found = [bucket(0, 1), bucket(DAY_S, 2), {"start_time": 2 * DAY_S, "results": []}]
    assert [(row["day"], row["requests"]) for row in totals(found, By.DAY)] == [("1970-01-01", 1), ("1970-01-02", 2)]
    (row,) = totals(found, By.TENANT)
    assert (row["requests"], row["cost"]["value"]) == (3, 1.0)


def test_since_is_a_date_or_an_age() -> None:
    now = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()
    assert since_s("2026-11-01", now) == datetime(2026, 11, 1, tzinfo=UTC).timestamp()
    assert since_s("36h", now) == now - 36 * 3600
    for wrong in ("yesterday", "", "d", "7", "-7d"):
        with pytest.raises(typer.BadParameter):
            since_s(wrong, now)
