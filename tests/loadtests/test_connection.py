"""Against a server that sends exactly the bytes it is told."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.connection import BrokenConnectionError, ConnectionPool
from loadtests.loop import new_event_loop
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
    came_s: list[float] = field(default_factory=list)
    pause_s: float = 0.0
    hurries: bool = True
    end: "asyncio.Future[float]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def on_head(self, status: int, headers: Mapping[bytes, bytes], at_s: float) -> None:
        self.status, self.headers = status, headers

    def on_body(self, data: bytes, at_s: float) -> float:
        self.body += data
        self.reads_s.append(time.monotonic())
        self.came_s.append(at_s)
        return self.pause_s

    def on_end(self, at_s: float, error: Exception | None) -> None:
        if error is None:
            self.end.set_result(at_s)
        else:
            self.end.set_exception(error)


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


async def ask(pool: ConnectionPool, pause_s: float = 0.0, *, hurries: bool = True) -> Received:
    received = Received(pause_s=pause_s, hurries=hurries)
    exchange = pool.start(b"request", received, time.monotonic)
    try:
        await received.end
    except asyncio.CancelledError:
        exchange.abandon()
        raise
    return received


@pytest.mark.parametrize("loop_factory", [new_event_loop, asyncio.new_event_loop])
@settings(max_examples=50)
@given(cuts=st.lists(st.integers(0, len(CHUNKED)), max_size=8), answer=st.sampled_from([CHUNKED, SIZED]))
def test_an_answer_is_the_same_wherever_its_bytes_are_cut(
    loop_factory: Callable[[], asyncio.AbstractEventLoop], cuts: list[int], answer: bytes
) -> None:
    async def check() -> None:
        ends = [*sorted(min(cut, len(answer)) for cut in cuts), len(answer)]
        pieces = [answer[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        async with serving(*pieces) as (_, pool):
            received = await ask(pool)
        assert (received.status, received.body) == (200, b"hello, there")

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(check())


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


async def test_a_server_that_went_away_is_an_error_and_found_again_when_it_is_back() -> None:
    server = Server([b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi"], closes=True)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    pool = ConnectionPool("127.0.0.1", port, None)
    assert (await ask(pool)).body == b"hi"
    listener.close()
    for _ in range(3):
        with pytest.raises((ConnectionRefusedError, BrokenConnectionError)):
            await ask(pool)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", port)
    for _ in range(3):
        assert (await ask(pool)).body == b"hi"
    await pool.close()
    listener.close()


@pytest.mark.parametrize("hurries", [True, False])
async def test_instants_are_those_at_which_bytes_came_however_late_they_are_looked_at(hurries: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        asked, stalls, done = threading.Event(), threading.Event(), threading.Event()
        sent_s: list[float] = []

        def serve() -> None:
            with listener.accept()[0] as accepted:
                accepted.recv(4096)
                asked.set()
                stalls.wait(10)
                sent_s.append(time.monotonic())
                accepted.sendall(SIZED)
                sent_s.append(time.monotonic())
                done.wait(10)

        server = threading.Thread(target=serve)
        server.start()
        pool = ConnectionPool("127.0.0.1", listener.getsockname()[1], None)
        received = Received(hurries=hurries)
        pool.start(b"request", received, time.monotonic)
        await until(asked.is_set)
        stalls.set()
        while len(sent_s) < 2:  # this event loop stands still, as when others have the processor
            time.sleep(0.001)  # noqa: ASYNC251
        time.sleep(0.4)  # noqa: ASYNC251
        end_s = await received.end
        done.set()
        await pool.close()
        server.join()
    assert sent_s[0] - 0.01 < end_s < sent_s[1] + 0.1
    assert received.reads_s[0] > sent_s[1] + 0.4


async def test_chunks_that_are_fetched_together_are_one_at_the_instant_of_the_last() -> None:
    asked, stalls, done = threading.Event(), threading.Event(), threading.Event()
    sent_s: list[float] = []

    def serve() -> None:
        with listener.accept()[0] as accepted:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            accepted.recv(4096)
            asked.set()
            stalls.wait(10)
            for piece in (CHUNKED[:-12], CHUNKED[-12:]):
                sent_s.append(time.monotonic())
                accepted.sendall(piece)
                time.sleep(0.2)
            done.wait(10)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve)
        server.start()
        pool = ConnectionPool("127.0.0.1", listener.getsockname()[1], None)
        received = Received(hurries=False)
        pool.start(b"request", received, time.monotonic)
        await until(asked.is_set)
        stalls.set()
        while len(sent_s) < 2:
            time.sleep(0.001)  # noqa: ASYNC251
        time.sleep(0.1)  # noqa: ASYNC251
        await received.end
        done.set()
        await pool.close()
        server.join()
    assert (received.body, len(received.came_s)) == (b"hello, there", 1)
    assert sent_s[1] - 0.01 < received.came_s[0] < sent_s[1] + 0.1


async def test_an_answer_nobody_waits_for_is_whole_once_it_is_asked_for() -> None:
    async with serving(SIZED) as (server, pool):
        received = Received(hurries=False)
        exchange = pool.start(b"request", received, time.monotonic)
        async with asyncio.timeout(10):
            while not received.end.done():
                await asyncio.sleep(0)
                exchange.catch_up()
        assert received.body == b"hello, there"
        assert (await ask(pool)).body == b"hello, there"
        assert server.connections == 1


async def test_what_comes_after_an_answer_nobody_waits_for_ends_the_connection_too() -> None:
    async with serving(SIZED, 0.2, b"HTTP/1.1 408 Request Timeout\r\n\r\n") as (server, pool):
        received = Received(hurries=False)
        pool.start(b"request", received, time.monotonic)
        await received.end
        await until(lambda: server.left == 1)
        assert (await ask(pool)).body == b"hello, there"
        assert server.connections == 2


async def test_a_request_larger_than_a_socket_takes_is_sent_whole() -> None:
    taken = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        await asyncio.sleep(0.2)
        while taken < len(request):
            taken += len(await reader.read(65536))
        writer.write(SIZED)
        writer.close()

    request = bytes(32 * 2**20)
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        pool = ConnectionPool("127.0.0.1", listener.sockets[0].getsockname()[1], None)
        received = Received()
        pool.start(request, received, time.monotonic)
        await asyncio.wait_for(received.end, 20)
        await pool.close()
    assert (taken, received.body) == (len(request), b"hello, there")
