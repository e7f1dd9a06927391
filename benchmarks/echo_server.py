"""An engine without a model over HTTP, for measuring what stands in front of it: the same bytes from a Unix and a TCP socket.

    python -m benchmarks.echo_server --socket /tmp/engine.sock --port 9000

A plain chat is answered at once. A stream sends `max_tokens` frames, 50 a second. What else an engine is asked for (log-
probabilities, adapters, the list of models) is answered by the stand-in engine of the tests.
"""

import argparse
import asyncio
from pathlib import Path
from typing import Any, cast

import httptools
import orjson
import uvloop

from gateway.engines.echo import EchoEngine
from gateway.engines.profile import BASE_NAME

FRAME_S = 0.02
CHAT = b"/v1/chat/completions"
COMMON = {"id": "chatcmpl-echo", "created": 1_700_000_000, "model": BASE_NAME}
WORD = " word"


def plain(document: Any, status: bytes = b"200 OK") -> bytes:
    body = document if isinstance(document, bytes) else orjson.dumps(document)
    head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body


def whole_answer() -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": WORD * 16}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 16, "completion_tokens": 16, "total_tokens": 32}
    return plain(COMMON | {"object": "chat.completion", "choices": [choice], "usage": usage})


def frame(choices: list[Any], **more: Any) -> bytes:
    event = b"data: " + orjson.dumps(COMMON | {"object": "chat.completion.chunk", "choices": choices} | more) + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(event), event)


def said(delta: dict[str, Any], reason: str | None = None) -> list[Any]:
    return [{"index": 0, "delta": delta, "finish_reason": reason}]


WHOLE = whole_answer()
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM_HEAD += frame(said({"role": "assistant", "content": ""}))
FRAME = frame(said({"content": WORD}))
END = frame(said({}, "stop")) + frame([], usage={"prompt_tokens": 16, "completion_tokens": 16, "total_tokens": 32})
END += b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Connection(asyncio.Protocol):
    """One keep-alive connection."""

    transport: asyncio.Transport

    def __init__(self, engine: EchoEngine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._path, self._body = b"", bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._path = url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        raw, self._body = bytes(self._body), bytearray()
        asked = orjson.loads(raw) if self._path == CHAT else {"logprobs": True}
        if not asked.get("logprobs"):
            if asked.get("stream"):
                self._left = asked.get("max_tokens") or 16
                self.transport.write(STREAM_HEAD)
                self._tick(asyncio.get_running_loop().time())
            else:
                self.transport.write(WHOLE)
            return
        self._task = asyncio.ensure_future(self._other(self._path.decode(), raw))

    def _tick(self, due_s: float) -> None:
        if not self._left:
            self.transport.write(END)
            return
        self._left -= 1
        self.transport.write(FRAME)
        due_s += FRAME_S
        self._timer = asyncio.get_running_loop().call_at(due_s, self._tick, due_s)

    async def _other(self, path: str, raw: bytes) -> None:
        if path == "/health":
            answer = plain({})
        elif path == "/v1/models":
            answer = plain({"object": "list", "data": [{"id": BASE_NAME, "object": "model", "owned_by": "echo"}]})
        elif path == "/lorikeet/adapters":
            answer = plain({"adapters": []})
        elif path == "/metrics":
            answer = plain(b"")
        else:
            async with self._engine.open(path, raw) as response:
                answer = plain(await response.read(), b"%d X" % response.status)
        self.transport.write(answer)


async def serve(socket: Path, port: int) -> None:
    engine, loop = EchoEngine(), asyncio.get_running_loop()
    unix = await loop.create_unix_server(lambda: Connection(engine), str(socket), backlog=4096)
    tcp = await loop.create_server(lambda: Connection(engine), "127.0.0.1", port, backlog=4096)
    async with unix, tcp:
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    uvloop.run(serve(given.socket, given.port))


if __name__ == "__main__":
    main()
