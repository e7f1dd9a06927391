"""The official `openai` client, sync and async, pointed at the gateway: what an application developer sees."""

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.contract.conftest import Served
from tests.factories import make_adapter
from tests.gateway.conftest import EVERYTHING

pytestmark = pytest.mark.slow  # the official client against a whole gateway

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


async def test_a_chat_answer_has_text_usage_and_a_request_id(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="support", messages=MESSAGES, max_completion_tokens=8)
    assert answer.model == "support"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id is not None
    assert answer._request_id.startswith("req_")


async def test_a_stream_has_one_finish_one_id_and_a_request_id(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="support", messages=MESSAGES, stream=True)
    assert stream.response.headers["x-request-id"].startswith("req_")
    chunks = [chunk async for chunk in stream]
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["stop"]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"


async def test_usage_is_null_on_each_chunk_but_the_last_for_who_asked_and_absent_for_who_did_not(
    client: openai.AsyncOpenAI,
) -> None:
    plain = [
        chunk async for chunk in await client.chat.completions.create(model="support", messages=MESSAGES, stream=True)
    ]
    assert not any("usage" in chunk.model_fields_set for chunk in plain)
    metered = [
        chunk
        async for chunk in await client.chat.completions.create(
            model="support", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert all("usage" in chunk.model_fields_set for chunk in metered)
    assert [chunk.usage for chunk in metered[:-1]] == [None] * (len(metered) - 1)
    assert metered[-1].choices == []
    assert metered[-1].usage is not None
    completion = [
        chunk
        async for chunk in await client.completions.create(
            model="support", prompt="Hi", stream=True, stream_options={"include_usage": True}
        )
    ]
    assert [chunk.usage is None for chunk in completion] == [True] * (len(completion) - 1) + [False]


async def test_several_choices_come_whole_streamed_or_not(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="support", messages=MESSAGES, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = dict.fromkeys(range(3), "")
    finished = []
    async for chunk in await client.chat.completions.create(model="support", messages=MESSAGES, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finished += [choice.index] if choice.finish_reason else []
    assert sorted(finished) == [0, 1, 2]
    assert list(texts.values()) == [choice.message.content for choice in answer.choices]
    completion = await client.completions.create(model="support", prompt=["a", "b"], n=2)
    assert len(completion.choices) == 4


async def test_log_probabilities_come_with_their_alternatives(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="support", messages=MESSAGES, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    assert all(entry.logprob < 0 and len(entry.top_logprobs) == 2 for entry in logprobs.content)
    completion = await client.completions.create(model="support", prompt="Hi", logprobs=1)
    assert completion.choices[0].logprobs is not None
    assert completion.choices[0].logprobs.token_logprobs


async def test_a_stop_string_ends_the_answer_before_it(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="support", messages=MESSAGES)
    cut = await client.chat.completions.create(model="support", messages=MESSAGES, stop=["and"])
    text = whole.choices[0].message.content
    assert text is not None
    assert cut.choices[0].message.content == text.split("and")[0].rstrip()


async def test_what_shapes_an_answer_reaches_the_engine_as_sent(served: Served, client: openai.AsyncOpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    await client.chat.completions.create(
        model="support", messages=MESSAGES, seed=7, tools=tools, tool_choice="auto", response_format=schema
    )
    body = served.gateway.engine.requests[-1].body
    assert (body["seed"], body["tools"], body["tool_choice"], body["response_format"]) == (7, tools, "auto", schema)


async def test_completions_and_responses_answer_too(client: openai.AsyncOpenAI) -> None:
    completion = await client.completions.create(model="support", prompt="Hi", max_tokens=4)
    assert completion.choices[0].text
    response = await client.responses.create(model="support", input="Hi")
    assert response.output_text
    assert response.model == "support"
    assert response._request_id is not None


async def test_a_response_streams_typed_events_to_its_completion(client: openai.AsyncOpenAI) -> None:
    events: list[Any] = [
        event async for event in await client.responses.create(model="support", input="Hi", stream=True)
    ]
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text
    assert events[-1].response.model == "support"
    async with client.responses.stream(model="support", input="Hi") as stream:
        assert (await stream.get_final_response()).output_text == text


async def test_models_are_listed_retrieved_and_deleted(client: openai.AsyncOpenAI) -> None:
    assert "support" in [model.id async for model in client.models.list()]
    assert (await client.models.retrieve("support")).owned_by == "acme"
    assert (await client.models.retrieve("acme/support@1")).owned_by == "acme"
    assert (await client.models.delete("support")).deleted
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("support")


async def test_a_model_is_deleted_by_every_name_it_is_retrieved_by(
    served: Served, client: openai.AsyncOpenAI, tmp_path: Path
) -> None:
    await served.upload(make_adapter(tmp_path / "second", served.gateway.base, seed=1), "support")
    assert (await client.models.delete("support@2")).id == "support@2"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("support@2")
    with pytest.raises(openai.PermissionDeniedError):
        await client.models.delete(served.gateway.services.base.name)
    assert (await client.models.delete("acme/support")).deleted
    assert [model.owned_by async for model in client.models.list()] == ["lorikeet"]


async def test_an_operator_acts_for_a_project(served: Served) -> None:
    key = served.gateway.settings.home.operator_key.read_text().strip()
    async with openai.AsyncOpenAI(base_url=served.url, api_key=key, project="acme", max_retries=0) as operator:
        assert "support" in [model.id async for model in operator.models.list()]


async def test_the_synchronous_client_answers_streams_and_fails_alike(served: Served) -> None:
    key = await served.gateway.key("acme", EVERYTHING)

    def ask() -> tuple[str | None, str]:
        with openai.OpenAI(base_url=served.url, api_key=key, max_retries=0) as client:
            answer = client.chat.completions.create(model="support", messages=MESSAGES)
            stream = client.chat.completions.create(model="support", messages=MESSAGES, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
            with pytest.raises(openai.NotFoundError) as missing:
                client.chat.completions.create(model="nobody", messages=MESSAGES)
            assert missing.value.code == "model_not_found"
            return answer.choices[0].message.content, text

    whole, streamed = await asyncio.to_thread(ask)
    assert whole == streamed


async def test_a_broken_stream_raises(served: Served, client: openai.AsyncOpenAI) -> None:
    served.gateway.engine.token_s = 0.05
    stream = await client.chat.completions.create(model="support", messages=MESSAGES, stream=True)
    await anext(stream)
    served.gateway.engine.die()
    with pytest.raises(openai.APIError):
        [chunk async for chunk in stream]
