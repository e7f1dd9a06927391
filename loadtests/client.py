"""Send one request to an OpenAI-compatible server and note when each part of the answer came.

Instants are those at which bytes came; they are parsed afterwards, so parsing costs none of the figures.
"""

import asyncio
import math
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson

from loadtests.alarm import Clock
from loadtests.answers import Answer, error_of, fault_of, judged_text
from loadtests.connection import BrokenConnectionError, ConnectionPool, Exchange
from loadtests.errors import NoModelsError, TargetError
from loadtests.patience import Patience
from loadtests.record import Outcome, Record
from loadtests.scenario import Scenario
from loadtests.schedule import Planned
from loadtests.sse import EventParser

READ_TOGETHER = 32  # chunks; more would keep the event loop from sending for longer than a few tenths of a millisecond

Message = Mapping[str, str]  # role and content
# Fields of a request that change what the model says or how long: a canary's answer is the model's own most likely one.
SAMPLING = {
    *("temperature", "top_p", "top_k", "min_p", "seed", "n", "logit_bias", "stop", "stop_token_ids", "bad_words"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos", "min_tokens"),
    *("max_tokens", "max_completion_tokens"),
}


def run_clock(start_ns: int | None = None) -> Clock:
    """A clock that never jumps and is 0 at start_ns of the monotonic clock, which all processes share; by default now."""
    start_ns = time.monotonic_ns() if start_ns is None else start_ns
    return lambda: (time.monotonic_ns() - start_ns) / 1e9


class Client:
    """Requests as one of several tenants. Holds as many connections as there are requests: never queues by itself."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        pool: ConnectionPool,
        url: str,
        keys: Mapping[str, str],
        *,
        timeout_s: float,
        temperature: float = 0.0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.marks: set[str] = set()  # of every request of the run: none may turn up in another's answer
        self._session = session
        self.pool = pool
        self._base = _base(url)
        self.timeout_s = timeout_s
        self._patience: dict[float, Patience] = {}  # by how long
        self._headers = {tenant: {"Authorization": f"Bearer {key}"} for tenant, key in keys.items()}
        self._heads = {tenant: _head(self._base, key) for tenant, key in keys.items()}
        self._head = _head(self._base, None)
        self._fields = {"temperature": temperature, **(extra or {})}
        plain = {name: value for name, value in (extra or {}).items() if name not in SAMPLING}
        self._canary_fields = {"temperature": 0.0, **plain}

    async def models(self, tenant: str) -> list[str]:
        """What GET /v1/models lists for the tenant's key. Raises TargetError, NoModelsError where it lists none."""
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
            raise NoModelsError(
                f"GET {url} answered {response.status} without a list of models. Is {self._base} an "
                "OpenAI-compatible server? Then name the adapters in the scenario."
            ) from exc

    def prepare(
        self,
        planned: Planned,
        record: Record,
        clock: Clock,
        *,
        done: Callable[["Asking"], None],
        messages: Sequence[Message] | None = None,
        hurries: bool = False,
    ) -> "Asking":
        """A request that is sent when its `begin` is called; its record is filled in while its answer comes.

        messages: of a conversation, what was said up to now; by default the prompt alone. done: called when the record is
        filled in, never before `begin` returns. hurries: at once, else within a twentieth of a second.
        """
        self.marks.add(planned.mark)
        request = self._encode(planned, messages or [{"role": "user", "content": planned.prompt}])
        return Asking(request, planned, record, clock, self, done, hurries=hurries)

    async def send(
        self, planned: Planned, record: Record, clock: Clock, *, messages: Sequence[Message] | None = None
    ) -> str:
        """Fill in the record, and return what was answered. When cancelled the record stays censored."""
        finished = asyncio.get_running_loop().create_future()
        asking = self.prepare(
            planned, record, clock, done=lambda _: finished.set_result(None), messages=messages, hurries=True
        )
        asking.begin()
        try:
            await finished
        except asyncio.CancelledError:
            asking.abandon()
            raise
        return asking.text

    def patience(self, wait_s: float) -> Patience:
        """Of those who give up after wait_s."""
        if wait_s not in self._patience:
            self._patience[wait_s] = Patience(wait_s)
        return self._patience[wait_s]

    def close(self) -> None:
        """Nothing gives up any more."""
        for patience in self._patience.values():
            patience.close()

    async def call(
        self, method: str, path: str, *, tenant: str, body: Any = None, files: Mapping[str, Path] | None = None
    ) -> str:
        """Any other request, as the tenant: with JSON, or with files as multipart. What went wrong, or nothing."""
        try:
            with ExitStack() as opened:
                form = aiohttp.FormData()
                for field, file in (files or {}).items():
                    content = opened.enter_context(await asyncio.to_thread(file.open, "rb"))
                    form.add_field(field, content, filename=file.name)
                url, headers = f"{self._base}{path}", self._headers.get(tenant)
                sent = {"data": form} if files else {"json": body}
                async with self._session.request(method, url, headers=headers, **sent) as response:
                    answer = await response.read()
        except (aiohttp.ClientError, OSError) as exc:
            return f"{_name(exc)}: {exc}".removesuffix(": ")
        return "" if response.ok else f"http {response.status}: {error_of(answer)}"

    def _encode(self, planned: Planned, messages: Sequence[Message]) -> bytes:
        body: dict[str, Any] = {
            "model": planned.adapter,
            "messages": messages,
            "max_tokens": planned.max_tokens,
            "stream": planned.stream,
            **(self._canary_fields if planned.expect else self._fields),
        }
        if planned.stream:
            body["stream_options"] = {"include_usage": True}
        data = orjson.dumps(body)
        return b"%s%d\r\n\r\n%s" % (self._heads.get(planned.tenant, self._head), len(data), data)


@asynccontextmanager
async def open_client(
    url: str,
    keys: Mapping[str, str],
    *,
    timeout_s: float,
    temperature: float = 0.0,
    extra: Mapping[str, Any] | None = None,
) -> AsyncIterator[Client]:
    """Raises TargetError for an address that is none, or a key that cannot be sent."""
    scheme, host, port = _address(url)
    for tenant, key in keys.items():
        if not (key.isascii() and key.isprintable()):
            raise TargetError(
                f"The API key of tenant '{tenant}' holds a character that no key can: copied with a typo?"
            )
    tls = ssl.create_default_context() if scheme == "https" else None
    pool = ConnectionPool(host, port or (443 if tls else 80), tls)
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        client = Client(session, pool, url, keys, timeout_s=timeout_s, temperature=temperature, extra=extra)
        try:
            yield client
        finally:
            client.close()
            await pool.close()


def open_for(scenario: Scenario, url: str, keys: Mapping[str, str]) -> AbstractAsyncContextManager[Client]:
    """A client that asks as the scenario says."""
    shape = scenario.requests
    return open_client(url, keys, timeout_s=scenario.target.timeout_s, temperature=shape.temperature, extra=shape.extra)


class Asking:
    """A request on its way, whose record is filled in while its answer comes."""

    def __init__(
        self,
        request: bytes,
        planned: Planned,
        record: Record,
        clock: Clock,
        client: Client,
        done: Callable[["Asking"], None],
        *,
        hurries: bool,
    ) -> None:
        self.record = record
        self.hurries = hurries or planned.read_pause_s > 0
        self._request = request
        self._planned = planned
        self._clock = clock
        self._client = client
        self._done = done
        self._answer = Answer()
        self._events = EventParser()
        self._unread: list[tuple[bytes, float]] = []  # what came, and when
        self._whole: list[bytes] = []  # of an answer that is not streamed
        self._streams = False
        self._merged = False  # content of several events came in one read
        self._leaves = planned.cancel_after_s is not None and planned.cancel_after_s < client.timeout_s
        wait_s = planned.cancel_after_s if self._leaves and planned.cancel_after_s else client.timeout_s
        self._patience = client.patience(wait_s)
        self._exchange: Exchange | None = None
        self.finished = False

    @property
    def text(self) -> str:
        return self._answer.text

    def begin(self) -> None:
        """Send it."""
        self.record.sent_s = self._clock()
        self._exchange = self._client.pool.start(self._request, self, self._clock)
        self._patience.add(self)

    def abandon(self) -> None:
        """Close the connection, unless it is done. What came up to now is in the record; nobody is told."""
        if not self.finished and self._exchange is not None:
            self._exchange.abandon()
        self.finished = True
        self._read()

    def on_head(self, status: int, headers: Mapping[bytes, bytes], at_s: float) -> None:
        record = self.record
        record.headers_s, record.status = at_s, status
        told = headers.get
        if served_by := told(b"x-lorikeet-adapter"):
            record.served_by = served_by.decode("latin-1")
            record.queue_s = _seconds(told(b"x-lorikeet-queue-ms"), 1e3)
            record.load_s = _seconds(told(b"x-lorikeet-load-ms"), 1e3)
            record.overhead_s = _seconds(told(b"x-lorikeet-overhead-ms"), 1e3)
        if status != 200:
            exact_s = _seconds(told(b"retry-after-ms"), 1e3)
            record.retry_after_s = _seconds(told(b"retry-after"), 1) if exact_s is None else exact_s
        self._streams = record.stream and status == 200
        record.slow = self._streams and self._planned.read_pause_s > 0

    def on_body(self, data: bytes, at_s: float) -> float:
        """A slow reader pauses only once it has the first content, so that its TTFT is still the server's."""
        if not self._streams:
            self._whole.append(data)
            return 0.0
        self._unread.append((data, at_s))
        pause_s = self._planned.read_pause_s
        if pause_s or len(self._unread) >= READ_TOGETHER:
            self._read()
        return pause_s if self.record.content_s else 0.0

    def on_end(self, at_s: float, error: Exception | None) -> None:
        record = self.record
        record.end_s = at_s if error is None else self._clock()
        if error is None:
            self._settle()
            if self._leaves and record.outcome is Outcome.OK:
                # Those who would have waited longer left: the answers that came before would make percentiles too good.
                record.outcome = Outcome.CANCELLED
        else:
            record.outcome = Outcome.FAILED
            record.error = f"connection: {error if isinstance(error, BrokenConnectionError) else _name(error)}"
        self._finish()

    def catch_up(self) -> None:
        """With what came up to now; it may be done with that."""
        if self._exchange is not None:
            self._exchange.catch_up()

    def give_up(self) -> None:
        """It took too long."""
        self.catch_up()
        if self.finished:
            return
        self.abandon()
        self.record.end_s = self._clock()
        self.record.outcome = Outcome.CANCELLED if self._leaves else Outcome.FAILED
        self.record.error = "" if self._leaves else "timeout"
        self._finish()

    def _read(self) -> None:
        """What came, in one go: read chunk by chunk it would cost twice the processor time."""
        for data, at_s in self._unread:
            contents = sum(self._answer.add(event, payload) for event, payload in self._events.feed(data))
            if contents:  # events that came in one read came at one instant
                self.record.content_s.append(at_s)
            self._merged |= contents > 1
        self._unread.clear()

    def _settle(self) -> None:
        """Success is a finish_reason and no error; [DONE] under a 200 says nothing (engines send it when they die)."""
        record, answer = self.record, self._answer
        if record.status != 200:
            record.outcome = Outcome.REFUSED if record.status == 429 else Outcome.FAILED
            record.error = f"http {record.status}: {error_of(b''.join(self._whole))}"
            return
        if record.stream:
            self._read()
        else:
            answer.add(b"", b"".join(self._whole))
        record.finish_reason = answer.finish_reason
        record.prompt_tokens, record.output_tokens = answer.prompt_tokens, answer.output_tokens
        if answer.error or answer.finish_reason is None:
            record.outcome = Outcome.FAILED
            record.error = answer.error or "no finish_reason: the answer just ended"
        else:
            record.outcome = Outcome.OK
            self._client.pool.note_gap(0.0 if self._merged else min(record.chunk_gaps_s, default=math.inf))

    def _finish(self) -> None:
        self.finished = True
        record, planned = self.record, self._planned
        self._read()
        if record.status == 200:
            text = self._answer.all_text
            record.wrong = fault_of(
                asked=planned.adapter,
                tenant=planned.tenant,
                served_by=record.served_by,
                text=text,
                expect=judged_text(planned.expect, text, record.finish_reason) if record.outcome is Outcome.OK else "",
                mark=planned.mark,
                marks=self._client.marks,
            )
        self._done(self)


def _address(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port. Raises TargetError."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and url.isascii():
            return parts.scheme, parts.hostname, parts.port
    except ValueError as exc:
        raise TargetError(f"{url} is no address of a server: {exc}.") from exc
    raise TargetError(f"{url} is no address of a server: give one such as http://127.0.0.1:8080.")


def _base(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


def _head(base: str, key: str | None) -> bytes:
    """Everything of a request before the number of its bytes."""
    parts = urlsplit(base)
    lines = [
        f"POST {parts.path}/v1/chat/completions HTTP/1.1",
        f"Host: {parts.netloc.rpartition('@')[2]}",
        *([f"Authorization: Bearer {key}"] if key is not None else []),
        "Content-Type: application/json",
        "Accept: */*",
        "User-Agent: lorikeet-loadtest",
        "Content-Length: ",
    ]
    return "\r\n".join(lines).encode("latin-1")


def _seconds(value: bytes | None, per_second: float) -> float | None:
    """None for what is no number, such as the date that Retry-After may also hold."""
    try:
        return None if value is None else float(value) / per_second
    except ValueError:
        return None


def _name(exc: BaseException) -> str:
    return type(exc).__name__
