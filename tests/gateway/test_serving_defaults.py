"""Behaviour that travels with a version: its manifest's serving section, from the upload to what the engine is asked."""

from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from adapters.base import read_base
from adapters.manifest import Golden, Manifest, ServingDefaults, write_manifest
from adapters.registry import Scope
from gateway.engines.echo import EchoEngine
from gateway.probe import template_fault
from tests.factories import make_adapter, zip_folder
from tests.gateway.conftest import EVERYTHING, Gateway

TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
ASKED = [{"role": "user", "content": "Hi"}]
TRUSTED = EVERYTHING | {Scope.CHAT_TEMPLATE}


def with_manifest(folder: Path, base: Path, serving: ServingDefaults) -> Path:
    manifest = Manifest(
        name="support",
        base=read_base(base).fingerprint,
        rank=4,
        alpha=8,
        target_modules=["q_proj"],
        created_at=1,
        base_licence="Apache-2.0",
        serving=serving,
    )
    write_manifest(manifest, make_adapter(folder, base))
    return folder


async def push(client: httpx.AsyncClient, folder: Path) -> httpx.Response:
    files = {"file": ("a.zip", zip_folder(folder))}
    return await client.post("/v1/adapters?wait=true", data={"name": "support"}, files=files)


async def tokens(client: httpx.AsyncClient, **fields: Any) -> list[int]:
    answer = await client.post("/tokenize", json={"model": "support", **fields})
    assert answer.status_code == 200, answer.text
    ids: list[int] = answer.json()["tokens"]
    return ids


async def test_each_version_answers_with_its_own_behaviour(gateway: Gateway, tmp_path: Path) -> None:
    served = {
        "support@1": ServingDefaults(system_prompt="Be brief.", temperature=0.0, max_tokens=5),
        "support@2": ServingDefaults(stop=["END"], top_k=3),
    }
    async with await gateway.client() as client:
        for name, serving in served.items():
            answer = await push(client, with_manifest(tmp_path / name, gateway.base, serving))
            assert answer.status_code == 201, answer.text
        for name in served:
            answer = await client.post("/v1/chat/completions", json={"model": name, "messages": ASKED})
            assert answer.status_code == 200, answer.text
    first, second = (request.body for request in list(gateway.engine.requests)[-2:])
    assert first["messages"] == [{"role": "system", "content": "Be brief."}, *ASKED]
    assert (first["temperature"], first["max_tokens"]) == (0.0, 5)
    assert second["messages"] == ASKED
    assert (second["stop"], second["top_k"]) == (["END"], 3)


async def test_tokenize_counts_what_a_chat_is_charged(gateway: Gateway, tmp_path: Path) -> None:
    serving = ServingDefaults(chat_template=TEMPLATE, system_prompt="Be brief.")
    async with await gateway.client(scopes=TRUSTED) as client:
        answer = await push(client, with_manifest(tmp_path / "a", gateway.base, serving))
        assert answer.status_code == 201, answer.text
        counted = await tokens(client, messages=ASKED)
        chat = await client.post("/v1/chat/completions", json={"model": "support", "messages": ASKED})
        response = await client.post("/v1/responses", json={"model": "support", "input": "Hi"})
        base = await client.post("/tokenize", json={"model": gateway.services.base.name, "messages": ASKED})
    assert chat.json()["usage"]["prompt_tokens"] == len(counted) > len(base.json()["tokens"])
    assert response.json()["usage"]["input_tokens"] == len(counted)


async def test_only_a_trusted_key_uploads_a_template_and_then_everybody_gets_it(
    gateway: Gateway, tmp_path: Path
) -> None:
    folder = with_manifest(tmp_path / "a", gateway.base, ServingDefaults(chat_template=TEMPLATE))
    async with await gateway.client() as untrusted, await gateway.client(scopes=TRUSTED) as trusted:
        refused = await push(untrusted, folder)
        assert refused.status_code == 403
        assert "chat-template" in refused.json()["error"]["message"]
        assert (await untrusted.get("/v1/adapters")).json()["data"] == []
        assert (await push(trusted, folder)).status_code == 201
        body = {"model": "support", "messages": ASKED}
        assert (await untrusted.post("/v1/chat/completions", json=body)).status_code == 200
        assert gateway.engine.requests[-1].body["chat_template"] == TEMPLATE
        own = await untrusted.post("/v1/chat/completions", json={**body, "chat_template": "x"})
        assert own.status_code == 403
        fixed = await trusted.post("/v1/chat/completions", json={**body, "chat_template": "x"})
        assert (fixed.status_code, fixed.json()["error"]["code"]) == (400, "fixed_parameter")


async def test_a_template_that_renders_goldens_otherwise_than_training_did_is_found() -> None:
    engine = EchoEngine()
    async with engine.open("/tokenize", orjson.dumps({"messages": ASKED, "chat_template": TEMPLATE})) as asked:
        ids = orjson.loads(await asked.read())["tokens"]
    golden = Golden(
        messages=ASKED, completion="", prompt_token_ids=ids, completion_token_ids=[1], logprobs=[-1], base_logprobs=[-2]
    )
    assert await template_fault(engine, "base", TEMPLATE, [golden], timeout_s=5) is None
    fault = await template_fault(engine, "base", f"Once more. {TEMPLATE}", [golden], timeout_s=5)
    assert fault is not None
    assert fault.code == "template_mismatch"


async def test_a_template_the_engine_cannot_read_is_refused(gateway: Gateway, tmp_path: Path) -> None:
    folder = with_manifest(tmp_path / "a", gateway.base, ServingDefaults(chat_template="{% for"))
    async with await gateway.client(scopes=TRUSTED) as client:
        answer = await push(client, folder)
    assert answer.status_code == 422
    assert [fault["code"] for fault in answer.json()["error"]["faults"]] == ["invalid_template"]


@pytest.mark.parametrize("field", ["temperature", "max_tokens", "chat_template", "overridable"])
async def test_a_serving_section_that_means_nothing_is_refused_by_name(
    gateway: Gateway, tmp_path: Path, field: str
) -> None:
    folder = with_manifest(tmp_path / "a", gateway.base, ServingDefaults())
    manifest = orjson.loads((folder / "manifest.json").read_bytes())
    manifest["serving"][field] = {"temperature": 9, "max_tokens": 0, "chat_template": "x" * 70_000}.get(
        field, ["model"]
    )
    (folder / "manifest.json").write_bytes(orjson.dumps(manifest))
    async with await gateway.client(scopes=TRUSTED) as client:
        answer = await push(client, folder)
    assert answer.status_code == 422
    assert any(field in fault["where"] for fault in answer.json()["error"]["faults"])
