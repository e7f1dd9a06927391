"""The official `openai` client, sync and async, pointed at the gateway: what an application developer sees."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from adapters.registry import Scope
from tests.factories import make_adapter, make_base, zip_folder
from tests.gateway.conftest import EVERYTHING, Gateway, listening, running_gateway

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def served(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Gateway, str]]:
    base = make_base(tmp_path_factory.mktemp("base") / "tiny")
    async with running_gateway(tmp_path / "home", base) as gateway, listening(gateway.app) as url:
        folder = make_adapter(tmp_path / "support", base)
        async with await gateway.client() as client:
            answer = await client.post(
                "/v1/adapters?wait=true", data={"name": "support"}, files={"file": ("a.zip", zip_folder(folder))}
            )
            assert answer.status_code == 201, answer.text
        yield gateway, f"{url}/v1"


@pytest.fixture
async def client(served: tuple[Gateway, str]) -> AsyncIterator[openai.AsyncOpenAI]:
    gateway, url = served
    async with openai.AsyncOpenAI(base_url=url, api_key=await gateway.key("acme"), max_retries=0) as made:
        yield made


async def test_a_chat_answer_has_text_usage_and_a_request_id(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="support", messages=MESSAGES, max_completion_tokens=8)
    assert answer.model == "support"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id is not None
    assert answer._request_id.startswith("req_")


async def test_a_stream_has_one_finish_and_usage_only_when_asked(client: openai.AsyncOpenAI) -> None:
    plain = [
        chunk async for chunk in await client.chat.completions.create(model="support", messages=MESSAGES, stream=True)
    ]
    assert [choice.finish_reason for chunk in plain for choice in chunk.choices if choice.finish_reason] == ["stop"]
    assert all(chunk.usage is None for chunk in plain)
    metered = [
        chunk
        async for chunk in await client.chat.completions.create(
            model="support", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert metered[-1].choices == []
    assert metered[-1].usage is not None


async def test_completions_and_responses_answer_too(client: openai.AsyncOpenAI) -> None:
    completion = await client.completions.create(model="support", prompt="Hi", max_tokens=4)
    assert completion.choices[0].text
    response = await client.responses.create(model="support", input="Hi")
    assert response.output_text
    assert response.model == "support"


async def test_models_are_listed_retrieved_and_deleted(client: openai.AsyncOpenAI) -> None:
    assert "support" in [model.id async for model in client.models.list()]
    assert (await client.models.retrieve("support")).owned_by == "acme"
    assert (await client.models.retrieve("acme/support@1")).owned_by == "acme"
    assert (await client.models.delete("support")).deleted
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("support")


async def test_an_unknown_model_is_a_not_found_error_with_its_code(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert (missing.value.code, missing.value.type, missing.value.param) == (
        "model_not_found",
        "invalid_request_error",
        "model",
    )
    assert missing.value.request_id is not None


async def test_errors_arrive_as_the_clients_own_classes(
    served: tuple[Gateway, str], client: openai.AsyncOpenAI
) -> None:
    gateway, url = served
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="support", messages=MESSAGES, extra_body={"temprature": 1})
    assert bad.value.param == "temprature"
    async with openai.AsyncOpenAI(base_url=url, api_key="lk-wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()
    reader = await gateway.key("acme", frozenset({Scope.ADAPTERS_READ}))
    async with openai.AsyncOpenAI(base_url=url, api_key=reader, max_retries=0) as narrow:
        with pytest.raises(openai.PermissionDeniedError):
            await narrow.models.list()


async def test_a_conflict_is_not_repeated(served: tuple[Gateway, str]) -> None:
    gateway, url = served
    async with openai.AsyncOpenAI(base_url=url, api_key=await gateway.key("acme"), max_retries=2) as patient:
        with pytest.raises(openai.ConflictError) as conflict:
            await patient.post("/adapters/support/rollback", cast_to=object)
    assert conflict.value.response.headers["x-should-retry"] == "false"


async def test_an_operator_acts_for_a_project(served: tuple[Gateway, str]) -> None:
    gateway, url = served
    key = gateway.settings.home.operator_key.read_text().strip()
    async with openai.AsyncOpenAI(base_url=url, api_key=key, project="acme", max_retries=0) as operator:
        assert "support" in [model.id async for model in operator.models.list()]


async def test_the_synchronous_client_streams(served: tuple[Gateway, str]) -> None:
    gateway, url = served
    key = await gateway.key("acme", EVERYTHING)

    def ask() -> str:
        with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
            stream = client.chat.completions.create(model="support", messages=MESSAGES, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    assert await asyncio.to_thread(ask)


async def test_a_broken_stream_raises(served: tuple[Gateway, str], client: openai.AsyncOpenAI) -> None:
    gateway, _ = served
    gateway.engine.token_s = 0.05
    stream = await client.chat.completions.create(model="support", messages=MESSAGES, stream=True)
    await anext(stream)
    gateway.engine.die()
    with pytest.raises(openai.APIError):
        [chunk async for chunk in stream]
