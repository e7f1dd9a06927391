"""A repeated POST is answered like the first one, not done again.

Two requests are the same when one caller sends them to one path with one `Idempotency-Key`; or, since the official
client sends no such key, when the second says that it is a retry (`x-stainless-retry-count`) and both bodies are equal.
Answers are kept in this process's memory for a while: a retry comes within seconds. Uploads need none of this: equal
content is an equal version.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

KEPT_S = 600.0  # the official client gives up after that
KEPT_ANSWERS = 4096
MAX_BODY_BYTES = 64 * 1024  # administrative bodies are small; larger ones pass through


@dataclass
class Answer:
    """What the first request got; `messages` stays empty when it failed or was cut off, and then one of the next is done."""

    done: asyncio.Event
    at_s: float
    messages: tuple[Message, ...] = ()


class Idempotency:
    """Pure ASGI middleware over the paths that begin with one of `prefixes`."""

    def __init__(self, app: ASGIApp, *, prefixes: tuple[str, ...], clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._prefixes = prefixes
        self._clock = clock
        self._answers: OrderedDict[str, Answer] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" and scope["method"] == "POST" else None
        if headers is None or not _small(headers) or not scope["path"].startswith(self._prefixes):
            await self._app(scope, receive, send)
            return
        messages = await _body(receive)
        key, repeat = _identity(scope, headers, messages)
        while repeat and (known := self._find(key)) is not None:
            await known.done.wait()
            if known.messages:
                for message in known.messages:
                    await send(dict(message))
                return
        await self._do(key, scope, _replay(messages, receive), send)

    async def _do(self, key: str, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answers[key] = Answer(asyncio.Event(), self._clock())
        self._answers.move_to_end(key)
        sent: list[Message] = []

        async def record(message: Message) -> None:
            sent.append(dict(message))  # a copy: what is outside of this middleware adds headers to it
            await send(message)

        try:
            await self._app(scope, receive, record)
            if sent and sent[0]["status"] < 500:  # a failure of ours may be tried again
                answer.messages = tuple(sent)
        finally:
            if not answer.messages and self._answers.get(key) is answer:
                del self._answers[key]  # of all who waited for it, one does it again and the others wait for that one
            answer.done.set()
            self._forget_old()

    def _find(self, key: str) -> Answer | None:
        self._forget_old()
        return self._answers.get(key)

    def _forget_old(self) -> None:
        oldest_s = self._clock() - KEPT_S
        while self._answers and (
            len(self._answers) > KEPT_ANSWERS or next(iter(self._answers.values())).at_s < oldest_s
        ):
            self._answers.popitem(last=False)


def _small(headers: Headers) -> bool:
    size = headers.get("content-length", "0")
    return "transfer-encoding" not in headers and size.isdecimal() and int(size) <= MAX_BODY_BYTES


async def _body(receive: Receive) -> list[Message]:
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
        messages.append(await receive())
    return messages


def _identity(scope: Scope, headers: Headers, messages: list[Message]) -> tuple[str, bool]:
    """What makes two requests the same, and whether this one may be a repetition."""
    named = headers.get("idempotency-key")
    retries = headers.get("x-stainless-retry-count", "0")
    content = named.encode() if named else b"".join(message.get("body", b"") for message in messages)
    caller = f"{headers.get('authorization')}\n{headers.get('openai-project')}\n{scope['path']}\n{bool(named)}\n"
    digest = hashlib.sha256(caller.encode() + content).hexdigest()
    return digest, named is not None or (retries.isdecimal() and int(retries) > 0)


def _replay(messages: list[Message], receive: Receive) -> Receive:
    waiting = iter(messages)

    async def replay() -> Message:
        return next(waiting, None) or await receive()

    return replay
