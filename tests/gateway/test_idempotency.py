import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from gateway.idempotency import KEPT_S, Idempotency


class Counting:
    """An application that counts what is really done."""

    def __init__(self) -> None:
        self.done = 0
        self.status = 200
        self.now_s = 0.0
        app = Starlette(routes=[Route("/v1/adapters/{rest:path}", self.act, methods=["POST"])])
        guarded = Idempotency(app, prefixes=("/v1/adapters",), clock=lambda: self.now_s)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://l")

    async def act(self, request: Request) -> JSONResponse:
        await asyncio.sleep(0.01)
        self.done += 1
        return JSONResponse({"done": self.done, "echo": (await request.body()).decode()}, status_code=self.status)

    async def post(self, body: str = "{}", path: str = "a/rollback", **headers: str) -> int:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = await self.client.post(f"/v1/adapters/{path}", content=body, headers=sent)
        return int(answer.json()["done"])


@pytest.fixture
async def app() -> AsyncIterator[Counting]:
    counting = Counting()
    async with counting.client:
        yield counting


async def test_one_key_is_done_once_even_at_once(app: Counting) -> None:
    answers = await asyncio.gather(*(app.post(idempotency_key="k") for _ in range(5)))
    assert (app.done, set(answers)) == (1, {1})


async def test_a_retry_gets_the_first_answer_and_a_new_request_is_done(app: Counting) -> None:
    assert await app.post(x_stainless_retry_count="0") == 1
    assert await app.post(x_stainless_retry_count="1") == 1
    assert await app.post(x_stainless_retry_count="0") == 2


async def test_a_retry_whose_first_never_arrived_is_done(app: Counting) -> None:
    assert await app.post(x_stainless_retry_count="2") == 1


async def test_callers_paths_and_bodies_are_kept_apart(app: Counting) -> None:
    assert await app.post(idempotency_key="k", authorization="Bearer a") == 1
    assert await app.post(idempotency_key="k", authorization="Bearer b") == 2
    assert await app.post(idempotency_key="k", authorization="Bearer a", path="b/rollback") == 3
    assert await app.post('{"version":1}') == 4
    assert await app.post('{"version":2}', x_stainless_retry_count="1") == 5


async def test_a_failure_may_be_tried_again(app: Counting) -> None:
    app.status = 503
    await app.post(idempotency_key="k")
    app.status = 200
    assert await app.post(idempotency_key="k") == 2


async def test_those_who_waited_for_a_failure_do_not_all_try_again_at_once(app: Counting) -> None:
    app.status = 500
    first = asyncio.create_task(app.post(idempotency_key="k"))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(app.post(idempotency_key="k")) for _ in range(4)]
    await first
    app.status = 200
    assert {await request for request in waiting} == {2}
    assert app.done == 2


async def test_answers_are_forgotten_in_time(app: Counting) -> None:
    await app.post(idempotency_key="k")
    app.now_s = KEPT_S + 1
    assert await app.post(idempotency_key="k") == 2
