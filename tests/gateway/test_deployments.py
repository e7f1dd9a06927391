"""Versions with an engine of their own, over HTTP, on stand-in engines."""

import asyncio
from pathlib import Path
from typing import Any

import httpx

from adapters.manifest import Golden
from adapters.records import Deployment
from adapters.registry import Scope
from gateway.engines.echo import EchoEngine
from gateway.engines.profile import dedicated_profile, engine_arguments, load_profile
from gateway.errors import EngineStartError
from tests.adapters.test_registry import make_manifest
from tests.gateway.conftest import EVERYTHING, EchoHost, Gateway, listening, running_gateway
from tests.gateway.test_generation import chat, publisher, until

MERGED, ADAPTER = "I am merged.", "I am an adapter."
DIGEST = "e" * 64
KEY = ("acme", "support", 1)


async def store(gateway: Gateway, text: str = MERGED) -> str:
    """A merged form of acme's support@1, with files as an engine needs them here; its digest."""
    form = await asyncio.to_thread(
        gateway.services.registry.add_form,
        *KEY,
        digest=DIGEST,
        scheme="bfloat16",
        size_bytes=1,
        report={"rungs": []},
    )
    folder = gateway.settings.home.merged / form.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "echo.txt").write_text(text)
    return form.digest


async def deploy(gateway: Gateway, share: float = 1.0, **fields: Any) -> httpx.Response:
    async with gateway.operator("acme") as client:
        body = {"adapter": "support", "version": 1, "digest": DIGEST, "share": share}
        return await client.post("/v1/deployments", json=body | fields)


async def deployed(gateway: Gateway, tmp_path: Path, share: float = 1.0) -> EchoHost:
    """support@1 as an adapter and on an engine of its own, both ready."""
    await publisher(gateway, tmp_path)("support", text=ADAPTER)
    await store(gateway)
    answer = await deploy(gateway, share)
    assert answer.status_code == 201, answer.text
    await until(lambda: bool(gateway.dedicated))
    host = next(iter(gateway.dedicated.values()))
    await until(lambda: host.state == "ready")
    return host


async def undeploy(gateway: Gateway) -> httpx.Response:
    async with gateway.operator("acme") as client:
        return await client.delete("/v1/deployments/support/1")


async def state(gateway: Gateway) -> dict[str, Any]:
    async with gateway.operator("acme") as client:
        found: dict[str, Any] = (await client.get("/v1/deployments/support/1")).json()
        return found


async def ask(client: httpx.AsyncClient, model: str = "support", **fields: object) -> tuple[str, str | None]:
    """What was answered, and by which form."""
    answer = await client.post("/v1/chat/completions", json=chat(model, **fields))
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return answer.json()["choices"][0]["message"]["content"], answer.headers.get("x-lorikeet-form")


async def test_without_a_deployment_nothing_is_said_of_forms(gateway: Gateway, tmp_path: Path) -> None:
    await publisher(gateway, tmp_path)("support", text=ADAPTER)
    async with await gateway.client() as client:
        assert await ask(client) == (ADAPTER, None)
        assert await ask(client, "support#adapter") == (ADAPTER, None)


async def test_every_request_goes_to_the_versions_own_engine_at_a_share_of_one(
    gateway: Gateway, tmp_path: Path
) -> None:
    host = await deployed(gateway, tmp_path)
    assert isinstance(host.engine, EchoEngine)
    async with await gateway.client() as client:
        assert await ask(client) == (MERGED, "merged")
        assert await ask(client, "support@1") == (MERGED, "merged")
        answer = await client.post("/v1/chat/completions", json=chat("support", stream=True))
        assert (answer.headers["x-lorikeet-form"], '"model":"support"' in answer.text) == ("merged", True)
        told = (await client.get(f"/v1/requests/{answer.headers['x-request-id']}")).json()
    seen = host.engine.requests[-1]
    salt = gateway.services.directory.snapshot.tenants["acme"].cache_salt
    assert (seen.body["model"], seen.body["cache_salt"]) == ("base", salt)
    assert (told["form"], told["replica"], told["adapter"]) == ("merged", host.id, "acme/support@1")
    assert gateway.engine.loads == 0 or not gateway.engine.in_flight


async def test_none_goes_there_at_a_share_of_nought_but_who_insists(gateway: Gateway, tmp_path: Path) -> None:
    await deployed(gateway, tmp_path, share=0.0)
    async with await gateway.client() as client:
        assert [await ask(client) for _ in range(5)] == [(ADAPTER, "adapter")] * 5
        assert await ask(client, "support#merged") == (MERGED, "merged")
        assert await ask(client, "support@1#merged") == (MERGED, "merged")
        answer = await client.post("/v1/chat/completions", json=chat("support#merged"))
    assert answer.headers["x-lorikeet-adapter"] == "support@1#merged"


async def test_a_share_between_is_a_canary_between_the_two_forms(gateway: Gateway, tmp_path: Path) -> None:
    await deployed(gateway, tmp_path, share=0.5)
    draws = iter([0.0, 0.49, 0.5, 0.99])
    gateway.services.deployments._draw = lambda: next(draws)
    async with await gateway.client() as client:
        assert [form for _, form in [await ask(client) for _ in range(4)]] == ["merged", "merged", "adapter", "adapter"]
        assert await ask(client, "support#adapter") == (ADAPTER, "adapter")
    assert (await state(gateway))["requests"] == {"merged": 2, "adapter": 3}
    assert (await deploy(gateway, 0.1)).json()["share"] == 0.1
    await until(lambda: [one.deployment.share for one in gateway.services.deployments.running] == [0.1])
    assert len(gateway.dedicated) == 1
    async with gateway.anonymous() as client:
        page = (await client.get("/metrics")).text
    assert 'gateway_form_requests_total{adapter="acme/support",form="merged",outcome="ok"} 2.0' in page


async def test_a_form_that_is_not_there_is_a_model_that_is_not_there(gateway: Gateway, tmp_path: Path) -> None:
    await publisher(gateway, tmp_path)("support", text=ADAPTER)
    async with await gateway.client() as client:
        for model in ("support#other", "support#", "nobody#merged", "support@2#merged", "support#merged"):
            answer = await client.post("/v1/chat/completions", json=chat(model))
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), model


async def test_the_adapter_answers_while_its_versions_engine_is_away(gateway: Gateway, tmp_path: Path) -> None:
    host = await deployed(gateway, tmp_path)
    host.kill()
    async with await gateway.client() as client:
        assert await ask(client) == (ADAPTER, "adapter")
        await host.come_back()
        assert await ask(client) == (MERGED, "merged")


async def test_the_adapter_answers_when_the_engine_dies_under_the_request(gateway: Gateway, tmp_path: Path) -> None:
    host = await deployed(gateway, tmp_path)
    assert isinstance(host.engine, EchoEngine)
    host.engine.die()  # nobody has noticed yet
    async with await gateway.client() as client:
        assert await ask(client, max_tokens=50) == (ADAPTER, "adapter")
        answer = await client.post("/v1/chat/completions", json=chat("support", stream=True))
    assert answer.headers["x-lorikeet-form"] == "adapter"
    assert answer.text.endswith("data: [DONE]\n\n")


async def test_who_insists_on_the_merged_form_is_told_when_it_is_away(tmp_path: Path, tiny_base: Path) -> None:
    async with running_gateway(tmp_path / "home", tiny_base, requests={"queue_s": 0.2}) as gateway:
        host = await deployed(gateway, tmp_path)
        host.kill()
        async with await gateway.client() as client:
            answer = await client.post("/v1/chat/completions", json=chat("support#merged"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica")


async def test_a_stream_ends_whole_while_its_engine_is_taken_down(tmp_path: Path, tiny_base: Path) -> None:
    slow = running_gateway(tmp_path / "home", tiny_base, engine=lambda: EchoEngine(slots=4, token_s=0.01))
    async with slow as gateway, listening(gateway.app) as url:
        host = await deployed(gateway, tmp_path)
        headers = {"authorization": f"Bearer {await gateway.key()}"}
        async with httpx.AsyncClient(base_url=url, headers=headers) as client:
            body = chat("support", stream=True, max_tokens=60, ignore_eos=True)
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                lines = response.aiter_lines()
                await anext(lines)
                assert (await undeploy(gateway)).json()["deleted"] is True
                await until(lambda: [one.state for one in gateway.services.deployments.running] == ["draining"])
                assert await ask(client) == (ADAPTER, None)
                assert host.state == "ready"
                rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        await until(lambda: not gateway.services.deployments.running)
        assert host.state == "stopped"
        async with gateway.anonymous() as client:
            page = (await client.get("/metrics")).text
    assert f'gateway_engine_ready{{engine="{host.id}"}}' not in page


async def test_what_is_being_taken_down_comes_back_when_it_is_gone(gateway: Gateway, tmp_path: Path) -> None:
    first = await deployed(gateway, tmp_path)
    async with first.held_up():
        await undeploy(gateway)
        await until(lambda: [one.state for one in gateway.services.deployments.running] == ["draining"])
        assert (await deploy(gateway)).status_code == 201
        await asyncio.sleep(3 * gateway.settings.refresh_s)
        assert list(gateway.dedicated.values()) == [first]  # two engines cannot have one socket
    await until(lambda: next(iter(gateway.dedicated.values())) is not first)
    async with await gateway.client() as client:
        await until(lambda: next(iter(gateway.dedicated.values())).state == "ready")
        assert await ask(client) == (MERGED, "merged")


async def test_a_gateway_that_starts_again_brings_its_engines_back(tmp_path: Path, tiny_base: Path) -> None:
    async with running_gateway(tmp_path / "home", tiny_base) as gateway:
        host = await deployed(gateway, tmp_path)
    assert host.state == "stopped"
    async with running_gateway(tmp_path / "home", tiny_base) as again:
        await until(lambda: [one.state for one in again.dedicated.values()] == ["ready"])
        async with await again.client() as client:
            assert await ask(client) == (MERGED, "merged")


async def test_a_gateway_without_the_files_serves_the_adapter(gateway: Gateway, tmp_path: Path) -> None:
    await publisher(gateway, tmp_path)("support", text=ADAPTER)
    await store(gateway)
    folder = gateway.settings.home.merged / "acme/support@1-eeeeeeee"
    folder.rename(tmp_path / "elsewhere")
    assert (await deploy(gateway)).json()["state"] == "elsewhere"
    async with await gateway.client() as client:
        assert await ask(client) == (ADAPTER, None)
        answer = await client.post("/v1/chat/completions", json=chat("support#merged"))
    assert answer.status_code == 503


async def test_goldens_that_are_not_those_of_training_keep_an_engine_from_traffic(
    gateway: Gateway, tmp_path: Path
) -> None:
    golden = Golden(
        messages=[{"role": "user", "content": "Hi"}],
        completion="there",
        prompt_token_ids=[5, 6, 7],
        completion_token_ids=[8, 9],
        logprobs=[-90.0, -90.0],
        base_logprobs=[-1.0, -1.0],
    )
    await publisher(gateway, tmp_path)("support", text=ADAPTER)
    await store(gateway)
    version = gateway.services.registry.version(*KEY)
    object.__setattr__(version, "manifest_source", make_manifest().model_copy(update={"goldens": [golden]}))
    gateway.services.registry.version = lambda *_, **__: version  # type: ignore[method-assign]  # it came without a manifest
    await deploy(gateway)
    await until(lambda: any(one.problem for one in gateway.services.deployments.running))
    found = await state(gateway)
    assert found["state"] == "failed"
    assert "goldens of support@1" in found["problem"]
    async with await gateway.client() as client:
        assert await ask(client) == (ADAPTER, "adapter")


async def test_an_engine_that_cannot_even_be_tried_is_told_of(gateway: Gateway, tmp_path: Path) -> None:
    def refuse(deployment: Deployment, number: int) -> Any:
        raise EngineStartError(f"{deployment.adapter} needs device {number}, and there is none.")

    await publisher(gateway, tmp_path)("support", text=ADAPTER)
    await store(gateway)
    gateway.services.deployments._open = refuse
    await deploy(gateway)
    await until(lambda: bool(gateway.services.deployments.problems))
    found = await state(gateway)
    assert (found["state"], found["problem"]) == ("failed", "support needs device 1, and there is none.")


async def test_tenants_see_their_own_and_operators_all(gateway: Gateway, tmp_path: Path) -> None:
    await deployed(gateway, tmp_path)
    async with await gateway.client() as client:
        (own,) = (await client.get("/v1/deployments")).json()["data"]
        assert (own["id"], own["state"], own["scheme"]) == ("support@1", "ready", "bfloat16")
        assert not own.keys() & {"problem", "memory"}
        body = {"adapter": "support", "version": 1, "digest": DIGEST}
        refused = [await client.post("/v1/deployments", json=body), await client.delete("/v1/deployments/support/1")]
        assert [answer.status_code for answer in refused] == [403, 403]
    async with await gateway.client("globex") as client:
        assert (await client.get("/v1/deployments")).json()["data"] == []
        answer = await client.get("/v1/deployments/support/1")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "deployment_not_found")
        assert (await client.post("/v1/chat/completions", json=chat("acme/support#merged"))).status_code == 404
    async with await gateway.client("acme", EVERYTHING - {Scope.ADAPTERS_READ}) as client:
        assert (await client.get("/v1/deployments")).status_code == 403
    async with gateway.operator() as client:
        assert [one["tenant"] for one in (await client.get("/v1/deployments")).json()["data"]] == ["acme"]
        engines = (await client.get("/lorikeet/status")).json()["engines"]
    assert [one.get("serves") for one in engines] == [None, "acme/support@1"]


async def test_deleting_is_refused_while_the_version_has_an_engine_and_takes_its_files_afterwards(
    gateway: Gateway, tmp_path: Path
) -> None:
    await deployed(gateway, tmp_path)
    gateway.services.onboarding.departures.grace_s = 0.0
    folder = gateway.settings.home.merged / "acme/support@1-eeeeeeee"
    async with await gateway.client() as client:
        answer = await client.delete("/v1/adapters/support")
        assert (answer.status_code, "lorikeet undeploy support@1" in answer.text) == (409, True)
        await undeploy(gateway)
        assert (await client.delete("/v1/adapters/support")).status_code == 200
    await gateway.services.onboarding.departures.done()
    assert not folder.exists()


async def test_what_cannot_be_wanted_is_refused(gateway: Gateway, tmp_path: Path) -> None:
    await publisher(gateway, tmp_path)("support")
    await store(gateway)
    refused: list[tuple[dict[str, Any], int, str | None]] = [
        ({"share": 1.5}, 400, "share"),
        ({"profile": {"name": "x"}}, 400, "profile"),
        ({"digest": "f" * 64}, 409, None),
    ]
    for fields, status, param in refused:
        answer = await deploy(gateway, **({"share": 1.0} | fields))
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert gateway.services.directory.snapshot.deployments == {}


def test_an_engine_of_a_merged_version_is_started_without_lora() -> None:
    shared = load_profile("cpu")
    own = dedicated_profile(shared)
    arguments = engine_arguments(own, model=Path("/m"), socket=Path("/s"))
    assert not [part for part in arguments if "lora" in part]
    assert (own.max_in_flight, own.kv_cache_bytes) == (16, 512 << 20)
    assert (own.env, own.name) == (shared.env, "cpu-merged")
