"""Bytes from the engine to the caller: the model's name put back, usage read, time measured, a broken end made visible.

An answer counts as whole when every choice has its finish reason and no error came; nothing else, neither status 200 nor
`[DONE]`, says so, because a dying engine sends both. The reason `abort` is none: a vLLM that shuts down gives it to what it
cuts and to whatever still arrives, under status 200.
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import orjson

from gateway.engines.protocol import EngineResponse
from gateway.errors import EngineAnswerError, EngineStalledError, EngineUnavailableError, error_body, error_object_for
from gateway.gaps import Gaps
from gateway.sse import DONE, EventSplitter, data_event, payload


class StreamBrokenError(Exception):
    """A stream that ended with an error event: told to the caller already, raised on for the record only."""


def code_of(exc: BaseException) -> str:
    """Of the error that ended a request."""
    return error_object_for(exc.__cause__ or exc if isinstance(exc, StreamBrokenError) else exc).code


# How vLLM 0.32 ends the messages that name a parameter, and how it lists what its own models refuse.
_PARAMETER = re.compile(r" \(parameter=\w+, value=.*\)$", re.DOTALL)
_VALIDATION_ERROR = re.compile(r"""'loc': 'body\.([^']+)', 'msg': (?:'|")(.+?)(?:'|")(?:, '|})""")


@dataclass
class Outcome:
    """What one generation came to. Times are seconds on the monotonic clock."""

    sent_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None  # first event with output
    last_s: float | None = None
    events: int = 0  # events with output; one token each, as a rule
    gaps: Gaps = field(default_factory=Gaps)
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt's
    completion_tokens: int = 0
    counted: bool = False  # by the engine; else events were counted, and nothing is known of the prompt
    finished: int = 0  # finish reasons seen
    whole: bool = False

    @property
    def tokens(self) -> int:
        """Tokens the engine worked for, as far as known: a stream cut short has no usage, its events are counted."""
        return self.prompt_tokens + max(self.completion_tokens, self.events)

    def note_output(self, now_s: float) -> None:
        if self.first_s is None:
            self.first_s = now_s
        elif self.last_s is not None:
            self.gaps.add(now_s - self.last_s)
        self.last_s = now_s
        self.events += 1

    def note_usage(self, usage: dict[str, Any]) -> None:
        """Reads chat's and completions' names as well as the Responses API's."""
        self.prompt_tokens = usage.get("prompt_tokens") or usage.get("input_tokens") or 0
        self.completion_tokens = usage.get("completion_tokens") or usage.get("output_tokens") or 0
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        self.cached_tokens = details.get("cached_tokens") or 0
        self.counted = True


@dataclass(frozen=True)
class Names:
    """What goes by one name inside the engine and by another outside."""

    engine: str  # the model
    caller: str
    prompt: str = "prompt"  # the caller's field of what the engine calls its input tokens

    def outward(self, raw: bytes) -> bytes:
        """Sound on raw JSON: inside a string value the quotes would be escaped, so only real keys match."""
        caller = orjson.dumps(self.caller)
        return raw.replace(b'"model":"' + self.engine.encode() + b'"', b'"model":' + caller)


def engine_error(status: int, raw: bytes, names: Names) -> EngineAnswerError:
    """The engine's refusal, with the caller's name of the model in it."""
    try:
        body = orjson.loads(raw)
        error = body.get("error", body)
        message, param = str(error.get("message") or error), error.get("param")
    except (orjson.JSONDecodeError, AttributeError):
        message, param = raw.decode(errors="replace")[:500] or f"The engine answered with status {status}.", None
    engine_name = rf"(?<!\w){re.escape(names.engine)}(?!\w)"  # a word of its own: the base is called 'base' in there
    message = re.sub(engine_name, lambda _: names.caller, _readable(message))
    param = param.removeprefix("body.") if isinstance(param, str) else None
    return EngineAnswerError(status, message, names.prompt if param == "input_tokens" else param)


def _readable(message: str) -> str:
    """vLLM's message without its Python: of a list of validation errors each one's place and words."""
    found = [f"{where}: {words}" for where, words in _VALIDATION_ERROR.findall(message)]
    return "; ".join(found) or _PARAMETER.sub("", message)


async def relay_whole(
    response: EngineResponse, names: Names, outcome: Outcome, *, choices: int, answer_s: float
) -> bytes:
    """A plain JSON answer. Raises EngineStalledError, EngineAnswerError, EngineUnavailableError."""
    try:
        async with asyncio.timeout(answer_s):
            raw = await response.read()
    except TimeoutError as exc:
        raise EngineStalledError(answer_s) from exc
    if response.status != 200:
        raise engine_error(response.status, raw, names)
    body = orjson.loads(raw)
    outcome.note_usage(body.get("usage") or {})
    outcome.first_s = outcome.last_s = time.monotonic()
    outcome.whole = (
        "choices" not in body
        or sum(choice.get("finish_reason") not in (None, "abort") for choice in body["choices"]) >= choices
    )
    if not outcome.whole:
        raise EngineUnavailableError("The engine's answer ended before it was complete.")
    return names.outward(raw)


class StreamRewriter:
    """What happens to each event of a stream on its way out. Pure but for the clock it is handed."""

    def __init__(self, names: Names, outcome: Outcome, *, choices: int, show_usage: bool) -> None:
        self._names = names
        self._outcome = outcome
        self._choices = choices
        self._show_usage = show_usage

    def event(self, event: bytes, now_s: float) -> bytes | None:
        """The event as the caller gets it; None for one that is not the caller's to see.

        Raises EngineAnswerError for an error event and EngineUnavailableError for an answer cut by a shutdown: whatever
        follows is not part of an answer.
        """
        if event.startswith(b":"):
            return None
        data = payload(event)
        if data == b"[DONE]":
            return None  # the relay writes its own, when the answer is whole
        if b'"error"' in data and (error := _error_of(data)) is not None:
            raise EngineAnswerError(500, str(error.get("message") or "The engine failed while answering."))
        if b'"usage":{' in data and not self._note_usage(data):
            return None
        if data.startswith(b'{"type":') or b'"type":"response.' in data:
            self._note_response_event(data, now_s)
        else:
            if b'"finish_reason":"abort"' in data:
                raise EngineUnavailableError("The engine shut down before the answer was complete.")
            finishes = data.count(b'"finish_reason":"')
            self._outcome.finished += finishes
            if finishes or _has_output(data):
                self._outcome.note_output(now_s)
            if self._show_usage and b'"usage":' not in data and event.endswith(b"}\n\n"):
                event = event[:-3] + b',"usage":null}\n\n'  # as OpenAI's do, for who asked for usage
        return self._names.outward(event)

    def _note_usage(self, data: bytes) -> bool:
        """Read the usage; whether the event goes out all the same."""
        body = orjson.loads(data)
        body = body.get("response") or body
        self._outcome.note_usage(body.get("usage") or {})
        return self._show_usage or body.get("choices") != []

    def _note_response_event(self, data: bytes, now_s: float) -> None:
        if b'.delta"' in data:
            self._outcome.note_output(now_s)
        elif b'"type":"response.completed"' in data or b'"type":"response.incomplete"' in data:
            self._outcome.finished = self._choices

    def close(self) -> None:
        """The engine's stream has ended. Raises EngineUnavailableError when the answer is not whole."""
        if self._outcome.finished < self._choices:
            raise EngineUnavailableError("The engine's stream ended before the answer was complete.")
        self._outcome.whole = True


async def relay_stream(
    response: EngineResponse, rewriter: StreamRewriter, *, idle_s: float, done: bool
) -> AsyncGenerator[bytes, None]:
    """The caller's events. Several that arrive together leave together.

    done: whether the stream ends with `[DONE]` (the Responses API's does not).
    Raises EngineStalledError after idle_s of silence, EngineAnswerError and EngineUnavailableError as above.
    """
    splitter = EventSplitter()
    async with aclosing(response.chunks()) as pieces:
        while True:
            try:
                async with asyncio.timeout(idle_s):
                    piece = await anext(pieces)
            except StopAsyncIteration:
                break
            except TimeoutError as exc:
                raise EngineStalledError(idle_s) from exc
            now_s = time.monotonic()
            out = b"".join(filter(None, [rewriter.event(event, now_s) for event in splitter.feed(piece)]))
            if out:
                yield out
    rewriter.close()
    if done:
        yield DONE


def _has_output(data: bytes) -> bool:
    """Text, reasoning or a tool call; the opening chunk, with its role and an empty content, is none."""
    return (b'"content":"' in data or b'"text":"' in data or b'"tool_calls":' in data) and b'"content":""' not in data


def _error_of(data: bytes) -> dict[str, Any] | None:
    body = orjson.loads(data)
    error = body.get("error") or (body if body.get("type") == "error" else None)
    return error if isinstance(error, dict) else None


def error_event(exc: BaseException) -> bytes:
    """How a stream ends that fails after its first byte."""
    return data_event(error_body(exc))
