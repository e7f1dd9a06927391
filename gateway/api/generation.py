"""The hot path: one ASGI endpoint for every kind of generation.

tenants -> resolve -> admission -> residency -> engine -> relay. Nothing here reads a database or a disk, and the caller's
leaving is raced against every wait, in the queue and in both modes, so no engine works for nobody.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from adapters.registry import Scope as KeyScope
from gateway.body import CHAT, COMPLETIONS, RESPONSES, TOKENIZE, Endpoint, Prepared, model_of, parse, prepare
from gateway.engines.profile import BASE_NAME
from gateway.engines.protocol import EngineResponse
from gateway.errors import BodyTooLargeError, EngineAnswerError, EngineStalledError, error_object_for
from gateway.fleet import Replica
from gateway.relay import Names, Outcome, StreamRewriter, error_event, relay_stream, relay_whole
from gateway.resolve import Target
from gateway.respond import send_error, send_json
from gateway.services import Services, identify_caller
from gateway.tenants import Caller

logger = logging.getLogger(__name__)


class CallerLeft(Exception):  # noqa: N818 - not an error of anybody's
    """The caller closed the connection, or does not read from it."""


@dataclass
class Passage:
    """One request on its way through, and what is told about it in headers."""

    request_id: str
    target: Target
    prepared: Prepared
    outcome: Outcome
    arrived_s: float
    queue_s: float = 0.0
    load_s: float = 0.0

    @property
    def overhead_s(self) -> float:
        """From the body's end to the engine's call, without the waits that have names of their own."""
        return max(0.0, self.outcome.sent_s - self.arrived_s - self.queue_s - self.load_s)

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"x-lorikeet-adapter", self.target.label.encode()),
            (b"x-lorikeet-queue-ms", str(round(self.queue_s * 1000)).encode()),
            (b"x-lorikeet-load-ms", str(round(self.load_s * 1000)).encode()),
            (b"x-lorikeet-overhead-ms", f"{self.overhead_s * 1000:.2f}".encode()),
        ]


class GenerationEndpoint:
    """ASGI app for one of the engine's generation paths."""

    def __init__(self, endpoint: Endpoint, services_of: Callable[[Request], Services], *, route: str) -> None:
        self._endpoint = endpoint
        self._services_of = services_of
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        services = self._services_of(request)
        guard = SendGuard(send, unread_s=services.settings.requests.unread_s)
        try:
            caller = identify_caller(request, services)  # before a byte of the body is kept
            raw = await read_body(request, services.settings.requests.max_body_bytes)
            await race_disconnect(self._serve(request.scope["request_id"], caller, raw, services, guard), receive)
        except CallerLeft:
            services.metrics.disconnects.labels("streaming" if guard.started else "waiting").inc()
        except StreamBrokenError as exc:  # the caller was told in the stream
            logger.warning("stream broken", extra={"request_id": scope["request_id"], "cause": str(exc.__cause__)})
        except Exception as exc:
            if guard.started:
                raise
            if error_object_for(exc).said:
                logger.exception("request failed", extra={"request_id": scope["request_id"]})
            await send_error(guard, exc)

    async def _serve(self, request_id: str, caller: Caller, raw: bytes, services: Services, send: "SendGuard") -> None:
        arrived_s = time.monotonic()
        tenant = caller.require(KeyScope.INFERENCE)
        fields = parse(raw)
        target = services.resolve(model_of(fields), tenant.name)
        prepared = prepare(
            self._endpoint,
            fields,
            engine_name=target.engine_name or BASE_NAME,
            cache_salt=tenant.cache_salt,
            defaults=target.version.serving if target.version else None,
            limits=services.settings.requests,
        )
        passage = Passage(request_id, target, prepared, Outcome(), arrived_s)
        label = f"{target.version.tenant}/{target.version.adapter}" if target.version else "_base"
        outcome = "cancelled"
        try:
            with services.open_requests.enter(tenant):
                await self._pass(passage, caller, services, send)
            outcome = "ok"
        except CallerLeft:
            raise
        except Exception as exc:
            outcome = error_object_for(exc.__cause__ or exc if isinstance(exc, StreamBrokenError) else exc).code
            raise
        finally:
            self._measure(passage, tenant.name, label, outcome, services)

    async def _pass(self, passage: Passage, caller: Caller, services: Services, send: "SendGuard") -> None:
        assert caller.tenant is not None  # noqa: S101 - `require` has seen to it
        target = passage.target
        replica = services.fleet.choose(target.engine_name)
        claim = replica.residency.claim(target.version) if target.version else contextlib.nullcontext()
        with claim:  # from now on, so that a version deleted while this waits in the queue still answers
            tenant = caller.tenant
            async with replica.admission.turn(tenant.name, target.engine_name, weight=tenant.weight) as turn:
                passage.queue_s = turn.queue_s
                try:
                    await self._generate(passage, replica, services, send)
                except EngineAnswerError as exc:
                    if exc.status != 404 or target.version is None or send.started:
                        raise
                    # the engine lost it: load and ask once more
                    replica.residency.mark_missing(target.version.engine_name)
                    await self._generate(passage, replica, services, send)
                finally:
                    turn.tokens = max(1, passage.outcome.tokens)

    async def _generate(self, passage: Passage, replica: Replica, services: Services, send: "SendGuard") -> None:
        async with contextlib.AsyncExitStack() as stack:
            engine = replica.engine
            if passage.target.version is not None:
                held = await stack.enter_async_context(replica.residency.hold(passage.target.version))
                engine, passage.load_s = held.engine, held.load_s
            passage.outcome.sent_s = time.monotonic()
            opening = engine.open(
                self._endpoint.path, passage.prepared.body, headers={"x-request-id": passage.request_id}
            )
            limits = services.settings.requests
            wait_s = (
                limits.idle_s if passage.prepared.stream else limits.answer_s
            )  # headers of a plain answer come last
            try:
                async with asyncio.timeout(wait_s):
                    response = await stack.enter_async_context(opening)
            except TimeoutError as exc:
                raise EngineStalledError(wait_s) from exc
            await self._relay(passage, response, services, send)

    async def _relay(self, passage: Passage, response: EngineResponse, services: Services, send: "SendGuard") -> None:
        limits = services.settings.requests
        names = Names(passage.target.engine_name or BASE_NAME, passage.target.requested)
        if not passage.prepared.stream or response.status != 200:
            choices = passage.prepared.choices if self._endpoint is not TOKENIZE else 0
            body = await relay_whole(response, names, passage.outcome, choices=choices, answer_s=limits.answer_s)
            await send_json(send, 200, body, passage.headers())
            return
        rewriter = StreamRewriter(
            names, passage.outcome, choices=passage.prepared.choices, show_usage=passage.prepared.wants_usage
        )
        pieces = relay_stream(response, rewriter, idle_s=limits.idle_s, done=self._endpoint is not RESPONSES)
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    if (
                        not send.started
                    ):  # held back until there is output: until then a failure has a status of its own
                        await send.start_stream(passage.headers())
                    await send.piece(piece)
        except CallerLeft:
            raise
        except Exception as exc:
            if not send.started:
                raise
            await send.piece(error_event(exc), more=False)
            raise StreamBrokenError(exc) from exc
        await send.piece(b"", more=False)

    def _measure(self, passage: Passage, tenant: str, label: str, outcome: str, services: Services) -> None:
        metrics, result, now_s = services.metrics, passage.outcome, time.monotonic()
        metrics.requests.labels(self._route, label, outcome).inc()
        metrics.duration.labels(label, str(passage.prepared.stream).lower()).observe(now_s - passage.arrived_s)
        metrics.queue_wait.observe(passage.queue_s)
        if passage.load_s:
            metrics.load_wait.observe(passage.load_s)
        if result.first_s is not None:
            state = "cold" if passage.load_s else "warm"
            metrics.ttft.labels(label, state).observe(result.first_s - passage.arrived_s)
            if result.last_s is not None and result.events > 1:
                metrics.time_per_token.labels(label).observe((result.last_s - result.first_s) / (result.events - 1))
                metrics.max_gap.observe(result.max_gap_s)
        for kind, tokens in (("input", result.prompt_tokens), ("output", result.completion_tokens or result.events)):
            if tokens:
                metrics.tokens.labels(label, kind).inc(tokens)
                metrics.tenant_tokens.labels(tenant, kind).inc(tokens)


class StreamBrokenError(Exception):
    """A stream that ended with an error event: told to the caller already, raised on for the record only."""


class SendGuard:
    """ASGI send that knows whether the answer has begun, and does not wait for ever for one who does not read it."""

    def __init__(self, send: Send, *, unread_s: float) -> None:
        self._send = send
        self._unread_s = unread_s
        self.started = False

    async def __call__(self, message: Message) -> None:
        self.started = True
        try:
            async with asyncio.timeout(self._unread_s):
                await self._send(message)
        except TimeoutError as exc:
            raise CallerLeft from exc

    async def start_stream(self, headers: list[tuple[bytes, bytes]]) -> None:
        fixed = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await self({"type": "http.response.start", "status": 200, "headers": fixed + headers})

    async def piece(self, body: bytes, *, more: bool = True) -> None:
        await self({"type": "http.response.body", "body": body, "more_body": more})


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """Raises BodyTooLargeError as soon as the limit is passed, whatever content-length says; CallerLeft."""
    pieces, size = [], 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > limit_bytes:
                raise BodyTooLargeError(limit_bytes)
            pieces.append(piece)
    except ClientDisconnect as exc:
        raise CallerLeft from exc
    return b"".join(pieces)


async def race_disconnect(work: Awaitable[None], receive: Receive) -> None:
    """Do the work, unless the caller leaves first: then it is cancelled and CallerLeft raised."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
            raise CallerLeft
        await task
    finally:
        for pending in (task, left):
            pending.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/responses": RESPONSES,
    "/tokenize": TOKENIZE,
}
