"""Spans of requests, under the GenAI names; and nothing at all where nobody collects them."""

import asyncio
import dataclasses
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from gateway.engines.echo import EchoEngine
from gateway.spans import Spans
from gateway.tracing import ENDPOINTS, NO_TRACER, open_tracer
from tests.gateway.conftest import Gateway, listening, running_gateway
from tests.gateway.test_failure import busy, engine_of, stall
from tests.gateway.test_generation import Publish, chat, publisher, until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CHAT = "/v1/chat/completions"


@pytest.fixture
def publish(gateway: Gateway, tmp_path: Path) -> Publish:
    return publisher(gateway, tmp_path)


@pytest.fixture
def kept(gateway: Gateway) -> InMemorySpanExporter:
    return keep_spans(gateway)


def keep_spans(gateway: Gateway) -> InMemorySpanExporter:
    kept = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    gateway.app.state.services = dataclasses.replace(gateway.services, tracer=Spans(provider))
    return kept


def by_name(kept: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in kept.get_finished_spans()}


def facts(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def times_ns(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


async def test_a_request_is_a_span_with_the_genai_names_and_its_waits_inside(
    gateway: Gateway, publish: Publish, kept: InMemorySpanExporter
) -> None:
    await publish("support", text="one two three")
    async with await gateway.client() as client:
        answer = await client.post(CHAT, json=chat("support", stream=True))
    spans = by_name(kept)
    assert spans.keys() == {"chat support", "queue", "load", "engine"}
    request = spans["chat support"]
    attributes = facts(request)
    assert request.kind is SpanKind.SERVER
    assert request.status.status_code is StatusCode.UNSET
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.provider.name"] == "lorikeet"
    assert attributes["gen_ai.request.model"] == "support"
    assert attributes["gen_ai.request.stream"] is True
    assert attributes["gen_ai.response.model"] == "acme/support@1"
    assert attributes["gen_ai.usage.input_tokens"] == 4
    assert attributes["gen_ai.usage.output_tokens"] >= 3
    assert attributes["gen_ai.response.time_to_first_chunk"] > 0
    assert attributes["lorikeet.tenant"] == "acme"
    assert attributes["lorikeet.request.id"] == answer.headers["x-request-id"]
    for name in ("queue", "load", "engine"):
        inside = spans[name]
        assert inside.parent is not None
        assert inside.parent.span_id == request.context.span_id
        began_ns, ended_ns = times_ns(inside)
        assert times_ns(request)[0] <= began_ns <= ended_ns <= times_ns(request)[1], name
    assert times_ns(spans["queue"])[1] <= times_ns(spans["load"])[1]
    assert spans["engine"].kind is SpanKind.CLIENT


async def test_the_callers_trace_is_continued_and_handed_on_to_the_engine(
    gateway: Gateway, publish: Publish, kept: InMemorySpanExporter
) -> None:
    await publish("support")
    async with await gateway.client() as client:
        await client.post(CHAT, json=chat("support"), headers={"traceparent": PARENT, "tracestate": "vendor=1"})
    spans = by_name(kept)
    request = spans["chat support"]
    assert request.parent is not None
    assert f"{request.parent.trace_id:032x}-{request.parent.span_id:016x}" == PARENT[3:-3]
    sent = gateway.engine.requests[-1].headers
    assert sent["traceparent"] == f"{PARENT[:35]}-{spans['engine'].context.span_id:016x}-01"
    assert sent["tracestate"] == "vendor=1"


async def test_a_caller_that_does_not_sample_is_heeded(
    gateway: Gateway, publish: Publish, kept: InMemorySpanExporter
) -> None:
    await publish("support")
    async with await gateway.client() as client:
        await client.post(CHAT, json=chat("support"), headers={"traceparent": PARENT[:-1] + "0"})
    assert not kept.get_finished_spans()
    assert gateway.engine.requests[-1].headers["traceparent"].endswith("-00")


@pytest.mark.parametrize(
    ("key", "body", "name", "code"),
    [
        ("Bearer lk-wrong", chat("support"), "chat", "invalid_api_key"),
        (None, chat("nobody"), "chat", "model_not_found"),
        (None, chat("support", n=1_000_000), "chat", "invalid_value"),
    ],
)
async def test_a_refused_request_is_a_span_that_says_why(
    gateway: Gateway,
    publish: Publish,
    kept: InMemorySpanExporter,
    key: str | None,
    body: dict[str, object],
    name: str,
    code: str,
) -> None:
    await publish("support")
    async with await gateway.client() as client:
        await client.post(CHAT, json=body, headers={"authorization": key} if key else {})
    (span,) = kept.get_finished_spans()
    assert span.name == name
    assert span.status.status_code is StatusCode.ERROR
    assert facts(span)["error.type"] == code


async def test_every_engine_a_request_was_given_to_is_a_span(tmp_path: Path, tiny_base: Path) -> None:
    async with running_gateway(tmp_path / "home", tiny_base, engines=2) as pair:
        kept = keep_spans(pair)
        stall(pair)
        async with await pair.client() as client:
            asked = asyncio.create_task(client.post(CHAT, json=chat(pair.services.base.name)))
            await until(lambda: any(engine_of(host).in_flight for host in pair.hosts))
            engine_of(busy(pair)).die()
            for host in pair.hosts:
                engine_of(host).wake()
            assert (await asked).status_code == 200
    first, second = [span for span in kept.get_finished_spans() if span.name == "engine"]
    assert facts(first)["error.type"] == "engine_unavailable"
    assert "error.type" not in facts(second)
    assert facts(first)["lorikeet.engine"] != facts(second)["lorikeet.engine"]


async def test_a_caller_that_leaves_ends_every_span(tmp_path: Path, tiny_base: Path) -> None:
    slow = lambda: EchoEngine(slots=4, token_s=0.05)  # noqa: E731
    async with running_gateway(tmp_path / "home", tiny_base, engine=slow) as gateway:
        await publisher(gateway, tmp_path)("support", text="word " * 200)
        kept = keep_spans(gateway)
        async with listening(gateway.app) as url, await gateway.client() as keyed:
            async with httpx.AsyncClient(base_url=url, headers=keyed.headers) as client:
                async with client.stream("POST", CHAT, json=chat("support", stream=True)) as answer:
                    await anext(answer.aiter_bytes())
            await until(lambda: "chat support" in by_name(kept))
        spans = by_name(kept)
        assert facts(spans["chat support"])["error.type"] == "cancelled"
        assert facts(spans["engine"])["error.type"] == "cancelled"


async def test_no_span_holds_what_was_asked_or_answered_or_the_key(
    gateway: Gateway, publish: Publish, kept: InMemorySpanExporter
) -> None:
    await publish("support", text="the secret answer")
    async with await gateway.client() as client:
        body = chat("support", messages=[{"role": "user", "content": "a secret question"}], user="somebody")
        await client.post(CHAT, json=body)
        key = client.headers["authorization"].removeprefix("Bearer ")
    told = "".join(span.to_json() for span in kept.get_finished_spans())
    assert "support" in told
    for secret in ("secret", "somebody", key, str(gateway.settings.home.root)):
        assert secret not in told


def test_without_a_collector_opentelemetry_is_not_imported() -> None:
    code = (
        "import sys, gateway.app, gateway.tracing as t; t.open_tracer(None); assert 'opentelemetry' not in sys.modules"
    )
    environment = {"PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


@pytest.fixture
def collector() -> Iterator[tuple[str, list[str]]]:
    """Where it listens, and the paths it was sent something to."""
    paths: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            paths.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("how", ["setting", *ENDPOINTS])
async def test_spans_reach_a_collector_however_it_is_named(
    how: str, collector: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, paths = collector
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    if how != "setting":
        monkeypatch.setenv(how, f"{url}/v1/traces" if how == ENDPOINTS[0] else url)
    tracer = open_tracer(url if how == "setting" else None)
    assert tracer is not NO_TRACER
    tracer.begin("completions", {}).refuse("invalid_value")
    await tracer.close()
    assert paths == ["/v1/traces"]


async def test_a_collector_that_is_away_does_not_keep_the_gateway_from_stopping() -> None:
    tracer = open_tracer("http://127.0.0.1:9")
    tracer.begin("completions", {}).refuse("invalid_value")
    async with asyncio.timeout(9):
        await tracer.close()
