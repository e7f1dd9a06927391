"""Engines that end, fail or hang under requests: who is served all the same, who is told, and what is left behind."""

import asyncio
import contextlib
import gc
import random
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import httpx
import orjson
import pytest

from gateway.engines.echo import EchoEngine
from tests.gateway.conftest import EchoHost, Gateway, listening, running_gateway
from tests.gateway.test_generation import Publish, chat, publisher, until


@pytest.fixture
async def pair(tmp_path: Path, tiny_base: Path) -> AsyncIterator[Gateway]:
    """Two replicas."""
    async with running_gateway(tmp_path / "home", tiny_base, engines=2) as running:
        yield running


@pytest.fixture
def publish(pair: Gateway, tmp_path: Path) -> Publish:
    return publisher(pair, tmp_path)


def engine_of(host: EchoHost) -> EchoEngine:
    assert isinstance(host.engine, EchoEngine)
    return host.engine


def busy(gateway: Gateway) -> EchoHost:
    """The one host whose engine generates now."""
    (host,) = [host for host in gateway.hosts if engine_of(host).in_flight]
    return host


def idle(host: EchoHost) -> bool:
    return not engine_of(host).in_flight


def stall(gateway: Gateway) -> None:
    for host in gateway.hosts:
        engine_of(host).stall()


def leftovers(gateway: Gateway) -> dict[str, int]:
    """Everything that has to be nothing when nobody asks for anything."""
    gc.collect()  # a lock that a load has failed under lives as long as the failure's traceback
    fleet, drain = gateway.services.fleet, gateway.services.drain
    found = {"waiting for an engine": fleet.waiting, "working": drain.working, "cuttable": len(drain._cuttable)}
    for replica in fleet.replicas:
        residency, admission = replica.residency, replica.admission
        found |= {
            f"{replica.id} in flight": admission.in_flight,
            f"{replica.id} waiting": admission.waiting,
            f"{replica.id} calls": len(admission._calls) + len(admission._admitted),
            f"{replica.id} adapters": len(admission._scheduler.adapters_in_flight),
            f"{replica.id} tenants": len(admission._scheduler._waiting_tenants)
            + len(admission._scheduler._running_tenants),
            f"{replica.id} claims": residency.claimed,
            f"{replica.id} leases": len(residency._leases),
            f"{replica.id} locks": len(residency._locks),
            f"{replica.id} trials": int(replica.breaker._trying),
        }
    return {what: count for what, count in found.items() if count}


async def nothing_is_left(gateway: Gateway) -> None:
    """At once, or soon: a sweep may just be trying again what production needs."""
    await until(lambda: not leftovers(gateway))


async def test_both_replicas_work(pair: Gateway) -> None:
    stall(pair)
    async with await pair.client() as client:
        body = chat(pair.services.base.name)
        asked = [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for _ in range(6)]
        await until(lambda: sum(sum(engine_of(host).in_flight.values()) for host in pair.hosts) == 6)
        assert [sum(engine_of(host).in_flight.values()) for host in pair.hosts] == [3, 3]
        for host in pair.hosts:
            engine_of(host).wake()
        assert {(await answer).status_code for answer in asked} == {200}
        assert set((await client.get("/readyz")).json()["engines"]) == {"echo-0", "echo-1"}
    await nothing_is_left(pair)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_whose_engine_dies_before_a_byte_went_out_is_answered_by_another(
    pair: Gateway, publish: Publish, stream: bool
) -> None:
    await publish("support", text="Still here.")
    stall(pair)
    async with await pair.client() as client:
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=chat("support", stream=stream)))
        await until(lambda: any(engine_of(host).in_flight for host in pair.hosts))
        victim = busy(pair)
        for host in pair.hosts:
            engine_of(host).wake()
        victim.kill()
        answer = await asked
    assert answer.status_code == 200, answer.text
    assert "error" not in answer.text
    assert stream or answer.json()["choices"][0]["message"]["content"] == "Still here."
    assert pair.services.metrics.failovers.labels(victim.id)._value.get() == 1
    await nothing_is_left(pair)


async def test_those_in_the_queue_of_an_engine_that_ends_are_answered_by_another(
    pair: Gateway, publish: Publish
) -> None:
    for name in ("one", "two", "three"):  # one slot each for traffic: the third waits
        await publish(name, text=f"I am {name}.")
    stall(pair)
    async with await pair.client() as client:
        asked = [
            asyncio.create_task(client.post("/v1/chat/completions", json=chat(name)))
            for name in ("one", "two", "three", "one", "two", "three")
        ]
        replicas = pair.services.fleet.replicas
        await until(lambda: sum(r.admission.waiting + r.admission.in_flight for r in replicas) == 6)
        victim = next(replica for replica in replicas if replica.admission.waiting)
        for host in pair.hosts:
            engine_of(host).wake()
        next(host for host in pair.hosts if host.id == victim.id).kill()
        answers = [await answer for answer in asked]
    assert [answer.status_code for answer in answers] == [200] * 6
    await nothing_is_left(pair)


async def test_a_stream_that_has_begun_is_not_begun_again_elsewhere(pair: Gateway, publish: Publish) -> None:
    await publish("support", text="word " * 200)
    for host in pair.hosts:
        engine_of(host).token_s = 0.01
    async with await pair.client() as client, listening(pair.app) as url:
        async with httpx.AsyncClient(base_url=url, headers=dict(client.headers), timeout=10) as real:
            async with real.stream("POST", "/v1/chat/completions", json=chat("support", stream=True)) as answer:
                text = ""
                async for piece in answer.aiter_text():
                    text += piece
                    if text.count("data: ") == 3:
                        busy(pair).kill()
    last = [line for line in text.split("\n\n") if line][-1]
    assert orjson.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert text.count('"role"') == 1
    await nothing_is_left(pair)


async def test_with_a_single_engine_a_request_waits_for_its_restart(tmp_path: Path, tiny_base: Path) -> None:
    async with running_gateway(tmp_path / "home", tiny_base) as gateway, await gateway.client() as client:
        body = chat(gateway.services.base.name)
        gateway.engine.stall()
        caught = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await until(lambda: bool(gateway.engine.in_flight))
        gateway.host.kill()
        newcomer = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await until(lambda: gateway.services.fleet.waiting == 2)
        await gateway.host.come_back()
        answers = [await caught, await newcomer]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert int(answers[0].headers["x-lorikeet-queue-ms"]) > 0
        await nothing_is_left(gateway)


async def test_nobody_waits_for_an_engine_beyond_its_deadline(tmp_path: Path, tiny_base: Path) -> None:
    async with running_gateway(tmp_path / "home", tiny_base) as gateway, await gateway.client() as client:
        gateway.host.kill()
        headers = {"x-lorikeet-deadline-ms": "100"}
        answer = await client.post("/v1/chat/completions", json=chat(gateway.services.base.name), headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica")
        assert 0 < int(answer.headers["retry-after-ms"]) <= 60_000
        await nothing_is_left(gateway)


async def test_a_request_that_ends_one_engine_after_the_other_is_given_up(tmp_path: Path, tiny_base: Path) -> None:
    async with running_gateway(tmp_path / "home", tiny_base, engines=3) as gateway, await gateway.client() as client:
        stall(gateway)
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=chat(gateway.services.base.name)))
        for _ in range(2):
            await until(lambda: any(engine_of(host).in_flight for host in gateway.hosts))
            host = busy(gateway)
            host.kill()
            await until(partial(idle, host))
        answer = await asked
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        assert [host.state for host in gateway.hosts].count("ready") == 1


async def test_an_engine_that_is_dead_inside_loses_its_requests_to_another(pair: Gateway) -> None:
    async with await pair.client() as client:
        engine_of(pair.hosts[0]).die_inside()
        answers = [
            await client.post("/v1/chat/completions", json=chat(pair.services.base.name, stream=stream))
            for stream in (True, False) * 5
        ]
        assert [answer.status_code for answer in answers] == [200] * 10
        assert all("error" not in answer.text for answer in answers)
        readiness = await client.get("/readyz")
        assert readiness.status_code == 200
        exposition = (await client.get("/metrics")).text
    await nothing_is_left(pair)
    assert 'gateway_engine_breaker_open{engine="echo-1"} 0.0' in exposition


async def test_an_engine_that_fails_again_and_again_is_left_alone_and_tried_after_a_while(
    tmp_path: Path, tiny_base: Path
) -> None:
    async with (
        running_gateway(
            tmp_path / "home",
            tiny_base,
            failure={"breaker_failures": 2, "breaker_open_s": 0.3, "failovers": 0},
            canary={"interval_s": 3600},
        ) as gateway,
        await gateway.client() as client,
    ):
        body = chat(gateway.services.base.name)
        (replica,) = gateway.services.fleet.replicas
        gateway.engine.die_inside()
        for _ in range(2):
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 503
        assert not replica.available
        assert (await client.get("/readyz")).status_code == 503
        async with gateway.operator() as operator:
            assert (await operator.get("/lorikeet/status")).json()["engines"][0]["breaker"] in ("open", "half-open")
        started = gateway.engine.started
        waiting = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await until(lambda: gateway.services.fleet.waiting == 1)
        assert gateway.engine.started == started
        gateway.engine.restart()  # well again by itself: no new process that would be told of
        assert (await waiting).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        await nothing_is_left(gateway)


async def test_readiness_is_told_while_an_engine_is_yet_to_be_tried_again(tmp_path: Path, tiny_base: Path) -> None:
    failure = {"breaker_failures": 1, "breaker_open_s": 0.05, "failovers": 0}
    async with (
        running_gateway(tmp_path / "home", tiny_base, failure=failure, canary={"interval_s": 3600}) as gateway,
        await gateway.client() as client,
    ):
        body = chat(gateway.services.base.name)
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        gateway.engine.die_inside()
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 503
        await until(lambda: gateway.services.fleet.replicas[0].available)
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["ready_since"]) == (200, None)


async def test_callers_mistakes_and_refused_adapters_do_not_open_the_breaker(tmp_path: Path, tiny_base: Path) -> None:
    async with (
        running_gateway(tmp_path / "home", tiny_base, failure={"breaker_failures": 1}) as gateway,
        await gateway.client() as client,
    ):
        name = await publisher(gateway, tmp_path)("support")
        gateway.engine.refuse(name)
        assert (await client.post("/v1/chat/completions", json=chat("support"))).status_code == 503
        body = {"model": gateway.services.base.name, "messages": [{"role": "user", "content": "word " * 20_000}]}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 400
        assert gateway.services.fleet.replicas[0].available
        await nothing_is_left(gateway)


async def test_ready_means_that_an_answer_came_lately(tmp_path: Path, tiny_base: Path) -> None:
    async with (
        running_gateway(tmp_path / "home", tiny_base, failure={"proof_s": 0.2}, canary={"interval_s": 0.05}) as gateway,
        gateway.anonymous() as client,
    ):
        ready = (await client.get("/readyz")).json()
        assert ready["ready"]
        assert ready["ready_since"] > 1_700_000_000
        gateway.engine.stall()  # it still says that it is well
        await until(lambda: not gateway.services.ready)
        assert gateway.host.state == "ready"
        assert (await client.get("/readyz")).json()["ready_since"] is None
        gateway.engine.wake()
        await until(lambda: gateway.services.ready)


async def test_a_deadline_that_the_queue_cannot_meet_is_refused_at_once(tmp_path: Path, tiny_base: Path) -> None:
    async with running_gateway(
        tmp_path / "home", tiny_base, engine=lambda: EchoEngine(slots=4, token_s=0.05)
    ) as gateway:
        for name in ("one", "two", "three"):
            await publisher(gateway, tmp_path)(name, text="a b c d")
        admission = gateway.services.fleet.replicas[0].admission
        async with await gateway.client() as client, await gateway.client("globex") as other:
            await client.post("/v1/chat/completions", json=chat("one"))
            gateway.engine.stall()
            running = [
                asyncio.create_task(client.post("/v1/chat/completions", json=chat(name))) for name in ("one", "two")
            ]
            await until(lambda: admission.in_flight == 2)
            refused = await client.post(
                "/v1/chat/completions", json=chat("three"), headers={"x-stainless-read-timeout": "0.02"}
            )
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_is_overloaded")
            assert 0 < int(refused.headers["retry-after-ms"]) <= 60_000
            base = chat(gateway.services.base.name)
            gateway.engine.wake()
            served = await other.post("/v1/chat/completions", json=base, headers={"x-lorikeet-deadline-ms": "20000"})
            assert served.status_code == 200
            wrong = await other.post("/v1/chat/completions", json=base, headers={"x-lorikeet-deadline-ms": "soon"})
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "x-lorikeet-deadline-ms")
            assert {answer.status_code for answer in await asyncio.gather(*running)} == {200}
        await nothing_is_left(gateway)


@pytest.mark.slow
async def test_after_any_mix_of_leaving_killing_and_deleting_nothing_is_held(tmp_path: Path, tiny_base: Path) -> None:
    """Twelve rounds of a seeded storm over two engines; after each, every counter is back at nothing."""
    async with running_gateway(
        tmp_path / "home",
        tiny_base,
        engines=2,
        engine=lambda: EchoEngine(slots=3, token_s=0.002, load_s=0.002),
        requests={"queue_s": 5, "patience_s": 0.05, "max_queue": 8, "tenant_queue": 5},
        residency={"retire_grace_s": 0, "sweep_s": 0.02, "reconcile_s": 0.05, "stall_share": 1.0},
        failure={"breaker_failures": 3, "breaker_open_s": 0.05},
    ) as gateway:
        publish = publisher(gateway, tmp_path)
        for number, name in enumerate(("one", "two", "three", "four")):
            await publish(name, text="word " * (5 + number), seed=number)
        clients = [await gateway.client("acme"), await gateway.operator("acme").__aenter__()]
        for seed in range(12):
            await storm(gateway, clients, publish, random.Random(seed))
            for host in gateway.hosts:
                if host.state != "ready" or not await host.engine.healthy():
                    await host.come_back()
            await nothing_is_left(gateway)
            answer = await clients[0].post("/v1/chat/completions", json=chat(gateway.services.base.name))
            assert answer.status_code == 200, (seed, answer.text)
        assert all(len(replica.residency._used_s) <= 8 for replica in gateway.services.fleet.replicas)
        for client in clients:
            await client.aclose()


async def storm(gateway: Gateway, clients: list[httpx.AsyncClient], publish: Publish, chance: random.Random) -> None:
    async def ask(client: httpx.AsyncClient) -> None:
        model = chance.choice(["one", "two", "three", "four", "passing", gateway.services.base.name])
        headers = {"x-lorikeet-deadline-ms": str(chance.randrange(5, 3000))} if chance.random() < 0.3 else {}
        body = chat(model, stream=chance.random() < 0.5)
        answer = await client.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code in (200, 404, 429, 503), answer.text

    asking: list[asyncio.Task[None]] = []
    for step in range(40):
        match chance.choices(["ask", "leave", "kill", "rot", "back", "lose", "delete"], [30, 6, 2, 1, 4, 2, 1])[0]:
            case "ask":
                asking.append(asyncio.create_task(ask(chance.choice(clients))))
            case "leave" if asking:
                chance.choice(asking).cancel()
            case "kill":
                chance.choice(gateway.hosts).kill()
            case "rot":
                engine_of(chance.choice(gateway.hosts)).die_inside()
            case "back":
                host = chance.choice(gateway.hosts)
                if host.state != "ready":
                    await host.come_back()
            case "lose":
                engine_of(chance.choice(gateway.hosts)).voices.clear()
            case "delete":
                await publish("passing", seed=1000 + chance.randrange(10**6) + step)
                with contextlib.suppress(Exception):
                    await gateway.services.onboarding.delete_adapter("acme", "passing", actor="test")
        await asyncio.sleep(chance.random() * 0.01)
    for host in gateway.hosts:
        if host.state != "ready" or not await host.engine.healthy():
            await host.come_back()
    done = await asyncio.gather(*asking, return_exceptions=True)
    assert not [result for result in done if isinstance(result, AssertionError)], done
