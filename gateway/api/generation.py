"""The hot path: one ASGI endpoint for every kind of generation.

tenants -> resolve -> admission -> residency -> engine -> relay. Nothing here reads a database or a disk, and the caller's
leaving is raced against every wait, in the queue and in both modes, so no engine works for nobody. A request whose engine
goes away before a byte of its answer went out is given to another, or waits for the engine to come back.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from adapters.registry import AdapterVersion
from adapters.registry import Scope as KeyScope
from gateway.admission import Turn
from gateway.body import CHAT, COMPLETIONS, RESPONSES, TOKENIZE, Endpoint, Prepared, model_of, parse, prepare
from gateway.deadline import patience_of
from gateway.deployments import Dedicated
from gateway.drain import Drain
from gateway.engines.profile import BASE_NAME
from gateway.engines.protocol import EngineResponse
from gateway.errors import (
    BodyTooLargeError,
    EngineAnswerError,
    EngineStalledError,
    EngineUnavailableError,
    EngineUnreachableError,
    NoReplicaError,
    ShuttingDownError,
    error_object_for,
)
from gateway.fleet import Replica
from gateway.meter import Meter
from gateway.relay import (
    Names,
    Outcome,
    StreamBrokenError,
    StreamRewriter,
    code_of,
    error_event,
    relay_stream,
    relay_whole,
)
from gateway.resolve import ADAPTER, MERGED, Target
from gateway.respond import send_error, send_json
from gateway.services import Services, identify_caller
from gateway.telling import tell_ended, tell_form, tell_refused
from gateway.tenants import Caller
from gateway.tracing import RequestSpan

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4  # of a prompt, about; what it really was is charged when the engine has told


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
    deadline_s: float  # when the caller stops waiting for the first byte; may be infinite
    span: RequestSpan
    deployed: Dedicated | None = None  # the engine of the version that is asked for, where it has one of its own
    dedicated: Dedicated | None = None  # the same, where this request goes to it
    fields: Mapping[str, Any] | None = None  # of the body, kept where it may have to be prepared for another engine
    queue_s: float = 0.0  # waits for an engine and for a turn, and what a failed engine cost
    load_s: float = 0.0
    meter: Meter = field(init=False)

    @property
    def adapter(self) -> AdapterVersion | None:
        """What an engine has to hold beside the model it was started with."""
        return None if self.dedicated is not None else self.target.version

    @property
    def form(self) -> str:
        return MERGED if self.dedicated is not None else ADAPTER

    @property
    def overhead_s(self) -> float:
        """From the body's end to the engine's call, without the waits that have names of their own."""
        return max(0.0, self.outcome.sent_s - self.arrived_s - self.queue_s - self.load_s)

    @property
    def prompt_estimate(self) -> int:
        """Tokens, before the engine has counted them."""
        return self.prepared.prompt_bytes // BYTES_PER_TOKEN

    @property
    def tokens_at_most(self) -> int:
        return self.prompt_estimate + self.prepared.output_cap if self.prepared.output_cap else 0

    @property
    def tokens_used(self) -> int:
        """As far as known: an answer that was cut short has no count of its prompt."""
        cut = self.outcome.first_s is not None and not self.outcome.prompt_tokens
        return self.outcome.tokens + (self.prompt_estimate if cut else 0)

    def settle(self, turn: Turn) -> None:
        """Tell the turn what the answer has cost; one that was cut short keeps what was charged until then."""
        result = self.outcome
        if result.prompt_tokens:
            turn.cost(result.tokens)
        turn.output_tokens = result.tokens - result.prompt_tokens
        if self.prepared.stream and result.first_s is not None:
            turn.first_token_s = result.first_s - result.sent_s

    def headers(self) -> list[tuple[bytes, bytes]]:
        told = [
            (b"x-lorikeet-adapter", self.target.label.encode()),
            (b"x-lorikeet-queue-ms", str(round(self.queue_s * 1000)).encode()),
            (b"x-lorikeet-load-ms", str(round(self.load_s * 1000)).encode()),
            (b"x-lorikeet-overhead-ms", f"{self.overhead_s * 1000:.2f}".encode()),
        ]
        if self.deployed is not None:
            told.append((b"x-lorikeet-form", self.form.encode()))
        return told


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
        request_id: str = scope["request_id"]
        span = services.tracer.begin(self._route, request.headers)
        caller, passage = None, None
        try:
            caller = identify_caller(request, services)  # before a byte of the body is kept
            patience_s = patience_of(request.headers)
            raw = await read_body(request, services.settings.requests.max_body_bytes)
            passage = self._passage(request_id, caller, raw, patience_s, services, span)
            work = self._serve(passage, caller, services, guard)
            count = partial(services.usage.count, request_id)
            await race_disconnect(work, receive, services.drain, before_cut=count)
        except CallerLeft:
            if passage is None:
                span.refuse("cancelled")
            services.metrics.disconnects.labels("streaming" if guard.started else "waiting").inc()
        except StreamBrokenError as exc:  # the caller was told in the stream
            logger.warning("stream broken", extra={"request_id": request_id, "cause": str(exc.__cause__)})
        except Exception as exc:
            if passage is None:
                self._tell_refused(exc, request_id, caller, services, span)
            if guard.streaming and isinstance(exc, ShuttingDownError):
                await guard.piece(error_event(exc), more=False)
                return
            if guard.started:
                raise
            if error_object_for(exc).said:
                logger.exception("request failed", extra={"request_id": request_id})
            await send_error(guard, exc)

    def _passage(
        self,
        request_id: str,
        caller: Caller,
        raw: bytes,
        patience_s: float,
        services: Services,
        span: RequestSpan,
    ) -> Passage:
        """What is asked of which version. Raises GatewayError for what cannot be served."""
        arrived_s = time.monotonic()
        tenant = caller.require(KeyScope.INFERENCE)
        fields = parse(raw)
        target = services.resolve(model_of(fields), tenant.name)
        deployed = services.deployments.find(target)
        dedicated = deployed if deployed is not None and services.deployments.chooses(deployed, target) else None
        prepared = self._prepare(fields, target, caller, services, dedicated)
        version = target.version
        passage = Passage(
            request_id, target, prepared, Outcome(), arrived_s, arrived_s + patience_s, span, deployed, dedicated
        )
        passage.fields = fields if dedicated is not None else None
        passage.meter = Meter(
            request_id=request_id,
            route=self._route,
            tenant=tenant.name,
            key_id=caller.key_id,
            model=f"{version.tenant}/{version.adapter}" if version else services.base.name,
            version=version.version if version else None,
            requested=target.requested,
            stream=prepared.stream,
            prompt_tokens_estimate=passage.prompt_estimate,
            outcome=passage.outcome,
            arrived_s=arrived_s,
        )
        return passage

    def _prepare(
        self,
        fields: Mapping[str, Any],
        target: Target,
        caller: Caller,
        services: Services,
        dedicated: Dedicated | None,
    ) -> Prepared:
        """The body for the engines that share the base, or for the version's own, which is asked for nothing else."""
        return prepare(
            self._endpoint,
            fields,
            engine_name=(target.engine_name if dedicated is None else None) or BASE_NAME,
            cache_salt=caller.require(KeyScope.INFERENCE).cache_salt,
            defaults=target.version.serving if target.version else None,
            limits=services.settings.requests,
            templates=caller.allows(KeyScope.CHAT_TEMPLATE),
        )

    async def _serve(self, passage: Passage, caller: Caller, services: Services, send: "SendGuard") -> None:
        tenant, target = caller.require(KeyScope.INFERENCE), passage.target
        if self._metered:
            services.usage.begin(passage.meter)
        outcome = "cancelled"
        failure: Exception | None = None
        # from now on, so that a version deleted while this waits still answers
        claim = services.fleet.claim(target.version) if target.version else contextlib.nullcontext()
        try:
            with claim:
                grant = await services.limits.reserve(
                    services.directory.snapshot,
                    tenant.name,
                    caller.key_id,
                    target.version,
                    passage.tokens_at_most,
                    lease=passage.request_id,
                )
                send.add_headers(grant.headers)
                try:
                    await self._pass(passage, caller, services, send)
                finally:
                    grant.settle(passage.tokens_used)
            outcome = "ok"
        except CallerLeft:
            raise
        except asyncio.CancelledError:
            if services.drain.over:
                failure = ShuttingDownError()
                outcome = code_of(failure)
            raise
        except Exception as exc:
            failure, outcome = exc, code_of(exc)
            raise
        finally:
            meter = passage.meter
            entry = services.usage.end(meter, outcome) if self._metered else meter.entry(outcome)
            tell_ended(
                entry,
                services.metrics,
                gaps=passage.outcome.gaps,
                queue_s=passage.queue_s,
                load_s=passage.load_s,
                failure=failure,
            )
            if passage.deployed is not None:
                passage.deployed.answered[passage.form] += 1
                tell_form(entry, services.metrics, passage.form)
            passage.span.end(entry)

    @property
    def _metered(self) -> bool:
        return self._endpoint is not TOKENIZE  # which generates nothing

    async def _pass(self, passage: Passage, caller: Caller, services: Services, send: "SendGuard") -> None:
        """On one replica after the other, until one has answered. Raises what the last one did."""
        fleet, target = services.fleet, passage.target
        until_s = min(passage.deadline_s, passage.arrived_s + services.settings.requests.queue_s)
        ends, failed = 0, set[str]()
        passage.meter.queued_s = time.monotonic()
        if passage.dedicated is not None:
            if target.form:
                fleet = passage.dedicated.fleet
            elif (
                failure := await self._pass_dedicated(passage, passage.dedicated, caller, services, send)
            ) is not None:
                ends += not isinstance(failure, EngineUnreachableError | NoReplicaError)
            else:
                return
        while True:
            asked_s = time.monotonic()
            replica = await fleet.available(target.engine_name, until_s=until_s, failed=failed)
            passage.queue_s += time.monotonic() - asked_s
            try:
                await self._take_turn(passage, replica, caller, services, send)
                return
            except (EngineUnavailableError, NoReplicaError) as exc:
                ends += not isinstance(exc, EngineUnreachableError | NoReplicaError)
                if send.started or ends > services.settings.failure.failovers or time.monotonic() >= until_s:
                    raise
                logger.info("failing over", extra={"request_id": passage.request_id, "engine": replica.id})
            services.metrics.failovers.labels(replica.id).inc()
            failed.add(replica.id)
            passage.outcome = Outcome()
            passage.queue_s = time.monotonic() - passage.arrived_s - passage.load_s

    async def _pass_dedicated(
        self, passage: Passage, one: Dedicated, caller: Caller, services: Services, send: "SendGuard"
    ) -> Exception | None:
        """On the version's own engine; why it did not answer, with the request made ready for those that share the base."""
        try:
            await self._take_turn(passage, one.fleet.choose(None), caller, services, send)
        except (EngineUnavailableError, NoReplicaError) as exc:
            if send.started or passage.fields is None:
                raise
            logger.info(
                "falling back to the adapter", extra={"request_id": passage.request_id, "engine": one.replica.id}
            )
            services.metrics.failovers.labels(one.replica.id).inc()
            passage.dedicated = None
            passage.prepared = self._prepare(passage.fields, passage.target, caller, services, None)
            passage.outcome = Outcome()
            passage.queue_s = time.monotonic() - passage.arrived_s
            return exc
        return None

    async def _take_turn(
        self, passage: Passage, replica: Replica, caller: Caller, services: Services, send: "SendGuard"
    ) -> None:
        tenant, adapter, prepared = caller.require(KeyScope.INFERENCE), passage.adapter, passage.prepared
        if adapter is not None:
            replica.residency.want(adapter)
        async with replica.admission.turn(
            tenant.name,
            adapter.engine_name if adapter is not None else None,
            weight=tenant.weight,
            prompt_tokens=passage.prompt_estimate,
            in_one_piece=not prepared.stream,
            deadline_s=passage.deadline_s,
        ) as turn:
            passage.queue_s += turn.queue_s
            passage.meter.admitted_s = time.monotonic()
            try:
                async with replica.asked(generation=self._endpoint is not TOKENIZE):
                    await self._generate(passage, turn, replica, services, send)
            except EngineAnswerError as exc:
                if exc.status != 404 or adapter is None or send.started:
                    raise
                # the engine lost it: load and ask once more
                replica.residency.mark_missing(adapter.engine_name)
                async with replica.asked(generation=self._endpoint is not TOKENIZE):
                    await self._generate(passage, turn, replica, services, send)
            finally:
                passage.settle(turn)

    async def _generate(
        self, passage: Passage, turn: Turn, replica: Replica, services: Services, send: "SendGuard"
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            engine = replica.engine
            if (adapter := passage.adapter) is not None:
                held = await stack.enter_async_context(replica.residency.hold(adapter))
                engine, passage.load_s = held.engine, held.load_s
            passage.outcome.sent_s = passage.meter.loaded_s = time.monotonic()
            passage.meter.sent(engine, passage.outcome)
            trace = stack.enter_context(passage.span.engine(engine.id))
            headers = {"x-request-id": passage.request_id, **trace}
            opening = engine.open(self._endpoint.path, passage.prepared.body, headers=headers)
            limits = services.settings.requests
            wait_s = (
                limits.idle_s if passage.prepared.stream else limits.answer_s
            )  # headers of a plain answer come last
            try:
                async with asyncio.timeout(wait_s):
                    response = await stack.enter_async_context(opening)
            except TimeoutError as exc:
                raise EngineStalledError(wait_s) from exc
            stack.push_async_exit(passage.meter.count_cut)
            await self._relay(passage, turn, response, services, send)

    async def _relay(
        self, passage: Passage, turn: Turn, response: EngineResponse, services: Services, send: "SendGuard"
    ) -> None:
        limits = services.settings.requests
        engine_name = passage.adapter.engine_name if passage.adapter is not None else BASE_NAME
        names = Names(engine_name, passage.target.requested, self._endpoint.required)
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
                    turn.cost(passage.prompt_estimate + passage.outcome.events)
        except CallerLeft:
            raise
        except Exception as exc:
            if not send.started:
                raise
            await send.piece(error_event(exc), more=False)
            raise StreamBrokenError(exc) from exc
        await send.piece(b"", more=False)

    def _tell_refused(
        self, exc: Exception, request_id: str, caller: Caller | None, services: Services, span: RequestSpan
    ) -> None:
        tenant = caller.tenant.name if caller and caller.tenant else None
        key_id = caller.key_id if caller else None
        tell_refused(services.metrics, exc, request_id=request_id, route=self._route, tenant=tenant, key_id=key_id)
        span.refuse(code_of(exc))


class SendGuard:
    """ASGI send that knows whether the answer has begun, and does not wait for ever for one who does not read it."""

    def __init__(self, send: Send, *, unread_s: float) -> None:
        self._send = send
        self._unread_s = unread_s
        self.started = self.streaming = False
        self._headers: list[tuple[bytes, bytes]] = []

    def add_headers(self, headers: Mapping[str, str]) -> None:
        """For the answer, whatever it will be."""
        self._headers += ((name.encode(), value.encode()) for name, value in headers.items())

    async def __call__(self, message: Message) -> None:
        self.started = True
        if self._headers and message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *self._headers]
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
        self.streaming = True

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


async def race_disconnect(
    work: Coroutine[Any, Any, None],
    receive: Receive,
    drain: Drain,
    *,
    before_cut: Callable[[], Coroutine[Any, Any, None]],
) -> None:
    """Do the work, unless the caller leaves first, or the drain's grace ends: then it is cancelled.

    Raises CallerLeft or ShuttingDownError then.
    """
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_disconnected(receive))
    try:
        with drain.cuttable(task):
            await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            await before_cut()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
            raise CallerLeft
        if task.cancelled():
            raise ShuttingDownError
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
