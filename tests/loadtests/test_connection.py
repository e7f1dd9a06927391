"""Against a server that sends exactly the bytes it is told."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.connection import BrokenConnectionError, ConnectionPool
from tests.loadtests.server import until

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Some: thing\r\n\r\n5\r\nhello\r\n7\r\n, there\r\n0\r\n\r\n"
)
SIZED = b"HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\nhello, there"


@dataclass
class Received:
    status: int = 0
    headers: Mapping[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    reads_s: list[float] = field(default_factory=list)
    pause_s: float = 0.0

    def on_head(self, status: int, headers: Mapping[bytes, bytes], at_s: float) -> None:
        self.status, self.headers = status, headers

    def on_body(self, data: bytes, at_s: float) -> float:
        self.body += data
        self.reads_s.append(at_s)
        return self.pause_s


@dataclass
class Server:
    """Sends the pieces, and then closes where it should."""

    pieces: Sequence[bytes | float]
    closes: bool = False
    connections: int = 0
    requests: int = 0
    left: int = 0
    tasks: "set[asyncio.Task[None] | None]" = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.tasks.add(asyncio.current_task())
        try:
            while await reader.read(4096):
                self.requests += 1
                for piece in self.pieces:
                    if isinstance(piece, float):
                        await asyncio.sleep(piece)
                    else:
                        writer.write(piece)
                        await asyncio.sleep(0)
                if self.closes:
                    break
        except (asyncio.CancelledError, ConnectionError):
            pass  # the client is gone, or the test is over
        finally:
            self.left += 1
            writer.close()


@asynccontextmanager
async def serving(*pieces: bytes | float, closes: bool = False) -> AsyncIterator[tuple[Server, ConnectionPool]]:
    server = Server(pieces, closes)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    pool = ConnectionPool("127.0.0.1", listener.sockets[0].getsockname()[1], None)
    try:
        yield server, pool
    finally:
        await pool.close()
        listener.close()
        for task in filter(None, server.tasks):
            task.cancel()
        await asyncio.gather(*filter(None, server.tasks), return_exceptions=True)


async def ask(pool: ConnectionPool, pause_s: float = 0.0) -> Received:
    received = Received(pause_s=pause_s)
    await pool.exchange(b"request", received, time.monotonic)
    return received


@settings(max_examples=50)
@given(cuts=st.lists(st.integers(0, len(CHUNKED)), max_size=8), answer=st.sampled_from([CHUNKED, SIZED]))
def test_an_answer_is_the_same_wherever_its_bytes_are_cut(cuts: list[int], answer: bytes) -> None:
    async def check() -> None:
        ends = [*sorted(min(cut, len(answer)) for cut in cuts), len(answer)]
        pieces = [answer[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        async with serving(*pieces) as (_, pool):
            received = await ask(pool)
        assert (received.status, received.body) == (200, b"hello, there")

    asyncio.run(check())


async def test_a_connection_is_used_again_only_after_its_answer_is_whole() -> None:
    async with serving(CHUNKED[:-5], 0.05, CHUNKED[-5:]) as (server, pool):
        await asyncio.gather(*(ask(pool) for _ in range(5)))
        assert (server.connections, server.requests) == (5, 5)
        for _ in range(5):
            assert (await ask(pool)).body == b"hello, there"
        assert (server.connections, server.requests) == (5, 10)


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    async with serving(b"HTTP/1.1 200 OK\r\n\r\nhello", 0.02, b", there", closes=True) as (server, pool):
        assert (await ask(pool)).body == b"hello, there"
        assert (await ask(pool)).body == b"hello, there"
        assert server.connections == 2


async def test_a_server_that_says_it_closes_is_not_asked_again_on_that_connection() -> None:
    answer = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi"
    async with serving(answer) as (server, pool):
        assert (await ask(pool)).body == (await ask(pool)).body == b"hi"
        assert server.connections == 2


async def test_an_interim_answer_is_not_the_answer() -> None:
    async with serving(b"HTTP/1.1 100 Continue\r\n\r\n", 0.1, SIZED) as (_, pool):
        received = await ask(pool)
        assert (received.status, received.headers) == (200, {b"content-length": b"12"})


@pytest.mark.parametrize(
    ("pieces", "said"),
    [([CHUNKED[:-9]], "ServerDisconnected"), ([], "ServerDisconnected"), ([b"SSH-2.0-nonsense\r\n"], "HttpParser")],
)
async def test_an_answer_that_is_cut_short_or_not_http_is_broken(pieces: list[bytes], said: str) -> None:
    async with serving(*pieces, closes=True) as (server, pool):
        for _ in range(2):
            with pytest.raises(BrokenConnectionError, match=said):
                await ask(pool)
        assert server.connections == 2


async def test_bytes_that_nobody_asked_for_end_a_connection() -> None:
    async with serving(SIZED, 0.05, b"HTTP/1.1 408 Request Timeout\r\n\r\n") as (server, pool):
        await ask(pool)
        await asyncio.sleep(0.2)
        assert (await ask(pool)).status == 200
        assert server.connections == 2


async def test_leaving_closes_the_connection() -> None:
    async with serving(CHUNKED[:-5]) as (server, pool):
        for number in (1, 2):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await ask(pool)
            await until(lambda: server.left == server.connections)
            assert server.connections == number


async def test_pauses_lie_between_reads_and_not_after_the_last() -> None:
    pieces = [part for byte in CHUNKED for part in (bytes([byte]), 0.01)]
    async with serving(*pieces) as (server, pool):
        received = await ask(pool, pause_s=0.3)
        assert received.body == b"hello, there"
        assert all(
            later - earlier > 0.25 for earlier, later in zip(received.reads_s, received.reads_s[1:], strict=False)
        )
        server.pieces = [SIZED]
        began_s = time.monotonic()
        await ask(pool)
        assert received.reads_s
        assert time.monotonic() - began_s < 0.3
        assert server.connections == 1


async def test_nobody_listening_is_an_error_of_the_system() -> None:
    pool = ConnectionPool("127.0.0.1", 1, None)
    with pytest.raises(ConnectionRefusedError):
        await ask(pool)
