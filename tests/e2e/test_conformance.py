"""The official client on the real engine, and renders that must be the trainer's to the token."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest
import pytest_asyncio
from fastapi import FastAPI

from adapters.manifest import Golden, ServingDefaults
from adapters.registry import Scope
from gateway.engines.profile import BASE_NAME
from gateway.probe import template_fault
from gateway.services import Services
from tests.factories import zip_folder
from tests.gateway.conftest import listening
from tests.gateway.test_serving_defaults import with_manifest
from trainer.data.chat import Row, with_system_prompt
from trainer.template import load_renderer

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

BASE = "SmolLM2-135M-Instruct"
MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
CITY: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "look_up", "parameters": CITY, "strict": True}}
TEMPLATE = (
    "{%- for message in messages %}{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role') }}{% endif %}"
    "<|im_start|>[{{ message.role | upper }}] {{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>[ASSISTANT] {% endif %}"
)
CONVERSATIONS: list[Row] = [
    [{"role": "user", "content": "  Grüße, 世界! <|im_end|> "}],
    [
        {"role": "system", "content": "Be long."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye\n"},
    ],
]


@pytest_asyncio.fixture(loop_scope="session")
async def acme(app: FastAPI) -> AsyncIterator[openai.AsyncOpenAI]:
    services: Services = app.state.services
    services.registry.create_tenant("acme")
    scopes = [Scope.INFERENCE, Scope.ADAPTERS_READ, Scope.ADAPTERS_WRITE, Scope.CHAT_TEMPLATE]
    _, key = services.registry.create_key("acme", scopes)
    await services.directory.refresh()
    async with (
        listening(app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120) as client,
    ):
        yield client


async def test_the_engine_does_what_the_official_client_asks(acme: openai.AsyncOpenAI) -> None:
    several, once, again = await asyncio.gather(
        acme.chat.completions.create(model=BASE, messages=MESSAGES, n=2, logprobs=True, top_logprobs=2, max_tokens=6),
        *(
            acme.chat.completions.create(model=BASE, messages=MESSAGES, seed=3, temperature=1, max_tokens=6)
            for _ in range(2)
        ),
    )
    assert len(several.choices) == 2
    for choice in several.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        assert len(choice.logprobs.content[0].top_logprobs) >= 2
    assert once.choices[0].message.content == again.choices[0].message.content
    stopped = await acme.chat.completions.create(
        model=BASE, messages=MESSAGES, temperature=0, max_tokens=20, stop=[" France"]
    )
    assert stopped.choices[0].message.content == "The capital of"
    assert stopped.choices[0].finish_reason == "stop"
    completion = await acme.completions.create(model=BASE, prompt=["a", "b"], max_tokens=2, logprobs=1)
    assert len(completion.choices) == 2
    async with acme.responses.stream(model=BASE, input="Hi", max_output_tokens=4) as events:
        response = await events.get_final_response()
    assert response.output_text
    assert response.usage is not None
    assert response.usage.output_tokens == 4
    chunks = [
        chunk
        async for chunk in await acme.chat.completions.create(
            model=BASE, messages=MESSAGES, max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert all("usage" in chunk.model_fields_set for chunk in chunks)


async def test_the_engine_keeps_to_a_schema_and_calls_tools(acme: openai.AsyncOpenAI) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    chosen: Any = {"type": "function", "function": {"name": "look_up"}}
    fixed: Any = {"temperature": 0, "max_tokens": 60}
    shaped, called, streamed, response = await asyncio.gather(
        acme.chat.completions.create(model=BASE, messages=MESSAGES, response_format=schema, **fixed),
        acme.chat.completions.create(model=BASE, messages=MESSAGES, tools=[TOOL], tool_choice=chosen, **fixed),
        collect(acme, tools=[TOOL], tool_choice=chosen, **fixed),
        acme.responses.create(
            model=BASE,
            input="What is the capital of France?",
            text={"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}},
            temperature=0,
            max_output_tokens=60,
        ),
    )
    assert orjson.loads(shaped.choices[0].message.content or "").keys() == {"city"}
    assert orjson.loads(response.output_text).keys() == {"city"}
    for calls in (called.choices[0].message.tool_calls, streamed):
        assert calls
        assert calls[0].function.name == "look_up"
        assert orjson.loads(calls[0].function.arguments).keys() == {"city"}


async def collect(client: openai.AsyncOpenAI, **fields: Any) -> list[Any]:
    """The tool calls of a stream, as the client's own helper puts them together."""
    async with client.chat.completions.stream(model=BASE, messages=MESSAGES, **fields) as stream:
        return list((await stream.get_final_completion()).choices[0].message.tool_calls or ())


REFUSED: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "a schema of no known type": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
        "invalid_value",
        None,
    ),
    "a pattern that looks around": ({"extra_body": {"structured_outputs": {"regex": "(?=a)b"}}}, "invalid_value", None),
    "a picture": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}
            ]
        },
        "invalid_value",
        None,
    ),
    "a number that is none": ({"temperature": "hot"}, "invalid_value", "temperature"),
    "a number out of range": ({"temperature": -1}, "invalid_value", "temperature"),
    "a prompt that is too long": (
        {"messages": [{"role": "user", "content": "word " * 3000}]},
        "context_length_exceeded",
        "messages",
    ),
    "a token that is none": ({"logit_bias": {"9999999": 1}}, "invalid_value", "logit_bias"),
    "a budget without reasoning": ({"extra_body": {"thinking_token_budget": 4}}, "invalid_value", None),
}


async def test_what_the_engine_cannot_do_is_a_400_that_says_so(acme: openai.AsyncOpenAI) -> None:
    for name, (fields, code, param) in REFUSED.items():
        with pytest.raises(openai.BadRequestError) as refused:
            await acme.chat.completions.create(**{"model": BASE, "messages": MESSAGES, "max_tokens": 2} | fields)
        error = refused.value
        assert (error.code, error.type, error.param) == (code, "invalid_request_error", param), name
        assert "{'" not in error.message
        assert "(parameter=" not in error.message


async def test_a_version_with_its_own_template_is_asked_what_it_was_trained_on(
    acme: openai.AsyncOpenAI, base_model: Path, tmp_path: Path
) -> None:
    serving = ServingDefaults(chat_template=TEMPLATE, system_prompt="Be brief.")
    folder = with_manifest(tmp_path / "a", base_model, serving)
    raw = httpx.AsyncClient(base_url=str(acme.base_url).removesuffix("v1/"), timeout=120, headers=acme.auth_headers)
    async with raw:
        files = {"file": ("a.zip", zip_folder(folder))}
        pushed = await raw.post("/v1/adapters?wait=true", data={"name": "support"}, files=files)
        assert pushed.status_code == 201, pushed.text
        trained = {"support": load_renderer(base_model, TEMPLATE), BASE: load_renderer(base_model)}
        for name, renderer in trained.items():
            for messages in CONVERSATIONS:
                told = with_system_prompt(messages, "Be brief." if name == "support" else None)
                wanted = renderer.prompt_ids(told)
                counted = await raw.post("/tokenize", json={"model": name, "messages": messages})
                assert counted.json()["tokens"] == wanted
                body = {"model": name, "messages": messages, "max_tokens": 1, "return_token_ids": True}
                answer = (await raw.post("/v1/chat/completions", json=body)).json()
                assert answer["prompt_token_ids"] == wanted
                assert answer["usage"]["prompt_tokens"] == len(wanted)
        told = with_system_prompt([{"role": "user", "content": "Hi"}], "Be brief.")
        response = await acme.responses.create(model="support", input="Hi", max_output_tokens=1)
        assert response.usage is not None
        assert response.usage.input_tokens == len(trained["support"].prompt_ids(told))


async def test_a_template_is_tried_on_the_engine_before_anybody_is_served_with_it(
    app: FastAPI, base_model: Path
) -> None:
    engine = app.state.services.fleet.replicas[0].engine
    renderer = load_renderer(base_model, TEMPLATE)

    def golden(messages: Row) -> Golden:
        ids = renderer.prompt_ids(messages)
        return Golden(
            messages=messages,
            completion="",
            prompt_token_ids=ids,
            completion_token_ids=[1],
            logprobs=[0],
            base_logprobs=[0],
        )

    goldens = [golden(messages) for messages in CONVERSATIONS]
    assert await template_fault(engine, BASE_NAME, TEMPLATE, goldens, timeout_s=10) is None
    for template, code in ((TEMPLATE + " ", "template_mismatch"), ("{% for", "invalid_template")):
        fault = await template_fault(engine, BASE_NAME, template, goldens, timeout_s=10)
        assert fault is not None
        assert fault.code == code


async def test_a_template_that_gives_up_disturbs_nobody_else(acme: openai.AsyncOpenAI) -> None:
    """vLLM closes the connection of a request that its template could not render, right after the answer."""
    unread: Any = {"chat_template": "{% for"}

    async def ask(**fields: Any) -> int:
        try:
            await acme.chat.completions.create(model=BASE, messages=MESSAGES, max_tokens=1, **fields)
        except openai.APIStatusError as exc:
            return exc.status_code
        return 200

    for _ in range(5):
        statuses = await asyncio.gather(*(ask(extra_body=unread) if odd else ask() for odd in (1, 0, 1, 0)))
        assert statuses == [400, 200, 400, 200]
        assert await ask(extra_body=unread) == 400
        assert await ask() == 200
