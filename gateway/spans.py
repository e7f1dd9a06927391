"""OpenTelemetry spans: one for each request under the GenAI names, and inside it queue, load and each call of an engine.

The names are those of the GenAI conventions (open-telemetry/semantic-conventions-genai, status Development), all of them
here because they still change. No prompt, answer or key is ever an attribute. Imports OpenTelemetry: see `tracing`.
"""

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from adapters.ledger import Entry
from gateway.relay import code_of

OPERATIONS = {"completions": "text_completion", "tokenize": "tokenize"}  # by route; else chat
PROVIDER = "lorikeet"
CLOSE_S = 3.0  # longest wait for a collector that is away, when the gateway stops
_PROPAGATOR = TraceContextTextMapPropagator()


def exporting(endpoint: str | None) -> TracerProvider:
    """Sends spans in batches from a thread of its own. What the SDK reads from OTEL_… (sampler, headers, name) holds."""
    resource = Resource({SERVICE_NAME: PROVIDER}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    traces = f"{endpoint.rstrip('/')}/v1/traces" if endpoint else None
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=traces)))
    return provider


class Spans:
    """Implements `tracing.Tracer`."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("lorikeet.gateway")

    def begin(self, route: str, headers: Mapping[str, str]) -> "TracedRequest":
        operation = OPERATIONS.get(route, "chat")
        span = self._tracer.start_span(
            operation,
            context=_PROPAGATOR.extract({name: headers[name] for name in _PROPAGATOR.fields if name in headers}),
            kind=SpanKind.SERVER,
            attributes={"gen_ai.operation.name": operation, "gen_ai.provider.name": PROVIDER},
        )
        return TracedRequest(self, span, operation)

    async def close(self) -> None:
        """Send what is left, unless that takes too long: a collector that is away is tried for ten seconds."""
        closing = threading.Thread(target=self._provider.shutdown, name="close traces", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, CLOSE_S)

    def start(self, name: str, parent: Span, **options: object) -> Span:
        return self._tracer.start_span(name, context=set_span_in_context(parent), **options)  # type: ignore[arg-type]


class TracedRequest:
    """Implements `tracing.RequestSpan`."""

    def __init__(self, spans: Spans, span: Span, operation: str) -> None:
        self._spans = spans
        self._span = span
        self._operation = operation

    @contextmanager
    def engine(self, engine: str) -> Iterator[Mapping[str, str]]:
        span = self._spans.start("engine", self._span, kind=SpanKind.CLIENT, attributes={"lorikeet.engine": engine})
        headers: dict[str, str] = {}
        _PROPAGATOR.inject(headers, context=set_span_in_context(span))
        try:
            yield headers
        except BaseException as exc:
            _fail(span, "cancelled" if isinstance(exc, asyncio.CancelledError) else code_of(exc))
            raise
        finally:
            span.end()

    def end(self, entry: Entry) -> None:
        now_ns = time.time_ns()
        began_ns = now_ns - round((entry.ended_s or 0.0) * 1e9)
        if self._span.is_recording():
            for name, from_s, to_s in waits(entry):
                child = self._spans.start(name, self._span, start_time=began_ns + round(from_s * 1e9))
                child.end(began_ns + round(to_s * 1e9))
            self._span.update_name(f"{self._operation} {entry.requested}")
            self._span.set_attributes(attributes_of(entry))
        if entry.outcome != "ok":
            _fail(self._span, entry.outcome)
        self._span.end(now_ns)

    def refuse(self, code: str) -> None:
        _fail(self._span, code)
        self._span.end()


def waits(entry: Entry) -> list[tuple[str, float, float]]:
    """Name, begin and end of each wait, in seconds after the request came."""
    ended_s = entry.ended_s or 0.0
    found = []
    if entry.queued_s is not None:
        found.append(("queue", entry.queued_s, ended_s if entry.admitted_s is None else entry.admitted_s))
    if entry.admitted_s is not None and entry.version is not None:
        found.append(("load", entry.admitted_s, ended_s if entry.loaded_s is None else entry.loaded_s))
    return found


def attributes_of(entry: Entry) -> dict[str, str | int | float | bool]:
    found: dict[str, str | int | float | bool] = {
        "gen_ai.request.model": entry.requested,
        "gen_ai.request.stream": entry.stream,
        "gen_ai.response.model": entry.model if entry.version is None else f"{entry.model}@{entry.version}",
        "gen_ai.usage.input_tokens": entry.prompt_tokens,
        "gen_ai.usage.output_tokens": entry.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": entry.cached_tokens,
        "lorikeet.request.id": entry.request_id,
        "lorikeet.tenant": entry.tenant,
        "lorikeet.key.id": entry.key_id,
    }
    if entry.stream and entry.first_s is not None:
        found["gen_ai.response.time_to_first_chunk"] = entry.first_s
    if entry.replica is not None:
        found["lorikeet.engine"] = entry.replica
    return found


def _fail(span: Span, code: str) -> None:
    span.set_attribute("error.type", code)
    span.set_status(Status(StatusCode.ERROR))
