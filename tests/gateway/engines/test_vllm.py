import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import orjson
import pytest
from aiohttp import web

from gateway.engines.protocol import Engine, EngineAdapters
from gateway.engines.vllm import VllmEngine
from gateway.errors import AdapterLoadError, EngineError, EngineUnavailableError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Serve = Callable[[dict[str, Handler]], Awaitable[Engine]]


def answer(status: int, body: object, record: list[object] | None = None) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        if record is not None:
            record.append(await request.json())
        if isinstance(body, str):
            return web.Response(status=status, text=body)
        return web.json_response(body, status=status)

    return handler


def error(status: int, message: str) -> Handler:
    return answer(status, {"error": {"message": message, "type": "X", "param": None, "code": status}})


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Answers on a Unix socket as told, and gives a client for it."""
    runners: list[web.AppRunner] = []
    engines: list[VllmEngine] = []

    async def _serve(handlers: dict[str, Handler]) -> Engine:
        app = web.Application()
        for route, handler in handlers.items():
            method, path = route.split()
            app.router.add_route(method, path, handler)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.UnixSite(runner, str(tmp_path / "e.sock"), backlog=1024).start()
        runners.append(runner)
        engines.append(VllmEngine("e", tmp_path / "e.sock"))
        return engines[-1]

    yield _serve
    for engine in engines:
        await engine.close()
    for runner in runners:
        await runner.cleanup()


async def test_body_and_headers_arrive_as_they_were_given(serve: Serve) -> None:
    seen: list[tuple[bytes, str | None, str]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append((await request.read(), request.headers.get("X-Request-Id"), request.content_type))
        return web.Response(status=418, body=b"\xff raw", content_type="text/event-stream")

    engine = await serve({"POST /v1/completions": handler})
    async with engine.open("/v1/completions", b'{"a": 1}', headers={"X-Request-Id": "r1"}) as response:
        assert (response.status, response.content_type) == (418, "text/event-stream")
        assert await response.read() == b"\xff raw"
    assert seen == [(b'{"a": 1}', "r1", "application/json")]


async def test_chunks_come_while_the_engine_still_generates(serve: Serve) -> None:
    go_on = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await go_on.wait()
        await response.write(b"data: 2\n\n")
        return response

    engine = await serve({"POST /s": handler})
    async with engine.open("/s", b"{}") as response:
        chunks = response.chunks()
        assert await anext(chunks) == b"data: 1\n\n"
        go_on.set()
        assert await anext(chunks) == b"data: 2\n\n"
        assert [chunk async for chunk in chunks] == []


async def test_leaving_early_closes_the_connection(serve: Serve) -> None:
    closed = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            closed.set()
            raise
        return response

    engine = await serve({"POST /s": handler})
    async with engine.open("/s", b"{}") as response:
        await anext(response.chunks())
    async with asyncio.timeout(5):
        await closed.wait()


async def test_giving_up_before_the_answer_closes_the_connection(serve: Serve) -> None:
    arrived, closed = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        arrived.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            closed.set()
            raise
        return web.Response()

    engine = await serve({"POST /s": handler})

    async def ask() -> None:
        async with engine.open("/s", b"{}"):
            pass

    asking = asyncio.create_task(ask())
    await arrived.wait()
    asking.cancel()
    async with asyncio.timeout(5):
        await closed.wait()


async def test_an_engine_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    engine = VllmEngine("e", tmp_path / "nothing.sock")
    with pytest.raises(EngineUnavailableError, match="'e' cannot be reached"):
        async with engine.open("/v1/completions", b"{}"):
            pass
    with pytest.raises(EngineUnavailableError):
        await engine.load("a", tmp_path)
    with pytest.raises(EngineUnavailableError):
        await engine.adapters()
    assert not await engine.healthy()
    await engine.close()


@pytest.mark.parametrize("whole", [True, False])
async def test_an_answer_that_breaks_off_is_unavailable(serve: Serve, *, whole: bool) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        assert request.transport is not None
        request.transport.close()
        return response

    engine = await serve({"POST /s": handler})

    async def receive() -> None:
        async with engine.open("/s", b"{}") as response:
            if whole:
                await response.read()
            async for _ in response.chunks():
                pass

    with pytest.raises(EngineUnavailableError, match="broke off"):
        await receive()


async def test_a_load_names_the_adapter_and_its_folder(serve: Serve) -> None:
    seen: list[object] = []
    engine = await serve({"POST /v1/load_lora_adapter": answer(200, "Success", seen)})
    await engine.load("acme/a@1-00000000", Path("/v/a"))
    assert seen == [{"lora_name": "acme/a@1-00000000", "lora_path": "/v/a"}]


async def test_loading_what_is_loaded_is_success(serve: Serve) -> None:
    engine = await serve({"POST /v1/load_lora_adapter": error(400, "The lora adapter 'a' has already been loaded.")})
    await engine.load("a", Path("/v/a"))


async def test_errors_tell_no_path_of_ours(serve: Serve, tmp_path: Path) -> None:
    engine = VllmEngine("e", tmp_path / "nobody.sock")
    with pytest.raises(EngineUnavailableError) as away:
        await engine.adapters()
    assert str(tmp_path) not in str(away.value)
    folder = tmp_path / "versions" / "acme"
    refusing = await serve({"POST /v1/load_lora_adapter": error(400, f"No adapter found for {folder}")})
    with pytest.raises(AdapterLoadError, match="No adapter found for acme/a@1") as refused:
        await refusing.load("acme/a@1", folder)
    assert str(tmp_path) not in str(refused.value)
    await engine.close()


@pytest.mark.parametrize("status", [400, 404, 500])
async def test_a_refused_load_carries_the_reason_of_the_engine(serve: Serve, status: int) -> None:
    engine = await serve(
        {"POST /v1/load_lora_adapter": error(status, "rank 32 too large"), "GET /health": answer(200, "")}
    )
    with pytest.raises(AdapterLoadError, match="rank 32 too large"):
        await engine.load("a", Path("/v/a"))


async def test_a_failed_load_on_a_dead_engine_is_not_the_adapters_fault(serve: Serve) -> None:
    engine = await serve({"POST /v1/load_lora_adapter": error(500, "EngineCore died"), "GET /health": answer(503, "")})
    with pytest.raises(EngineUnavailableError, match="EngineCore died"):
        await engine.load("a", Path("/v/a"))


async def test_registered_and_resident_are_told_apart(serve: Serve) -> None:
    entries = [
        {"name": "a", "id": 1, "registered": True, "resident": True},
        {"name": "b", "id": 2, "registered": True, "resident": False},
        {"name": "c", "id": 3, "registered": False, "resident": True},
    ]
    engine = await serve({"GET /lorikeet/adapters": answer(200, {"adapters": entries, "unnamed": 0})})
    assert await engine.adapters() == EngineAdapters(frozenset("ab"), frozenset("ac"))


async def test_an_engine_without_our_plugin_is_told_as_such(serve: Serve) -> None:
    engine = await serve({})
    with pytest.raises(EngineError, match="VLLM_PLUGINS"):
        await engine.adapters()


async def test_remove_and_pin_ask_the_plugin_by_name(serve: Serve) -> None:
    seen: list[object] = []
    handler = answer(200, {"removed": True}, seen)
    engine = await serve({"POST /lorikeet/remove": handler, "POST /lorikeet/pin": handler})
    await engine.remove("a")
    await engine.pin("b")
    assert seen == [{"name": "a"}, {"name": "b"}]


async def test_a_refusal_to_remove_or_pin_is_an_engine_error(serve: Serve) -> None:
    engine = await serve(
        {"POST /lorikeet/remove": error(409, "still 2 running"), "POST /lorikeet/pin": error(404, "no")}
    )
    with pytest.raises(EngineError, match="still 2 running"):
        await engine.remove("a")
    with pytest.raises(AdapterLoadError):
        await engine.pin("a")


async def test_metrics_are_text_and_health_is_a_status(serve: Serve) -> None:
    engine = await serve({"GET /metrics": answer(200, "vllm:x 1\n"), "GET /health": answer(503, "")})
    assert await engine.metrics() == "vllm:x 1\n"
    assert not await engine.healthy()


async def test_many_requests_run_at_once(serve: Serve) -> None:
    arrived = 0
    all_here = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal arrived
        arrived += 1
        if arrived == 150:  # aiohttp's own limit is 100 connections
            all_here.set()
        await all_here.wait()
        return web.json_response({})

    engine = await serve({"POST /s": handler})

    async def ask() -> None:
        async with engine.open("/s", orjson.dumps({})) as response:
            await response.read()

    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        for _ in range(150):
            tasks.create_task(ask())


async def test_an_engine_closed_is_opened_again_by_the_next_request(serve: Serve) -> None:
    engine = await serve({"GET /health": answer(200, "")})
    assert await engine.healthy()
    await engine.close()
    assert await engine.healthy()
