import asyncio
from collections.abc import AsyncGenerator

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import EngineAnswerError, EngineStalledError, EngineUnavailableError
from gateway.relay import Names, Outcome, StreamRewriter, engine_error, relay_stream, relay_whole
from gateway.sse import DONE, EventSplitter, data_event

NAMES = Names(engine="acme/support@1-00000000", caller="support")


class Answer:
    """An engine's answer, from memory."""

    def __init__(self, *pieces: bytes, status: int = 200, stall: bool = False) -> None:
        self.status = status
        self.content_type = "text/event-stream"
        self._pieces = pieces
        self._stall = stall

    async def read(self) -> bytes:
        return b"".join(self._pieces)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        for piece in self._pieces:
            yield piece
        if self._stall:
            await asyncio.sleep(3600)


def chunk(content: str = "", finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish}
    return data_event({"id": "chatcmpl-1", "model": NAMES.engine, "choices": [choice]})


USAGE = data_event(
    {"id": "chatcmpl-1", "model": NAMES.engine, "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
)
WHOLE = (chunk("Hel"), chunk("lo"), chunk("", "stop"), USAGE, DONE)


async def collect(
    answer: Answer, *, show_usage: bool = False, idle_s: float = 1.0, choices: int = 1
) -> tuple[bytes, Outcome]:
    outcome = Outcome()
    rewriter = StreamRewriter(NAMES, outcome, choices=choices, show_usage=show_usage)
    return b"".join([piece async for piece in relay_stream(answer, rewriter, idle_s=idle_s, done=True)]), outcome


async def test_the_callers_name_is_put_back_and_usage_kept_from_who_did_not_ask() -> None:
    out, outcome = await collect(Answer(*WHOLE))
    assert out.count(b'"model":"support"') == 3
    assert b"usage" not in out
    assert NAMES.engine.encode() not in out
    assert out.endswith(DONE)
    assert outcome.whole
    assert (outcome.prompt_tokens, outcome.completion_tokens) == (3, 2)


async def test_usage_goes_to_who_asked() -> None:
    out, _ = await collect(Answer(*WHOLE), show_usage=True)
    assert b'"prompt_tokens":3' in out


async def test_a_quoted_model_name_inside_the_text_stays_as_it_is() -> None:
    text = f'"model":"{NAMES.engine}"'
    out, _ = await collect(Answer(chunk(text), chunk("", "stop")))
    first = orjson.loads(out.split(b"\n\n")[0].removeprefix(b"data: "))
    assert first["choices"][0]["delta"]["content"] == text
    assert first["model"] == "support"


async def test_done_without_a_finish_reason_is_a_broken_answer() -> None:
    with pytest.raises(EngineUnavailableError):
        await collect(Answer(chunk("Hel"), DONE))


async def test_every_choice_must_finish() -> None:
    with pytest.raises(EngineUnavailableError):
        await collect(Answer(*WHOLE), choices=2)


async def test_an_error_event_is_an_error_whatever_follows() -> None:
    dying = data_event({"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}})
    with pytest.raises(EngineAnswerError, match="EngineCore died"):
        await collect(Answer(chunk("Hel"), dying, DONE))


async def test_the_word_error_in_an_answer_is_no_error() -> None:
    out, outcome = await collect(Answer(chunk('{"error": {"message": "no"}}'), chunk("", "stop"), DONE))
    assert outcome.whole
    assert b"no" in out


async def test_silence_is_given_up() -> None:
    with pytest.raises(EngineStalledError):
        await collect(Answer(chunk("Hel"), stall=True), idle_s=0.01)


@given(cuts=st.lists(st.integers(1, 400), max_size=8))
def test_however_the_bytes_are_cut_the_events_are_the_same(cuts: list[int]) -> None:
    stream = b": ping\n\n" + b"".join(WHOLE)
    splitter, events, start = EventSplitter(), [], 0
    for end in [*sorted(cuts), len(stream)]:
        events += splitter.feed(stream[start:end])
        start = max(start, end)
    assert b"".join(events) == stream
    assert len(events) == 6


async def test_a_plain_answer_without_finish_reason_is_refused() -> None:
    body = orjson.dumps({"model": NAMES.engine, "choices": [{"finish_reason": None}]})
    with pytest.raises(EngineUnavailableError):
        await relay_whole(Answer(body), NAMES, Outcome(), choices=1, answer_s=1.0)


async def test_the_engines_refusal_speaks_of_the_callers_model() -> None:
    body = orjson.dumps(
        {"error": {"message": f"{NAMES.engine} has a context length of 8", "param": "messages", "code": 400}}
    )
    with pytest.raises(EngineAnswerError, match=r"^support has") as refused:
        await relay_whole(Answer(body, status=400), NAMES, Outcome(), choices=1, answer_s=1.0)
    assert refused.value.status == 400


@pytest.mark.parametrize("begun", [(), (chunk("Hel"),)])
async def test_a_stream_that_a_shutdown_cut_is_not_whole(begun: tuple[bytes, ...]) -> None:
    with pytest.raises(EngineUnavailableError):
        await collect(Answer(*begun, chunk("", "abort"), USAGE, DONE))


async def test_a_plain_answer_that_a_shutdown_cut_is_not_whole() -> None:
    cut = orjson.dumps({"model": NAMES.engine, "choices": [{"message": {"content": ""}, "finish_reason": "abort"}]})
    with pytest.raises(EngineUnavailableError):
        await relay_whole(Answer(cut), NAMES, Outcome(), choices=1, answer_s=1.0)


@pytest.mark.parametrize(
    ("engine", "said", "told"),
    [
        (NAMES.engine, f"The model `{NAMES.engine}` does not exist.", "The model `support` does not exist."),
        (
            "base",
            "The model `base` cannot read base64 of a database.",
            "The model `support` cannot read base64 of a database.",
        ),
    ],
)
def test_an_engines_refusal_carries_the_callers_name_and_no_other_word_changes(
    engine: str, said: str, told: str
) -> None:
    raw = orjson.dumps({"error": {"message": said}})
    assert str(engine_error(400, raw, Names(engine=engine, caller="support"))) == told
