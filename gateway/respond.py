"""Answers in OpenAI's shapes, written as raw ASGI so that the hot path builds no response objects."""

from collections.abc import Iterable
from typing import Any

import orjson
from starlette.types import Send

from gateway.errors import error_body, error_headers, error_object_for

Headers = list[tuple[bytes, bytes]]


async def send_json(send: Send, status: int, body: bytes, headers: Headers | None = None) -> None:
    """body: JSON, already written."""
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": fixed + (headers or [])})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, exc: BaseException) -> None:
    """The one translation of errors, for ASGI apps."""
    headers = [(name.encode(), value.encode()) for name, value in error_headers(exc).items()]
    await send_json(send, error_object_for(exc).status, orjson.dumps(error_body(exc)), headers)


def list_object(data: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": list(data), "has_more": False}
