import asyncio
import math
import socket
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.inbox import ANSWERS, LONGEST_PAUSE_S, PAUSE_S, Inbox, Link


class Reader:
    def __init__(self) -> None:
        self.usable = True
        self.pieces: list[tuple[bytes, float]] = []
        self.lost = asyncio.Event()

    def received(self, pieces: Sequence[tuple[bytes, float]]) -> None:
        self.pieces += pieces

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    near.setblocking(False)
    with near, far:
        yield near, far


def fetch(inbox: Inbox, far: socket.socket, data: bytes = b"x") -> float:
    """What is sent now; how long the pause after it is."""
    if data:
        far.sendall(data)
        while not inbox.epoll.poll(1):
            pass
    began_s = time.monotonic()
    inbox.fetch()
    return inbox.look_s - began_s


def watches(inbox: Inbox) -> bool:
    return inbox.watches


async def test_what_comes_often_is_left_alone_between_two_looks(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    inbox = Inbox()
    link = Link(near, Reader(), inbox)
    link.ask(b"request", hurries=False)
    inbox.note_gap(math.inf)
    fetch(inbox, far)
    assert watches(inbox)  # the first for a long time
    for _ in range(1000):
        pause_s = fetch(inbox, far)
        if not watches(inbox):  # two came shortly after one another, as a busy machine may not let them
            break
    assert not watches(inbox)
    assert pause_s > LONGEST_PAUSE_S - 1e-3
    time.sleep(3 * LONGEST_PAUSE_S)  # noqa: ASYNC251
    fetch(inbox, far, b"")
    assert watches(inbox)  # nothing came for long
    link.abort()
    inbox.close()


async def test_nothing_is_left_alone_while_part_of_a_request_is_unsent(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    near, far = ends
    inbox = Inbox()
    link = Link(near, Reader(), inbox)
    link.ask(bytes(32 * 2**20), hurries=False)
    for _ in range(10):
        fetch(inbox, far)
        assert inbox.watches
    link.abort()
    assert not inbox.writing
    inbox.close()


async def test_where_somebody_waits_pauses_are_short_until_the_answer_is_there(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    near, far = ends
    inbox, reader = Inbox(), Reader()
    link = Link(near, reader, inbox)
    inbox.note_gap(math.inf)
    link.ask(b"request", hurries=True)
    assert inbox.hurried == 1
    fetch(inbox, far, b"answer")
    assert [data for data, _ in reader.pieces] == [b"answer"]
    link.rest()
    link.abort()
    assert inbox.hurried == 0
    await asyncio.wait_for(reader.lost.wait(), 5)
    assert not reader.usable
    inbox.close()


@pytest.mark.parametrize("end", [b"", b"0\r\n\r\n"])
async def test_an_answer_is_read_when_it_is_whole_or_nothing_more_comes(
    end: bytes, ends: tuple[socket.socket, socket.socket]
) -> None:
    near, far = ends
    inbox, reader = Inbox(), Reader()
    link = Link(near, reader, inbox)
    link.ask(b"request", hurries=False)
    fetch(inbox, far, b"hello")
    assert not reader.pieces
    if end:
        fetch(inbox, far, end)
    assert link.is_ripe(before_ns=0) == bool(end)
    async with asyncio.timeout(5):
        while not reader.pieces:
            await asyncio.sleep(max(0.0, inbox.look_s - time.monotonic()))
            inbox.fetch()
    assert b"".join(data for data, _ in reader.pieces) == b"hello" + end
    link.abort()
    inbox.close()


@given(gaps_s=st.lists(st.one_of(st.floats(0, 1), st.just(math.inf)), min_size=1))
def test_a_pause_is_shorter_than_the_gaps_of_late_but_never_below_the_least(gaps_s: list[float]) -> None:
    inbox = Inbox()
    for gap_s in gaps_s:
        inbox.note_gap(gap_s)
    pause_s = inbox.pause_s
    assert PAUSE_S <= pause_s <= LONGEST_PAUSE_S
    assert pause_s == PAUSE_S or pause_s < min(gaps_s[-ANSWERS:])
    inbox.hurried = 1
    assert inbox.pause_s == PAUSE_S
    inbox.close()
