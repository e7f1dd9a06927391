import asyncio
import itertools
import math
import statistics
import time
from typing import Any

import aiohttp
import numpy as np
import orjson
import pytest

from loadtests.calibration import KnownServerProcess, Served, ServerLog, known_server
from loadtests.known_server import CHUNKS, draw_offsets_s, key_of, prompt_of, row_of
from loadtests.sse import EventParser


def body(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": "known", "messages": [{"role": "user", "content": prompt}], "stream": True, **fields}


async def ask(session: aiohttp.ClientSession, server: KnownServerProcess, prompt: str) -> list[tuple[float, Any]]:
    """The events of an answer, each with when it came."""
    events = []
    parser = EventParser()
    async with session.post(f"{server.url}/v1/chat/completions", json=body(prompt)) as response:
        assert response.status == 200
        async for data in response.content.iter_any():
            events += [(time.monotonic(), payload) for _, payload in parser.feed(data)]
    assert events.pop()[1] == b"[DONE]"
    return [(at_s, orjson.loads(payload)) for at_s, payload in events]


def served(log: ServerLog, prompt: str) -> Served:
    return log.served[key_of(prompt)]


def test_the_draws_have_the_distribution_they_claim() -> None:
    offsets_s = draw_offsets_s(CHUNKS)
    first, gaps = np.log(offsets_s[:, 0]), np.log(np.diff(offsets_s).ravel())
    assert math.exp(statistics.median(first)) == pytest.approx(0.120, rel=0.02)
    assert float(first.std()) == pytest.approx(0.5, rel=0.02)
    assert math.exp(statistics.median(gaps)) == pytest.approx(0.010, rel=0.02)
    assert float(gaps.std()) == pytest.approx(0.3, rel=0.02)


def test_a_prompt_is_found_in_every_shape_of_request() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert prompt_of(body("a b")) == "a b"
    assert prompt_of({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": parts}]}) == "a b"
    assert prompt_of({"prompt": "a b"}) == "a b"


async def test_each_request_is_answered_with_what_was_drawn_for_its_prompt() -> None:
    prompts = [f"question {number}" for number in range(20)]
    with known_server() as server:
        async with aiohttp.ClientSession() as session:
            answers = await asyncio.gather(*(ask(session, server, prompt) for prompt in prompts))
        log = server.stop()
    assert set(log.served) == {key_of(prompt) for prompt in prompts}
    offsets_s = draw_offsets_s()
    for prompt, answer in zip(prompts, answers, strict=True):
        had = served(log, prompt)
        due_s = had.read_s + offsets_s[row_of(key_of(prompt))]
        late_s = np.array(had.written_s) - due_s
        assert late_s.min() > -1e-6  # never early
        assert np.median(late_s) < 0.05
        *chunks, (_, usage) = answer
        assert usage["usage"]["completion_tokens"] == CHUNKS == len(chunks)
        assert all(choice["delta"]["content"] for _, event in chunks for choice in event["choices"])
        assert [event["choices"][0]["finish_reason"] for _, event in chunks] == [None] * (CHUNKS - 1) + ["stop"]
        assert all(at_s >= written_s for (at_s, _), written_s in zip(chunks, had.written_s, strict=True))


@pytest.mark.slow
async def test_a_freeze_stops_everything_once() -> None:
    with known_server(freeze_after_s=0.3, freeze_s=1.0) as server:
        async with aiohttp.ClientSession() as session:
            async with asyncio.TaskGroup() as group:
                for number in range(60):
                    group.create_task(ask(session, server, str(number)))
                    await asyncio.sleep(0.02)
        log = server.stop()
    assert log.frozen is not None
    begin_s, end_s = log.frozen
    assert end_s - begin_s >= 1.0
    instants_s = [s for request in log.served.values() for s in (request.read_s, *request.written_s)]
    assert len(instants_s) == 60 * (CHUNKS + 1)
    assert not [s for s in instants_s if begin_s + 0.05 < s < end_s]  # what had come by then is still seen to
    assert min(instants_s) < begin_s - 0.2
    offsets_s = draw_offsets_s()
    # what came while it was frozen counts from the thaw, however long it takes to be read
    caught = {key: request for key, request in log.served.items() if end_s <= request.read_s < end_s + 0.02}
    assert len(caught) > 10
    took_s = [request.written_s[0] - request.read_s - offsets_s[row_of(key)][0] for key, request in caught.items()]
    assert min(took_s) < 0


async def test_it_speaks_the_rest_of_the_protocol_that_tools_ask_for() -> None:
    with known_server(chunks=2) as server:
        async with aiohttp.ClientSession(server.url) as session:
            async with session.get("/v1/models") as response:
                assert [model["id"] for model in (await response.json())["data"]] == ["known"]
            async with session.get("/metrics") as response:
                assert response.status == 404
            for wrong in ({"prompt": "x", "stream": False}, {"stream": True}, {"messages": [], "stream": True}):
                async with session.post("/v1/completions", json=wrong) as response:
                    assert response.status == 400
            async with session.post("/v1/completions", json={"prompt": "x", "stream": True}) as response:
                text = await response.text()
        assert set(server.stop().served) == {key_of("x")}
    assert text.count('"text":" word"') == 2
    assert text.endswith("data: [DONE]\n\n")


async def test_requests_are_understood_however_they_are_cut() -> None:
    content = orjson.dumps(body("cut"))
    request = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)
    with known_server(chunks=1) as server:
        port = int(server.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for start, end in itertools.pairwise([0, 10, request.index(b"\r\n\r\n") + 2, len(request) - 3, len(request)]):
            writer.write(request[start:end])
            await asyncio.sleep(0.02)
        async with asyncio.timeout(10):
            await reader.readuntil(b"0\r\n\r\n")
        writer.close()
        assert len(served(server.stop(), "cut").written_s) == 1


async def test_a_client_that_leaves_is_written_no_more() -> None:
    with known_server() as server:
        async with aiohttp.ClientSession() as session:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await ask(session, server, "left")
            await ask(session, server, "stayed")
        log = server.stop()
    assert len(served(log, "left").written_s) < CHUNKS
    assert len(served(log, "stayed").written_s) == CHUNKS
