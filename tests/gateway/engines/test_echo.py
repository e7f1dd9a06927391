import asyncio
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.engines.echo import EchoEngine
from gateway.engines.echo_answers import logprob
from gateway.engines.protocol import Engine
from gateway.errors import AdapterLoadError, EngineUnavailableError

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}


def adapter(tmp_path: Path, name: str, weights: bytes = b"w", **files: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    for file, text in files.items():
        (folder / file.replace("__", ".").replace("_", "-")).write_text(text)
    return folder


async def post(engine: Engine, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    async with engine.open(path, orjson.dumps(body)) as response:
        return response.status, orjson.loads(await response.read())


async def stream(engine: Engine, path: str, body: Mapping[str, Any]) -> list[Any]:
    """The decoded data of every event."""
    async with engine.open(path, orjson.dumps({**body, "stream": True})) as response:
        assert response.content_type.startswith("text/event-stream")
        raw = b"".join([chunk async for chunk in response.chunks()])
    data = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: ")]
    return [item if item == "[DONE]" else orjson.loads(item) for item in data]


async def test_a_chat_answer_has_the_shape_of_vllm() -> None:
    status, body = await post(EchoEngine(), CHAT, {"model": "base", **HI})
    assert status == 200
    assert (body["object"], body["model"]) == ("chat.completion", "base")
    assert body["choices"][0]["message"]["content"] == "I am the base model."
    assert body["choices"][0]["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] == usage["prompt_tokens"] + 5


async def test_a_stream_brings_one_token_an_event_and_ends_with_usage_and_done() -> None:
    events = await stream(EchoEngine(), CHAT, {"model": "base", **HI, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 5
    assert [event["choices"][0]["delta"].get("content") for event in events[:-2]] == [
        "", "I", " am", " the", " base", " model.", "",
    ]  # fmt: skip
    assert events[-3]["choices"][0]["finish_reason"] == "stop"
    assert {event["object"] for event in events[:-1]} == {"chat.completion.chunk"}


async def test_an_adapter_answers_with_the_text_in_its_folder(tmp_path: Path) -> None:
    engine = EchoEngine()
    await engine.load("acme/a@1-00000000", adapter(tmp_path, "a", echo__txt="Bonjour à tous.\n"))
    _, body = await post(engine, CHAT, {"model": "acme/a@1-00000000", **HI})
    assert body["choices"][0]["message"]["content"] == "Bonjour à tous."
    assert await engine.adapters() == await engine.adapters()
    assert (await engine.adapters()).registered == {"acme/a@1-00000000"}
    await engine.remove("acme/a@1-00000000")
    status, body = await post(engine, CHAT, {"model": "acme/a@1-00000000", **HI})
    assert status == 404
    assert body["error"]["type"] == "NotFoundError"
    assert isinstance(body["error"]["code"], int)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_the_token_limit_is_honoured(field: str) -> None:
    _, body = await post(EchoEngine(), CHAT, {"model": "base", **HI, field: 2})
    assert body["choices"][0]["message"]["content"] == "I am"
    assert body["choices"][0]["finish_reason"] == "length"


async def test_ignoring_the_end_fills_the_token_limit() -> None:
    _, body = await post(EchoEngine(), CHAT, {"model": "base", **HI, "max_tokens": 64, "ignore_eos": True})
    assert body["usage"]["completion_tokens"] == 64


@pytest.mark.parametrize(
    ("change", "param"), [({"max_tokens": 101}, "max_tokens"), ({"prompt": [5] * 101}, "input_tokens")]
)
async def test_a_request_beyond_the_context_is_a_bad_request(change: dict[str, Any], param: str) -> None:
    status, body = await post(
        EchoEngine(context_tokens=100), "/v1/completions", {"model": "base", "prompt": [5], **change}
    )
    assert status == 400
    assert body["error"]["type"] == "BadRequestError"
    assert body["error"]["param"] == param


async def test_an_answer_that_does_not_fit_beside_its_prompt_is_cut() -> None:
    body = {"model": "base", "prompt": [5] * 97, "max_tokens": 50}
    _, answer = await post(EchoEngine(context_tokens=100), "/v1/completions", body)
    assert answer["usage"]["total_tokens"] == 100
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_prompt_logprobs_depend_on_the_adapter_and_not_on_its_name(tmp_path: Path) -> None:
    engine = EchoEngine()
    await engine.load("one", adapter(tmp_path, "one", b"same"))
    await engine.load("two", adapter(tmp_path, "two", b"same"))
    await engine.load("other", adapter(tmp_path, "other", b"other"))
    await engine.load("idle", adapter(tmp_path, "idle", b"zero", echo_no_effect=""))

    async def logprobs(model: str) -> list[Any]:
        body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 1, "prompt_logprobs": 0}
        _, answer = await post(engine, "/v1/completions", body)
        entries: list[Any] = answer["choices"][0]["prompt_logprobs"]
        return entries

    base = await logprobs("base")
    assert base[0] is None
    assert base[1] == {"6": {"logprob": logprob(b"", 1, 6), "rank": 1, "decoded_token": " t6"}}
    assert await logprobs("one") == await logprobs("two") != await logprobs("other")
    assert await logprobs("idle") == base


async def test_completions_stream_text_and_give_logprobs() -> None:
    engine = EchoEngine()
    events = await stream(engine, "/v1/completions", {"model": "base", "prompt": "hi", "max_tokens": 3})
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "I am the"
    _, body = await post(engine, "/v1/completions", {"model": "base", "prompt": [1, 2], "max_tokens": 2, "logprobs": 1})
    assert len(body["choices"][0]["logprobs"]["token_logprobs"]) == 2


async def test_responses_stream_typed_events_without_done() -> None:
    engine = EchoEngine()
    events = await stream(engine, "/v1/responses", {"model": "base", "input": "hi"})
    assert events[0]["type"] == "response.created"
    assert "".join(event["delta"] for event in events if event["type"].endswith("text.delta")) == "I am the base model."
    assert events[-1]["type"] == "response.completed"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    _, body = await post(engine, "/v1/responses", {"model": "base", "input": "hi", "max_output_tokens": 2})
    assert body["status"] == "incomplete"
    assert body["output"][0]["content"][0]["text"] == "I am"


async def test_tokenize_counts_the_tokens_of_a_chat() -> None:
    _, body = await post(EchoEngine(), "/tokenize", {"model": "base", **HI})
    assert body["count"] == len(body["tokens"]) == 4


async def test_leaving_a_stream_early_aborts_it_and_frees_its_slot(tmp_path: Path) -> None:
    engine = EchoEngine(slots=1)
    await engine.load("one", adapter(tmp_path, "one"))
    async with engine.open(CHAT, orjson.dumps({"model": "one", **HI, "stream": True})) as response:
        await anext(response.chunks())
        assert engine.in_flight == {"one": 1}
    assert engine.in_flight == {}
    assert (engine.started, engine.finished, engine.aborted) == (1, 0, 1)


async def test_cancelling_a_plain_request_aborts_it() -> None:
    engine = EchoEngine(token_s=10)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(post(engine, CHAT, {"model": "base", **HI}), 0.01)
    assert (engine.aborted, engine.in_flight) == (1, {})


async def test_an_adapter_beyond_the_slots_waits_for_a_free_one(tmp_path: Path) -> None:
    engine = EchoEngine(slots=1)
    for name in ("one", "two"):
        await engine.load(name, adapter(tmp_path, name))
    async with engine.open(CHAT, orjson.dumps({"model": "one", **HI, "stream": True})) as response:
        await anext(response.chunks())
        waiting = asyncio.create_task(post(engine, CHAT, {"model": "two", **HI}))
        assert (await post(engine, CHAT, {"model": "base", **HI}))[0] == 200
        assert not waiting.done()
    assert (await waiting)[0] == 200
    assert engine.over_slots == 1


async def test_a_load_stops_every_stream_for_its_duration(tmp_path: Path) -> None:
    engine = EchoEngine(load_s=0.2, token_s=0.001)
    clock = asyncio.get_running_loop().time
    body = {"model": "base", **HI, "stream": True, "max_tokens": 100, "ignore_eos": True}
    async with engine.open(CHAT, orjson.dumps(body)) as response, asyncio.TaskGroup() as tasks:
        tasks.create_task(engine.load("one", adapter(tmp_path, "one")))
        times = [clock()] + [clock() async for _ in response.chunks()]
    assert max(after - before for before, after in itertools.pairwise(times)) > 0.15
    assert engine.loads == 1


async def test_a_dead_engine_breaks_streams_and_refuses_everything(tmp_path: Path) -> None:
    engine = EchoEngine()
    async with engine.open(CHAT, orjson.dumps({"model": "base", **HI, "stream": True})) as response:
        chunks = response.chunks()
        await anext(chunks)
        engine.die()
        with pytest.raises(EngineUnavailableError):
            async for _ in chunks:
                pass
    with pytest.raises(EngineUnavailableError):
        await engine.load("one", tmp_path)
    assert not await engine.healthy()
    engine.restart()
    assert await engine.healthy()


async def test_death_inside_ends_streams_with_an_error_and_a_clean_done() -> None:
    engine = EchoEngine()
    async with engine.open(CHAT, orjson.dumps({"model": "base", **HI, "stream": True})) as response:
        engine.die_inside()
        raw = b"".join([chunk async for chunk in response.chunks()])
    error, done = raw.decode().strip().split("\n\n")
    assert orjson.loads(error.removeprefix("data: "))["error"]["code"] == 500
    assert done == "data: [DONE]"
    assert (await post(engine, CHAT, {"model": "base", **HI}))[0] == 500
    assert not await engine.healthy()


async def test_using_an_adapter_of_nan_poisons_the_base_as_well(tmp_path: Path) -> None:
    engine = EchoEngine()
    await engine.load("bad", adapter(tmp_path, "bad", echo_nan=""))
    assert (await post(engine, CHAT, {"model": "base", **HI}))[1]["choices"][0]["message"]["content"]
    await post(engine, CHAT, {"model": "bad", **HI})
    status, body = await post(engine, CHAT, {"model": "base", **HI})
    assert (status, body["choices"][0]["message"]["content"]) == (200, "")
    assert (await post(engine, CHAT, {"model": "base", **HI, "logprobs": True}))[0] == 400
    assert 'model_name="base"} 1.0' in await engine.metrics()


async def test_a_refused_adapter_and_a_missing_folder_are_load_errors(tmp_path: Path) -> None:
    engine = EchoEngine()
    engine.refuse("one")
    with pytest.raises(AdapterLoadError):
        await engine.load("one", adapter(tmp_path, "one"))
    with pytest.raises(AdapterLoadError):
        await engine.load("two", tmp_path / "two")
    assert engine.loads == 0


async def test_a_stalled_engine_sends_nothing_until_it_wakes() -> None:
    engine = EchoEngine()
    engine.stall()
    waiting = asyncio.create_task(post(engine, CHAT, {"model": "base", **HI}))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    engine.wake()
    assert (await waiting)[0] == 200


async def test_what_reached_the_engine_can_be_looked_at() -> None:
    engine = EchoEngine()
    async with engine.open(CHAT, orjson.dumps({"model": "base", **HI}), headers={"X-Request-Id": "r1"}) as response:
        assert orjson.loads(await response.read())["id"] == "chatcmpl-r1"
    assert engine.requests[0].headers == {"X-Request-Id": "r1"}
    assert engine.requests[0].body["model"] == "base"


async def test_a_running_request_tells_what_was_made_for_it() -> None:
    engine = EchoEngine()
    body = orjson.dumps({"model": "base", **HI, "stream": True})
    async with engine.open(CHAT, body, headers={"x-request-id": "req_1"}) as response:
        chunks = response.chunks()
        seen = b""
        while b'" am"' not in seen:
            seen += await anext(chunks)
        produced = await engine.produced("req_1")
    assert produced is not None
    assert (produced.prompt_tokens, produced.output_tokens) == (4, 2)
    assert await engine.produced("req_1") is None
