"""What the official client makes of refusals and failures: its classes, its retries, its time-outs."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import sqlalchemy as sa

from adapters.records import LimitKind, LimitSubject
from adapters.registry import Scope
from tests.contract.conftest import Served
from tests.factories import make_adapter

pytestmark = pytest.mark.slow  # the official client against a whole gateway

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"

Ask = Callable[[Served, openai.AsyncOpenAI], Awaitable[Any]]


def chat(client: openai.AsyncOpenAI, **fields: Any) -> Awaitable[Any]:
    return client.chat.completions.create(**{"model": "support", "messages": MESSAGES} | fields)


async def stranger(served: Served, client: openai.AsyncOpenAI) -> None:
    await chat(client.with_options(api_key="lk-wrong"))


async def without_the_scope(served: Served, client: openai.AsyncOpenAI) -> None:
    key = await served.gateway.key("acme", frozenset({Scope.ADAPTERS_READ}))
    await chat(client.with_options(api_key=key))


async def without_an_engine(served: Served, client: openai.AsyncOpenAI) -> None:
    served.gateway.host.state = "stopped"
    await chat(client)


async def unreadable_adapter(served: Served, client: openai.AsyncOpenAI) -> None:
    options: Any = {"headers": {"content-type": "multipart/form-data"}}
    files = {"file": ("a.zip", b"no archive")}
    await client.post("/adapters", cast_to=object, files=files, body={"name": "broken"}, options=options)


REFUSALS: dict[str, tuple[Ask, type[openai.APIStatusError], int, str, str, str | None]] = {
    "an unknown field": (
        lambda _, client: chat(client, extra_body={"temprature": 1}),
        openai.BadRequestError, 400, "invalid_request_error", "unknown_parameter", "temprature",
    ),
    "a wrong value": (
        lambda _, client: chat(client, n=0.5),
        openai.BadRequestError, 400, "invalid_request_error", "invalid_value", "n",
    ),
    "a prompt that is too long": (
        lambda _, client: chat(client, messages=[{"role": "user", "content": "word " * 5000}]),
        openai.BadRequestError, 400, "invalid_request_error", "context_length_exceeded", "messages",
    ),
    "a wrong key": (stranger, openai.AuthenticationError, 401, "invalid_request_error", "invalid_api_key", None),
    "a key without the scope": (
        without_the_scope, openai.PermissionDeniedError, 403, "invalid_request_error", "permission_denied", None,
    ),
    "a template without the scope": (
        lambda _, client: chat(client, extra_body={"chat_template": "{{ messages }}"}),
        openai.PermissionDeniedError, 403, "invalid_request_error", "permission_denied", "chat_template",
    ),
    "an unknown model": (
        lambda _, client: chat(client, model="nobody"),
        openai.NotFoundError, 404, "invalid_request_error", "model_not_found", "model",
    ),
    "an unknown path": (
        lambda _, client: client.embeddings.create(model="support", input="Hi"),
        openai.NotFoundError, 404, "invalid_request_error", "unknown_url", None,
    ),
    "a conflict": (
        lambda _, client: client.post("/adapters/support/rollback", cast_to=object),
        openai.ConflictError, 409, "invalid_request_error", "conflict", None,
    ),
    "a body that is too large": (
        lambda _, client: chat(client, messages=[{"role": "user", "content": "x" * (9 << 20)}]),
        openai.APIStatusError, 413, "invalid_request_error", "body_too_large", None,
    ),
    "an unreadable adapter": (
        unreadable_adapter, openai.UnprocessableEntityError, 422, "invalid_request_error", "invalid_adapter", None,
    ),
    "no engine": (without_an_engine, openai.InternalServerError, 503, "server_error", "no_replica", None),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
async def test_each_refusal_has_its_class_code_type_and_param(
    name: str, served: Served, client: openai.AsyncOpenAI
) -> None:
    ask, cls, status, type_, code, param = REFUSALS[name]
    with pytest.raises(openai.APIStatusError) as refused:
        await ask(served, client)
    error = refused.value
    assert type(error) is cls
    assert (error.status_code, error.type, error.code, error.param) == (status, type_, code, param)
    assert error.request_id is not None
    assert isinstance(error.body, dict)
    assert error.body["message"]


async def test_a_foreign_adapter_cannot_be_told_from_one_that_is_not_there(served: Served, tmp_path: Path) -> None:
    base = served.gateway.base
    await served.upload(make_adapter(tmp_path / "secret", base, seed=1), "secret", tenant="globex")
    asks: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/v1/chat/completions", {"messages": MESSAGES}),
        ("POST", "/v1/completions", {"prompt": "Hi"}),
        ("POST", "/v1/responses", {"input": "Hi"}),
        ("POST", "/tokenize", {"prompt": "Hi"}),
    ]
    async with await served.gateway.client("acme") as acme, asked_of_databases() as statements:
        for there, absent in (("globex/secret", "globex/absent"), ("globex/secret@1", "globex/absent@1")):
            for method, path, fields in asks:
                said = [await seen(acme, method, path, name, fields) for name in (there, absent)]
                assert said[0] == said[1]
            for method in ("GET", "DELETE"):
                said = [await seen(acme, method, f"/v1/models/{name}", name, None) for name in (there, absent)]
                assert said[0] == said[1]
    assert not [statement for statement in statements if "secret" in statement or "absent" in statement]


@asynccontextmanager
async def asked_of_databases() -> AsyncIterator[list[str]]:
    """Statements with their parameters, of every database of this process."""
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append(f"{statement} {parameters}")

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    yield statements
    sa.event.remove(sa.Engine, "before_cursor_execute", note)


async def seen(
    client: httpx.AsyncClient, method: str, path: str, name: str, fields: dict[str, Any] | None
) -> tuple[int, bytes, list[tuple[str, str]]]:
    """Everything a caller gets, with the name and the request's own id blotted out."""
    answer = await client.request(method, path, json=fields | {"model": name} if fields is not None else None)
    assert answer.status_code == 404
    headers = [(key, value) for key, value in answer.headers.items() if key not in ("x-request-id", "content-length")]
    return answer.status_code, answer.content.replace(name.encode(), b"?"), headers


async def test_a_conflict_is_not_repeated(served: Served) -> None:
    async with await served.client(retries=2) as patient:
        with pytest.raises(openai.ConflictError) as conflict:
            await patient.post("/adapters/support/rollback", cast_to=object)
    assert conflict.value.response.headers["x-should-retry"] == "false"
    assert served.requests["/v1/adapters/support/rollback"] == 1


async def test_a_failure_that_lasts_is_not_repeated_and_tells_nothing_of_the_machine(served: Served) -> None:
    home = served.gateway.settings.home
    served.gateway.engine.restart()
    for folder in (home.versions, home.blobs):
        shutil.rmtree(folder)
    async with await served.client(retries=2) as patient:
        with pytest.raises(openai.InternalServerError) as lost:
            await chat(patient)
    assert (lost.value.type, lost.value.code) == ("server_error", "storage")
    assert str(home.root) not in str(lost.value.body)
    assert served.requests[CHAT] == 1


async def limit(served: Served, **limits: float) -> None:
    registry = served.gateway.services.registry
    await asyncio.to_thread(registry.set_limits, LimitSubject(LimitKind.TENANT, "acme"), limits)
    await served.gateway.services.directory.refresh()


async def test_too_many_at_once_wait_as_they_are_told(served: Served) -> None:
    await limit(served, max_in_flight=1)
    engine = served.gateway.engine
    engine.stall()
    async with await served.client(retries=2) as patient:
        first = asyncio.ensure_future(chat(patient))
        await until(lambda: bool(engine.in_flight))
        refused_s = time.monotonic()
        second = asyncio.ensure_future(chat(patient))
        await until(lambda: served.requests[CHAT] == 2)
        engine.wake()
        await asyncio.gather(first, second)
    assert served.requests[CHAT] == 3
    assert time.monotonic() - refused_s > 0.9  # retry-after-ms said 1,000


async def test_what_no_wait_can_mend_is_not_repeated(served: Served) -> None:
    await limit(served, tokens_per_minute=1)
    async with await served.client(retries=2) as patient:
        with pytest.raises(openai.RateLimitError) as refused:
            await chat(patient)
    assert (refused.value.type, refused.value.code) == ("tokens", "rate_limit_exceeded")
    assert served.requests[CHAT] == 1


async def test_an_engine_that_comes_back_is_met_by_a_retry(served: Served) -> None:
    served.gateway.host.state = "restarting"
    async with await served.client(retries=2) as patient:
        asking = asyncio.ensure_future(chat(patient))
        await until(lambda: bool(served.requests[CHAT]))
        served.gateway.host.state = "ready"
        assert (await asking).choices[0].message.content


async def test_a_client_that_waits_no_longer_gives_up_and_the_engine_stops(served: Served) -> None:
    served.gateway.engine.stall()
    async with await served.client(timeout_s=0.3) as hasty:
        with pytest.raises(openai.APITimeoutError):
            await chat(hasty)
    await until(lambda: served.gateway.engine.aborted == 1)
    served.gateway.engine.wake()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancelled_request_stops_the_engine(served: Served, client: openai.AsyncOpenAI, stream: bool) -> None:
    engine = served.gateway.engine
    engine.stall()
    before = engine.aborted
    asking = asyncio.ensure_future(chat(client, stream=stream))
    await until(lambda: bool(engine.in_flight))
    asking.cancel()
    await until(lambda: engine.aborted == before + 1)
    assert not engine.in_flight
    engine.wake()


async def test_closing_a_stream_half_read_stops_the_engine(served: Served, client: openai.AsyncOpenAI) -> None:
    engine = served.gateway.engine
    engine.token_s = 0.05
    stream = await chat(client, stream=True)
    await anext(stream)
    await stream.close()
    await until(lambda: engine.aborted == 1)


async def until(true: Callable[[], bool], timeout_s: float = 5.0) -> None:
    ends_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < ends_s
        await asyncio.sleep(0.01)
