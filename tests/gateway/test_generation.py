"""The hot path over HTTP, on the stand-in engine."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import orjson
import pytest

from adapters.blobs import BlobStore
from adapters.peft_format import version_digest
from adapters.registry import Scope, VersionStatus
from gateway.engines.echo import EchoEngine
from gateway.engines.echo_answers import Voice
from tests.factories import make_adapter
from tests.gateway.conftest import Gateway, listening, running_gateway

MESSAGES = [{"role": "user", "content": "Hi"}]
Publish = Callable[..., Awaitable[str]]


@pytest.fixture
def publish(gateway: Gateway, tmp_path: Path) -> Publish:
    return publisher(gateway, tmp_path)


def publisher(gateway: Gateway, tmp_path: Path) -> Publish:
    """Puts a ready version straight into the registry; uploading has tests of its own."""

    async def put(name: str, *, tenant: str = "acme", text: str = "", seed: int = 0, promote: bool = False) -> str:
        await gateway.key(tenant)
        folder = make_adapter(tmp_path / f"{tenant}-{name}-{seed}", gateway.base, seed=seed)
        files = ["adapter_config.json", "adapter_model.safetensors"]
        if text:
            (folder / "echo.txt").write_text(text)
            files.append("echo.txt")
        blobs: BlobStore = gateway.services.blobs
        registry = gateway.services.registry
        version, _ = registry.add_version(
            tenant,
            name,
            digest=version_digest(folder),
            size_bytes=1,
            rank=4,
            alpha=8,
            files={file: blobs.put(folder / file) for file in files},
        )
        registry.set_status(tenant, name, version.version, VersionStatus.READY)
        if promote:
            registry.promote(tenant, name, version.version)
        await gateway.services.directory.refresh()
        return version.engine_name

    return put


def chat(model: str, **fields: object) -> dict[str, object]:
    return {"model": model, "messages": MESSAGES, **fields}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  the conditions are the engine's and the queue's, which tell no event
            await asyncio.sleep(0.005)


async def test_an_adapter_answers_under_its_own_name(gateway: Gateway, publish: Publish) -> None:
    await publish("support", text="Have you tried turning it off?")
    async with await gateway.client() as client:
        answer = await client.post("/v1/chat/completions", json=chat("support"))
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["model"] == "support"
    assert body["choices"][0]["message"]["content"] == "Have you tried turning it off?"
    assert answer.headers["x-lorikeet-adapter"] == "support@1"
    assert answer.headers["x-request-id"].startswith("req_")
    assert int(answer.headers["x-lorikeet-load-ms"]) >= 0
    assert 0 <= float(answer.headers["x-lorikeet-overhead-ms"]) < 1000


async def test_the_base_answers_to_its_name(gateway: Gateway) -> None:
    async with await gateway.client() as client:
        answer = await client.post("/v1/chat/completions", json=chat(gateway.services.base.name))
    assert answer.json()["model"] == gateway.services.base.name
    assert "base model" in answer.json()["choices"][0]["message"]["content"]


async def test_a_stream_ends_with_done_and_hides_usage_that_nobody_asked_for(
    gateway: Gateway, publish: Publish
) -> None:
    await publish("support", text="One two three.")
    async with await gateway.client() as client:
        answer = await client.post("/v1/chat/completions", json=chat("support", stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [orjson.loads(event) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == "One two three."
    assert {chunk["model"] for chunk in chunks} == {"support"}
    assert not any(chunk.get("usage") for chunk in chunks)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/completions", {"prompt": "Hi", "stream": True}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/responses", {"input": "Hi", "stream": True}),
        ("/tokenize", {"prompt": "Hi"}),
    ],
)
async def test_every_endpoint_serves_adapters(
    gateway: Gateway, publish: Publish, path: str, fields: dict[str, object]
) -> None:
    name = await publish("support", text="Hello.")
    async with await gateway.client() as client:
        answer = await client.post(path, json={"model": "support", **fields})
    assert answer.status_code == 200, answer.text
    assert name not in answer.text


async def test_unknown_and_foreign_models_are_the_same_404_everywhere(gateway: Gateway, publish: Publish) -> None:
    await publish("secret", tenant="acme")
    async with await gateway.client("globex") as client:
        seen = []
        for model in ("acme/secret", "acme/absent"):
            for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"):
                fields = {"messages": MESSAGES, "prompt": "Hi", "input": "Hi"}
                wanted = {"/v1/chat/completions": "messages", "/v1/responses": "input"}.get(path, "prompt")
                answer = await client.post(path, json={"model": model, wanted: fields[wanted]})
                seen.append((answer.status_code, answer.text.replace(model, "MODEL")))
            answers = [await client.get(f"/v1/models/{model}"), await client.delete(f"/v1/models/{model}")]
            seen += [(answer.status_code, answer.text.replace(model, "MODEL")) for answer in answers]
    assert len(set(seen)) == 1
    assert seen[0][0] == 404
    assert orjson.loads(seen[0][1])["error"]["code"] == "model_not_found"
    assert gateway.engine.requests == type(gateway.engine.requests)(
        r for r in gateway.engine.requests if r.body["model"] == "base"
    )


async def test_a_tenants_salt_reaches_the_engine_and_differs_from_another_tenants(gateway: Gateway) -> None:
    for tenant in ("acme", "globex"):
        async with await gateway.client(tenant) as client:
            await client.post("/v1/chat/completions", json=chat(gateway.services.base.name))
    salts = [seen.body.get("cache_salt") for seen in gateway.engine.requests if seen.path == "/v1/chat/completions"][
        -2:
    ]
    assert all(salts)
    assert salts[0] != salts[1]


async def test_only_a_valid_key_with_the_scope_gets_in(gateway: Gateway) -> None:
    body = chat(gateway.services.base.name)
    async with gateway.anonymous() as client:
        assert (await client.post("/v1/chat/completions", json=body)).json()["error"]["code"] == "invalid_api_key"
    async with gateway.anonymous({"authorization": "Bearer lk-wrong"}) as client:
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 401
    async with await gateway.client(scopes=frozenset({Scope.ADAPTERS_READ})) as client:
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 403


async def test_an_operator_acts_for_the_tenant_it_names(gateway: Gateway, publish: Publish) -> None:
    await publish("support")
    async with gateway.operator("acme") as client:
        assert (await client.post("/v1/chat/completions", json=chat("support"))).status_code == 200
    async with gateway.operator("nobody") as client:
        assert (await client.post("/v1/chat/completions", json=chat("support"))).status_code == 404
    async with gateway.operator() as client:
        assert (await client.post("/v1/chat/completions", json=chat("support"))).status_code == 403


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"{}", 400, "missing_value"),
        (b'{"model": 5}', 400, "missing_value"),
        (b'{"model": "tiny-llama", "messages": [], "temprature": 1}', 400, "unknown_parameter"),
    ],
)
async def test_bad_bodies_are_named(gateway: Gateway, raw: bytes, status: int, code: str) -> None:
    async with await gateway.client() as client:
        answer = await client.post("/v1/chat/completions", content=raw)
    if code == "unknown_parameter" and answer.json()["error"]["code"] == "model_not_found":
        pytest.skip("the tiny base has another slug")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}


async def test_a_body_beyond_the_limit_is_refused(gateway: Gateway) -> None:
    async with await gateway.client() as client:
        answer = await client.post("/v1/chat/completions", content=b" " * (9 * 1024 * 1024))
    assert answer.status_code == 413


async def test_the_engines_refusal_is_the_callers_to_mend(gateway: Gateway) -> None:
    async with await gateway.client() as client:
        body = {"model": gateway.services.base.name, "messages": [{"role": "user", "content": "word " * 20_000}]}
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_a_stream_that_breaks_ends_with_an_error_event_and_no_done(gateway: Gateway, publish: Publish) -> None:
    await publish("support", text="word " * 50)
    gateway.engine.token_s = 0.01
    async with await gateway.client() as client, listening(gateway.app) as url:
        headers = dict(client.headers)
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=10) as real:
            async with real.stream("POST", "/v1/chat/completions", json=chat("support", stream=True)) as answer:
                assert answer.status_code == 200
                text = ""
                async for piece in answer.aiter_text():
                    text += piece
                    if text.count("data: ") > 4:
                        gateway.engine.die()
    last = [line for line in text.split("\n\n") if line][-1]
    assert orjson.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "[DONE]" not in text


@pytest.mark.parametrize("stream", [True, False])
async def test_a_caller_who_leaves_stops_the_engine(gateway: Gateway, publish: Publish, stream: bool) -> None:
    await publish("support", text="word " * 500)
    gateway.engine.token_s = 0.01
    async with await gateway.client() as client, listening(gateway.app) as url:
        headers = dict(client.headers)
        before = gateway.engine.aborted
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=0.3) as real:
            with contextlib.suppress(httpx.ReadTimeout):  # not streamed: nothing comes within the client's patience
                async with real.stream("POST", "/v1/chat/completions", json=chat("support", stream=stream)) as answer:
                    assert await anext(answer.aiter_bytes())
                    assert stream
        async with asyncio.timeout(5):
            while gateway.engine.aborted == before:  # noqa: ASYNC110 - the engine has no event for it
                await asyncio.sleep(0.01)
    assert gateway.services.fleet.replicas[0].admission.in_flight == 0


async def test_an_adapter_the_engine_lost_is_loaded_again_within_the_request(
    gateway: Gateway, publish: Publish
) -> None:
    name = await publish("support", text="Still here.")
    async with await gateway.client() as client:
        await client.post("/v1/chat/completions", json=chat("support"))
        await gateway.engine.remove(name)
        answer = await client.post("/v1/chat/completions", json=chat("support"))
    assert answer.json()["choices"][0]["message"]["content"] == "Still here."


async def test_answers_come_from_the_version_their_header_names_while_aliases_move(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Sixteen callers, forty moves of the alias, two LoRA slots: nobody fails and nobody gets the other's words."""
    engine = lambda: EchoEngine(slots=3, token_s=0.001, load_s=0.002)  # noqa: E731
    async with running_gateway(tmp_path / "home", tiny_base, engine=engine) as gateway:
        publish = publisher(gateway, tmp_path)
        await publish("support", text="alpha " * 8, seed=1)
        await publish("support", text="omega " * 8, seed=2)
        stop = asyncio.Event()
        seen: set[str] = set()

        async def call(client: httpx.AsyncClient, stream: bool) -> None:
            while not stop.is_set():
                answer = await client.post("/v1/chat/completions", json=chat("support", stream=stream))
                assert answer.status_code == 200, answer.text
                label = answer.headers["x-lorikeet-adapter"]
                own, other = ("alpha", "omega") if label == "support@1" else ("omega", "alpha")
                assert own in answer.text
                assert other not in answer.text
                seen.add(label)

        async with await gateway.client() as client, asyncio.TaskGroup() as group:
            for number in range(16):
                group.create_task(call(client, stream=number % 2 == 0))
            for number in range(40):
                await asyncio.to_thread(gateway.services.registry.promote, "acme", "support", number % 2 + 1)
                await gateway.services.directory.refresh()
                await asyncio.sleep(0.02)
            stop.set()
        assert seen == {"support@1", "support@2"}
        assert gateway.engine.over_slots == 0


async def test_models_lists_the_base_ones_own_and_shared_adapters_only(gateway: Gateway, publish: Publish) -> None:
    await publish("support")
    await publish("secret")
    await publish("own", tenant="globex")
    await asyncio.to_thread(gateway.services.registry.share, "acme", "support", "globex")
    await gateway.services.directory.refresh()
    async with await gateway.client("globex") as client:
        listed = (await client.get("/v1/models")).json()
        assert [model["id"] for model in listed["data"]] == [gateway.services.base.name, "own", "acme/support"]
        assert (await client.get("/v1/models/acme%2Fsupport")).json()["owned_by"] == "acme"
        assert (await client.delete("/v1/models/acme%2Fsupport")).status_code == 404
        assert (await client.delete("/v1/models/own")).json() == {"id": "own", "object": "model", "deleted": True}
        assert (await client.post("/v1/chat/completions", json=chat("own"))).status_code == 404


async def test_health_readiness_metrics_and_status(gateway: Gateway) -> None:
    async with gateway.anonymous() as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).json()["ready"] is True
        exposition = (await client.get("/metrics")).text
        assert "gateway_requests_total" in exposition
        assert 'gateway_engine_ready{engine="echo"} 1.0' in exposition
        assert 'gateway_engine_waiting_requests{engine="echo"} 0.0' in exposition
        assert (await client.get("/lorikeet/status")).status_code == 401
    async with await gateway.client() as client:
        assert (await client.get("/lorikeet/status")).status_code == 403
    async with gateway.operator() as client:
        status = (await client.get("/lorikeet/status")).json()
    assert set(status) == {"url", "ready", "base_model", "engines"}
    assert set(status["engines"][0]) >= {"id", "state", "slots", "resident"}


async def test_a_revoked_key_is_refused_at_once(gateway: Gateway) -> None:
    key = await gateway.key()
    revoked = gateway.services.registry.keys("acme")[-1]
    await asyncio.to_thread(gateway.services.registry.revoke_key, revoked.id)
    await asyncio.sleep(gateway.settings.refresh_s * 3)
    async with gateway.anonymous({"authorization": f"Bearer {key}"}) as client:
        assert (await client.get("/v1/models")).status_code == 401


async def test_unknown_paths_and_methods_have_the_same_error_shape(gateway: Gateway) -> None:
    async with await gateway.client() as client:
        for answer in (await client.get("/v1/nothing"), await client.get("/v1/chat/completions")):
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_tenant_at_its_limit_waits_and_others_do_not(tmp_path: Path, tiny_base: Path) -> None:
    async with running_gateway(
        tmp_path / "home",
        tiny_base,
        engine=lambda: EchoEngine(slots=4, token_s=0.02),
        limits={"max_in_flight": 1},
    ) as gateway:
        model = gateway.services.base.name
        async with await gateway.client() as client, await gateway.client("globex") as other:
            first = asyncio.create_task(client.post("/v1/chat/completions", json=chat(model)))
            await asyncio.sleep(0.02)
            refused = await client.post("/v1/chat/completions", json=chat(model))
            assert refused.status_code == 429
            assert int(refused.headers["retry-after-ms"]) > 0
            assert (await other.post("/v1/chat/completions", json=chat(model))).status_code == 200
            assert (await first).status_code == 200


async def test_a_version_deleted_while_its_request_waits_for_a_turn_still_answers(
    gateway: Gateway, publish: Publish
) -> None:
    for name in ("one", "other"):
        await publish(name)
    await publish("support", text="Still here.")
    onboarding = gateway.services.onboarding
    onboarding.departures.grace_s = 0.0
    admission = gateway.services.fleet.replicas[0].admission
    gateway.engine.stall()
    async with await gateway.client() as client:
        running = [
            asyncio.create_task(client.post("/v1/chat/completions", json=chat(name))) for name in ("one", "other")
        ]
        await until(lambda: admission.in_flight == 2)
        queued = asyncio.create_task(client.post("/v1/chat/completions", json=chat("support")))
        await until(lambda: admission.waiting == 1)
        await onboarding.delete_adapter("acme", "support", actor="test")
        await asyncio.sleep(0.1)
        gateway.engine.wake()
        answer = await queued
        await asyncio.gather(*running)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "Still here."
    await onboarding.departures.done()
    assert not [name for name in gateway.engine.voices if name.startswith("acme/support@")]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_falls_silent_is_given_up(tmp_path: Path, tiny_base: Path, stream: bool) -> None:
    async with (
        running_gateway(tmp_path / "home", tiny_base, requests={"answer_s": 0.1, "idle_s": 0.1}) as gateway,
        await gateway.client() as client,
    ):
        gateway.engine.stall()
        async with asyncio.timeout(5):
            answer = await client.post("/v1/chat/completions", json=chat(gateway.services.base.name, stream=stream))
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "engine_stalled"
        await until(lambda: not gateway.engine.in_flight)


async def test_a_caller_that_does_not_read_loses_its_place(tmp_path: Path, tiny_base: Path) -> None:
    """More than every buffer on the way holds: the engine's stream stands still until the caller is given up."""
    endless = EchoEngine(slots=4, context_tokens=10**8)
    endless.base = Voice("base", "word " * 200_000, b"")
    async with (
        running_gateway(tmp_path / "home", tiny_base, engine=lambda: endless, requests={"unread_s": 0.1}) as gateway,
        listening(gateway.app) as url,
    ):
        headers = {"authorization": f"Bearer {await gateway.key()}"}
        body = chat(gateway.services.base.name, stream=True, max_tokens=10**7)
        async with (
            httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as client,
            client.stream("POST", "/v1/chat/completions", json=body) as answer,
        ):
            assert answer.status_code == 200
            await until(lambda: not gateway.engine.in_flight)
            assert gateway.engine.aborted == 1
            assert gateway.services.fleet.replicas[0].admission.in_flight == 0


async def test_no_body_is_read_for_a_stranger(gateway: Gateway) -> None:
    asked = False

    async def body() -> AsyncIterator[bytes]:
        nonlocal asked
        asked = True
        yield b"{}"

    async with gateway.anonymous() as client:
        assert (await client.post("/v1/chat/completions", content=body())).status_code == 401
    assert not asked


async def test_a_caller_that_leaves_within_its_own_body_is_no_failure(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    left = gateway.services.metrics.disconnects.labels("waiting")
    async with listening(gateway.app) as url:
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {await gateway.key()}\r\n"
        writer.write(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()
        await writer.wait_closed()
        await until(lambda: left._value.get() == 1)
    assert "request failed" not in caplog.text
