"""What the log says of requests, and what it never says."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway import logs
from tests.factories import make_adapter
from tests.gateway.conftest import Gateway, listening, running_gateway
from tests.gateway.test_generation import chat, publisher, until

CHAT = "/v1/chat/completions"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Everything that is logged, as `lorikeet serve` writes it, debugging included."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure("DEBUG", stream)
    yield stream
    root.handlers[:], root.level = handlers, level


def lines(log: io.StringIO, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in log.getvalue().splitlines()]
    return [line for line in found if line["event"] == event]


async def test_each_request_is_one_line_with_what_it_came_to(
    gateway: Gateway, tmp_path: Path, log: io.StringIO
) -> None:
    await publisher(gateway, tmp_path)("support", text="one two three")
    async with await gateway.client() as client:
        answer = await client.post(CHAT, json=chat("support", stream=True))
        await client.post("/tokenize", json={"model": "support", "prompt": "Hi"})
    line, tokenize = lines(log, "request")
    assert line["request_id"] == answer.headers["x-request-id"]
    assert line["level"] == "info"
    assert (line["route"], line["tenant"], line["adapter"]) == ("chat/completions", "acme", "acme/support@1")
    assert (line["outcome"], line["stream"], line["engine"]) == ("ok", True, "echo")
    assert line["output_tokens"] >= 3
    assert 0 < line["load_s"] <= line["first_token_s"] <= line["duration_s"]
    assert (tokenize["route"], tokenize["outcome"]) == ("tokenize", "ok")


async def test_a_refused_request_is_one_line_with_the_reason(
    gateway: Gateway, tmp_path: Path, log: io.StringIO
) -> None:
    async with gateway.anonymous({"authorization": "Bearer lk-wrong"}) as client:
        await client.post(CHAT, json=chat("support"))
    async with await gateway.client() as client:
        await client.post(CHAT, json=chat("nobody"))
    unknown, absent = lines(log, "request refused")
    assert (unknown["reason"], unknown["tenant"], unknown["key_id"]) == ("invalid_api_key", None, None)
    assert (absent["reason"], absent["tenant"]) == ("model_not_found", "acme")
    assert absent["key_id"]


async def test_no_prompt_answer_key_or_path_is_ever_logged(tmp_path: Path, tiny_base: Path, log: io.StringIO) -> None:
    """A whole conversation: an upload, answers of every kind, refusals, an engine that dies, a caller that leaves."""
    secret = {"role": "user", "content": "the sparrow's secret question"}
    async with running_gateway(tmp_path / "home", tiny_base) as gateway:
        await publisher(gateway, tmp_path)("support", text="the sparrow's secret answer " * 5)
        folder = make_adapter(tmp_path / "upload", gateway.base)
        key = await gateway.key()
        async with (
            listening(gateway.app) as url,
            httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=30) as client,
        ):
            files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
            await client.post("/v1/adapters", data={"name": "uploaded"}, files=files)
            for stream in (False, True):
                body = chat("support", messages=[secret], stream=stream, user="sparrow@example.org")
                assert (await client.post(CHAT, json=body)).status_code == 200
            await client.post("/v1/completions", json={"model": "support", "prompt": "the sparrow's secret question"})
            await client.post("/v1/responses", json={"model": "support", "input": "the sparrow's secret question"})
            await client.post("/tokenize", json={"model": "support", "prompt": "the sparrow's secret question"})
            await client.post(CHAT, json=chat("support", messages=[secret], temperature="sparrow"))
            await client.post(CHAT, json=chat("support", messages="sparrow"))
            await client.post(CHAT, json=chat("sparrow", messages=[secret]))
            await client.post(CHAT, content=b'{"sparrow')
            await client.post(CHAT, json=chat("support", messages=[{**secret, "content": "sparrow " * 5000}]))
            await client.post(CHAT, json=chat("support"), headers={"authorization": f"Bearer {key}x"})
            gateway.engine.token_s = 0.05
            async with client.stream("POST", CHAT, json=chat("support", messages=[secret], stream=True)) as answer:
                await anext(answer.aiter_bytes())
            gateway.engine.poison()
            await client.post(CHAT, json=chat("support", messages=[secret]))
            gateway.engine.die_inside()
            await client.post(CHAT, json=chat("support", messages=[secret]))
            await until(lambda: len(lines(log, "request")) >= 8)
    told = log.getvalue()
    assert lines(log, "request refused")
    operator_key = gateway.settings.home.operator_key.read_text().strip()
    for word in ("sparrow", key, operator_key, str(tmp_path)):
        assert word not in told, next(line for line in told.splitlines() if word in line)
