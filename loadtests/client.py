"""Send one request to an OpenAI-compatible server and note when each part of the answer came.

Instants are taken as soon as bytes are handed over and before they are parsed, so parsing costs none of the figures.
"""

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson

from loadtests.errors import TargetError
from loadtests.record import Outcome, Record
from loadtests.schedule import Planned
from loadtests.sse import EventParser

Clock = Callable[[], float]  # seconds from the beginning of the run


def run_clock() -> Clock:
    """A clock that starts at 0 now and never jumps."""
    started_ns = time.monotonic_ns()
    return lambda: (time.monotonic_ns() - started_ns) / 1e9


class Client:
    """Requests as one of several tenants. Holds as many connections as there are requests: never queues by itself."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        keys: Mapping[str, str],
        *,
        temperature: float = 0.0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._session = session
        self._base = url.rstrip("/").removesuffix("/v1")
        self._headers = {tenant: {"Authorization": f"Bearer {key}"} for tenant, key in keys.items()}
        self._fields = {"temperature": temperature, **(extra or {})}

    async def models(self, tenant: str) -> list[str]:
        """What GET /v1/models lists for the tenant's key. Raises TargetError."""
        url = f"{self._base}/v1/models"
        try:
            async with self._session.get(url, headers=self._headers.get(tenant)) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise TargetError(f"No server answers at {self._base} ({_name(exc)}). Start one, or give --url.") from exc
        if response.status in (401, 403):
            given = "The API key was refused" if tenant in self._headers else "The server wants an API key"
            raise TargetError(
                f"{given} for tenant '{tenant}' ({response.status} at {url}). "
                "Set LORIKEET_API_KEY (or the variable that the tenant's key_env names), or give --key TENANT=KEY."
            )
        try:
            return [str(model["id"]) for model in orjson.loads(body)["data"]]
        except (orjson.JSONDecodeError, KeyError, TypeError) as exc:
            raise TargetError(
                f"GET {url} answered {response.status} without a list of models. Is {self._base} an "
                "OpenAI-compatible server? Then name the adapters in the scenario."
            ) from exc

    async def send(self, planned: Planned, record: Record, clock: Clock) -> None:
        """Fill in the record; whatever goes wrong is noted there. When cancelled the record stays censored."""
        body: dict[str, Any] = {
            "model": planned.adapter,
            "messages": [{"role": "user", "content": planned.prompt}],
            "max_tokens": planned.max_tokens,
            "stream": planned.stream,
            **self._fields,
        }
        if planned.stream:
            body["stream_options"] = {"include_usage": True}
        headers = {"Content-Type": "application/json", **self._headers.get(planned.tenant, {})}
        data = orjson.dumps(body)
        record.sent_s = clock()
        try:
            async with self._session.post(f"{self._base}/v1/chat/completions", data=data, headers=headers) as response:
                record.headers_s = clock()
                record.status = response.status
                _note_headers(record, response.headers)
                if response.status != 200:
                    answer = await response.read()
                    record.end_s = clock()
                    record.outcome = Outcome.REFUSED if response.status == 429 else Outcome.FAILED
                    record.error = f"http {response.status}: {_error_of(answer)}"
                elif planned.stream:
                    await _read_stream(response.content, record, clock)
                else:
                    answer = await response.read()
                    record.end_s = clock()
                    _settle(record, _Answer().add(b"", answer))
        except TimeoutError:
            _fail(record, clock(), "timeout")
        except aiohttp.ClientError as exc:
            _fail(record, clock(), f"connection: {_name(exc)}")


@asynccontextmanager
async def open_client(
    url: str,
    keys: Mapping[str, str],
    *,
    timeout_s: float,
    temperature: float = 0.0,
    extra: Mapping[str, Any] | None = None,
) -> AsyncIterator[Client]:
    connector = aiohttp.TCPConnector(limit=0)  # a limit would queue requests inside the client
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
        yield Client(session, url, keys, temperature=temperature, extra=extra)


class _Answer:
    """What the events of an answer said, up to now."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self.has_content = False  # of the last event added

    def add(self, event: bytes, data: bytes) -> "_Answer":
        self.has_content = False
        if data == b"[DONE]":
            return self
        try:
            payload = orjson.loads(data)
        except orjson.JSONDecodeError:
            self.error = "unreadable: an event is not JSON"
            return self
        if not isinstance(payload, dict):
            self.error = "unreadable: an event is not an object"
            return self
        if event == b"error" or payload.get("error"):
            self.error = f"error event: {_error_of(data)}"
        try:
            self._add_choices(payload)
        except (AttributeError, TypeError):
            self.error = "unreadable: an event is not shaped like a chat completion"
        return self

    def _add_choices(self, payload: dict[str, Any]) -> None:
        for choice in payload.get("choices") or ():
            part = choice.get("delta") or choice.get("message") or {}
            self.has_content |= any(part.get(name) for name in CONTENT_FIELDS)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if usage := payload.get("usage"):
            self.prompt_tokens, self.output_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")


# A first chunk with a role and empty content is no token: counting it made TTFT 2 ms where the truth was 126 ms.
CONTENT_FIELDS = ("content", "reasoning", "reasoning_content", "tool_calls", "refusal")


async def _read_stream(content: aiohttp.StreamReader, record: Record, clock: Clock) -> None:
    parser, answer = EventParser(), _Answer()
    async for data in content.iter_any():
        arrived_s = clock()
        with_content = False
        for event, payload in parser.feed(data):
            with_content |= answer.add(event, payload).has_content
        if with_content:  # events that came in one read came at one instant
            record.content_s.append(arrived_s)
    record.end_s = clock()
    _settle(record, answer)


def _settle(record: Record, answer: _Answer) -> None:
    """Success is a finish_reason and no error; [DONE] under a 200 says nothing (engines send it when they die)."""
    record.finish_reason = answer.finish_reason
    record.prompt_tokens, record.output_tokens = answer.prompt_tokens, answer.output_tokens
    if answer.error or answer.finish_reason is None:
        record.outcome = Outcome.FAILED
        record.error = answer.error or "no finish_reason: the answer just ended"
    else:
        record.outcome = Outcome.OK


def _fail(record: Record, at_s: float, error: str) -> None:
    record.end_s, record.outcome, record.error = at_s, Outcome.FAILED, error


def _note_headers(record: Record, headers: Mapping[str, str]) -> None:
    record.served_by = headers.get("x-lorikeet-adapter", "")
    record.queue_s = _seconds(headers.get("x-lorikeet-queue-ms"))
    record.load_s = _seconds(headers.get("x-lorikeet-load-ms"))


def _seconds(milliseconds: str | None) -> float | None:
    try:
        return None if milliseconds is None else float(milliseconds) / 1000
    except ValueError:
        return None


def _error_of(answer: bytes) -> str:
    """Code and message of an OpenAI error object, or the beginning of whatever came instead."""
    try:
        error = orjson.loads(answer)["error"]
        text = ": ".join(str(error[name]) for name in ("code", "message") if error.get(name))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        text = answer.decode("utf-8", "replace").strip()
    return text[:200]


def _name(exc: BaseException) -> str:
    return type(exc).__name__
