"""A server whose every answer is known beforehand, to measure a load generator's own error with.

    python -m loadtests.known_server --port 8000

It answers in the OpenAI shapes (chat and text completions, streamed) with a fixed number of chunks, each at an instant
drawn for that request's prompt alone, and can freeze as a whole. It runs until its standard input ends, then prints what
really happened: instants on CLOCK_MONOTONIC, which every process of a machine shares.

Built on epoll itself, not on an event loop: a chunk costs one system call, and timers are exact to some microseconds where
those of asyncio and uvloop are to a millisecond.
"""

import argparse
import gc
import hashlib
import heapq
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

MODEL = "known"
CHUNKS = 20
TTFT_MEDIAN_S, TTFT_SIGMA = 0.120, 0.5
GAP_MEDIAN_S, GAP_SIGMA = 0.010, 0.3
ROWS = 2**15  # answers drawn beforehand: drawing them one by one would cost as much as a chunk
SEED = 1


def draw_offsets_s(chunks: int = CHUNKS, seed: int = SEED) -> NDArray[np.float64]:
    """[ROWS, chunks]: seconds from a request's arrival to each of its chunks, ascending in a row.

    The first is lognormal with median 120 ms and sigma 0.5, the gaps are lognormal with median 10 ms and sigma 0.3.
    """
    rng = np.random.default_rng(seed)
    first = rng.lognormal(np.log(TTFT_MEDIAN_S), TTFT_SIGMA, (ROWS, 1))
    gaps = rng.lognormal(np.log(GAP_MEDIAN_S), GAP_SIGMA, (ROWS, chunks - 1))
    return np.cumsum(np.hstack([first, gaps]), axis=1)


def key_of(prompt: str) -> int:
    """Tells requests apart by their prompt; 48 bits, so that JSON readers keep it whole."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=6).digest(), "big")


def row_of(key: int) -> int:
    """The row of draw_offsets_s that answers the request."""
    return key % ROWS


def prompt_of(body: dict[str, Any]) -> str:
    """The prompt, or the last message; a message may come in parts."""
    if "prompt" in body:
        return str(body["prompt"])
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


@dataclass(frozen=True)
class Answers:
    """What is sent as each chunk: bytes made once, head and chunked framing included."""

    frames: tuple[bytes, ...]

    @classmethod
    def shaped(cls, chunks: int, *, chat: bool) -> "Answers":
        kind = "chat.completion.chunk" if chat else "text_completion"
        common = {"id": "known", "object": kind, "created": 0, "model": MODEL}

        def event(document: dict[str, Any]) -> bytes:
            return b"data: " + orjson.dumps(common | document) + b"\n\n"

        frames = []
        for number in range(chunks):
            said = {"delta": {"role": "assistant", "content": " word"}} if chat else {"text": " word"}
            reason = "stop" if number == chunks - 1 else None
            events = event({"choices": [{"index": 0, **said, "finish_reason": reason}]})
            if reason:
                usage = {"prompt_tokens": 10, "completion_tokens": chunks, "total_tokens": 10 + chunks}
                events += event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"
            frames.append(b"%x\r\n%s\r\n" % (len(events), events) + (b"0\r\n\r\n" if reason else b""))
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        return cls((head + frames[0], *frames[1:]))


def plain_answer(status: str, document: dict[str, Any]) -> bytes:
    body = orjson.dumps(document)
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


MODELS = plain_answer("200 OK", {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "lorikeet"}]})
NOT_FOUND = plain_answer("404 Not Found", {"error": {"message": "No such path.", "code": "not_found"}})
NOT_UNDERSTOOD = plain_answer(
    "400 Bad Request", {"error": {"message": "Send a streamed request with a prompt or messages.", "code": "invalid"}}
)


@dataclass(slots=True)
class Connection:
    socket: socket.socket
    unread: bytes = b""
    open: bool = True


@dataclass(slots=True)
class Request:
    """One request as it really went."""

    key: int
    read_s: float
    connection: Connection
    answers: Answers
    due_s: list[float]
    written_s: list[float] = field(default_factory=list)


class KnownServer:
    """One thread, one loop: read what came, write what is due, sleep until the next of either."""

    def __init__(self, *, port: int = 0, chunks: int = CHUNKS, freeze_after_s: float = 0, freeze_s: float = 0) -> None:
        self._offsets_s = draw_offsets_s(chunks)
        self._chat, self._text = Answers.shaped(chunks, chat=True), Answers.shaped(chunks, chat=False)
        self._freeze_after_s, self._freeze_s = freeze_after_s, freeze_s
        self._freeze_at_s = float("inf")
        self._frozen: tuple[float, float] | None = None
        self._requests: list[Request] = []
        self._due: list[tuple[float, int, Request]] = []  # heap: instant, number to break ties
        self._connections: dict[int, Connection] = {}
        self._epoll = select.epoll()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=4096)
        self._listener.setblocking(False)
        self._epoll.register(self._listener, select.EPOLLIN)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def run_until_end_of(self, stdin: int) -> None:
        self._epoll.register(stdin, select.EPOLLIN)
        thawed_s: float | None = None
        while True:
            self._wait()
            now_s = time.monotonic()
            for number, _ in self._epoll.poll(0, 4096):
                if number == stdin:
                    if not os.read(stdin, 4096):
                        return
                elif number == self._listener.fileno():
                    self._accept(thawed_s)
                else:
                    self._read(self._connections[number], thawed_s)
            self._write_due(now_s)
            thawed_s = self._freeze(now_s) if now_s >= self._freeze_at_s else None

    def _wait(self) -> None:
        next_s = min(self._due[0][0] if self._due else float("inf"), self._freeze_at_s)
        wait_s = next_s - time.monotonic()
        if wait_s > 0:
            # epoll counts in milliseconds, select in microseconds, and an epoll can be selected on
            select.select([self._epoll], [], [], min(wait_s, 3600.0))

    def _freeze(self, now_s: float) -> float:
        """What came or fell due after now_s was not seen to, so that is when the freeze begins. Returns its end."""
        time.sleep(self._freeze_s)
        end_s = time.monotonic()
        self._frozen, self._freeze_at_s = (now_s, end_s), float("inf")
        return end_s

    def _accept(self, thawed_s: float | None) -> None:
        with suppress(BlockingIOError):
            while True:
                accepted, _ = self._listener.accept()
                accepted.setblocking(False)
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = self._connections[accepted.fileno()] = Connection(accepted)
                self._epoll.register(accepted, select.EPOLLIN)
                self._read(connection, thawed_s)  # the request mostly came with it

    def _read(self, connection: Connection, thawed_s: float | None) -> None:
        """What waited while the server was frozen counts as read at the thaw, however long reading all of it takes."""
        try:
            data = connection.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close(connection)
            return
        connection.unread += data
        while connection.open and (end := connection.unread.find(b"\r\n\r\n")) >= 0:
            head = connection.unread[:end].lower()
            after = head.partition(b"\r\ncontent-length:")[2]
            length = int(after.split(b"\r\n", 1)[0] or 0)
            if len(connection.unread) < end + 4 + length:
                return
            body = connection.unread[end + 4 : end + 4 + length]
            connection.unread = connection.unread[end + 4 + length :]
            self._answer(connection, head.split(b"\r\n", 1)[0].split(b" ")[1], body, thawed_s)

    def _answer(self, connection: Connection, path: bytes, body: bytes, thawed_s: float | None) -> None:
        if path == b"/v1/models":
            self._send(connection, MODELS)
        elif path not in (b"/v1/chat/completions", b"/v1/completions"):
            self._send(connection, NOT_FOUND)
        else:
            try:
                content = orjson.loads(body)
                prompt = prompt_of(content)
                streamed = bool(content["stream"])
            except (orjson.JSONDecodeError, KeyError, IndexError, TypeError):
                streamed = False
            if not streamed:
                self._send(connection, NOT_UNDERSTOOD)
                return
            key = key_of(prompt)
            read_s = time.monotonic()
            due_s = (self._offsets_s[row_of(key)] + (thawed_s or read_s)).tolist()
            answers = self._chat if path == b"/v1/chat/completions" else self._text
            request = Request(key, read_s, connection, answers, due_s)
            if not self._requests and self._freeze_s:
                self._freeze_at_s = read_s + self._freeze_after_s
            heapq.heappush(self._due, (due_s[0], len(self._requests), request))
            self._requests.append(request)

    def _write_due(self, now_s: float) -> None:
        while self._due and self._due[0][0] <= now_s:
            _, number, request = self._due[0]
            chunk = len(request.written_s)
            if request.connection.open:
                request.written_s.append(time.monotonic())
                self._send(request.connection, request.answers.frames[chunk])
            if request.connection.open and chunk + 1 < len(request.due_s):
                heapq.heapreplace(self._due, (request.due_s[chunk + 1], number, request))
            else:
                heapq.heappop(self._due)

    def _send(self, connection: Connection, data: bytes) -> None:
        """A client that left, or reads so slowly that the socket is full, is dropped."""
        try:
            sent = connection.socket.send(data)
        except OSError:
            sent = -1
        if sent != len(data):
            self._close(connection)

    def _close(self, connection: Connection) -> None:
        if connection.open:
            connection.open = False
            self._connections.pop(connection.socket.fileno())
            connection.socket.close()

    def log(self) -> dict[str, Any]:
        return {
            "chunks": self._offsets_s.shape[1],
            "frozen": self._frozen,
            "requests": [{"key": r.key, "read_s": r.read_s, "written_s": r.written_s} for r in self._requests],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0: any free one; it is printed first")
    parser.add_argument("--chunks", type=int, default=CHUNKS, help="of every answer")
    parser.add_argument("--freeze-after-s", type=float, default=0, help="from the first request")
    parser.add_argument("--freeze-s", type=float, default=0, help="stand still that long, once; 0: never")
    given = vars(parser.parse_args())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the generator, which then closes our standard input
    with suppress(OSError, AttributeError):
        # Where that is allowed it goes before all others, or its lateness would count as the client's: on two cores with
        # 2.5 busy processes, chunks went out 0.1 ms late at P99 instead of 9 ms with ordinary raised priority.
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    server = KnownServer(**given)
    gc.disable()
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    server.run_until_end_of(sys.stdin.fileno())
    sys.stdout.buffer.write(orjson.dumps(server.log()))


if __name__ == "__main__":
    main()
