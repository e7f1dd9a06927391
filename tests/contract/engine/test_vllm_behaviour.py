"""What today's vLLM does that the design leans on. A failure here after an upgrade means: look again, ours may be wrong.

No test here generates with a broken adapter: it would poison the engine for the tests that follow.
"""

import asyncio
import itertools
import json
import math
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapters.base import read_base
from adapters.tensors import save_tensors
from gateway.engines.echo import EchoEngine
from gateway.engines.process import EngineProcess
from gateway.engines.profile import BASE_NAME
from gateway.engines.protocol import Engine, Produced
from gateway.errors import AdapterLoadError, EngineError
from gateway.probe import score
from tests.architecture.observability import ENGINE_SERIES
from tests.factories import adapter_config, adapter_tensors, make_adapter, make_base

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HI = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
LONG_PROMPT = [100 + i % 7919 for i in range(400)]  # more than two cache blocks of 128 tokens
_numbers = itertools.count(1)


@pytest.fixture
def new_adapter(base_model: Path, adapter_folder: Path) -> Callable[..., tuple[str, Path]]:
    """Makes an engine name that was never used and a sound adapter's folder."""

    def make(**options: Any) -> tuple[str, Path]:
        number = next(_numbers)
        folder = make_adapter(
            adapter_folder / str(number), base_model, rank=options.pop("rank", 8), seed=number, **options
        )
        return f"contract/a@{number}-{number:08x}", folder

    return make


async def ask(engine: Engine, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
    async with engine.open(path, orjson.dumps(body)) as response:
        raw = await response.read()
    try:
        return response.status, orjson.loads(raw)
    except orjson.JSONDecodeError:
        return response.status, raw.decode()


async def events(engine: Engine, path: str, body: Mapping[str, Any]) -> list[Any]:
    async with engine.open(path, orjson.dumps({**body, "stream": True})) as response:
        assert response.status == 200
        assert response.content_type.startswith("text/event-stream")
        raw = b"".join([chunk async for chunk in response.chunks()])
    return parse_events(raw)


def parse_events(raw: bytes) -> list[Any]:
    data = [line.removeprefix("data: ") for line in raw.decode().splitlines() if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


async def load_raw(engine: Engine, name: str, folder: Path) -> tuple[int, Any]:
    return await ask(engine, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})


async def unnamed(engine: Engine) -> int:
    async with engine._session.get("/lorikeet/adapters") as response:  # type: ignore[attr-defined]
        return int((await response.json())["unnamed"])


# Answers


async def test_an_unknown_model_is_404_with_a_number_for_a_code(engine: Engine) -> None:
    status, body = await ask(engine, CHAT, {"model": "acme/none@1-00000000", **HI})
    assert status == 404
    assert body["error"]["type"] == "NotFoundError"
    assert body["error"]["code"] == 404


async def test_unknown_fields_are_ignored_and_a_cache_salt_is_accepted(engine: Engine) -> None:
    status, _ = await ask(engine, CHAT, {"model": "base", **HI, "max_tokens": 1, "no_such_field": 1, "cache_salt": "s"})
    assert status == 200


async def test_a_cache_salt_keeps_cached_prompts_apart(engine: Engine) -> None:
    async def cached(salt: str) -> int:
        body = {"model": "base", "prompt": LONG_PROMPT, "max_tokens": 1, "cache_salt": salt}
        _, answer = await ask(engine, COMPLETION, body)
        return int((answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0))

    assert [await cached("one"), await cached("one"), await cached("two")] == [0, 384, 0]


async def test_a_stream_has_one_finish_reason_then_usage_then_done(engine: Engine) -> None:
    body = {"model": "base", **HI, "max_tokens": 5, "stream_options": {"include_usage": True}}
    *chunks, usage, done = await events(engine, CHAT, body)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 5
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk["model"] for chunk in chunks} == {"base"}


async def test_the_responses_api_streams_typed_events_without_done(engine: Engine) -> None:
    found = await events(engine, "/v1/responses", {"model": "base", "input": "Hi", "max_output_tokens": 3})
    assert found[0]["type"] == "response.created"
    assert found[-1]["type"] in ("response.completed", "response.incomplete")
    assert "[DONE]" not in found
    assert found[-1]["response"]["model"] == "base"


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"prompt": [5] * 2049}, "input_tokens", "maximum context length"),
        ({"max_tokens": 2049}, "max_tokens", "cannot be greater than"),
    ],
)
async def test_a_request_beyond_the_context_is_told_as_such(
    engine: Engine, change: dict[str, Any], param: str, words: str
) -> None:
    status, body = await ask(engine, COMPLETION, {"model": "base", "prompt": "Hi", "max_tokens": 5, **change})
    assert (status, body["error"]["param"]) == (400, param)
    assert words in body["error"]["message"]


async def test_an_answer_that_does_not_fit_beside_its_prompt_is_cut(engine: Engine) -> None:
    body = {"model": "base", "prompt": [5] * 2045, "max_tokens": 50, "ignore_eos": True}
    _, answer = await ask(engine, COMPLETION, body)
    assert answer["usage"]["total_tokens"] == 2048
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_prompt_logprobs_begin_with_null_and_are_keyed_by_token_id(engine: Engine) -> None:
    prompt = [1, 100, 200, 300]
    body = {"model": "base", "prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0}
    _, answer = await ask(engine, COMPLETION, body)
    first, *rest = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    assert [list(entry) for entry in rest] == [["100"], ["200"], ["300"]]
    assert set(rest[0]["100"]) == {"logprob", "rank", "decoded_token"}
    assert all(math.isfinite(entry[key]["logprob"]) for entry in rest for key in entry)


async def test_prompt_logprobs_beside_another_request_leave_the_engine_alive(
    engine: Engine, new_adapter: Callable[..., tuple[str, Path]]
) -> None:
    name, folder = new_adapter()
    await engine.load(name, folder)
    probe = {"model": name, "prompt": LONG_PROMPT[:60], "max_tokens": 1, "prompt_logprobs": 0}
    chat = {"model": "base", **HI, "max_tokens": 30, "ignore_eos": True}
    answers = await asyncio.gather(
        *(ask(engine, CHAT, chat) for _ in range(2)), *(ask(engine, COMPLETION, probe) for _ in range(2))
    )
    assert [status for status, _ in answers] == [200] * 4
    assert await engine.healthy()


async def test_the_stand_in_engine_says_nothing_that_vllm_does_not_say(engine: Engine) -> None:
    echo = EchoEngine()
    for path, body in (
        (CHAT, {"model": "base", **HI, "max_tokens": 2}),
        (COMPLETION, {"model": "base", "prompt": "Hi", "max_tokens": 2, "logprobs": 1, "prompt_logprobs": 0}),
        ("/v1/responses", {"model": "base", "input": "Hi", "max_output_tokens": 4}),
        ("/tokenize", {"model": "base", "prompt": "Hi"}),
        (CHAT, {"model": "none", **HI}),
        (COMPLETION, {"model": "base", "prompt": [5] * 2049, "max_tokens": 5}),
        (COMPLETION, {"model": "base", "prompt": [5], "max_tokens": 2049}),
    ):
        (real_status, real), (status, said) = await ask(engine, path, body), await ask(echo, path, body)
        assert status == real_status, path
        assert said.keys() <= real.keys(), path
        if "choices" in said:
            assert said["choices"][0].keys() <= real["choices"][0].keys(), path
        if "error" in said:
            assert said["error"].keys() == real["error"].keys()
            assert said["error"]["type"] == real["error"]["type"]
            assert said["error"]["param"] == real["error"]["param"]


# Adapters


async def test_an_adapter_changes_the_likelihood_of_a_prompt(
    engine: Engine, new_adapter: Callable[..., tuple[str, Path]]
) -> None:
    name, folder = new_adapter()
    await engine.load(name, folder)
    body = {"prompt": [1, 100, 200, 300], "max_tokens": 1, "prompt_logprobs": 0}
    (_, plain), (_, tuned) = (
        await ask(engine, COMPLETION, {**body, "model": "base"}),
        await ask(engine, COMPLETION, {**body, "model": name}),
    )
    assert plain["choices"][0]["prompt_logprobs"] != tuned["choices"][0]["prompt_logprobs"]
    assert tuned["model"] == name


async def test_the_base_answers_the_same_whatever_adapters_sit_in_the_slots(
    engine: Engine, new_adapter: Callable[..., tuple[str, Path]]
) -> None:
    """vLLM's CPU functions take slot -1, which marks the base's tokens, for the last slot; ours spare them."""
    text = "The capital of France is Paris, a city on the river Seine."
    alone = await score(engine, BASE_NAME, text, timeout_s=60)
    adapters = [new_adapter(scale=0.1) for _ in range(2)]  # as many as the profile has slots
    for name, folder in adapters:
        await engine.load(name, folder)
    beside = [await score(engine, BASE_NAME, text, timeout_s=60)]
    stream = {"model": adapters[0][0], "prompt": "Once", "max_tokens": 100, "ignore_eos": True, "stream": True}
    async with engine.open(COMPLETION, orjson.dumps(stream)) as response:
        chunks = response.chunks()
        await anext(chunks)
        beside.append(await score(engine, BASE_NAME, text, timeout_s=60))
        adapter = await score(engine, adapters[1][0], text, timeout_s=60)
        assert [chunk async for chunk in chunks]
    for seen in beside:
        assert seen == pytest.approx(alone, abs=0.25)  # bfloat16, in batches of other shapes
    assert adapter != pytest.approx(alone, abs=0.5)
    for name, _ in adapters:
        await engine.remove(name)


async def test_a_second_load_of_a_name_is_400_and_success_to_us(
    engine: Engine, new_adapter: Callable[..., tuple[str, Path]]
) -> None:
    name, folder = new_adapter()
    await engine.load(name, folder)
    status, body = await load_raw(engine, name, folder)
    assert status == 400
    assert "already been loaded" in body["error"]["message"]
    await engine.load(name, folder)


async def test_the_engines_own_unload_only_forgets_the_name(
    engine: Engine, new_adapter: Callable[..., tuple[str, Path]]
) -> None:
    name, folder = new_adapter()
    await engine.load(name, folder)
    before = await unnamed(engine)
    assert (await ask(engine, "/v1/unload_lora_adapter", {"lora_name": name}))[0] == 200
    assert await unnamed(engine) == before + 1


async def test_our_removal_frees_the_weights_and_an_unknown_name_is_fine(
    engine: Engine, new_adapter: Callable[..., tuple[str, Path]]
) -> None:
    name, folder = new_adapter()
    await engine.load(name, folder)
    held, before = await engine.adapters(), await unnamed(engine)
    assert name in held.registered & held.resident
    await engine.remove(name)
    held = await engine.adapters()
    assert name not in held.registered | held.resident
    assert await unnamed(engine) == before
    assert (await ask(engine, CHAT, {"model": name, **HI}))[0] == 404
    await engine.remove(name)


async def test_a_pinned_adapter_can_still_be_removed(
    engine: Engine, new_adapter: Callable[..., tuple[str, Path]]
) -> None:
    name, folder = new_adapter()
    await engine.load(name, folder)
    await engine.pin(name)
    await engine.remove(name)
    assert name not in (await engine.adapters()).resident


async def test_a_running_request_keeps_its_weights_and_leaving_it_aborts_it(
    engine: Engine, new_adapter: Callable[..., tuple[str, Path]]
) -> None:
    name, folder = new_adapter()
    await engine.load(name, folder)
    body = {"model": name, **HI, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    async with engine.open(CHAT, orjson.dumps(body)) as response:
        chunks = response.chunks()
        await anext(chunks)
        with pytest.raises(EngineError, match="running request"):
            await engine.remove(name)
        assert (await ask(engine, CHAT, {"model": name, **HI}))[0] == 404
        assert await anext(chunks)
    async with asyncio.timeout(5):  # 1,500 tokens would take half a minute
        while name in (await engine.adapters()).resident:
            try:
                await engine.remove(name)
            except EngineError:
                await asyncio.sleep(0.05)


async def test_a_plain_request_is_aborted_when_its_connection_closes(
    engine: Engine, new_adapter: Callable[..., tuple[str, Path]]
) -> None:
    name, folder = new_adapter()
    await engine.load(name, folder)
    body = {"model": name, **HI, "max_tokens": 1500, "ignore_eos": True}
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(ask(engine, CHAT, body), 1.0)
    async with asyncio.timeout(5):
        while name in (await engine.adapters()).resident:
            try:
                await engine.remove(name)
            except EngineError:
                await asyncio.sleep(0.05)


@pytest.mark.parametrize(("stream", "choices"), [(True, 1), (False, 2)])
async def test_a_running_request_tells_what_was_made_for_it(engine: Engine, stream: bool, choices: int) -> None:
    """What a caller that leaves is charged."""
    request_id = f"req_{uuid.uuid4().hex}"
    asked_for = {"n": choices, "temperature": 1.0, "max_tokens": 1000, "ignore_eos": True, "stream": stream}
    body = {"model": BASE_NAME, **HI, **asked_for}
    prompt = (await ask(engine, CHAT, {**body, "n": 1, "stream": False, "max_tokens": 1}))[1]["usage"]["prompt_tokens"]

    async def generate() -> None:
        async with engine.open(CHAT, orjson.dumps(body), headers={"x-request-id": request_id}) as response:
            await response.read()

    async def produced(more_than: int) -> Produced:
        async with asyncio.timeout(20):
            while True:
                found = await engine.produced(request_id)
                if found is not None and found.output_tokens > more_than:
                    return found
                await asyncio.sleep(0.05)

    asked = asyncio.create_task(generate())
    first = await produced(choices)
    later = await produced(first.output_tokens)
    assert first.prompt_tokens == later.prompt_tokens == prompt
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    async with asyncio.timeout(5):
        while await engine.produced(request_id) is not None:  # noqa: ASYNC110 - the engine has no event for it
            await asyncio.sleep(0.05)


# What vLLM lets in: the reasons why validation is ours


async def test_vllm_accepts_an_adapter_of_another_base(engine: Engine, adapter_folder: Path) -> None:
    other = make_base(adapter_folder / "other", hidden=64, layers=2)
    folder = make_adapter(adapter_folder / "of-other", other)
    assert (await load_raw(engine, "contract/wrong-base@1-00000000", folder))[0] == 200
    await engine.remove("contract/wrong-base@1-00000000")


async def test_vllm_accepts_weights_that_are_not_numbers(
    engine: Engine, base_model: Path, adapter_folder: Path
) -> None:
    info = read_base(base_model)
    tensors = {name: np.full_like(tensor, np.nan) for name, tensor in adapter_tensors(info).items()}
    save_tensors(adapter_folder / "adapter_model.safetensors", tensors)
    (adapter_folder / "adapter_config.json").write_text(json.dumps(adapter_config(info)))
    assert (await load_raw(engine, "contract/nan@1-00000000", adapter_folder))[0] == 200
    await engine.remove("contract/nan@1-00000000")


async def test_vllm_accepts_a_configured_rank_below_that_of_the_tensors(
    engine: Engine, base_model: Path, adapter_folder: Path
) -> None:
    info = read_base(base_model)
    save_tensors(adapter_folder / "adapter_model.safetensors", adapter_tensors(info, rank=16))
    (adapter_folder / "adapter_config.json").write_text(json.dumps(adapter_config(info, rank=8)))
    assert (await load_raw(engine, "contract/rank@1-00000000", adapter_folder))[0] == 200
    await engine.remove("contract/rank@1-00000000")


async def test_vllm_refuses_a_rank_above_the_cap_with_500(
    engine: Engine, new_adapter: Callable[..., tuple[str, Path]]
) -> None:
    name, folder = new_adapter(rank=32)
    status, body = await load_raw(engine, name, folder)
    assert status == 500
    assert "max_lora_rank" in body["error"]["message"]
    with pytest.raises(AdapterLoadError, match="max_lora_rank"):
        await engine.load(name, folder)


async def test_vllm_answers_a_missing_folder_with_404(engine: Engine, adapter_folder: Path) -> None:
    assert (await load_raw(engine, "contract/none@1-00000000", adapter_folder / "none"))[0] == 404


# Endings. These end the process; the supervisor brings it back for whoever comes next


async def test_its_metrics_have_the_names_and_labels_that_dashboards_and_alerts_ask_for(engine: Engine) -> None:
    await ask(engine, CHAT, {"model": BASE_NAME, **HI, "max_tokens": 2})
    told: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(await engine.metrics()):
        for sample in family.samples:
            told.setdefault(sample.name, set()).update(sample.labels)
    wanted = json.loads(ENGINE_SERIES.read_text(encoding="utf-8"))
    assert {name: sorted(told.get(name, ())) for name in wanted} == wanted


@pytest.mark.asyncio(loop_scope="session")
async def test_deleting_a_known_adapters_files_ends_the_engine_for_everybody(
    engine_process: EngineProcess, new_adapter: Callable[..., tuple[str, Path]]
) -> None:
    """And how it ends: an error event, then a clean [DONE]; exit code 0. So only a finish_reason is success."""
    engine = engine_process.engine
    victim, folder = new_adapter()
    await engine.load(victim, folder)
    others = [new_adapter() for _ in range(engine_process.profile.host_adapters)]
    for name, path in others:
        await engine.load(name, path)
    held = await engine.adapters()
    assert victim in held.registered - held.resident  # evicted, and still answered to
    (folder / "adapter_model.safetensors").unlink()
    body = {"model": "base", **HI, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    async with engine.open(CHAT, orjson.dumps(body)) as response:
        chunks = response.chunks()
        raw = await anext(chunks)
        killer = asyncio.create_task(ask(engine, CHAT, {"model": victim, **HI, "max_tokens": 1}))
        raw += b"".join([chunk async for chunk in chunks])
    await asyncio.gather(killer, return_exceptions=True)
    *_, error, done = parse_events(raw)
    assert error["error"]["code"] == 500
    assert done == "[DONE]"
    async with asyncio.timeout(60):
        await engine_process.reached("restarting")
    assert engine_process.last_exit == 0
    async with asyncio.timeout(240):
        await engine_process.reached("ready")
    assert (await engine.adapters()).registered == frozenset()
