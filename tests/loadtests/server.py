"""A tiny streaming server on loopback for these tests: what it answers, and when it freezes, is told in advance."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
from aiohttp import web

Script = Callable[[dict[str, Any]], list[bytes | float]]  # bytes are sent, numbers slept


def event(**fields: object) -> bytes:
    return b"data: " + orjson.dumps(fields) + b"\n\n"


def token(text: str, finish_reason: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}])


ROLE = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
USAGE = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3})
DONE = b"data: [DONE]\n\n"
GOOD: list[bytes | float] = [ROLE, 0.01, token("a"), 0.01, token("b"), 0.01, token("c", "stop"), USAGE, DONE]


class FakeServer:
    """OpenAI-shaped: /v1/models and /v1/chat/completions."""

    def __init__(self) -> None:
        self.models = ["base", "support"]
        self.script: Script = lambda _: GOOD
        self.status = 200
        self.lists_models = True
        self.headers: dict[str, str] = {}  # of every answer, over those it has anyway
        self.key: str | None = None
        self.requests: list[tuple[dict[str, Any], str]] = []  # body, authorization
        self.frozen_s: tuple[float, float] | None = None  # after the first request: when, how long
        self.page = ""  # of /metrics
        self.deeds: list[tuple[str, str, str, dict[str, str]]] = []  # method, path, authorization, JSON or form as text
        self.left: Callable[[], None] = lambda: None  # called when a client leaves in mid-answer
        self.url = ""

    async def _models(self, request: web.Request) -> web.Response:
        if not self.lists_models:
            raise web.HTTPNotFound
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "Invalid API key", "code": "invalid_api_key"}}, status=401)
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        if not self.requests and self.frozen_s:
            self._freeze_from = time.monotonic() + self.frozen_s[0]
        body = orjson.loads(await request.read())
        self.requests.append((body, request.headers.get("Authorization", "")))
        await self._wait_out_the_freeze()
        if self.status != 200:
            error = {"message": "no", "code": "told_to"}
            return web.json_response({"error": error}, status=self.status, headers=self.headers)
        if not body["stream"]:
            choice = {"message": {"content": "abc"}, "finish_reason": "stop"}
            return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})
        headers = {"x-lorikeet-adapter": f"{body['model']}@1", "x-lorikeet-queue-ms": "12.5"} | self.headers
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        try:
            for part in self.script(body):
                if isinstance(part, float):
                    await asyncio.sleep(part)
                else:
                    await response.write(part)
        except ConnectionResetError:
            self.left()
        return response

    async def _metrics(self, request: web.Request) -> web.Response:
        self.deeds.append(("GET", "/metrics", request.headers.get("Authorization", ""), {}))
        return web.Response(text=self.page, status=self.status)

    async def _deed(self, request: web.Request) -> web.Response:
        if request.content_type == "application/json":
            said = {name: str(value) for name, value in (await request.json()).items()}
        else:
            parts = await request.post()
            files = {name: part for name, part in parts.items() if isinstance(part, web.FileField)}
            said = {name: f"{part.filename}: {part.file.read().decode()}" for name, part in files.items()}
        self.deeds.append((request.method, request.path, request.headers.get("Authorization", ""), said))
        error = {"message": "no", "code": "told_to"}
        return web.json_response({"error": error} if self.status >= 400 else {}, status=self.status)

    async def _wait_out_the_freeze(self) -> None:
        if self.frozen_s:
            now = time.monotonic()
            end = self._freeze_from + self.frozen_s[1]
            if self._freeze_from <= now < end:
                await asyncio.sleep(end - now)


@asynccontextmanager
async def serving(server: FakeServer) -> AsyncIterator[FakeServer]:
    app = web.Application()
    app.router.add_get("/v1/models", server._models)
    app.router.add_post("/v1/chat/completions", server._chat)
    app.router.add_get("/metrics", server._metrics)
    app.router.add_route("*", "/v1/adapters/{name:.*}", server._deed)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


async def until(holds: Callable[[], bool], *, within_s: float = 20) -> None:
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110  what is waited for knows nothing of events
            await asyncio.sleep(0.05)
