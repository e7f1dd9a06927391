"""What Prometheus is told, and who may ask."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from adapters.ledger import Entry
from adapters.registry import Scope
from gateway.engines.echo import EchoEngine
from gateway.errors import EngineUnavailableError
from gateway.gaps import Gaps
from gateway.metrics import OTHER, Metrics, Names
from gateway.pulse import BEAT_S, beat
from gateway.telling import tell_ended
from tests.gateway.conftest import Gateway, running_gateway
from tests.gateway.test_generation import Publish, chat, publisher, until

Series = dict[str, float]


async def read(client: httpx.AsyncClient, path: str = "/metrics") -> Series:
    """Every sample by its name and labels, as `name{a="b"}`, labels sorted."""
    answer = await client.get(path)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    return series(answer.text)


def series(page: str) -> Series:
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


@pytest.fixture
def publish(gateway: Gateway, tmp_path: Path) -> Publish:
    return publisher(gateway, tmp_path)


async def test_an_adapters_requests_tokens_and_times_are_told_under_its_name(
    gateway: Gateway, publish: Publish
) -> None:
    await publish("support", text="one two three four")
    async with await gateway.client() as client:
        for _ in range(2):
            await client.post("/v1/chat/completions", json=chat("support", stream=True))
    async with gateway.anonymous() as client:
        found = await read(client)
    assert found['gateway_requests_total{adapter="acme/support",outcome="ok",route="chat/completions"}'] == 2
    assert found['gateway_time_to_first_token_seconds_count{adapter="acme/support",adapter_state="cold"}'] == 1
    assert found['gateway_time_to_first_token_seconds_count{adapter="acme/support",adapter_state="warm"}'] == 1
    assert found['gateway_inter_token_latency_seconds_count{adapter="acme/support"}'] > 2
    assert found['gateway_tokens_total{adapter="acme/support",type="output"}'] > 2
    assert found['gateway_tenant_tokens_total{tenant="acme",type="input"}'] > 0
    assert found['gateway_adapter_lookups_total{engine="echo",result="miss"}'] == 1
    assert found['gateway_adapter_lookups_total{engine="echo",result="hit"}'] == 1
    assert found['gateway_load_stall_seconds_count{engine="echo"}'] == 1
    assert found['gateway_engine_starts_total{engine="echo"}'] == 1
    assert found['gateway_canary_failures_total{engine="echo"}'] == 0


async def test_an_adapter_taken_out_for_another_is_counted(gateway: Gateway, publish: Publish) -> None:
    name = await publish("support")
    async with await gateway.client() as client:
        await client.post("/v1/chat/completions", json=chat("support"))
    await gateway.services.fleet.replicas[0].residency.forget(name)
    async with gateway.anonymous() as client:
        found = await read(client)
    assert found['gateway_adapter_evictions_total{engine="echo",reason="unused"}'] == 1


async def test_refusals_are_counted_by_reason_and_tenant_before_and_after_the_model_is_known(
    gateway: Gateway, publish: Publish
) -> None:
    await publish("support")
    async with gateway.anonymous({"authorization": "Bearer lk-wrong"}) as client:
        await client.post("/v1/chat/completions", json=chat("support"))
    async with await gateway.client() as client:
        await client.post("/v1/chat/completions", json=chat("nobody"))
        await client.post("/v1/chat/completions", json=chat("support", nonsense=1))
        gateway.host.state = "failed"
        await client.post("/v1/chat/completions", json=chat("support"))
    async with gateway.anonymous() as client:
        found = await read(client)
    assert found['gateway_refusals_total{reason="invalid_api_key",tenant="_unknown"}'] == 1
    assert found['gateway_refusals_total{reason="model_not_found",tenant="acme"}'] == 1
    assert found['gateway_refusals_total{reason="no_replica",tenant="acme"}'] == 1
    assert sum(value for name, value in found.items() if name.startswith("gateway_refusals_total")) == 4


async def test_a_deadline_that_cannot_be_met_is_a_reason_of_its_own(tmp_path: Path, tiny_base: Path) -> None:
    """Callers get the code of an overload for both."""
    slow = lambda: EchoEngine(slots=4, token_s=0.2)  # noqa: E731
    async with running_gateway(tmp_path / "home", tiny_base, engine=slow) as gateway:
        await publisher(gateway, tmp_path)("support", text="a b c d e f g h")
        async with await gateway.client() as client:
            running = [
                asyncio.create_task(client.post("/v1/chat/completions", json=chat("support", stream=True)))
                for _ in range(40)
            ]
            replica = gateway.services.fleet.replicas[0]
            await until(lambda: replica.admission.waiting > 0)
            answer = await client.post(
                "/v1/chat/completions", json=chat("support"), headers={"x-lorikeet-deadline-ms": "50"}
            )
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_is_overloaded")
        async with gateway.anonymous() as client:
            found = await read(client)
        assert found['gateway_refusals_total{reason="deadline",tenant="acme"}'] == 1


@given(names=st.lists(st.text(max_size=3)), limit=st.integers(1, 5))
def test_a_label_never_has_more_values_than_its_limit_and_one(names: list[str], limit: int) -> None:
    known = Names(limit)
    labels = [known.label(name) for name in names]
    assert len({*labels} - {OTHER}) <= limit
    assert [known.label(name) for name in names[:limit]] == labels[:limit]
    assert all(label in (name, OTHER) for name, label in zip(names, labels, strict=True))


def test_the_page_stays_of_a_bounded_size_with_thousands_of_adapters_and_tenants() -> None:
    metrics = Metrics.create(max_adapters=10, max_tenants=10)
    sizes = []
    for number in range(3000):
        gaps = Gaps()
        gaps.add(0.01)
        entry = ended(model=f"tenant-{number}/adapter", tenant=f"tenant-{number}")
        tell_ended(entry, metrics, gaps=gaps, queue_s=0.0, load_s=0.1 * (number % 2), failure=None)
        if number in (100, 2999):
            sizes.append(len(metrics.exposition().splitlines()))
    assert sizes[0] == sizes[1] < 3000
    found = series(metrics.exposition().decode())
    assert found['gateway_requests_total{adapter="_other",outcome="ok",route="completions"}'] == 2990
    assert found['gateway_tenant_tokens_total{tenant="_other",type="output"}'] == 2990 * 5
    assert found['gateway_inter_token_latency_seconds_count{adapter="_other"}'] == 2990


def ended(*, model: str = "acme/support", tenant: str = "acme", outcome: str = "ok") -> Entry:
    return Entry(
        request_id="req_1",
        received_ms=0,
        route="completions",
        tenant=tenant,
        key_id="key",
        model=model,
        version=1,
        requested="support",
        replica="echo",
        stream=True,
        outcome=outcome,
        prompt_tokens=3,
        cached_tokens=1,
        output_tokens=5,
        queued_s=0.0,
        admitted_s=0.1,
        loaded_s=0.2,
        sent_s=0.2,
        first_s=0.3,
        last_s=0.4,
        ended_s=0.5,
    )


async def test_a_loop_that_is_held_up_is_seen() -> None:
    late: list[float] = []
    beating = asyncio.create_task(beat(late.append))
    await asyncio.sleep(BEAT_S / 2)
    end_s = asyncio.get_running_loop().time() + 3 * BEAT_S
    while asyncio.get_running_loop().time() < end_s:
        pass
    await until(lambda: bool(late))
    beating.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await beating
    assert late[0] > BEAT_S


async def test_the_engines_page_is_theirs_with_an_engine_label(gateway: Gateway) -> None:
    async with gateway.anonymous() as client:
        found = await read(client, "/metrics/engines")
    assert found['gateway_engine_page{engine="echo"}'] == 1
    assert any(name.startswith('vllm:num_requests_running{engine="echo"') for name in found)


class SilentEngine(EchoEngine):
    async def metrics(self) -> str:
        await asyncio.sleep(3600)
        return ""


class AbsentEngine(EchoEngine):
    async def metrics(self) -> str:
        raise EngineUnavailableError("away")


@pytest.mark.parametrize("engine", [SilentEngine, AbsentEngine])
async def test_an_engine_that_does_not_answer_costs_its_page_and_a_bounded_time(
    engine: type[EchoEngine], tmp_path: Path, tiny_base: Path
) -> None:
    async with running_gateway(tmp_path / "home", tiny_base, engine=engine, metrics={"engine_s": 0.1}) as gateway:
        async with gateway.anonymous() as client, asyncio.timeout(10):
            assert await read(client, "/metrics/engines") == {'gateway_engine_page{engine="echo"}': 0}


@pytest.fixture
async def exposed(tmp_path: Path, tiny_base: Path) -> AsyncIterator[Gateway]:
    """A gateway that others than this machine can connect to."""
    async with running_gateway(tmp_path / "home", tiny_base, host="0.0.0.0") as gateway:  # noqa: S104 - never bound
        yield gateway


@pytest.mark.parametrize("path", ["/metrics", "/metrics/engines"])
async def test_beyond_this_machine_metrics_are_for_operators(exposed: Gateway, path: str) -> None:
    async with exposed.anonymous() as client:
        refused = await client.get(path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    async with await exposed.client(scopes=frozenset(Scope) - {Scope.ADMIN}) as client:
        assert (await client.get(path)).status_code == 403
    async with exposed.operator() as client:
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/metrics/engines"])
async def test_a_metrics_key_opens_metrics_and_nothing_else(tmp_path: Path, tiny_base: Path, path: str) -> None:
    async with running_gateway(tmp_path / "home", tiny_base, metrics={"key": "scrape me"}) as gateway:
        async with gateway.anonymous() as client:
            assert (await client.get(path)).status_code == 401
        async with gateway.anonymous({"authorization": "Bearer scrape me"}) as client:
            assert (await client.get(path)).status_code == 200
            assert (await client.get("/lorikeet/status")).status_code == 401
        async with gateway.operator() as client:
            assert (await client.get(path)).status_code == 200
